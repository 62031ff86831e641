"""One analysed epoch of a run: what goes wrong in it ends the analysis, in all processes, and not the training."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_polydis._failures import guarded
from lightning_polydis._rehearsals import Rehearsals
from lightning_polydis._trainer import chosen_loader, evaluated_loaders, is_wrapped, weights_note
from lightning_polydis.analyses import Analysis, Judgement, analysis_for, judgement_for
from lightning_polydis.thumbnails import normalisation_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_polydis.evaluation import SplitQuality
    from lightning_polydis.plan import SplitPlan
    from lightning_polydis.report import PolysemanticityReport
    from lightning_polydis.settings import AnalysisSettings


class AnalysedEpoch:
    """The analysis of one validation or test epoch, begun by all processes and ended by all.

    Args:
        trainer: About to validate or test.
        module: The LightningModule.
        settings: How to analyse.
        plan: The splits that the module has; with any, they are judged, and nothing else is analysed.
        all_layers: The layers that this and other callbacks analyse; `None`: not known yet.
        dataloader: Which validation loader is analysed, by place or key; `None`: all.
        strict: Whether internal failures raise.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        settings: AnalysisSettings,
        plan: SplitPlan,
        all_layers: list[str] | None,
        dataloader: int | str | None,
        strict: bool,
    ) -> None:
        self._trainer, self._strict = trainer, strict
        self._analysis: Analysis | Judgement | None = None  # `None` once it has failed in this process
        with self._guarded():
            self._loader = chosen_loader(trainer, dataloader)
            is_sure = settings.logits_module is not None or settings.concepts == "clusters"
            self._rehearsals = Rehearsals(trainer, module, all_layers, is_sure)
            if len(plan):
                self._analysis = judgement_for(module, plan, settings)
            else:
                normalisation = normalisation_of(evaluated_loaders(trainer), self._loader or 0)
                self._analysis = analysis_for(module, settings, weights_note(trainer), normalisation)

    def _guarded(self) -> Any:
        return guarded(strict=self._strict, on_failure=self.drop)

    def drop(self) -> None:
        """Take hooks off and let data go."""
        analysis, self._analysis = self._analysis, None
        if analysis is not None:
            self._rehearsals.release()
            analysis.release()

    def start_batch(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Get ready for the step on a batch, or rehearse it."""
        if self._analysis is None or self._loader not in (None, dataloader_idx):
            return
        with self._guarded():
            if self._rehearsals.needed:
                self._rehearsals.rehearse(self._analysis, batch, batch_idx, dataloader_idx)
            else:
                self._analysis.start_batch(batch, wrapped=is_wrapped(self._trainer))

    def finish_batch(self, dataloader_idx: int) -> None:
        """Take in what the step has shown."""
        if self._analysis is None or self._loader not in (None, dataloader_idx):
            return
        with self._guarded():
            if self._rehearsals.needed:
                self._rehearsals.after_step()
            else:
                self._analysis.finish_batch()

    def result(self) -> PolysemanticityReport | list[SplitQuality] | None:
        """The report, or the quality of the splits; `None`, in all processes, if the analysis failed in any."""
        if self._analysis is not None and self._analysis.is_empty:
            warnings.warn("No batch was analysed in this epoch, as there was none.", stacklevel=2)
            self.drop()
        if not self._is_well_everywhere():  # or the others would wait for this one
            return None
        found = None
        with self._guarded():
            assert self._analysis is not None  # all is well
            self._analysis.gather()
            found = self._analysis.compute()
        return found if self._is_well_everywhere() else None  # logging makes the processes wait again

    def _is_well_everywhere(self) -> bool:
        is_well = self._analysis is not None
        if self._trainer.strategy.reduce_boolean_decision(is_well):
            return True
        if is_well:
            rank_zero_warn("The analysis of this epoch is dropped: it failed in another process, or had no batch.")
        self.drop()
        return False
