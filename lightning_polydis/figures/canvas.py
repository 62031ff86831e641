"""What the pictures share: colours, pixels, and a canvas on which parts are placed by hand."""

from __future__ import annotations

import re
import textwrap
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np
import torch
from torch import Tensor

from lightning_polydis._text import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")

UNBROKEN = re.compile(r"(?<=\d) (?=%|\()")
"""Spaces within ``7 (62 %)``, at which no line ends."""

CONCEPT_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
"""One colour for each concept: those of Okabe and Ito, which colour-blind people can tell apart."""

OTHER_COLOUR = "#8C8C8C"
TEXT_COLOUR = "#222222"
QUIET_COLOUR = "#555555"

# Sizes in inches. Axes are placed by hand: every picture has the same proportions, and nothing can overlap.
CELL, CELL_GAP, MIN_ROW, MAX_ROW, ROW_GAP = 0.74, 0.1, 0.6, 1.1, 0.3
LABEL_WIDTH, HEADING_WIDTH, DENSITY_WIDTH, DENSITY_GAP = 1.55, 1.8, 2.7, 0.35
GRID_CELL = 1.1
CARD_CELL, CARD_DENSITY_WIDTH, SIDE_WIDTH, SIDE_GAP, CAPTION_SIZE = 0.86, 2.1, 2.4, 0.35, 7.5
MIN_LEAD, LEAD_GAP = 0.9, 0.25
MARGIN, TITLE_HEIGHT, HEADER_HEIGHT, FOOTER_HEIGHT = 0.25, 0.42, 0.33, 0.5

PIXEL_ART = 16
"""Longest side, in pixels, of images whose pixels are shown as squares."""

CHARACTERS_PER_INCH = 105
"""Of text of size 1, at a cautious estimate."""

BANDWIDTH = 0.03
"""Width of the kernel of a density, as a part of the axis. The same for all: a narrow curve means a narrow spread."""


def new_figure(wanted_by: str) -> Figure:
    """An empty figure that belongs to the caller alone: it does not go through ``pyplot``."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"`{wanted_by}` needs matplotlib: pip install 'lightning-polydis[figures]'."
        ) from error
    return Figure(facecolor="white")


def literal(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Have a figure show its texts as they are: in names of classes and layers, ``$`` begins no formula."""

    @wraps(draw)
    def drawn(*args: P.args, **options: P.kwargs) -> Figure:
        from matplotlib.text import Text

        figure = draw(*args, **options)
        for text in figure.findobj(
            Text
        ):  # not a subclass of `Figure`: Neptune knows figures by the name of their class
            assert isinstance(text, Text)
            text.set_parse_math(False)
        return figure

    return drawn


def pixels_of(images: Tensor) -> np.ndarray:
    """``[N, H, W]`` or ``[N, H, W, 3]``, in [0, 1]."""
    if images.ndim == 4 and images.shape[1] == 1:
        images = images[:, 0]
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[1] != 3) or not images.numel():
        raise ValueError(
            f"Expected argument `images` to have shape [N, H, W] or [N, 3, H, W], but got {list(images.shape)}."
        )
    images = images.detach().cpu().float() / 255 if images.dtype == torch.uint8 else images.detach().cpu().float()
    low, high = float(images.min()), float(images.max())
    if not 0 <= low <= high <= 1 + 1e-6:
        raise ValueError(
            f"Expected argument `images` to hold values in [0, 1], but got {low:.3g} to {high:.3g}. "
            "Undo the normalisation first."
        )
    return (images if images.ndim == 3 else images.permute(0, 2, 3, 1)).clamp(max=1).numpy()


def row_label(
    row: int,
    concepts: Sequence[Sequence[int]],
    class_names: Sequence[str] | None,
    concept_names: Sequence[str] | None = None,
) -> tuple[str, str]:
    """Heading of a concept's row, and in at most two lines its name, or its classes where concepts have none."""
    if concept_names is None:
        text = ", ".join(named(label, class_names) for label in concepts[row - 1])
    else:
        text = UNBROKEN.sub("\N{NO-BREAK SPACE}", concept_names[row - 1])
    return f"concept {row}", "\n".join(textwrap.wrap(text, 18, max_lines=2, placeholder=" ..."))


def check_concept_names(n_concepts: int, concept_names: Sequence[str] | None) -> None:
    """See that each concept has a name, if any has one."""
    if concept_names is not None and len(concept_names) != n_concepts:
        found = counted(len(concept_names), "name")
        raise ValueError(f"Expected argument `concept_names` to name {n_concepts} concepts, but got {found}.")


def named(label: int, class_names: Sequence[str] | None) -> str:
    """Name of a class, or its index."""
    return str(label) if class_names is None else class_names[label]


def names_up_to(class_names: Sequence[str] | None, classes: Sequence[int]) -> list[str] | None:
    """Names of all classes, with numbers for those of some classes that have none; `None` if no class has a name.

    Example:
        >>> names_up_to(["cat"], [0, 2])
        ['cat', 'class 1', 'class 2']
    """
    if class_names is None:
        return None
    names = [str(name) for name in class_names]
    return names + [f"class {index}" for index in range(len(names), max(classes, default=-1) + 1)]


def shortened(text: str, width: int) -> str:
    """The text with at most ``width`` characters, the last of them three dots where something is missing.

    Example:
        >>> shortened("Staffordshire bullterrier", 12)
        'Staffordshi…'
    """
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def readable(colour: str) -> str:
    """The colour, darker if text in it would be too pale on white.

    Example:
        >>> readable("#0072B2"), readable("#F0E442")
        ('#0072B2', '#787221')
    """
    parts = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    is_pale = 0.299 * parts[0] + 0.587 * parts[1] + 0.114 * parts[2] > 140
    return "#" + "".join(f"{part // 2:02x}" for part in parts) if is_pale else colour


def fitting_size(text: str, width: float, largest: float) -> float:
    """The largest size of a text that fits so many inches."""
    return min(largest, CHARACTERS_PER_INCH * width / max(len(text), 1))


def density_of(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Gaussian kernel density on ``grid``, which starts at 0, with a highest value of 1.

    Mirrored at 0, below which there are no activations: without that, a heap of zeros would lose half its mass.
    """
    width = BANDWIDTH * grid[-1]
    mirrored = np.concatenate([values, -values])
    density: np.ndarray = np.exp(-0.5 * ((grid[:, None] - mirrored) / width) ** 2).sum(1)
    return density / max(float(density.max()), np.finfo(float).tiny)


def _interpolation(pixels: np.ndarray) -> str:
    """Whether pixels are shown as such: in the tiny images of a toy data set they are what there is to see."""
    return "nearest" if max(pixels.shape[:2]) <= PIXEL_ART else "bilinear"


class Canvas:
    """A figure whose parts are placed in inches, rows from the top: label, visualization, images, densities.

    Args:
        figure: An empty figure.
        n_rows: Rows: one for the channel, one for each concept.
        n_columns: Images in a row; 0: there is no room for any.
        aspect: Height of an image over its width.
        n_strips: Lines of images in a row.
        lead: Whether a larger picture comes before the images of each row.
        cell: Width of an image.
        side: Whether there is a column on the right for something else.
    """

    def __init__(
        self,
        figure: Figure,
        n_rows: int,
        n_columns: int,
        aspect: float,
        *,
        n_strips: int = 1,
        lead: bool = False,
        cell: float = CELL,
        side: bool = False,
    ) -> None:
        self.figure = figure
        self._cell, self._cell_height = cell, min(max(cell * aspect, MIN_ROW), MAX_ROW)
        self._row_height = n_strips * (self._cell_height + CELL_GAP) - CELL_GAP
        self._lead_width = max(self._row_height, MIN_LEAD) + LEAD_GAP if lead else 0.0
        self._has_images = n_columns > 0
        images_width = max(n_columns * (cell + CELL_GAP) - CELL_GAP, HEADING_WIDTH) + DENSITY_GAP
        self._images_left = MARGIN + LABEL_WIDTH + self._lead_width
        self._density_left = self._images_left + images_width * self._has_images
        self._density_width = CARD_DENSITY_WIDTH if side else DENSITY_WIDTH
        self._side_left = self._density_left + self._density_width + SIDE_GAP
        self._width = (self._side_left + SIDE_WIDTH if side else self._side_left - SIDE_GAP) + MARGIN
        top = MARGIN + TITLE_HEIGHT + HEADER_HEIGHT
        self._height = top + n_rows * (self._row_height + ROW_GAP) - ROW_GAP + FOOTER_HEIGHT
        self._n_rows = n_rows
        self._grid = np.linspace(0, 1, 200)
        figure.set_size_inches(self._width, self._height)

    def header(self, title: str, activations: np.ndarray) -> None:
        """Title and column headings; ``activations`` settle the axis that all densities share."""
        self._grid = np.linspace(0, 1.05 * max(float(activations.max(initial=0)), 1e-12), 200)
        size = fitting_size(title, self._width - 2 * MARGIN, 13)
        self._text(MARGIN, MARGIN + 0.08, title, size=size, weight="bold")
        text = (
            "activation, by concept" if self._density_width < DENSITY_WIDTH else "activation on each concept's images"
        )
        headings = {self._density_left: text}
        if self._has_images:
            headings[self._images_left] = "images that activate it most"
        if self._lead_width:
            headings[MARGIN + LABEL_WIDTH] = "optimised"
        for left, text in headings.items():
            self._text(left, MARGIN + TITLE_HEIGHT + 0.07, text, size=9.5, color=QUIET_COLOUR)

    def label(self, row: int, name: str, classes: str, colour: str) -> None:
        """Name of a row, and under it what it stands for."""
        y = self._row_top(row) + self._row_height / 2
        self._text(MARGIN, y - 0.04, name, size=11.5, weight="bold", color=readable(colour), va="bottom")
        self._text(MARGIN, y + 0.04, classes, size=9.5, va="top")

    def lead(self, row: int, pixels: np.ndarray, colour: str) -> None:
        """The larger picture of a row."""
        size = self._lead_width - LEAD_GAP
        top = self._row_top(row) + (self._row_height - size) / 2
        self._picture((MARGIN + LABEL_WIDTH, top, size, size), f"row {row}, optimised image", pixels, colour)

    def image(
        self, row: int, column: int, pixels: np.ndarray, colour: str, strip: int = 0, caption: str | None = None
    ) -> None:
        """One image of a row, framed; below it a caption, cut to what fits."""
        left = self._images_left + column * (self._cell + CELL_GAP)
        top = self._row_top(row) + strip * (self._cell_height + CELL_GAP)
        name = f"row {row}, image {column}" if strip == 0 else f"row {row}, map {column}"
        self._picture((left, top, self._cell, self._cell_height), name, pixels, colour)
        if caption is not None:
            text = shortened(caption, int(CHARACTERS_PER_INCH / CAPTION_SIZE * self._cell))
            self._text(left, top + self._cell_height + 0.04, text, size=CAPTION_SIZE, color=QUIET_COLOUR)

    def _picture(self, place: tuple[float, float, float, float], name: str, pixels: np.ndarray, colour: str) -> None:
        axes = self._axes(*place, name)
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation=_interpolation(pixels))
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=colour, linewidth=3)

    def densities(self, row: int, by_concept: Sequence[np.ndarray], colours: Sequence[str]) -> None:
        """How the activation of a row's channel is distributed on the images of each concept."""
        height = min(self._row_height, MAX_ROW)
        top = self._row_top(row) + (self._row_height - height) / 2
        axes = self._axes(self._density_left, top, self._density_width, height, f"row {row}, densities")
        for values, colour in zip(by_concept, colours, strict=True):
            if len(values):
                density = density_of(values, self._grid)
                axes.fill_between(self._grid, density, color=colour, alpha=0.3, linewidth=0)
                axes.plot(self._grid, density, color=colour, linewidth=1.8)
        axes.set(xlim=(0, self._grid[-1]), ylim=(0, 1.12), yticks=[])
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=8.5, colors=QUIET_COLOUR, labelbottom=row == self._n_rows - 1)
        axes.locator_params(axis="x", nbins=5)
        if row == self._n_rows - 1:
            axes.set_xlabel("activation", size=9.5, color=QUIET_COLOUR, labelpad=2)

    def side(self, row: int, label: str, width: float, inset: float = 0.0) -> Axes:
        """Empty axes in the column on the right, ``inset`` from its left edge."""
        return self._axes(self._side_left + inset, self._row_top(row), width, self._row_height, label)

    def side_heading(self, row: int, text: str) -> None:
        """What stands in the column on the right, from this row on."""
        self._text(
            self._side_left, self._row_top(row) - (0.26 if row == 0 else 0.23), text, size=9.5, color=QUIET_COLOUR
        )

    def side_text(self, row: int, text: str, inset: float) -> None:
        """Some lines in the column on the right."""
        self._text(self._side_left + inset, self._row_top(row), text, size=8.5)

    def note(self, text: str) -> None:
        """A remark under all rows."""
        room = self._images_left if not self._has_images else self._density_left - DENSITY_GAP
        n_characters = int(CHARACTERS_PER_INCH / 8.5 * (room - MARGIN - 0.1))
        lines = "\n".join(textwrap.wrap(text, n_characters))
        self._text(MARGIN, self._height - FOOTER_HEIGHT + 0.17, lines, size=8.5, color=QUIET_COLOUR)

    def _row_top(self, row: int) -> float:
        return MARGIN + TITLE_HEIGHT + HEADER_HEIGHT + row * (self._row_height + ROW_GAP)

    def _axes(self, left: float, top: float, width: float, height: float, label: str) -> Axes:
        bottom = self._height - top - height
        rectangle = (left / self._width, bottom / self._height, width / self._width, height / self._height)
        return self.figure.add_axes(rectangle, label=label)

    def _text(
        self,
        left: float,
        top: float,
        text: str,
        size: float,
        weight: str = "normal",
        color: str = TEXT_COLOUR,
        va: str = "top",
    ) -> None:
        x, y = left / self._width, 1 - top / self._height
        self.figure.text(x, y, text, fontsize=size, fontweight=weight, color=color, va=va)


class Grid:
    """A figure of images in rows and columns, each row with a label; placed in inches.

    Args:
        figure: An empty figure.
        n_rows: Rows.
        n_columns: Columns.
        aspect: Height of an image over its width.
        title: Title of the picture.
    """

    def __init__(self, figure: Figure, n_rows: int, n_columns: int, aspect: float, title: str) -> None:
        self._figure = figure
        self._cell = (GRID_CELL, GRID_CELL * min(max(aspect, 0.5), 2.0))
        self._top = MARGIN + (TITLE_HEIGHT if title else 0.0)
        self._width = 2 * MARGIN + LABEL_WIDTH + n_columns * (self._cell[0] + CELL_GAP) - CELL_GAP
        self._height = self._top + n_rows * (self._cell[1] + CELL_GAP) - CELL_GAP + FOOTER_HEIGHT
        figure.set_size_inches(self._width, self._height)
        self._text(MARGIN, title, size=fitting_size(title, self._width - 2 * MARGIN, 13), weight="bold", va="top")

    def label(self, row: int, name: str, classes: str, colour: str = TEXT_COLOUR) -> None:
        """Name of a row, and under it what it stands for."""
        middle = self._top + row * (self._cell[1] + CELL_GAP) + self._cell[1] / 2
        va = "bottom" if classes else "center"
        self._text(middle - 0.04, name, size=11.5, weight="bold", color=colour, va=va)
        self._text(middle + 0.04, classes, size=9.5, color=TEXT_COLOUR, va="top")

    def image(self, row: int, column: int, pixels: np.ndarray, colour: str | None = None) -> None:
        """One image, framed if there is a colour."""
        width, height = self._cell
        left = MARGIN + LABEL_WIDTH + column * (width + CELL_GAP)
        bottom = self._height - self._top - row * (height + CELL_GAP) - height
        place = (left / self._width, bottom / self._height, width / self._width, height / self._height)
        axes = self._figure.add_axes(place, label=f"row {row}, image {column}")
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation=_interpolation(pixels))
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(visible=colour is not None, color=colour or "none", linewidth=2)

    def note(self, text: str) -> None:
        """A remark under all rows."""
        self._text(self._height - FOOTER_HEIGHT + 0.14, text, size=8.5, color=QUIET_COLOUR, va="top")

    def _text(self, top: float, text: str, **style: Any) -> None:
        if not text:
            return
        style["fontsize"], style["fontweight"] = style.pop("size"), style.pop("weight", "normal")
        self._figure.text(MARGIN / self._width, 1 - top / self._height, text, **style)
