import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import pad

from lightning_polydis import layers
from lightning_polydis.layers import (
    channel_outputs,
    find_layer,
    flat_weight,
    is_finite,
    padded,
    plain_copy,
    reads_padding,
    sources_of,
    window_sums,
)
from tests.networks import conv_relu_net


class StandardisedConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


CONVS = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2, "padding": 1},
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2)},
    {"kernel_size": 3, "stride": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": (2, 5), "padding": "same", "dilation": (3, 1)},
    {"kernel_size": 3, "padding": "valid", "bias": False},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
    {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular", "stride": 2},
    {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
]


GROUPED = [{"kernel_size": 3, "padding": 1, "groups": 2}, {"kernel_size": 1, "groups": 2, "stride": 2}]
OTHER_DIMENSIONS = [
    (nn.Conv1d, {"kernel_size": 5, "padding": 3, "stride": 2, "groups": 2}),
    (nn.Conv1d, {"kernel_size": 4, "padding": "same", "dilation": 2}),
    (nn.Conv3d, {"kernel_size": (2, 3, 1), "stride": (1, 2, 1), "padding": (1, 0, 1)}),
    (nn.Conv3d, {"kernel_size": 2, "dilation": (1, 2, 1), "groups": 2, "bias": False}),
    (nn.Conv3d, {"kernel_size": 3, "padding": (1, 2, 1), "padding_mode": "circular"}),
    (nn.Conv3d, {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"}),
    (nn.Conv1d, {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"}),
]
SIZES = {nn.Conv1d: (11,), nn.Conv2d: (11, 10), nn.Conv3d: (5, 6, 4)}
KINDS = [(nn.Conv2d, config) for config in CONVS + GROUPED] + OTHER_DIMENSIONS


def position_sums(layer: nn.Module, x: torch.Tensor, channel: int) -> torch.Tensor:
    """x * d(sum of the channel's output) / dx, summed over positions, by autograd."""
    x = x.clone().requires_grad_()
    z = layer(x)
    is_conv = not isinstance(layer, nn.Linear)
    (gradient,) = torch.autograd.grad((z[:, channel] if is_conv else z[..., channel]).sum(), x)
    product = x * gradient
    return product.flatten(2).sum(2) if is_conv else product.reshape(len(x), -1, x.shape[-1]).sum(1)


@pytest.mark.parametrize(("kind", "config"), KINDS, ids=str)
def test_window_sums_give_input_x_gradient_of_every_channel(kind, config):
    torch.manual_seed(0)
    layer = kind(4, 6, **config).double()
    x = torch.randn(3, 4, *SIZES[kind], dtype=torch.float64)
    sums = window_sums(layer, x)
    for channel in range(6):
        read = sources_of(layer, channel)
        closed_form = (flat_weight(layer)[channel] * sums[:, read]).sum(-1)
        by_autograd = position_sums(layer, x, channel)
        torch.testing.assert_close(closed_form, by_autograd[:, read], rtol=1e-12, atol=1e-12)
        assert float(by_autograd.abs().sum()) == pytest.approx(float(by_autograd[:, read].abs().sum()), rel=1e-12)


@pytest.mark.parametrize("shape", [(5, 4), (5, 7, 4), (5, 2, 3, 4)])
def test_window_sums_of_a_linear_layer(shape):
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    x = torch.randn(shape, dtype=torch.float64)
    closed_form = torch.einsum("cik,bik->bci", flat_weight(layer), window_sums(layer, x))
    for channel in range(3):
        torch.testing.assert_close(closed_form[:, channel], position_sums(layer, x, channel), rtol=1e-12, atol=1e-12)


def test_window_sums_of_half_precision_inputs_do_not_overflow():
    layer = nn.Conv2d(1, 1, 1).half()
    sums = window_sums(layer, torch.full((1, 1, 100, 100), 30.0, dtype=torch.float16))
    assert sums.dtype == torch.float32
    assert sums.item() == 300_000


@pytest.mark.parametrize(("kind", "config"), KINDS, ids=str)
def test_channel_outputs_are_those_of_the_layer(kind, config):
    torch.manual_seed(0)
    layer = kind(4, 6, **config).double()
    x = torch.randn(2, 4, *SIZES[kind], dtype=torch.float64)
    outputs = channel_outputs(layer, x, flat_weight(layer), layer.bias, range(6))
    torch.testing.assert_close(outputs, layer(x).flatten(2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 4), (5, 7, 4), (5, 2, 3, 4)])
def test_channel_outputs_of_a_linear_layer(shape):
    layer = nn.Linear(4, 3)
    x = torch.randn(shape)
    outputs = channel_outputs(layer, x, flat_weight(layer), layer.bias, range(len(layer.weight)))
    torch.testing.assert_close(outputs, layer(x).reshape(5, -1, 3).mT)


LAYERS = [(kind(4, 6, **config), (3, 4, *SIZES[kind])) for kind, config in KINDS]
LAYERS += [(nn.Linear(4, 6), (3, *between, 4)) for between in ((), (7,), (2, 3))]


@pytest.mark.parametrize(("layer", "shape"), LAYERS[: len(CONVS)], ids=str)
def test_positions_that_read_padding_are_those_that_nan_in_its_place_reaches(layer, shape):
    x = torch.zeros(shape)
    bare = copy.deepcopy(layer).requires_grad_(False)
    bare.padding, bare.padding_mode = 0, "zeros"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers.F, "pad", lambda values, pads, mode: pad(values, pads, value=torch.nan))
        expected = bare(padded(layer, x))[0, 0].isnan().flatten()
    found = reads_padding(layer, x)
    if layer.padding_mode == "zeros":
        assert torch.equal(found, expected)
    else:  # the border holds copies of what is in the map
        assert not found.any()


def test_plain_copy_computes_the_same_and_shares_nothing():
    layer = nn.Conv2d(3, 5, 3, stride=2, padding=1, padding_mode="reflect")
    layer.register_forward_hook(lambda *_: 1 / 0)
    copy = plain_copy(layer)
    x = torch.randn(1, 3, 8, 8)
    outputs = channel_outputs(layer, x, flat_weight(layer), layer.bias, range(len(layer.weight)))
    torch.testing.assert_close(copy(x).flatten(2), outputs)
    assert copy.weight.data_ptr() != layer.weight.data_ptr()
    assert not copy.weight.requires_grad


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("body.conf", r"got 'body.conf'. Closest names: `body.conv`"),
        ("zzz", r"got 'zzz'. Closest names: `"),
        (
            "body.act",
            r"Expected layer `body.act` to be .* but got `ReLU`. Layers of this model with a similar name: `body.*`",
        ),
        ("body", r"but got `ModuleDict`"),
        ("body.depthwise", r"a depthwise `Conv2d`: each of its channels reads one input"),
        ("body.depthwise3d", r"a depthwise `Conv3d`: each"),
        ("body.transposed", r"but got `ConvTranspose2d`"),
        ("body.lazy", r"`LazyConv2d`, whose shape is not known"),
        ("body.own", r"`StandardisedConv`, a subclass of `Conv2d` with a forward pass of its own"),
        ("body.weight_norm", r"whose weight is computed from others"),
        ("body.old_weight_norm", r"`Linear`, whose weight is computed from others"),
        ("body.spectral_norm", r"whose weight is computed from others \(weight norm, spectral norm or"),
    ],
)
def test_layers_that_cannot_be_analysed_are_refused_in_words(name, message):
    body = {
        "conv": nn.Conv2d(4, 4, 1),
        "act": nn.ReLU(),
        "depthwise": nn.Conv2d(4, 4, 3, groups=4),
        "depthwise3d": nn.Conv3d(4, 8, 3, groups=4),
        "transposed": nn.ConvTranspose2d(4, 4, 1),
        "lazy": nn.LazyConv2d(4, 3),
        "own": StandardisedConv(4, 4, 1),
        "weight_norm": nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
        "spectral_norm": nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
        "old_weight_norm": old_weight_norm(nn.Linear(4, 4)),
    }
    with pytest.raises(ValueError, match=message):
        find_layer(nn.ModuleDict({"body": nn.ModuleDict(body)}), name)


def test_a_model_without_any_layer_says_none():
    with pytest.raises(ValueError, match="Closest names: none"):
        find_layer(nn.Sequential(nn.ReLU()), "conv")


def test_find_layer_returns_the_layer_itself():
    net = conv_relu_net()
    assert find_layer(net, "2") is net[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_among_many_is_noticed(dtype, bad):
    values = torch.randn(7, 33).to(dtype).T[::2]
    assert is_finite(values)
    values[3, 5] = bad
    assert not is_finite(values)


def test_nothing_is_finite():
    assert is_finite(torch.empty(0, 3))
