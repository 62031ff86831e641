"""What the callback has to know about Lightning's Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_polydis._checks import InputError
from lightning_polydis.splitting import SplitLayer

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch.optim import Optimizer


def check_strategy(trainer: pl.Trainer, *, split: bool) -> None:
    """Refuse strategies under which no process has whole layers, and splits that would be lost.

    Raises:
        ValueError: In words.
    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    whole = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
    if not whole:
        raise InputError(
            f"`ChannelDisentanglement` needs whole layers in each process, which `{name}` does not keep. Train "
            "without it, then analyse the checkpoint on one device or with `strategy='ddp'`: "
            "`Trainer(callbacks=[ChannelDisentanglement(...)]).validate(module, ckpt_path=...)`, or "
            "`find_polysemantic_channels(model, batches)`."
        )
    if split and isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise InputError(
            "`split=True` needs a strategy that trains in this process, but `ddp_spawn`, `ddp_fork` and "
            "`ddp_notebook` train in others and bring back weights alone, not the split layers. Use `strategy='ddp'`, "
            "or `split=False` and then `disentangle(module, SplitPlan.load('.../split_plan.json'), inplace=True)`."
        )


def is_last_validation(trainer: pl.Trainer) -> bool:
    """Whether no other validation of this ``fit`` will follow, as far as can be known."""
    to_next = trainer.check_val_every_n_epoch or 1
    last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + to_next >= (trainer.max_epochs or 0)
    last_step = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    return last_epoch or last_step or trainer.should_stop


def is_wrapped(trainer: pl.Trainer) -> bool:
    """Whether the step is reached through a call of the LightningModule, as under DDP."""
    return trainer.strategy.model is not trainer.lightning_module


def chosen_loader(trainer: pl.Trainer, wanted: int | str | None) -> int | None:
    """Place of the validation loader that is to be analysed; `None`: all of them.

    Raises:
        ValueError: If there is no such loader.
    """
    if wanted is None or trainer.state.fn == TrainerFn.TESTING:
        return None
    loaders = trainer.val_dataloaders
    parts = list(loaders.values()) if isinstance(loaders, dict) else loaders
    is_nested = isinstance(parts, list | tuple) and any(isinstance(part, list | tuple | dict) for part in parts)
    if is_nested or not trainer._evaluation_loop._is_sequential:
        raise InputError(
            "Argument `dataloader` needs a list or dictionary of loaders that come one after the other, but got "
            f"{'nested ones' if is_nested else 'a `CombinedLoader` of another mode'}. Leave it out to analyse all."
        )
    n_loaders = len(loaders) if isinstance(loaders, list | tuple | dict) else 1
    names = list(loaders) if isinstance(loaders, dict) else []
    if wanted in names:
        return names.index(wanted)
    if isinstance(wanted, int) and 0 <= wanted < n_loaders:
        return wanted
    known = f"one of {names} or " if names else ""
    raise InputError(
        f"Expected argument `dataloader` to be {known}a place in [0, {n_loaders}) of a validation loader, "
        f"but got {wanted!r}."
    )


def evaluated_loaders(trainer: pl.Trainer) -> Any:
    """The loaders of the validation or test under way."""
    return trainer.test_dataloaders if trainer.state.fn == TrainerFn.TESTING else trainer.val_dataloaders


def weights_note(trainer: pl.Trainer) -> str | None:
    """Which weights are analysed, where a callback exchanges them; found by the callbacks' names."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        if name == "StochasticWeightAveraging":
            return f"Analysed: the weights in training; `{name}` replaces them by their average when training ends."
        if "WeightAveraging" in name or "EMA" in name:
            return f"Analysed: the weights that `{name}` puts in place for validation, not those in training."
    return None


def check_optimizer_states(optimizers: list[Optimizer], module: nn.Module) -> None:
    """Refuse optimizer states that were made before a layer was split.

    Raises:
        ValueError: In words; the optimizer would fail at its first step, or go on with numbers of other channels.
    """
    for name, layer in module.named_modules():
        if not isinstance(layer, SplitLayer):
            continue
        states = [(own, optimizer.state.get(own, {})) for optimizer in optimizers for own in layer.expand.parameters()]
        if any(_is_stale(list(state.values()), own) for own, state in states):
            raise InputError(
                f"The optimizer's state in this checkpoint is of the time before layer `{name}` was split, and does "
                "not fit the split layer. Start with a new optimizer: "
                "`module = lightning_polydis.load_from_checkpoint(ModuleClass, path)`, then `trainer.fit(module)` "
                "without `ckpt_path`."
            )


def _is_stale(values: list[Any], parameter: Tensor) -> bool:
    """Whether an optimizer's state was made for a parameter of another shape."""
    values = [value for value in values if isinstance(value, Tensor) and value.ndim == parameter.ndim]
    fits = any(value.shape == parameter.shape for value in values)  # then others are matrices of the optimizer's own
    return not fits and any(_is_of_other_shape(value, parameter) for value in values)


def _is_of_other_shape(value: Tensor, parameter: Tensor) -> bool:
    """Whether sizes differ; 1 stands for a mean (Adafactor)."""
    return any(size not in (1, wanted) for size, wanted in zip(value.shape, parameter.shape, strict=True))


def averaged_twins(trainer: pl.Trainer) -> list[nn.Module]:
    """Copies of the module that averages of weights keep, found by the name under which Lightning's keep them."""
    averages = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    return [getattr(average, "module", average) for average in averages if average is not None]
