"""Picture of what split channels look for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_polydis.figures.canvas import (
    CHARACTERS_PER_INCH,
    CONCEPT_COLOURS,
    MARGIN,
    TEXT_COLOUR,
    check_concept_names,
    literal,
    new_figure,
    pixels_of,
    row_label,
)
from lightning_polydis.figures.overview import check_names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from matplotlib.figure import Figure

    from lightning_polydis.visualization import ChannelVisualization

# Sizes in inches; an image is as wide as a line of a label.
IMAGE, IMAGE_GAP, HEADING_HEIGHT, LABEL_HEIGHT, ROW_GAP = 1.7, 0.2, 0.32, 0.62, 0.35


@literal
def visualization_figure(
    visualizations: Sequence[ChannelVisualization],
    *,
    class_names: Sequence[str] | None = None,
    concept_names: Mapping[tuple[str, int], Sequence[str]] | None = None,
) -> Figure:
    """Draw what split channels look for: a row for each channel, the original first, then its concepts.

    The figure does not go through ``pyplot``: it belongs to the caller alone and needs no closing.

    Args:
        visualizations: What `visualize_channels` returned, or some of it.
        class_names: Names of all classes; `None`: their indices.
        concept_names: Names of each channel's concepts by layer and channel, in place of those of their classes.
            Clusters of images need them, as their numbers are no classes: ``report.concept_names``.

    Returns:
        The figure; ``figure.savefig(path, dpi=130)`` writes it.

    Raises:
        ValueError: If there is nothing to draw, or a class has no name.
        ModuleNotFoundError: If matplotlib is missing; it comes with the extra ``figures``.

    Example:
        >>> import torch
        >>> from lightning_polydis.visualization import ChannelVisualization
        >>> images = torch.rand(3, 3, 20, 20)
        >>> channel = ChannelVisualization("layer4.2.conv3", 522, [[62], [687, 3]], images[0], images[1:])
        >>> len(visualization_figure([channel]).axes)
        3
    """
    figure = new_figure("visualization_figure")
    _check(visualizations, None if concept_names is not None else class_names)
    names = [_names_of(channel, concept_names) for channel in visualizations]
    n_columns = 1 + max(len(channel.concepts) for channel in visualizations)
    row_height = HEADING_HEIGHT + LABEL_HEIGHT + IMAGE
    width = 2 * MARGIN + max(n_columns, 3) * (IMAGE + IMAGE_GAP) - IMAGE_GAP  # three: room for the heading
    figure.set_size_inches(width, 2 * MARGIN + len(visualizations) * (row_height + ROW_GAP) - ROW_GAP)
    for row, channel in enumerate(visualizations):
        numbers = range(1, len(channel.concepts) + 1)
        labels = [row_label(number, channel.concepts, class_names, names[row]) for number in numbers]
        _draw_row(figure, row, MARGIN + row * (row_height + ROW_GAP), channel, labels)
    return figure


def _names_of(
    channel: ChannelVisualization, concept_names: Mapping[tuple[str, int], Sequence[str]] | None
) -> Sequence[str] | None:
    if concept_names is None:
        return None
    names = concept_names.get((channel.layer, channel.channel))
    if names is None:
        raise ValueError(
            f"Expected argument `concept_names` to name the concepts of channel {channel.channel} of layer "
            f"`{channel.layer}`, but that channel is missing."
        )
    check_concept_names(len(channel.concepts), names)
    return names


def _check(visualizations: Sequence[ChannelVisualization], class_names: Sequence[str] | None) -> None:
    if not len(visualizations):
        raise ValueError("Expected argument `visualizations` to hold at least one channel, but it is empty.")
    check_names([label for channel in visualizations for concept in channel.concepts for label in concept], class_names)


def _draw_row(
    figure: Figure, row: int, top: float, channel: ChannelVisualization, concepts: Sequence[tuple[str, str]]
) -> None:
    title = f"{channel.layer}, channel {channel.channel}"
    fitting = CHARACTERS_PER_INCH * (figure.get_figwidth() - 2 * MARGIN) / len(title)
    _text(figure, MARGIN, top, title, min(12, fitting), "bold", TEXT_COLOUR)
    labels = [("original", "before the split"), *concepts]
    images = [channel.original, *channel.parts]
    for column, (image, label) in enumerate(zip(images, labels, strict=True)):
        colour = CONCEPT_COLOURS[(column - 1) % len(CONCEPT_COLOURS)] if column else TEXT_COLOUR
        left = MARGIN + column * (IMAGE + IMAGE_GAP)
        _text(figure, left, top + HEADING_HEIGHT, label[0], 10.5, "bold", colour)
        _text(figure, left, top + HEADING_HEIGHT + 0.21, label[1], 9, "normal", TEXT_COLOUR)
        place = (left, top + HEADING_HEIGHT + LABEL_HEIGHT)
        _draw_image(figure, place, pixels_of(image[None])[0], colour, f"row {row}, image {column}")


def _draw_image(figure: Figure, place: tuple[float, float], pixels: np.ndarray, colour: str, name: str) -> None:
    width, height = figure.get_size_inches()
    bottom = height - place[1] - IMAGE
    axes = figure.add_axes((place[0] / width, bottom / height, IMAGE / width, IMAGE / height), label=name)
    axes.imshow(pixels, vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=3)


def _text(figure: Figure, left: float, top: float, text: str, size: float, weight: str, colour: str) -> None:
    width, height = figure.get_size_inches()
    figure.text(left / width, 1 - top / height, text, fontsize=size, fontweight=weight, color=colour, va="top")
