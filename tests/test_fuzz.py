"""What holds for every network, plan and setting, tried on random ones."""

import copy
import tempfile
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from itertools import combinations, pairwise, product

import pytest
import torch
from hypothesis import assume, given, note
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_polydis import ChannelSplit, SplitPlan, disentangle, find_polysemantic_channels
from lightning_polydis.collection import RelevanceCollector
from lightning_polydis.layers import sources_of
from lightning_polydis.planning import LayerEvidence
from lightning_polydis.surgery import rebuild_splits, stored_plan
from tests import reference
from tests.reference_layers import Expected, own_relevance, slow

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
SIZES = {"conv1d": (9,), "conv2d": (7, 6), "conv3d": (5, 4, 4)}
CONVS = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
BATCH_NORMS = {"conv1d": nn.BatchNorm1d, "conv2d": nn.BatchNorm2d, "conv3d": nn.BatchNorm3d}
ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "silu in place": lambda: nn.SiLU(inplace=True),
}
seeds = st.integers(0, 2**20)


class Block(nn.Module):
    def __init__(self, layer, norm, activation, residual):
        super().__init__()
        self.layer, self.norm, self.activation, self.residual = layer, norm, activation, residual

    def forward(self, x):
        y = self.norm(self.layer(x))
        return self.activation(x + y if self.residual and x.shape == y.shape else y)


class Net(nn.Module):
    def __init__(self, blocks, n_classes, channels_last):
        super().__init__()
        self.blocks, self.channels_last = nn.Sequential(*blocks), channels_last
        self.head = nn.Linear(len(blocks[-1].layer.weight), n_classes)

    def forward(self, x):
        y = self.blocks(x)
        y = y.movedim(-1, 1) if self.channels_last else y
        return self.head(y.reshape(*y.shape[:2], -1).mean(2))


@st.composite
def convolutions(draw, kind, sizes, n_inputs, n_channels):
    """A convolution that fits inputs of the given sizes, and the sizes of its outputs."""
    axes = []
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    same = draw(st.booleans())
    for size in sizes:
        kernel, dilation = draw(st.integers(1, min(3, size))), draw(st.integers(1, 2))
        stride = 1 if same else draw(st.integers(1, 2))
        padding = draw(st.integers(0, min(2, size - 1)))
        if dilation * (kernel - 1) + 1 > size + (0 if same else 2 * padding):
            dilation = 1
        after = size if same else (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        axes.append((kernel, stride, dilation, padding, after))
    if (
        same
        and mode == "reflect"
        and any(d * (k - 1) // 2 + 1 >= size for (k, _, d, *_), size in zip(axes, sizes, strict=True))
    ):
        mode = "zeros"
    kernel, stride, dilation, padding, after = map(tuple, zip(*axes, strict=True))
    groups, bias = draw(st.sampled_from([1, 2])), draw(st.booleans())
    padding = "same" if same else padding
    layer = CONVS[kind](n_inputs, n_channels, kernel, stride, padding, dilation, groups, bias, padding_mode=mode)
    return layer, after


@st.composite
def networks(draw):
    """A network in float64 and images for it."""
    kind = draw(st.sampled_from(["linear", *CONVS]))
    torch.manual_seed(draw(seeds))
    between = draw(st.sampled_from([(), (3,), (2, 2)]))
    widths = draw(st.lists(st.sampled_from([4, 8, 10]), min_size=3, max_size=5))
    sizes, blocks = SIZES.get(kind, between), []
    for n_inputs, n_channels in pairwise(widths):
        norm = draw(st.sampled_from(["none", "batch", "group"]))
        if kind == "linear":
            layer = nn.Linear(n_inputs, n_channels, bias=draw(st.booleans()))
            norms = {"none": nn.Identity(), "batch": nn.Identity(), "group": nn.LayerNorm(n_channels)}
        else:
            layer, sizes = draw(convolutions(kind, sizes, n_inputs, n_channels))
            batch_norm, group_norm = BATCH_NORMS[kind](n_channels), nn.GroupNorm(2, n_channels)
            norms = {"none": nn.Identity(), "batch": batch_norm, "group": group_norm}
        activation = ACTIVATIONS[draw(st.sampled_from(list(ACTIVATIONS)))]()
        blocks.append(Block(layer, norms[norm], activation, draw(st.booleans())))
    net = Net(blocks, draw(st.integers(2, 4)), kind == "linear")
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    shape = (*between, widths[0]) if kind == "linear" else (widths[0], *SIZES[kind])
    images = torch.randn(draw(st.integers(4, 10)), *shape, dtype=torch.float64)
    note(f"{net}\nimages {list(images.shape)}")
    return net.double().eval(), images


def targets_for(draw, net: Net, images: Tensor) -> Tensor:
    labels = st.integers(0, net.head.out_features - 1)
    return torch.tensor(draw(st.lists(labels, min_size=len(images), max_size=len(images))))


def batches_of(draw, images: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    size = draw(st.integers(1, len(images)))
    return list(zip(images.split(size), targets.split(size), strict=True))


def names_in(draw, net: Net) -> list[str]:
    return [f"blocks.{index}.layer" for index in draw(st.sets(st.integers(0, len(net.blocks) - 1), min_size=1))]


def settings_for(draw) -> dict:
    method = draw(st.sampled_from(["paper", "optimized"]))
    numbers = st.sampled_from([0.9, 1.0]) | st.floats(-0.99, 1)
    return {
        "method": method,
        "relevance_threshold": draw(st.floats(0.001, 0.2) | st.sampled_from([0.03, 1.0])),
        "class_fraction": draw(st.sampled_from([1 / 3, 0.5, 2 / 3, 1.0]) | st.floats(0.01, 0.5)),
        "similarity_threshold": draw(numbers if method == "paper" else st.just("auto") | numbers),
    }


def split_for(draw, name: str, channel: int, n_inputs: int) -> ChannelSplit:
    n_concepts = draw(st.integers(2, 4))
    membership = torch.rand(n_concepts, n_inputs, generator=torch.Generator().manual_seed(draw(seeds)))
    membership = membership if draw(st.booleans()) else membership.round()
    labels = draw(st.permutations(range(n_concepts + 1)))
    concepts = [[label] for label in labels[:n_concepts]]
    concepts[-1] += labels[n_concepts:]
    rho = draw(st.none() | st.integers(1, 20).map(lambda step: step / 20))
    signs = st.lists(st.sampled_from([1, -1]), min_size=n_concepts, max_size=n_concepts)
    return ChannelSplit(name, channel, concepts, membership, rho, draw(st.none() | signs))


def plan_for(draw, net: Net) -> SplitPlan:
    splits = []
    for name in names_in(draw, net):
        weight = net.get_submodule(name).weight
        channels = draw(st.lists(st.integers(0, len(weight) - 1), min_size=1, max_size=4, unique=True))
        splits += [split_for(draw, name, channel, weight.shape[1]) for channel in channels]
    return SplitPlan(splits)


def is_close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-10 * wanted.abs().max())


def undone(net: nn.Module) -> nn.Module:
    """A copy with every split undone."""
    net = copy.deepcopy(net)
    for name in stored_plan(net).layers:
        outer, _, attribute = name.rpartition(".")
        setattr(net.get_submodule(outer), attribute, net.get_submodule(name).undo())
    return net


def is_same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(name == other and torch.equal(value, wanted) for (name, value), (other, wanted) in pairs)


def is_same_plan(found: Iterable[ChannelSplit], wanted: Iterable[ChannelSplit]) -> bool:
    first, second = (
        [{**vars(split), "membership": split.membership.tolist()} for split in plan] for plan in (found, wanted)
    )
    return first == second


@given(networks(), st.data())
def test_a_plan_changes_no_output_and_comes_undone(case, data):
    (net, images), plan = case, plan_for(data.draw, case[0])
    before = net(images)
    split = disentangle(net, plan)
    assert is_close(split(images), before)
    assert is_same(undone(split), net)
    assert torch.equal(undone(split)(images), before)


def train(layer: nn.Module) -> None:
    with torch.no_grad():
        for parameter in layer.expand.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def parts_of(layer: nn.Module) -> dict[int, Tensor]:
    """Weights of the channels that each split channel consists of."""
    channels = layer.channels.tolist() if hasattr(layer, "channels") else []
    return {channel: layer.expand.weight[layer.part_rows(channel)] for channel in channels}


@given(networks(), st.data())
def test_what_was_trained_since_is_folded(case, data):
    (net, images), plan = case, plan_for(data.draw, case[0])
    split = disentangle(net, plan)
    torch.manual_seed(data.draw(seeds))
    for name in plan.layers:
        train(split.get_submodule(name))
    assert is_close(undone(split)(images), split(images))


@given(networks(), st.data())
def test_channels_may_be_split_one_after_another(case, data):
    (net, images), plan = case, plan_for(data.draw, case[0])
    split, trained = net, data.draw(st.booleans())
    for part in plan:
        before, parts = split(images), parts_of(split.get_submodule(part.layer))
        split = disentangle(split, SplitPlan([part]))
        layer = split.get_submodule(part.layer)
        assert is_close(split(images), before)
        assert all(torch.equal(kept, parts_of(layer)[channel]) for channel, kept in parts.items())
        if trained:
            train(layer)
    assert trained or is_same(undone(split), net)
    assert is_close(undone(split)(images), split(images))
    for name in plan.layers:
        assert is_same_plan(stored_plan(split).of_layer(name), plan.of_layer(name))


@given(networks(), st.data())
def test_plans_and_split_networks_survive_being_saved(case, data):
    (net, images), plan = case, plan_for(data.draw, case[0])
    split, fresh = disentangle(net, plan), copy.deepcopy(net)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    with tempfile.TemporaryDirectory() as folder:
        plan.save(f"{folder}/plan.json")
        torch.save(split.state_dict(), f"{folder}/weights.pt")
        loaded, state = SplitPlan.load(f"{folder}/plan.json"), torch.load(f"{folder}/weights.pt", weights_only=True)
    assert is_same_plan(loaded, plan)
    assert set(rebuild_splits(fresh, state)) == set(plan.layers)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(images), split(images))
    assert is_same(undone(fresh), net)
    for name in plan.layers:
        assert is_same_plan(stored_plan(fresh).of_layer(name), plan.of_layer(name))


def has_tie(relevance: Tensor, thresholds: tuple[float, ...]) -> bool:
    """Whether rounding may decide over an image's relevance."""
    total = relevance.clamp(min=0).sum(1, keepdim=True)
    levels = [0.0, *thresholds]
    near = [(relevance - level * total).abs() < 1e-9 * total.clamp(min=1e-3) for level in levels]
    return bool((torch.stack(near).any(0) & (relevance != 0)).any())


def image_vectors(expected: Expected, method: str) -> Tensor:
    """Relevance vector of each channel for each image, ``[B, C, I]``."""
    if method == "optimized":
        return expected.vectors
    channels = range(expected.relevance.shape[1])
    return torch.stack([torch.stack([own_relevance(expected.layer, x, c) for c in channels]) for x in expected.inputs])


def found_vectors(evidence: LayerEvidence, label: int) -> Tensor:
    """Mean vectors that the package has found for a class, ``[C, I]``."""
    channels = range(len(evidence.layer.weight))
    if evidence.vectors is not None:
        return torch.cat([evidence.vectors.means(channel, [label]) for channel in channels])
    sums = evidence.statistics.mean_window_sums[label]
    weight = evidence.layer.weight.reshape(len(channels), -1, sums.shape[1])
    return torch.stack([(weight[channel] * sums[sources_of(evidence.layer, channel)]).sum(1) for channel in channels])


@given(networks(), st.data())
def test_statistics_are_those_of_each_image_by_itself(case, data):
    net, images = case
    targets, settings = targets_for(data.draw, net, images), settings_for(data.draw)
    names, batches = names_in(data.draw, net), batches_of(data.draw, images, targets)
    report = find_polysemantic_channels(net, batches, names, progress=False, calibration_samples=0, **settings)
    for name in names:
        expected, found = slow(net, name, images, targets), report._evidence[name]
        assume(not has_tie(expected.relevance, found.statistics.thresholds))
        of_class = F.one_hot(targets, net.head.out_features).T
        assert torch.equal(found.statistics.n_images, of_class.sum(1))
        for threshold, counts in zip(found.statistics.thresholds, found.statistics.counts, strict=True):
            flags = torch.tensor([reference.is_relevant(row, threshold) for row in expected.relevance])
            assert torch.equal(counts.long(), of_class @ flags.long())
        gradients = of_class.double() @ expected.gradients
        clear = gradients.abs() > 1e-5 * expected.gradients.abs().max()
        assert torch.equal(found.statistics.directions[clear], gradients[clear].sign().to(torch.int8))
        vectors = image_vectors(expected, settings["method"])
        scale = float(vectors.abs().max())
        means = {label: vectors[targets == label].mean(0) for label in targets.unique().tolist()}
        for label, wanted in means.items():
            torch.testing.assert_close(found_vectors(found, label), wanted, rtol=1e-5, atol=1e-6 * scale + 1e-12)
        if settings["similarity_threshold"] != "auto":
            sure, possible = expected_pairs(found.statistics, means, settings, scale)
            pairs = {(pair.channel, pair.class_a, pair.class_b) for pair in report.pairs if pair.layer == name}
            assert sure <= pairs <= possible


def expected_pairs(statistics, means, settings, scale) -> tuple[set, set]:
    """Flagged pairs: those that are, and those that may be where rounding decides."""
    sure, possible = set(), set()
    enough = statistics.counts[0] / statistics.n_images[:, None].double() >= settings["class_fraction"]
    for channel, (a, b) in product(range(enough.shape[1]), combinations(means, 2)):
        if not (enough[a, channel] and enough[b, channel]):
            continue
        vectors = [means[label][channel] for label in (a, b)]
        slack = 1e-5 if min(float(vector.norm()) for vector in vectors) > 1e-2 * scale else 2
        cosine = float(F.cosine_similarity(*vectors, dim=0))
        sure |= {(channel, a, b)} if cosine < settings["similarity_threshold"] - slack else set()
        possible |= {(channel, a, b)} if cosine < settings["similarity_threshold"] + slack else set()
    return sure, possible


def traces(net: nn.Module) -> list:
    """Everything about a network that an analysis might leave changed."""
    hooks = [(name, list(value)) for module in net.modules() for name, value in vars(module).items() if "hooks" in name]
    values = [(name, value.tolist(), value.dtype) for name, value in net.state_dict().items()]
    gradients = [(parameter.requires_grad, parameter.grad) for parameter in net.parameters()]
    return [hooks, values, gradients, [module.training for module in net.modules()], list(net.state_dict())]


@given(networks(), st.data())
def test_an_analysis_leaves_no_trace_and_its_plan_changes_no_output(case, data):
    net, images = case
    outputs = net(images)
    targets = targets_for(data.draw, net, images)
    batches, settings = batches_of(data.draw, images, targets), settings_for(data.draw)
    names = data.draw(st.just(None) | st.just(names_in(data.draw, net)))
    for module in [*net.modules(), *net.parameters()]:
        flag = data.draw(st.booleans())
        module.requires_grad_(flag) if isinstance(module, nn.Parameter) else setattr(module, "training", flag)
    mode = data.draw(st.sampled_from([torch.no_grad, torch.enable_grad, torch.inference_mode]))
    before, generator = traces(net), torch.get_rng_state()
    inputs = [x.clone() for x, _ in batches]
    with mode():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        plan = SplitPlan([])
        with suppress(ValueError) if names is None else nullcontext():  # there may be no layer to choose
            plan = find_polysemantic_channels(net, batches, names, progress=False, **settings).plan
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == modes
    assert traces(net) == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(x, kept) for (x, _), kept in zip(batches, inputs, strict=True))
    net.eval()
    assert torch.equal(net(images), outputs)
    assert is_close(disentangle(net, plan)(images), outputs)


@given(networks(), st.data())
def test_whoever_runs_the_network_sees_what_it_would_have_seen(case, data):
    net, images = case
    targets = targets_for(data.draw, net, images)
    collector = RelevanceCollector(net, {name: net.get_submodule(name) for name in names_in(data.draw, net)})
    with data.draw(st.sampled_from([torch.no_grad, torch.enable_grad]))():
        expected = net(images)
        collector.start(targets)
        found = net(images)
        collector.finish()
        assert found.requires_grad == expected.requires_grad
    assert torch.equal(found, expected)
