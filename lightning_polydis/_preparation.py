"""What the callback changes of Trainer and module for a run, and gives back when it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_polydis._failures import in_lightnings_words
from lightning_polydis._trainer import averaged_twins
from lightning_polydis.surgery import rebuild_splits

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch import nn


class RunPreparation:
    """Makes a run fit to be analysed, until `undo`.

    Relevances need gradients, which inference mode forbids for good; `no_grad` can be lifted for a while. And a
    checkpoint of a split network finds the module unsplit, which is then split just before the weights load.

    Args:
        trainer: About to run.
        module: The LightningModule.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        loading = (module, *averaged_twins(trainer))
        self._hooks = [one.register_load_state_dict_pre_hook(_rebuild_splits) for one in loading]
        self._loops = [loop for loop in (trainer.validate_loop, trainer.test_loop) if loop.inference_mode]
        for loop in self._loops:
            loop.inference_mode = False

    def undo(self) -> None:
        """Hooks off, inference mode as it was."""
        for hook in self._hooks:
            hook.remove()
        for loop in self._loops:
            loop.inference_mode = True


def _rebuild_splits(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    with in_lightnings_words():
        rebuild_splits(module, own)
