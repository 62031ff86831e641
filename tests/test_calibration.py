import pytest
import torch

from lightning_polydis.calibration import CalibratedThresholds
from lightning_polydis.detection import SimilarityRule, detect
from lightning_polydis.similarity import grouped_similarities
from lightning_polydis.vectors import ClassVectors
from tests import reference

N_GROUPS, N_IMAGES = 8, 4


def vectors_with(cosines, n_inputs=64, noise=1e-3, seed=0):
    """Group sums [K, C, G, I] and numbers of images of classes with given similarities [C, K, K], and noise."""
    generator = torch.Generator().manual_seed(seed)
    n_channels, n_classes, _ = cosines.shape
    factors = torch.linalg.cholesky(cosines.double())
    basis = torch.linalg.qr(torch.randn(n_inputs, n_classes, generator=generator).double()).Q
    means = (factors @ basis.T).movedim(0, 1)
    spread = torch.randn(n_classes, n_channels, N_GROUPS, n_inputs, generator=generator).double()
    return N_IMAGES * (means[:, :, None] + noise * spread), torch.full((n_classes, n_channels, N_GROUPS), N_IMAGES)


def as_class_vectors(sums, counts):
    n_classes, n_channels = counts.shape[:2]
    keys = torch.arange(n_classes * n_channels)
    return ClassVectors(keys, sums.flatten(0, 1).float(), counts.flatten(0, 1).float(), n_channels)


def everywhere(value, n_classes, n_channels):
    cosines = torch.full((n_channels, n_classes, n_classes), value)
    cosines.diagonal(dim1=1, dim2=2).fill_(1)
    return cosines


def put(cosines, channel, a, b, value):
    cosines[channel, a, b] = cosines[channel, b, a] = value


def nothing(n_classes, n_channels):
    return torch.zeros(n_classes, n_channels, dtype=torch.bool)


def calibrated_thresholds(vectors, relevant, helpful, channels):
    thresholds = CalibratedThresholds(vectors, relevant, helpful)
    return {channel: thresholds[channel] for channel in channels}


def detected(sums, counts, relevant):
    vectors = as_class_vectors(sums, counts)
    thresholds = calibrated_thresholds(vectors, relevant, ~nothing(*relevant.shape), range(relevant.shape[1]))
    found = detect(
        "layer",
        relevant,
        lambda channel, classes: grouped_similarities(*vectors.groups(channel, classes)),
        SimilarityRule(thresholds, is_calibrated=True),
    )
    return thresholds, [(pair.channel, pair.class_a, pair.class_b) for pair in found.pairs]


def test_in_a_narrow_layer_only_the_unusual_pair_is_flagged():
    cosines = everywhere(0.85, 16, 4)
    cosines[2, :2, 2:] = cosines[2, 2:, :2] = 0.76  # as unlike one another as they are, they are not like the rest
    put(cosines, 2, 0, 1, 0.6)
    for channel in (0, 1, 3):
        put(cosines, channel, 0, 1, 0.96)
    relevant = nothing(16, 4)
    relevant[:2] = True
    thresholds, pairs = detected(*vectors_with(cosines), relevant)
    assert pairs == [(2, 0, 1)]
    assert thresholds == pytest.approx(dict.fromkeys(range(4), 0.85), abs=0.005)


def test_in_a_wide_layer_a_pair_counts_as_two_concepts_below_one_half():
    cosines = everywhere(0.05, 16, 4)
    for channel, value in enumerate((0.05, 0.45, 0.55, 0.9)):
        put(cosines, channel, 3, 7, value)
    relevant = nothing(16, 4)
    relevant[[3, 7]] = True
    thresholds, pairs = detected(*vectors_with(cosines), relevant)
    assert set(thresholds.values()) == {0.5}
    assert sorted(pairs) == [(0, 3, 7), (1, 3, 7)]


def test_a_channel_whose_classes_are_all_alike_unlike_is_measured_by_its_own_median():
    cosines = torch.cat([everywhere(value, 12, 1) for value in (0.7, *[0.9] * 10)])
    for channel in range(11):
        put(cosines, channel, 0, 1, 0.8)
    relevant = nothing(12, 11)
    relevant[:2] = True
    thresholds, pairs = detected(*vectors_with(cosines), relevant)
    assert thresholds[0] == pytest.approx(0.7, abs=0.01)
    assert thresholds[5] == pytest.approx(0.9, abs=0.01)
    assert sorted(pairs) == [(channel, 0, 1) for channel in range(1, 11)]


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.1])
def test_thresholds_are_those_of_the_plain_rule(noise):
    generator = torch.Generator().manual_seed(1)
    spread = torch.randn(14, 9, 9, generator=generator)
    common = torch.full((14, 1, 1), 40.0)
    common[3] = 12  # its classes are less alike than those of other channels
    cosines = spread @ spread.mT + common
    lengths = cosines.diagonal(dim1=1, dim2=2).sqrt()
    sums, counts = vectors_with(cosines / lengths[:, None] / lengths[..., None], noise=noise)
    relevant = torch.rand(9, 14, generator=generator) < 0.4
    relevant[:, 4] = True  # no arbitrary pair
    relevant[:8, 5] = True  # few of them
    helpful = torch.rand(9, 14, generator=generator) < 0.9
    found = calibrated_thresholds(as_class_vectors(sums, counts), relevant, helpful, range(14))
    expected = reference.calibrated_thresholds(sums, counts, relevant, helpful)
    assert [found[channel] for channel in range(14)] == pytest.approx(expected, rel=1e-4)
    assert len(set(expected)) > 1, "the case would show nothing"


def test_a_channel_with_few_arbitrary_pairs_takes_the_median_of_the_layer():
    cosines = torch.cat([everywhere(value, 6, 1) for value in (0.6, *[0.9] * 10)])
    vectors = as_class_vectors(*vectors_with(cosines))
    relevant = nothing(6, 11)
    own = calibrated_thresholds(vectors, relevant, ~nothing(6, 11), range(11))
    assert own[0] == pytest.approx(0.6, abs=0.01)
    relevant[:4, 0] = True  # nine of its fifteen pairs are left
    few = calibrated_thresholds(vectors, relevant, ~nothing(6, 11), range(11))
    assert few[0] == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("why", ["relevant", "not helpful", "noise", "one class"])
def test_without_arbitrary_pairs_the_threshold_is_one_half(why):
    sums, counts = vectors_with(everywhere(0.9, 6, 3))
    relevant, helpful = nothing(6, 3), ~nothing(6, 3)
    vectors = as_class_vectors(sums, counts)
    assert calibrated_thresholds(vectors, relevant, helpful, range(3))[0] == pytest.approx(0.9, abs=0.01)
    if why == "relevant":
        relevant[:] = True
    elif why == "not helpful":
        helpful[1:] = False
    elif why == "one class":
        vectors = as_class_vectors(sums[:1], counts[:1])
    else:
        sums[:, :, 1::2] = -sums[:, :, ::2]  # the halves contradict one another
        vectors = as_class_vectors(sums, counts)
    assert calibrated_thresholds(vectors, relevant, helpful, range(3)) == {0: 0.5, 1: 0.5, 2: 0.5}


def test_vectors_that_are_not_well_known_are_not_compared_with():
    cosines = everywhere(0.9, 10, 2)
    cosines[:, :3, 3:] = cosines[:, 3:, :3] = 0.6
    sums, counts = vectors_with(cosines)
    expected = calibrated_thresholds(as_class_vectors(sums, counts), nothing(10, 2), ~nothing(10, 2), range(2))
    assert expected == pytest.approx({0: 0.6, 1: 0.6}, abs=0.01)
    apart = torch.nn.functional.normalize(torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(2)), dim=2)
    sums[:3, :, ::2] += 0.9 * N_IMAGES * apart[:, :, None]
    sums[:3, :, 1::2] -= 0.9 * N_IMAGES * apart[:, :, None]  # the halves hardly agree
    assert reference.reliability(list(sums[1, 1])) < 0.4
    found = calibrated_thresholds(as_class_vectors(sums, counts), nothing(10, 2), ~nothing(10, 2), range(2))
    assert found == pytest.approx({0: 0.9, 1: 0.9}, abs=0.01)


def test_the_pair_in_question_has_no_part_in_its_own_comparison():
    found = {True: [], False: []}
    for value in (0.79, 0.7):
        cosines = everywhere(0.8, 6, 1)
        for a, b in ((1, 3), (1, 5), (3, 5)):
            put(cosines, 0, a, b, value)
        vectors = as_class_vectors(*vectors_with(cosines, noise=1e-6))
        for in_question, thresholds in found.items():
            relevant = nothing(6, 1)
            relevant[[1, 3, 5]] = in_question
            thresholds.append(calibrated_thresholds(vectors, relevant, ~nothing(6, 1), [0])[0])
    assert found[True] == pytest.approx([0.8, 0.8], abs=1e-5)
    assert found[False][1] < 0.795, "a pair that is not in question has a part"


def test_where_all_classes_are_alike_nothing_is_flagged():
    """Corrected similarities of equal vectors scatter around one, and a threshold above one would flag everything."""
    relevant = nothing(12, 3)
    relevant[:4] = True
    for seed in range(10):
        sums, counts = vectors_with(everywhere(0.0, 12, 3), noise=0.05, seed=seed)
        sums += sums[:1].mean(2, keepdim=True) - sums.mean(2, keepdim=True) * (1 - 1e-3)
        thresholds, pairs = detected(sums, counts, relevant)
        assert set(thresholds.values()) == {0.9}
        assert pairs == []


def test_a_layer_with_hardly_any_arbitrary_pairs_takes_one_half():
    vectors = as_class_vectors(*vectors_with(everywhere(0.8, 4, 1), noise=1e-6))
    assert calibrated_thresholds(vectors, nothing(4, 1), ~nothing(4, 1), [0]) == {0: 0.5}
