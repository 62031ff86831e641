import functools
import operator
from itertools import combinations

import numpy as np
import pytest
import torch

from lightning_polydis.detection import SimilarityRule, averaged_relevance_vectors, detect, group_classes
from lightning_polydis.functional import find_polysemantic_channels
from lightning_polydis.similarity import Similarities, cosine_similarities, plain_similarities
from lightning_polydis.statistics import ClassStatistics
from tests import reference
from tests.networks import BottleneckNet, conv_relu_net, make_batches, make_images, train_briefly


@pytest.mark.parametrize(
    ("make", "layer"), [(conv_relu_net, "2"), (conv_relu_net, "4"), (BottleneckNet, "blocks.1.conv3")]
)
def test_the_list_of_pairs_is_the_papers(make, layer):
    torch.manual_seed(0)
    net = train_briefly(make())
    tau, p, gamma = 0.01, 0.3, 0.95
    report = find_polysemantic_channels(
        net,
        make_batches(),
        layer,
        method="paper",
        relevance_threshold=tau,
        class_fraction=p,
        similarity_threshold=gamma,
        progress=False,
    )
    expected = reference.flagged_pairs(net, layer, *make_images(), tau, p, gamma)
    found = {(pair.channel, pair.class_a, pair.class_b): pair.cosine_similarity for pair in report.pairs}
    assert len(expected) > 3, "the case would show nothing"
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=1e-5)
    relevant = reference.relevant_classes(net, layer, *make_images(), tau, p)
    candidates = [channel for channel, classes in relevant.items() if len(classes) > 1]
    assert report.layers[0].n_candidates == len(candidates)
    assert all(channel.classes == relevant[channel.channel] for channel in report.channels)
    assert {channel.channel for channel in report.channels} == {channel for channel, _, _ in expected}


@pytest.mark.parametrize(("n_relevant", "n_images", "fraction"), [(11, 20, 0.55), (29, 100, 0.29), (3, 4, 0.75)])
def test_a_share_exactly_at_the_fraction_counts(n_relevant, n_images, fraction):
    counts = torch.tensor([[[n_relevant], [0]], [[n_relevant - 1], [0]]])
    signs = torch.ones(2, 1)
    statistics = ClassStatistics(torch.tensor([n_images, 0]), [0.1, 0.2], counts, signs, signs > 0, None)
    assert statistics.relevant(fraction).tolist() == [[True], [False]]
    assert not statistics.relevant(fraction, threshold=1).any()


def test_a_vector_of_zeros_is_no_evidence():
    similarities = cosine_similarities(torch.tensor([[1.0, 0], [0, 0], [0, 1]]))
    assert similarities.tolist() == [[1, 1, 0], [1, 1, 1], [0, 1, 1]]


def test_groups_hold_only_classes_that_are_all_similar_and_every_flag_has_two_groups():
    generator = np.random.default_rng(0)
    for _ in range(50):
        vectors = torch.from_numpy(generator.normal(size=(6, 3)))
        similarities = cosine_similarities(vectors)
        groups = group_classes(list(range(6)), similarities, 0.5)
        assert sorted(functools.reduce(operator.iadd, groups, [])) == list(range(6))
        for group in groups:
            assert all(similarities[a, b] >= 0.5 for a, b in combinations(group, 2))
        flagged = any(similarities[a, b] < 0.5 for a, b in combinations(range(6), 2))
        assert flagged == (len(groups) > 1)


def test_groups_are_those_of_complete_linkage_merged_by_hand():
    generator = np.random.default_rng(1)
    similarities = cosine_similarities(torch.from_numpy(generator.normal(size=(7, 3))))
    groups = [[index] for index in range(7)]
    while True:
        worst = {
            (i, j): min(similarities[a, b] for a in groups[i] for b in groups[j])
            for i, j in combinations(range(len(groups)), 2)
        }
        i, j = max(worst, key=worst.get)
        if worst[i, j] < 0.2:
            break
        groups[i] += groups.pop(j)
    expected = sorted(sorted(group) for group in groups)
    assert group_classes(list(range(7)), similarities, 0.2) == expected
    assert len(expected) > 1


def planted():
    """One channel that reads sources 0-3 for classes 0 and 1, sources 4-7 for class 2; two quiet channels."""
    means = torch.zeros(4, 8, 1, dtype=torch.float64)
    means[0, :4, 0], means[1, :4, 0], means[2, 4:, 0] = 1, 0.9, 1
    relevant = torch.zeros(4, 3, dtype=torch.bool)
    relevant[:3, 1] = relevant[0, 2] = True
    return relevant, averaged_relevance_vectors(torch.ones(8, 1), means)


def test_a_planted_channel_is_found_with_its_concepts():
    relevant, vectors = planted()
    found = detect("layer", relevant, lambda _, classes: plain_similarities(vectors[classes]), SimilarityRule(0.5))
    assert [(channel.channel, channel.concepts) for channel in found.channels] == [(1, [[0, 1], [2]])]
    assert [(pair.class_a, pair.class_b) for pair in found.pairs] == [(0, 2), (1, 2)]
    assert found.channels[0].cosine_similarity == 0
    assert found.n_candidates == 1
    assert sorted(found.similarities) == pytest.approx([0, 0, 1])
    assert (found.channels[0].threshold, found.channels[0].reliability, found.channels[0].is_clear) == (0.5, None, None)
    assert {(pair.interval, pair.is_clear) for pair in found.pairs} == {(None, None)}, "nothing was measured"


def measured(value, corrected, lower, upper):
    """Similarities of two classes."""
    matrices = [np.array([[1, entry], [entry, 1]]) for entry in (value, corrected, lower, upper)]
    return Similarities(*matrices, reliability=np.array([0.9, 0.7]))


@pytest.mark.parametrize(
    ("entry", "rule", "flagged", "is_clear"),
    [
        ((0.4, 0.6, 0.5, 0.7), SimilarityRule(0.5), True, False),
        ((0.4, 0.6, 0.5, 0.7), SimilarityRule({1: 0.5}, is_calibrated=True), False, None),
        ((0.4, 0.6, 0.5, 0.7), SimilarityRule({1: 0.8}, is_calibrated=True), True, True),
        ((0.4, 0.6, 0.5, 0.9), SimilarityRule({1: 0.8}, is_calibrated=True), True, False),
        ((0.4, 0.6, 0.1, 1.0), SimilarityRule({1: 0.8}, is_calibrated=True), False, None),
        ((0.9, 1.2, 0.9, 1.0), SimilarityRule({1: 1.0}, is_calibrated=True), False, None),
    ],
    ids=["plain cosine", "corrected", "clear", "not clear", "may be one class", "above one"],
)
def test_a_calibrated_rule_goes_by_the_corrected_similarity_and_its_interval(entry, rule, flagged, is_clear):
    relevant = torch.tensor([[False, True], [False, False], [False, True]])
    found = detect("layer", relevant, lambda *_: measured(*entry), rule)
    assert [(pair.channel, pair.class_a, pair.class_b) for pair in found.pairs] == ([(1, 0, 2)] if flagged else [])
    assert found.n_candidates == 1
    assert found.similarities.tolist() == [entry[0]]
    for pair, channel in zip(found.pairs, found.channels, strict=True):
        assert (pair.cosine_similarity, pair.interval, pair.is_clear) == (entry[0], entry[2:], is_clear)
        assert channel.concepts == [[0], [2]]
        assert (channel.reliability, channel.threshold, channel.is_clear) == (0.7, rule.threshold(1), is_clear)


def test_results_are_sorted_and_the_order_of_classes_changes_nothing():
    torch.manual_seed(0)
    net = train_briefly(conv_relu_net())
    images, targets = make_images()
    settings = {"relevance_threshold": 0.05, "class_fraction": 0.5, "similarity_threshold": 0.9, "progress": False}
    report = find_polysemantic_channels(net, [(images, targets)], "2", **settings)
    values = [pair.cosine_similarity for pair in report.pairs]
    assert values == sorted(values)
    swap = torch.tensor([1, 0, 3, 2])
    net[8].weight.data = net[8].weight.data[swap]
    net[8].bias.data = net[8].bias.data[swap]
    swapped = find_polysemantic_channels(net, [(images, swap[targets])], "2", **settings)
    expected = {(pair.channel, frozenset(swap[[pair.class_a, pair.class_b]].tolist())) for pair in report.pairs}
    assert {(pair.channel, frozenset([pair.class_a, pair.class_b])) for pair in swapped.pairs} == expected


def test_one_thousand_classes_make_no_array_of_classes_x_channels_x_inputs():
    generator = torch.Generator().manual_seed(0)
    relevant = torch.zeros(1000, 64, dtype=torch.bool)
    for channel in range(64):
        relevant[torch.randperm(1000, generator=generator)[:15], channel] = True
    means = torch.rand(1000, 128, 1, generator=generator, dtype=torch.float64)
    weight = torch.randn(64, 128, 1, generator=generator)

    def similarities_of(channel, classes):
        return plain_similarities(averaged_relevance_vectors(weight[channel], means[classes]))

    largest = LargestTensor()
    with largest:
        found = detect("x", relevant, similarities_of, SimilarityRule(0.5))
    assert len(found.similarities) == 64 * 105
    assert 0 < largest.numel <= relevant.numel()


class LargestTensor(torch.overrides.TorchFunctionMode):
    """Notes the size of the largest tensor that any torch function returns."""

    numel = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result
