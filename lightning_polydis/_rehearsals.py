"""The rehearsals of a run: arguments of the step, and what has to be checked beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_polydis._checks import InputError
from lightning_polydis.collection import follower_text
from lightning_polydis.forward import has_own_parameters
from lightning_polydis.rehearsal import (
    changes_under_gradients,
    compiled_parts,
    copied,
    has_two_kernels,
    is_compiled,
    is_compiled_function,
    rehearsal,
    uncompiled,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import lightning.pytorch as pl
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from lightning_polydis.analyses import Analysis, Judgement


class Rehearsals:
    """Rehearses the steps of a LightningModule that has to be left alone while it runs.

    Nothing behind the logits is seen in a rehearsal. So the first real step is watched for modules that run after
    what was taken for the logits, as ``head`` does in ``head(backbone(x))``.

    Args:
        trainer: In validation or test.
        module: The LightningModule.
        layers: All layers that are analysed in this run; `None`: not known yet.
        is_sure: Whether nothing that runs after the logits could be overlooked: they were named, or none are needed.

    Attributes:
        needed: Whether the module is such a one.

    Raises:
        ValueError: If the step fetches its batches itself.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        layers: Sequence[str] | None,
        is_sure: bool,
    ) -> None:
        testing = trainer.state.fn == TrainerFn.TESTING
        plugin = trainer.precision_plugin
        self._context = plugin.test_step_context if testing else plugin.val_step_context
        self._step: Callable[..., Any] = module.test_step if testing else module.validation_step
        self._module, self._loop = module, trainer._evaluation_loop
        self._is_sure = is_sure
        self._ran: set[str] = set()
        self._follower: str | None = None
        self._handles: list[RemovableHandle] = []
        self.needed = is_compiled(module, self._step) or changes_under_gradients(module, layers)
        if is_param_in_hook_signature(self._step, "dataloader_iter", explicit=True):
            raise InputError(
                "Expected a step that takes a batch, but it takes `dataloader_iter` and fetches batches itself."
            )

    def rehearse(self, analysis: Analysis | Judgement, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Let the analysis see a step on a batch before the real one.

        Raises:
            ValueError: If the step could not be analysed.
        """
        analysis.start_batch(batch, rehearsal=True)
        if not self._is_sure:
            self._note(self._own_modules(), self._ran.add)
        try:
            with rehearsal(self._module), self._context():
                self._step(copied(batch), *self._further_arguments(batch_idx, dataloader_idx))
        finally:
            self.release()
        with uncompiled():
            analysis.finish_batch()
        if not self._is_sure:
            self._watch(analysis.outermost)

    def after_step(self) -> None:
        """Take in what the first real step has shown.

        Raises:
            ValueError: If a module ran after what was taken for the logits.
        """
        self.release()
        self._is_sure = True
        if self._follower is not None:
            raise InputError(follower_text(self._follower))

    def release(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _further_arguments(self, batch_idx: int, dataloader_idx: int) -> list[int]:
        """What Lightning passes after the batch, whatever the step calls it."""
        takes_index = is_param_in_hook_signature(self._step, "batch_idx", min_args=2)
        loop = self._loop
        several = loop._is_sequential and loop.num_dataloaders > 1
        return [batch_idx] * takes_index + [dataloader_idx] * several

    def _own_modules(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self._module.named_modules() if name and has_own_parameters(module)}

    def _watch(self, outermost: nn.Module | None) -> None:
        """Put hooks on modules outside of the outermost call that did not run before it."""
        inside = set() if outermost is None else set(outermost.modules())
        outside = {name: m for name, m in self._own_modules().items() if m not in inside and name not in self._ran}
        hidden = compiled_parts(self._module)
        for name, module in outside.items():
            if module in hidden or is_compiled_function(self._step):  # no hook would see it
                raise InputError(follower_text(name, "may run"))
        kernels = {part for m in self._module.modules() if has_two_kernels(m) for part in m.modules()}
        self._note({name: module for name, module in outside.items() if module not in kernels}, self._follow)

    def _follow(self, name: str) -> None:
        self._follower = self._follower or name

    def _note(self, modules: dict[str, nn.Module], note: Callable[[str], None]) -> None:
        for name, module in modules.items():
            self._handles.append(module.register_forward_pre_hook(lambda *_, name=name: note(name)))
