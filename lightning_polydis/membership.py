"""Which source (input channel) belongs to which concept of a channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lightning_polydis.layers import channel_outputs, flat_weight, input_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_polydis.layers import LinearLayer

DOMINANCE_RATIOS = tuple(step / 20 for step in range(1, 21))
"""The dominance ratios that the paper tries: 0.05, 0.10, ..., 1.00."""

CHUNK_ELEMENTS = 2**24
"""Outputs computed at once while memberships are searched; bounds memory at 128 MiB of ``float64``."""


def part_weights(weight: Tensor, bias: Tensor | None, membership: Tensor) -> tuple[Tensor, Tensor | None]:
    r"""Weights of a channel's concept channels and of its residual.

    Concept :math:`i` gets :math:`m_{ik} w_k` and the bias; the residual :math:`(\sum_i m_{ik} - 1) w_k` and
    :math:`(K - 1)` times the bias, so that the concepts' sum minus the residual is the channel, for any membership
    (arXiv:2504.12939, section 3.3, for two concepts and memberships of 0 and 1).

    Args:
        weight: Weights of the channel, ``[I, ...]``.
        bias: Its bias, a scalar tensor, or `None`.
        membership: ``[K, I]``.

    Returns:
        Weights ``[K + 1, I, ...]`` and biases ``[K + 1]`` (or `None`), the residual last.

    Example:
        >>> import torch
        >>> weights, _ = part_weights(torch.tensor([2.0, 3.0, 4.0]), None, torch.tensor([[1, 0, 1], [0, 1, 1]]))
        >>> weights
        tensor([[2., 0., 4.],
                [0., 3., 4.],
                [0., 0., 4.]])
    """
    membership = membership.to(weight)  # before summing, so that the parts add up in the weight's precision
    shares = torch.cat([membership, membership.sum(0, keepdim=True) - 1])
    weights = shares.view(*shares.shape, *[1] * (weight.ndim - 1)) * weight
    if bias is None:
        return weights, None
    biases = bias.repeat(len(shares))
    biases[-1] *= len(membership) - 1
    return weights, biases


def dominance_membership(vectors: Tensor, dominance_ratio: float) -> Tensor:
    """Sources by the paper's rule, in symmetric form for any number of concepts.

    Source ``k`` leaves a concept if another one dominates it there: ``dominance_ratio * a_other[k] > a[k]``. Where
    that would leave it without a concept, the first concept keeps it. For two concepts this
    is the rule of arXiv:2504.12939, section 3.3.

    Args:
        vectors: Averaged relevance vectors of the concepts, ``[K, I]``.
        dominance_ratio: In (0, 1].

    Returns:
        ``[K, I]``, boolean.

    Example:
        >>> import torch
        >>> dominance_membership(torch.tensor([[4.0, 1.0, 2.0], [1.0, 4.0, 2.0]]), 0.5).int()
        tensor([[1, 0, 1],
                [0, 1, 1]], dtype=torch.int32)
    """
    belongs = ~(dominance_ratio * _largest_of_others(vectors) > vectors)
    belongs[0] |= ~belongs.any(0)
    return belongs


def _largest_of_others(values: Tensor) -> Tensor:
    """For each row the elementwise maximum of all other rows, ``[K, ...]``."""
    top = values.topk(2, dim=0)
    is_top = torch.zeros_like(values, dtype=torch.bool).scatter_(0, top.indices[:1], True)
    return torch.where(is_top, top.values[1:], top.values[:1])


def paper_membership(
    layer: LinearLayer,
    channel: int,
    vectors: Tensor,
    inputs: Sequence[Tensor],
) -> tuple[Tensor, float]:
    r"""Membership by the paper's search for the dominance ratio.

    Of the twenty ratios the one that maximises, summed over concepts :math:`i`, the mean over the concept's images of
    :math:`D_i / (\max_{j \ne i} D_j + 10^{-5})`, with :math:`D` the position sum of the positive part of a concept
    channel's output (arXiv:2504.12939, section 3.3; for more than two concepts the largest of the others stands in the
    denominator). Ties take the smallest ratio. Computed in ``float64``.

    Args:
        layer: The layer.
        channel: Output channel to split.
        vectors: Averaged relevance vectors of the concepts, ``[K, I]``.
        inputs: For each concept the layer's inputs on its images, ``[n, G * I, ...]`` or ``[n, ..., I]``; a concept
            without images has no say.

    Returns:
        Membership ``[K, I]`` of 0 and 1, ``float32``, and the dominance ratio.
    """
    masks = torch.stack([dominance_membership(vectors, ratio) for ratio in DOMINANCE_RATIOS])
    # Equal candidates are computed once: it saves time, and they tie exactly, whatever the order of summation.
    unique, which = masks.unique(dim=0, return_inverse=True)
    objective = np.zeros(len(unique))
    for concept, images in enumerate(inputs):
        if len(images):
            activation = _activations(layer, channel, unique.flatten(0, 1), images)
            objective += _separation(activation.unflatten(1, unique.shape[:2]), concept).mean(0).numpy()
    objective = objective[which.numpy()]
    best = int(objective.argmax())  # the first of equals
    return masks[best].float(), DOMINANCE_RATIOS[best]


def _activations(layer: LinearLayer, channel: int, masks: Tensor, inputs: Tensor) -> Tensor:
    """Position sum of the positive part of the channel, for each mask of its sources: ``[n, masks]``, ``float64``."""
    weight = flat_weight(layer)[channel].double()
    kernels = masks.double()[..., None] * weight
    bias = None if layer.bias is None else layer.bias[channel].detach().double().expand(len(masks))
    per_image = len(masks) * max(1, inputs[0].numel() // input_count(layer))
    images = max(1, CHUNK_ELEMENTS // per_image)
    chunks = [
        channel_outputs(layer, chunk.double(), kernels, bias, [channel] * len(masks)) for chunk in inputs.split(images)
    ]
    return torch.cat([chunk.clamp_(min=0).sum(2) for chunk in chunks])


def _separation(activation: Tensor, concept: int) -> Tensor:
    """``D_i / (max of the others + 1e-5)`` for activations ``[n, candidates, K]``: ``[n, candidates]``."""
    own = activation[..., concept]
    others = torch.cat([activation[..., :concept], activation[..., concept + 1 :]], dim=-1)
    return own / (others.amax(-1) + 1e-5)
