"""What each input channel brings: its relevance through a channel, and its part of a channel's output."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_polydis.layers import (
    LinearLayer,
    at_least_single,
    flat_weight,
    group_count,
    inputs_per_channel,
    padded,
    sources_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

GPU_ELEMENTS = 2**25
"""Elements that a GPU works on together, of 128 MiB: it waits for the next step more than for its memory."""

CPU_ELEMENTS = 2**18
"""Elements that a CPU works on together for light layers, of 1 MiB, which stays in its cache."""

LIGHT = 2**22
"""Multiplications of one image and all channels up to which a layer is light: more steps would take longer."""


def elements_at_once(device: torch.device, on_a_cpu: int) -> int:
    """How many elements are worked on together on a device; on a CPU so many that they stay in its cache."""
    return on_a_cpu if device.type == "cpu" else GPU_ELEMENTS


def source_relevances(layer: LinearLayer, inputs: Tensor, gradient: Tensor, images: Tensor, channels: Tensor) -> Tensor:
    r"""Relevance that each input channel has for the logit through one output channel.

    :math:`v_k = \sum_{ij} w_{ckij} \, \partial s / \partial w_{ckij}` with :math:`\partial s / \partial w_{ckij} =
    \sum_p g_{cp} x_{k, p \oplus ij}`: weight times gradient, so positions that do not matter to the logit drop out.
    Summed over ``k``, and with the bias's share, it is the relevance of the channel.

    Args:
        layer: The layer.
        inputs: ``[B, G * I, ...]`` for a convolution, ``[B, ..., I]`` for a linear layer.
        gradient: Gradient of the logit with respect to the layer's output, shaped as that output.
        images: For each wanted pair of image and channel the image's place in the batch, ``[n]``, integer, ascending.
        channels: The channel of each pair, ``[n]``, integer.

    Returns:
        ``[n, I]``, in ``float32`` or wider, in units of the logit.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer, x = nn.Linear(3, 2), torch.ones(1, 3)
        >>> found = source_relevances(layer, x, torch.ones(1, 2), torch.tensor([0]), torch.tensor([1]))
        >>> torch.equal(found[0], layer.weight[1])
        True
    """
    if not len(images):
        return inputs.new_zeros(0, inputs_per_channel(layer), dtype=torch.promote_types(inputs.dtype, torch.float32))
    inputs, gradient, weight = (at_least_single(part) for part in (inputs, gradient, flat_weight(layer)))
    channels_first = gradient.movedim(-1, 1) if isinstance(layer, nn.Linear) else gradient
    flat = channels_first.flatten(2) if gradient.ndim > 2 else channels_first[..., None]
    dtype = torch.promote_types(flat.dtype, inputs.dtype)
    by_offset = weight.permute(2, 0, 1).to(dtype).contiguous()  # rows that lie together are picked much faster
    inputs, flat = inputs.to(dtype), flat.to(dtype)
    found = flat.new_empty(len(images), inputs_per_channel(layer))
    counts = torch.bincount(images, minlength=len(inputs)).tolist()
    size, end = _images_at_once(by_offset, inputs[0].numel(), flat.shape[2]), 0
    for start in range(0, len(inputs), size):
        together = slice(start, start + size)
        begin, end = end, end + sum(counts[together])
        if begin < end:
            own = inputs[together], flat[together], images[begin:end] - start, channels[begin:end]
            _fill(layer, *own, by_offset, found[begin:end])
    return found


def _images_at_once(by_offset: Tensor, n_read: int, n_positions: int) -> int:
    """How many images are worked on together; on a CPU one of a heavy layer, and its wanted channels only."""
    is_light = by_offset.numel() * n_positions <= LIGHT
    n_elements = elements_at_once(by_offset.device, CPU_ELEMENTS if is_light else 1)
    return max(1, n_elements // max(by_offset[0].numel(), n_read))


def _fill(
    layer: LinearLayer,
    inputs: Tensor,
    gradient: Tensor,
    images: Tensor,
    channels: Tensor,
    by_offset: Tensor,
    found: Tensor,
) -> None:
    """Relevances of some pairs: gradient ``[B, C, P]``, weights ``[k, C, I]``, results ``[n, I]``."""
    if len(inputs) == 1 and group_count(layer) == 1:
        _fill_of_one(layer, inputs, gradient[0], channels, by_offset, found)
    elif len(found) * gradient.shape[2] < gradient[..., 0].numel():  # copies of inputs are less than what all take
        found.copy_(_of_some(layer, inputs, gradient, images, channels, by_offset))
    else:
        rows = images * gradient.shape[1] + channels
        torch.index_select(_of_all(layer, inputs, gradient, by_offset).flatten(0, 1), 0, rows, out=found)


def _fill_of_one(
    layer: LinearLayer, inputs: Tensor, gradient: Tensor, channels: Tensor, by_offset: Tensor, found: Tensor
) -> None:
    """Relevances of some channels of one image, offset by offset, so that little is worked on at a time."""
    is_all = torch.equal(channels, torch.arange(len(gradient), device=channels.device))
    own = slice(None) if is_all else channels  # by itself: nothing is picked
    slopes, (first, *others) = gradient[own], zip(by_offset, _inputs_by_offset(layer, inputs), strict=True)
    weights, reads = first
    torch.mm(slopes, reads[0].mT, out=found).mul_(weights[own])
    for weights, reads in others:
        found.addcmul_(slopes @ reads[0].mT, weights[own])


def _of_all(layer: LinearLayer, inputs: Tensor, gradient: Tensor, by_offset: Tensor) -> Tensor:
    """Relevances of all channels for all images, ``[B, C, I]``."""
    groups, total = group_count(layer), torch.zeros((), dtype=gradient.dtype, device=gradient.device)
    slopes = gradient.unflatten(1, (groups, -1))
    for weights, reads in zip(by_offset, _inputs_by_offset(layer, inputs), strict=True):
        products = (slopes @ reads.unflatten(1, (groups, -1)).mT).flatten(1, 2)
        total = products.mul_(weights).add_(total)
    return total


def _of_some(
    layer: LinearLayer, inputs: Tensor, gradient: Tensor, images: Tensor, channels: Tensor, by_offset: Tensor
) -> Tensor:
    """Relevances of some channels for some images, ``[n, I]``; each pair takes a copy of the inputs."""
    groups, total = group_count(layer), torch.zeros((), dtype=gradient.dtype, device=gradient.device)
    places = images, channels // (gradient.shape[1] // groups)
    slopes = gradient[images, channels][..., None]
    for weights, reads in zip(by_offset, _inputs_by_offset(layer, inputs), strict=True):
        products = (reads.unflatten(1, (groups, -1))[places] @ slopes)[..., 0]
        total = products.mul_(weights[channels]).add_(total)
    return total


def source_contributions(
    layer: LinearLayer, inputs: Tensor, weight: Tensor, channel: int, places: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    r"""What each input channel adds to a channel's output, position by position.

    :math:`y_{pk} = \sum_{ij} w_{kij} x_{k, p \oplus ij}`; the sum over ``k`` and the bias is the output.

    Args:
        layer: Gives kernel size, stride, padding, dilation and groups.
        inputs: ``[B, G * I, ...]`` for a convolution, ``[B, ..., I]`` for a linear layer.
        weight: The channel's weights, ``[I, k]``.
        channel: The channel.
        places: Image and position of each place that is wanted, by their numbers, ``[n]`` each; `None`: all.

    Returns:
        ``[B, P, I]``, or ``[n, I]`` of some places.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> source_contributions(nn.Linear(2, 1), torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.5]]), 0)
        tensor([[[3., 2.]]])
    """
    own = inputs if isinstance(layer, nn.Linear) else inputs[:, sources_of(layer, channel)]
    reads = _inputs_by_offset(layer, own)
    if places is not None:
        images, positions = places
        return sum(read[images, :, positions] * weight[:, offset] for offset, read in enumerate(reads))  # type: ignore[return-value]
    added = (read * weight[:, offset, None] for offset, read in enumerate(reads))
    return sum(added).mT  # type: ignore[union-attr]


def _inputs_by_offset(layer: LinearLayer, inputs: Tensor) -> Iterator[Tensor]:
    """What each kernel offset reads, ``[B, I, P]`` each."""
    if isinstance(layer, nn.Linear):
        yield inputs.flatten(1, -2).mT if inputs.ndim > 2 else inputs[..., None]
        return
    # Channels last: what an offset reads is then copied in long runs.
    wide = padded(layer, inputs).movedim(1, -1)
    wide = wide.contiguous() if math.prod(layer.kernel_size) > 1 else wide
    sizes = [
        (total - dilation * (kernel - 1) - 1) // stride + 1
        for total, kernel, stride, dilation in zip(
            wide.shape[1:-1], layer.kernel_size, layer.stride, layer.dilation, strict=True
        )
    ]
    for offset in product(*map(range, layer.kernel_size)):
        starts = [place * dilation for place, dilation in zip(offset, layer.dilation, strict=True)]
        window = [
            slice(start, start + (size - 1) * stride + 1, stride)
            for start, size, stride in zip(starts, sizes, layer.stride, strict=True)
        ]
        yield wide[(slice(None), *window)].flatten(1, -2).mT
