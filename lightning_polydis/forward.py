"""What happens around a network's forward pass: which call is the outermost, what it returns."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from types import MethodType, SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from lightning_polydis._checks import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch.utils.hooks import RemovableHandle


HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class PassDone(BaseException):
    """Stops a step that is made for its forward pass alone. No `Exception`, so that no step catches it."""


class Onlooker:
    """Whoever looks at passes that somebody else makes; several may look at one."""

    _alone: ClassVar[Onlooker | None] = None  # the only one to look, while a pass is made again for it
    _going_back: ClassVar[bool] = False  # a backward pass is on its way; gradient checkpointing runs modules in it

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let no other onlooker see the passes that are made meanwhile."""
        Onlooker._alone = self
        try:
            yield
        finally:
            Onlooker._alone = None

    def _is_shut_out(self) -> bool:
        return Onlooker._going_back or Onlooker._alone not in (None, self)


def path_to(name: str) -> list[str]:
    """Names of all modules that contain module ``name``, the root first.

    Example:
        >>> path_to("features.3.conv")
        ['', 'features', 'features.3']
    """
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def has_own_parameters(module: nn.Module) -> bool:
    """Whether the module itself has parameters, not only its children."""
    return any(True for _ in module.parameters(recurse=False))


def default_logits(output: Any) -> Any:
    """The logits in a network's output: the tensor itself, ``.logits`` or ``["logits"]``; else the output unchanged."""
    if isinstance(output, dict):
        return output.get("logits", output)
    return getattr(output, "logits", output)


@contextmanager
def full_precision() -> Iterator[None]:
    """Without the mixed precision of whoever runs the network: its backward pass and our sums need none."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Another default dtype for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Put random numbers back as they were, after an exception too, which Lightning's `isolate_rng` does not do."""
    isolation = isolate_rng()
    isolation.__enter__()
    try:
        yield
    finally:
        isolation.__exit__(None, None, None)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put buffers and random numbers back after a pass that nobody asked for."""
    buffers = [
        (owner, name, buffer, buffer.clone())
        for owner in model.modules()
        for name, buffer in owner.named_buffers(recurse=False)
        if not is_lazy(buffer)
    ]
    with own_random_numbers():
        try:
            yield
        finally:
            for owner, name, buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
                setattr(owner, name, buffer)


def quiet_copy(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode, in ``float32`` or wider, whose parameters need no gradients.

    It has none of the hooks: it is the network that is watched, not the copy.

    Raises:
        ValueError: If the module cannot be copied.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(2, 2)
        >>> handle = layer.register_forward_hook(print)
        >>> quiet_copy(layer)._forward_hooks
        OrderedDict()
    """
    unhooked: dict[int, Any] = {id(getattr(part, name)): OrderedDict() for part in module.modules() for name in HOOKS}
    unhooked.update(_without_graphs(module))
    try:
        copied = copy.deepcopy(module, unhooked)
    except Exception as error:
        raise InputError(
            f"Expected a network that can be copied, so that it is left alone itself, but `{type(module).__name__}` "
            f"cannot ({type(error).__name__}: {error})."
        ) from error
    _uncompile(module, unhooked)
    if any(part.is_floating_point() and part.dtype.itemsize < 4 for part in copied.parameters()):
        copied.float()
    return copied.eval().requires_grad_(False)


def _without_graphs(module: nn.Module) -> dict[int, Tensor]:
    """Tensors with a graph that modules keep as attributes (a list of losses, say), which torch does not copy."""
    kept = [value for part in module.modules() for name, value in vars(part).items() if name != "_modules"]
    return {id(leaf): leaf.detach() for leaf in tree_leaves(kept) if isinstance(leaf, Tensor) and not leaf.is_leaf}


def _uncompile(module: nn.Module, copies: dict[int, Any]) -> None:
    """Give copies of modules their own methods in the place of compiled ones, which run what they were made for."""
    for part in module.modules():
        own = copies.get(id(part))
        if own is None:  # by a way of copying that is the user's
            continue
        own._compiled_call_impl = None
        for name, value in vars(part).items():
            original = getattr(value, "_torchdynamo_orig_callable", None)
            if isinstance(original, MethodType):
                own.__dict__[name] = copy.deepcopy(original, copies)


@contextmanager
def noting_earlier(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[set[nn.Module]]:
    """The modules that, in each pass made meanwhile, are done before the first of some layers begins.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> with noting_earlier(net, [net[1]]) as earlier:
        ...     output = net(torch.ones(1, 2))
        >>> earlier == {net[0]}
        True
    """
    earlier: set[nn.Module] = set()
    later: set[nn.Module] = set()
    is_behind = False

    def begin(module: nn.Module, args: Any) -> None:
        nonlocal is_behind
        is_behind = module is not model

    def end(module: nn.Module, args: Any, output: Any) -> None:
        (later if is_behind else earlier).add(module)

    handles = [module.register_forward_pre_hook(begin) for module in (model, *layers)]
    handles += [module.register_forward_hook(end) for module in model.modules()]
    try:
        yield earlier
    finally:
        earlier -= later
        for handle in handles:
            handle.remove()


class CallStack:
    """Knows when the outermost call of any of some modules begins and ends.

    Args:
        modules: The modules to watch.
        on_begin: Called as ``on_begin(module, args, kwargs)`` before the outermost call.
        on_failure: Called when the outermost call ends by an exception.
        on_end: Called as ``on_end(module, args, kwargs, output)`` when the outermost call returns; what it returns
            takes the output's place unless it is `None`.
        skip_first: A module whose first call does not count (Lightning's DDP runs ``validation_step`` through the
            ``__call__`` of the LightningModule).
    """

    def __init__(
        self,
        modules: list[nn.Module],
        on_end: Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any],
        skip_first: nn.Module | None = None,
        on_begin: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None] | None = None,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        self._on_begin, self._on_end, self._on_failure = on_begin, on_end, on_failure
        self._skip = skip_first
        self._open: list[tuple[nn.Module, bool]] = []  # running calls, and whether each counts
        self.grad_at_entry = False
        self.handles: list[RemovableHandle] = []
        for module in modules:
            self.handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._leave, with_kwargs=True, always_call=True))

    @property
    def running(self) -> bool:
        """Whether a call that counts is under way."""
        return any(counts for _, counts in self._open)

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        counts = module is not self._skip
        if counts and not self.running:
            self.grad_at_entry = torch.is_grad_enabled()
            if self._on_begin is not None:
                self._on_begin(module, args, kwargs)
        self._open.append((module, counts))
        if not counts:
            self._skip = None

    def _leave(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not self._open or self._open[-1][0] is not module:  # somebody else's pre-hook raised before ours ran
            return None
        _, counted = self._open.pop()
        if not counted or self.running:
            return None
        if output is None and sys.exc_info()[0] is not None:
            return None if self._on_failure is None else self._on_failure()
        return self._on_end(module, args, kwargs, output)


def detached(output: Any) -> Any:
    """The same with all tensors detached; containers are copied, others than the usual ones left as they are."""
    if isinstance(output, Tensor):
        return output.detach()
    if type(output) is tuple or hasattr(output, "_fields"):
        values = [detached(value) for value in output]
        return tuple(values) if type(output) is tuple else type(output)(*values)
    if type(output) is list:
        return [detached(value) for value in output]
    if isinstance(output, type) or (not isinstance(output, dict | SimpleNamespace) and not is_dataclass(output)):
        return output
    copied = copy.copy(output)
    names = [field.name for field in fields(output)] if is_dataclass(output) else list(getattr(output, "__dict__", ()))
    for name in names:
        object.__setattr__(copied, name, detached(getattr(output, name)))  # frozen dataclasses too
    if isinstance(output, dict):
        for key, value in output.items():
            dict.__setitem__(copied, key, detached(value))  # type: ignore[index]  # a dict subclass
    return copied
