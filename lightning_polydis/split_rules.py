"""How relevance passes through a split layer: rules for its ``expand`` and ``merge``, made of any zennit rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zennit.core import BasicHook, Hook, ParamMod

from lightning_polydis.layers import LinearLayer, channel_count, widened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_polydis.merging import MergeChannels
    from lightning_polydis.splitting import SplitLayer


LEAST_PORTION = 1e-20
"""What stands for a portion of zero, by which nothing could be multiplied and divided again."""


@dataclass(frozen=True)
class PartTable:
    """Which channel each row of ``expand`` is a part of.

    Attributes:
        channel: The old channel, ``[R]``, integer; 0 for rows that are not used (of grouped convolutions).
        sign: 1 for concepts and for channels that are not split, -1 for residuals, 0 for unused rows, ``[R]``.
        n_biases: How many times the row holds the channel's bias: 1, or one less than there are concepts for a
            residual, ``[R]``.
    """

    channel: Tensor
    sign: Tensor
    n_biases: Tensor

    @staticmethod
    def of(layer: SplitLayer) -> PartTable:
        """The table of a split layer."""
        merge: MergeChannels = layer.merge
        n_rows, target, sign = channel_count(layer.expand), merge.target, merge.sign.float()
        n_old = n_rows - len(target) if merge.rows is None else len(merge.rows) - len(target)
        used = torch.arange(n_rows, device=target.device) if merge.rows is None else merge.rows
        n_concepts = sign.new_ones(n_old).index_add_(0, target, (sign > 0).float())
        extra_biases = torch.where(sign > 0, torch.ones_like(sign), n_concepts[target] - 1)
        return PartTable(
            target.new_zeros(n_rows).index_copy_(0, used, torch.cat([torch.arange(n_old, device=used.device), target])),
            sign.new_zeros(n_rows).index_copy_(0, used, torch.cat([sign.new_ones(n_old), sign])),
            sign.new_zeros(n_rows).index_copy_(0, used, torch.cat([sign.new_ones(n_old), extra_biases])),
        )

    def folded(self, rows: Tensor, n_channels: int) -> Tensor:
        """Parts put together: ``[R, ...]`` -> ``[C, ...]``, in ``float64``."""
        signed = rows.double() * _beside(self.sign.double(), rows)
        return signed.new_zeros(n_channels, *rows.shape[1:]).index_add_(0, self.channel, signed)

    def shares(self, rows: Tensor, whole: Tensor) -> Tensor:
        """What each row contributes to each weight of its channel, ``[R, ...]``; they add up to 1."""
        own = whole[self.channel]
        signed = rows.double() * _beside(self.sign.double(), rows)
        return torch.where(own == 0, torch.zeros_like(own), signed / own)


def _beside(values: Tensor, rows: Tensor) -> Tensor:
    """``[R]`` in the shape of ``rows``, for products."""
    return values.view(-1, *[1] * (rows.ndim - 1))


@dataclass(frozen=True)
class _Modified:
    """What a zennit rule makes of the whole layer: one entry for each of its modifications.

    Attributes:
        inputs: Modified inputs.
        weights: Modified weights of the whole channels, and biases.
        units: What the rule passes back for a relevance of 1 at each output.
    """

    inputs: list[Tensor]
    weights: list[tuple[Tensor, Tensor | None]]
    units: list[Tensor]


class ExpandRule(Hook):  # type: ignore[misc]
    r"""Passes relevance on from the parts of channels as a rule does from the whole channels.

    The rule says how much of a channel's relevance :math:`R_c` each input :math:`k` gets, :math:`R_{c \leftarrow k}`.
    Of that, part :math:`i` passes on the share :math:`m_{ik}` that it has in the weight,
    :math:`w_{ik} = m_{ik} w_{ck}` (the residual's counts as negative). So the parts' relevances
    :math:`R_i = \sum_k m_{ik} R_{c \leftarrow k}` add up to :math:`R_c`, and what arrives at the inputs is what the
    rule gives in the network before the split, whatever the rule. Masking a part's relevance leaves out what
    passes through it.

    To hand each part to the rule as a layer of its own, with `zennit.rules.Norm` on ``merge``, does so for the epsilon
    rule alone: a rule that looks at positive contributions only finds others in the parts than in the whole.

    Args:
        layer: The split layer that ``expand`` is part of.
        rule: The rule for the layer.
    """

    def __init__(self, layer: SplitLayer, rule: BasicHook) -> None:
        super().__init__()
        self._layer, self._rule = layer, rule

    def copy(self) -> ExpandRule:
        """This rule itself: it is made for one layer and used once."""
        return self

    def forward(self, module: nn.Module, input: Any, output: Any) -> None:
        """Keep the input."""
        self.stored_tensors["input"] = input[0].detach()

    def backward(self, module: nn.Module, grad_input: Any, grad_output: Any) -> tuple[Tensor | None, ...]:
        """Relevance of the inputs for the relevance of the parts."""
        table, modified, weights = self._prepared()
        portions = self._portions(table, modified, weights)
        relevance = grad_output[0]
        of_channel = torch.where(portions == 0, torch.zeros_like(portions), relevance / portions)
        gradients: list[Tensor] = []
        for inputs, (weight, _), unit in zip(modified.inputs, weights, modified.units, strict=True):
            with torch.enable_grad():
                inputs = inputs.detach().requires_grad_()
                outputs = _run(self._layer.expand, inputs, weight)
            passed = of_channel * unit.index_select(self._layer.merge.dim, table.channel)
            gradients += torch.autograd.grad(outputs, inputs, passed)
        found = self._rule.reducer(modified.inputs, gradients)
        return tuple(found if part is not None and part.shape == found.shape else None for part in grad_input)

    def portions(self) -> Tensor:
        """Which portion of its channel's relevance each row gets, ``[B, R, ...]`` (channels last for linear layers)."""
        return self._portions(*self._prepared())

    def _prepared(self) -> tuple[PartTable, _Modified, list[tuple[Tensor, Tensor | None]]]:
        """The table, what the rule makes of the whole layer, and the parts of the weights that it makes."""
        table, expand = PartTable.of(self._layer), self._layer.expand
        whole, shares, bias_shares = _whole(expand, table, self._layer.n_channels)
        modified = _modified(self._rule, whole, self.stored_tensors["input"])
        parts = [
            (shares * weight[table.channel], None if bias is None else bias_shares * bias[table.channel])
            for weight, bias in modified.weights
        ]
        return table, modified, parts

    def _portions(self, table: PartTable, modified: _Modified, weights: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        dim = self._layer.merge.dim
        factors = _gradient_factors(self._rule, modified.inputs)
        of_bias = _gradient_factors(self._rule, [inputs.new_ones(1) for inputs in modified.inputs])
        total = torch.zeros(())
        for factor, scale, (weight, bias), unit in zip(factors, of_bias, weights, modified.units, strict=True):
            contribution = _run(self._layer.expand, factor, weight)
            if bias is not None:
                contribution = contribution + scale * bias.view(-1, *[1] * (-1 - dim))
            total = total.to(contribution) + contribution * unit.index_select(dim, table.channel)
        # What a part gives to some inputs and takes from others may cancel out; it has to be passed on all the same.
        least = LEAST_PORTION * table.sign.abs().to(total).view(-1, *[1] * (-1 - dim))
        return torch.where(total == 0, least, total).detach()


class MergeRule(Hook):  # type: ignore[misc]
    """Hands a channel's relevance to its parts, each the portion that `ExpandRule` passes on from it.

    Args:
        expand: The rule of ``expand`` in the same split layer.
        layer: The split layer.
    """

    def __init__(self, expand: ExpandRule, layer: SplitLayer) -> None:
        super().__init__()
        self._expand, self._layer = expand, layer

    def copy(self) -> MergeRule:
        """This rule itself: it is made for one layer and used once."""
        return self

    def backward(self, module: nn.Module, grad_input: Any, grad_output: Any) -> tuple[Tensor, ...]:
        """Relevance of the parts for the relevance of the channels."""
        channel = PartTable.of(self._layer).channel
        return (grad_output[0].index_select(self._layer.merge.dim, channel) * self._expand.portions(),)


def _whole(expand: LinearLayer, table: PartTable, n_channels: int) -> tuple[LinearLayer, Tensor, Tensor]:
    """The layer with whole channels, and the shares that its parts have in weights and biases."""
    layer, weight = widened(expand, n_channels).requires_grad_(False), expand.weight.detach()
    whole = table.folded(weight, n_channels)
    layer.weight.copy_(whole)
    bias_shares = table.sign
    if expand.bias is not None:
        whole_bias = table.folded(expand.bias.detach(), n_channels)
        layer.get_parameter("bias").copy_(whole_bias)
        bias_shares = table.shares(expand.bias.detach(), whole_bias)
    return layer, table.shares(weight, whole).to(weight), bias_shares.to(weight)


def _modified(rule: BasicHook, layer: LinearLayer, inputs: Tensor) -> _Modified:
    """Run a zennit rule's modifications on a layer."""
    modifiers = zip(rule.input_modifiers, rule.param_modifiers, rule.output_modifiers, strict=True)
    all_inputs, weights, outputs = [], [], []
    for of_input, of_parameters, of_output in modifiers:
        all_inputs.append(of_input(inputs.clone()))
        with ParamMod.ensure(of_parameters)(layer) as changed:
            outputs.append(of_output(changed(all_inputs[-1])))
            bias = None if changed.bias is None else changed.bias.detach().clone()
            weights.append((changed.weight.detach().clone(), bias))
    units = rule.gradient_mapper(torch.ones_like(outputs[0]), outputs)
    return _Modified(all_inputs, weights, [units] if isinstance(units, Tensor) else list(units))


def _gradient_factors(rule: BasicHook, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What the rule multiplies each gradient with to make it a relevance: the inputs, with signs and factors."""
    with torch.enable_grad():
        gradients = [torch.zeros_like(part, requires_grad=True) for part in inputs]
        total = rule.reducer(inputs, gradients).sum()
        factors = torch.autograd.grad(total, gradients, allow_unused=True)
    return [torch.zeros_like(part) if factor is None else factor for part, factor in zip(inputs, factors, strict=True)]


def _run(layer: LinearLayer, inputs: Tensor, weight: Tensor) -> Tensor:
    """A layer with other weights and without bias, past its hooks."""
    if isinstance(layer, nn.Linear):
        return F.linear(inputs, weight)
    outputs: Tensor = layer._conv_forward(inputs, weight, None)
    return outputs
