"""The strongest images of each channel, streamed."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_polydis.clusters.top_images import FREE, TopImages, sides_of
from lightning_polydis.clusters.watching import Use
from lightning_polydis.layers import channel_count, inputs_per_channel, sources_of
from tests.clusters.runs import analysed, noise

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method")

LAYERS = {
    "1 x 1": (lambda: nn.Conv2d(6, 5, 1), (6, 4, 4)),
    "3 x 3, stride and padding": (lambda: nn.Conv2d(6, 5, 3, stride=2, padding=2, bias=False), (6, 7, 6)),
    "dilation and reflection": (lambda: nn.Conv2d(4, 5, 3, dilation=2, padding=2, padding_mode="reflect"), (4, 7, 6)),
    "groups": (lambda: nn.Conv2d(6, 6, 3, groups=2, padding=1), (6, 5, 5)),
    "1-D": (lambda: nn.Conv1d(5, 4, 3), (5, 9)),
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "linear of tokens": (lambda: nn.Linear(7, 5), (4, 7)),
}


@pytest.fixture(params=LAYERS)
def case(request):
    """A layer and the shape of its input."""
    make, shape = LAYERS[request.param]
    torch.manual_seed(5)
    return make(), shape


def _use(signs):
    """Used in these directions, without a shift."""
    return None if signs is None else Use(torch.tensor(signs).double(), torch.zeros(len(signs)).double())


def collected(layer, inputs, limit, batch_size=7, signs=None, labels=None):
    """Batch by batch, as the analysis does."""
    top = TopImages(sides_of(channel_count(layer), _use(signs)), inputs_per_channel(layer), limit)
    numbers = torch.arange(len(inputs)) * 3 + 1
    labels = torch.full((len(inputs),), -1) if labels is None else labels
    with torch.no_grad():
        for part in torch.arange(len(inputs)).split(batch_size):
            top.update(layer, inputs[part], layer(inputs[part]), numbers[part], labels[part])
    top.trim()
    return top.compute()


def beside_padding(layer, inputs):
    """Positions that NaN in the place of padding reaches, shaped as a channel's output."""
    bare = copy.deepcopy(layer)
    bare.padding, bare.padding_mode = (0,) * len(layer.kernel_size), "zeros"
    pads = [pad for pad in reversed(layer.padding) for _ in range(2)]
    return bare(F.pad(inputs, pads, value=torch.nan))[:, 0].isnan()


def slowly(layer, inputs, channel, sign):
    """Activation of a side on each image, and input x gradient of it by source: by autograd, in ``float64``."""
    layer = copy.deepcopy(layer).double()
    x = inputs.double().requires_grad_()
    out = layer(x)
    own = out[..., channel] if isinstance(layer, nn.Linear) else out[:, channel]
    if not isinstance(layer, nn.Linear) and layer.padding_mode == "zeros":
        own = own.masked_fill(beside_padding(layer, inputs.double()), 0)
    strengths = (sign * own).clamp(min=0).reshape(len(x), -1).sum(1)
    (gradient,) = torch.autograd.grad(strengths.sum(), x)
    products = x * gradient
    if isinstance(layer, nn.Linear):
        vectors = products.flatten(1, -2).sum(1) if x.ndim > 2 else products
    else:
        vectors = products.flatten(2).sum(2)[:, sources_of(layer, channel)]
    return strengths.detach(), vectors.detach()


@pytest.mark.parametrize("both", [True, False])
def test_lists_hold_what_autograd_says_of_the_strongest_images(case, both):
    layer, shape = case
    inputs, limit = noise(40, *shape), 6
    signs = None if both else [1, -1, -1, 1, 1, -1][: channel_count(layer)]
    labels = torch.arange(40) % 4
    lists = collected(layer, inputs, limit, signs=signs, labels=labels)
    assert len(lists.sides) == channel_count(layer) * (1 + both)
    for side in range(len(lists.sides)):
        channel, sign = int(lists.sides.channels[side]), int(lists.sides.signs[side])
        assert both or sign == signs[channel]
        strengths, vectors = slowly(layer, inputs, channel, sign)
        expected = strengths.topk(min(limit, int((strengths > 0).sum())))
        rows = lists.rows(side)
        assert lists.images[rows].tolist() == (expected.indices * 3 + 1).tolist()
        assert torch.equal(lists.labels[rows], labels[expected.indices])
        torch.testing.assert_close(lists.strengths[rows].double(), expected.values, rtol=1e-5, atol=1e-5)
        units = F.normalize(vectors[expected.indices], dim=1)
        torch.testing.assert_close(lists.vectors[rows].double(), units, rtol=2e-3, atol=1e-3)


def test_batches_of_any_size_give_the_same_lists(case):
    layer, shape = case
    inputs = noise(31, *shape)
    expected = collected(layer, inputs, 5, batch_size=31)
    for size in (1, 2, 13):
        found = collected(layer, inputs, 5, batch_size=size)
        assert torch.equal(found.images, expected.images)
        torch.testing.assert_close(found.strengths, expected.strengths)
        torch.testing.assert_close(found.vectors.float(), expected.vectors.float(), rtol=0, atol=1e-3)


def test_images_that_come_late_displace_weaker_ones_and_keep_their_own_vectors():
    """Every image is stronger than those before: each list is overwritten again and again."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False)
    inputs = noise(30, 4) * torch.arange(1, 31)[:, None] ** 3
    lists = collected(layer, inputs, 3, batch_size=1)
    for side in range(6):
        strengths, vectors = slowly(layer, inputs, side % 3, 1 if side < 3 else -1)
        best = strengths.topk(3).indices
        assert lists.images[lists.rows(side)].tolist() == (best * 3 + 1).tolist()
        units = F.normalize(vectors[best], dim=1)
        torch.testing.assert_close(lists.vectors[lists.rows(side)].double(), units, rtol=2e-3, atol=1e-3)


def test_two_images_that_share_all_channels_between_them():
    """The first enters the lists of channels 0 and 1, the second those of 2 and 3."""
    layer = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4))
    lists = collected(layer, torch.tensor([[1.0, 2, 0, 0], [0, 0, 3, 4]]), 3, batch_size=2)
    assert lists.images.tolist() == [1, 1, 4, 4]
    assert lists.vectors.tolist() == torch.eye(4).tolist()


def test_silent_channels_have_no_images():
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight[0], layer.bias[0] = 0, 0  # never on
        layer.weight[1], layer.bias[1] = 0, -1  # always on, downwards
        layer.weight[2], layer.bias[2] = torch.tensor([1.0, 0, 0]), 0
    inputs = torch.tensor([[2.0, 0, 0], [-1, 0, 0], [0, 0, 0], [1, 0, 0]])
    lists = collected(layer, inputs, 10)
    found = {
        (int(lists.sides.channels[side]), int(lists.sides.signs[side])): lists.images[lists.rows(side)].tolist()
        for side in range(6)
    }
    assert found == {(0, 1): [], (0, -1): [], (1, 1): [], (1, -1): [1, 4, 7, 10], (2, 1): [1, 10], (2, -1): [4]}
    dark = lists.vectors[lists.rows(4)]
    assert not dark.any(), "nothing but the bias made it fire"
    assert FREE not in lists.images.tolist()


def test_ties_are_listed_by_number_and_fill_no_more_than_the_limit():
    layer = nn.Linear(2, 2, bias=False)
    for size in (1, 3, 20):
        lists = collected(layer, torch.ones(20, 2), 4, batch_size=size)
        for side in range(4):
            own = lists.images[lists.rows(side)].tolist()
            assert len(own) in (0, 4)
            assert own == sorted(set(own))


@pytest.mark.parametrize("n", [0, 1, 3])
def test_fewer_images_than_there_is_room_for(n):
    layer = nn.Linear(5, 4)
    top = TopImages(sides_of(4, None), 5, 10)
    if n:
        with torch.no_grad():
            top.update(layer, noise(n, 5), layer(noise(n, 5)), torch.arange(n))
        assert len(top.strongest(10)) == n
    top.trim()
    lists = top.compute()
    assert len(lists.images) == 4 * n
    assert lists.labels.tolist() == [-1] * 4 * n


def test_memory_is_what_the_formula_says():
    layer, limit = nn.Conv2d(6, 5, 3), 12
    top = TopImages(sides_of(5, None), 6, limit)
    with torch.no_grad():
        for seed in range(4):
            x = noise(9, 6, 5, 5, seed=seed)
            top.update(layer, x, layer(x), torch.arange(9) + 9 * seed)
            assert sum(part.nbytes for part in top._kept.values()) == 10 * limit * (2 * 6 + 20)
    top.trim()
    states = (top.sides, top.strengths, top.images, top.labels, top.vectors)
    assert sum(part.nbytes for (part,) in states) <= 10 * limit * (2 * 6 + 28)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_any_precision_give_nearly_the_same_report_as_in_float32(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU())
    images = noise(40, 3, 6, 6)
    lists = {}
    for kind in (torch.float32, dtype):
        own = copy.deepcopy(net).to(kind)
        analysis = analysed(own, [images[:20].to(kind), images[20:].to(kind)], "2")
        lists[kind] = analysis._lists["2"]
        assert lists[kind].vectors.dtype == torch.float16
        assert lists[kind].strengths.dtype == torch.float32
        inputs = analysis._pools["2"].compute().inputs
        assert inputs.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
    for side in range(6):
        parts = [own.images[own.rows(side)] for own in lists.values()]
        first, second = (set(part.tolist()) for part in parts)
        assert len(first & second) >= 0.95 * len(first) > 0
        own = [
            dict(zip(part.tolist(), one.vectors[one.rows(side)].float(), strict=True))
            for part, one in zip(parts, lists.values(), strict=True)
        ]
        cosines = [float(F.cosine_similarity(own[0][number], own[1][number], dim=0)) for number in first & second]
        assert min(cosines) > 0.98
