"""Picture of a polysemantic channel: what it answers to, before and after its split."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_polydis.figures.canvas import (
    CARD_CELL,
    CONCEPT_COLOURS,
    OTHER_COLOUR,
    QUIET_COLOUR,
    TEXT_COLOUR,
    Canvas,
    literal,
    named,
    new_figure,
    pixels_of,
    row_label,
)
from lightning_polydis.figures.matrix import draw_similarities
from lightning_polydis.figures.overview import check_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_polydis.cards import CardImage, ChannelCard, SourceShare
    from lightning_polydis.visualization import ChannelVisualization

MAX_SOURCES = 5
BARS_LEFT, BARS_WIDTH = 0.4, 1.6
MATRIX_LEFT, MATRIX_WIDTH = 0.12, 0.86


@literal
def card_figure(
    card: ChannelCard,
    *,
    class_names: Sequence[str] | None = None,
    visualization: ChannelVisualization | None = None,
    n_images: int = 8,
) -> Figure:
    """Draw the card of a polysemantic channel.

    One row for the original channel and one for each concept channel that the card shows (7 at most). A row shows the
    images that activate it most, cut to where it is active, framed in the colour of the concept that their class
    belongs to (grey: no concept's) and with the name of that class; then how its activation is distributed over the
    images of each concept; then the inputs that add most to the concept, and how much of each is the concept's own. In
    the first row instead: how similar the relevance vectors of the channel's classes are. Images and densities are of
    all calibration samples, also those that chose the split.

    Where concepts are clusters of images, frames show the concept that an image itself belongs to, and images of an
    unknown class have no name below them.

    Args:
        card: One of `PolysemanticityReport.cards`.
        class_names: Names of all classes; `None`: their indices.
        visualization: Optimised images of the channel and its concepts, drawn first in each row.
        n_images: Images in a row at most.

    Returns:
        The figure; ``figure.savefig(path, dpi=130)`` writes it.

    Raises:
        ValueError: If the arguments do not fit together or are out of range.
        ModuleNotFoundError: If matplotlib is missing; it comes with the extra ``figures``.

    Example:
        >>> import torch
        >>> from lightning_polydis.cards import CardImage, CardRow, ChannelCard, SourceShare
        >>> image = CardImage(torch.zeros(3, 8, 8, dtype=torch.uint8), target=0, activation=2.0)
        >>> rows = [CardRow(classes, [image], [[2.0, 1.0], [0.5]]) for classes in ([], [0], [1])]
        >>> sources = [[SourceShare(4, 1.5, 0.9)], [SourceShare(7, 0.5, 1.0)]]
        >>> card = ChannelCard("conv", 3, [[0], [1]], 0.1, (0.0, 0.2), 0.5, 0.9, rows, sources, [0, 1],
        ...                    [[1.0, 0.1], [0.1, 1.0]])
        >>> len(card_figure(card, class_names=["cat", "dog"]).axes)  # rows of an image, a density and a third
        9
    """
    figure = new_figure("card_figure")
    _check(card, class_names, visualization, n_images)
    rows = card.rows[: len(CONCEPT_COLOURS) + 1]
    n_columns = min(n_images, max(len(row.images) for row in rows))
    canvas = Canvas(figure, len(rows), n_columns, 1.0, lead=visualization is not None, cell=CARD_CELL, side=True)
    values = [value for row in rows for own in row.activations for value in own]
    canvas.header(f"Channel {card.channel} of {card.layer}", np.asarray(values))
    for index in range(len(rows)):
        _draw_row(canvas, card, index, class_names, visualization)
        for column, image in enumerate(rows[index].images[:n_columns]):
            if image.pixels is None:  # damaged in the file that it comes from
                continue
            pixels, caption = pixels_of(image.pixels[None])[0], _caption(card, image, class_names)
            canvas.image(index, column, pixels, _frame_colour(card, image), caption=caption)
    _draw_facts(canvas, card)
    if remarks := _remarks(card, n_columns):
        canvas.note("; ".join(remarks))
    return figure


def _check(
    card: ChannelCard,
    class_names: Sequence[str] | None,
    visualization: ChannelVisualization | None,
    n_images: int,
) -> None:
    check_names(card.real_classes, class_names)
    n_concepts = card.n_concepts or len(card.concepts)
    if visualization is not None and len(visualization.parts) != n_concepts:
        raise ValueError(
            f"Expected argument `visualization` to show {n_concepts} concepts, but got {len(visualization.parts)}."
        )
    if n_images < 1:
        raise ValueError(f"Expected argument `n_images` to be at least 1, but got {n_images}.")


def _caption(card: ChannelCard, image: CardImage, class_names: Sequence[str] | None) -> str | None:
    label = image.label if card.has_clusters else image.target
    return None if label is None else named(label, class_names)


def _draw_row(
    canvas: Canvas,
    card: ChannelCard,
    index: int,
    class_names: Sequence[str] | None,
    visualization: ChannelVisualization | None,
) -> None:
    """Everything but the images."""
    colour = TEXT_COLOUR if index == 0 else CONCEPT_COLOURS[index - 1]
    texts = ("original", "before the split")
    if index > 0:
        texts = row_label(index, card.concepts, class_names, card.names)
    canvas.label(index, *texts, colour)
    if visualization is not None:
        lead = visualization.original if index == 0 else visualization.parts[index - 1]
        canvas.lead(index, pixels_of(lead[None])[0], colour)
    by_concept = [np.asarray(values) for values in card.rows[index].activations[: len(CONCEPT_COLOURS)]]
    canvas.densities(index, by_concept, CONCEPT_COLOURS[: len(by_concept)])
    if index > 0:
        axes = canvas.side(index, f"row {index}, sources", BARS_WIDTH, inset=BARS_LEFT)
        largest = max((source.strength for sources in card.sources for source in sources), default=1.0)
        _draw_sources(axes, card.sources[index - 1][:MAX_SOURCES], max(largest, 1e-12), colour)


def _frame_colour(card: ChannelCard, image: CardImage) -> str:
    concept = _concept_of(card, image)
    return OTHER_COLOUR if concept is None else CONCEPT_COLOURS[concept]


def _concept_of(card: ChannelCard, image: CardImage) -> int | None:
    """The drawn concept that the image's class, or its cluster, belongs to."""
    owners = [index for index, concept in enumerate(card.concepts) if image.target in concept]
    return owners[0] if owners and owners[0] < len(CONCEPT_COLOURS) else None


def _draw_sources(axes: Axes, sources: Sequence[SourceShare], largest: float, colour: str) -> None:
    """Bars on one scale for all concepts of the card."""
    places = range(len(sources))
    axes.barh(places, [max(source.strength, 0.0) for source in sources], color=colour, height=0.72)
    for place, source in enumerate(sources):
        end = max(source.strength, 0.0) + 0.03 * largest
        axes.text(end, place, f"{source.membership:.0%}", va="center", fontsize=7.5, color=QUIET_COLOUR)
    axes.set(xlim=(0, 1.3 * largest), ylim=(MAX_SOURCES - 0.5, -0.5), xticks=[])  # the strongest on top
    axes.set_yticks(places, [str(source.source) for source in sources])
    axes.tick_params(labelsize=7.5, length=0, colors=QUIET_COLOUR)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    if not sources:
        axes.set_axis_off()


def _draw_facts(canvas: Canvas, card: ChannelCard) -> None:
    canvas.side_heading(0, f"similarity of its {'clusters' if card.has_clusters else 'classes'}")
    if any(card.sources):
        canvas.side_heading(1, "strongest inputs, share it takes")
    axes = canvas.side(0, "row 0, similarities", MATRIX_WIDTH, inset=MATRIX_LEFT)
    draw_similarities(axes, np.asarray(card.class_similarities), card.shown_classes())
    lines = [f"lowest flagged {card.cosine_similarity:.2f}"]
    if card.interval is not None:
        lines.append(f"95 %: {card.interval[0]:.2f} to {card.interval[1]:.2f}")
    lines.append(f"threshold {card.threshold:.2f}")
    if card.reliability is not None:
        lines.append(f"reliability {card.reliability:.2f}")
    canvas.side_text(0, "\n".join(lines), MATRIX_LEFT + MATRIX_WIDTH + 0.15)


def _remarks(card: ChannelCard, n_columns: int) -> list[str]:
    found = []
    n_drawn = min(len(card.concepts), len(CONCEPT_COLOURS))
    drawn = [image for row in card.rows[: n_drawn + 1] for image in row.images[:n_columns]]
    if any(_concept_of(card, image) is None for image in drawn):
        found.append(_grey_frames(card, n_drawn == (card.n_concepts or len(card.concepts))))
    if more := card.beyond(n_drawn, len(card.classes)):
        found.append(more)
    return found


def _grey_frames(card: ChannelCard, all_drawn: bool) -> str:
    """What grey frames mean, in words."""
    if card.has_clusters:
        return f"grey frame: image of no cluster{'' if all_drawn else ', or of a concept that is not drawn'}"
    return f"grey frame: image of a class that belongs to none of the concepts{'' if all_drawn else ' drawn'}"
