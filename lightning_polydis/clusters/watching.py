"""What a layer reads and puts out in a forward pass that somebody else makes, without labels, logits or gradients."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_polydis._checks import InputError
from lightning_polydis.forward import PassDone
from lightning_polydis.layers import channel_count
from lightning_polydis.splitting import SplitLayer, SplitLinear

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.utils.hooks import RemovableHandle

    from lightning_polydis.layers import LinearLayer

RECTIFIERS = {
    F.relu,
    F.relu6,
    F.gelu,
    F.silu,
    F.hardswish,
    F.mish,
    F.softplus,
    torch.relu,
    torch.relu_,
    torch.Tensor.relu,
    torch.Tensor.relu_,
}
"""Functions that let what is negative through not at all, or hardly; the modules of that name call them."""


class Seen(NamedTuple):
    """Copies of what a layer read and put out."""

    inputs: Tensor
    outputs: Tensor


class LayerWatcher:
    """Keeps what some layers read and put out in one forward pass; nothing in the pass is changed.

    ``start`` puts hooks on, then the pass is made, then ``finish`` takes them off. The hooks never raise (but to stop a
    rehearsal): what is wrong is kept and raised by ``finish``. ``close`` takes the hooks off at any time.

    Args:
        model: The network, or whatever contains it.
        layers: The layers by name.

    Attributes:
        signs: After the first pass, for each layer the only direction in which each channel is used, ``[C]``, or
            `None` where it may be both. It is one where a function that lets only what is positive through reads the
            output, be it behind a batch norm, whose weight may turn it round.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> watcher = LayerWatcher(net, {"0": net[0], "2": net[2]})
        >>> watcher.start()
        >>> output = net(torch.ones(4, 2))
        >>> watcher.finish()["0"].outputs.shape, watcher.signs["0"].tolist(), watcher.signs["2"]
        (torch.Size([4, 3]), [1, 1, 1], None)
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, LinearLayer | SplitLayer]) -> None:
        self._model, self._layers = model, dict(layers)
        self._n_channels = {
            name: layer.n_channels if isinstance(layer, SplitLayer) else channel_count(layer)
            for name, layer in layers.items()
        }
        self.signs: dict[str, Tensor | None] = dict.fromkeys(layers)
        self._handles: list[RemovableHandle] = []
        self._readers = ExitStack()
        self._is_watching_readers = self._has_run = False
        self._forget()

    def _forget(self) -> None:
        self._seen: dict[str, Seen] = {}
        self._problem: Exception | None = None
        self._outputs: list[tuple[Any, str, Tensor]] = []  # outputs on their way: of which layer, turned how

    def start(self, *, rehearsal: bool = False) -> None:
        """Put the hooks on the network, ready for one forward pass.

        Args:
            rehearsal: Whether the pass serves nobody else, and is to be stopped by `forward.PassDone` once
                everything was seen.
        """
        self.close()
        self._rehearsal = rehearsal
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(self._layer_hook(name), with_kwargs=True))

    def finish(self) -> dict[str, Seen]:
        """Take the hooks off and return what the pass showed, by layer; nothing if a later pass left the layers out.

        Raises:
            ValueError: If a layer did not run, or ran twice.
        """
        seen, problem = self._seen, self._problem
        self.close()
        if problem is not None:
            raise problem
        if not seen and self._has_run:
            return {}
        missing = ", ".join(f"`{name}`" for name in self._layers if name not in seen)
        if missing:
            raise InputError(
                f"Expected every layer to run once in each forward pass, but {missing} did not run, or in a function "
                "that is compiled by `torch.compile`. Choose other `layers`, or call (and compile) modules, not "
                "`forward`."
            )
        self._has_run = True
        return seen

    def close(self) -> None:
        """Take every hook off and forget what was seen."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._readers.close()
        self._is_watching_readers = False
        self._forget()

    def _layer_hook(self, name: str) -> Callable[[nn.Module, Any, dict[str, Any], Any], None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if self._problem is None:
                try:
                    self._see(name, args[0] if args else kwargs["input"], output)
                except Exception as problem:  # kept, and raised by `finish`
                    self._problem = problem
            if self._rehearsal and (self._has_run and self._is_done()):
                raise PassDone

        return hook

    def _is_done(self) -> bool:
        return self._problem is not None or len(self._seen) == len(self._layers)

    def _see(self, name: str, inputs: Tensor, output: Tensor) -> None:
        if name in self._seen:
            raise InputError(
                f"Expected layer `{name}` to run once in each forward pass, but it ran twice. "
                "Layers that are shared or called several times in one step cannot be analysed."
            )
        ones = torch.ones(self._n_channels[name], dtype=torch.long)
        with torch.no_grad():  # copies: the network may overwrite both
            seen = Seen(inputs.detach().clone(), output.detach().clone())
        self._outputs.append((output, name, ones))
        if not self._has_run and not self._is_watching_readers:  # not earlier: attention would leave its fast path
            self._readers.enter_context(_Readers(self))  # left by `close`
            self._is_watching_readers = True
        self._seen[name] = seen  # last: from then on a rehearsal may be stopped

    def _note_reader(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        """Take in that a function has run; whether it has read an output on its way."""
        read = [(name, turned) for output, name, turned in self._outputs if args and args[0] is output]
        for name, turned in read:
            if function in RECTIFIERS:
                self.signs[name] = turned
            elif function is F.batch_norm and self._has_channels_second(name, result):
                weight = args[3] if len(args) > 3 else kwargs.get("weight")
                self._outputs.append((result, name, turned if weight is None else turned * _signs(weight)))
        return bool(read)

    def _has_channels_second(self, name: str, output: Tensor) -> bool:
        """Whether a batch norm of an output goes channel by channel: where a linear layer reads tokens it does not."""
        return output.ndim == 2 or not isinstance(self._layers[name], nn.Linear | SplitLinear)


class _Readers(TorchFunctionMode):
    """Shows a watcher every function that reads tensors."""

    def __init__(self, watcher: LayerWatcher) -> None:
        super().__init__()
        self._watcher = watcher
        self._has_stopped = False

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        result = function(*args, **named)
        has_read = self._watcher._note_reader(function, args, named, result)
        # Once, and at nothing that looks at a shape or turns gradients on: on the way out there is still work to do.
        is_behind = self._watcher._is_done() and not has_read and isinstance(result, Tensor)
        if self._watcher._rehearsal and is_behind and not self._has_stopped:
            self._has_stopped = True
            raise PassDone  # what comes behind the last layer, its batch norm and its activation function
        return result


def _signs(weight: Tensor) -> Tensor:
    return torch.where(weight.detach().cpu() < 0, -1, 1)
