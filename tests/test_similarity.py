import numpy as np
import pytest
import torch

from lightning_polydis.similarity import (
    corrected_similarities,
    cosine_similarities,
    grouped_similarities,
    plain_similarities,
    reliabilities,
)
from tests import reference

N_GROUPS = 8


def in_groups(images):
    """Sums of every eighth image, and their numbers."""
    parts = [images[group::N_GROUPS] for group in range(N_GROUPS)]
    return torch.stack([part.sum(0) for part in parts]), torch.tensor([float(len(part)) for part in parts])


def draw(means, n_images, noise, generator):
    """Images of each class: its mean and noise, both times an exponential amplitude (mean 1); in groups."""
    groups = []
    for mean in means:
        amplitude = -torch.log(torch.rand(n_images, 1, generator=generator)).double()
        spread = noise * torch.randn(n_images, len(mean), generator=generator).double()
        groups.append(in_groups(amplitude * (mean + spread)))
    return tuple(torch.stack(part) for part in zip(*groups, strict=True))


def two_means(cosine, n_inputs=24):
    means = torch.zeros(2, n_inputs, dtype=torch.float64)
    means[0, 0], means[1, 0], means[1, 1] = 1, cosine, (1 - cosine**2) ** 0.5
    return means


@pytest.mark.parametrize("n_images", [16, 48])
@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("noise", [0.15, 0.5])
def test_the_interval_holds_the_true_similarity(cosine, n_images, noise):
    generator = torch.Generator().manual_seed(0)
    found = [grouped_similarities(*draw(two_means(cosine), n_images, noise, generator)) for _ in range(250)]
    lower, upper = (np.array([getattr(one, name)[0, 1] for one in found]) for name in ("lower", "upper"))
    assert np.mean((lower <= cosine) & (cosine <= upper)) >= 0.93
    if cosine == 1:
        assert np.mean(upper < 1) <= 0.05, "two halves of one class pass for two concepts"
    if noise == 0.15 and n_images == 48:
        assert np.median(upper - lower) < 0.35, "an interval that holds everything says nothing"
        assert cosine == 1 or np.mean(upper < 1) > 0.9


@pytest.mark.parametrize("n_images", [16, 48])
@pytest.mark.parametrize("cosine", [0.9, 1.0])
def test_the_corrected_similarity_is_closer_to_the_true_one_than_the_raw(cosine, n_images):
    generator = torch.Generator().manual_seed(1)
    found = [grouped_similarities(*draw(two_means(cosine), n_images, 0.3, generator)) for _ in range(100)]
    raw, corrected = (np.array([getattr(one, name)[0, 1] for one in found]) for name in ("cosine", "corrected"))
    assert np.abs(corrected - cosine).mean() < 0.6 * np.abs(raw - cosine).mean()
    assert raw.mean() < cosine - 0.04
    assert corrected.mean() == pytest.approx(cosine, abs=0.03)


@pytest.mark.parametrize("n_images", [16, 21])
def test_similarities_are_those_of_the_plain_jackknife(n_images):
    sums, counts = draw(torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).double() + 1, n_images, 0.4, None)
    found, plain = grouped_similarities(sums, counts), corrected_similarities(sums, counts)
    degrees_quantile = 2.364624252  # Student's t, 7 degrees of freedom, 97.5 %
    for a in range(4):
        for b in range(4):
            if a == b:
                continue
            args = (list(sums[a]), counts[a].tolist(), list(sums[b]), counts[b].tolist())
            value, deviation = reference.jackknife(*args)
            assert plain[a, b] == pytest.approx(reference.corrected_similarity(*args), rel=1e-9)
            assert found.corrected[a, b] == pytest.approx(value, rel=1e-9)
            assert found.lower[a, b] == pytest.approx(max(value - degrees_quantile * deviation, -1), rel=1e-6)
            assert found.upper[a, b] == pytest.approx(min(value + degrees_quantile * deviation, 1), rel=1e-6)
            means = [sums[row].sum(0) for row in (a, b)]
            assert found.cosine[a, b] == pytest.approx(float(torch.cosine_similarity(*means, dim=0)), rel=1e-9)


def test_reliabilities_are_those_of_two_halves():
    sums = torch.randn(5, N_GROUPS, 4, generator=torch.Generator().manual_seed(3)).double() + 0.5
    sums[3, ::2] *= -1  # the halves contradict one another
    found = reliabilities(sums)
    assert found.tolist() == pytest.approx([reference.reliability(list(groups)) for groups in sums], rel=1e-9)
    assert found[3] == 0
    assert found.max() > 0.8
    steady = torch.ones(1, N_GROUPS, 4).double()
    assert reliabilities(steady).item() == pytest.approx(1)


@pytest.mark.parametrize("factor", [1e6, 1e-4, 1e-12])
def test_the_unit_of_the_vectors_does_not_matter(factor):
    generator = torch.Generator().manual_seed(4)
    sums, counts = draw(two_means(0.8), 24, 0.3, generator)
    expected = grouped_similarities(sums, counts)
    scales = torch.tensor([factor, 7.0]).double()[:, None, None]  # each class in its own
    found = grouped_similarities(sums * scales, counts)
    for name in ("cosine", "corrected", "lower", "upper", "reliability"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-9, err_msg=name)


def test_the_order_of_the_classes_does_not_matter():
    generator = torch.Generator().manual_seed(5)
    sums, counts = draw(torch.randn(4, 6, generator=generator).double(), 24, 0.3, generator)
    order = [2, 0, 3, 1]
    expected, found = grouped_similarities(sums, counts), grouped_similarities(sums[order], counts[order])
    for name in ("cosine", "corrected", "lower", "upper"):
        values = getattr(expected, name)
        np.testing.assert_allclose(getattr(found, name), values[np.ix_(order, order)], rtol=1e-9, err_msg=name)
        np.testing.assert_allclose(values, values.T, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("n_images", [0, 1, 2])
def test_too_few_images_give_an_interval_that_rules_out_nothing(n_images):
    generator = torch.Generator().manual_seed(6)
    sums, counts = draw(two_means(0.3), 24, 0.3, generator)
    sums[1, n_images:] = counts[1, n_images:] = 0
    found = grouped_similarities(sums, counts)
    assert (found.lower[0, 1], found.upper[0, 1]) == (-1, 1)
    assert found.corrected[0, 1] == found.cosine[0, 1]
    assert np.isfinite(found.cosine).all()
    assert np.isfinite(found.reliability).all()


def test_empty_groups_do_not_count():
    """Five images of a class: the jackknife is over five groups, with four degrees of freedom."""
    generator = torch.Generator().manual_seed(7)
    sums, counts = draw(two_means(0.3), 24, 0.1, generator)
    sums[1, 5:] = counts[1, 5:] = 0
    found = grouped_similarities(sums, counts)
    args = (list(sums[0]), counts[0].tolist(), list(sums[1, :5]), counts[1, :5].tolist())
    value, deviation = reference.jackknife(*args)
    assert found.corrected[0, 1] == pytest.approx(value, rel=1e-9)
    assert found.upper[0, 1] - found.corrected[0, 1] == pytest.approx(2.776445105 * deviation, rel=1e-6)
    assert found.upper[0, 1] < 1


def test_vectors_of_zeros_are_no_evidence():
    sums = torch.zeros(3, N_GROUPS, 4).double()
    sums[0] = torch.eye(N_GROUPS, 4).double() + 1
    found = grouped_similarities(sums, torch.ones(3, N_GROUPS))
    assert found.cosine.tolist() == np.ones((3, 3)).tolist()
    for a, b in ((0, 1), (1, 2), (2, 0)):
        assert (found.corrected[a, b], found.lower[a, b], found.upper[a, b]) == (1, -1, 1)
    assert found.reliability[1:].tolist() == [0, 0]


def test_plain_similarities_claim_no_more_than_the_cosine():
    vectors = torch.randn(4, 3, generator=torch.Generator().manual_seed(8))
    found = plain_similarities(vectors)
    assert np.array_equal(found.cosine, cosine_similarities(vectors))
    assert np.array_equal(found.corrected, found.cosine)
    assert np.isnan(found.lower).all()
    assert np.isnan(found.upper).all()
    assert np.isnan(found.reliability).all()
