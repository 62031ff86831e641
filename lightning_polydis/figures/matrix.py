"""Matrices in pictures: similarities of classes, concept by concept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_polydis.figures.canvas import CONCEPT_COLOURS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

COLOUR_MAP = "cividis"
"""Looks the same, and rises evenly, for people who see no difference between red and green."""

STRIP = 5
"""Thickness, in points, of the strips that tell the concepts apart."""


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
        if size:
            _strip(axes, start / len(matrix), size / len(matrix), strip_colour(index))
        start += size
    return image


def strip_colour(concept: int) -> str:
    """That of the concept; where colours have run out, two greys by turns."""
    return CONCEPT_COLOURS[concept] if concept < len(CONCEPT_COLOURS) else ("#222222", "#777777")[concept % 2]


def _strip(axes: Axes, start: float, length: float, colour: str) -> None:
    """Above and left of the matrix, in parts of it from the upper left corner; a small gap parts neighbours."""
    from matplotlib.transforms import ScaledTranslation

    gap = min(0.012, length / 5)
    along, away = (start + gap, start + length - gap), (STRIP / 2 + 1) / 72
    figure = axes.get_figure()  # or a subfigure, whose dots are the figure's
    assert figure is not None
    sides = {(0.0, away): (along, (1, 1)), (-away, 0.0): ((0, 0), (1 - along[0], 1 - along[1]))}
    for offset, (x, y) in sides.items():
        moved = axes.transAxes + ScaledTranslation(*offset, figure.dpi_scale_trans)
        style: dict[str, Any] = {"linewidth": STRIP, "solid_capstyle": "butt", "clip_on": False, "transform": moved}
        axes.plot(x, y, color=colour, scalex=False, scaley=False, **style)


def is_dark(image: AxesImage, value: float) -> bool:
    """Whether a cell of this value needs light text."""
    red, green, blue, _ = image.to_rgba(np.asarray([value]))[0]
    return bool(0.299 * red + 0.587 * green + 0.114 * blue < 0.5)
