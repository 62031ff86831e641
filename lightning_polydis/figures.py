"""Pictures of splits. This module alone knows matplotlib, and imports it only when a picture is drawn."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from lightning_polydis.sweep import LayerSweep

CONCEPT_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
"""One colour for each concept: those of Okabe and Ito, which colour-blind people can tell apart."""

OTHER_COLOUR = "#8C8C8C"
TEXT_COLOUR = "#222222"

# Sizes in inches. Axes are placed by hand: every picture has the same proportions, and nothing can overlap.
CELL, CELL_GAP, MIN_ROW, MAX_ROW, ROW_GAP = 0.74, 0.1, 0.6, 1.1, 0.3
LABEL_WIDTH, HEADING_WIDTH, DENSITY_WIDTH, DENSITY_GAP = 1.55, 1.8, 2.7, 0.35
MARGIN, TITLE_HEIGHT, HEADER_HEIGHT, FOOTER_HEIGHT = 0.25, 0.42, 0.33, 0.5

CHARACTERS_PER_INCH = 105
"""Of text of size 1, at a cautious estimate."""

BANDWIDTH = 0.03
"""Width of the kernel of a density, as a part of the axis. The same for all: a narrow curve means a narrow spread."""


def split_figure(
    images: Tensor,
    targets: Tensor,
    original: Tensor,
    parts: Tensor,
    concepts: Sequence[Sequence[int]],
    *,
    title: str = "",
    class_names: Sequence[str] | None = None,
    n_images: int = 8,
) -> Figure:
    """Draw a polysemantic channel before and after its split (after the teaser of arXiv:2504.12939).

    One row for the original channel and one for each concept channel. A row shows the images that activate it most,
    framed in the colour of the concept that their class belongs to (grey: no concept's), and beside them how its
    activation is distributed over the images of each concept; every curve is drawn with the same height.

    The figure does not go through ``pyplot``: it belongs to the caller alone and needs no closing.

    Args:
        images: ``[N, H, W]``, ``[N, 1, H, W]`` or ``[N, 3, H, W]``, in [0, 1], or ``uint8``.
        targets: Class of each image, ``[N]``, integer.
        original: Activation of the original channel on each image, not negative, ``[N]``; for instance the sum over
            positions of the positive part.
        parts: The same for each concept channel, ``[N, K]``.
        concepts: Classes of each of the ``K`` concepts, as in `ChannelSplit.concepts`.
        title: Title of the picture.
        class_names: Names of all classes; `None`: their indices.
        n_images: Images in a row at most. Images that do not activate the channel are left out.

    Returns:
        The figure; ``figure.savefig(path, dpi=130)`` writes it.

    Raises:
        ValueError: If the arguments do not fit together or are out of range.
        ModuleNotFoundError: If matplotlib is missing; it comes with the extra ``figures``.

    Example:
        >>> import torch
        >>> images, targets = torch.rand(20, 8, 8), torch.arange(20) % 2
        >>> original = torch.rand(20)
        >>> parts = torch.stack([original * (targets == 0), original * (targets == 1)], dim=1)
        >>> figure = split_figure(images, targets, original, parts, [[0], [1]], n_images=5)
        >>> len(figure.axes)  # three rows of five images and one density each
        18
    """
    figure = _new_figure("split_figure")
    pixels = _pixels(images)
    _check(len(images), targets, original, parts, concepts, class_names, n_images)
    colours = [CONCEPT_COLOURS[index] for index in range(len(concepts))]
    concept_of = _concept_of(targets, concepts)
    rows = torch.cat([original[:, None], parts], dim=1).detach().float().cpu()
    canvas = _Canvas(figure, len(concepts) + 1, n_images, pixels.shape[1] / pixels.shape[2])
    canvas.header(title, rows[concept_of >= 0].numpy())
    shows_others = False
    for row, activation in enumerate(rows.T):
        name, classes = ("original", "before the split") if row == 0 else _row_label(row, concepts, class_names)
        canvas.label(row, name, classes, TEXT_COLOUR if row == 0 else colours[row - 1])
        for column, index in enumerate(_strongest(activation, n_images)):
            concept = int(concept_of[index])
            canvas.image(row, column, pixels[index], OTHER_COLOUR if concept < 0 else colours[concept])
            shows_others |= concept < 0
        by_concept = [activation[concept_of == concept].numpy() for concept in range(len(concepts))]
        canvas.densities(row, by_concept, colours)
    if shows_others:
        canvas.note("grey frame: image of a class that belongs to none of the concepts")
    return canvas.figure


def sweep_figure(sweep: LayerSweep, settings: Mapping[str, Any]) -> Figure:
    """Draw what other settings would have found in a layer.

    Left: flagged and candidate channels for each relevance threshold and class fraction, at the similarity threshold in
    force; the settings in force are framed. Right: how the number of flagged channels depends on the similarity
    threshold, for each class fraction at the relevance threshold in force.

    Args:
        sweep: One of `PolysemanticityReport.sweeps`.
        settings: The settings in force, `PolysemanticityReport.settings`.

    Returns:
        The figure.

    Raises:
        ModuleNotFoundError: If matplotlib is missing; it comes with the extra ``figures``.

    Example:
        >>> from lightning_polydis.sweep import LayerSweep
        >>> sweep = LayerSweep("conv", 8, [0.01, 0.03], [0.5], [0.5, "auto"], [[5], [2]], [[9], [2]],
        ...                    [[[3, 4]], [[1, 1]]], [[[5, 6]], [[1, 1]]])
        >>> in_force = {"relevance_threshold": 0.03, "class_fraction": 0.5, "similarity_threshold": "auto"}
        >>> len(sweep_figure(sweep, in_force).axes)
        2
    """
    figure = _new_figure("sweep_figure")
    n_rows, n_columns = len(sweep.class_fractions), len(sweep.relevance_thresholds)
    width, height = 1.6 + 1.0 * n_columns, max(1.6 + 0.6 * n_rows, 3.2)
    figure.set_size_inches(width + 5.4, height)
    figure.set_layout_engine("constrained")
    grid, lines = figure.subplots(1, 2, width_ratios=[width, 5.0])
    chosen = sweep.similarity_thresholds.index(settings["similarity_threshold"])
    place = (
        sweep.relevance_thresholds.index(settings["relevance_threshold"]),
        sweep.class_fractions.index(settings["class_fraction"]),
    )
    _draw_grid(grid, sweep, chosen, place)
    _draw_lines(lines, sweep, place[0], chosen)
    figure.suptitle(f"{sweep.layer}: what other settings would have found", fontsize=12, fontweight="bold")
    return figure


def _draw_grid(axes: Axes, sweep: LayerSweep, chosen: int, place: tuple[int, int]) -> None:
    flagged = np.array(sweep.n_polysemantic)[..., chosen].T
    axes.imshow(flagged, cmap="Blues", vmin=0, vmax=max(1, 1.4 * flagged.max()), aspect="auto", origin="lower")
    for row, column in np.ndindex(flagged.shape):
        text = f"{flagged[row, column]} / {sweep.n_candidates[column][row]}"
        axes.text(column, row, text, ha="center", va="center", fontsize=9.5, color=TEXT_COLOUR)
    axes.add_patch(_frame(place))
    axes.set_xticks(range(flagged.shape[1]), [f"{value:g}" for value in sweep.relevance_thresholds])
    axes.set_yticks(range(flagged.shape[0]), [f"{value:g}" for value in sweep.class_fractions])
    axes.set_xlabel("relevance_threshold")
    axes.set_ylabel("class_fraction")
    value = sweep.similarity_thresholds[chosen]
    name = value if isinstance(value, str) else f"{value:g}"
    axes.set_title(f"channels flagged / candidates, similarity_threshold {name}", fontsize=9.5, color="#555555")


def _frame(place: tuple[int, int]) -> Patch:
    from matplotlib.patches import Rectangle

    return Rectangle((place[0] - 0.48, place[1] - 0.48), 0.96, 0.96, fill=False, edgecolor="#D55E00", linewidth=2.5)


def _draw_lines(axes: Axes, sweep: LayerSweep, row: int, chosen: int) -> None:
    numbers = [value for value in sweep.similarity_thresholds if not isinstance(value, str)]
    for index, (fraction, counts) in enumerate(zip(sweep.class_fractions, sweep.n_polysemantic[row], strict=True)):
        colour = CONCEPT_COLOURS[index % len(CONCEPT_COLOURS)]
        axes.plot(numbers, counts[: len(numbers)], marker="o", markersize=4, color=colour, label=f"{fraction:g}")
        if len(counts) > len(numbers):
            axes.axhline(counts[-1], color=colour, linewidth=1, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="y", integer=True)
    axes.set_xlabel(
        "similarity_threshold" + (' (dotted: "auto")' if len(sweep.similarity_thresholds) > len(numbers) else "")
    )
    axes.set_title(
        f"channels flagged, relevance_threshold {sweep.relevance_thresholds[row]:g}", fontsize=9.5, color="#555555"
    )
    legend = axes.legend(title="class_fraction", fontsize=8.5, title_fontsize=8.5, frameon=False, reverse=True)
    legend.set_loc("upper left")
    legend.set_bbox_to_anchor((1.0, 1.0))  # beside the lines, not on them
    axes.spines[["top", "right"]].set_visible(False)


def _new_figure(wanted_by: str) -> Figure:
    """An empty figure that belongs to the caller alone: it does not go through ``pyplot``."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"`{wanted_by}` needs matplotlib: pip install 'lightning-polydis[figures]'."
        ) from error
    return Figure(facecolor="white")


def _check(
    n: int,
    targets: Tensor,
    original: Tensor,
    parts: Tensor,
    concepts: Sequence[Sequence[int]],
    class_names: Sequence[str] | None,
    n_images: int,
) -> None:
    expected = {"targets": (targets, [n]), "original": (original, [n]), "parts": (parts, [n, len(concepts)])}
    for name, (tensor, shape) in expected.items():
        if list(tensor.shape) != shape:
            raise ValueError(f"Expected argument `{name}` to have shape {shape}, but got {list(tensor.shape)}.")
    if targets.is_floating_point():
        raise ValueError(f"Expected argument `targets` to hold class indices, but got {targets.dtype}.")
    for name, values in (("original", original), ("parts", parts)):
        if not bool((torch.isfinite(values) & (values >= 0)).all()):
            raise ValueError(f"Expected argument `{name}` to hold finite activations that are not negative.")
    if not 2 <= len(concepts) <= len(CONCEPT_COLOURS):
        raise ValueError(
            f"Expected argument `concepts` to hold 2 to {len(CONCEPT_COLOURS)} concepts, but got {len(concepts)}."
        )
    last = max((label for concept in concepts for label in concept), default=0)
    if class_names is not None and last >= len(class_names):
        raise ValueError(f"Expected argument `class_names` to name class {last}, but got {len(class_names)} names.")
    if n_images < 1:
        raise ValueError(f"Expected argument `n_images` to be at least 1, but got {n_images}.")


def _pixels(images: Tensor) -> np.ndarray:
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


def _concept_of(targets: Tensor, concepts: Sequence[Sequence[int]]) -> Tensor:
    """For each image the concept that its class belongs to, or -1."""
    lookup = {label: index for index, concept in enumerate(concepts) for label in concept}
    return torch.tensor([lookup.get(label, -1) for label in targets.tolist()])


def _strongest(activation: Tensor, n_images: int) -> list[int]:
    order: list[int] = activation.argsort(descending=True, stable=True)[:n_images].tolist()
    return [index for index in order if activation[index] > 0]


def _row_label(row: int, concepts: Sequence[Sequence[int]], class_names: Sequence[str] | None) -> tuple[str, str]:
    names = [str(label) if class_names is None else class_names[label] for label in concepts[row - 1]]
    return f"concept {row}", "\n".join(textwrap.wrap(", ".join(names), 18, max_lines=2, placeholder=" ..."))


def _density(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Gaussian kernel density on ``grid``, which starts at 0, with a highest value of 1.

    Mirrored at 0, below which there are no activations: without that, a heap of zeros would lose half its mass.
    """
    width = BANDWIDTH * grid[-1]
    mirrored = np.concatenate([values, -values])
    density: np.ndarray = np.exp(-0.5 * ((grid[:, None] - mirrored) / width) ** 2).sum(1)
    return density / max(float(density.max()), np.finfo(float).tiny)


class _Canvas:
    """A figure whose parts are placed in inches, rows from the top."""

    def __init__(self, figure: Figure, n_rows: int, n_columns: int, aspect: float) -> None:
        self.figure = figure
        self._row_height = min(max(CELL * aspect, MIN_ROW), MAX_ROW)
        self._images_width = max(n_columns * (CELL + CELL_GAP) - CELL_GAP, HEADING_WIDTH)
        self._width = 2 * MARGIN + LABEL_WIDTH + self._images_width + DENSITY_GAP + DENSITY_WIDTH
        top = MARGIN + TITLE_HEIGHT + HEADER_HEIGHT
        self._height = top + n_rows * (self._row_height + ROW_GAP) - ROW_GAP + FOOTER_HEIGHT
        self._n_rows = n_rows
        self._grid = np.linspace(0, 1, 200)
        figure.set_size_inches(self._width, self._height)

    def header(self, title: str, activations: np.ndarray) -> None:
        """Title and column headings; ``activations`` settle the axis that all densities share."""
        self._grid = np.linspace(0, 1.05 * max(float(activations.max(initial=0)), 1e-12), 200)
        fitting = CHARACTERS_PER_INCH * (self._width - 2 * MARGIN) / max(len(title), 1)
        self._text(MARGIN, MARGIN + 0.08, title, size=min(13, fitting), weight="bold")
        y = MARGIN + TITLE_HEIGHT + 0.07
        self._text(MARGIN + LABEL_WIDTH, y, "images that activate it most", size=9.5, color="#555555")
        self._text(self._density_left, y, "activation on each concept's images", size=9.5, color="#555555")

    def label(self, row: int, name: str, classes: str, colour: str) -> None:
        y = self._row_top(row) + self._row_height / 2
        self._text(MARGIN, y - 0.04, name, size=11.5, weight="bold", color=colour, va="bottom")
        self._text(MARGIN, y + 0.04, classes, size=9.5, va="top")

    def image(self, row: int, column: int, pixels: np.ndarray, colour: str) -> None:
        left = MARGIN + LABEL_WIDTH + column * (CELL + CELL_GAP)
        axes = self._axes(left, self._row_top(row), CELL, self._row_height, f"row {row}, image {column}")
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=colour, linewidth=3)

    def densities(self, row: int, by_concept: Sequence[np.ndarray], colours: Sequence[str]) -> None:
        axes = self._axes(
            self._density_left, self._row_top(row), DENSITY_WIDTH, self._row_height, f"row {row}, densities"
        )
        for values, colour in zip(by_concept, colours, strict=True):
            if len(values):
                density = _density(values, self._grid)
                axes.fill_between(self._grid, density, color=colour, alpha=0.3, linewidth=0)
                axes.plot(self._grid, density, color=colour, linewidth=1.8)
        axes.set(xlim=(0, self._grid[-1]), ylim=(0, 1.12), yticks=[])
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=8.5, colors="#555555", labelbottom=row == self._n_rows - 1)
        axes.locator_params(axis="x", nbins=5)
        if row == self._n_rows - 1:
            axes.set_xlabel("activation", size=9.5, color="#555555", labelpad=2)

    def note(self, text: str) -> None:
        n_characters = int(CHARACTERS_PER_INCH / 8.5 * (self._density_left - DENSITY_GAP - MARGIN))
        lines = "\n".join(textwrap.wrap(text, n_characters))
        self._text(MARGIN, self._height - FOOTER_HEIGHT + 0.12, lines, size=8.5, color="#555555")

    @property
    def _density_left(self) -> float:
        return MARGIN + LABEL_WIDTH + self._images_width + DENSITY_GAP

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
