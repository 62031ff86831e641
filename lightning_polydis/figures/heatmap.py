"""Picture of where in images a channel's concepts are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.ndimage import gaussian_filter

from lightning_polydis.figures.canvas import (
    CONCEPT_COLOURS,
    TEXT_COLOUR,
    Grid,
    check_concept_names,
    literal,
    new_figure,
    pixels_of,
    row_label,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure
    from torch import Tensor

    from lightning_polydis.heatmaps import ConceptHeatmaps

FOR, AGAINST = np.array([178, 24, 43]) / 255, np.array([33, 102, 172]) / 255
"""Colours of relevance for the class and against it: red and blue, which colour-blind people can tell apart."""

SMOOTHING = 1 / 45
"""Width of the kernel that smoothes a map, as a part of the image's side."""

PALE = 0.55
"""How much of the way to white an image is brought before a map is laid over it."""


@literal
def heatmap_figure(
    images: Tensor,
    heatmaps: ConceptHeatmaps,
    *,
    title: str = "",
    class_names: Sequence[str] | None = None,
    concept_names: Sequence[str] | None = None,
) -> Figure:
    """Draw where in some images a channel is seen, and where each of its concepts.

    Columns are images; below each the map of the channel and those of its concepts, all on one scale: that of the
    largest value in the column. Red is relevance for the class (or activation), blue relevance against it.

    Args:
        images: ``[N, H, W]``, ``[N, 1, H, W]`` or ``[N, 3, H, W]``, in [0, 1], or ``uint8``.
        heatmaps: The maps of these images or of more, of which the first ``N`` are drawn.
        title: Title of the picture.
        class_names: Names of all classes; `None`: their indices.
        concept_names: Names of the concepts, in place of those of their classes. Clusters of images need them, as their
            numbers are no classes: ``report.concept_names[layer, channel]``.

    Returns:
        The figure; ``figure.savefig(path, dpi=130)`` writes it.

    Raises:
        ValueError: If the arguments do not fit together.
        ModuleNotFoundError: If matplotlib is missing; it comes with the extra ``figures``.

    Example:
        >>> import torch
        >>> from lightning_polydis import ConceptHeatmaps
        >>> maps = ConceptHeatmaps("conv", 3, [[0], [1]], torch.rand(4, 8, 8), torch.rand(4, 2, 8, 8))
        >>> len(heatmap_figure(torch.rand(4, 8, 8), maps).axes)  # images, the channel, two concepts
        16
    """
    figure = new_figure("heatmap_figure")
    pixels = pixels_of(images)
    if len(pixels) > len(heatmaps.parts) or pixels.shape[1:3] != heatmaps.parts.shape[2:]:
        raise ValueError(
            f"Expected argument `heatmaps` to hold maps of these images, at least {len(pixels)} of size "
            f"{list(pixels.shape[1:3])}, but got {len(heatmaps.parts)} of size {list(heatmaps.parts.shape[2:])}."
        )
    n_concepts = len(heatmaps.concepts)
    check_concept_names(n_concepts, concept_names)
    grid = Grid(figure, n_concepts + 2, len(pixels), pixels.shape[1] / pixels.shape[2], title)
    grid.label(0, "image", "")
    grid.label(1, "original", "before the split")
    for row in range(1, n_concepts + 1):
        grid.label(row + 1, *row_label(row, heatmaps.concepts, class_names, concept_names), CONCEPT_COLOURS[row - 1])
    for column, picture in enumerate(pixels):
        grid.image(0, column, picture)
        for row in range(n_concepts + 1):
            colour = TEXT_COLOUR if row == 0 else CONCEPT_COLOURS[row - 1]
            grid.image(row + 1, column, overlaid(picture, heatmaps, column, row), colour)
    is_signed = bool((heatmaps.parts < 0).any() or (heatmaps.original < 0).any())
    grid.note("red: for the class, blue: against it" if is_signed else "red: where it is seen")
    return figure


def overlaid(pixels: np.ndarray, heatmaps: ConceptHeatmaps, index: int, row: int) -> np.ndarray:
    """A map laid over its image, ``[H, W, 3]``; the same scale for the channel and all its concepts.

    Args:
        pixels: The image, ``[H, W]`` or ``[H, W, 3]``, in [0, 1].
        heatmaps: Maps of this image among others.
        index: Place of the image among them.
        row: 0 for the channel, then the concepts.
    """
    maps = np.concatenate([heatmaps.original[index, None].numpy(), heatmaps.parts[index].numpy()])
    # Relevance of single pixels is too fine for the eye; a map as small as a digit's stays as it is.
    smooth = gaussian_filter(maps, (0, SMOOTHING * maps.shape[1], SMOOTHING * maps.shape[2]))
    values = smooth[row] / max(float(np.abs(smooth).max()), np.finfo(np.float32).tiny)
    grey = pixels if pixels.ndim == 2 else pixels.mean(2)
    pale = np.repeat((PALE + (1 - PALE) * grey)[..., None], 3, axis=2)
    strength = np.sqrt(np.abs(values))[..., None]  # the root brings out what is weak
    blended: np.ndarray = (1 - strength) * pale + strength * np.where(values[..., None] >= 0, FOR, AGAINST)
    return blended.clip(0, 1)  # rounding
