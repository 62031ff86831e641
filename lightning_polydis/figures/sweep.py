"""Picture of what other settings would have found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_polydis.figures.canvas import CONCEPT_COLOURS, TEXT_COLOUR, literal, new_figure
from lightning_polydis.figures.overview import layer_title

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from lightning_polydis.sweep import LayerSweep


@literal
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
    figure = new_figure("sweep_figure")
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
    figure.suptitle(f"{layer_title(sweep.layer)}: what other settings would have found", fontsize=12, fontweight="bold")
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
