"""Which layer is analysed if the user names none."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_polydis._checks import InputError
from lightning_polydis.forward import (
    CallStack,
    PassDone,
    default_dtype,
    default_logits,
    path_to,
    untouched,
)
from lightning_polydis.layers import (
    MIN_INPUTS_BY_DEFAULT,
    LinearLayer,
    channel_count,
    inputs_per_channel,
    unsupported_reason,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class ForwardCall:
    """One call of a module, with copies of its arguments, ready to be made again."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    dtype: torch.dtype  # the default one
    autocast: tuple[tuple[str, torch.dtype], ...]  # device types and precisions of the mixed precision in force

    @staticmethod
    def of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardCall:
        """The call of a module that is about to be made."""
        # Copies, because the network may overwrite its inputs.
        args, kwargs = with_tensors((args, kwargs), lambda tensor: tensor.clone())
        devices = {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}
        mixed = [(device, torch.get_autocast_dtype(device)) for device in devices if torch.is_autocast_enabled(device)]
        return ForwardCall(module, args, kwargs, torch.get_default_dtype(), tuple(mixed))

    def replay(self) -> None:
        """Make the call again without a trace: random numbers and buffers are put back."""
        with torch.no_grad(), untouched(self.module), default_dtype(self.dtype), ExitStack() as stack:
            for device, dtype in self.autocast:
                stack.enter_context(torch.autocast(device, dtype))
            self.module(*self.args, **self.kwargs)


def with_tensors(arguments: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Arguments with other tensors in them; as they are, if they are in something that cannot be made anew."""
    try:
        return apply_to_collection(arguments, Tensor, change, allow_frozen=True)
    except Exception:  # a mapping whose constructor takes something else, for instance
        return arguments


class LayerDiscovery:
    """Watches one forward pass and chooses the last layer that is fit to be analysed.

    The choice: the last convolution or linear layer in running order with at least 8 inputs per channel that runs
    once, neither comes first nor produces the logits.

    Args:
        model: The network.
        logits_fn: Network output -> logits.
        logits_module: Name of the module whose output is the logits, where it is not the outermost one.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> discovery = LayerDiscovery(net)
        >>> discovery.start()
        >>> output = net(torch.ones(1, 2))
        >>> name, call = discovery.finish()
        >>> name
        '2'
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        logits_fn: Callable[[Any], Any] | None = None,
        logits_module: str | None = None,
    ) -> None:
        self._model = model
        self._logits_fn = logits_fn or default_logits
        self._logits_module = logits_module
        self._handles: list[RemovableHandle] = []
        self._order: list[str] = []
        self._begun: ForwardCall | None = None
        self._call: ForwardCall | None = None
        self._outside: str | None = None
        self._outputs: dict[str, weakref.ref[Tensor]] = {}
        self._problem: Exception | None = None
        self._logits_layers: list[str] = []
        self._width: int | None = None

    def start(self, *, wrapped: bool = False, rehearsal: bool = False) -> None:
        """Put hooks on every candidate layer and on whatever contains one (arguments: see `RelevanceCollector`)."""
        self._rehearsal = rehearsal
        modules = dict(self._model.named_modules())
        self._candidates = {
            name: cast("LinearLayer", module)
            for name, module in modules.items()
            if name and unsupported_reason(module) is None
        }
        for name, layer in self._candidates.items():
            self._handles.append(layer.register_forward_hook(self._layer_hook(name)))
        if self._logits_module is not None:
            self._handles.append(modules[self._logits_module].register_forward_hook(self._head_hook))
        containers = dict.fromkeys(path for name in self._candidates for path in path_to(name))
        skip = self._model if wrapped else None
        self._stack = CallStack([modules[path] for path in containers], self._leave, skip, self._begin, self._fail)
        self._handles += self._stack.handles

    def finish(self) -> tuple[str, ForwardCall]:
        """Take the hooks off; name the layer and the call that ran it.

        Raises:
            ValueError: If no layer is fit (the message lists the candidates), or the pass is made of several calls.
        """
        self.close()
        if self._problem is not None:
            raise self._problem
        if self._outside is not None:
            raise InputError(
                "No layer could be chosen for analysis, because the forward pass is made of several calls "
                f"(`{self._outside}` ran outside the first one). Pass `layers`, and `logits_module` with the "
                "name of the module that gives the logits."
            )
        ran_once = [name for name in self._order if self._order.count(name) == 1]
        ran_once = [name for name in ran_once if name != self._order[0] and name not in self._logits_layers]
        fit = [name for name in ran_once if inputs_per_channel(self._candidates[name]) >= MIN_INPUTS_BY_DEFAULT]
        # The last layer gives the logits where it has one channel for each, as a pooled 1 x 1 convolution may.
        if fit and fit[-1] == self._order[-1] and channel_count(self._candidates[fit[-1]]) == self._width:
            fit.pop()
        if not fit or self._call is None:
            seen = ", ".join(f"`{name}`" for name in self._candidates) or "none"
            raise InputError(
                "No layer could be chosen for analysis: it takes a convolution or linear layer with at least "
                f"{MIN_INPUTS_BY_DEFAULT} inputs per channel that is neither the first nor gives the logits. "
                f"Pass `layers`; convolutions and linear layers of this model: {seen}."
            )
        return fit[-1], self._call

    def close(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _layer_hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._order.append(name)
            self._outputs[name] = weakref.ref(output)
            self._note_outside(name)

        return hook

    def _head_hook(self, module: nn.Module, args: Any, output: Any) -> None:
        self._note_outside(str(self._logits_module))
        self._note_width(output)

    def _note_outside(self, name: str) -> None:
        if self._outside is None and (self._call is not None or not self._stack.running):
            self._outside = name

    def _note_width(self, output: Any) -> None:
        try:
            logits = self._logits_fn(output)
        except Exception as error:  # kept, and raised by `finish`
            self._problem = InputError(f"`logits_fn` raised {type(error).__name__}: {error}.")
            return
        if isinstance(logits, Tensor) and logits.ndim:
            self._width = logits.shape[-1]
            self._logits_layers = [name for name, kept in self._outputs.items() if kept() is logits]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._begun is None:
            self._begun = ForwardCall.of(module, args, kwargs)

    def _fail(self) -> None:
        self._problem = self._problem or RuntimeError("The network's forward pass ended by an exception.")

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._call is None:
            self._call = self._begun
            if self._logits_module is None:
                self._note_width(output)
            if self._rehearsal:
                raise PassDone
