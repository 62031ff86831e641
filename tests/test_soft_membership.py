import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from lightning_polydis import soft_membership
from lightning_polydis.box_newton import minimise_in_box
from lightning_polydis.soft_membership import (
    WantedSplit,
    inclusion_chances,
    membership_problem,
    systematic_sample,
)
from lightning_polydis.statistics import Samples
from tests import reference

LEAK = 3.0
CHANNEL = 2


def wanted(channel, concepts, directions, samples=None):
    return WantedSplit(channel, concepts, directions, samples)


def channel_rows(layer, split, samples):
    return soft_membership.channel_rows(layer, replace(split, samples=samples))


def soft_memberships(layer, splits, samples, leak_weight):
    return soft_membership.soft_memberships(layer, [replace(split, samples=samples) for split in splits], leak_weight)


def conv(bias=True, kernel=3, **kwargs):
    torch.manual_seed(0)
    return nn.Conv2d(5, 4, kernel, bias=bias, **kwargs).requires_grad_(False)


def linear():
    torch.manual_seed(0)
    return nn.Linear(5, 4).requires_grad_(False)


TWO = ([[0], [3, 1]], [1, 1])
OPPOSED = ([[0], [3, 1]], [1, -1])
THREE = ([[0], [1], [3]], [-1, 1, -1])
CASES = [
    (conv(padding=1, stride=2), *TWO),
    (conv(padding=1), *OPPOSED),
    (conv(bias=False, kernel=1), *OPPOSED),
    (conv(bias=False, kernel=1), *THREE),
    (conv(dilation=2), *THREE),
    (linear(), *OPPOSED),
    (linear(), *THREE),
]
IDS = ["strided", "opposed", "no bias", "three, no bias", "three, dilated", "linear", "three, linear"]
cases = pytest.mark.parametrize(("layer", "concepts", "directions"), CASES, ids=IDS)


def make_samples(layer, n=24, seed=0):
    """Images of classes 0-5 that use different sources each, some noise on top."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % 6
    strength = torch.rand(6, 5, generator=generator) ** 3
    if isinstance(layer, nn.Conv2d):
        inputs = torch.randn(n, 5, 5, 5, generator=generator).abs() * strength[targets][:, :, None, None]
    else:
        inputs = torch.randn(n, 3, 5, generator=generator).abs() * strength[targets][:, None]
    return Samples(inputs, targets, torch.ones(n, 4, dtype=torch.bool))


def slow_loss(layer, concepts, directions, samples, concept, membership, leak_weight=LEAK):
    return reference.membership_loss(
        layer, CHANNEL, concepts, directions, samples.inputs, samples.targets, concept, membership, leak_weight
    )


def by_scipy(layer, concepts, directions, samples, concept):
    def loss_and_slope(values):
        values = torch.from_numpy(values).requires_grad_()
        loss = slow_loss(layer, concepts, directions, samples, concept, values)
        return float(loss.detach()), np.ascontiguousarray(torch.autograd.grad(loss, values)[0].numpy())

    options = {"ftol": 0, "gtol": 1e-10, "maxiter": 500}
    start = np.full(5, 0.5)
    found = minimize(loss_and_slope, start, jac=True, method="L-BFGS-B", bounds=[(0, 1)] * 5, options=options)
    return found.fun, torch.from_numpy(found.x)


@cases
def test_the_loss_is_that_of_the_formula(layer, concepts, directions):
    samples = make_samples(layer)
    rows = channel_rows(layer, wanted(CHANNEL, concepts, directions), samples)
    generator = torch.Generator().manual_seed(1)
    for concept in range(len(concepts)):
        problem = membership_problem(rows, concept, LEAK)
        found, expected = [], []
        for membership in (torch.rand(5, generator=generator).double() for _ in range(4)):
            found.append(problem.loss(problem.errors(membership)))
            expected.append(slow_loss(layer, concepts, directions, samples, concept, membership).item())
        assert found == pytest.approx(expected, rel=1e-9)
        assert min(expected) > 1e-3


@cases
def test_memberships_are_the_minimum_of_the_formula(layer, concepts, directions):
    samples = make_samples(layer)
    (found,) = soft_memberships(layer, [wanted(CHANNEL, concepts, directions)], samples, LEAK)
    assert (found.shape, found.dtype) == ((len(concepts), 5), torch.float32)
    for concept, membership in enumerate(found):
        loss, place = by_scipy(layer, concepts, directions, samples, concept)
        here = slow_loss(layer, concepts, directions, samples, concept, membership.double()).item()
        assert here == pytest.approx(loss, rel=1e-6, abs=1e-9)
        torch.testing.assert_close(membership.double(), place, rtol=0, atol=2e-4)


def test_all_parts_of_the_loss_have_a_say():
    layer, (concepts, directions) = conv(padding=1, stride=2), TWO
    samples = make_samples(layer)
    of = {"own": [0], "other": [3, 1], "rest": [2, 4, 5]}
    everything = torch.rand(5, generator=torch.Generator().manual_seed(2)).double()
    losses = {}
    for name, parts in (("own", ["own"]), ("leak", ["own", "other"]), ("spurious", ["own", "rest"])):
        some = samples.of_classes([label for part in parts for label in of[part]])
        rows = channel_rows(layer, wanted(CHANNEL, concepts, directions), some)
        problem = membership_problem(rows, 0, LEAK)
        losses[name] = problem.loss(problem.errors(everything))
        expected = slow_loss(layer, concepts, directions, some, 0, everything).item()
        assert losses[name] == pytest.approx(expected, rel=1e-9)
    assert losses["leak"] > losses["own"] > 0
    assert losses["spurious"] > losses["own"]


@cases
def test_the_order_of_the_concepts_changes_nothing(layer, concepts, directions):
    samples = make_samples(layer)
    forward, backward = soft_memberships(
        layer,
        [wanted(CHANNEL, concepts, directions), wanted(CHANNEL, concepts[::-1], directions[::-1])],
        samples,
        LEAK,
    )
    torch.testing.assert_close(forward, backward.flip(0), rtol=0, atol=1e-6)
    assert not torch.allclose(forward, backward, atol=1e-2)


@pytest.mark.parametrize("factor", [1e-3, 250.0])
@cases
def test_the_scale_of_the_channel_changes_nothing(layer, concepts, directions, factor):
    samples, splits = make_samples(layer), [wanted(CHANNEL, concepts, directions)]
    scaled = copy.deepcopy(layer)
    with torch.no_grad():
        scaled.weight[CHANNEL] *= factor
        if scaled.bias is not None:
            scaled.bias[CHANNEL] *= factor
    expected, found = (soft_memberships(one, splits, samples, LEAK)[0] for one in (layer, scaled))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_turning_the_channel_and_its_directions_round_changes_nothing():
    layer, samples = conv(), make_samples(conv())
    turned = copy.deepcopy(layer)
    with torch.no_grad():
        turned.weight[CHANNEL] *= -1
        turned.bias[CHANNEL] *= -1
    concepts, directions = THREE
    expected = soft_memberships(layer, [wanted(CHANNEL, concepts, directions)], samples, LEAK)[0]
    found = soft_memberships(turned, [wanted(CHANNEL, concepts, [-s for s in directions])], samples, LEAK)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_several_channels_are_solved_as_each_alone():
    layer, samples = conv(), make_samples(conv())
    splits = [
        wanted(2, *TWO),
        wanted(0, *THREE),
        wanted(2, *OPPOSED),  # the same channel in another way
        wanted(1, *TWO),
    ]
    together = soft_memberships(layer, splits, samples, LEAK)
    alone = [soft_memberships(layer, [split], samples, LEAK)[0] for split in splits]
    for one, two in zip(together, alone, strict=True):
        assert torch.equal(one, two)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_several_threads_find_what_one_finds(three_threads):
    layer, samples = conv(), make_samples(conv())
    splits = [wanted(channel % 3, *(TWO, THREE, OPPOSED)[channel // 3]) for channel in range(9)]
    found = soft_memberships(layer, splits, samples, LEAK)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    for one, two in zip(found, soft_memberships(layer, splits, samples, LEAK), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("n_splits", [1, 5])
def test_what_fails_in_a_thread_is_raised_and_the_number_of_threads_is_as_it_was(three_threads, n_splits, monkeypatch):
    numbers = []

    def fails(layer, split, *_):
        numbers.append(torch.get_num_threads())
        raise RuntimeError("no memory left")

    monkeypatch.setattr(soft_membership, "_memberships", fails)
    with pytest.raises(RuntimeError, match="no memory left"):
        soft_memberships(conv(), [wanted(0, *TWO)] * n_splits, make_samples(conv()), LEAK)
    assert torch.get_num_threads() == 3
    assert set(numbers) == {3 // min(3, n_splits)}


def test_nothing_wanted_is_nothing_found():
    assert soft_memberships(conv(), [], make_samples(conv()), LEAK) == []


def test_sources_that_only_one_concept_reads_are_told_apart():
    layer = nn.Conv2d(4, 1, 1, bias=False).requires_grad_(False)
    nn.init.ones_(layer.weight)
    inputs = torch.zeros(8, 4, 3, 3)
    inputs[::2, :2], inputs[1::2, 2] = 1, 2  # nobody reads the last source
    samples = Samples(inputs, torch.arange(8) % 2, torch.ones(8, 1, dtype=torch.bool))
    (found,) = soft_memberships(layer, [wanted(0, [[0], [1]], [1, 1])], samples, LEAK)
    torch.testing.assert_close(found, torch.tensor([[1.0, 1, 0, 1], [0, 0, 1, 1]]), rtol=0, atol=1e-6)


def test_a_larger_leak_weight_leaks_less():
    layer = conv()
    samples, (concepts, directions) = make_samples(layer), TWO
    leaks, own = [], []
    for weight in (0.1, 1.0, 10.0):
        (found,) = soft_memberships(layer, [wanted(CHANNEL, concepts, directions)], samples, weight)
        shares = found[0].double()
        own.append(slow_loss(layer, concepts, directions, samples, 0, shares, leak_weight=0).item())
        leaks.append(slow_loss(layer, concepts, directions, samples, 0, shares, leak_weight=1).item() - own[-1])
    assert leaks[0] > leaks[1] > leaks[2]
    assert own[0] < own[1] < own[2]


@pytest.mark.parametrize("missing", [[0], [1, 3], [0, 1, 3], [2, 4, 5], list(range(6))])
def test_classes_without_images_leave_memberships_in_the_box(missing):
    layer = conv(bias=False)
    samples = make_samples(layer).of_classes([label for label in range(6) if label not in missing])
    (found,) = soft_memberships(layer, [wanted(CHANNEL, *OPPOSED)], samples, LEAK)
    assert found.shape == (2, 5)
    assert bool(((found >= 0) & (found <= 1)).all())
    if missing == list(range(6)):
        assert torch.equal(found, torch.ones(2, 5))
    for concept, membership in enumerate(found.double()):
        here = slow_loss(layer, *OPPOSED, samples, concept, membership).item()
        loss, _ = by_scipy(layer, *OPPOSED, samples, concept)
        assert here == pytest.approx(loss, rel=1e-5, abs=1e-7)


def test_of_many_images_some_have_a_say():
    rows = channel_rows(conv(kernel=1), wanted(CHANNEL, *TWO), make_samples(conv(), n=1200))
    assert [int((rows.concepts == concept).sum()) for concept in (0, 1, -1)] == [64 * 25] * 3
    assert rows.totals.tolist() == [64 * 25] * 3
    assert set(rows.counts.tolist()) == {1}


@pytest.mark.parametrize("chunk", [2**24, 5 * 25 * 10])
@pytest.mark.parametrize("layer", [conv(kernel=1), conv(padding=1, stride=2)], ids=["pointwise", "strided"])
def test_of_large_maps_some_positions_stand_for_all(layer, chunk, monkeypatch):
    samples, split = make_samples(layer, n=240), wanted(CHANNEL, *THREE)
    rows = channel_rows(layer, split, samples)
    expected = soft_memberships(layer, [split], samples, LEAK)[0]
    monkeypatch.setattr(soft_membership, "PROBLEM_ELEMENTS", 0)
    monkeypatch.setattr(soft_membership, "LEAST_ROWS", len(rows.concepts) // 12)
    monkeypatch.setattr(soft_membership, "CHUNK_ELEMENTS", chunk)
    fewer = channel_rows(layer, split, samples)
    assert torch.equal(fewer.totals, rows.totals)
    for concept in (*range(3), -1):
        own, some = rows.concepts == concept, fewer.concepts == concept
        assert int(some.sum()) < 0.5 * int(own.sum())
        assert float(fewer.counts[some].min()) >= 1
        everywhere = {tuple(row) for row in rows.contributions[own].tolist()}
        found = [tuple(row) for row in fewer.contributions[some].tolist()]
        assert len(set(found)) == len(found), "no position is there twice"
        assert set(found) <= everywhere
        whole, part = (
            (each.counts[where, None] * each.contributions[where] ** 2).sum()
            for each, where in ((rows, own), (fewer, some))
        )
        torch.testing.assert_close(part, whole, rtol=0.1, atol=0)
    thinned = [soft_memberships(layer, [split], samples, LEAK)[0] for _ in range(2)]
    assert torch.equal(*thinned)
    torch.testing.assert_close(thinned[0], expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("n_wanted", [1, 7, 40, 299])
def test_chances_are_in_proportion_to_sizes_and_certain_for_the_largest(n_wanted):
    sizes = torch.rand(300, generator=torch.Generator().manual_seed(0)).double() ** 6
    chances = inclusion_chances(sizes, n_wanted)
    assert float(chances.sum()) == pytest.approx(n_wanted)
    uncertain = chances < 1
    ratios = chances[uncertain] / sizes[uncertain]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-9, atol=0)
    assert bool((sizes[~uncertain] * ratios[0] >= 1 - 1e-9).all())
    drawn = systematic_sample(chances)
    assert len(drawn) == n_wanted
    assert len(drawn.unique()) == n_wanted


def test_what_has_no_size_is_never_drawn():
    sizes = torch.tensor([0.0, 2, 0, 1, 1, 0]).double()
    assert inclusion_chances(sizes, 3).tolist() == [0, 1, 0, 1, 1, 0]
    assert inclusion_chances(sizes, 2).tolist() == [0, 1, 0, 0.5, 0.5, 0]
    assert systematic_sample(inclusion_chances(sizes, 5)).tolist() == [1, 3, 4]


def test_the_minimum_is_found_to_the_promised_tolerance():
    layer = conv()
    for concepts, directions in (TWO, OPPOSED, THREE):
        rows = channel_rows(layer, wanted(CHANNEL, concepts, directions), make_samples(layer))
        for concept in range(len(concepts)):
            assert minimise_in_box(membership_problem(rows, concept, LEAK)).optimality <= 1e-9
