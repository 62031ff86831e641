"""Matrices in pictures: similarities of classes, concept by concept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_polydis.figures.canvas import CONCEPT_COLOURS, TEXT_COLOUR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

COLOUR_MAP = "cividis"
"""Looks the same, and rises evenly, for people who see no difference between red and green."""

STRIP = 0.045
"""Thickness of the strips that tell the concepts apart, as a part of the matrix."""


def draw_similarities(axes: Axes, matrix: np.ndarray, sizes: Sequence[int]) -> AxesImage:
    """Draw similarities of classes, on a scale up to 1, with a strip in the colour of each concept above and left.

    Args:
        axes: Empty axes.
        matrix: ``[n, n]``, classes concept after concept.
        sizes: Number of classes of each concept.
    """
    image = axes.imshow(matrix, cmap=COLOUR_MAP, vmin=min(0.0, float(matrix.min(initial=0))), vmax=1, aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    start = 0
    for index, size in enumerate(sizes):
        colour = CONCEPT_COLOURS[index] if index < len(CONCEPT_COLOURS) else TEXT_COLOUR
        _strip(axes, start / len(matrix), size / len(matrix), colour)
        start += size
    return image


def _strip(axes: Axes, start: float, length: float, colour: str) -> None:
    """In parts of the axes, from the upper left corner; a small gap parts neighbours."""
    from matplotlib.patches import Rectangle

    gap = min(0.012, length / 5)
    places = {
        (start + gap, 1 + STRIP / 2): (length - 2 * gap, STRIP),
        (-1.5 * STRIP, 1 - start - length + gap): (STRIP, length - 2 * gap),
    }
    for corner, (width, height) in places.items():
        patch = Rectangle(corner, width, height, color=colour, linewidth=0, transform=axes.transAxes, clip_on=False)
        axes.add_patch(patch)


def is_dark(image: AxesImage, value: float) -> bool:
    """Whether a cell of this value needs light text."""
    red, green, blue, _ = image.to_rgba(np.asarray([value]))[0]
    return bool(0.299 * red + 0.587 * green + 0.114 * blue < 0.5)
