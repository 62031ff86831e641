import pytest
import torch

from lightning_polydis.layers import window_sums
from lightning_polydis.statistics import CalibrationSamples, ChannelStatistics, relevant_channels
from tests import reference


@pytest.mark.parametrize("tau", [0.001, 0.03, 0.3, 1.0])
def test_relevant_channels_follow_the_rule_image_by_image(tau):
    relevance = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    relevance[0] = -1  # no positive relevance at all
    relevance[1] = 0
    relevance[2] = torch.tensor([5.0, 0, 0, 0, 0, 0, -9])  # one channel holds all of it
    found = relevant_channels(relevance, tau)
    assert found.tolist() == [reference.is_relevant(row, tau) for row in relevance]
    assert not found[:2].any()
    assert found[2].tolist() == [True] + [False] * 6


def test_relevance_exactly_at_the_threshold_counts():
    assert relevant_channels(torch.tensor([[0.25, 0.75]]), 0.25).tolist() == [[True, True]]


def random_batches(n_batches=5, num_classes=3):
    """Relevances, gradients, targets and window sums."""
    generator = torch.Generator().manual_seed(1)
    for size in range(1, n_batches + 1):
        yield (
            torch.randn(size, 4, generator=generator),
            torch.randn(size, 4, generator=generator),
            torch.randint(num_classes, (size,), generator=generator),
            torch.randn(size, 6, 9, generator=generator),
        )


THRESHOLDS = [0.2, 0.05, 0.8]


def test_statistics_equal_those_of_all_images_at_once():
    statistics = ChannelStatistics(3, 4, THRESHOLDS, (6, 9))
    batches = list(random_batches())
    for batch in batches:
        statistics.update(*batch)
    relevance, gradients, targets, sums = (torch.cat(column) for column in zip(*batches, strict=True))
    found = statistics.compute()
    assert found.thresholds == (0.2, 0.05, 0.8)
    for label in range(3):
        own = targets == label
        assert found.n_images[label] == own.sum()
        for threshold, counts in zip(THRESHOLDS, found.counts, strict=True):
            flags = [reference.is_relevant(row, threshold) for row in relevance[own]]
            assert counts[label].tolist() == [sum(column) for column in zip(*flags, strict=True)]
        assert found.directions[label].tolist() == gradients[own].sum(0).sign().tolist()
        assert found.helpful[label].tolist() == [float(value) > 0 for value in relevance[own].mean(0)]
        torch.testing.assert_close(found.mean_window_sums[label], sums[own].double().mean(0), rtol=1e-12, atol=1e-12)
    assert set(found.directions.flatten().tolist()) == {-1, 1}
    assert 0 < int(found.helpful.sum()) < 12


def test_statistics_of_two_processes_merge_into_those_of_one():
    whole, *parts = (ChannelStatistics(3, 4, THRESHOLDS, (6, 9)) for _ in range(3))
    for index, batch in enumerate(random_batches()):
        whole.update(*batch)
        parts[index % 2].update(*batch)
    parts[0].merge_state(parts[1])
    merged, expected = parts[0].compute(), whole.compute()
    for name in ("n_images", "counts", "directions", "helpful"):
        assert torch.equal(getattr(merged, name), getattr(expected, name)), name
    torch.testing.assert_close(merged.mean_window_sums, expected.mean_window_sums, rtol=1e-12, atol=1e-12)


def test_window_sums_are_kept_only_where_they_are_used():
    statistics = ChannelStatistics(3, 4, THRESHOLDS)
    for relevance, gradients, targets, _ in random_batches():
        statistics.update(relevance, gradients, targets)
    assert statistics.compute().mean_window_sums is None
    assert statistics.window_sums.numel() == 0
    assert int(statistics.compute().n_images.sum()) == 15


def test_a_class_without_images_has_zero_means_a_direction_and_no_nan():
    statistics = ChannelStatistics(3, 2, [0.2], (1, 1))
    statistics.update(torch.ones(1, 2), -torch.ones(1, 2), torch.tensor([1]), torch.ones(1, 1, 1))
    found = statistics.compute()
    assert found.n_images.tolist() == [0, 1, 0]
    assert found.mean_window_sums[:, 0, 0].tolist() == [0, 1, 0]
    assert found.directions.tolist() == [[1, 1], [-1, -1], [1, 1]]
    assert found.helpful.tolist() == [[False, False], [True, True], [False, False]]
    assert found.relevant(0.5).tolist() == [[False, False], [True, True], [False, False]]


def test_batches_that_are_left_out_are_counted_only():
    statistics = ChannelStatistics(3, 2, [0.2], (1, 1))
    nan = torch.full((4, 2), float("nan"))
    statistics.update(nan, nan, torch.tensor([0, 1, 2, 0]), nan[:, :1, None], leave_out=True)
    found = statistics.compute()
    assert (found.n_left_out, int(found.n_images.sum()), int(found.counts.sum())) == (4, 0, 0)
    assert bool(torch.isfinite(found.mean_window_sums).all())
    assert bool(torch.isfinite(statistics.gradient_sums).all())


def test_sums_beyond_the_range_of_half_precision_stay_exact():
    statistics = ChannelStatistics(2, 1, [0.2], (1, 1))
    layer = torch.nn.Conv2d(1, 1, 1)
    for _ in range(100):
        sums = window_sums(layer, torch.full((1, 1, 56, 56), 1000.0))
        statistics.update(torch.ones(1, 1), torch.full((1, 1), 6e4).half(), torch.tensor([0]), sums)
    assert statistics.window_sums[0, 0, 0] == 100 * 56 * 56 * 1000
    assert statistics.gradient_sums[0, 0] == 100 * float(torch.tensor(6e4).half())


def keep(samples, inputs, targets, relevant):
    rows = samples.wanted(inputs, targets)
    samples.update(inputs[rows], targets[rows], relevant[rows])


@pytest.mark.parametrize("per_class", [1, 3, None])
def test_samples_are_the_first_of_each_class(per_class):
    samples = CalibrationSamples(per_class)
    batches = list(random_batches())
    for relevance, _, targets, sums in batches:
        keep(samples, sums, targets, relevance > 0)
    kept = samples.compute()
    _, _, targets, sums = (torch.cat(column) for column in zip(*batches, strict=True))
    for label in range(3):
        assert torch.equal(kept.of_classes([label]).inputs, sums[targets == label][:per_class])


def test_halves_share_no_image_and_take_turns_within_a_class():
    samples = CalibrationSamples(None)
    targets = torch.tensor([0, 0, 1, 0, 1, 0, 0])
    samples.update(torch.arange(7.0)[:, None], targets, torch.ones(7, 1, dtype=torch.bool))
    first, second = samples.compute().halves()
    assert first.inputs[:, 0].tolist() == [0, 2, 3, 6]
    assert second.inputs[:, 0].tolist() == [1, 4, 5]


def test_images_of_another_size_are_passed_over():
    samples = CalibrationSamples(5)
    for size in (4, 5, 4):
        keep(samples, torch.zeros(2, 3, size, size), torch.tensor([0, 1]), torch.ones(2, 1, dtype=torch.bool))
    assert samples.compute().inputs.shape == (4, 3, 4, 4)


def test_samples_of_half_precision_are_kept_in_single_and_nothing_gives_none():
    samples = CalibrationSamples(5)
    assert samples.per_class == 5
    samples.update(torch.ones(1, 2, dtype=torch.bfloat16), torch.tensor([0]), torch.ones(1, 1, dtype=torch.bool))
    assert samples.compute().inputs.dtype == torch.float32
    samples.reset()
    samples.update(torch.ones(1, 2), torch.tensor([0]), torch.ones(1, 1, dtype=torch.bool))
    assert len(samples.compute()) == 1
