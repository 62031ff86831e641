"""The strongest images of each channel, streamed; layer inputs within a memory; what a layer shows while it runs."""

import copy
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_polydis.analyses import analysis_for
from lightning_polydis.batches import labels_of
from lightning_polydis.clusters import watching
from lightning_polydis.clusters.analysis import MAX_IMAGES, ClusterAnalysis
from lightning_polydis.clusters.evidence import _contents
from lightning_polydis.clusters.pool import InputPool
from lightning_polydis.clusters.top_images import FREE, TopImages, sides_of
from lightning_polydis.clusters.watching import LayerWatcher, Use
from lightning_polydis.forward import PassDone
from lightning_polydis.layers import channel_count, find_layer, inputs_per_channel, sources_of
from lightning_polydis.settings import AnalysisSettings
from tests.runs import n_hooks

pytestmark = [
    pytest.mark.filterwarnings("ignore:The layer inputs of only"),
    pytest.mark.filterwarnings("ignore:Only the .* strongest images"),
    pytest.mark.filterwarnings("ignore:The images do not fit"),
    pytest.mark.filterwarnings("ignore:The ``compute`` method"),
]

MEBIBYTE = 2**20

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


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


# --------------------------------------------------------------------------------------- the strongest images


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


# ------------------------------------------------------------------------------------------ layer inputs that are kept


def settings(layers="2", **kwargs):
    return AnalysisSettings(**{"layers": layers, "concepts": "clusters", **kwargs})


def analysed(net, batches, layers="2", check=lambda analysis: None, **kwargs):
    """An analysis that has seen some batches and is gathered."""
    analysis = ClusterAnalysis(net, settings(layers, **kwargs))
    with torch.no_grad():
        for batch in batches:
            batch = batch if isinstance(batch, tuple) else (batch,)
            analysis.start_batch(batch)
            net(batch[0])
            analysis.finish_batch()
            check(analysis)
    analysis.gather()
    return analysis


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU())


PER_IMAGE = 8 * 6 * 6 * 4
"""Bytes that the input of layer "2" takes for an image of 6 x 6."""


def test_with_room_for_all_every_strong_image_is_kept_as_the_layer_read_it():
    net, images = small_net(), noise(300, 3, 6, 6)
    analysis = analysed(net, images.split(50))
    lists, pool = analysis._lists["2"], analysis._pools["2"].compute()
    assert set(pool.images.tolist()) == set(lists.images.tolist())
    assert 200 <= len(pool.images) <= 300
    with torch.no_grad():
        torch.testing.assert_close(pool.inputs, net[:2](images[pool.images]))
    assert pool.pictures.shape == (len(pool.images), 3, 6, 6)


@pytest.mark.parametrize("n_images", [3, 17, 90])
def test_the_pool_stays_within_its_memory_after_every_batch(n_images):
    sizes = []

    def check(analysis):
        kept = analysis._pools["2"]._kept.values()
        sizes.append(sum(entry.inputs.nbytes for entry in kept))

    memory = n_images * PER_IMAGE
    analysis = analysed(small_net(), noise(300, 3, 6, 6).split(25), check=check, calibration_memory=memory / MEBIBYTE)
    assert max(sizes) <= memory
    pool = analysis._pools["2"].compute()
    assert pool.inputs.nbytes <= memory
    assert len(pool.images) > 0
    notes = analysis.compute().notes
    text = "The layer inputs of only 3 images fit into" if n_images == 3 else "The layer inputs of only the"
    assert any(text in note and "`calibration_memory`" in note for note in notes)


def test_those_that_stay_are_the_strongest():
    net, images = small_net(), noise(300, 3, 6, 6)
    analysis = analysed(net, images.split(25), calibration_memory=60 * PER_IMAGE / MEBIBYTE)
    lists, kept = analysis._lists["2"], set(analysis._pools["2"].compute().images.tolist())
    depth = max(depth for depth in range(1, 201) if set(lists.strongest(depth).tolist()) <= kept)
    assert depth > 3
    assert kept <= set(lists.strongest(depth + depth // 4 + 2).tolist())


def test_memory_for_less_than_one_image_keeps_none_and_gives_no_plan():
    analysis = analysed(small_net(), noise(60, 3, 6, 6).split(20), calibration_memory=0.5 * PER_IMAGE / MEBIBYTE)
    assert analysis._pools["2"].compute() is None
    assert analysis.compute().plan is None


def test_shares_of_several_layers_are_within_the_memory_together():
    net = nn.Sequential(*small_net(), nn.Conv2d(6, 4, 1))
    memory = 80 * PER_IMAGE
    with pytest.warns(UserWarning, match="strongest images of each channel of `2` fit into `calibration_memory`"):
        analysis = analysed(net, noise(300, 3, 6, 6).split(50), ["2", "4"], calibration_memory=memory / MEBIBYTE)
    pools = [analysis._pools[name].compute() for name in ("2", "4")]
    assert sum(pool.inputs.nbytes for pool in pools) <= memory
    assert all(len(pool.images) > 5 for pool in pools)


def test_vectors_are_within_half_of_the_memory_and_the_note_says_what_all_would_take():
    net = small_net()
    per_image = 6 * (2 * 8 + 20)
    memory = 100 * per_image * 2 / MEBIBYTE
    with pytest.warns(UserWarning, match=rf"Only the 100 strongest images of each channel of `2`, not {MAX_IMAGES}"):
        analysis = analysed(net, noise(300, 3, 6, 6).split(50), calibration_memory=memory, calibration_samples=0)
    lists = analysis._lists["2"]
    sizes = [len(lists.images[lists.rows(side)]) for side in range(6)]
    assert max(sizes) == 100
    assert lists.vectors.nbytes + lists.strengths.nbytes + 16 * len(lists.images) <= 100 * per_image
    assert "not 200, fit into half of" in analysis.compute().notes[0]


def test_without_samples_nothing_is_kept_and_without_limit_everything_strong():
    images = noise(100, 3, 6, 6).split(50)
    none = analysed(small_net(), images, calibration_samples=0)
    assert none._pools == {}
    assert none.compute().plan is None
    unlimited = analysed(small_net(), images, calibration_samples=None, calibration_memory=0.04)
    assert len(unlimited._pools["2"].compute().images) == 100


def test_half_precision_is_counted_as_the_single_precision_that_it_becomes():
    net = small_net().half()
    memory = 30 * PER_IMAGE
    analysis = analysed(net, noise(100, 3, 6, 6).half().split(25), calibration_memory=memory / MEBIBYTE)
    assert 0 < analysis._pools["2"].compute().inputs.nbytes <= memory


def update(pool, numbers, shape=(4, 2, 2), side=80):
    numbers = list(numbers)
    inputs = torch.stack([torch.full(shape, float(number)) for number in numbers])
    pictures = torch.rand(len(numbers), 3, side, side // 2, generator=torch.Generator().manual_seed(0))
    pool.update(numbers, inputs, torch.tensor(numbers), pictures, None)


def test_thumbnails_shrink_and_then_vanish_and_never_take_more_than_they_may():
    room = 3 * 80 * 40 * 5
    pool, sides = InputPool(room), []
    for start in range(0, 120, 2):
        update(pool, range(start, start + 2))
        assert sum(entry.picture.nbytes for entry in pool._kept.values()) <= room
        sides.append(max(max(entry.picture.shape[1:]) for entry in pool._kept.values()))
    assert sides[0] == 80
    assert sides[-1] == 0
    assert sides == sorted(sides, reverse=True)
    assert len(set(sides)) > 3
    assert all(side == 0 or side >= 32 for side in sides)
    pool.join(set(range(120)))
    found = pool.compute()
    assert found.pictures is None
    assert found.inputs[:, 0, 0, 0].tolist() == found.images.tolist() == found.labels.tolist()


def test_pictures_that_shrank_at_different_times_come_out_of_one_size():
    pool = InputPool(3 * 80 * 40 * 5)
    for start in range(0, 12, 3):
        update(pool, range(start, start + 3))
    update(pool, [20], side=40)
    pool.join(set(range(30)))
    found = pool.compute()
    assert found.pictures.shape[0] == 13
    assert found.pictures.dtype == torch.uint8
    assert 32 <= found.pictures.shape[2] < 80
    assert bool((found.pictures.flatten(1).float().std(1) > 1).all())


def test_inputs_of_another_shape_are_passed_over_and_views_keep_no_batch_alive():
    pool = InputPool(0)
    update(pool, [1, 2])
    update(pool, [3], shape=(4, 3, 3))
    assert sorted(pool._kept) == [1, 2]
    assert all(entry.inputs.untyped_storage().nbytes() == entry.inputs.nbytes for entry in pool._kept.values())
    pool.keep_only({2, 9})
    pool.join({2, 9})
    assert pool.compute().images.tolist() == [2]
    pool.reset()
    assert len(pool) == 0
    pool.join(set())
    assert pool.compute() is None


def test_images_of_several_sizes_are_analysed_and_those_of_the_first_size_kept():
    images = [noise(20, 3, 6, 6), noise(20, 3, 8, 8, seed=1), noise(20, 3, 6, 6, seed=2)]
    analysis = analysed(small_net(), images)
    assert set(analysis._lists["2"].images.tolist()) == set(range(60))
    pool = analysis._pools["2"].compute()
    assert set(pool.images.tolist()) == {*range(20), *range(40, 60)}


def test_a_note_says_that_there_is_no_room_for_pictures():
    with pytest.warns(UserWarning, match="images do not fit into an eighth of `calibration_memory`"):
        analysis = analysed(small_net(), noise(60, 3, 40, 40).split(20), calibration_memory=0.5)
    assert analysis._pools["2"].compute().pictures is None


# ---------------------------------------------------------------------------------------- what follows the layer


def watched(net, x, *names, **kwargs):
    layers = {name: net.get_submodule(name) for name in names}
    watcher = LayerWatcher(net, layers)
    watcher.start(**kwargs)
    with torch.no_grad():
        output = net(x)
    return watcher, watcher.finish(), output


class Reading(nn.Module):
    """A convolution and something that reads it."""

    def __init__(self, rest, read=lambda self, x: self.rest(x)):
        super().__init__()
        self.conv, self.rest, self.read = nn.Conv2d(3, 4, 3, padding=1), rest, read
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(self.read(self, self.conv(x)))


def norm(*weights):
    norm = nn.BatchNorm2d(4).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(weights))
    return norm


TURNED = (1.0, -0.5, 2.0, -3.0)
SIGNS = {
    "ReLU": (nn.ReLU(), [1, 1, 1, 1]),
    "in-place ReLU": (nn.ReLU(inplace=True), [1, 1, 1, 1]),
    "GELU": (nn.GELU(), [1, 1, 1, 1]),
    "SiLU": (nn.SiLU(inplace=True), [1, 1, 1, 1]),
    "batch norm that turns two round": (nn.Sequential(norm(*TURNED), nn.ReLU()), [1, -1, 1, -1]),
    "in-place ReLU behind batch norm": (nn.Sequential(norm(*TURNED), nn.ReLU(inplace=True)), [1, -1, 1, -1]),
    "two batch norms": (nn.Sequential(norm(*TURNED), norm(-1.0, -1.0, 1.0, 1.0), nn.ReLU()), [-1, 1, 1, -1]),
    "batch norm without weights": (nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.ReLU()), [1, 1, 1, 1]),
    "batch norm alone": (norm(*TURNED), None),
    "leaky": (nn.LeakyReLU(), None),
    "tanh": (nn.Tanh(), None),
    "nothing": (nn.Identity(), None),
    "pooled before": (nn.Sequential(nn.AvgPool2d(2), nn.ReLU()), None),
}


@pytest.mark.parametrize("rehearsal", [False, True])
@pytest.mark.parametrize(("rest", "expected"), SIGNS.values(), ids=SIGNS)
def test_what_reads_the_layer_tells_in_which_direction_its_channels_are_used(rest, expected, rehearsal):
    net, x = Reading(rest), noise(2, 3, 6, 6)
    net.eval()
    layer = {"conv": net.conv}
    watcher = LayerWatcher(net, layer)
    watcher.start(rehearsal=rehearsal)
    try:
        with torch.no_grad():
            net(x)
    except PassDone:
        assert rehearsal
    assert torch.is_grad_enabled()
    seen = watcher.finish()["conv"]
    use = watcher.uses["conv"]
    signs = None if use is None else use.signs()
    assert (None if signs is None else signs.tolist()) == expected
    assert torch.equal(seen.inputs, x)
    torch.testing.assert_close(seen.outputs, net.conv(x), msg="an in-place function overwrote it")
    assert n_hooks(net) == 0


def residual(self, x):
    return self.rest(x + 1) + x


def zeroed(self, x):
    x[:, 0] = 0
    return x.relu()


def overwritten(self, x):
    rectified = F.relu(x, inplace=True)
    return x.tanh() + rectified - x


def normed(self, x):
    return F.batch_norm(x, torch.zeros(4), torch.ones(4), torch.tensor(TURNED))


def looked_at(self, x):
    assert (x.shape, x.device.type, x.dtype, x.is_contiguous(), len(x)) == ((2, 4, 6, 6), "cpu", x.dtype, True, 2)
    return x.relu()


FUNCTIONS = {
    "residual": (residual, None),
    "method": (lambda self, x: x.relu(), [1] * 4),
    "in-place method": (lambda self, x: x.relu_(), [1] * 4),
    "function": (lambda self, x: F.relu(x), [1] * 4),
    "in-place function": (lambda self, x: F.relu_(x), [1] * 4),
    "function told to be in-place": (lambda self, x: F.relu(x, inplace=True), [1] * 4),
    "torch": (lambda self, x: torch.relu(x), [1] * 4),
    "GELU": (lambda self, x: F.gelu(x), [1] * 4),
    "after a look at its shape": (lambda self, x: x.view(x.shape).relu() if x.ndim == 9 else x.relu(), [1] * 4),
    "leaky": (lambda self, x: F.leaky_relu(x), None),
    "both directions": (lambda self, x: torch.cat([x.relu(), (-x).relu()], 1)[:, 2:6], None),
    "beside itself": (lambda self, x: x.relu() + x, None),
    "beside itself by name": (lambda self, x: torch.add(x.relu(), other=x), None),
    "before and after": (lambda self, x: x.tanh() + x.relu(), None),
    "twice": (lambda self, x: x.relu() + F.gelu(x), [1] * 4),
    "behind batch norm and without": (lambda self, x: normed(self, x).relu() + x.relu(), None),
    "behind batch norm, beside itself": (lambda self, x: normed(self, x).relu() + x, None),
    "behind batch norm, beside that": (lambda self, x: (y := normed(self, x)).relu() + y, None),
    "behind batch norm twice": (lambda self, x: normed(self, x).relu() + F.silu(normed(self, x)), [1, -1, 1, -1]),
    "batch norm that nobody reads": (lambda self, x: (normed(self, x), x.relu())[1], None),
    "after it was overwritten": (overwritten, [1] * 4),
    "in place, by something else": (lambda self, x: F.leaky_relu(x, 0.1, True).relu(), None),
    "partly zeroed": (zeroed, None),
    "after looks at its properties": (looked_at, [1] * 4),
    "handed on": (lambda self, x: F.dropout(x.contiguous(), 0.5, False).relu(), [1] * 4),
    "pooled": (lambda self, x: F.max_pool2d(x, 2).relu(), None),
}


@pytest.mark.parametrize(("read", "expected"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_tell_as_much_as_modules(read, expected):
    net, x = Reading(nn.ReLU(), read), noise(2, 3, 6, 6)
    watcher, seen, _ = watched(net, x, "conv")
    use = watcher.uses["conv"]
    signs = None if use is None else use.signs()
    assert (None if signs is None else signs.tolist()) == expected
    with torch.no_grad():
        torch.testing.assert_close(seen["conv"].outputs, net.conv(x))


def late(self, x):
    y = self.rest(x)
    for _ in range(3):
        y = y * 0.5
    return y + x


@pytest.mark.parametrize("rehearsal", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_somebody_who_reads_the_output_much_later_counts_too(context, rehearsal):
    net = Reading(nn.ReLU(), late)
    watcher = LayerWatcher(net, {"conv": net.conv})
    watcher.start(rehearsal=rehearsal)
    with context(), suppress(PassDone):
        net(noise(2, 3, 6, 6))
    watcher.finish()
    assert watcher.uses["conv"] is None


def test_in_inference_mode_readers_are_seen_too():
    for read, expected in ((looked_at, [1] * 4), (FUNCTIONS["in place, by something else"][0], None), (zeroed, None)):
        net = Reading(nn.ReLU(), read)
        watcher = LayerWatcher(net, {"conv": net.conv})
        watcher.start()
        with torch.inference_mode():
            net(noise(2, 3, 6, 6))
        watcher.finish()
        use = watcher.uses["conv"]
        signs = None if use is None else use.signs()
        assert (None if signs is None else signs.tolist()) == expected


def test_a_batch_norm_of_something_else_than_channels_disturbs_nobody():
    """Without a batch dimension ``[C, L]`` looks like ``[B, C]``."""
    net = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(6).eval(), nn.ReLU())
    watcher, _, output = watched(net, noise(3, 6), "0")
    assert watcher.uses["0"] is None
    with torch.no_grad():
        assert torch.equal(output, net(noise(3, 6)))


def test_what_goes_wrong_in_looking_at_readers_is_told_after_the_pass(monkeypatch):
    def fail(values):
        raise OSError("on purpose")

    monkeypatch.setattr(watching, "_wide", fail)
    net = Reading(nn.Sequential(norm(*TURNED), nn.ReLU()))
    watcher = LayerWatcher(net, {"conv": net.conv})
    watcher.start()
    net(noise(2, 3, 6, 6))
    with pytest.raises(OSError, match="on purpose"):
        watcher.finish()
    assert watcher.uses["conv"] is None
    assert torch._C._len_torch_function_stack() == n_hooks(net) == 0


def test_another_default_device_does_not_matter():
    net, x = Reading(nn.Sequential(norm(*TURNED), nn.ReLU())), noise(2, 3, 6, 6)
    with torch.device("meta"):
        watcher, _, _ = watched(net, x, "conv")
    assert watcher.uses["conv"].signs().tolist() == [1, -1, 1, -1]
    assert watcher.uses["conv"].signs().dtype == torch.long
    assert torch._C._len_torch_function_stack() == 0


class Counting(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", [False, True])
def test_modes_that_the_network_enters_and_leaves_are_its_own(device):
    """A mode takes off the top one when it is left, whatever that is."""
    inner, outer, early = Counting(), Counting(), Counting()

    def around_the_layer(self, x):
        with outer:
            x = self.conv(x)
        with torch.device("cpu") if device else nullcontext(), inner:
            x = self.rest(x)
        return x

    class Entering(Reading):
        def forward(self, x):
            return self.head(around_the_layer(self, x))

    net = Entering(nn.ReLU())
    watcher = LayerWatcher(net, {"conv": net.conv})
    with early, torch.device("cpu") if device else nullcontext():
        watcher.start()
        net(noise(2, 3, 6, 6))
        n_modes = torch._C._len_torch_function_stack()
        watcher.finish()
        assert torch._C._len_torch_function_stack() == n_modes - 1 == 1 + device
        torch.ones(1).add(1)
    assert torch._C._len_torch_function_stack() == 0
    assert watcher.uses["conv"].signs().tolist() == [1] * 4
    assert outer.names == ["conv2d"], "not what watching takes"
    assert inner.names == ["relu"]
    assert early.names[-1] == "add"


def test_two_watchers_of_a_layer_are_no_readers_of_its_output():
    net = Reading(nn.ReLU())
    watchers = [LayerWatcher(net, {"conv": net.conv}) for _ in range(2)]
    for watcher in watchers:
        watcher.start()
    net(noise(2, 3, 6, 6))
    for watcher in watchers:
        watcher.finish()
        assert watcher.uses["conv"].signs().tolist() == [1] * 4
    assert torch._C._len_torch_function_stack() == 0


def test_a_batch_norm_over_tokens_says_nothing_about_features():
    """On ``[B, T, C]`` a batch norm normalises tokens, not the channels of a linear layer."""
    norm = nn.BatchNorm1d(5).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([-1.0, 1, 1, 1, 1]))
    for n_channels in (3, 5):
        net = nn.Sequential(nn.Linear(4, n_channels), norm, nn.ReLU())
        watcher, _, _ = watched(net, noise(2, 5, 4), "0")
        assert watcher.uses["0"] is None
        analysed(net, [noise(30, 5, 4)], "0")


def test_linear_layers_in_front_of_batch_norm_are_turned_too():
    norm = nn.BatchNorm1d(3).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([-1.0, 1, -1]))
    watcher, _, _ = watched(nn.Sequential(nn.Linear(4, 3), norm, nn.ReLU()), noise(2, 4), "0")
    assert watcher.uses["0"].signs().tolist() == [-1, 1, -1]


def test_a_batch_norm_tells_from_where_on_a_channel_is_on():
    """Before the shift the output is never positive; behind it, half of the time."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval().requires_grad_(False)
    net[0].bias.fill_(-5.0)
    net[1].running_mean.fill_(-5.0)
    net[1].running_var.uniform_(0.5, 2)
    net[1].weight.copy_(torch.tensor([1.0, -0.5, 2.0, -1.0]))
    net[1].bias.copy_(torch.tensor([0.1, 0.0, -0.2, 0.3]))
    x = noise(60, 3, 4, 4)
    analysis = analysed(net, [x], "0")
    lists = analysis._lists["0"]
    outputs, rectified = net[0](x).double().flatten(2), net(x).flatten(2)
    for side in range(4):
        assert lists.sides.signs[side] == net[1].weight[side].sign()
        above = lists.sides.signs[side] * (outputs[:, side] - lists.sides.zero(side))
        assert torch.equal(above > 1e-5, rectified[:, side] > 1e-5)
        strengths = above.clamp(min=0).sum(1)
        rows = lists.rows(side)
        torch.testing.assert_close(lists.strengths[rows], strengths[lists.images[rows]].float(), rtol=1e-4, atol=1e-4)
        assert rows.stop - rows.start == int((strengths > 1e-6).sum())


def test_only_the_used_direction_of_a_turned_channel_is_collected():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), norm(*TURNED), nn.ReLU())
    analysis = analysed(net, [noise(30, 3, 4, 4)], "0")
    sides = analysis._lists["0"].sides
    assert (sides.channels.tolist(), sides.signs.tolist()) == ([0, 1, 2, 3], [1, -1, 1, -1])


def test_the_output_of_the_network_is_bit_for_bit_the_same_and_later_passes_too():
    net, x = small_net().train(), noise(3, 3, 6, 6)
    plain = net(x)
    watcher = LayerWatcher(net, {"2": net[2], "0": net[0]})
    for _ in range(3):
        watcher.start()
        output = net(x)
        seen = watcher.finish()
        assert torch.equal(output, plain)
        assert output.requires_grad
        assert output.grad_fn.name() == plain.grad_fn.name()
        assert not any(part.requires_grad for one in seen.values() for part in one)
        assert watcher.uses["2"].signs().tolist() == [1] * 6
        assert n_hooks(net) == 0


def test_a_layer_that_runs_twice_is_refused_in_words():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    net.append(net[0])
    watcher = LayerWatcher(net, {"0": net[0]})
    watcher.start()
    net(noise(2, 4))
    with pytest.raises(ValueError, match="layer `0` to run once in each forward pass, but it ran twice"):
        watcher.finish()
    assert n_hooks(net) == 0
    assert watcher._seen == {}


def test_layers_that_do_not_run_are_named_unless_they_ran_before():
    class Choosy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.use = nn.Linear(4, 4), nn.Linear(4, 4), {"first"}

        def forward(self, x):
            for name in sorted(self.use):
                x = getattr(self, name)(x)
            return x

    net, x = Choosy(), noise(2, 4)
    watcher = LayerWatcher(net, {"first": net.first, "second": net.second})
    watcher.start()
    net(x)
    with pytest.raises(ValueError, match="`second` did not run, or in a function that is compiled"):
        watcher.finish()
    net.use = {"first", "second"}
    watcher.start()
    net(x)
    assert list(watcher.finish()) == ["first", "second"]
    net.use = set()
    watcher.start()
    net(x)
    assert watcher.finish() == {}, "a pass that leaves all of them out, as every other step may"
    net.use = {"first"}
    watcher.start()
    net(x)
    with pytest.raises(ValueError, match="`second` did not run"):
        watcher.finish()


def test_an_exception_in_the_network_leaves_hooks_that_close_takes_off():
    class Fails(nn.Module):
        def forward(self, x):
            raise KeyError("the user's own")

    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), Fails())
    watcher = LayerWatcher(net, {"0": net[0]})
    watcher.start()
    with pytest.raises(KeyError, match="the user's own"):
        net(noise(2, 4))
    assert torch._C._len_torch_function_stack() == 1
    watcher.close()
    assert torch._C._len_torch_function_stack() == n_hooks(net) == 0
    assert watcher._outputs == []


def test_a_rehearsal_stops_behind_the_layers_and_what_reads_them():
    ran = []

    class Note(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            ran.append(self.name)
            return x * 1

    net = nn.Sequential(nn.Linear(4, 4), Note("between"), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    net.extend([nn.Linear(4, 4), Note("after")]).eval()
    watcher = LayerWatcher(net, {"0": net[0], "2": net[2]})
    for _ in range(2):
        watcher.start(rehearsal=True)
        with pytest.raises(PassDone), torch.no_grad():
            net(noise(2, 4))
        assert list(watcher.finish()) == ["0", "2"]
        assert watcher.uses["2"].signs().tolist() == [1] * 4
    assert ran == ["between"] * 2
    assert n_hooks(net) == 0


def test_after_a_stopped_rehearsal_work_on_the_way_out_is_done_undisturbed():
    """Gradients are turned on again, buffers put back: functions too, which must not stop anything once more."""
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    watcher = LayerWatcher(net, {"0": net[0]})
    watcher.start(rehearsal=True)
    try:
        with torch.no_grad():
            net(noise(2, 4))
    except PassDone:
        buffer = torch.zeros(3).copy_(torch.ones(3))
    assert torch.is_grad_enabled()
    assert buffer.tolist() == [1, 1, 1]
    assert list(watcher.finish()) == ["0"]
    assert torch._C._len_torch_function_stack() == 0


def test_nothing_watches_functions_before_the_layer_or_after_the_first_pass():
    """Where something does, attention computes by another kernel."""

    class Ask(nn.Module):
        def forward(self, x):
            asked.append(torch.overrides.has_torch_function((x,)))
            return x

    asked = []
    net = nn.Sequential(Ask(), nn.Linear(4, 4), Ask())
    watcher = LayerWatcher(net, {"1": net[1]})
    for _ in range(2):
        watcher.start()
        net(noise(2, 4))
        watcher.finish()
    assert asked == [False, True, False, False]


def test_inputs_that_the_network_overwrites_later_are_seen_as_they_were():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            read = x * 1
            y = self.fc(read)
            read.zero_()
            return y

    x = noise(2, 4)
    _, seen, _ = watched(Overwrites(), x, "fc")
    assert torch.equal(seen["fc"].inputs, x)


def test_keyword_inputs_are_seen():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(input=x)

    _, seen, output = watched(Named(), noise(2, 4), "fc")
    assert torch.equal(seen["fc"].outputs, output)


# --------------------------------------------------------------------------------------------- the analysis's batches


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_batches_that_hold_nan_or_infinity_are_left_out_and_counted(bad):
    net, images = small_net(), noise(60, 3, 6, 6)
    spoilt = images[20:40].clone()
    spoilt[3, 0, 0, 0] = bad
    analysis = analysed(net, [images[:20], spoilt, images[40:]])
    clean = analysed(net, [images[:20], images[40:]])
    assert torch.equal(analysis._lists["2"].images, clean._lists["2"].images)
    report = analysis.compute()
    assert (report.n_images, report.n_images_left_out) == (40, 20)
    assert "20 images were left out because their batch held NaN or infinity." in report.notes


def test_few_images_are_noted_and_no_data_is_refused():
    report = analysed(small_net(), [noise(20, 3, 6, 6)]).compute()
    assert any("there were only 20 images" in note for note in report.notes)
    assert report.channels == []
    with pytest.raises(ValueError, match="at least one batch to analyse, but the data was empty"):
        analysed(small_net(), []).compute()


def test_layers_that_do_not_agree_on_the_number_of_images_are_refused_in_words():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.whole, self.parts = nn.Linear(8, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.parts(self.whole(x).relu().reshape(-1, 2, 4).repeat(3, 1, 1))

    net = Windows()
    for names in (["whole", "parts"], ["parts", "whole"]):
        with pytest.raises(ValueError, match="`parts`.*images"):
            analysed(net, [noise(10, 8)], names)


def test_numbers_of_images_go_on_from_batch_to_batch():
    analysis = analysed(small_net(), noise(50, 3, 6, 6).split(7))
    assert set(analysis._lists["2"].images.tolist()) == set(range(50))


def test_release_frees_what_was_kept_and_takes_hooks_off():
    net = small_net()
    analysis = analysed(net, [noise(30, 3, 6, 6)])
    analysis.start_batch((noise(2, 3, 6, 6),))
    analysis.release()
    assert n_hooks(net) == 0
    assert len(analysis._pools["2"]) == 0
    assert analysis._top["2"].vectors == []
    assert analysis._top["2"]._kept == {}


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"layers": None, "concepts": "clusters"}, {"layers": "2", "concepts": "clusters"}),
        ({"layers": None, "concepts": "classes"}, {"layers": "0", "concepts": "clusters"}),
        ({"layers": None, "concepts": "clusters"}, {"layers": "0", "concepts": "classes"}),
    ],
)
def test_a_pass_that_is_made_again_is_for_one_analysis_alone(first, second, order):
    net, batch = classifier(), (noise(40, 8), torch.arange(40) % 3)
    analyses = [analysis_for(net, AnalysisSettings(**own)) for own in (first, second)][::order]
    for _ in range(2):
        for analysis in analyses:
            analysis.start_batch(batch)
        with torch.no_grad():
            net(batch[0])
        for analysis in analyses:
            analysis.finish_batch()
    for analysis in analyses:
        analysis.gather()
        assert analysis.compute().n_images == 80
    assert torch._C._len_torch_function_stack() == n_hooks(net) == 0


def test_a_pass_that_fails_when_it_is_made_again_leaves_nothing_behind():
    class Once(nn.Module):
        n_calls = 0

        def forward(self, x):
            self.n_calls += 1
            if self.n_calls == 2:
                raise OSError("only once")
            return x * 1

    net = classifier().insert(4, Once())
    analysis = ClusterAnalysis(net, settings(None))
    analysis.start_batch((noise(9, 8),))
    net(noise(9, 8))
    with pytest.raises(OSError, match="only once"):
        analysis.finish_batch()
    analysis.close()
    assert torch._C._len_torch_function_stack() == n_hooks(net) == 0
    other = analysed(net, [noise(9, 8)])
    assert other.compute().n_images == 9, "nobody is shut out for good"


# --------------------------------------------------------------------------------------------------- classes, if any

CLASSES = torch.tensor([3, 0, 1])
X = torch.zeros(3, 3, 2, 2)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((X, CLASSES), [3, 0, 1]),
        ((X, CLASSES.int()), [3, 0, 1]),
        ({"image": X, "labels": CLASSES}, [3, 0, 1]),
        (SimpleNamespace(image=X, y=CLASSES), [3, 0, 1]),
        ((X,), None),
        (X, None),
        (None, None),
        ("text", None),
        ({"image": X}, None),
        ((X, CLASSES.float()), None),
        ((X, torch.rand(3, 4)), None),
        ((X, CLASSES > 0), None),
        ((X, CLASSES.new_zeros(3, 2, 2)), None),
        ((X, CLASSES.new_zeros(0)), None),
        ((X, torch.tensor([0, -100, 1])), None),
        ((X, ["cat", "dog", "cat"]), None),
        ((X, [{"boxes": torch.zeros(2, 4), "labels": torch.ones(2)}] * 3), None),
        ((X, None), None),
        ([X, X], None),
    ],
)
def test_classes_are_taken_where_there_are_any_and_nothing_else_is_a_mistake(batch, expected):
    found = labels_of(batch, settings())
    assert (None if found is None else found.tolist()) == expected


def test_a_function_for_targets_is_asked_and_its_mistakes_are_told():
    assert labels_of({"z": CLASSES}, settings(target_fn=lambda batch: batch["z"])).tolist() == [3, 0, 1]
    with pytest.raises(ValueError, match="`target_fn` raised KeyError: 'z'"):
        labels_of({"y": CLASSES}, settings(target_fn=lambda batch: batch["z"]))
    with pytest.raises(ValueError, match="integer class indices, but got torch.float32"):
        labels_of({"y": CLASSES}, settings(target_fn=lambda batch: batch["y"].float()))


def test_contents_are_the_most_frequent_classes_and_numbers_that_are_no_classes_cost_nothing():
    labels = torch.tensor([4, 2, 4, 4, 2, 9, 1, 7, 8, 4])
    assert _contents(labels) == [(4, 0.4), (2, 0.2), (1, 0.1), (7, 0.1), (8, 0.1)]
    assert _contents(torch.tensor([1, -1])) == []
    assert _contents(labels[:0]) == []
    assert _contents(torch.tensor([2**50, 3, 2**50, 2**50])) == [(2**50, 0.75), (3, 0.25)]


def test_labels_that_are_one_for_each_box_are_not_taken_for_those_of_images():
    analysis = analysed(small_net(), [(noise(30, 3, 6, 6), torch.arange(70) % 3)])
    assert analysis._lists["2"].labels.unique().tolist() == [-1]


def test_a_layer_that_does_not_exist_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match=r"Closest names: `2`"):
        ClusterAnalysis(small_net(), settings("22"))
    with pytest.raises(ValueError, match="`1` to be a convolution or `nn.Linear`, but got `ReLU`"):
        ClusterAnalysis(small_net(), settings("1"))
    with pytest.raises(ValueError, match="`logits_module`"):
        ClusterAnalysis(small_net(), settings(None, logits_module="nope"))


def test_find_layer_is_the_one_that_is_watched():
    net = small_net()
    assert ClusterAnalysis(net, settings())._layers["2"] is find_layer(net, "2")
