"""Relevances of sources and what they contribute, against the formula."""

import copy

import pytest
import torch
from torch import nn

from lightning_polydis import sources
from lightning_polydis.layers import channel_outputs, flat_weight
from lightning_polydis.sources import source_contributions, source_relevances
from tests.test_layers import LAYERS


@pytest.mark.parametrize("at_once", [1, 2**18], ids=["image by image", "together"])
@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
def test_source_relevances_are_weight_x_gradient_of_the_logit(layer, shape, at_once, monkeypatch):
    monkeypatch.setattr(sources, "elements_at_once", lambda device, on_a_cpu: at_once)
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    x = torch.randn(shape, dtype=torch.float64)
    gradient = torch.randn_like(layer(x))
    images = torch.tensor([0, 0, 0, *[1] * 6])  # some channels of the first, all of the second, none of the third
    channels = torch.tensor([5, 0, 2, *range(6)])
    found = source_relevances(layer, x, gradient, images, channels)
    for row, image, channel in zip(found, images, channels, strict=True):
        # The logit's gradient stands for all that follows: the logit is (z * gradient).sum() to first order.
        logit = (layer(x[image : image + 1]) * gradient[image]).sum()
        (slope,) = torch.autograd.grad(logit, layer.weight)
        expected = (layer.weight * slope)[channel].reshape(layer.weight.shape[1], -1).sum(1)
        torch.testing.assert_close(row, expected.detach(), rtol=1e-12, atol=1e-12)


def test_pairs_that_are_few_take_the_same_relevances_together(monkeypatch):
    """One channel of each image: inputs are copied then, and not all channels worked out."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 40, 3, groups=4).double(), torch.randn(5, 8, 4, 4, dtype=torch.float64)
    gradient, pairs = torch.randn_like(layer(x)), (torch.arange(5), torch.tensor([3, 39, 0, 17, 20]))
    monkeypatch.setattr(sources, "elements_at_once", lambda device, on_a_cpu: 2**18)
    with monkeypatch.context() as other:
        other.setattr(sources, "_of_some", None)
        repeated = tuple(part.repeat_interleave(20) for part in pairs)  # so many that all channels are worked out
        expected = source_relevances(layer, x, gradient, *repeated)[::20]
    monkeypatch.setattr(sources, "_of_all", None)
    torch.testing.assert_close(source_relevances(layer, x, gradient, *pairs), expected, rtol=1e-12, atol=1e-12)


def test_no_wanted_pair_gives_no_relevances():
    nothing = torch.empty(0, dtype=torch.long)
    found = source_relevances(
        nn.Linear(4, 3).half(), torch.ones(2, 4).half(), torch.ones(2, 3).half(), nothing, nothing
    )
    assert (found.shape, found.dtype) == ((0, 4), torch.float32)


def test_source_relevances_of_half_precision_do_not_overflow():
    layer = nn.Conv2d(1, 1, 1, bias=False).half()
    nn.init.constant_(layer.weight, 100)
    x = torch.full((1, 1, 10, 10), 100.0, dtype=torch.float16)
    found = source_relevances(layer, x, torch.ones_like(x), torch.tensor([0]), torch.tensor([0]))
    assert (found.dtype, found.item()) == (torch.float32, 1e6)


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
def test_source_contributions_are_what_each_source_adds_and_sum_to_the_output(layer, shape):
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    x = torch.randn(shape, dtype=torch.float64)
    found = source_contributions(layer, x, flat_weight(layer)[4], 4)
    outputs = channel_outputs(layer, x, flat_weight(layer)[4:5], None, [4])[:, 0]
    torch.testing.assert_close(found.sum(2), outputs, rtol=1e-12, atol=1e-12)
    places = torch.tensor([0, 1, 1]), torch.tensor([found.shape[1] - 1, 0, found.shape[1] - 1])
    torch.testing.assert_close(source_contributions(layer, x, flat_weight(layer)[4], 4, places), found[places])
    for source in range(found.shape[2]):
        alone = torch.zeros_like(flat_weight(layer)[4:5])
        alone[0, source] = flat_weight(layer)[4, source]
        expected = channel_outputs(layer, x, alone, None, [4])[:, 0]
        torch.testing.assert_close(found[..., source], expected, rtol=1e-12, atol=1e-12)
