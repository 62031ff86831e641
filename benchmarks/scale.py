"""How far does it scale? Statistics of ImageNet's size, made up, from detection to the page.

What a pass over ImageNet's validation images would leave of ResNet-50's ``layer4.2.conv3`` (1000 classes, 2048 channels
that read 512 inputs, 7 x 7 positions) is made up, and then goes through everything that happens after the last batch:
detection and grouping, memberships of all flagged channels, their quality on held-out samples, sweep, overview and
cards, and the files. Of each stage: seconds, share, the processor's seconds and the largest resident set. With
``--growth`` how the processor's seconds grow when classes, channels, inputs or classes per channel (pairs grow with
their square) are doubled: the exponent, 1 is in proportion. It is measured at a smaller size.

How it is made. The sources are what comes out of a rectifier: parts of things, each a heavy-tailed (log-normal) pattern
of a few sources at a place of its own in the map. A family of twenty classes shares three parts, each class adds one,
and every image shows a weak background and parts of other things. A channel reads the parts of two or three families,
with noise on its weights, half of the channels with the sign turned round. It is relevant for some classes of those
families: about ten on average, sixty at most (log-normal), about 200,000 candidate pairs in all, and at a fourth of the
relevance threshold for some eighty others. Kept are as many samples of each class as fit into the default
``calibration_memory`` (10, half of them held out). Relevance vectors are those of entries that are relevant, and of
four classes for all channels, as `vectors.RelevanceVectors` keeps them; that is nearly twice of what the default memory
would hold.

Example:
    python benchmarks/scale.py
    python benchmarks/scale.py --growth --method optimized
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from measuring import peak_resident, reset_peak, resident, table
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_polydis import PolysemanticityReport
from lightning_polydis.planning import LayerEvidence
from lightning_polydis.settings import MEBIBYTE, AnalysisSettings
from lightning_polydis.statistics import ClassStatistics, Samples
from lightning_polydis.summary import LayerSummary
from lightning_polydis.thumbnails import thumbnail_side
from lightning_polydis.vectors import N_GROUPS, ClassVectors

LAYER = "layer4.2.conv3"
IMAGES_PER_CLASS = 50
FAMILY_SIZE, FAMILY_PARTS = 20, 3
N_BACKGROUND, N_STRAY = 8, 2
N_FULL_CLASSES = 4
DENSITY = 0.06
"""Part of the sources that a part of a thing uses."""


@dataclass(frozen=True)
class Size:
    """How large the layer and its data are."""

    classes: int = 1000
    channels: int = 2048
    inputs: int = 512
    classes_per_channel: float = 10.5
    side: int = 7


DIMENSIONS = ("classes", "channels", "inputs", "classes_per_channel")
QUICK = Size(classes=60, channels=16, inputs=24, classes_per_channel=6, side=3)
SMALLER = Size(classes=400, channels=192, inputs=256)
"""Where growth is measured from."""


class World:
    """Everything that is made up: the samples, the layer that reads them, and which class it is relevant for.

    Args:
        size: Of it all.
        settings: Say how many samples fit into memory.
    """

    def __init__(self, size: Size, settings: AnalysisSettings) -> None:
        self.size, self._settings = size, settings
        self._draw = torch.Generator().manual_seed(0)
        self._n_families = max(3, size.classes // FAMILY_SIZE)
        n_parts = N_BACKGROUND + FAMILY_PARTS * self._n_families + size.classes
        self._parts = self._normal(n_parts, size.inputs).exp() * (self._uniform(n_parts, size.inputs) < DENSITY)
        self.samples = self._samples()
        self.layer, self._families = self._layer()
        self.relevant = self._relevant()

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._draw)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._draw)

    def _family_parts(self, family: int) -> list[int]:
        first = N_BACKGROUND + FAMILY_PARTS * family
        return list(range(first, first + FAMILY_PARTS))

    def _samples(self) -> Samples:
        size = self.size
        per_image = size.inputs * size.side**2 * 4 + size.channels
        affordable = int(self._settings.calibration_memory * MEBIBYTE // (size.classes * per_image))
        per_class = min(self._settings.calibration_samples or 0, affordable)
        inputs = torch.empty(size.classes, per_class, size.inputs, size.side, size.side)
        for label in range(size.classes):
            inputs[label] = self._images(label, per_class)
        targets = torch.arange(size.classes).repeat_interleave(per_class)
        relevant = torch.ones(len(targets), size.channels, dtype=torch.bool)
        pictures = self._pictures(len(targets))
        return Samples(inputs.flatten(0, 1), targets, relevant, thumbnails=pictures)

    def _images(self, label: int, n_images: int) -> Tensor:
        """What the layer reads of some images of a class, ``[n, I, side, side]``."""
        side, own = self.size.side, self._family_parts(label % self._n_families)
        common = torch.arange(N_BACKGROUND).tolist()
        first_own = len(self._parts) - self.size.classes
        stray = (self._uniform(n_images, N_STRAY) * len(self._parts)).long()
        shown = torch.cat([torch.tensor([*common, *own, first_own + label]).expand(n_images, -1), stray], dim=1)
        strength = (0.5 * self._normal(*shown.shape)).exp()
        strength[:, :N_BACKGROUND] *= 0.2
        centre = self._uniform(*shown.shape, 2) * (side - 1)
        grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).flatten(0, 1)
        near = (-((grid - centre[:, :, None]) ** 2).sum(-1) / (2 * (side / 4) ** 2)).exp()  # [n, parts, P]
        found = torch.einsum("npq,npi->niq", near * strength[..., None], self._parts[shown])
        return F.relu(found + 0.3 * self._normal(*found.shape) - 0.1).unflatten(2, (side, side))

    def _pictures(self, n_images: int) -> Tensor:
        side = thumbnail_side(n_images, self._settings.thumbnail_bytes)
        coarse = torch.randint(256, (n_images, 3, 4, 4), generator=self._draw).float()
        pictures = torch.empty(n_images, 3, side, side, dtype=torch.uint8)
        for start in range(0, n_images, 256):
            part = slice(start, start + 256)
            pictures[part] = F.interpolate(coarse[part], (side, side), mode="bilinear").byte()
        return pictures

    def _layer(self) -> tuple[nn.Conv2d, list[list[int]]]:
        """The layer, and the families whose parts each channel reads."""
        families = []
        layer = nn.Conv2d(self.size.inputs, self.size.channels, 1).requires_grad_(False)
        for channel in range(self.size.channels):
            own = torch.randperm(self._n_families, generator=self._draw)[: 2 + channel % 2].tolist()
            parts = F.normalize(self._parts[[part for family in own for part in self._family_parts(family)]])
            weight = ((0.3 * self._normal(len(parts), 1)).exp() * parts).sum(0)
            weight += 0.5 * weight.std() * self._normal(self.size.inputs) - 0.5 * weight.mean()
            layer.weight[channel, :, 0, 0] = self.sign(channel) * weight
            layer.bias[channel] = -0.2 * self.sign(channel)
            families.append(own)
        return layer, families

    @staticmethod
    def sign(channel: int) -> int:
        """The direction in which classes use a channel."""
        return 1 if channel % 4 < 2 else -1

    def _relevant(self) -> Tensor:
        """Which channels are relevant for which class, ``[K, C]``."""
        relevant = torch.zeros(self.size.classes, self.size.channels, dtype=torch.bool)
        spread = 0.85
        numbers = (spread * self._normal(self.size.channels) - spread**2 / 2).exp() * self.size.classes_per_channel
        for channel, own in enumerate(self._families):
            per_family = self.size.classes // self._n_families
            order = self._uniform(len(own), per_family).argsort(1)
            n_each = max(1, min(round(float(numbers[channel]) / len(own)), per_family))
            for family, chosen in zip(own, order[:, :n_each], strict=True):
                relevant[chosen * self._n_families + family, channel] = True
        return relevant

    def statistics(self, means: Tensor) -> ClassStatistics:
        """Counts: a share of relevance for each entry, around the threshold that it has to be."""
        size, thresholds = self.size, self._settings.relevance_thresholds
        level = self._normal(size.classes, size.channels) - 6
        likely = 1.2 + 1.5 * self._uniform(size.classes, size.channels)
        level = torch.where(self.relevant, likely, level.clamp(max=1))
        shares = [torch.sigmoid(level - math.log(value / thresholds[0]) / 0.4) for value in thresholds]
        counts = torch.stack([(IMAGES_PER_CLASS * share).round().int() for share in shares])
        signs = torch.tensor([self.sign(channel) for channel in range(size.channels)], dtype=torch.int8)
        return ClassStatistics(
            torch.full((size.classes,), IMAGES_PER_CLASS),
            thresholds,
            counts,
            signs.repeat(size.classes, 1),
            torch.ones(size.classes, size.channels, dtype=torch.bool),
            means.double()[..., None],
        )

    def vectors(self, means: Tensor) -> ClassVectors:
        """Weight times the class's mean input, with noise, for entries that are relevant and for some classes all."""
        kept = self.relevant.clone()
        kept[torch.randperm(self.size.classes, generator=self._draw)[:N_FULL_CLASSES]] = True
        labels, channels = kept.nonzero(as_tuple=True)
        per_group = IMAGES_PER_CLASS / N_GROUPS
        sums = torch.empty(len(labels), N_GROUPS, self.size.inputs)
        weight = self.layer.weight[:, :, 0, 0]
        for start in range(0, len(labels), 1024):
            part = slice(start, start + 1024)
            sums[part] = (weight[channels[part]] * means[labels[part]] * per_group)[:, None]
            sums[part] *= (0.5 * self._normal(*sums[part].shape)).exp()
        counts = torch.full((len(labels), N_GROUPS), per_group)
        return ClassVectors(labels * self.size.channels + channels, sums, counts, self.size.channels)

    def evidence(self) -> LayerEvidence:
        """What a pass over data would have left."""
        means = self.samples.inputs.unflatten(0, (self.size.classes, -1)).mean((1, 3, 4))
        vectors = self.vectors(means) if self._settings.method == "optimized" else None
        return LayerEvidence(LAYER, self.layer, self._settings, self.statistics(means), vectors, self.samples)


def report_of(evidence: LayerEvidence) -> PolysemanticityReport:
    """The report, as the analysis makes it."""
    found = evidence.detect()
    n_channels, n_inputs = evidence.layer.weight.shape[:2]
    return PolysemanticityReport(
        layers=[LayerSummary.of(found, n_channels, n_inputs)],
        channels=found.channels,
        pairs=found.pairs,
        settings={"layers": [LAYER], **evidence.settings.to_json()},
        n_images=int(evidence.statistics.n_images.sum()),
        class_names=[f"class {label}" for label in range(len(evidence.statistics.n_images))],
        _evidence={LAYER: evidence},
    )


@dataclass(frozen=True)
class Stage:
    """What one stage took: seconds, seconds of all cores, largest resident set in MiB."""

    name: str
    wall: float
    cpu: float
    peak: float


def timed(name: str, work: Callable[[], object]) -> Stage:
    """Do some work and see what it takes."""
    reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Stage(name, time.perf_counter() - wall, time.process_time() - cpu, peak_resident())


def run(size: Size, method: str, folder: Path) -> tuple[list[Stage], PolysemanticityReport]:
    """All stages."""
    evidence = World(size, AnalysisSettings(method=method)).evidence()
    stages: list[Stage] = []
    found: list[PolysemanticityReport] = []
    stages.append(timed("detection and grouping", lambda: found.append(report_of(evidence))))
    report = found[0]
    works = {
        "memberships": lambda: report.plan,
        "quality on held-out samples": lambda: report.quality,
        "sweep": lambda: report.sweeps,
        "overview": lambda: report.overviews,
        "cards": lambda: report.cards,
        "report.json": lambda: report.save(folder / "report.json"),
        "split_plan.json": lambda: report.plan.save(folder / "split_plan.json"),
        "markdown": report.to_markdown,
        "report.html": lambda: report.to_html(folder / "report.html"),
    }
    stages += [timed(name, work) for name, work in works.items()]
    return stages, report


def print_stages(stages: Sequence[Stage], report: PolysemanticityReport, folder: Path) -> None:
    """A table, and what it is about."""
    layer, total = report.layers[0], sum(stage.wall for stage in stages)
    print(
        f"{layer.n_candidates} candidate channels, {layer.n_candidate_pairs} candidate pairs; {layer.n_polysemantic} "
        f"channels and {layer.n_pairs} pairs flagged, {sum(len(split.concepts) for split in report.plan)} concepts"
    )
    rows = [
        [stage.name, f"{stage.wall:.2f}", f"{stage.wall / total:.0%}", f"{stage.cpu:.2f}", f"{stage.peak:.0f}"]
        for stage in stages
    ]
    cpu, peak = sum(stage.cpu for stage in stages), max(stage.peak for stage in stages)
    rows.append(["**all**", f"**{total:.1f}**", "", f"{cpu:.1f}", f"**{peak:.0f}**"])
    print(table(["stage", "seconds", "share", "processor seconds", "peak MiB"], rows))
    sizes = (f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in sorted(folder.iterdir()))
    print(f"files: {', '.join(sizes)}", flush=True)


def measure(size: Size, method: str) -> None:
    """Print what everything takes at one size."""
    resident()  # what was used before is given back
    with tempfile.TemporaryDirectory() as folder:
        stages, report = run(size, method, Path(folder))
        print(f"\n{method}: ", end="")
        print_stages(stages, report, Path(folder))


def measure_growth(size: Size, method: str) -> None:
    """Print by which power of each of its dimensions the time of each stage grows."""

    def seconds(some: Size) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            return {stage.name: stage.cpu for stage in run(some, method, Path(folder))[0]}

    seconds(QUICK)  # what is imported or set up once
    base = seconds(size)
    grown = {name: seconds(replace(size, **{name: 2 * getattr(size, name)})) for name in DIMENSIONS}
    rows = [
        [name, f"{before:.2f}", *(f"{math.log2(found[name] / before):.1f}" for found in grown.values())]
        for name, before in base.items()
    ]
    start = ", ".join(f"{getattr(size, name):g} {name.replace('_', ' ')}" for name in DIMENSIONS)
    print(f"\n{method}: from {start}, each doubled by itself")
    print(table(["stage", "seconds", *DIMENSIONS], rows), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["optimized", "paper"], nargs="+", default=["optimized", "paper"])
    for name in DIMENSIONS:
        default = getattr(Size, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--growth", action="store_true", help="how times grow, instead of the times at this size")
    parser.add_argument("--quick", action="store_true", help="a very small layer, to see whether the script works")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    size = Size(*(getattr(options, name) for name in DIMENSIONS))
    for method in options.method:
        if options.growth:
            measure_growth(QUICK if options.quick else SMALLER, method)
        else:
            measure(QUICK if options.quick else size, method)


if __name__ == "__main__":
    main()
