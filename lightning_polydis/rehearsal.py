"""Analysis of networks that must not be looked into while they run: the step is rehearsed up to the logits.

Hooks inside a compiled network are either ignored or break its graph, and attention computes by another kernel, which
rounds differently, where there are hooks or gradients. So the step is run once more before the real one, by the same
code without compilation, on a copy of the batch, and is stopped as soon as the logits are there: nothing that follows
them (losses, metrics, logging) happens twice, and the real step is not touched.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from lightning_polydis.forward import PassDone, untouched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

LOGGING = ("log", "log_dict")


def is_compiled(model: nn.Module, *functions: Callable[..., Any]) -> bool:
    """Whether a model, one of its modules or one of some functions is run by ``torch.compile``.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> is_compiled(net)
        False
        >>> net[0].compile()
        >>> is_compiled(net)
        True
    """
    return any(map(_is_compiled_function, functions)) or any(
        isinstance(module, OptimizedModule)
        or module._compiled_call_impl is not None  # by `module.compile()`
        or _is_compiled_function(module.forward)
        for module in model.modules()
    )


def loses_fast_path(model: nn.Module, layers: Sequence[str] | None) -> bool:
    """Whether attention that takes a faster path without gradients contains a layer, or comes after the first one.

    Args:
        model: The network; its modules are taken to run in the order in which they are defined.
        layers: Names of layers; `None`: not known yet.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2), nn.Linear(8, 8))
        >>> loses_fast_path(net, ["0"]), loses_fast_path(net, ["2"])
        (True, False)
    """
    names = [name for name, _ in model.named_modules()]
    first = min((names.index(layer) for layer in layers or [] if layer in names), default=0)
    attention = [(place, name) for place, (name, module) in enumerate(model.named_modules()) if _is_attention(module)]
    return torch.backends.mha.get_fastpath_enabled() and any(
        place > first or any(layer.startswith(f"{name}.") for layer in layers or []) for place, name in attention
    )


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer | nn.TransformerEncoder)


def _is_compiled_function(function: Callable[..., Any]) -> bool:
    is_disabled = getattr(function, "_torchdynamo_disable", False)
    return hasattr(function, "_torchdynamo_orig_callable") and not is_disabled


def uncompiled() -> Any:
    """A context in which compiled functions run as they were written; what is compiled stays as it is."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def rehearsal(module: nn.Module) -> Iterator[None]:
    """Let a step of ``module`` run without compilation and without a trace, until `forward.PassDone` stops it.

    Buffers and random numbers are put back; what the step logs is thrown away.
    """
    with uncompiled(), untouched(module), _quiet(module), suppress(PassDone):
        yield


def copied(batch: Any) -> Any:
    """A batch with copies of its tensors: a step may change them."""
    return apply_to_collection(batch, Tensor, lambda tensor: tensor.clone(), allow_frozen=True)


@contextmanager
def _quiet(module: nn.Module) -> Iterator[None]:
    """Without ``log`` and ``log_dict``, which would count what a step logs before the logits twice."""
    own = {name: module.__dict__[name] for name in LOGGING if name in module.__dict__}
    for name in LOGGING:
        module.__dict__[name] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for name in LOGGING:
            del module.__dict__[name]
        module.__dict__.update(own)
