"""What the package has to know about a layer that is linear in its input.

Convolutions and linear layers are brought into one form: weights ``[C, I, k]`` (``I`` inputs that one channel reads,
``k`` kernel offsets, 1 for a linear layer), outputs ``[B, C, P]`` (``P`` positions: pixels, or every dimension between
batch and features). A grouped convolution reads ``G * I`` inputs, of which each channel sees those of its group.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from lightning_polydis._checks import InputError, closest_names

if TYPE_CHECKING:
    from collections.abc import Sequence

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
LinearLayer: TypeAlias = Convolution | nn.Linear
KINDS: tuple[type[LinearLayer], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

MIN_INPUTS_BY_DEFAULT = 8
"""A layer with fewer inputs per channel is never chosen by default: so short a vector says little about concepts."""


def find_layer(model: nn.Module, name: str) -> LinearLayer:
    """The convolution or linear layer called ``name`` in ``model.named_modules()``.

    Args:
        model: The network.
        name: Dotted name of the layer.

    Returns:
        The layer itself, not a copy.

    Raises:
        ValueError: If there is no such module (the closest names are listed) or it is not a supported layer.

    Example:
        >>> from torch import nn
        >>> find_layer(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()), "0")
        Conv2d(3, 16, kernel_size=(3, 3), stride=(1, 1))
    """
    modules = dict(model.named_modules())
    supported = [key for key, module in modules.items() if unsupported_reason(module) is None]
    if name not in modules:
        close = closest_names(name, supported) or ", ".join(f"`{key}`" for key in supported[-3:]) or "none"
        raise InputError(f"Expected layers to name modules of the model, but got {name!r}. Closest names: {close}.")
    module = modules[name]
    reason = unsupported_reason(module)
    if reason is not None:
        close = closest_names(name, supported)
        hint = f" Layers of this model with a similar name: {close}." if close else ""
        raise InputError(f"Expected layer `{name}` to be a convolution or `nn.Linear`, but got {reason}.{hint}")
    return cast("LinearLayer", module)


def unsupported_reason(module: nn.Module) -> str | None:
    """Why ``module`` cannot be analysed, in words that follow "but got"; `None` if it can."""
    kind = f"`{module._get_name()}`"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"{kind}, whose shape is not known before its first forward pass (run the model once)"
    own = next((plain for plain in KINDS if isinstance(module, plain)), None)
    if own is None:
        return kind
    if type(module).forward is not own.forward or getattr(type(module), "_conv_forward", None) is not getattr(
        own, "_conv_forward", None
    ):
        return f"{kind}, a subclass of `{own.__name__}` with a forward pass of its own"
    if "weight" not in dict(module.named_parameters(recurse=False)):
        return f"{kind}, whose weight is computed from others (weight norm, spectral norm or another parametrization)"
    layer = cast("LinearLayer", module)
    if group_count(layer) > 1 and inputs_per_channel(layer) == 1:
        return f"a depthwise {kind}: each of its channels reads one input channel, so there is no vector to compare"
    return None


def inputs_per_channel(layer: LinearLayer) -> int:
    """Number of input channels that one output channel reads."""
    return layer.weight.shape[1]


def channel_count(layer: LinearLayer) -> int:
    """Number of output channels."""
    return layer.weight.shape[0]


def group_count(layer: LinearLayer) -> int:
    """Number of groups; 1 for linear layers."""
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def input_count(layer: LinearLayer) -> int:
    """Number of input channels, of all groups."""
    return inputs_per_channel(layer) * group_count(layer)


def channels_are_last(layer: nn.Module) -> bool:
    """Whether the channels of the layer's output are its last dimension; else they come right after the batch."""
    return isinstance(layer, nn.Linear)


def sources_of(layer: LinearLayer, channel: int) -> slice:
    """Which input channels an output channel reads: those of its group."""
    n_inputs = inputs_per_channel(layer)
    group = channel * group_count(layer) // channel_count(layer)
    return slice(group * n_inputs, (group + 1) * n_inputs)


def flat_weight(layer: LinearLayer) -> Tensor:
    """The layer's weight as ``[C, I, k]``, detached."""
    weight = layer.weight.detach()
    return weight.unsqueeze(-1) if isinstance(layer, nn.Linear) else weight.flatten(2)


def plain_copy(layer: LinearLayer) -> LinearLayer:
    """A copy of ``layer`` on the CPU without hooks, gradients or parametrizations.

    Weights come along in their own dtype.
    """
    copy = widened(layer, channel_count(layer), torch.device("cpu"))
    with torch.no_grad():
        copy.weight.copy_(layer.weight)
        if layer.bias is not None:
            copy.get_parameter("bias").copy_(layer.bias)
    return copy.requires_grad_(False)


def widened(layer: LinearLayer, channels: int, device: torch.device | None = None) -> LinearLayer:
    """A fresh layer of the same geometry and dtype with ``channels`` output channels, weights undefined."""
    tensors: dict[str, Any] = {
        "bias": layer.bias is not None,
        "device": device or layer.weight.device,
        "dtype": layer.weight.dtype,
    }
    # Without initialisation: it would draw random numbers, and a training run after it would differ.
    if isinstance(layer, nn.Linear):
        return cast("nn.Linear", skip_init(nn.Linear, layer.in_features, channels, **tensors))
    geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}
    plain = next(kind for kind in KINDS if isinstance(layer, kind))
    conv = skip_init(plain, layer.in_channels, channels, layer.kernel_size, **geometry, **tensors)
    return cast("LinearLayer", conv)


def at_least_single(values: Tensor) -> Tensor:
    """The same in ``float32`` if it was in half precision."""
    return values.float() if values.dtype.itemsize < 4 else values


def is_finite(values: Tensor) -> bool:
    """Whether there is no NaN and no infinity."""
    if not values.numel():
        return True
    extremes = torch.stack(values.aminmax())  # NaN wins; one pass over the values, `isfinite` makes several
    return bool(torch.isfinite(extremes).all())


def sum_over_positions(values: Tensor, *, channels_last: bool) -> Tensor:
    """Sum a layer's output-shaped tensor over its positions.

    Args:
        values: ``[B, C, ...]``, or ``[B, ..., C]`` with ``channels_last``.
        channels_last: Whether the channels are the last dimension (linear layers).

    Returns:
        ``[B, C]``.
    """
    if not channels_last:
        return values.flatten(2).sum(-1)
    return values.flatten(1, -2).sum(1) if values.ndim > 2 else values


def window_sums(layer: LinearLayer, inputs: Tensor) -> Tensor:
    r"""Sum of each input channel over the positions that each kernel offset reads.

    :math:`u_{bkij} = \sum_{p} x_{b,k,s p_1 + d i, s p_2 + d j}` over the output positions :math:`p`, with padding as
    the layer pads. As a convolution is linear, the relevance of input channel ``k`` for the position sum of output
    channel ``c`` (gradient x input) is ``(weight[c, k] * u[b, k]).sum()`` (arXiv:2504.12939, section 3).

    Args:
        layer: The layer that reads ``inputs``.
        inputs: ``[B, G * I, ...]`` for a convolution, ``[B, ..., I]`` for a linear layer.

    Returns:
        ``[B, G * I, k]``, in ``float32`` or wider.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> window_sums(nn.Conv2d(1, 8, 2, padding=0), torch.arange(9.0).view(1, 1, 3, 3))
        tensor([[[ 8., 12., 20., 24.]]])
    """
    inputs = at_least_single(inputs.detach())  # sums of real activations exceed the range of half precision
    if isinstance(layer, nn.Linear):
        return sum_over_positions(inputs, channels_last=True).unsqueeze(-1)
    sums = padded(layer, inputs)
    for axis in reversed(range(len(layer.kernel_size))):
        sums = _offset_sums(sums, 2 + axis, layer.kernel_size[axis], layer.stride[axis], layer.dilation[axis])
    return sums.flatten(2)


def _offset_sums(values: Tensor, dim: int, kernel: int, stride: int, dilation: int) -> Tensor:
    """Sum over ``dim`` as each offset of a one-dimensional kernel reads it; the offsets take the place of ``dim``."""
    steps = (values.shape[dim] - dilation * (kernel - 1) - 1) // stride
    if kernel == 1 and stride == 1:
        return values.sum(dim, keepdim=True)
    starts = [offset * dilation for offset in range(kernel)]
    windows = [values.narrow(dim, start, steps * stride + 1) for start in starts]
    return torch.stack([_every(window, dim, stride).sum(dim) for window in windows], dim)


def _every(values: Tensor, dim: int, step: int) -> Tensor:
    return values[(slice(None),) * dim + (slice(None, None, step),)]


def padded(layer: Convolution, inputs: Tensor) -> Tensor:
    """Inputs with the layer's padding made explicit, ``[B, G * I, ...]``, which are then read without any.

    Args:
        layer: The layer.
        inputs: ``[B, G * I, ...]``.
    """
    if layer.padding == "same":  # torch puts the odd one at the end
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        pads = [(total // 2, total - total // 2) for total in totals]
    elif layer.padding == "valid":
        return inputs
    else:
        pads = [(int(pad), int(pad)) for pad in layer.padding]
    if not any(map(any, pads)):
        return inputs
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(inputs, [side for pad in reversed(pads) for side in pad], mode=mode)


def reads_padding(layer: LinearLayer, inputs: Tensor) -> Tensor:
    """Positions whose window reads zeros beyond the map's border.

    Args:
        layer: The layer.
        inputs: ``[B, G * I, ...]`` for a convolution, ``[B, ..., I]`` for a linear layer; only the shape matters.

    Returns:
        ``[P]``, boolean, on the device of ``inputs``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> reads_padding(nn.Conv1d(1, 8, 3, padding=1), torch.zeros(1, 1, 4))
        tensor([ True, False, False,  True])
    """
    if isinstance(layer, nn.Linear):
        return torch.zeros(inputs[0, ..., 0].numel(), dtype=torch.bool, device=inputs.device)
    ones = padded(layer, inputs.new_ones(1, 1, *inputs.shape[2:], dtype=torch.float32))
    window = ones.new_ones(1, 1, *layer.kernel_size)
    read = CONVOLVE[len(layer.kernel_size)](ones, window, None, layer.stride, 0, layer.dilation)
    return read.flatten() < window.numel() - 0.5


def channel_outputs(
    layer: LinearLayer, inputs: Tensor, weight: Tensor, bias: Tensor | None, channels: Sequence[int]
) -> Tensor:
    """What the layer would put out if its channels had the given weights.

    Args:
        layer: Gives kernel size, stride, padding, dilation and groups.
        inputs: ``[B, G * I, ...]`` for a convolution, ``[B, ..., I]`` for a linear layer.
        weight: ``[R, I, k]``, one row for each wanted channel.
        bias: ``[R]`` or `None`.
        channels: The channel that each row takes the place of, which tells what it reads; ``R`` of them.

    Returns:
        ``[B, R, P]``, positions flattened.
    """
    if isinstance(layer, nn.Linear):
        return F.linear(inputs.flatten(1, -2) if inputs.ndim > 2 else inputs[:, None], weight[..., 0], bias).mT
    wide, kernel = padded(layer, inputs), weight.unflatten(2, layer.kernel_size)
    convolve = CONVOLVE[len(layer.kernel_size)]
    if layer.groups == 1:
        return convolve(wide, kernel, bias, layer.stride, 0, layer.dilation).flatten(2)
    outputs, start = [], 0
    for first, run in groupby(sources_of(layer, channel).start for channel in channels):  # rows of one group together
        rows = slice(start, start + len(list(run)))
        own = wide[:, first : first + inputs_per_channel(layer)]
        own_bias = None if bias is None else bias[rows]
        outputs.append(convolve(own, kernel[rows], own_bias, layer.stride, 0, layer.dilation))
        start = rows.stop
    return torch.cat(outputs, dim=1).flatten(2)
