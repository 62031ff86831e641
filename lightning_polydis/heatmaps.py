"""Where in an image each concept of a channel sits, and how much of the channel's relevance it has."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_polydis._checks import InputError
from lightning_polydis.batches import check_module_name
from lightning_polydis.forward import default_logits, own_random_numbers
from lightning_polydis.layers import channels_are_last, sum_over_positions
from lightning_polydis.logits import checked_logits
from lightning_polydis.plan import checked_plan
from lightning_polydis.surgery import split_copy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zennit.core import Composite

    from lightning_polydis.plan import ChannelSplit, SplitPlan

CHUNK = 16
"""Images that pass through the network at once."""


@dataclass(frozen=True)
class ConceptHeatmaps:
    """Where a channel and its concepts are seen in some images.

    Attributes:
        layer: Name of the layer.
        channel: Index of the output channel that is split.
        concepts: Classes of each of the ``K`` concepts.
        original: Map of the channel before the split, ``[N, H, W]``, ``float32``: what the parts sum up to, or the
            activation in the direction of most concepts.
        parts: Maps of the concept channels, ``[N, K, H, W]``, ``float32``: relevance in units of the logit, or
            activation in the concept's direction, not negative.
    """

    layer: str
    channel: int
    concepts: list[list[int]]
    original: Tensor
    parts: Tensor


def concept_heatmaps(
    model: nn.Module,
    plan: SplitPlan,
    images: Tensor,
    targets: Tensor | None = None,
    *,
    attribution: Any = "epsilon_plus_flat",
    logits_fn: Callable[[Any], Any] | None = None,
    logits_module: str | None = None,
    device: torch.device | str | None = None,
) -> list[ConceptHeatmaps]:
    """Show where in images each concept of a split channel sits.

    With ``"activation"``, the map of a concept is the activation of its channel, brought to the size of the image.
    Otherwise it is the relevance of the pixels for the logit *through* the concept's channel: what passes through all
    other channels is left out, as in concept relevance propagation (Achtibat et al., arXiv:2206.03208). The maps of a
    channel's concepts and its residual add up to the channel's.

    Args:
        model: The network, split or not; called as ``model(images)``. All work is done on a copy.
        plan: The splits to show.
        images: ``[N, C, H, W]``, as the network takes them.
        targets: Class whose logit is explained, for each image, ``[N]``; `None`: the one with the largest logit. Not
            for ``"activation"``.
        attribution: ``"activation"``, ``"gradient_x_input"``, a zennit composite, or the name of one.
        logits_fn: Network output -> logits ``[N, K]``, as in `AnalysisSettings`.
        logits_module: Name of the module whose output is the logits, where it is not the network.
        device: Where to run; `None`: where the network's parameters are.

    Returns:
        The maps of each split, on the CPU, in the plan's order.

    Raises:
        ValueError: If the plan, the images, the targets or the attribution do not fit the network.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_polydis import ChannelSplit, SplitPlan
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
        >>> plan = SplitPlan([ChannelSplit("0", 2, [[0], [1]], torch.tensor([[1.0, 1, 0], [0, 1, 1]]))])
        >>> concept_heatmaps(net, plan, torch.rand(5, 3, 4, 4))[0].parts.shape
        torch.Size([5, 2, 4, 4])
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        found = f"{images.dtype} of shape {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"Expected argument `images` to be a floating point tensor [N, C, H, W], but got {found}.")
    if not len(checked_plan(plan)):
        return []
    watched = _SplitNetwork(model, plan, attribution, logits_fn, logits_module, device)
    chunks = [watched.maps(*chunk) for chunk in _chunks(images, targets)]
    maps = [torch.cat(parts) for parts in zip(*chunks, strict=True)]
    return [
        ConceptHeatmaps(split.layer, split.channel, split.concepts, found[:, 0], found[:, 1:])
        for split, found in zip(plan, maps, strict=True)
    ]


def concept_relevances(
    model: nn.Module,
    plan: SplitPlan,
    inputs: Tensor,
    targets: Tensor | None = None,
    *,
    attribution: Any = "epsilon_plus_flat",
    logits_fn: Callable[[Any], Any] | None = None,
    logits_module: str | None = None,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """Say how much of a channel's relevance each of its parts has.

    Args:
        model: The network, split or not; all work is done on a copy.
        plan: The splits to look at.
        inputs: ``[N, ...]``, as the network takes them.
        targets: As for `concept_heatmaps`.
        attribution: ``"gradient_x_input"``, a zennit composite, or the name of one.
        logits_fn: As for `concept_heatmaps`.
        logits_module: As for `concept_heatmaps`.
        device: As for `concept_heatmaps`.

    Returns:
        For each split the relevance of its ``K`` concepts and of the residual, ``[N, K + 1]``, ``float32``, in units
        of the logit; in a row they add up to the relevance of the channel before the split.

    Raises:
        ValueError: If the plan, the targets or the attribution do not fit the network.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_polydis import ChannelSplit, SplitPlan
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> plan = SplitPlan([ChannelSplit("0", 2, [[0], [1]], torch.tensor([[1.0, 1, 0], [0, 1, 1]]))])
        >>> concept_relevances(net, plan, torch.rand(5, 3))[0].shape
        torch.Size([5, 3])
    """
    if attribution == "activation":
        raise InputError("Expected argument `attribution` to be a relevance, but got 'activation'.")
    if not len(checked_plan(plan)):
        return []
    watched = _SplitNetwork(model, plan, attribution, logits_fn, logits_module, device)
    chunks = [watched.totals(*chunk) for chunk in _chunks(inputs, targets)]
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


def _chunks(inputs: Tensor, targets: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    if not len(inputs):
        raise InputError("Expected at least one image, but got none.")
    if targets is not None and (targets.shape != inputs.shape[:1] or targets.is_floating_point()):
        raise InputError(
            f"Expected argument `targets` to hold {len(inputs)} class indices, but got {targets.dtype} of shape "
            f"{list(targets.shape)}."
        )
    for start in range(0, len(inputs), CHUNK):
        part = slice(start, start + CHUNK)
        yield inputs[part], None if targets is None else targets[part].long()


@dataclass(frozen=True)
class _Pass:
    """One forward pass, and the backward pass down to ``expand``.

    Attributes:
        inputs: What the network was shown, with a graph.
        outputs: Output of ``expand`` by layer, with a graph.
        gradients: The attribution's gradient at these, by layer.
        scale: What makes a gradient a relevance, for each image: the logit, or 1.
    """

    inputs: Tensor
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    scale: Tensor


class _SplitNetwork:
    """A copy of a network, split by a plan, and an attribution for it."""

    def __init__(
        self,
        model: nn.Module,
        plan: SplitPlan,
        attribution: Any,
        logits_fn: Callable[[Any], Any] | None,
        logits_module: str | None,
        device: torch.device | str | None,
    ) -> None:
        check_module_name(model, logits_module)
        self._composite: Composite | None = None
        self._attribution = attribution
        if attribution not in ("activation", "gradient_x_input"):
            from lightning_polydis.lrp import resolve_composite  # zennit takes its time to import

            self._composite = resolve_composite(attribution)
        self._ready: Composite | None = None  # the composite, once the network was seen at work
        self._plan, self._logits_fn, self._logits_module = plan, logits_fn or default_logits, logits_module
        with torch.inference_mode(False):  # what is copied there could never have gradients
            self._model: Any = split_copy(model, plan)
            home = next(self._model.parameters()).device
            self._device = home if device is None else torch.device(device)
            self._model.to(self._device)
        self._expands: dict[str, Any] = {name: self._model.get_submodule(name).expand for name in plan.layers}
        self._head: nn.Module = self._model.get_submodule(logits_module or "")

    def maps(self, images: Tensor, targets: Tensor | None) -> list[Tensor]:
        """For each split the maps of the channel and of its concepts, ``[N, K + 1, H, W]``."""
        with self._passed(images, targets) as done:
            if self._attribution == "activation":
                return [self._activations(done, split, images.shape[2:]) for split in self._plan]
            return [self._relevance_maps(done, split) for split in self._plan]

    def totals(self, inputs: Tensor, targets: Tensor | None) -> list[Tensor]:
        """For each split the relevance of its parts, ``[N, K + 1]``."""
        with self._passed(inputs, targets) as done:
            return [self._parts_relevance(done, split) for split in self._plan]

    def _parts_relevance(self, done: _Pass, split: ChannelSplit) -> Tensor:
        layer, rows = self._layer(split)
        gradient = done.gradients[split.layer]
        relevance = gradient if self._ready is not None else gradient * done.outputs[split.layer].detach()
        summed = sum_over_positions(relevance, channels_last=channels_are_last(layer.expand))
        return (summed[:, rows] * done.scale[:, None]).float().cpu()

    def _relevance_maps(self, done: _Pass, split: ChannelSplit) -> Tensor:
        layer, rows = self._layer(split)
        parts = [self._map_through(done, split.layer, row, layer.merge.dim) for row in rows]
        return torch.stack([torch.stack(parts).sum(0), *parts[:-1]], dim=1).float().cpu()

    def _map_through(self, done: _Pass, layer: str, row: int, dim: int) -> Tensor:
        """Relevance of the pixels through one row of ``expand``, ``[N, H, W]``."""
        gradient = done.gradients[layer]
        alone = torch.zeros_like(gradient)
        alone.select(dim, row).copy_(gradient.select(dim, row))
        (found,) = torch.autograd.grad(done.outputs[layer], done.inputs, alone, retain_graph=True)
        relevance = found if self._ready is not None else found * done.inputs.detach()
        return relevance.sum(1) * done.scale.view(-1, 1, 1)

    def _activations(self, done: _Pass, split: ChannelSplit, size: torch.Size) -> Tensor:
        _, rows = self._layer(split)
        found = done.outputs[split.layer].detach()
        if found.ndim != 4:
            raise InputError(
                f"Expected layer `{split.layer}` to put out maps [N, C, H, W] for `attribution='activation'`, but got "
                f"{list(found.shape)}. Choose another `attribution`."
            )
        parts = found[:, rows]
        whole = parts[:, :-1].sum(1, keepdim=True) - parts[:, -1:]
        signs = split.signs()
        main = 1 if sum(signs) >= 0 else -1
        signed = torch.cat([main * whole, parts[:, :-1] * parts.new_tensor(signs).view(1, -1, 1, 1)], dim=1)
        return F.interpolate(signed.clamp(min=0), size, mode="bilinear").float().cpu()

    def _layer(self, split: ChannelSplit) -> tuple[Any, list[int]]:
        layer = self._model.get_submodule(split.layer)
        return layer, layer.part_rows(split.channel)

    @contextmanager
    def _passed(self, inputs: Tensor, targets: Tensor | None) -> Iterator[_Pass]:
        """One pass, as long as its graph is needed."""
        seen: dict[nn.Module, Any] = {}
        with ExitStack() as stack:
            stack.enter_context(own_random_numbers())
            stack.enter_context(torch.inference_mode(False))
            inputs = inputs.detach().clone().to(self._device, next(self._model.parameters()).dtype)
            self._fit_composite(inputs)
            if self._ready is not None:
                stack.enter_context(self._ready.context(self._model))
            for module in {*self._expands.values(), self._head}:
                handle = module.register_forward_hook(lambda module, args, output: seen.update({module: output}))
                stack.callback(handle.remove)
            stack.enter_context(torch.enable_grad())
            inputs.requires_grad_()
            self._model(inputs.clone())
            yield self._explained(inputs, seen, targets)

    def _fit_composite(self, inputs: Tensor) -> None:
        if self._composite is not None and self._ready is None:
            from lightning_polydis.lrp import fitted_composite

            with torch.no_grad():
                self._ready, _ = fitted_composite(self._composite, self._model, lambda: self._model(inputs.clone()))

    def _explained(self, inputs: Tensor, seen: dict[nn.Module, Any], targets: Tensor | None) -> _Pass:
        missing = [name for name, module in self._expands.items() if module not in seen]
        if missing:
            raise InputError(f"Expected every layer of the plan to run, but `{missing[0]}` did not.")
        outputs = {name: seen[module] for name, module in self._expands.items()}
        scale = torch.ones(len(inputs), device=self._device)
        if self._attribution == "activation":
            return _Pass(inputs, outputs, {}, scale)
        score = self._score(seen.get(self._head), targets)
        found = torch.autograd.grad(score.sum(), list(outputs.values()), retain_graph=True, allow_unused=True)
        gradients = {name: gradient for name, gradient in zip(outputs, found, strict=True) if gradient is not None}
        if len(gradients) < len(outputs):
            raise InputError(f"The logits do not depend on layer `{next(iter(outputs.keys() - gradients.keys()))}`.")
        return _Pass(inputs, outputs, gradients, scale if self._ready is None else score.detach())

    def _score(self, output: Any, targets: Tensor | None) -> Tensor:
        """Logit of the wanted class of each image, ``[N]``, with a graph."""
        found = self._logits_fn(output)
        if targets is None and isinstance(found, Tensor) and found.ndim == 2:
            targets = found.detach().argmax(1)
        targets = None if targets is None else targets.to(self._device)
        where = f"`{self._logits_module}`" if self._logits_module else "the network"
        logits = checked_logits(found, targets, None, where)
        assert targets is not None  # or there are no logits
        return logits.gather(1, targets[:, None])[:, 0]
