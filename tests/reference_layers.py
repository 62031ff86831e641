"""Relevances and vectors of layers of any kind once more: plain autograd in float64, one image at a time."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Expected(NamedTuple):
    relevance: Tensor  # [B, C]
    gradients: Tensor  # of the logit, summed over positions, [B, C]
    vectors: Tensor  # [B, C, I]
    inputs: list[Tensor]
    layer: nn.Module


def slow(net: nn.Module, layer: str, images: Tensor, targets: Tensor) -> Expected:
    """From the weights as they are, whatever their precision."""
    net = copy.deepcopy(net).double()
    for module in net.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    module, seen = net.get_submodule(layer), []
    module.register_forward_hook(lambda _, args, output: seen.append((args[0].detach().clone(), output)))
    relevances, gradients, vectors, inputs = [], [], [], []
    for image, target in zip(images.double(), targets, strict=True):
        seen.clear()
        logit = net(image[None])[0, target]
        x, z = seen[0]
        slope, weight_slope = torch.autograd.grad(logit, [z, module.weight])
        relevances.append(by_channel(module, (z * slope).detach()).sum(1))
        gradients.append(by_channel(module, slope).sum(1))
        product = (module.weight * weight_slope).detach()
        vectors.append(product.reshape(*product.shape[:2], -1).sum(2))
        inputs.append(x)
    return Expected(torch.stack(relevances), torch.stack(gradients), torch.stack(vectors), inputs, module)


def by_channel(layer: nn.Module, values: Tensor) -> Tensor:
    """One image's values, ``[channels, positions]``."""
    channels_first = values[0].movedim(-1, 0) if isinstance(layer, nn.Linear) else values[0]
    return channels_first.reshape(len(channels_first), -1)


def own_relevance(layer: nn.Module, x: Tensor, channel: int) -> Tensor:
    """Input x gradient of the sum of one channel's own output, for the inputs that it reads: [I]."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).select(-1 if isinstance(layer, nn.Linear) else 1, channel).sum(), x)
    found = by_channel(layer, (x * gradient).detach()).sum(1)
    groups = getattr(layer, "groups", 1)
    return found.chunk(groups)[channel * groups // len(layer.weight)]


def error(found: Tensor, wanted: Tensor) -> float:
    assert float(wanted.norm()) > 0
    return float((found.double() - wanted).norm() / wanted.norm())
