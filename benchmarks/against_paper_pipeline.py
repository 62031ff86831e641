"""Time, memory and disk space of the published procedure against this package's, on the same network and images.

Both find the polysemantic pairs of one layer and split some of them, in turns; the results are compared. Then how both
grow with the number of images, of classes, and of the (channel, class) entries that are relevant.

Example:
    python benchmarks/against_paper_pipeline.py
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from measuring import in_turns, peak_resident, ratios, reset_peak, resident, spread, table
from paper_pipeline import FoundPair, FoundSplit, PaperPipeline, similar_pairs
from small_world import LAYER, NUM_CLASSES, ImageMaker, SmallResNet, accuracy, train
from torch import Tensor, nn

from lightning_polydis import PolysemanticityReport, SplitPlan, find_polysemantic_channels

BATCH_SIZE = 64


@dataclass(frozen=True)
class Task:
    """What both sides work on."""

    model: nn.Module
    images: Tensor
    targets: Tensor
    relevance_threshold: float
    class_fraction: float
    similarity_threshold: float
    n_splits: int

    def rows_of(self, target: int) -> Tensor:
        """The images of a class."""
        return (self.targets == target).nonzero()[:, 0]


@dataclass(frozen=True)
class Theirs:
    """What the published procedure finds, and what it takes: seconds by stage, bytes on disk."""

    pairs: list[FoundPair]
    splits: list[FoundSplit]
    n_entries: int
    seconds: dict[str, float]
    bytes_on_disk: int


@dataclass(frozen=True)
class Ours:
    """What this package finds, and what it takes."""

    report: PolysemanticityReport
    plan: SplitPlan
    seconds: dict[str, float]
    bytes_on_disk: int


class Laps:
    """A watch that names its laps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Note the time since the last lap."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def run_theirs(task: Task, shared: bool) -> Theirs:
    """The published procedure from start to end."""
    with tempfile.TemporaryDirectory() as folder:
        laps = Laps()
        pipeline = PaperPipeline(task.model, LAYER, task.images, task.targets, Path(folder), BATCH_SIZE)
        n_bytes = pipeline.write_relevances()
        classes = pipeline.relevant_classes(task.relevance_threshold, task.class_fraction)
        laps.lap("relevances")
        entries = [(channel, target) for channel, targets in classes.items() for target in targets]
        vectors = {entry: pipeline.vector(*entry) for entry in entries}
        found = [pair for pair in similar_pairs(vectors) if pair.cosine_similarity < task.similarity_threshold]
        found.sort(key=lambda pair: pair.cosine_similarity)
        laps.lap("vectors and similarities")
        splits = [_their_split(pipeline, pair, vectors, shared) for pair in found[: task.n_splits]]
        laps.lap("splits")
    return Theirs(found, splits, len(entries), laps.seconds, n_bytes)


def _their_split(
    pipeline: PaperPipeline, pair: FoundPair, vectors: dict[tuple[int, int], np.ndarray], shared: bool
) -> FoundSplit:
    classes = (pair.class_a, pair.class_b)
    return pipeline.split(pair.channel, classes, [vectors[pair.channel, target] for target in classes], shared)


def run_ours(task: Task, pairs: list[FoundPair]) -> Ours:
    """This package from start to end, with the given pairs to split."""
    batches = list(zip(task.images.split(BATCH_SIZE), task.targets.split(BATCH_SIZE), strict=True))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        laps = Laps()
        report = find_polysemantic_channels(
            task.model,
            batches,
            layers=LAYER,
            method="paper",
            relevance_threshold=task.relevance_threshold,
            class_fraction=task.class_fraction,
            similarity_threshold=task.similarity_threshold,
            calibration_samples=None,
            progress=False,
        )
        laps.lap("relevances, vectors and similarities")
        plan = report.plan_pairs([(LAYER, pair.channel, pair.class_a, pair.class_b) for pair in pairs])
        laps.lap("splits")
        n_bytes = sum(path.stat().st_size for path in Path(folder).rglob("*"))
    return Ours(report, plan, laps.seconds, n_bytes)


def compare(theirs: Theirs, ours: Ours) -> list[str]:
    """How far the two results agree, in words."""
    expected = {(pair.channel, pair.class_a, pair.class_b): pair.cosine_similarity for pair in theirs.pairs}
    got = {(pair.channel, pair.class_a, pair.class_b): pair.cosine_similarity for pair in ours.report.pairs}
    both = expected.keys() & got.keys()
    splits = list(zip(theirs.splits, ours.plan.splits, strict=True))
    same_rho = sum(a.rho == b.rho for a, b in splits)
    same_sources = sum(torch.equal(a.membership.float(), b.membership) for a, b in splits)
    return [
        f"pairs flagged: {len(expected)} theirs, {len(got)} ours, {len(both)} in common",
        f"largest difference of a cosine similarity: {max((abs(expected[k] - got[k]) for k in both), default=0):.1e}",
        f"same dominance ratio: {same_rho} of {len(splits)} splits; same sources: {same_sources} of {len(splits)}",
    ]


def prepare(arguments: argparse.Namespace) -> Task:
    """A trained network and images that it has not seen."""
    torch.manual_seed(arguments.seed)
    maker = ImageMaker(arguments.seed)
    model = SmallResNet()
    started = time.perf_counter()
    train(model, *maker.make(arguments.training_images, seed=1), epochs=arguments.epochs)
    images, targets = maker.make(arguments.images, seed=2)
    print(
        f"trained for {time.perf_counter() - started:.0f} s; accuracy on the {len(images)} images to analyse: "
        f"{accuracy(model, images, targets):.3f}",
        file=sys.stderr,
    )
    return Task(
        model.to(arguments.device),
        images.to(arguments.device),
        targets.to(arguments.device),
        arguments.relevance_threshold,
        arguments.class_fraction,
        arguments.similarity_threshold,
        arguments.splits,
    )


def in_comparison(task: Task, shared: bool, repeats: int) -> tuple[Theirs, Ours, dict[str, list[float]]]:
    """Both in turns: what they find, and the seconds of each run."""
    run_ours(task, [])  # once without a watch
    found: dict[str, Theirs | Ours] = {}

    def seconds(name: str, run: Callable[[], Theirs | Ours]) -> float:
        found[name] = run()
        return sum(found[name].seconds.values())

    variants = {  # theirs comes first in the first round, and says which pairs are split
        "theirs": lambda: seconds("theirs", lambda: run_theirs(task, shared)),
        "ours": lambda: seconds("ours", lambda: run_ours(task, found["theirs"].pairs[: task.n_splits])),
    }
    taken = in_turns(variants, repeats, n_warm_up=0)
    return found["theirs"], found["ours"], taken


def growth_of_memory(run: Callable[[], object]) -> float:
    """MiB by which this process grows at its largest."""
    before = resident()
    reset_peak()
    run()
    return peak_resident() - before


def main_table(task: Task, shared: bool, repeats: int) -> str:
    """The comparison at full size."""
    theirs, ours, taken = in_comparison(task, shared, repeats)
    for name, run in (("theirs", theirs), ("ours", ours)):
        print(f"{name}: {run.seconds}", file=sys.stderr)
    print("\n".join(compare(theirs, ours)), file=sys.stderr)
    memory = [
        growth_of_memory(lambda: run_ours(task, theirs.pairs[: task.n_splits])),
        growth_of_memory(lambda: run_theirs(task, shared)),
    ]
    cells = [
        str(theirs.n_entries),
        f"{len(ours.plan.splits)}, {'all twenty candidates in one pass' if shared else 'one pass for each candidate'}",
        spread(ratios(taken["theirs"], taken["ours"]), 1),
        " : ".join(f"{statistics.median(taken[name]):.2f}" for name in ("ours", "theirs")),
        " : ".join(f"{value:.0f}" for value in memory),
        " : ".join(f"{run.bytes_on_disk / 1e6:.1f}" for run in (ours, theirs)),
    ]
    header = ["(channel, class) entries", "splits, and how theirs are chosen", "theirs / ours"]
    return table([*header, *(f"{what}, ours : theirs" for what in ("seconds", "peak MiB", "MB on disk"))], [cells])


def smaller(task: Task, n_classes: int = NUM_CLASSES, part: float = 1) -> Task:
    """Only some classes, or only the first part of each class's images."""
    rows = torch.cat([own[: round(part * len(own))] for own in map(task.rows_of, range(n_classes))])
    return replace(task, images=task.images[rows], targets=task.targets[rows])


def growth_table(task: Task, repeats: int) -> str:
    """How both grow, one size at a time."""
    threshold = task.relevance_threshold
    series = {  # the last of the first two, and the middle of the third, are all of it
        "images": [smaller(task, part=part) for part in (0.25, 0.5)] + [task],
        "classes": [smaller(task, n_classes) for n_classes in (4, 8)] + [task],
        "entries": [
            replace(task, relevance_threshold=2 * threshold),
            task,
            replace(task, relevance_threshold=threshold / 2),
        ],
    }
    whole = in_comparison(task, True, repeats)
    rows = []
    for what, tasks in series.items():
        runs = [whole if own is task else in_comparison(own, True, repeats) for own in tasks]
        entries = [theirs.n_entries for theirs, _, _ in runs]
        sizes = {"images": [len(own.images) for own in tasks], "classes": [4, 8, 16], "entries": entries}[what]
        times = {name: [statistics.median(taken[name]) for *_, taken in runs] for name in ("ours", "theirs")}
        about = [what, _listed(sizes, 0), _listed(entries, 0)]
        rows.append([*about, *(cell for own in times.values() for cell in (_listed(own, 2), _exponent(sizes, own)))])
    header = ["grows", "sizes", "entries", "ours, s", "exponent", "theirs, s", "exponent"]
    return table(header, rows)


def _listed(values: list[float], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def _exponent(sizes: list[int], seconds: list[float]) -> str:
    """The power of the size that the time grows by, from the first to the last."""
    if sizes[0] == sizes[-1]:
        return "-"
    return f"{math.log(seconds[-1] / seconds[0]) / math.log(sizes[-1] / sizes[0]):.2f}"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; ours has run once before")
    parser.add_argument("--images", type=int, default=100, help="images of each class to analyse")
    parser.add_argument("--training-images", type=int, default=200, help="images of each class to train on")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--relevance-threshold", type=float, default=0.01)
    parser.add_argument("--class-fraction", type=float, default=0.75)
    parser.add_argument("--similarity-threshold", type=float, default=0.5)
    parser.add_argument("--splits", type=int, default=12, help="pairs to split, lowest similarity first")
    parser.add_argument(
        "--separate", action="store_true", help="their splits: a pass for each of the twenty candidates of a pair"
    )
    parser.add_argument("--growth", action="store_true", help="how both grow, instead of the comparison")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    arguments = parse_arguments()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    task = prepare(arguments)
    if arguments.growth:
        print(growth_table(task, arguments.repeats))
    else:
        print(main_table(task, not arguments.separate, arguments.repeats))


if __name__ == "__main__":
    main()
