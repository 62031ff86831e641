"""Relevances by a composite: the network's call is made once more, on a copy that the composite may change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_polydis._checks import InputError
from lightning_polydis.collection import LayerRecord, RelevanceCollector
from lightning_polydis.discovery import ForwardCall, with_tensors
from lightning_polydis.forward import (
    default_dtype,
    full_precision,
    noting_earlier,
    own_random_numbers,
    path_to,
    quiet_copy,
)
from lightning_polydis.layers import at_least_single, channels_are_last, is_finite, sum_over_positions
from lightning_polydis.lrp import MAX_DEVIATION, deviation, fitted_composite

if TYPE_CHECKING:
    from collections.abc import Callable

    from zennit.core import Composite

MAX_HALF_DEVIATION = 0.1
"""Deviation of the copy's logits from those of a network in half precision that is taken for rounding."""


class CompositeCollector(RelevanceCollector):
    """Takes relevances from a composite, and all else from the forward pass that is made anyway.

    After the pass the outermost call is made once more, on an evaluation-mode copy of the module. There the composite
    turns gradients into relevances: a channel's is the sum over positions of the modified gradient at the layer's
    output, started from the logit of the image's class. (With a composite that modifies gradients and does not
    multiply them by inputs, guided backpropagation for instance, it is that gradient, times the logit.) Gradients in
    the records are ordinary ones.

    The copy is made at the first pass. Where the composite brings no canonizers, it gets those of
    `lrp.canonizers_for`.

    Args:
        *args: As for `RelevanceCollector`.
        composite: A zennit composite. It is not registered itself, so it may be in use elsewhere.
        **kwargs: As for `RelevanceCollector`.
    """

    def __init__(self, *args: Any, composite: Composite, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._composite = composite
        self._copy: ModuleCopy | None = None
        self._call: ForwardCall | None = None

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._stage == "waiting" and not self._is_shut_out():  # the last call that began holds the layers
            self._call = ForwardCall.of(module, args, kwargs)

    def finish(self) -> dict[str, LayerRecord]:
        """As `RelevanceCollector.finish`, with the composite's relevances.

        Raises:
            ValueError: Also if the composite cannot be used on this network; the message says why and what to do.
        """
        targets, call = self._targets, self._call
        self._call = None
        records = super().finish()
        if not records or targets is None or call is None or self.logits is None:
            return records
        if not all(map(is_finite, (self.logits, *(record.relevance for record in records.values())))):
            unknown = float("nan")  # so the batch is left out
            return {name: replace(record, relevance=record.relevance * unknown) for name, record in records.items()}
        if self._copy is None:
            self._copy = ModuleCopy(self._names_in(call.module), call, self._composite, self._logits_fn)
        relevances = self._copy.relevances(call, targets, self.logits)
        self.notes = list(dict.fromkeys([*self.notes, *self._copy.notes]))
        for name, record in records.items():
            if record.relevance.any() and not relevances[name].any():
                raise InputError(
                    f"The composite `{type(self._composite).__name__}` gives all channels of layer `{name}` a "
                    "relevance of 0. Look at its rules for the layers behind it, or choose another `attribution`."
                )
        return {name: replace(record, relevance=relevances[name]) for name, record in records.items()}

    def release(self) -> None:
        """As `RelevanceCollector.release`; the copy goes too."""
        super().release()
        if self._copy is not None:
            self._copy.release()
        self._copy = self._call = None

    def _names_in(self, module: nn.Module) -> InnerNames:
        """What the layers, and the module that gives the logits, are called within the module that was called."""
        head = [] if self._logits_module is None else [self._logits_module]
        inner = {name: _name_in(self._model, module, name) for name in [*self._layers, *head]}
        outside = [name for name, found in inner.items() if found is None]
        if outside:
            raise InputError(
                "`attribution` with a composite needs one module whose call contains the layers and gives the logits, "
                f"but `{outside[0]}` does not run within the `{type(module).__name__}` that contains a layer. Put both "
                "into the `forward` of one module, or use `attribution='gradient_x_input'`."
            )
        names = {name: found or "" for name, found in inner.items()}
        return InnerNames({name: names[name] for name in self._layers}, names[head[0]] or None if head else None)


def _name_in(model: nn.Module, module: nn.Module, name: str) -> str | None:
    """The name that part ``name`` of ``model`` has within ``module``; `None` if it is no part of that."""
    for path in [*path_to(name), name]:
        if model.get_submodule(path) is module:
            return name.removeprefix(path).removeprefix(".")
    return None


@dataclass(frozen=True)
class InnerNames:
    """Names within the module that is called.

    Attributes:
        layers: Name of each layer, by its name in the whole model.
        logits_module: The module that gives the logits; `None`: the called one.
    """

    layers: dict[str, str]
    logits_module: str | None


class ModuleCopy:
    """The copy of a module that a composite works on.

    Args:
        names: What to look at.
        call: The first call that is to be made again.
        composite: The composite.
        logits_fn: Output -> logits.

    Attributes:
        notes: What the report's reader should know.
    """

    def __init__(
        self, names: InnerNames, call: ForwardCall, composite: Composite, logits_fn: Callable[[Any], Any]
    ) -> None:
        self._names, self._composite = names, composite
        self._module = quiet_copy(call.module)
        halves = [part for part in call.module.parameters() if part.dtype.itemsize < 4]
        self._was_half = bool(call.autocast or halves)
        self._dtype = next((part.dtype for part in self._module.parameters()), torch.float32)
        layers = {name: self._module.get_submodule(name) for name in names.layers.values()}
        self._last = {name: channels_are_last(getattr(layer, "expand", layer)) for name, layer in layers.items()}
        self._collector = RelevanceCollector(
            self._module, layers, logits_fn=logits_fn, logits_module=names.logits_module
        )
        with noting_earlier(self._module, layers.values()) as earlier:
            self._ready, note = fitted_composite(composite, self._module, lambda: self._make(call))
        self._ready.leave_out(earlier)  # their inputs would be kept for nothing
        self._ready.register(self._module)  # for as long as there is this copy
        self.notes = [] if note is None else [note]

    def relevances(self, call: ForwardCall, targets: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """What the composite says of a call.

        Args:
            call: The call.
            targets: Class of each image, ``[B]``.
            logits: What the network itself said, ``[B, K]``.

        Returns:
            For each layer the relevance of its channels, ``[B, C]``, in units of the logit.

        Raises:
            ValueError: If the composite cannot be used, or the copy does not say what the network says.
        """
        records = self._pass(call, targets)
        own = self._collector.logits
        assert own is not None
        off = deviation(own, logits)
        if off > (MAX_HALF_DEVIATION if self._was_half else MAX_DEVIATION):
            raise InputError(
                f"`attribution` with a composite needs a network that computes the same at each call, but the logits "
                f"of a copy in evaluation mode deviate by {off:.2g} of the largest one. Leave out what is random in "
                "the forward pass and hooks that change it, or use `attribution='gradient_x_input'`."
            )
        scale = at_least_single(own.gather(1, targets.to(own.device)[:, None]))
        return {
            outer: sum_over_positions(records[inner].gradient, channels_last=self._last[inner]) * scale
            for outer, inner in self._names.layers.items()
        }

    def release(self) -> None:
        """Undo what the composite has done, some of which makes the copy refer to itself."""
        self._ready.remove()
        self._collector.release()

    def _pass(self, call: ForwardCall, targets: Tensor) -> dict[str, LayerRecord]:
        try:
            self._collector.start(targets)
            self._make(call)
            return self._collector.finish()
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"The composite `{type(self._composite).__name__}` failed on `{type(call.module).__name__}` "
                f"({type(error).__name__}: {error}). Pass one whose rules suit the network, or use "
                "`attribution='gradient_x_input'`."
            ) from error
        finally:
            self._ready.forget()
            self._collector.close()

    def _make(self, call: ForwardCall) -> Any:
        """The call, on the copy, in the copy's precision; random numbers are put back."""

        def fitting(value: Tensor) -> Tensor:
            return value.to(self._dtype) if value.is_floating_point() and value.dtype.itemsize < 4 else value.clone()

        args, kwargs = with_tensors((call.args, call.kwargs), fitting)
        with torch.no_grad(), own_random_numbers(), full_precision(), default_dtype(self._dtype):
            return self._module(*args, **kwargs)
