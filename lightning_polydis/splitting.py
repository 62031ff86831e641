"""Surgery: layers in which polysemantic channels are split, the way in and the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_polydis._checks import InputError
from lightning_polydis.layers import LinearLayer, channel_count, group_count, inputs_per_channel, widened
from lightning_polydis.membership import part_weights
from lightning_polydis.merging import MergeChannels, StructuredModule
from lightning_polydis.plan import ChannelSplit, check_fits
from lightning_polydis.split_buffers import buffers_of, stored_splits, structure_of

if TYPE_CHECKING:
    from collections.abc import Sequence

Layer = TypeVar("Layer", nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class _SplitLayer(StructuredModule, Generic[Layer]):
    """A layer whose split channels are several channels of ``expand`` and one again behind ``merge``."""

    expand: Layer
    membership: Tensor
    channels: Tensor
    n_concepts: Tensor
    concept_classes: Tensor
    rho: Tensor
    concept_directions: Tensor
    original_weight: Tensor
    original_bias: Tensor | None
    channel_dim: int

    def __init__(self, layer: Layer, splits: Sequence[ChannelSplit]) -> None:
        super().__init__()
        check_fits(splits, channel_count(layer), inputs_per_channel(layer))
        self.n_channels, self.n_groups = channel_count(layer), group_count(layer)
        self._register_structure(layer, splits)
        self.expand = cast("Layer", widened(layer, self.n_channels + self.n_groups * self._most_extra()))
        with torch.no_grad():
            self._fill(layer.weight, layer.bias)
        for name, parameter in self.expand.named_parameters():
            parameter.requires_grad_(layer.get_parameter(name).requires_grad)
        self.merge = MergeChannels(*self._merge_table(), dim=self.channel_dim, rows=self._used_rows())
        self.train(layer.training)
        self.register_load_state_dict_pre_hook(_accept_unsplit_state)  # type: ignore[no-untyped-call]

    def _register_structure(self, layer: LinearLayer, splits: Sequence[ChannelSplit]) -> None:
        device = layer.weight.device
        for name, tensor in structure_of(splits, device).items():
            self.register_structure(name, tensor)
        for name, tensor in buffers_of(splits, inputs_per_channel(layer), device).items():
            self.register_buffer(name, tensor)
        self.register_buffer("original_weight", layer.weight.detach()[self.channels].clone())
        bias = None if layer.bias is None else layer.bias.detach()[self.channels].clone()
        self.register_buffer("original_bias", bias)

    def _most_extra(self) -> int:
        """Appended channels of each group: as many as the group that needs most of them has."""
        own = self.channels * self.n_groups // self.n_channels
        return int(
            torch.zeros(self.n_groups, dtype=torch.long, device=own.device).index_add_(0, own, self.n_concepts).max()
        )

    def _rows(self) -> tuple[Tensor, Tensor]:
        """Rows of ``expand`` that hold the old channels ``[C]`` and the appended ones ``[E]``: each in its group."""
        per_group, most = self.n_channels // self.n_groups, self._most_extra()
        old = torch.arange(self.n_channels, device=self.channels.device)
        rows = old + old // per_group * most
        group = self.channels.repeat_interleave(self.n_concepts) // per_group
        before = (group[:, None] == group).tril(-1).sum(1)  # appended channels of the same group that come first
        return rows, group * (per_group + most) + per_group + before

    def _used_rows(self) -> Tensor | None:
        return None if self.n_groups == 1 else torch.cat(self._rows())

    def _merge_table(self) -> tuple[Tensor, Tensor]:
        target = self.channels.repeat_interleave(self.n_concepts)
        signs = [torch.ones(int(count)) for count in self.n_concepts]
        for sign in signs:
            sign[-1] = -1
        return target, torch.cat(signs or [torch.empty(0)]).to(self.expand.weight)

    def _fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """Write the rows of ``expand`` that split channels of ``weight`` and ``bias``."""
        rows, biases = self._expanded(weight, bias)
        self.expand.weight.copy_(rows)
        if biases is not None:
            self.expand.get_parameter("bias").copy_(biases)

    def _expanded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight ``[C + E, ...]`` and bias ``[C + E]`` of ``expand`` for an unsplit layer's weight and bias."""
        own, own_bias = weight.clone(), None if bias is None else bias.clone()
        extra: list[Tensor] = []
        extra_bias: list[Tensor] = []
        for channel, membership in zip(self.channels.tolist(), self._memberships(), strict=True):
            rows, biases = part_weights(weight[channel], None if bias is None else bias[channel], membership)
            own[channel] = rows[0]
            extra.append(rows[1:])
            if own_bias is not None and biases is not None:
                own_bias[channel] = biases[0]
                extra_bias.append(biases[1:])
        whole_bias = None if own_bias is None else torch.cat([own_bias, *extra_bias])
        return self._arranged(torch.cat([own, *extra]), whole_bias)

    def _arranged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Old channels and appended ones in their groups, zeros between them."""
        if self.n_groups == 1:
            return weight, bias
        rows, n_rows = torch.cat(self._rows()).to(weight.device), self.n_channels + self.n_groups * self._most_extra()
        arranged = weight.new_zeros(n_rows, *weight.shape[1:]).index_copy_(0, rows, weight)
        return arranged, None if bias is None else bias.new_zeros(n_rows).index_copy_(0, rows, bias)

    def _memberships(self) -> tuple[Tensor, ...]:
        return tuple(self.membership.split(self.n_concepts.tolist()))

    def forward(self, inputs: Tensor) -> Tensor:
        """The old layer's output, up to rounding."""
        return cast("Tensor", self.merge(self.expand(inputs)))

    def splits(self, layer_name: str) -> list[ChannelSplit]:
        """The splits of this layer, as they stand in its state.

        Args:
            layer_name: Name to give the layer; a module does not know its own.
        """
        return stored_splits(self.state_dict(), layer_name)

    def channel_index(self, channel: int, concept: int | Literal["residual"]) -> int:
        """Which output channel of ``expand`` holds a concept of a split channel.

        Args:
            channel: The channel that was split, as numbered in the old layer.
            concept: Index of the concept, or ``"residual"``.

        Returns:
            Index into the channels of ``expand``.

        Raises:
            ValueError: If the channel was not split or has no such concept.
        """
        channels = self.channels.tolist()
        if channel not in channels:
            raise InputError(
                f"Expected argument `channel` to be one of the split channels {channels}, but got {channel}."
            )
        position = channels.index(channel)
        counts: list[int] = self.n_concepts.tolist()
        count: int = counts[position]
        number = count if concept == "residual" else concept
        if not isinstance(number, int) or not 0 <= number <= count or concept == count:
            raise InputError(
                f"Expected argument `concept` to be in [0, {count}) or 'residual' for channel {channel}, "
                f"but got {concept!r}."
            )
        old, appended = self._rows()
        return int(old[channel] if number == 0 else appended[sum(counts[:position]) + number - 1])

    def part_rows(self, channel: int) -> list[int]:
        """Channels of ``expand`` that make up a split channel: its concepts, then the residual."""
        count: int = int(self.n_concepts[self.channels.tolist().index(channel)])
        return [
            *(self.channel_index(channel, number) for number in range(count)),
            self.channel_index(channel, "residual"),
        ]

    def undo(self) -> Layer:
        """The layer that was split, with the weights it had, or folded together if they were trained since.

        Returns:
            A new layer on the same device; untouched splits give the old weights back bit for bit, unless the dtype
            was changed in between.
        """
        self.check_weights()
        layer = cast("Layer", widened(self.expand, self.n_channels))
        with torch.no_grad():
            weight, bias = self._folded()
            layer.weight.copy_(weight)
            if bias is not None:
                layer.get_parameter("bias").copy_(bias)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(self.expand.get_parameter(name).requires_grad)
        return layer.train(self.training)

    def check_weights(self) -> None:
        """Raise `ValueError` unless ``expand`` still has weights, which it has not once it is quantized."""
        if not isinstance(getattr(self.expand, "weight", None), Tensor):
            raise InputError(
                f"Expected a split layer with plain weights, but its `expand` is a `{self.expand._get_name()}` by now. "
                "Undo the split, or split further channels, before the network is quantized."
            )

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        expanded = self.expand.weight.detach()
        expanded_bias = None if self.expand.bias is None else self.expand.bias.detach()
        old, _ = self._rows()
        weight = expanded[old]
        bias = None if expanded_bias is None else expanded_bias[old]
        weight[self.channels] = self.original_weight
        if bias is not None and self.original_bias is not None:
            bias[self.channels] = self.original_bias
        rows, biases = self._expanded(weight, bias)
        untouched = torch.equal(rows, expanded)
        if biases is not None and expanded_bias is not None:
            untouched = untouched and torch.equal(biases, expanded_bias)
        for channel in [] if untouched else self.channels.tolist():
            parts = self.part_rows(channel)
            weight[channel] = _fold(expanded[parts])
            if bias is not None and expanded_bias is not None:
                bias[channel] = _fold(expanded_bias[parts])
        return weight, bias

    def extra_repr(self) -> str:
        return f"split_channels={self.channels.tolist()}"


def _fold(parts: Tensor) -> Tensor:
    """Concepts minus residual, ``[K + 1, ...]`` -> ``[...]``, summed in ``float64``."""
    wide = parts.double()
    return (wide[:-1].sum(0) - wide[-1]).to(parts)


class SplitConv2d(_SplitLayer[nn.Conv2d]):
    """A convolution in which polysemantic channels are split into one channel for each concept and a residual.

    ``expand`` is a real ``nn.Conv2d`` with ``C + extra`` output channels: row ``c`` holds the first concept of channel
    ``c``, the appended rows hold the other concepts and the residual (see `channel_index`). In a grouped convolution
    every group needs as many rows, so rows are appended to each group, and some stay zero. ``merge`` adds them up:
    concepts minus residual is the old channel, so the output is what it was, up to rounding (arXiv:2504.12939,
    section 3.3). What was split, and how, is part of its state, so a ``state_dict`` tells it all. The state
    dict of the unsplit layer is accepted too.

    Args:
        layer: The convolution to split; left as it is.
        splits: How to split its channels; their layer names are not looked at.

    Raises:
        ValueError: If a split does not fit the layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> conv = nn.Conv2d(2, 3, 1)
        >>> split = SplitConv2d(conv, [ChannelSplit("conv", 1, [[0], [5]], torch.eye(2))])
        >>> split.expand.out_channels, split.channel_index(1, 1), split.channel_index(1, "residual")
        (5, 3, 4)
        >>> x = torch.randn(1, 2, 4, 4)
        >>> torch.allclose(split(x), conv(x), atol=1e-6)
        True
        >>> torch.equal(split.undo().weight, conv.weight)
        True
    """

    channel_dim = -3  # unbatched inputs too


class SplitConv1d(_SplitLayer[nn.Conv1d]):
    """A one-dimensional convolution in which polysemantic channels are split; see `SplitConv2d`.

    Args:
        layer: The convolution to split; left as it is.
        splits: How to split its channels; their layer names are not looked at.

    Raises:
        ValueError: If a split does not fit the layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> SplitConv1d(nn.Conv1d(2, 3, 1), [ChannelSplit("conv", 1, [[0], [5]], torch.eye(2))]).expand
        Conv1d(2, 5, kernel_size=(1,), stride=(1,))
    """

    channel_dim = -2


class SplitConv3d(_SplitLayer[nn.Conv3d]):
    """A three-dimensional convolution in which polysemantic channels are split; see `SplitConv2d`.

    Args:
        layer: The convolution to split; left as it is.
        splits: How to split its channels; their layer names are not looked at.

    Raises:
        ValueError: If a split does not fit the layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> SplitConv3d(nn.Conv3d(2, 3, 1), [ChannelSplit("conv", 1, [[0], [5]], torch.eye(2))]).expand
        Conv3d(2, 5, kernel_size=(1, 1, 1), stride=(1, 1, 1))
    """

    channel_dim = -4


class SplitLinear(_SplitLayer[nn.Linear]):
    """A linear layer in which polysemantic channels are split; see `SplitConv2d`.

    Args:
        layer: The linear layer to split; left as it is.
        splits: How to split its channels; their layer names are not looked at.

    Raises:
        ValueError: If a split does not fit the layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> SplitLinear(nn.Linear(2, 3), [ChannelSplit("fc", 1, [[0], [5]], torch.eye(2))])(torch.ones(4, 2)).shape
        torch.Size([4, 3])
    """

    channel_dim = -1


SplitLayer = SplitConv1d | SplitConv2d | SplitConv3d | SplitLinear


def split_layer(layer: LinearLayer, splits: Sequence[ChannelSplit]) -> SplitLayer:
    """The split form of a layer."""
    if isinstance(layer, nn.Linear):
        return SplitLinear(layer, splits)
    if isinstance(layer, nn.Conv1d):
        return SplitConv1d(layer, splits)
    return SplitConv3d(layer, splits) if isinstance(layer, nn.Conv3d) else SplitConv2d(layer, splits)


def _accept_unsplit_state(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Turn the unsplit layer's entries of a state dict into those of the split one."""
    weight = state_dict.get(f"{prefix}weight")
    split = cast("_SplitLayer[Any]", module)
    own = getattr(split.expand, "weight", None)  # a method, once the layer is quantized
    if weight is None or f"{prefix}expand.weight" in state_dict or not isinstance(own, Tensor):
        return
    if tuple(weight.shape) != (split.n_channels, *own.shape[1:]):
        return
    bias = state_dict.pop(f"{prefix}bias", None)
    del state_dict[f"{prefix}weight"]
    for name, value in module.state_dict(prefix=prefix).items():
        state_dict.setdefault(name, value)
    rows, biases = split._expanded(weight, bias)
    state_dict[f"{prefix}expand.weight"] = rows
    channels = split.channels.to(weight.device)
    state_dict[f"{prefix}original_weight"] = weight[channels]
    if biases is not None:
        state_dict[f"{prefix}expand.bias"] = biases
        state_dict[f"{prefix}original_bias"] = bias[channels]
