"""Relevances from the forward pass that happens anyway.

Hooks on the running network keep a layer's input and output, turn gradients on behind the layer and off again at the
logits, and take one backward pass from the logits to the layers. Whoever runs the network gets the values it would
have got without them; what the network does between layer and logits carries gradients meanwhile.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_polydis._checks import InputError
from lightning_polydis.forward import (
    CallStack,
    Onlooker,
    PassDone,
    default_logits,
    detached,
    full_precision,
    has_own_parameters,
    path_to,
)
from lightning_polydis.layers import at_least_single, channels_are_last, is_finite, sum_over_positions
from lightning_polydis.logits import OWN_CLASS_ONLY, LogitsError, are_normalised, checked_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.utils.hooks import RemovableHandle

REENTRANT_HINT = (
    "Between layers and logits the network uses gradient checkpointing with `use_reentrant=True`, which does not allow "
    "the gradients that relevances need. Pass `use_reentrant=False`, or checkpoint only while `self.training`."
)
HALF_SCALES = (2.0**12, 2.0**8, 2.0**4, 1.0)
"""What the score is multiplied by where gradients are in `float16`: the first that does not overflow."""


@dataclass(frozen=True)
class LayerRecord:
    """What one batch says about one layer.

    Attributes:
        seen: What ``observe`` made of the layer's input.
        relevance: Relevance of each channel for the image's own class, summed over positions, ``[B, C]``, ``float32``
            or wider, in units of the logit.
        gradient: Gradient of that logit with respect to the layer's output, shaped as the output, ``float32`` or wider.
    """

    seen: Any
    relevance: Tensor
    gradient: Tensor


class RelevanceCollector(Onlooker):
    """Gradient x input relevances of some layers, taken from one forward pass that somebody else makes.

    ``start`` puts hooks on the network, then the forward pass is made, then ``finish`` takes them off and returns
    what was seen. The hooks never raise: whatever is wrong is kept and raised by ``finish``, after the caller's own
    step has run undisturbed. ``close`` takes the hooks off at any time.

    For channel ``c`` and an image of class ``t`` the relevance is the sum over positions of
    ``z[c] * d logit[t] / d z[c]`` with ``z`` the layer's output (arXiv:2504.12939, section 3).

    Whoever runs the network sees tensors that require gradients where it looks between the layer and the logits.
    Several collectors may watch one pass; they finish in the reverse order in which their layers ran.

    Args:
        model: The network, or whatever contains it.
        layers: The layers by name; all are served by one backward pass.
        logits_fn: Network output -> logits ``[B, K]``. `None`: the tensor itself, ``.logits`` or ``["logits"]``.
        logits_module: Name of the module whose output is the logits. `None`: the outermost module that contains a
            layer.
        num_classes: Expected width of the logits; `None` accepts any.
        observe: ``observe(name, inputs)`` takes from a layer's inputs what is wanted of them, at once, as the network
            may overwrite them later. `None`: nothing.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> collector = RelevanceCollector(net, {"0": net[0]})
        >>> collector.start(torch.tensor([0, 1]))
        >>> with torch.no_grad():
        ...     logits = net(torch.ones(2, 2))
        >>> collector.finish()["0"].relevance.shape
        torch.Size([2, 3])
    """

    _recording: ClassVar[list[RelevanceCollector]] = []  # all that are between layer and logits, outermost first

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        *,
        logits_fn: Callable[[Any], Any] | None = None,
        logits_module: str | None = None,
        num_classes: int | None = None,
        observe: Callable[[str, Tensor], Any] | None = None,
    ) -> None:
        self._model = model
        self._layers = dict(layers)
        self._observe = observe or (lambda name, inputs: None)
        self._channels_last = {
            name: channels_are_last(getattr(module, "expand", module)) for name, module in layers.items()
        }
        self._logits_fn = logits_fn or default_logits
        self._logits_module = logits_module
        self._num_classes = num_classes
        self._watch_followers = logits_module is None  # until one pass has gone well
        self._rehearsal = False
        self.outermost: nn.Module | None = None  # the module whose call contained the layers
        self._handles: list[RemovableHandle] = []
        self.num_logits: int | None = None
        self.logits_are_normalised = False
        self.logits: Tensor | None = None  # of the last pass
        self.notes: list[str] = []  # for the report's reader
        self._forget()

    def _forget(self) -> None:
        self._problem: Exception | None = None
        self._stage: Literal["waiting", "recording", "done"] = "waiting"
        self._targets: Tensor | None = None
        self._seen: dict[str, tuple[Any, Tensor]] = {}
        self._handed_on: dict[str, weakref.ref[Tensor]] = {}
        self._records: dict[str, LayerRecord] = {}
        self._has_output = False
        self._output: Any = None  # of the module that gives the logits
        self._follower: str | None = None

    def start(self, targets: Tensor, *, wrapped: bool = False, rehearsal: bool = False) -> None:
        """Put the hooks on the network, ready for one forward pass.

        Args:
            targets: Class of each image, ``[B]``, integer.
            wrapped: Whether the first call of the whole model is a wrapper's and does not count.
            rehearsal: Whether the pass serves nobody else, and is to be stopped by `forward.PassDone` at the logits.
        """
        self.close()
        self._rehearsal = rehearsal
        self._targets = targets.clone()  # autograd keeps it, which a tensor from inference mode would not allow
        modules = dict(self._model.named_modules())
        containers = dict.fromkeys(path for name in self._layers for path in path_to(name))
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(self._layer_hook(name), with_kwargs=True))
        if self._logits_module is not None:
            self._handles.append(modules[self._logits_module].register_forward_hook(self._leave_head))
        skip = self._model if wrapped else None
        self._stack = CallStack([modules[path] for path in containers], self._leave, skip, self._begin, self._fail)
        self._handles += self._stack.handles
        if self._watch_followers and not rehearsal:
            self._hook_followers(modules)

    def finish(self) -> dict[str, LayerRecord]:
        """Take the hooks off and return what the forward pass showed, by layer.

        Raises:
            ValueError: If the pass could not be analysed; the message says why and what to do.
        """
        if self._stage == "recording":
            self._stop(
                InputError(
                    f"Expected module `{self._logits_module}` (argument `logits_module`) to run after the layers, but "
                    "it did not."
                )
            )
        problem, records, follower = self._problem, self._records, self._follower
        self.close()
        if problem is not None:
            raise problem if follower is None else _with_follower(problem, follower)
        if follower is not None:
            raise InputError(follower_text(follower))
        if not records and self.num_logits is not None:
            return {}  # passes have gone well before; a step may leave a batch out
        missing = ", ".join(f"`{name}`" for name in self._layers if name not in records)
        if missing:
            raise InputError(
                f"Expected every layer to run once in each forward pass, but {missing} did not run, or not through "
                "the `__call__` of a module that contains it, or in a function that is compiled by `torch.compile`. "
                "Choose other `layers`, or call (and compile) modules, not `forward`."
            )
        self._watch_followers = False
        return records

    def close(self) -> None:
        """Take every hook off and forget what was recorded."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._leave_recording()
        self._forget()

    def release(self) -> None:
        """Take every hook off and keep nothing of the network's."""
        self.close()
        self.logits = None
        self.__dict__.pop("_stack", None)  # it refers to this collector, and so to the network

    def _leave_recording(self) -> None:
        if self in self._recording:
            self._recording.remove(self)

    def _layer_hook(self, name: str) -> Callable[[nn.Module, Any, dict[str, Any], Any], Tensor | None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Tensor | None:
            if self._problem is not None or self._is_shut_out():
                return None
            try:
                return self._see(name, args[0] if args else kwargs["input"], output)
            except Exception as problem:  # kept, and raised by `finish`
                self._stop(problem)
                return None

        return hook

    def _see(self, name: str, inputs: Tensor, output: Tensor) -> Tensor:
        if name in self._seen or self._stage == "done":
            raise InputError(
                f"Expected layer `{name}` to run once in each forward pass, but it ran twice. "
                "Layers that are shared or called several times in one step cannot be analysed."
            )
        if not self._stack.running:
            raise InputError(
                f"Layer `{name}` was called by itself, not from a module that contains it, so the logits that belong "
                f"to it cannot be found. If `{name}` makes the logits, name a layer before it: {OWN_CLASS_ONLY}. "
                "Otherwise put the forward pass into `forward` and call the module."
            )
        if torch.is_inference_mode_enabled():
            raise InputError(
                "Relevances need gradients, but the network runs under `torch.inference_mode()`. "
                "Use `torch.no_grad()` there instead."
            )
        if self._stage == "waiting":
            self._had_grad = self._stack.grad_at_entry  # the mode here may be that of a block inside `forward`
            torch.set_grad_enabled(True)
            self._stage = "recording"
            self._recording.append(self)
        with torch.no_grad(), full_precision():
            seen = self._observe(name, inputs.detach())
        # Earlier layers of interest have made `output` part of a graph; the first one starts the graph.
        kept = output if output.requires_grad else output.detach().requires_grad_()
        self._seen[name] = (seen, kept)
        # A clone, because the in-place ReLU that often follows would overwrite what was kept.
        handed_on = kept.clone()
        self._handed_on[name] = weakref.ref(handed_on)
        return handed_on

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """The outermost call is about to be made."""

    def _leave(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        self.outermost = module
        if self._logits_module is not None:
            return None
        return self._finish_pass(output)

    def _fail(self) -> None:
        """The network's own exception; whoever made the pass deals with it."""
        if self._stage != "done" and not self._is_shut_out():
            self._stop(RuntimeError("The network's forward pass ended by an exception."))

    def _leave_head(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self._finish_pass(output)

    def _finish_pass(self, output: Any) -> Any:
        """Finish, unless a collector whose layer ran later still needs the graph; then it finishes this one too."""
        if self._is_shut_out():
            return None
        was_recording = self._stage == "recording"
        if was_recording:
            self._has_output, self._output = True, output
            while self._recording and self._recording[-1]._has_output:
                self._recording[-1]._take_relevances()
        if self._rehearsal and self._stage == "done":
            raise PassDone
        if not was_recording or torch.is_grad_enabled():
            return None
        try:
            return detached(output)
        except Exception:  # a container that cannot be copied stays as it is; only its graph lives on for a while
            return output

    def _take_relevances(self) -> None:
        problem = None
        try:
            logits = self._checked_logits(self._output)
            with full_precision():
                self._records = self._relevances(logits)
        except Exception as error:  # kept, and raised by `finish`
            problem = error
        self._stop(problem)

    def _stop(self, problem: Exception | None) -> None:
        """Record nothing more, and put the grad mode back if no other collector needs it."""
        self._problem = problem
        was_recording, self._stage = self._stage == "recording", "done"
        self._seen, self._output = {}, None
        self._leave_recording()
        if was_recording and not self._recording:
            torch.set_grad_enabled(self._had_grad)

    def _found_logits(self, output: Any) -> Any:
        try:
            return self._logits_fn(output)
        except Exception as error:
            raise InputError(f"`logits_fn` raised {type(error).__name__}: {error}.") from error

    def _checked_logits(self, output: Any) -> Tensor:
        where = f"`{self._logits_module}`" if self._logits_module else "the network"
        logits = checked_logits(self._found_logits(output), self._targets, self._num_classes, where)
        self.logits = logits.detach()
        if self.num_logits is None:
            makers = [name for name, handed_on in self._handed_on.items() if handed_on() is logits]
            self.notes += [f"`{name}` makes the logits: {OWN_CLASS_ONLY}. Name a layer before it." for name in makers]
            self.num_logits = logits.shape[1]
            self.logits_are_normalised = are_normalised(logits.detach())
        return logits

    def _relevances(self, logits: Tensor) -> dict[str, LayerRecord]:
        assert self._targets is not None
        score = logits.gather(1, self._targets.to(logits.device)[:, None]).float().sum()
        gradients = self._gradients(score, logits.dtype)
        records = {}
        with torch.no_grad():
            for (name, (seen, output)), gradient in zip(self._seen.items(), gradients, strict=True):
                if gradient is None:
                    raise InputError(f"The logits do not depend on layer `{name}`. Choose other `layers`.")
                if len(output) != len(self._targets):
                    raise InputError(
                        f"Expected the output of layer `{name}` to have the batch as its first dimension, of size "
                        f"{len(self._targets)}, but got {list(output.shape)}. Choose other `layers`."
                    )
                records[name] = LayerRecord(seen, self._products(name, output, gradient), gradient)
        return records

    def _gradients(self, score: Tensor, dtype: torch.dtype) -> Sequence[Tensor | None]:
        """Of the score with respect to the layers' outputs; half precision is scaled, and widened to ``float32``."""
        kept = [output for _, output in self._seen.values()]
        scales = HALF_SCALES if torch.float16 in (dtype, *(output.dtype for output in kept)) else (1.0,)
        for scale in scales:
            shared = self._had_grad or len(self._recording) > 1 or scale != scales[-1]
            scaled = self._backward(score * scale, kept, shared)
            gradients = [None if gradient is None else at_least_single(gradient) for gradient in scaled]
            if scale == 1:
                break
            gradients = [None if gradient is None else gradient / scale for gradient in gradients]
            if all(gradient is None or is_finite(gradient) for gradient in gradients):
                break
        return gradients

    @staticmethod
    def _backward(score: Tensor, kept: Sequence[Tensor], retain_graph: bool) -> Sequence[Tensor | None]:
        Onlooker._going_back = True
        try:
            return torch.autograd.grad(score, kept, allow_unused=True, retain_graph=retain_graph)
        except RuntimeError as error:
            if "use_reentrant" in str(error):
                raise InputError(REENTRANT_HINT) from error
            raise
        finally:
            Onlooker._going_back = False

    def _products(self, name: str, output: Tensor, gradient: Tensor) -> Tensor:
        # Sums over positions exceed the range of half precision.
        return sum_over_positions(at_least_single(output) * gradient, channels_last=self._channels_last[name])

    def _hook_followers(self, modules: dict[str, nn.Module]) -> None:
        """Notice modules with parameters that run after the supposed logits, as in ``head(backbone(x))``."""
        for name, module in modules.items():
            if has_own_parameters(module) and not isinstance(module, torch.jit.ScriptModule):
                self._handles.append(module.register_forward_pre_hook(self._follower_hook(name)))

    def _follower_hook(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            if self._stage == "done" and self._follower is None and not self._is_shut_out():
                self._follower = name

        return hook


def follower_text(follower: str, ran: str = "ran") -> str:
    """What to do about a module that ran (or may run) after what was taken for the logits."""
    return (
        f"Module `{follower}` {ran} after the output that was taken for the logits. If it produces the logits, "
        f'pass `logits_module="{follower}"`; if not, pass the name of the module that does.'
    )


def _with_follower(problem: Exception, follower: str) -> Exception:
    if not isinstance(problem, LogitsError):
        return problem
    return LogitsError(f'{problem} Module `{follower}` ran afterwards; if it is the one, `logits_module="{follower}"`.')
