"""Figures of the HTML page that matplotlib draws, each with words that say what it shows in numbers."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_polydis import figures
from lightning_polydis._text import counted
from lightning_polydis.figures.canvas import names_up_to

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_polydis.cards import EpochEntry, LayerOverview
    from lightning_polydis.evaluation import SplitQuality
    from lightning_polydis.report import PolysemanticityReport
    from lightning_polydis.sweep import LayerSweep

DPI = 120
SHOWN_DPI = 80
"""Pixels for an inch of the figure in the page: fewer than in the picture, which is sharp then on good screens."""


@dataclass(frozen=True)
class Drawing:
    """A figure of the page.

    Attributes:
        title: What it is.
        description: What it shows, in numbers.
        source: The picture as a data URL; `None` where matplotlib is missing.
        width: Pixels.
        height: Pixels.
    """

    title: str
    description: str
    source: str | None
    width: int = 0
    height: int = 0


def overview_drawings(report: PolysemanticityReport, overview: LayerOverview) -> list[Drawing]:
    """The figures of a layer at a glance."""
    names = names_up_to(report.class_names, overview.classes)
    own = [part for part in report.quality if part.layer == overview.layer]
    drawings = [
        _drawing("Similarities", _similarities(overview), lambda: figures.similarity_figure(overview)),
    ]
    if overview.classes or not overview.has_clusters:  # of clusters the classes may not be known
        title = "Classes of the strongest images" if overview.has_clusters else "Relevance"
        drawings.append(
            _drawing(title, _relevance(overview), lambda: figures.relevance_figure(overview, class_names=names))
        )
    if own:
        drawings.append(
            _drawing("Quality of the splits", _quality(own), lambda: figures.quality_figure(own, overview.layer))
        )
    return drawings


def sweep_drawing(report: PolysemanticityReport, sweep: LayerSweep) -> Drawing:
    """What other settings would have found in a layer."""
    return _drawing("Other settings", _sweep(sweep), lambda: figures.sweep_figure(sweep, report.settings))


def history_drawing(report: PolysemanticityReport) -> Drawing:
    """The run, epoch by epoch."""
    return _drawing("History", _history(report.history), lambda: figures.history_figure(report.history))


def _drawing(title: str, description: str, draw: Callable[[], Any]) -> Drawing:
    try:
        return Drawing(title, description, *_picture(draw))
    except ModuleNotFoundError:  # matplotlib is an extra
        return Drawing(title, description, None)


def _picture(draw: Callable[[], Any]) -> tuple[str, int, int]:
    """A figure as a data URL, and its size in the page."""
    figure = draw()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    width, height = (round(SHOWN_DPI * size) for size in figure.get_size_inches())
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}", width, height


def _similarities(overview: LayerOverview) -> str:
    counts, low, high = overview.n_candidate_pairs, *overview.thresholds
    kind = "clusters" if overview.has_clusters else "classes"
    filled = [place for place, count in enumerate(counts) if count]
    if not filled:
        return f"No candidate pairs of {kind}."
    limits = overview.edges[filled[0]], overview.edges[filled[-1] + 1]
    threshold = f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"
    return (
        f"Histogram of the similarities of {counted(sum(counts), 'candidate pair')} of {kind}, in bins from "
        f"{limits[0]:.2f} to {limits[1]:.2f}; flagged: {sum(overview.n_flagged_pairs)}, at a threshold of {threshold}."
    )


def _relevance(overview: LayerOverview) -> str:
    values = np.array([row for row in overview.relevance if row])
    if not values.size:
        return "No channel is relevant for a class."
    channels, classes = counted(len(overview.channels), "channel"), counted(len(overview.classes), "class")
    if overview.has_clusters:
        return (
            f"Heat map: how large a part of the strongest images of each of {channels} is of each of {classes}; at "
            f"most {values.max():.0%}."
        )
    return (
        f"Heat map: for how large a part of the images of {classes} each of {channels} is relevant; "
        f"{values.min():.0%} to {values.max():.0%}, mean {values.mean():.0%}."
    )


def _quality(quality: list[SplitQuality]) -> str:
    parts = []
    for name in ("distortion", "leak", "spurious", "auroc"):
        values = [value for part in quality if (value := part.mean(name)) is not None]
        if values:
            text = name.upper() if name == "auroc" else name
            parts.append(f"{text} {min(values):.2f} to {max(values):.2f}, median {np.median(values):.2f}")
    return f"Quality of {counted(len(quality), 'split')}: {'; '.join(parts)}."


def _sweep(sweep: LayerSweep) -> str:
    flagged, thresholds, fractions = np.array(sweep.n_polysemantic), sweep.relevance_thresholds, sweep.class_fractions
    return (
        f"Channels flagged at {counted(len(thresholds), 'relevance threshold')} from {min(thresholds):g} to "
        f"{max(thresholds):g} and {counted(len(fractions), 'class fraction')} from {min(fractions):g} to "
        f"{max(fractions):g}: {flagged.min()} to {flagged.max()} of {sweep.n_channels}. The table below holds all "
        "numbers."
    )


def _history(history: list[EpochEntry]) -> str:
    parts = []
    for layer in dict.fromkeys(entry.layer for entry in history):
        own = [entry for entry in history if entry.layer == layer]
        first, last = own[0], own[-1]
        parts.append(
            f"{layer}: channels flagged: {first.n_polysemantic} in epoch {first.epoch}, {last.n_polysemantic} in epoch "
            f"{last.epoch}; mean similarity {first.mean_cosine:.2f}, then {last.mean_cosine:.2f}"
        )
    return f"{'. '.join(parts)}."
