"""Splits in a state dict alone, where the network that it belongs to is not at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lightning_polydis._checks import InputError, closest_names
from lightning_polydis.plan import warn_of_other_weights
from lightning_polydis.splitting import SplitLayer, split_layer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning_polydis.layers import LinearLayer
    from lightning_polydis.plan import SplitPlan

KINDS: dict[int, type[LinearLayer]] = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
"""Which layer has a weight of so many dimensions."""


def split_state_dict(
    state_dict: Mapping[str, Any],
    plan: SplitPlan,
    n_groups: Mapping[str, int] | None = None,
    *,
    is_ordered: bool = True,
) -> dict[str, Any]:
    """The state dict that a network has once it is split, from the one that it has before, bit for bit.

    Stride, padding and dilation are not needed: a split adds rows to weights. How many groups a convolution has
    decides where the rows go; it is inferred from the layers before it (`inferred_groups`) unless it is given.

    Args:
        state_dict: Of the unsplit network.
        plan: What to split.
        n_groups: Groups of convolutions, by name of the layer.
        is_ordered: Whether the entries stand in the order of the network's layers. Those of a safetensors file do not;
            groups are not inferred then.

    Returns:
        The state dict of ``disentangle(network, plan)``; entries of other layers are those of ``state_dict``.

    Raises:
        ValueError: If the plan does not fit the state dict, or a number of groups cannot be inferred.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_polydis import ChannelSplit, SplitPlan
        >>> net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 8, 3))
        >>> plan = SplitPlan([ChannelSplit("2", 5, [[1], [7]], torch.tensor([[1.0, 1, 0], [0, 1, 1]]))])
        >>> split_state_dict(net.state_dict(), plan)["2.expand.weight"].shape
        torch.Size([10, 3, 3, 3])
    """
    return with_splits(state_dict, split_layers(state_dict, plan, n_groups, is_ordered=is_ordered))


def split_layers(
    state_dict: Mapping[str, Any],
    plan: SplitPlan,
    n_groups: Mapping[str, int] | None = None,
    *,
    is_ordered: bool = True,
) -> dict[str, SplitLayer]:
    """Split forms of a plan's layers, of which only state and groups are meant: strides and the like are unknown.

    Raises:
        ValueError: See `split_state_dict`.
    """
    known = dict(n_groups or {})
    if unknown := sorted(set(known) - set(plan.layers)):
        raise InputError(f"Expected groups of layers in the plan, but got {unknown[0]!r}. In the plan: {plan.layers}.")
    layers = {name: _layer_of(state_dict, name, known.get(name), is_ordered) for name in plan.layers}
    split = {name: split_layer(layer, plan.of_layer(name)) for name, layer in layers.items()}
    warn_of_other_weights(plan, {name: layer.weight for name, layer in layers.items()})
    return split


def with_splits(state_dict: Mapping[str, Any], layers: Mapping[str, SplitLayer]) -> dict[str, Any]:
    """A state dict with the entries of split layers in the place of those of the layers before the split."""
    entries: dict[str, Any] = {}
    for key, value in state_dict.items():
        name, _, own = key.rpartition(".")
        if name not in layers:
            entries[key] = value
        elif own == "weight":
            entries |= layers[name].state_dict(prefix=f"{name}.")
    return entries


def _layer_of(state_dict: Mapping[str, Any], name: str, groups: int | None, is_ordered: bool) -> LinearLayer:
    """The layer with these entries in a state dict; stride, padding and dilation are those of a fresh layer."""
    weight, bias = _weight_of(state_dict, name), state_dict.get(f"{name}.bias")
    n_channels, n_inputs, *kernel = weight.shape
    if groups is None:
        groups = inferred_groups(state_dict if is_ordered else {f"{name}.weight": weight}, name)
    _check_groups(name, weight, groups)
    tensors: dict[str, Any] = {"bias": bias is not None, "dtype": weight.dtype, "device": "meta"}
    if kernel:
        tensors |= {"kernel_size": tuple(kernel), "groups": groups}
    make: Any = KINDS[weight.ndim]
    layer = cast("LinearLayer", make(n_inputs * groups, n_channels, **tensors))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _weight_of(state_dict: Mapping[str, Any], name: str) -> Tensor:
    weight = state_dict.get(f"{name}.weight")
    if f"{name}.expand.weight" in state_dict:
        raise InputError(
            f"Layer `{name}` is split already. Load the checkpoint with `load_from_checkpoint` and split further "
            "channels with `disentangle`."
        )
    if not isinstance(weight, Tensor):
        known = [key.removesuffix(".weight") for key, value in state_dict.items() if _is_weight(key, value)]
        close = closest_names(name, known) or ", ".join(f"`{key}`" for key in known[-3:]) or "none"
        raise InputError(
            f"Expected layers of the plan to have a weight in the state dict, but got {name!r}. Closest names: {close}."
        )
    if weight.ndim not in KINDS or not weight.is_floating_point():
        raise InputError(
            f"Expected layer `{name}` to be a convolution or `nn.Linear`, but got a weight of shape "
            f"{list(weight.shape)} and {weight.dtype}."
        )
    _check_alone(state_dict, name, weight)
    return weight


def _is_weight(key: str, value: Any) -> bool:
    return key.endswith(".weight") and isinstance(value, Tensor) and value.ndim in KINDS


def _check_alone(state_dict: Mapping[str, Any], name: str, weight: Tensor) -> None:
    """Refuse a weight that stands under two names: which of the layers is to be split, only the network can tell."""
    for key, value in state_dict.items():
        if key == f"{name}.weight" or not isinstance(value, Tensor) or value.shape != weight.shape:
            continue
        if value.numel() and value.data_ptr() == weight.data_ptr():
            raise InputError(
                f"The weight of layer `{name}` is that of `{key}` too. Load the network and use `disentangle`, which "
                "knows whether they are one layer."
            )


def _check_groups(name: str, weight: Tensor, groups: int) -> None:
    n_channels, n_inputs = weight.shape[:2]
    if groups < 1 or n_channels % groups or (weight.ndim == 2 and groups > 1):
        what = "a linear layer" if weight.ndim == 2 else f"{n_channels} channels"
        raise InputError(f"Expected a number of groups that fits layer `{name}` of {what}, but got {groups}.")
    if n_inputs == 1 and groups > 1:
        raise InputError(
            f"Layer `{name}` is a depthwise convolution: each of its channels reads one input channel, so there is "
            "nothing to share out."
        )


def inferred_groups(state_dict: Mapping[str, Any], name: str) -> int:
    """Groups of a layer, from the widths of the layers that come before it in a state dict.

    A layer reads as many channels as one before it gives: the nearest that could be meant says how many groups there
    are. Where another one beside it speaks against that, nothing is assumed.

    Args:
        state_dict: Of the unsplit network.
        name: Name of the layer.

    Raises:
        ValueError: If that cannot be told.

    Example:
        >>> import torch
        >>> inferred_groups({"a.weight": torch.empty(8, 3, 1, 1), "b.weight": torch.empty(6, 4, 1, 1)}, "b")
        2
    """
    weight: Tensor = state_dict[f"{name}.weight"]
    if weight.ndim == 2:
        return 1
    n_channels, n_inputs = weight.shape[:2]
    fitting = [
        (outer, width // n_inputs)
        for outer, width in _widths_before(state_dict, name)
        if width % n_inputs == 0 and n_channels % (width // n_inputs) == 0
    ]
    beside = {groups for outer, groups in fitting if outer == _outer(name)}
    if fitting and (fitting[0][1] == 1 or 1 not in beside):
        return fitting[0][1]
    raise InputError(
        f"How many groups convolution `{name}` has does not show in the state dict (a weight of shape "
        f"{list(weight.shape)}). Say it: for an ordinary one `--groups {name}=1`, or in Python "
        f"`n_groups={{{name!r}: 1}}`."
    )


def _widths_before(state_dict: Mapping[str, Any], name: str) -> list[tuple[str, int]]:
    """Outer module and channels of the entries before a layer, nearest first."""
    found: list[tuple[str, int]] = []
    for key, value in state_dict.items():
        if key.startswith(f"{name}."):
            break
        if isinstance(value, Tensor) and value.ndim and torch.is_floating_point(value) and len(value):
            found.append((_outer(key.rpartition(".")[0]), len(value)))
    return found[::-1]


def _outer(name: str) -> str:
    return name.rpartition(".")[0]
