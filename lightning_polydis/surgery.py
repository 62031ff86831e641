"""Putting split layers into a network and finding them there."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from lightning_polydis._checks import InputError
from lightning_polydis.forward import quiet_copy
from lightning_polydis.layers import channel_count, find_layer, input_count, inputs_per_channel, plain_copy
from lightning_polydis.plan import ChannelSplit, SplitPlan, check_fits, checked_plan, warn_of_other_weights
from lightning_polydis.split_buffers import stored_splits
from lightning_polydis.splitting import SplitLayer, split_layer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lightning_polydis.layers import LinearLayer

ModelT = TypeVar("ModelT", bound=nn.Module)

MAX_DEVIATION = 1e-12
"""Largest relative deviation in ``float64`` at which a split still counts as the same function."""


def disentangle(model: ModelT, plan: SplitPlan, inplace: bool = False) -> ModelT:
    """Split channels of a network as a plan says; what the network computes stays the same, up to rounding.

    A plan belongs to the weights that it was chosen for: a warning says where a layer has others.

    Args:
        model: The network; for ``inplace=False`` it is left as it is.
        plan: What to split.
        inplace: Change ``model`` itself instead of a copy.

    Returns:
        The network with `SplitConv2d` / `SplitLinear` in the place of the layers in the plan.

    Raises:
        ValueError: If the plan does not fit the network, which is then left as it was.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_polydis import ChannelSplit
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> plan = SplitPlan([ChannelSplit("0", 2, [[1], [7]], torch.tensor([[1.0, 1, 0], [0, 1, 1]]))])
        >>> disentangle(net, plan)[0].expand
        Conv2d(3, 10, kernel_size=(3, 3), stride=(1, 1))
    """
    for name in checked_plan(plan).layers:  # everything is checked before anything is changed
        _check_splits(model, name, plan.of_layer(name))
    warn_of_other_weights(plan, {name: _unsplit_weight(model, name) for name in plan.layers})
    if not inplace:
        model = copy.deepcopy(model)
    for name in plan.layers:
        module, own = model.get_submodule(name), plan.of_layer(name)
        if isinstance(module, SplitLayer):
            replace_layer(model, name, split_further(module, own))
        else:
            replace_layer(model, name, split_layer(find_layer(model, name), own))
    return model


def _unsplit_weight(model: nn.Module, name: str) -> Tensor:
    module = model.get_submodule(name)
    return module.undo().weight if isinstance(module, SplitLayer) else find_layer(model, name).weight


def _check_splits(model: nn.Module, name: str, splits: Sequence[ChannelSplit]) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    outer, _, _ = name.rpartition(".")
    if isinstance(modules.get(outer), SplitLayer):
        raise InputError(f"Layer `{name}` is part of the split layer `{outer}`. Split further channels of `{outer}`.")
    module = modules.get(name)
    if isinstance(module, SplitLayer):
        again = sorted({split.channel for split in splits} & set(module.channels.tolist()))
        if again:
            raise InputError(
                f"Channels {again} of layer `{name}` are split already. Leave them out of the plan, or put the layer "
                "that `undo()` returns back first."
            )
        module.check_weights()
        layer: LinearLayer = module.expand
        check_fits(splits, module.n_channels, inputs_per_channel(layer))
    else:
        layer = find_layer(model, name)
        check_fits(splits, channel_count(layer), inputs_per_channel(layer))


def split_copy(model: nn.Module, plan: SplitPlan) -> nn.Module:
    """A copy of a network that is split by a plan, whether the network is so already or not.

    The copy has no hooks, is in evaluation mode and in ``float32`` or wider, and its parameters need no gradients.

    Raises:
        ValueError: If the plan does not fit the network, or that cannot be copied.
    """
    layers = {name: layer_of_plan(model, plan, name) for name in checked_plan(plan).layers}
    whole = [name for name, layer in layers.items() if not isinstance(layer, SplitLayer)]
    return disentangle(quiet_copy(model), SplitPlan([split for split in plan if split.layer in whole]), inplace=True)


def layer_of_plan(model: nn.Module, plan: SplitPlan, name: str) -> LinearLayer | SplitLayer:
    """A layer that a plan splits, before or after it was split.

    Raises:
        ValueError: If the plan does not fit the layer, or not the way it was split.
    """
    module = dict(model.named_modules()).get(name)
    if isinstance(module, SplitLayer):
        stored = {split.channel: split for split in module.splits(name)}
        other = [split.channel for split in plan.of_layer(name) if not _is_same(split, stored.get(split.channel))]
        if other:
            raise InputError(
                f"The plan does not fit layer `{name}`, which is split already: its channels {other} are not split "
                "there, or in another way. Judge the plan on the model before the split."
            )
        return module
    layer = find_layer(model, name)
    for split in plan.of_layer(name):
        check_fits([split], channel_count(layer), inputs_per_channel(layer))
    return layer


def _is_same(split: ChannelSplit, stored: ChannelSplit | None) -> bool:
    if stored is None or split.concepts != stored.concepts or split.membership.shape != stored.membership.shape:
        return False
    return torch.allclose(split.membership, stored.membership, atol=1e-2)  # the layer may be in half precision


def split_further(layer: SplitLayer, splits: Sequence[ChannelSplit]) -> SplitLayer:
    """A split layer with further channels split; the parts of the channels that were split stay as they are."""
    before = layer.splits("")
    new = split_layer(layer.undo(), [*before, *splits])
    with torch.no_grad():
        for split in before:
            rows = new.part_rows(split.channel)
            for name, parameter in layer.expand.named_parameters():
                new.expand.get_parameter(name)[rows] = parameter[layer.part_rows(split.channel)]
        new.original_weight[: len(before)] = layer.original_weight
        if new.original_bias is not None and layer.original_bias is not None:
            new.original_bias[: len(before)] = layer.original_bias
    return new


def replace_layer(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of module ``name``, under every name that the old one has."""
    old = model.get_submodule(name)
    aliases = [alias for alias, module in model.named_modules(remove_duplicate=False) if module is old]
    for alias in aliases:
        parent, _, child = alias.rpartition(".")
        setattr(model.get_submodule(parent), child, new)


def rebuild_splits(model: nn.Module, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Split the layers of ``model`` that are split in a state dict, in place; weights are left to ``load_state_dict``.

    Args:
        model: The network before splitting.
        state_dict: Of a split network.

    Returns:
        Names of the layers that were split.

    Raises:
        ValueError: If the state dict's splits do not fit the network.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    marker = ".concept_classes"
    names = [key.removesuffix(marker) for key in state_dict if key.endswith(marker)]
    names = [name for name in names if f"{name}.expand.weight" in state_dict]
    first = {id(modules.get(name, name)): name for name in reversed(names)}  # a layer may have several names
    names = [name for name in names if first[id(modules.get(name, name))] == name]
    wanted = {name: stored_splits(_entries_of(name, state_dict), name) for name in names}
    for name in names:
        module = modules.get(name)
        if isinstance(module, SplitLayer):
            if module.splits(name) == wanted[name]:
                del wanted[name]
            else:
                replace_layer(model, name, module.undo())
    disentangle(model, SplitPlan([split for splits in wanted.values() for split in splits]), inplace=True)
    return list(wanted)


def stored_plan(model: nn.Module) -> SplitPlan:
    """The splits of all split layers of a network, as they stand in their state."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, SplitLayer)]
    return SplitPlan([split for name, module in layers for split in module.splits(name)])


def _entries_of(name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of one module, without its name."""
    return {key.removeprefix(f"{name}."): value for key, value in state_dict.items() if key.startswith(f"{name}.")}


def split_checked(model: nn.Module, plan: SplitPlan, inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Split a network in place after comparing old and new layers on real inputs.

    Args:
        model: The network.
        plan: What to split.
        inputs: Some inputs of each layer, ``[n, G * I, ...]`` or ``[n, ..., I]``; where they are missing, random ones
            will do.

    Returns:
        For each layer the largest change of its output, relative to its largest output, in the layer's own precision.

    Raises:
        RuntimeError: If a split layer deviates by more than 1e-12 in ``float64``; the network is left as it was.
    """
    ready, deviations = {}, {}
    for name in plan.layers:
        layer, splits = find_layer(model, name), plan.of_layer(name)
        samples = inputs[name] if name in inputs else _random_inputs(layer)
        exact = split_deviation(layer, splits, samples, torch.float64)
        if not exact <= MAX_DEVIATION:
            raise RuntimeError(
                f"The split of layer `{name}` would change its output by {exact:.1e} relative to its largest output in "
                f"float64 (at most {MAX_DEVIATION:.0e} is rounding). The model was left unsplit."
            )
        ready[name] = split_layer(layer, splits)
        deviations[name] = split_deviation(layer, splits, samples, layer.weight.dtype)
    for name, split in ready.items():
        replace_layer(model, name, split)
    return deviations


def _random_inputs(layer: LinearLayer) -> Tensor:
    """Four inputs of a layer, wide enough for its kernel, without drawing from the global random numbers."""
    sizes: list[int] = []
    if not isinstance(layer, nn.Linear):
        sizes = [1 + d * k for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return torch.randn(4, input_count(layer), *sizes, generator=torch.Generator().manual_seed(0))


def split_deviation(layer: LinearLayer, splits: Sequence[ChannelSplit], inputs: Tensor, dtype: torch.dtype) -> float:
    """Largest difference between a layer's output and that of its split form, relative to the largest output.

    Args:
        layer: The layer before the split.
        splits: How its channels are to be split.
        inputs: ``[n, I, H, W]`` or ``[n, ..., I]``.
        dtype: Precision in which the layer is split and both forms are run.
    """
    with torch.no_grad():
        layer = plain_copy(layer).to(dtype)
        inputs = inputs.to("cpu", dtype)
        before = layer(inputs)
        difference = (split_layer(layer, splits)(inputs) - before).abs().max()
    return float(difference / before.abs().max().clamp(min=torch.finfo(dtype).tiny))
