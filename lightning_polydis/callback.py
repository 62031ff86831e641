"""The Lightning callback: which hook calls which part of the package, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_polydis._checks import InputError, check_bool, check_place_or_key, check_positive_int
from lightning_polydis._epoch import AnalysedEpoch
from lightning_polydis._failures import guarded, in_lightnings_words
from lightning_polydis._outputs import Outputs, split_trained
from lightning_polydis._preparation import RunPreparation
from lightning_polydis._text import changed_arguments
from lightning_polydis._trainer import check_optimizer_states, check_strategy, is_last_validation
from lightning_polydis.cards import EpochEntry, thinned
from lightning_polydis.loggers import log_split_quality
from lightning_polydis.plan import SplitPlan, of_one_kind
from lightning_polydis.settings import AnalysisSettings
from lightning_polydis.state import CallbackState
from lightning_polydis.surgery import stored_plan

if TYPE_CHECKING:
    from lightning_polydis.evaluation import SplitQuality
    from lightning_polydis.report import PolysemanticityReport


class ChannelDisentanglement(Callback):
    """Finds polysemantic channels while a network is validated, and splits them when training has ended.

    Validation's own forward pass is the one that is measured: hooks turn gradients on behind the layer and off at the
    logits, and one backward pass between the two gives the relevances (gradient x input). Losses, metrics and the
    network's state are what they would be without the callback. A network that this would change (a compiled one, or
    attention with a fast path or an LSTM behind the layer) is left alone: before each step its code is run once more,
    uncompiled and only up to the logits (see `rehearsal`). At the end of the epoch the channels are reported:
    scalars ``polydis/<layer>/n_polysemantic``, ``n_pairs``, ``n_candidates``, ``mean_cosine`` and ``min_cosine`` (to
    be monitored like any other), a table in the loggers, ``report.json``; when the run ends, ``report.html``, cards and
    pictures in the loggers, ``split_plan.json`` and a table in the console. Works in ``fit``, ``validate`` and
    ``test``; the sanity check is skipped.

    Method: Hesse, Fischer, Schaub-Meyer, Roth, *Disentangling Polysemantic Channels in Convolutional Neural Networks*,
    CVPR Workshops 2025, arXiv:2504.12939.

    Args:
        layers: Name or names from ``named_modules()`` of the LightningModule. `None`: the last convolution or linear
            layer in running order with at least 8 inputs per channel that neither comes first nor produces the logits;
            to find it, the first batch passes through the network twice.
        relevance_threshold: Share of an image's positive relevance from which a channel is relevant, in (0, 1].
        class_fraction: Share of a class's images that a channel must be relevant for, in (0, 1].
        similarity_threshold: Cosine similarity below which two classes count as different concepts, in (-1, 1], or
            ``"auto"``: calibrated for each layer and channel. `None`: 0.5 for ``"paper"``, ``"auto"`` for
            ``"optimized"``.
        method: ``"optimized"``: relevance vectors that go by each class's own logit, and soft membership of sources,
            solved for. ``"paper"``: the rules of the paper.
        concepts: ``"classes"``: concepts are groups of classes. ``"clusters"``: they are clusters of the images that
            activate a channel most, by which sources make it fire; neither targets nor logits nor gradients are needed.
            Relevance threshold, class fraction and attribution then mean nothing.
        leak_weight: How much a concept channel that answers to other concepts weighs against one that differs from
            the original on its own images, above 0. For ``method="optimized"``.
        attribution: What decides which channels are relevant: ``"gradient_x_input"``, or a zennit composite or the name
            of a registered one (``"epsilon_plus_flat"``), for which each batch passes once more, through a copy.
        split: Split the LightningModule, in place, when ``fit`` has ended. Its weights are then the final ones, not
            those of the best checkpoint.
        every_n_epochs: Analyse every n-th validation of a ``fit``; the first one always, and the last one unless
            training is stopped early.
        strict: What to do when the analysis fails for a reason that is not the user's: `False` drops this epoch's
            analysis with one warning, `True` raises.
        num_classes: Number of classes; `None`: the width of the logits.
        class_names: Names of the classes, for the reports.
        calibration_samples: Images of each class whose layer input is kept, half to choose memberships, half to judge
            them; 0: no plan; `None`: all images, all there to choose from.
        calibration_memory: MiB that these samples may take; lowers their number where it would not do, and says so.
            While an epoch is analysed, those of the last report are there as well. Not for `None`. Relevance vectors
            take at most a quarter as much again, thumbnails an eighth.
        logits_module: Name of the module whose output is the logits, where it is not the outermost one. What
            ``validation_step`` sees between layer and logits then requires gradients.
        target_fn: Batch -> class indices ``[B]``. `None`: ``batch[1]``, or ``batch["label"]``, ``"labels"``,
            ``"target"``, ``"targets"`` or ``"y"``.
        logits_fn: Network output -> logits ``[B, K]``. `None`: the tensor itself, ``.logits`` or ``["logits"]``.
        describe_fn: Names a cluster for the reports, from its strongest images ``[n, 3, h, w]``, ``uint8``: a
            captioning model, for instance. `None`: the classes that fill it, or a number.
        denormalize: What makes pictures in [0, 1] of the images, for the reports: a function on ``[n, C, H, W]``, or
            mean and standard deviation of each colour. `None`: those of the data set's transforms, if it has such.
        dirpath: Where ``report.json``, ``report.html`` and ``split_plan.json`` go. `None`: the logger's directory (no
            logger: nowhere). With several of these callbacks in a trainer their names begin with the layers', in a
            validation or test after a ``fit`` with ``validate.`` or ``test.``.
        embeddings: Write the relevance vectors of flagged channels into TensorBoard's projector when the run ends.
        dataloader: Which of several validation loaders is analysed, by place or, where they come as a dictionary, by
            key; `None`: all of them.

    Report and plan are part of checkpoints.

    Raises:
        MisconfigurationException: If an argument is out of range or does not go with the others; when validation
            starts, if the network or its batches do not fit the arguments.

    Example:
        >>> callback = ChannelDisentanglement("net.layer4.2.conv3", split=True)
        >>> trainer = pl.Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
        >>> callback.report is None  # until the first validation epoch
        True
    """

    def __init__(
        self,
        layers: str | Sequence[str] | None = None,
        *,
        relevance_threshold: float = 0.03,
        class_fraction: float = 0.75,
        similarity_threshold: float | str | None = None,
        method: str = "optimized",
        concepts: str = "classes",
        leak_weight: float = 3.0,
        attribution: Any = "gradient_x_input",
        split: bool = False,
        every_n_epochs: int = 1,
        strict: bool = False,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        calibration_samples: int | None = 32,
        calibration_memory: float = 1024,
        logits_module: str | None = None,
        target_fn: Callable[[Any], Any] | None = None,
        logits_fn: Callable[[Any], Any] | None = None,
        describe_fn: Callable[[Any], str] | None = None,
        denormalize: Any = None,
        dirpath: str | Path | None = None,
        embeddings: bool = False,
        dataloader: int | str | None = None,
    ) -> None:
        super().__init__()
        with in_lightnings_words():
            self._settings = AnalysisSettings(
                layers=layers,
                relevance_threshold=relevance_threshold,
                class_fraction=class_fraction,
                similarity_threshold=similarity_threshold,
                method=method,
                concepts=concepts,
                leak_weight=leak_weight,
                attribution=attribution,
                num_classes=num_classes,
                class_names=class_names,
                calibration_samples=calibration_samples,
                calibration_memory=calibration_memory,
                denormalize=denormalize,
                logits_module=logits_module,
                target_fn=target_fn,
                logits_fn=logits_fn,
                describe_fn=describe_fn,
            )
            check_positive_int("every_n_epochs", every_n_epochs)
            check_place_or_key("dataloader", dataloader)
            for name, value in (("split", split), ("strict", strict), ("embeddings", embeddings)):
                check_bool(name, value)
            if split and calibration_samples == 0:
                raise InputError("`split=True` needs calibration samples, but got `calibration_samples=0`.")
        self.split = split
        self.every_n_epochs = every_n_epochs
        self.strict = strict
        self.dirpath = dirpath
        self.embeddings = embeddings
        self.dataloader = dataloader
        self._report: PolysemanticityReport | None = None
        self._applied: SplitPlan | None = None
        self._epoch: AnalysedEpoch | None = None
        self._analysed_step = -1
        self._is_news = False  # whether the report comes from the run under way
        self._is_current = False  # whether it does, or from the checkpoint that the run went on from
        self._chosen: list[str] | None = None
        self._n_validations = 0
        self._has_fitted = False
        self._preparation: RunPreparation | None = None
        self._stage: str | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({changed_arguments(ChannelDisentanglement, self._settings, self)})"

    @property
    def report(self) -> PolysemanticityReport | None:
        """Report of the last analysed epoch; `None` before the first."""
        return self._report

    @property
    def plan(self) -> SplitPlan | None:
        """The plan that follows from the report, or that was applied; `None` before the first analysed epoch.

        Of a report that comes from a checkpoint only if that holds it: checkpoints of the last validation do.
        """
        if self._applied is not None or self._report is None:
            return self._applied
        return self._report.known_plan if self._report.is_restored else self._report.plan

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(layers=self._settings.layer_names, concepts=self._settings.concepts)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._n_validations = 0
        self._is_news = self._is_current = False
        self._chosen = None
        self._stage = stage
        with in_lightnings_words():
            if stage != "predict":
                check_strategy(trainer, split=self.split and stage == "fit")
            self._check_for_doubles(trainer)
        if not len(stored_plan(pl_module)):
            self._applied = None
        self._preparation = RunPreparation(trainer, pl_module)

    def _check_for_doubles(self, trainer: pl.Trainer) -> None:
        wanted = [set(other._settings.layer_names or [""]) for other in _instances(trainer)]
        if sum(map(len, wanted)) > len(set().union(*wanted)):
            raise InputError(
                "Two `ChannelDisentanglement` callbacks analyse the same layer, and would log under the same name. "
                "Give each other `layers`, or keep one."
            )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._give_back()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._give_back()  # teardown does not run after an exception

    @override
    def state_dict(self) -> dict[str, Any]:
        state = CallbackState(self._report, self._analysed_step, self._n_validations, self._chosen)
        return state.to_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage not in (None, "fit") or self._applied is not None:
            return  # what a run finds, or has led to a split, is not replaced by what a checkpoint remembers
        try:
            state = CallbackState.from_dict(state_dict)
        except InputError as error:  # no reason not to go on with the training
            rank_zero_warn(f"The report in the checkpoint was not restored. {error}")
            return
        self._report, self._analysed_step = state.report, state.analysed_step
        self._n_validations, self._chosen = state.n_validations, state.chosen
        self._is_current = True

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with in_lightnings_words():
            check_optimizer_states(trainer.optimizers, pl_module)

    def _give_back(self) -> None:
        """Hooks off, inference mode as it was."""
        self._drop_epoch()
        if self._preparation is not None:
            self._preparation.undo()
        self._preparation = None
        self._stage = None

    def _drop_epoch(self) -> None:
        if self._epoch is not None:
            self._epoch.drop()
        self._epoch = None

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._drop_epoch()
        if trainer.sanity_checking or not self._is_due(trainer):
            return
        plan = self._plan_in(pl_module)  # a split network is only evaluated: report and plan stay those that led to it
        self._applied = (self._applied or plan) if len(plan) else None
        settings = replace(self._settings, layers=self._layers)
        layers = [other._layers for other in _instances(trainer)]
        known = None if None in layers else [name for names in layers for name in names or []]
        self._epoch = AnalysedEpoch(trainer, pl_module, settings, plan, known, self.dataloader, self.strict)

    on_test_start = on_validation_start

    @property
    def _layers(self) -> list[str] | None:
        """The layers that are analysed, `None` as long as they are not chosen."""
        return self._settings.layer_names if self._chosen is None else self._chosen

    def _plan_in(self, pl_module: pl.LightningModule) -> SplitPlan:
        """The splits that the module has in the layers of this callback; of two kinds, those of its own."""
        names = self._settings.layer_names
        plan = SplitPlan([split for split in stored_plan(pl_module) if names is None or split.layer in names])
        return of_one_kind(plan, of_clusters=self._settings.concepts == "clusters")

    def _is_due(self, trainer: pl.Trainer) -> bool:
        """Whether this validation is analysed: every n-th of a fit, the first and the last one always."""
        if trainer.state.fn != TrainerFn.FITTING:
            return True
        self._n_validations += 1
        return is_last_validation(trainer) or (self._n_validations - 1) % self.every_n_epochs == 0

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._epoch is not None:
            self._epoch.start_batch(batch, batch_idx, dataloader_idx)

    on_test_batch_start = on_validation_batch_start

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._epoch is not None:
            self._epoch.finish_batch(dataloader_idx)

    on_test_batch_end = on_validation_batch_end

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._epoch is None:
            return
        result = self._epoch.result()
        self._drop_epoch()
        if result is not None:
            with guarded(strict=self.strict):
                self._take_in(trainer, pl_module, result)

    def _take_in(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, result: PolysemanticityReport | list[SplitQuality]
    ) -> None:
        if isinstance(result, list):
            log_split_quality(pl_module, result)
            return
        entries = result.entries(trainer.current_epoch, trainer.global_step)
        result = replace(result, history=thinned([*self._history, *entries]))
        self._chosen = [layer.name for layer in result.layers]  # once found, the layer need not be looked for again
        self._report = result
        self._analysed_step = trainer.global_step
        self._is_news = self._is_current = True
        pl_module.log_dict(result.scalars(), sync_dist=True)
        self._outputs(trainer).after_epoch(result, trainer.global_step)
        if trainer.state.fn == TrainerFn.FITTING and is_last_validation(trainer):
            _ = result.plan  # so that the checkpoint of this epoch holds it

    @property
    def _history(self) -> list[EpochEntry]:
        """The epochs of this run so far, and of the one it goes on with."""
        return self._report.history if self._report is not None and self._is_current else []

    def _outputs(self, trainer: pl.Trainer) -> Outputs:
        names = self._chosen or []
        prefix = "+".join(names) if len(names) < 4 else f"{names[0]}+{len(names) - 1}"  # file names are not endless
        prefix = f"{prefix}." if len(_instances(trainer)) > 1 else ""
        if self._has_fitted and trainer.state.fn != TrainerFn.FITTING:  # what the fit has left stays
            prefix += "test." if trainer.state.fn == TrainerFn.TESTING else "validate."
        return Outputs(trainer, self.dirpath, prefix, embeddings=self.embeddings, strict=self.strict)

    on_test_epoch_end = on_validation_epoch_end

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._finish_run(trainer)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish_run(trainer)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish_run(trainer)
        self._has_fitted = True
        plan = self._plan_in(pl_module)
        if len(plan):  # split already, even if no validation came by to see it
            self._applied = self._applied or plan
        elif self.split:
            with in_lightnings_words():
                report = self._report if self._is_current else None
                self._applied = split_trained(trainer, pl_module, report, self._analysed_step)
        elif self._report is None:
            rank_zero_warn("No validation epoch was analysed, so there is no report. Validate in `fit`, or afterwards.")

    def _finish_run(self, trainer: pl.Trainer) -> None:
        if self._report is not None and self._is_news:
            with guarded(strict=self.strict):
                self._outputs(trainer).after_run(self._report, self._analysed_step)


def _instances(trainer: pl.Trainer) -> list[ChannelDisentanglement]:
    return [callback for callback in trainer.callbacks if isinstance(callback, ChannelDisentanglement)]  # type: ignore[attr-defined]
