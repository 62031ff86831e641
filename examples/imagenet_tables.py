"""The tables of `imagenet_resnet50.py`: what each part of the splits keeps of the channel's activation."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from lightning_polydis import PolysemanticityReport, SplitPlan, SplitQuality


def pairs_table(
    report: PolysemanticityReport, plan: SplitPlan, qualities: Sequence[SplitQuality], names: Sequence[str]
) -> Table:
    """The paper's table: two rows for each pair, one for the images of each class."""
    cosines = {(found.channel, found.class_a, found.class_b): found.cosine_similarity for found in report.pairs}
    title = f"{len(plan)} pair{'s' * (len(plan) != 1)} of classes, split, and judged on validation images"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # leaves room for names
    for name in ("channel", "cosine", "rho", "class", "A", "B", "residual", "AUROC", "before"):
        fixed = name != "class"
        table.add_column(name, justify="right" if fixed else "left", no_wrap=fixed)
    for split, quality in zip(plan, qualities, strict=True):
        (class_a,), (class_b,) = split.concepts
        cosine = cosines.get((split.channel, *sorted((class_a, class_b))))
        start = [str(split.channel), _number(cosine), _number(split.rho)]
        for letter, concept in zip("AB", quality.concepts, strict=True):
            label = concept.classes[0]
            kept = [_number(share) for share in concept.kept or (None, None, None)]
            scores = [_number(concept.auroc), _number(concept.auroc_original)]
            table.add_row(*start, f"{letter}: {label} {escape(names[label])}", *kept, *scores)
            start = [""] * len(start)
        table.add_section()
    table.caption = (
        "A, B, residual: share of the channel's activation that this part keeps on the images of the class that the "
        "channel is relevant for. AUROC: how well the class's own part tells it from the other class, and the channel "
        "before the split. No cosine: the pair was not among those found."
    )
    return table


def kept_table(qualities: Sequence[SplitQuality]) -> Table:
    """What each part keeps, over all pairs."""
    rows = [kept_by(quality, row) for quality in qualities for row in range(len(quality.concepts))]
    known = [row for row in rows if row is not None]
    table = Table(title="share of the activation that each part keeps")
    for name in ("", "own concept channel", "other concept channel", "residual channel"):
        table.add_column(name, justify="right" if name else "left")
    for name, middle in (("median", statistics.median), ("mean", statistics.fmean)):
        if known:
            table.add_row(name, *(f"{middle(shares):.3f}" for shares in zip(*known, strict=True)))
    table.caption = f"over {len(known)} of {len(rows)} concepts: those with an image that the channel is relevant for"
    return table


def kept_by(quality: SplitQuality, row: int) -> tuple[float, float, float] | None:
    """What own concept channel, other concept channel and residual keep on the images of concept ``row``."""
    kept = quality.concepts[row].kept
    return None if kept is None else (kept[row], kept[1 - row], kept[-1])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
