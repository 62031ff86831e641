"""Where the results of a run go: loggers, files, console. What cannot be written is a warning, never an end."""

from __future__ import annotations

import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_polydis._text import counted
from lightning_polydis._trainer import averaged_twins
from lightning_polydis.loggers import log_embeddings, log_report, log_results, show_report
from lightning_polydis.surgery import disentangle, split_checked

if TYPE_CHECKING:
    from collections.abc import Iterator

    import lightning.pytorch as pl

    from lightning_polydis.plan import SplitPlan
    from lightning_polydis.report import PolysemanticityReport


class Outputs:
    """The outputs of one callback in one trainer.

    Args:
        trainer: Gives the loggers and, unless ``dirpath`` is given, the directory.
        dirpath: Where the files go.
        prefix: What their names begin with.
        embeddings: Whether relevance vectors go to TensorBoard's projector.
        strict: Whether failures of our own raise; else they are warnings, and what comes after is written all the same.
    """

    def __init__(
        self, trainer: pl.Trainer, dirpath: str | Path | None, prefix: str, *, embeddings: bool, strict: bool
    ) -> None:
        self._trainer, self._prefix, self._embeddings, self._strict = trainer, prefix, embeddings, strict
        folder = dirpath if dirpath is not None or not trainer.loggers else trainer.log_dir  # the same on all ranks
        is_ours = trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False)
        self._folder = Path(folder) if folder is not None and is_ours else None
        self._is_asked_for = trainer.is_global_zero and (bool(trainer.loggers) or dirpath is not None)

    def after_epoch(self, report: PolysemanticityReport, step: int) -> None:
        """Write the report of an epoch that was analysed at a global step."""
        self._save(report, "report.json")
        with self._writing("The report", "the loggers"):
            log_report(self._trainer.loggers, report, step)

    def after_run(self, report: PolysemanticityReport, step: int) -> None:
        """Choose and judge the plan, write everything, show the table."""
        plan = report.plan
        report.judge()
        if self._is_asked_for:  # these take time, and somebody will see them
            with self._writing("Sweep, cards and overviews", "the report"):
                _ = report.sweeps, report.cards, report.overviews
        self._save(report, "report.json")  # once more, with all that
        if plan is not None:
            self._save(plan, "split_plan.json")
        if self._folder is not None:
            with self._writing("`report.html`", f"`{self._folder}`"):
                report.to_html(self._folder / f"{self._prefix}report.html")
        with self._writing("The results", "the loggers"):
            log_results(self._trainer.loggers, report, step)
            if self._embeddings:
                log_embeddings(self._trainer.loggers, report, step)
        with self._writing("The table", "the console"):
            show_report(report)

    def _save(self, result: PolysemanticityReport | SplitPlan, name: str) -> None:
        if self._folder is not None:
            with self._writing(f"`{name}`", f"`{self._folder}`"):
                result.save(self._folder / f"{self._prefix}{name}")

    @contextmanager
    def _writing(self, what: str, where: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            rank_zero_warn(f"{what} could not be written to {where}: {error}.")
        except Exception:  # ours: what comes after is written all the same
            if self._strict:
                raise
            rank_zero_warn(f"{what} could not be written to {where}:\n{traceback.format_exc()}")


def split_trained(
    trainer: pl.Trainer, module: pl.LightningModule, report: PolysemanticityReport | None, analysed_step: int
) -> SplitPlan | None:
    """Split a module in place when its training has ended, by the plan of the last report.

    Args:
        trainer: Whose ``fit`` has ended.
        module: The LightningModule.
        report: The last one.
        analysed_step: Global step at which it was made.

    Returns:
        The plan that was applied; `None` if there was nothing to split.
    """
    plan = None if report is None else report.known_plan
    if report is None or plan is None:
        rank_zero_warn("`split=True`, but there is no plan: no validation epoch was analysed, or no sample kept.")
        return None
    if trainer.global_step != analysed_step or report.differs_from(module):
        rank_zero_warn(
            "The weights have changed since the analysis that the split follows from; the final weights are split. "
            "Let the last epoch end with a validation to analyse what is split."
        )
    if not len(plan):
        rank_zero_info("No channel was flagged, so nothing is split. `report.suggest_settings()` may know why.")
    for layer, deviation in split_checked(module, plan, report.sample_inputs()).items():
        split = counted(len(plan.of_layer(layer)), "channel")
        rank_zero_info(f"Split {split} of `{layer}`; largest relative change of its output: {deviation:.1e}.")
    for twin in averaged_twins(trainer):  # it has the final weights too, is what checkpoints hold, and is swapped in
        disentangle(twin, plan, inplace=True)
    return plan if len(plan) else None
