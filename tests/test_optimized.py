"""``method="optimized"`` from the network to the split network."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_polydis import (
    PolysemanticityReport,
    SplitPlan,
    disentangle,
    evaluate_splits,
    find_polysemantic_channels,
)
from lightning_polydis.surgery import rebuild_splits, stored_plan
from tests import reference
from tests.networks import BottleneckNet, conv_relu_net, make_batches, make_images, train_briefly

SETTINGS = {"relevance_threshold": 0.02, "class_fraction": 0.3, "similarity_threshold": 0.9, "progress": False}
AUTO = {**SETTINGS, "relevance_threshold": 1e-3, "similarity_threshold": "auto"}


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return train_briefly(conv_relu_net())


@pytest.fixture(scope="module")
def bottleneck():
    torch.manual_seed(0)
    return train_briefly(BottleneckNet())


def as_dict(pairs):
    return {(pair.channel, pair.class_a, pair.class_b): pair.cosine_similarity for pair in pairs}


def find(net, layer="2", batches=None, **settings):
    return find_polysemantic_channels(net, make_batches() if batches is None else batches, layer, **settings)


@pytest.mark.parametrize(("name", "layer"), [("trained", "2"), ("trained", "4"), ("bottleneck", "blocks.1.conv3")])
def test_the_pairs_are_those_of_the_class_conditional_vectors(name, layer, request):
    net = request.getfixturevalue(name)
    report = find(net, layer, **SETTINGS)
    expected = reference.class_pairs(net, layer, *make_images(), 0.02, 0.3, 0.9)
    assert len(expected) > 3, "the case would show nothing"
    found = as_dict(report.pairs)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=1e-4)
    assert found != pytest.approx(as_dict(find(net, layer, method="paper", **SETTINGS).pairs), abs=1e-2), (
        "the two methods' vectors differ"
    )


def test_directions_are_those_of_the_classes_and_reach_the_plan(bottleneck):
    layer = "blocks.1.conv3"
    plan = find(bottleneck, layer, **SETTINGS).plan
    images, targets = make_images()
    for split in plan.splits[:6]:
        for concept, sign in zip(split.concepts, split.directions, strict=True):
            signs = [reference.direction(bottleneck, layer, images, targets, label, split.channel) for label in concept]
            assert sign == (1 if sum(signs) >= 0 else -1)
    assert {sign for split in plan.splits[:6] for sign in split.directions} == {1, -1}
    assert all(split.rho is None for split in plan)


def test_memberships_in_the_plan_are_the_minimum_over_the_first_half_of_the_samples(trained):
    report = find(trained, calibration_samples=6, **SETTINGS)
    images, targets = make_images()
    rows = torch.cat([(targets == label).nonzero()[:6:2, 0] for label in range(4)])
    with torch.no_grad():
        inputs = trained[:2](images[rows])
    split = report.plan.splits[0]

    def loss(concept, membership):
        arguments = (split.concepts, split.directions, inputs, targets[rows], concept, membership)
        return reference.membership_loss(trained[2], split.channel, *arguments, 3.0)

    for concept, membership in enumerate(split.membership.double()):
        values = membership.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(concept, values), values)
        inside = torch.where(
            membership <= 0, slope.clamp(max=0), torch.where(membership >= 1, slope.clamp(min=0), slope)
        )
        (first,) = torch.autograd.grad(loss(concept, (ones := torch.ones(8).double().requires_grad_())), ones)
        assert float(inside.abs().max()) < 1e-4 * float(first.abs().max())
    assert bool(((split.membership > 0.05) & (split.membership < 0.95)).any())


def same_memberships(found, expected, atol=1e-4):
    """Whatever the order of channels and concepts."""

    def by_concept(plan):
        return {
            (split.channel, tuple(concept)): (row, sign)
            for split in plan
            for concept, row, sign in zip(split.concepts, split.membership, split.directions, strict=True)
        }

    found, expected = by_concept(found), by_concept(expected)
    assert found.keys() == expected.keys()
    for key, (row, sign) in expected.items():
        torch.testing.assert_close(found[key][0], row, rtol=0, atol=atol)
        assert found[key][1] == sign
    return len(found)


@pytest.mark.parametrize("settings", [SETTINGS, AUTO], ids=["fixed", "auto"])
def test_the_order_of_classes_changes_nothing(trained, settings):
    order = torch.tensor([2, 0, 3, 1])  # class k becomes class order[k]
    net = copy.deepcopy(trained)
    with torch.no_grad():
        net[8].weight[order] = trained[8].weight.clone()
        net[8].bias[order] = trained[8].bias.clone()
    expected = find(trained, **settings)
    found = find(net, batches=[(x, order[y]) for x, y in make_batches()], **settings)
    assert expected.pairs

    def renamed(report):
        return {(c, *sorted([int(order[a]), int(order[b])])): v for (c, a, b), v in as_dict(report.pairs).items()}

    assert as_dict(found.pairs) == pytest.approx(renamed(expected), abs=1e-5)
    for split in expected.plan:
        split.concepts[:] = [sorted(int(order[label]) for label in concept) for concept in split.concepts]
    assert same_memberships(found.plan, expected.plan) >= 2 * len(expected.channels)


@pytest.mark.parametrize("settings", [SETTINGS, AUTO], ids=["fixed", "auto"])
@pytest.mark.parametrize("factor", [0.01, 30.0])
def test_the_scale_of_a_channel_changes_nothing(trained, factor, settings):
    expected = find(trained, **settings)
    net = copy.deepcopy(trained)
    with torch.no_grad():
        for channel in {pair.channel for pair in expected.pairs}:
            net[2].weight[channel] *= factor
            net[2].bias[channel] *= factor
            net[4].weight[:, channel] /= factor
    found = find(net, **settings)
    assert as_dict(found.pairs) == pytest.approx(as_dict(expected.pairs), abs=1e-5)
    for one, two in zip(found.pairs, expected.pairs, strict=True):
        assert one.interval == pytest.approx(two.interval, abs=1e-4)
    assert same_memberships(found.plan, expected.plan, atol=1e-3) > 0


@pytest.mark.parametrize("settings", [SETTINGS, AUTO], ids=["fixed", "auto"])
def test_a_twin_of_a_channel_is_flagged_alike(trained, settings):
    settings = {**settings, "relevance_threshold": 1e-3}
    expected = find(trained, **settings)
    twin_of = expected.pairs[0].channel
    net = copy.deepcopy(trained)
    net[2], net[4] = nn.Conv2d(8, 13, 3, stride=2, padding=2, dilation=2), nn.Conv2d(13, 10, 1, bias=False)
    with torch.no_grad():
        which = torch.tensor([*range(12), twin_of])
        net[2].weight.copy_(trained[2].weight[which])
        net[2].bias.copy_(trained[2].bias[which])
        net[4].weight.copy_(trained[4].weight[:, which])
        net[4].weight[:, [twin_of, 12]] /= 2
    torch.testing.assert_close(net(make_images()[0]), trained(make_images()[0]), rtol=1e-4, atol=1e-5)
    found = find(net, **settings)

    def of(report, channel):
        return {(a, b): value for (c, a, b), value in as_dict(report.pairs).items() if c == channel}

    assert of(found, 12)
    assert of(found, 12) == pytest.approx(of(found, twin_of), abs=1e-6)
    if settings["similarity_threshold"] != "auto":  # the layer that it is measured by has one channel more
        assert of(found, 12) == pytest.approx(of(expected, twin_of), abs=1e-5)
    one, two = (next(split for split in found.plan if split.channel == channel) for channel in (twin_of, 12))
    assert (one.concepts, one.directions) == (two.concepts, two.directions)
    torch.testing.assert_close(one.membership, two.membership, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "layer"), [("trained", "2"), ("trained", "4"), ("bottleneck", "blocks.1.conv3")])
def test_splitting_leaves_the_network_what_it_was(name, layer, request):
    net = copy.deepcopy(request.getfixturevalue(name)).double()
    batches = [(x.double(), y) for x, y in make_batches()]
    report = find(net, layer, batches, **SETTINGS)
    images = make_images(seed=3)[0].double()
    assert len(report.plan) > 1
    with torch.no_grad():
        before = net(images)
        split = disentangle(net, report.plan)
        assert split.get_submodule(layer).channels.tolist() == [entry.channel for entry in report.plan]
        during = split(images)
        name, _, child = layer.rpartition(".")
        setattr(split.get_submodule(name), child, split.get_submodule(layer).undo())
        after = split(images)
    scale = float(before.abs().max())
    torch.testing.assert_close(during, before, rtol=0, atol=1e-12 * scale)
    assert torch.equal(after, before)


@pytest.mark.parametrize("settings", [SETTINGS, AUTO], ids=["fixed", "auto"])
def test_plan_and_report_come_back_from_their_files(bottleneck, settings, tmp_path):
    report = find(bottleneck, "blocks.1.conv3", **settings)
    assert report.pairs
    report.plan.save(tmp_path / "plan.json")
    report.save(tmp_path / "report.json")
    plan, loaded = SplitPlan.load(tmp_path / "plan.json"), PolysemanticityReport.load(tmp_path / "report.json")
    assert plan == report.plan
    for one, two in zip(plan, report.plan, strict=True):
        assert one.directions == two.directions
        assert one.directions is not None
        assert torch.equal(one.membership, two.membership)
    assert loaded.pairs == report.pairs
    assert loaded.channels == report.channels
    assert loaded.settings == report.settings
    threshold = settings["similarity_threshold"]
    assert loaded.settings["similarity_threshold"] == threshold
    for pair in loaded.pairs:
        lower, upper = pair.interval
        assert -1 <= lower <= upper <= 1
    for channel in loaded.channels:
        assert 0 <= channel.reliability <= 1
        assert channel.threshold == threshold or threshold == "auto"
        own = [pair for pair in loaded.pairs if pair.channel == channel.channel]
        assert [pair.is_clear for pair in own] == [pair.interval[1] < channel.threshold for pair in own]
        assert channel.is_clear == any(pair.is_clear for pair in own)


def test_a_split_layer_keeps_its_directions_and_memberships_in_its_state(bottleneck):
    plan = find(bottleneck, "blocks.1.conv3", **SETTINGS).plan
    split = disentangle(bottleneck, plan)
    again = copy.deepcopy(bottleneck)
    with torch.no_grad():
        again.blocks[1].conv3.weight.zero_()
    rebuild_splits(again, split.state_dict())
    again.load_state_dict(split.state_dict())
    expected = {entry.channel: entry for entry in plan}
    for entry in stored_plan(again):
        assert entry == expected.pop(entry.channel)
    assert not expected
    images = make_images(seed=3)[0]
    assert torch.equal(again(images), split(images))


def test_quality_is_measured_in_the_concepts_directions(bottleneck):
    """The same splits without directions are judged by positive values, which this layer's classes do not all use."""
    report = find(bottleneck, "blocks.1.conv3", **SETTINGS)
    held_out = [make_images(seed=0, n=96)]
    found = evaluate_splits(bottleneck, report.plan, held_out, progress=False)
    unsigned = copy.deepcopy(report.plan)
    for split in unsigned:
        object.__setattr__(split, "directions", None)
    plain = evaluate_splits(bottleneck, unsigned, held_out, progress=False)
    for split, one, two in zip(report.plan, found, plain, strict=True):
        assert (one == two) == (set(split.directions) == {1})


def test_a_pass_of_which_every_batch_is_left_out_is_told_by_the_report_alone(trained, recwarn):
    images, targets = make_images(n=8)
    report = find(trained, batches=[(images * float("nan"), targets)], **AUTO)
    assert (report.n_images, report.n_images_left_out, report.channels) == (0, 8, [])
    assert [str(warning.message) for warning in recwarn] == []


def test_entries_that_do_not_fit_into_memory_are_told(bottleneck):
    with pytest.warns(UserWarning, match="calibration samples"):
        report = find(bottleneck, "blocks.1.conv3", calibration_memory=0.03, **SETTINGS)
    everything = find(bottleneck, "blocks.1.conv3", **SETTINGS)
    assert any("did not fit into the memory for relevance vectors" in note for note in report.notes)
    assert not any("did not fit" in note for note in everything.notes)
    found, expected = as_dict(report.pairs), as_dict(everything.pairs)
    assert 0 < len(found) < len(expected)
    assert found.keys() <= expected.keys()


class Digits:
    """A network that has learned scikit-learn's digits for a moment, and images that it has not seen."""

    def __init__(self):
        digits = pytest.importorskip("sklearn.datasets").load_digits()
        images, targets = torch.tensor(digits.images / 16).float()[:, None], torch.tensor(digits.target)
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
        self.images, self.targets = images[order[1000:]], targets[order[1000:]]
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 24, 1),  # so few that most have to serve several digits
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(24, 10),
        )
        optimizer = torch.optim.Adam(self.net.parameters(), 3e-3)
        for _ in range(10):
            for rows in order[torch.randperm(1000)].split(50):
                optimizer.zero_grad()
                F.cross_entropy(self.net(images[rows]), targets[rows]).backward()
                optimizer.step()
        self.net.eval()

    def find(self, net, targets):
        batches = list(zip(self.images.split(100), targets.split(100), strict=True))
        return find_polysemantic_channels(net, batches, "8", class_fraction=0.5, calibration_samples=0, progress=False)


@pytest.fixture(scope="module")
def digits():
    return Digits()


@pytest.mark.parametrize("seed", range(3))
def test_the_two_halves_of_a_class_are_hardly_ever_taken_for_two_concepts(digits, seed):
    """Every image of class k becomes one of class k or k + 10 by chance; both have the same logit."""
    net = copy.deepcopy(digits.net)
    net[-1] = nn.Linear(24, 20)
    with torch.no_grad():
        net[-1].weight.copy_(digits.net[-1].weight.repeat(2, 1))
        net[-1].bias.copy_(digits.net[-1].bias.repeat(2))
    coins = torch.rand(len(digits.targets), generator=torch.Generator().manual_seed(seed)) < 0.5
    report = digits.find(net, digits.targets + 10 * coins)
    relevant = report._evidence["8"].relevant()
    candidates = int((relevant[:10] & relevant[10:]).sum())
    assert candidates > 40
    assert report.pairs, "the case would show nothing"
    assert sum(pair.class_b == pair.class_a + 10 for pair in report.pairs) <= 0.05 * candidates


def test_labels_without_meaning_give_hardly_any_flag(digits):
    true = digits.find(digits.net, digits.targets)
    assert len(true.pairs) >= 20, "the case would show nothing"
    flags = []
    for seed in range(5):
        order = torch.randperm(len(digits.targets), generator=torch.Generator().manual_seed(seed))
        permuted = digits.find(digits.net, digits.targets[order])
        assert permuted.layers[0].n_candidate_pairs > 50
        flags.append(len(permuted.pairs))
    assert sum(flags) <= 0.05 * len(true.pairs) * len(flags)
