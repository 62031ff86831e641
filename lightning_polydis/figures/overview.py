"""Pictures of a layer at a glance: similarities, relevances, similarities of a channel's classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_polydis._text import counted
from lightning_polydis.figures.canvas import (
    CONCEPT_COLOURS,
    QUIET_COLOUR,
    TEXT_COLOUR,
    fitting_size,
    literal,
    named,
    new_figure,
    readable,
    shortened,
)
from lightning_polydis.figures.matrix import COLOUR_MAP, draw_similarities, is_dark, strip_colour

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_polydis.cards import ChannelCard, LayerOverview

MAX_CHANNELS, MAX_CLASSES, MAX_CARD_CLASSES, MAX_NUMBERS = 40, 60, 30, 12
NAME_LENGTH, TITLE_LENGTH = 24, 40
CANDIDATE_COLOUR, FLAGGED_COLOUR, THRESHOLD_COLOUR = "#BBBBBB", CONCEPT_COLOURS[1], CONCEPT_COLOURS[0]


@literal
def similarity_figure(overview: LayerOverview) -> Figure:
    """Draw how similar the pairs of classes are that the layer's channels are relevant for, and which were flagged.

    Where concepts are clusters of images: how similar the centres of each two clusters of a channel are.

    Args:
        overview: One of `PolysemanticityReport.overviews`.

    Returns:
        The figure.

    Raises:
        ModuleNotFoundError: If matplotlib is missing; it comes with the extra ``figures``.

    Example:
        >>> from lightning_polydis.cards import LayerOverview
        >>> overview = LayerOverview("conv", [0.0, 0.5, 1.0], [3, 9], [2, 0], (0.4, 0.5), [], [], [], [])
        >>> bars = similarity_figure(overview).axes[0].patches
        >>> [int(bar.get_height()) for bar in bars[:4]]  # candidates, then those flagged
        [3, 9, 2, 0]
    """
    figure = new_figure("similarity_figure")
    axes = plain_axes(figure, (7.5, 3.6), f"{layer_title(overview.layer)}: similarity of candidate pairs")
    left, width = np.asarray(overview.edges[:-1]), np.diff(overview.edges)
    style: dict[str, Any] = {"width": width * 0.92, "align": "edge", "linewidth": 0}
    axes.bar(left, overview.n_candidate_pairs, color=CANDIDATE_COLOUR, label="candidate pairs", **style)
    axes.bar(left, overview.n_flagged_pairs, color=FLAGGED_COLOUR, label="flagged", **style)
    _draw_thresholds(axes, overview.thresholds)
    if overview.has_clusters:
        axes.set(xlabel="cosine similarity of the two clusters' centres", ylabel="pairs of clusters")
    else:
        axes.set(xlabel="cosine similarity of the two classes' relevance vectors", ylabel="pairs of classes")
    axes.locator_params(axis="y", integer=True)
    axes.set_ylim(0, max(1.0, 1.05 * max(overview.n_candidate_pairs, default=0)))
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    if not sum(overview.n_candidate_pairs):
        say(axes, _nothing(overview))
    return figure


def _nothing(overview: LayerOverview) -> str:
    return f"no channel {'has two clusters' if overview.has_clusters else 'is relevant for two classes'}"


def _draw_thresholds(axes: Axes, thresholds: tuple[float, float]) -> None:
    low, high = thresholds
    if high - low < 0.005:
        axes.axvline(low, color=THRESHOLD_COLOUR, linestyle="--", linewidth=1.8, label=f"threshold {low:.2f}")
    else:
        label = f"thresholds of the channels, {low:.2f} to {high:.2f}"
        axes.axvspan(low, high, color=THRESHOLD_COLOUR, alpha=0.25, linewidth=0, label=label)


@literal
def relevance_figure(overview: LayerOverview, *, class_names: Sequence[str] | None = None) -> Figure:
    """Draw for how large a part of a class's images each channel is relevant.

    Where concepts are clusters of images: how large a part of each channel's strongest images is of a class.

    Args:
        overview: One of `PolysemanticityReport.overviews`. At most 40 channels are drawn, and 60 classes: those that
            channels are most often relevant for, or that are most frequent.
        class_names: Names of all classes; `None`: their indices.

    Returns:
        The figure.

    Raises:
        ValueError: If a class has no name.
        ModuleNotFoundError: If matplotlib is missing; it comes with the extra ``figures``.

    Example:
        >>> from lightning_polydis.cards import LayerOverview
        >>> overview = LayerOverview("conv", [], [], [], (0.5, 0.5), [4, 7], [0, 1], [[0.9, 0.8], [0.1, 1.0]], [])
        >>> axes = relevance_figure(overview, class_names=["cat", "dog"]).axes[0]
        >>> [label.get_text() for label in axes.get_xticklabels()]
        ['cat', 'dog']
    """
    figure = new_figure("relevance_figure")
    check_names(overview.classes, class_names)
    matrix = _relevances(overview)[:MAX_CHANNELS]
    shown = np.sort(np.argsort(-matrix.max(axis=0, initial=0), kind="stable")[:MAX_CLASSES])
    size = (1.9 + max(0.2 * len(shown), 3.6), 2.6 + max(0.2 * len(matrix), 1.3))
    subject = "classes of the strongest images" if overview.has_clusters else "relevance"
    axes = plain_axes(figure, size, f"{layer_title(overview.layer)}: {subject}")
    if not matrix.size:
        say(axes, "the images' classes are not known" if len(matrix) and overview.has_clusters else _nothing(overview))
        return figure
    image = axes.imshow(matrix[:, shown], cmap=COLOUR_MAP, vmin=0, vmax=1, aspect="auto")
    names = [shortened(named(overview.classes[place], class_names), NAME_LENGTH) for place in shown]
    axes.set_xticks(range(len(shown)), names, rotation=90, fontsize=7.5)
    axes.set_yticks(range(len(matrix)), [str(channel) for channel in overview.channels[: len(matrix)]], fontsize=8)
    axes.set_ylabel("channel,\nlowest similarity first", fontsize=8.5)
    n_left_out = len(overview.classes) - len(shown)
    others = "rarer one" if overview.has_clusters else "less relevant one"
    verb = "is" if n_left_out == 1 else "are"
    axes.set_xlabel(f"class ({counted(n_left_out, others)} {verb} not drawn)" if n_left_out else "class")
    bar = figure.colorbar(image, ax=axes, aspect=15, shrink=0.9, pad=0.02)
    of_class, of_channel = "relevant for that part of\nthe class's images", "part of the channel's\nstrongest images"
    bar.set_label(of_channel if overview.has_clusters else of_class, fontsize=8.5)
    return figure


def _relevances(overview: LayerOverview) -> np.ndarray:
    """``[channels, classes]``; a channel of whose images no class is known has a row of zeros."""
    shape = (len(overview.channels), len(overview.classes))
    rows = [row or [0.0] * shape[1] for row in overview.relevance]
    return np.asarray(rows, dtype=float).reshape(shape)


@literal
def class_similarity_figure(card: ChannelCard, *, class_names: Sequence[str] | None = None) -> Figure:
    """Draw how similar a channel's relevance vectors are between the classes that it is relevant for, as measured.

    A low similarity alone is no flag: a calibrated threshold is compared with similarities without noise. Where
    concepts are clusters of images, they are drawn in place of classes.

    Args:
        card: One of `PolysemanticityReport.cards`. At most 30 classes are drawn, the first ones of each concept.
        class_names: Names of all classes; `None`: their indices.

    Returns:
        The figure.

    Raises:
        ValueError: If a class has no name.
        ModuleNotFoundError: If matplotlib is missing; it comes with the extra ``figures``.

    Example:
        >>> from lightning_polydis.cards import ChannelCard
        >>> card = ChannelCard("conv", 3, [[0], [1]], 0.1, None, 0.5, None, [], [], [0, 1], [[1.0, 0.1], [0.1, 1.0]])
        >>> [text.get_text() for text in class_similarity_figure(card).axes[0].texts]
        ['1.00', '0.10', '0.10', '1.00']
    """
    figure = new_figure("class_similarity_figure")
    check_names([] if card.has_clusters else card.classes, class_names)
    shown, sizes = _first_of_each(card, MAX_CARD_CLASSES)
    matrix = np.asarray(card.class_similarities)[np.ix_(shown, shown)]
    side = max((0.5 if len(shown) <= MAX_NUMBERS else 0.24) * len(shown), 1.6)
    kind = "clusters" if card.has_clusters else "classes"
    title = f"Channel {card.channel} of {layer_title(card.layer)}: similarity of its {kind}"
    axes = plain_axes(figure, (side + 3.4, side + 2.6), title)
    image = draw_similarities(axes, matrix, sizes)
    if len(shown) <= MAX_NUMBERS:
        for (row, column), value in np.ndenumerate(matrix):
            colour = "white" if is_dark(image, float(value)) else TEXT_COLOUR
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    _name_classes(axes, card, shown, sizes, class_names)
    notes = [f"lowest flagged pair {card.cosine_similarity:.2f}, threshold {card.threshold:.2f}"]
    if more := card.beyond(sum(size > 0 for size in sizes), len(shown)):
        notes.append(more)
    axes.set_xlabel("\n".join(notes))
    figure.colorbar(image, ax=axes, aspect=15, shrink=0.9, pad=0.02)
    return figure


def _first_of_each(card: ChannelCard, at_most: int) -> tuple[list[int], list[int]]:
    """Places in ``card.classes`` that are drawn, and how many of each concept: as even as the concepts allow."""
    limit, known = at_most, card.shown_classes()
    while sum(min(size, limit) for size in known) > at_most and limit > 1:
        limit -= 1
    shown: list[int] = []
    sizes: list[int] = []
    start = 0
    for size in known[:at_most]:
        sizes.append(min(size, limit))
        shown += range(start, start + sizes[-1])
        start += size
    return shown, sizes


def _name_classes(
    axes: Axes, card: ChannelCard, shown: Sequence[int], sizes: Sequence[int], class_names: Sequence[str] | None
) -> None:
    in_full = [card.label(card.classes[place], lambda index: named(index, class_names)) for place in shown]
    names = [shortened(name, NAME_LENGTH) for name in in_full]
    axes.set_xticks(range(len(shown)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.tick_params(axis="y", length=0, pad=10)  # the concepts' strip is in between
    axes.tick_params(axis="x", length=0)
    owners = np.repeat(range(len(sizes)), sizes).tolist()
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        for label, owner in zip(labels, owners, strict=True):
            label.set_color(readable(strip_colour(owner)))


def layer_title(layer: str) -> str:
    """Name of a layer, cut at its beginning if it is long: the end tells more."""
    return layer if len(layer) <= TITLE_LENGTH else "…" + layer[1 - TITLE_LENGTH :]


def check_names(classes: Sequence[int], class_names: Sequence[str] | None) -> None:
    """See that all classes have names."""
    last = max(classes, default=-1)
    if class_names is not None and last >= len(class_names):
        found = counted(len(class_names), "name")
        raise ValueError(f"Expected argument `class_names` to name class {last}, but got {found}.")


def plain_axes(figure: Figure, size: tuple[float, float], title: str) -> Axes:
    """One pair of axes, and a title in a size that fits."""
    set_up(figure, size, title)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def set_up(figure: Figure, size: tuple[float, float], title: str) -> None:
    """Size, layout and title."""
    figure.set_size_inches(*size)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    figure.suptitle(title, fontsize=fitting_size(title, size[0] - 0.4, 12), fontweight="bold", color=TEXT_COLOUR)


def say(axes: Axes, text: str) -> None:
    """Words in place of what there is not."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=QUIET_COLOUR)
    axes.set(xticks=[], yticks=[])
