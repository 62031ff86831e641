"""Pictures of how well a layer's splits do, and of what became of its channels over a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_polydis.figures.canvas import (
    CONCEPT_COLOURS,
    QUIET_COLOUR,
    TEXT_COLOUR,
    literal,
    new_figure,
    readable,
    shortened,
)
from lightning_polydis.figures.overview import layer_title, say, set_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_polydis.cards import EpochEntry
    from lightning_polydis.evaluation import SplitQuality

MAX_NAMED = 6
"""Channels with a line of their own colour: the last of the colours is too pale for lines."""

DOTS: dict[str, Any] = {"s": 38, "color": CONCEPT_COLOURS[0], "alpha": 0.65, "linewidth": 0}

END = 2.0
"""Where the axes of distortion and leak end at the latest; what is worse is drawn at the edge."""


@literal
def quality_figure(qualities: Sequence[SplitQuality], layer: str) -> Figure:
    """Draw how well the splits of a layer do, each split a point.

    Left: distortion against leak, both 0 at best. Before the split a channel keeps everything on the images of all its
    concepts: by definition distortion 0 and leak 1, one point for all channels. Right: how well activation tells a
    concept's classes from the others', before (the original channel) and after (its concept channels).

    Args:
        qualities: `PolysemanticityReport.quality`.
        layer: Name of the layer.

    Returns:
        The figure.

    Raises:
        ModuleNotFoundError: If matplotlib is missing; it comes with the extra ``figures``.

    Example:
        >>> from lightning_polydis import ConceptQuality, SplitQuality
        >>> concepts = [ConceptQuality([label], 0.2, 0.1, 0.0, None, 0.9, 0.6, 9, 9) for label in (0, 1)]
        >>> axes = quality_figure([SplitQuality("conv", 3, concepts)], "conv").axes[0]
        >>> [scatter.get_offsets().tolist() for scatter in axes.collections]  # after, before
        [[[0.2, 0.1]], [[0.0, 1.0]]]
    """
    figure = new_figure("quality_figure")
    set_up(figure, (9.4, 4.4), f"{layer_title(layer)}: quality of the splits")
    losses, separation = figure.subplots(1, 2)
    own = [quality for quality in qualities if quality.layer == layer]
    _draw_losses(losses, _pairs(own, "distortion", "leak"))
    _draw_separation(separation, _pairs(own, "auroc_original", "auroc"))
    figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    return figure


def _pairs(qualities: Sequence[SplitQuality], first: str, second: str) -> np.ndarray:
    """Two figures of each split, ``[n, 2]``, without splits that lack one."""
    pairs = [(quality.mean(first), quality.mean(second)) for quality in qualities]
    return np.asarray([pair for pair in pairs if None not in pair], dtype=float).reshape(-1, 2)


def _draw_losses(axes: Axes, points: np.ndarray) -> None:
    end = min(max(1.15, 1.05 * float(points.max(initial=0))), END)
    if len(points):
        x, y = points.clip(max=0.985 * end).T
        axes.scatter(x, y, label="after the split, mean of the concepts", **DOTS)
        middle = np.median(points, axis=0)
        label = f"median: distortion {middle[0]:.2f}, leak {middle[1]:.2f}"
        axes.plot(*middle, "+", color=TEXT_COLOUR, markersize=13, markeredgewidth=2, label=label, linestyle="")
    else:
        say(axes, "no images to judge the splits by")
    before: dict[str, Any] = {"s": 70, "marker": "D", "color": CONCEPT_COLOURS[1], "clip_on": False, "zorder": 3}
    axes.scatter([0], [1], label="before the split, by definition", **before)
    axes.set(xlim=(0, end), ylim=(0, end), xlabel="distortion (0 is best)", ylabel="leak (0 is best)")
    n_beyond = int((points > 0.985 * end).any(axis=1).sum())
    _finish(
        axes, f"a point for each channel; {n_beyond} at the edge are worse" if n_beyond else "a point for each channel"
    )


def _draw_separation(axes: Axes, points: np.ndarray) -> None:
    if len(points):
        axes.plot([0, 1], [0, 1], color=QUIET_COLOUR, linewidth=1, linestyle=":")
        axes.scatter(points[:, 0], points[:, 1], clip_on=False, **DOTS)
    else:
        say(axes, "no images to judge the splits by")
    low = min(0.5, float(points.min(initial=1)))
    axes.set(xlim=(low - 0.02, 1.02), ylim=(low - 0.02, 1.02))
    axes.set(xlabel="AUROC of the original channel", ylabel="AUROC of its concept channels")
    _finish(axes, "telling concepts apart; above the line: better than before")


@literal
def history_figure(history: Sequence[EpochEntry]) -> Figure:
    """Draw what was found in each analysed epoch of a run.

    Left: the number of polysemantic channels of each layer. Right: the similarity of channels that were flagged, as
    long as they were; of those flagged at the end the 6 with the lowest similarity have a name and a colour.

    Args:
        history: `PolysemanticityReport.history`, or the entries of some layers.

    Returns:
        The figure.

    Raises:
        ValueError: If there is no entry.
        ModuleNotFoundError: If matplotlib is missing; it comes with the extra ``figures``.

    Example:
        >>> from lightning_polydis.cards import EpochEntry
        >>> history = [EpochEntry(epoch, 10 * epoch, "conv", 1, 0.8, {3: 0.5 - epoch / 10}) for epoch in range(3)]
        >>> counts, similarities = history_figure(history).axes
        >>> counts.lines[0].get_ydata().tolist(), similarities.texts[0].get_text()
        ([1, 1, 1], 'channel 3')
    """
    figure = new_figure("history_figure")
    if not history:
        raise ValueError("Expected argument `history` to hold at least one analysed epoch, but got none.")
    layers = list(dict.fromkeys(entry.layer for entry in history))
    name = layer_title(layers[0]) if len(layers) == 1 else f"{len(layers)} layers"
    set_up(figure, (9.8, 3.9), f"{name}: polysemantic channels over the run")
    counts, similarities = figure.subplots(1, 2)
    # An epoch may be analysed more than once; steps tell these apart.
    unit = "epoch" if len({(entry.layer, entry.epoch) for entry in history}) == len(history) else "step"
    for axes in (counts, similarities):
        axes.set_xlabel(unit)
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    for index, layer in enumerate(layers):
        own = [entry for entry in history if entry.layer == layer]
        style: dict[str, Any] = {"color": CONCEPT_COLOURS[index % MAX_NAMED], "marker": "o", "markersize": 4}
        places = [getattr(entry, unit) for entry in own]
        counts.plot(places, np.asarray([entry.n_polysemantic for entry in own]), label=shortened(layer, 30), **style)
    counts.set_ylim(bottom=0)
    counts.locator_params(axis="y", integer=True, min_n_ticks=1)
    if len(layers) > 1:
        counts.legend(loc="upper left", bbox_to_anchor=(0, -0.2), fontsize=8, frameon=False)
    _draw_tracks(similarities, history, unit, len(layers) > 1)
    _finish(counts, "number of polysemantic channels")
    _finish(similarities, "cosine similarity of those flagged")
    return figure


def _draw_tracks(axes: Axes, history: Sequence[EpochEntry], unit: str, names_layers: bool) -> None:
    tracks: dict[tuple[str, int], dict[int, float]] = {}
    for entry in history:
        for channel, similarity in entry.channels.items():
            tracks.setdefault((entry.layer, channel), {})[getattr(entry, unit)] = similarity
    places = sorted({getattr(entry, unit) for entry in history})
    last = {key: track[places[-1]] for key, track in tracks.items() if places[-1] in track}
    chosen = sorted(last, key=last.__getitem__)[:MAX_NAMED]
    for key in sorted(tracks, key=lambda key: key in chosen):  # those with a colour on top
        values = [tracks[key].get(place, np.nan) for place in places]  # a gap where it was not flagged
        colour, width = (CONCEPT_COLOURS[chosen.index(key)], 2.0) if key in chosen else ("#C8C8C8", 1.0)
        axes.plot(places, values, color=colour, linewidth=width, marker="o", markersize=2.5 * width**0.5)
    if not tracks:
        say(axes, "no channel was flagged")
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    heights = _spread([(last[key] - low) / (high - low) for key in chosen])
    for index, (key, height) in enumerate(zip(chosen, heights, strict=True)):
        text = f"{shortened(key[0], 14)} {key[1]}" if names_layers else f"channel {key[1]}"
        place, colour = (1.02, height), readable(CONCEPT_COLOURS[index])
        axes.text(*place, text, transform=axes.transAxes, va="center", fontsize=8.5, color=colour)


def _spread(heights: Sequence[float], gap: float = 0.07) -> list[float]:
    """Ascending heights moved apart, from the lowest up and, where that leads out at the top, back down."""
    spread: list[float] = []
    for height in heights:
        spread.append(height if not spread else max(height, spread[-1] + gap))
    ceiling = 1.0
    for index in reversed(range(len(spread))):
        spread[index] = min(spread[index], ceiling)
        ceiling = spread[index] - gap
    return spread


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9.5, color=QUIET_COLOUR)
    axes.spines[["top", "right"]].set_visible(False)
