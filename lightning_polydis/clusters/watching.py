"""What a layer reads and puts out in a forward pass that somebody else makes, without labels, logits or gradients."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_leaves

from lightning_polydis._checks import InputError
from lightning_polydis.forward import Onlooker, PassDone
from lightning_polydis.layers import channel_count
from lightning_polydis.splitting import SplitLayer, SplitLinear

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

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


@dataclass(frozen=True)
class Use:
    """What happens to a layer's output before somebody reads it: ``scale * output + shift``, by channel.

    Attributes:
        scale: ``[C]``, ``float64``.
        shift: ``[C]``, ``float64``.
    """

    scale: Tensor
    shift: Tensor

    def behind(self, scale: Tensor, shift: Tensor) -> Use:
        """What it is behind another scale and shift."""
        return Use(self.scale * scale, self.shift * scale + shift)

    def signs(self) -> Tensor:
        """The direction in which what is positive afterwards lies, 1 or -1, ``[C]``, integer."""
        return 1 - 2 * (self.scale < 0).to(torch.long)

    def zeros(self) -> Tensor:
        """The output that becomes 0, ``[C]``, ``float32``; 0 for a channel that is scaled to nothing."""
        found: Tensor = torch.where(self.scale == 0, 0.0, -self.shift / self.scale).to(torch.float32)
        return found

    def agrees(self, other: Use) -> bool:
        """Whether both turn and shift alike."""
        return torch.equal(self.signs(), other.signs()) and torch.allclose(self.zeros(), other.zeros())


@dataclass(eq=False)
class _OnItsWay:
    """A layer's output, or what a batch norm made of it, as long as somebody may read it."""

    tensor: weakref.ref[Tensor]
    layer: str
    use: Use
    is_read: bool = False


class LayerWatcher(Onlooker):
    """Keeps what some layers read and put out in one forward pass; nothing in the pass is changed.

    ``start`` puts hooks on, then the pass is made, then ``finish`` takes them off. The hooks never raise (but to stop a
    rehearsal): what is wrong is kept and raised by ``finish``. ``close`` takes the hooks off at any time.

    Args:
        model: The network, or whatever contains it.
        layers: The layers by name.

    Attributes:
        uses: After the first pass, for each layer what happens to its output before it is rectified; `None` where both
            directions may be used. It is known where only functions that let nothing but what is positive through
            read the output, be it behind a batch norm, which may shift it and turn it round.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> watcher = LayerWatcher(net, {"0": net[0], "2": net[2]})
        >>> watcher.start()
        >>> output = net(torch.ones(4, 2))
        >>> watcher.finish()["0"].outputs.shape, watcher.uses["0"].signs().tolist(), watcher.uses["2"]
        (torch.Size([4, 3]), [1, 1, 1], None)
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, LinearLayer | SplitLayer]) -> None:
        self._model, self._layers = model, dict(layers)
        self._n_channels = {
            name: layer.n_channels if isinstance(layer, SplitLayer) else channel_count(layer)
            for name, layer in layers.items()
        }
        self.uses: dict[str, Use | None] = dict.fromkeys(layers)
        self._handles: list[RemovableHandle] = []
        self._readers = ExitStack()
        self._is_watching_readers = self._has_run = False
        self._forget()

    def _forget(self) -> None:
        self._seen: dict[str, Seen] = {}
        self._problem: Exception | None = None
        self._outputs: list[_OnItsWay] = []
        self._used: dict[str, list[Use | None]] = {name: [] for name in self._layers}  # by reader

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
        if not self._has_run:
            self.uses = {name: self._use(name) for name in self._layers}
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
            if self._is_shut_out():
                return
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
        # Copies: the network may overwrite both. Another watcher of the same layer must not take them for readers.
        with torch._C.DisableTorchFunction(), torch.no_grad():
            ones = torch.ones(self._n_channels[name], dtype=torch.float64, device="cpu")
            use = Use(ones, torch.zeros_like(ones))
            seen = Seen(inputs.detach().clone(), output.detach().clone())
        self._outputs.append(_OnItsWay(weakref.ref(output), name, use))
        if self._rehearsal and output.requires_grad:  # its graph keeps it: nothing tells when nobody else will read it
            self._used[name].append(None)
        if not self._has_run and not self._is_watching_readers:  # not earlier: attention would leave its fast path
            self._readers.enter_context(_Readers(self))  # left by `close`
            self._is_watching_readers = True
        self._seen[name] = seen  # last: from then on a rehearsal may be stopped

    def _is_behind(self) -> bool:
        """Whether nothing that is yet to run can read an output."""
        is_gone = all(kept is None or kept.requires_grad for kept in (one.tensor() for one in self._outputs))
        return self._problem is not None or (self._is_done() and is_gone)

    def _about_to_read(self, arguments: Any) -> list[_OnItsWay]:
        """Outputs on their way that are among the arguments of a function."""
        try:
            given = {id(leaf) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)}
            return [one for one in self._outputs if id(one.tensor()) in given]
        except Exception as problem:  # kept, and raised by `finish`
            self._problem = self._problem or problem
            return []

    def _note_reader(self, one: _OnItsWay, call: _Call) -> None:
        """Take in what a function has made of an output on its way."""
        try:
            self._take_in(one, call)
        except Exception as problem:  # kept, and raised by `finish`
            self._used[one.layer].append(None)
            self._problem = self._problem or problem

    def _take_in(self, one: _OnItsWay, call: _Call) -> None:
        output = one.tensor()
        assert output is not None  # an argument of the call
        if call.first is output and call.function in RECTIFIERS:
            self._used[one.layer].append(one.use)
            if call.result is output:  # in place: what reads the tensor from now on reads what is left of it
                self._outputs.remove(one)
        elif call.first is output and (use := self._normalised(one, call)) is not None:
            self._outputs.append(_OnItsWay(weakref.ref(call.result), one.layer, use))
        elif call.uses(output):
            self._used[one.layer].append(None)
        else:  # a look at its shape
            return
        one.is_read = True

    def _normalised(self, one: _OnItsWay, call: _Call) -> Use | None:
        """What happens behind a batch norm in evaluation; `None` if the function is no such, or not by channel."""
        if call.function is not F.batch_norm or not self._has_channels_second(one.layer, call.result):
            return None
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
        mean, variance = given.get("running_mean"), given.get("running_var")
        if mean is None or variance is None or given.get("training") or mean.shape != one.use.scale.shape:
            return None
        mean, variance = _wide(mean), _wide(variance)
        scale = (variance + given.get("eps", 1e-5)).rsqrt()
        scale = scale if given.get("weight") is None else scale * _wide(given["weight"])
        shift = -mean * scale if given.get("bias") is None else _wide(given["bias"]) - mean * scale
        return one.use.behind(scale, shift)

    def _use(self, name: str) -> Use | None:
        """What all readers of a layer's output do to it; `None` if they differ, or one may use both directions."""
        used = self._used[name]
        if not used or not all(one.is_read for one in self._outputs if one.layer == name):
            return None
        first = used[0]
        agree = first is not None and all(other is not None and first.agrees(other) for other in used)
        return first if agree else None

    def _has_channels_second(self, name: str, output: Tensor) -> bool:
        """Whether a batch norm of an output goes channel by channel: where a linear layer reads tokens it does not."""
        return output.ndim == 2 or not isinstance(self._layers[name], nn.Linear | SplitLinear)


class _Call(NamedTuple):
    """A function that has run, and the versions that tensors had before."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    versions: dict[int, int | None]

    @property
    def first(self) -> Any:
        """What the function works on."""
        return self.args[0] if self.args else self.kwargs.get("input")

    def uses(self, tensor: Tensor) -> bool:
        """Whether it has made something of a tensor's values, or changed them: not only looked, or handed it on."""
        before = self.versions[id(tensor)]
        if any(isinstance(leaf, Tensor) and leaf is not tensor for leaf in tree_leaves(self.result)):
            return True
        if before is None:  # functions that work in place cannot be told from others
            return self.result is tensor or self.result is None
        return tensor._version != before


class _Readers(TorchFunctionMode):
    """Shows a watcher every function that reads tensors.

    Whoever enters a mode while this one is on, or has entered one before, takes off the top one when leaving it. So
    this one goes beneath all, but for that of a default device, which torch looks for at the very bottom.
    """

    def __init__(self, watcher: LayerWatcher) -> None:
        super().__init__()
        self._watcher = watcher
        self._has_stopped = False

    def __enter__(self) -> Self:
        modes = _without_modes()
        place = 1 if modes and isinstance(modes[0], DeviceContext) else 0
        _put_on([*modes[:place], self, *modes[place:]])
        return self

    def __exit__(self, *exception: object) -> None:
        _put_on([mode for mode in _without_modes() if mode is not self])

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named, watcher = kwargs or {}, self._watcher
        if watcher._is_shut_out():
            return function(*args, **named)
        read = watcher._about_to_read((args, named))
        versions = {id(one.tensor()): _version(one.tensor()) for one in read}
        result = function(*args, **named)
        for one in read:
            watcher._note_reader(one, _Call(function, args, named, result, versions))
        # Once, and at nothing that looks at a shape or turns gradients on: on the way out there is still work to do.
        may_stop = watcher._rehearsal and not read and isinstance(result, Tensor) and not self._has_stopped
        if may_stop and watcher._is_behind():
            self._has_stopped = True
            raise PassDone  # what comes behind the last layer, its batch norm and its activation function
        return result


def _without_modes() -> list[TorchFunctionMode]:
    """Take every mode off the stack; the lowest comes first."""
    modes = [_pop_mode() for _ in range(torch._C._len_torch_function_stack())]
    return modes[::-1]


def _put_on(modes: Sequence[TorchFunctionMode]) -> None:
    for mode in modes:
        _push_mode(mode)


def _version(tensor: Tensor | None) -> int | None:
    """How often a tensor was changed; those made in inference mode do not count it."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def _wide(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float64)
