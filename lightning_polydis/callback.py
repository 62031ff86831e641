"""The Lightning callback: which hook calls which part of the package, and nothing else."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_polydis._checks import InputError, check_positive_int
from lightning_polydis.analysis import ChannelAnalysis
from lightning_polydis.loggers import log_report, log_split_quality, log_sweeps, show_report
from lightning_polydis.plan import SplitPlan
from lightning_polydis.settings import AnalysisSettings
from lightning_polydis.split_analysis import SplitAnalysis
from lightning_polydis.surgery import rebuild_splits, split_checked, stored_plan

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from lightning_polydis.report import PolysemanticityReport


class ChannelDisentanglement(Callback):
    """Finds polysemantic channels while a network is validated, and splits them when training has ended.

    Validation's own forward pass is the one that is measured: hooks turn gradients on behind the layer and off at the
    logits, and one backward pass between the two gives the relevances (gradient x input). Losses, metrics and the
    network's state are what they would be without the callback (where torch takes another kernel once gradients are on,
    as the fast path of attention does, up to rounding). At the end of the epoch the channels are reported:
    scalars ``polydis/<layer>/n_polysemantic``, ``n_pairs``, ``n_candidates``, ``mean_cosine`` and ``min_cosine`` (to
    be monitored like any other), a table in TensorBoard, ``report.json``; when the run ends, ``split_plan.json`` and a
    table in the console. Works in ``fit``, ``validate`` and ``test``; the sanity check is skipped.

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
        concepts: ``"classes"``: concepts are groups of classes.
        leak_weight: How much a concept channel that answers to other concepts weighs against one that differs from
            the original on its own images, above 0. For ``method="optimized"``.
        attribution: ``"gradient_x_input"``.
        split: Split the LightningModule, in place, when ``fit`` has ended. Its weights are then the final ones, not
            those of the best checkpoint.
        every_n_epochs: Analyse every n-th validation of a ``fit``; the first one always, and the last one unless
            training is stopped early.
        strict: What to do when the analysis fails for a reason that is not the user's: `False` drops this epoch's
            analysis with one warning, `True` raises.
        num_classes: Number of classes; `None`: the width of the logits.
        class_names: Names of the classes, for the reports.
        calibration_samples: Images of each class whose layer input is kept, half to choose memberships, half to judge
            them; 0: no plan; `None`: all images, all used to choose.
        calibration_memory: MiB that these samples may take; lowers their number where it would not do, and says so.
            While an epoch is analysed, those of the last report are there as well. Not for `None`. Relevance vectors
            take at most a quarter as much again.
        logits_module: Name of the module whose output is the logits, where it is not the outermost one. What
            ``validation_step`` sees between layer and logits then requires gradients.
        target_fn: Batch -> class indices ``[B]``. `None`: ``batch[1]``, or ``batch["label"]``, ``"labels"``,
            ``"target"``, ``"targets"`` or ``"y"``.
        logits_fn: Network output -> logits ``[B, K]``. `None`: the tensor itself, ``.logits`` or ``["logits"]``.
        dirpath: Where ``report.json`` and ``split_plan.json`` go. `None`: the logger's directory (no logger: nowhere).
            With several of these callbacks in a trainer their names begin with the layers'.

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
        dirpath: str | Path | None = None,
    ) -> None:
        super().__init__()
        with _in_lightnings_words():
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
                logits_module=logits_module,
                target_fn=target_fn,
                logits_fn=logits_fn,
            )
            check_positive_int("every_n_epochs", every_n_epochs)
            if split and calibration_samples == 0:
                raise InputError("`split=True` needs calibration samples, but got `calibration_samples=0`.")
        self.split = split
        self.every_n_epochs = every_n_epochs
        self.strict = strict
        self.dirpath = dirpath
        self._report: PolysemanticityReport | None = None
        self._applied: SplitPlan | None = None
        self._analysis: ChannelAnalysis | SplitAnalysis | None = None
        self._analysed_step = -1
        self._is_news = False  # whether the report comes from the run under way
        self._chosen: list[str] | None = None
        self._n_validations = 0
        self._inference_loops: list[Any] = []
        self._load_hook: RemovableHandle | None = None

    @property
    def report(self) -> PolysemanticityReport | None:
        """Report of the last analysed epoch; `None` before the first."""
        return self._report

    @property
    def plan(self) -> SplitPlan | None:
        """The plan that follows from the report, or that was applied; `None` before the first analysed epoch."""
        if self._applied is not None:
            return self._applied
        return None if self._report is None else self._report.plan

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(layers=self._settings.layer_names, concepts=self._settings.concepts)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Relevances need gradients, which inference mode forbids for good; `no_grad` can be lifted for a while.
        self._inference_loops = [loop for loop in (trainer.validate_loop, trainer.test_loop) if loop.inference_mode]
        for loop in self._inference_loops:
            loop.inference_mode = False
        self._n_validations = 0
        self._is_news = False
        self._chosen = None
        if not len(stored_plan(pl_module)):
            self._applied = None
        with _in_lightnings_words():
            self._check_for_doubles(trainer)
        # A checkpoint of a split network finds the module unsplit; it is split just before the weights load.
        self._load_hook = pl_module.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            _rebuild_splits
        )

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

    def _give_back(self) -> None:
        """Hooks off, inference mode as it was."""
        self._drop_analysis()
        if self._load_hook is not None:
            self._load_hook.remove()
        self._load_hook = None
        for loop in self._inference_loops:
            loop.inference_mode = True
        self._inference_loops = []

    def _drop_analysis(self) -> None:
        if self._analysis is not None:
            self._analysis.release()
        self._analysis = None

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer, pl_module)

    on_test_start = on_validation_start

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._drop_analysis()
        if trainer.sanity_checking or not self._is_due(trainer):
            return
        with self._guarded():
            plan = self._plan_in(pl_module)
            if not len(plan):
                self._applied = None
                chosen = self._settings.layers if self._chosen is None else self._chosen
                self._analysis = ChannelAnalysis(pl_module, replace(self._settings, layers=chosen))
            else:  # a split network is only evaluated: report and plan stay those that led to the split
                self._applied = self._applied or plan
                self._analysis = SplitAnalysis(pl_module, plan, self._settings)

    def _plan_in(self, pl_module: pl.LightningModule) -> SplitPlan:
        """The splits that the module has in the layers of this callback."""
        names = self._settings.layer_names
        return SplitPlan([split for split in stored_plan(pl_module) if names is None or split.layer in names])

    def _is_due(self, trainer: pl.Trainer) -> bool:
        """Whether this validation is analysed: every n-th of a fit, the first and the last one always."""
        if trainer.state.fn != TrainerFn.FITTING:
            return True
        self._n_validations += 1
        to_next = trainer.check_val_every_n_epoch or 1
        last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + to_next >= (
            trainer.max_epochs or 0
        )
        last_step = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
        last = last_epoch or last_step or trainer.should_stop
        return last or (self._n_validations - 1) % self.every_n_epochs == 0

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._analysis is not None:
            wrapped = trainer.strategy.model is not trainer.lightning_module  # DDP calls the module to reach the step
            with self._guarded():
                self._analysis.start_batch(batch, wrapped=wrapped)

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
        if self._analysis is not None:
            with self._guarded():
                self._analysis.finish_batch()

    on_test_batch_end = on_validation_batch_end

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        analysis = self._analysis
        if analysis is None:
            return
        with self._guarded():
            if isinstance(analysis, SplitAnalysis):
                log_split_quality(pl_module, analysis.compute())
            else:
                self._chosen = analysis.layer_names  # once found, the layer need not be looked for again
                self._report = analysis.compute()
                self._analysed_step = trainer.global_step
                self._is_news = True
                pl_module.log_dict(self._report.scalars(), sync_dist=True)
                log_report(trainer.loggers, self._report, trainer.global_step)
                self._save(trainer, self._report, "report.json")
        self._drop_analysis()

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
        plan = self._finish_run(trainer)
        if self.split and self._applied is None:
            self._apply(trainer, pl_module, plan)

    def _finish_run(self, trainer: pl.Trainer) -> SplitPlan | None:
        """Choose and judge the plan, write the files, show the table."""
        if self._report is None or not self._is_news:
            return None
        plan = None
        with self._guarded():
            plan = self._report.plan
            self._report.judge()
            if trainer.loggers or self.dirpath is not None:  # somebody will see them
                _ = self._report.sweeps
            self._save(trainer, self._report, "report.json")
            if plan is not None:
                self._save(trainer, plan, "split_plan.json")
            log_report(trainer.loggers, self._report, self._analysed_step)  # once more, with the splits' quality
            log_sweeps(trainer.loggers, self._report, self._analysed_step)
            show_report(self._report)
        return plan

    def _apply(self, trainer: pl.Trainer, pl_module: pl.LightningModule, plan: SplitPlan | None) -> None:
        if self._report is None or plan is None:
            rank_zero_warn("`split=True`, but there is no plan: no validation epoch was analysed, or no sample kept.")
            return
        if trainer.global_step != self._analysed_step or self._report.differs_from(pl_module):
            rank_zero_warn(
                "The weights have changed since the analysis that the split follows from; the final weights are split. "
                "Let the last epoch end with a validation to analyse what is split."
            )
        with _in_lightnings_words():
            deviations = split_checked(pl_module, plan, self._report.sample_inputs())
        for layer, deviation in deviations.items():
            n_split = len(plan.of_layer(layer))
            rank_zero_info(
                f"Split {n_split} channels of `{layer}`; largest relative change of its output: {deviation:.1e}."
            )
        self._applied = plan if len(plan) else None

    def _save(self, trainer: pl.Trainer, result: PolysemanticityReport | SplitPlan, name: str) -> None:
        folder = self.dirpath if self.dirpath is not None or not trainer.loggers else trainer.log_dir
        if folder is None or getattr(trainer, "fast_dev_run", False) or not trainer.is_global_zero:
            return
        if len(_instances(trainer)) > 1:
            name = f"{'+'.join(self._chosen or [])}.{name}"
        try:
            result.save(Path(folder) / name)
        except OSError as error:
            rank_zero_warn(f"`{name}` could not be written to `{folder}`: {error}.")

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """What the user can mend raises in words; anything else ends this epoch's analysis, not the training."""
        try:
            with _in_lightnings_words():
                yield
        except MisconfigurationException:
            self._drop_analysis()
            raise
        except Exception:
            self._drop_analysis()
            if self.strict:
                raise
            rank_zero_warn(f"The analysis of this epoch failed and is dropped:\n{traceback.format_exc()}")


@contextmanager
def _in_lightnings_words() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise MisconfigurationException(str(error)) from error


def _instances(trainer: pl.Trainer) -> list[ChannelDisentanglement]:
    return [callback for callback in trainer.callbacks if isinstance(callback, ChannelDisentanglement)]  # type: ignore[attr-defined]


def _rebuild_splits(module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    with _in_lightnings_words():
        rebuild_splits(module, state_dict)
