"""Memory of the callback against numbers of classes, channels and calibration samples: measured, and by a formula.

Each row is a fresh process that validates a network with one layer of interest, which reads 7 x 7 positions of images
of 224 x 224 pixels. Measured is by how much the process has grown when the last batch has been seen, and at its
largest, the report included.

Example:
    python benchmarks/memory.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass

import lightning.pytorch as pl
import torch
from measuring import MEBIBYTE, peak_resident, resident, table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_polydis import ChannelDisentanglement

IMAGE_SIZE, PATCH = 224, 32
POSITIONS = (IMAGE_SIZE // PATCH) ** 2
BATCH_SIZE = 32


def bytes_kept(
    classes: int,
    channels: int,
    inputs: int,
    positions: int,
    *,
    samples: int = 32,
    memory: float = 1024,
    method: str = "optimized",
    groups: int = 1,
    offsets: int = 1,
    image_side: int = 224,
) -> dict[str, float]:
    """Bytes that the callback keeps of one layer, at most.

    Args:
        classes: Width of the logits.
        channels: Output channels of the layer.
        inputs: Its input channels, of all groups.
        positions: Positions of its input: height x width, or tokens.
        samples: `calibration_samples`.
        memory: `calibration_memory`, in MiB, divided by the number of layers.
        method: `method`.
        groups: Groups of the convolution.
        offsets: Size of its kernel, 9 for 3 x 3.
        image_side: Height (and width) of the images, for the thumbnails; 0 if there are no images.
    """
    budget = memory * 2**20
    kept = {"counts": 28 * classes * channels}  # five thresholds x int32, two sums x float32
    if method == "paper":
        kept["window sums"] = 8 * classes * inputs * offsets  # float64
    else:
        vector = 4 * 8 * inputs // groups  # float32, eight groups of images
        entries = min(classes * channels, budget / 4 // vector)
        kept["relevance vectors"] = entries * (vector + 48) + 12 * classes * channels
    sample = 4 * inputs * positions + channels  # the layer's input, float32; which channels are relevant, boolean
    per_class = min(samples, budget // (classes * sample))
    kept["samples"] = classes * per_class * sample
    side = math.isqrt(int(budget / 8 / (3 * max(classes * per_class, 1))))
    side = 0 if side < 32 else min(side, 96, image_side)
    kept["thumbnails"] = classes * per_class * 3 * side**2
    return kept


@dataclass(frozen=True)
class Case:
    """What to validate; the arguments of `bytes_kept`."""

    classes: int = 50
    channels: int = 512
    inputs: int = 128
    samples: int = 16
    method: str = "optimized"
    relevance_threshold: float = 0.03
    epochs: int = 1

    def expected(self) -> dict[str, float]:
        """MiB by `bytes_kept`."""
        sizes = (self.classes, self.channels, self.inputs, POSITIONS)
        kept = bytes_kept(*sizes, samples=self.samples, method=self.method, image_side=IMAGE_SIZE)
        return {name: value / MEBIBYTE for name, value in kept.items()}

    def images(self) -> int:
        """Images of an epoch: as many of each class as samples are wanted."""
        sample = 4 * self.inputs * POSITIONS + self.channels
        affordable = int(1024 * MEBIBYTE // (self.classes * sample))
        return self.classes * max(1, min(self.samples, affordable))


CASES = [
    *(Case(classes=classes) for classes in (25, 50, 100)),
    *(Case(channels=channels) for channels in (256, 1024)),
    *(Case(samples=samples) for samples in (0, 64)),
    Case(inputs=256),
    Case(epochs=2),
    *(Case(samples=samples, method="paper") for samples in (32, 64)),
    # ImageNet and ResNet-50's `layer4.2.conv3`: more samples and entries than fit, so both are filled up.
    Case(classes=1000, channels=2048, inputs=512, samples=32, relevance_threshold=0.0004),
    Case(classes=1000, channels=2048, inputs=512, samples=32, method="paper"),
]
QUICK = [Case(classes=4, channels=64, inputs=32, samples=4)]


class Network(pl.LightningModule):
    """Something cheap for the layer of interest to read, the layer, logits."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.AvgPool2d(PATCH),
            nn.Conv2d(3, case.inputs, 1),
            nn.Conv2d(case.inputs, case.channels, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(case.channels, case.classes),
        )

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Only the logits."""
        self.net(batch[0])


class Scales(pl.Callback):
    """Notes the memory in use when the last batch has been seen."""

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Weigh, once."""
        if batch_idx == trainer.num_val_batches[0] - 1:
            self.after = in_use()


def in_use() -> dict[str, float]:
    """MiB in use, by place."""
    used = {"memory": resident()}
    if torch.cuda.is_available():
        used["GPU"] = torch.cuda.memory_allocated() / MEBIBYTE
    return used


def measure(case: Case, device: str) -> dict[str, dict[str, float]]:
    """By how much this process grows, in MiB: what is kept after the last batch, and the largest."""
    torch.manual_seed(0)
    images = torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE)  # the same ones again and again: they take no part
    targets = (torch.arange(case.images()) % case.classes).split(BATCH_SIZE)
    loader = DataLoader([(images[: len(part)], part) for part in targets], batch_size=None)
    network, polydis, scales = Network(case), make_callback(case), Scales()
    few = DataLoader(loader.dataset[:2], batch_size=None)
    validate(Network(case), few, [make_callback(case)], device)  # modules are imported, and torch has what it wants
    before = in_use()
    for _ in range(case.epochs):
        validate(network, loader, [polydis, scales], device)
    kept = {place: scales.after[place] - before[place] for place in before}
    return {"kept": kept, "largest": {"memory": peak_resident() - before["memory"]}}


def make_callback(case: Case) -> ChannelDisentanglement:
    """The callback of a case."""
    return ChannelDisentanglement(
        "net.2",
        method=case.method,
        relevance_threshold=case.relevance_threshold,
        calibration_samples=case.samples,
        strict=True,
    )


def validate(network: Network, loader: DataLoader, callbacks: list[pl.Callback], device: str) -> None:
    """One epoch, without a word."""
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # the callback's table of results
        trainer.validate(network, loader, verbose=False)


def in_fresh_process(case: Case, device: str) -> dict[str, dict[str, float]]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--device", device, "--measure", json.dumps(asdict(case))]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(answer.splitlines()[-1])


def row(case: Case, device: str) -> list[str]:
    """A row of the table."""
    found, expected = in_fresh_process(case, device), case.expected()
    kept, total = sum(found["kept"].values()), case.epochs * sum(expected.values())
    print(f"{case}: {found}, {expected}", file=sys.stderr)
    epochs = "" if case.epochs == 1 else ", second epoch"
    sizes = [f"{value}" for value in (case.classes, case.channels, case.inputs, case.samples)]
    numbers = [f"{total:.0f}", f"{kept:.0f}", f"**{kept / total:.2f}**", f"{found['largest']['memory']:.0f}"]
    return [f"{case.method}{epochs}", *sizes, *numbers]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="one small case, to see that it runs")
    parser.add_argument("--measure", type=json.loads, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    arguments = parse_arguments()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if arguments.measure is not None:
        print(json.dumps(measure(Case(**arguments.measure), arguments.device)))
        return
    rows = [row(case, arguments.device) for case in (QUICK if arguments.quick else CASES)]
    header = ["method", "classes", "channels", "inputs", "samples", "MiB, formula", "MiB, measured"]
    print(table([*header, "measured / formula", "MiB, largest"], rows))


if __name__ == "__main__":
    main()
