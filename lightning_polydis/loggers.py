"""Reports in the loggers of a run."""

from __future__ import annotations

from contextlib import suppress
from itertools import product
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console

from lightning_polydis.figures import sweep_figure
from lightning_polydis.sweep import sweep_markdown

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lightning.pytorch import LightningModule
    from lightning.pytorch.loggers import Logger

    from lightning_polydis.evaluation import SplitQuality
    from lightning_polydis.report import PolysemanticityReport

MAX_ROWS = 20
SPLIT_SCALARS = ("distortion", "leak", "spurious", "auroc")


def log_report(loggers: Iterable[Logger], report: PolysemanticityReport, step: int) -> None:
    """Write the report's table into every TensorBoard logger, under one tag for each set of layers.

    Args:
        loggers: The loggers of a run; those without text are passed over (scalars reach them by ``self.log``).
        report: The report.
        step: Global step of the analysis.
    """
    tag = f"polydis/{', '.join(layer.name for layer in report.layers)}"
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, report.to_markdown(MAX_ROWS), step)


def log_sweeps(loggers: Iterable[Logger], report: PolysemanticityReport, step: int) -> None:
    """Write what other settings would have found into every TensorBoard logger: a table, with matplotlib a picture.

    Args:
        loggers: The loggers of a run.
        report: The report.
        step: Global step of the analysis.
    """
    boards = [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]
    if not boards:  # nobody would see what takes some time to count
        return
    suggested = report.suggest_settings()
    for sweep, board in product(report.sweeps, boards):
        tag = f"polydis/{sweep.layer}/settings"
        text = f"Suggested: `{suggested.arguments()}`. {suggested.reason}"
        board.add_text(tag, f"{text}\n\n{sweep_markdown(sweep)}", step)
        with suppress(ModuleNotFoundError):  # without matplotlib the table has to do
            board.add_figure(tag, sweep_figure(sweep, report.settings), step)


def log_split_quality(pl_module: LightningModule, qualities: Sequence[SplitQuality]) -> None:
    """Log the mean of each figure over a layer's splits as ``polydis/<layer>/split_<figure>``.

    Args:
        pl_module: The module whose ``log`` is used.
        qualities: The same on all ranks, or the ranks would wait for one another.
    """
    for layer in dict.fromkeys(quality.layer for quality in qualities):
        for name in SPLIT_SCALARS:
            values = [quality.mean(name) for quality in qualities if quality.layer == layer]
            known = [value for value in values if value is not None]
            if known:
                pl_module.log(f"polydis/{layer}/split_{name}", sum(known) / len(known), sync_dist=True)


@rank_zero_only
def show_report(report: PolysemanticityReport) -> None:
    """Print the report's table on the console, by one process."""
    Console().print(report.to_table())
