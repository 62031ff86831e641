"""Analysis of networks that must not be looked into while they run: the step is rehearsed up to the logits.

Hooks inside a compiled network are either ignored or break its graph, and attention and LSTMs compute by another
kernel, which rounds differently, where there are hooks or gradients. So the step is run once more before the real
one, by the same code without compilation, on a copy of the batch, and is stopped as soon as the logits are there:
nothing that follows them (losses, metrics, logging) happens twice, and the real step is not touched.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torchmetrics import Metric, MetricCollection

from lightning_polydis.forward import PassDone, untouched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SPEAKING = ("log", "log_dict", "print")


def is_compiled(model: nn.Module, *functions: Callable[..., Any]) -> bool:
    """Whether a model, one of its modules, their methods and attributes or some functions use ``torch.compile``.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> is_compiled(net)
        False
        >>> net[0].compile()
        >>> is_compiled(net)
        True
    """
    return any(map(is_compiled_function, functions)) or bool(compiled_parts(model))


def compiled_parts(model: nn.Module) -> set[nn.Module]:
    """All modules that run, or may run, in compiled code, where hooks are of no use."""
    kinds: dict[type, bool] = {}
    for kind in {base for module in model.modules() for base in type(module).__mro__}:
        kinds[kind] = any(map(is_compiled_function, vars(kind).values()))
    roots = [
        module
        for module in model.modules()
        if isinstance(module, OptimizedModule)
        or module._compiled_call_impl is not None  # by `module.compile()`
        or any(kinds[base] for base in type(module).__mro__)
        or any(map(is_compiled_function, vars(module).values()))
    ]
    return {part for root in roots for part in root.modules()}


def is_compiled_function(function: Any) -> bool:
    """Whether something is a function (or method) that ``torch.compile`` has made."""
    is_disabled = getattr(function, "_torchdynamo_disable", False)
    return callable(function) and hasattr(function, "_torchdynamo_orig_callable") and not is_disabled


def changes_under_gradients(model: nn.Module, layers: Sequence[str] | None) -> bool:
    """Whether a module that computes by another kernel under hooks or gradients contains a layer or comes after one.

    Args:
        model: The network; its modules are taken to run in the order in which they are defined.
        layers: Names of layers; `None`: not known yet.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2), nn.Linear(8, 8))
        >>> changes_under_gradients(net, ["0"]), changes_under_gradients(net, ["2"])
        (True, False)
    """
    names = [name for name, _ in model.named_modules()]
    first = min((names.index(layer) for layer in layers or [] if layer in names), default=0)
    found = [(place, name) for place, (name, module) in enumerate(model.named_modules()) if has_two_kernels(module)]
    return any(place > first or any(layer.startswith(f"{name}.") for layer in layers or []) for place, name in found)


def has_two_kernels(module: nn.Module) -> bool:
    """Whether the module rounds differently with gradients than without: attention's fast path, LSTM."""
    if isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer | nn.TransformerEncoder):
        return torch.backends.mha.get_fastpath_enabled()
    return isinstance(module, nn.LSTM)


def uncompiled() -> Any:
    """A context in which compiled functions run as they were written; what is compiled stays as it is."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def rehearsal(module: nn.Module) -> Iterator[None]:
    """Let a step of ``module`` run without compilation, until `forward.PassDone` stops it.

    Buffers, torchmetrics and random numbers are put back; what the step logs or prints is thrown away. What it does
    before the logits to other objects of its own (a counter, a generator) happens twice.
    """
    grad_mode = torch.is_grad_enabled()
    try:
        with uncompiled(), untouched(module), _quiet(module), _metrics_stand_in(module), suppress(PassDone):
            yield
    finally:
        torch.set_grad_enabled(grad_mode)


def copied(batch: Any) -> Any:
    """A copy of a batch: a step may change it."""
    try:
        return copy.deepcopy(batch)
    except Exception:  # not everything can be copied; tensors are what matters
        return apply_to_collection(batch, Tensor, lambda tensor: tensor.clone(), allow_frozen=True)


@contextmanager
def _quiet(module: nn.Module) -> Iterator[None]:
    """Without ``log``, ``log_dict`` and ``print``, which would tell twice what a step has to say before the logits."""
    own = {name: module.__dict__[name] for name in SPEAKING if name in module.__dict__}
    for name in SPEAKING:
        module.__dict__[name] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for name in SPEAKING:
            del module.__dict__[name]
        module.__dict__.update(own)


@contextmanager
def _metrics_stand_in(module: nn.Module) -> Iterator[None]:
    """Copies of a module's metrics take their places: they may be updated before the logits are there."""
    places = [
        (parent._modules, name, child)
        for parent in module.modules()
        if not isinstance(parent, Metric | MetricCollection)
        for name, child in parent._modules.items()
        if isinstance(child, Metric | MetricCollection)
    ]
    for children, name, metric in places:
        children[name] = metric.clone()
    try:
        yield
    finally:
        for children, name, metric in places:
            children[name] = metric
