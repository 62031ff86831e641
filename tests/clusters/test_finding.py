"""Clusters in clouds of relevance vectors: k-means, how real they are, and what must not be taken for clusters."""

import pytest
import torch
from torch.nn import functional as F

from lightning_polydis.clusters.finding import (
    MAX_CLUSTERS,
    MIN_IMAGES,
    MIN_SIZE,
    _least_members,
    _may_differ,
    _may_part,
    _principal,
    _silhouette,
    adjusted_rand_index,
    find_clusters,
)
from lightning_polydis.clusters.kmeans import k_means, nearest_centre


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(0)


def drawn(*shape, draw):
    return torch.randn(*shape, generator=draw)


def lumps(n, n_inputs, k, draw, apart=3.0):
    """Points around ``k`` centres, and which each belongs to."""
    centres = apart * drawn(k, n_inputs, draw=draw)
    own = torch.arange(n) % k
    return centres[own] + drawn(n, n_inputs, draw=draw), own


def planted(n, k, draw, n_inputs=12, noise=0.1):
    """Vectors around ``k`` orthogonal directions, of all lengths, and which each belongs to."""
    own = torch.arange(n) * k // n
    own = own[torch.randperm(n, generator=draw)]
    vectors = torch.eye(n_inputs)[own] + noise * drawn(n, n_inputs, draw=draw)
    return vectors * torch.rand(n, 1, generator=draw).add(0.5), own


def test_clouds_that_are_left_out_at_once_cannot_fall_apart(draw):
    """Whichever way their vectors are parted: along each axis, at random, and one by one around the farthest ones."""
    clouds = [
        torch.eye(10)[0] + noise * drawn(n, 10, draw=draw) * torch.arange(1, 11) ** -falloff
        for n in (24, 40, 111)
        for noise in (0.02, 0.05, 0.08, 0.1, 0.15, 0.2, 0.3)
        for falloff in (0.0, 1.0)
    ]
    points = _principal(clouds, draw)
    for limit in (0.8, 0.925):
        able = torch.tensor([_may_differ(cloud, limit) for cloud in clouds]) & _may_part(points, limit)
        assert 0.1 < float(able.float().mean()) < 0.9
        for place in (~able).nonzero()[:, 0].tolist():
            units = points.units[place][points.counts[place]]
            least = _least_members(len(units))
            axes = torch.linalg.svd(units - units.mean(0)).Vh
            for scores in [*(units @ axes.T).T, *drawn(20, len(units), draw=draw), *(units @ units.T)]:
                order = scores.argsort()
                for size in (least, len(units) // 2):
                    centres = torch.stack([units[order[:size]].mean(0), units[order[-size:]].mean(0)])
                    assert float(F.cosine_similarity(*centres, dim=0)) >= limit


# ---------------------------------------------------------------------------------------------------- k-means


def test_k_means_is_as_tight_as_that_of_scikit_learn(draw):
    """On single clouds as on those with clusters, full and padded ones."""
    cluster = pytest.importorskip("sklearn.cluster")
    ratios = []
    for trial in range(36):
        k, n_inputs = 2 + trial % 4, 1 + trial % 7
        clouds = [lumps(60, n_inputs, k, draw, apart=3.0 * (trial % 2))[0] for _ in range(4)]
        counts = torch.arange(60) < torch.tensor([60, 24, 37, 51])[:, None]
        points = torch.where(counts[..., None], torch.stack(clouds), 1e3)  # what does not count must not matter
        found = k_means(points, counts, k, torch.Generator().manual_seed(trial))
        for place, own in enumerate(counts):
            theirs = cluster.KMeans(k, n_init=3, random_state=0).fit(points[place][own].numpy())
            ratios.append(float(found.inertia[place]) / theirs.inertia_)
    found = torch.tensor(ratios)
    assert float(found.log().mean().exp()) < 1.02
    assert float(found.median()) < 1.001
    assert float((found < 1.01).float().mean()) >= 0.75, "three starts each: now and then one side is luckier"


def test_labels_centres_and_inertia_belong_together(draw):
    points = torch.stack([lumps(50, 3, 3, draw)[0] for _ in range(5)])
    counts = torch.arange(50) < torch.tensor([50, 49, 30, 8, 3])[:, None]
    found = k_means(points, counts, 3, draw)
    assert torch.equal(found.labels[counts], nearest_centre(points, found.centres)[counts])
    for place, own in enumerate(counts):
        labels, cloud = found.labels[place][own], points[place][own].double()
        distances = torch.cdist(cloud, found.centres[place].double())
        assert torch.equal(labels, distances.argmin(1))
        assert float(found.inertia[place]) == pytest.approx(float(distances.amin(1).pow(2).sum()), rel=1e-4, abs=1e-4)
        for label in labels.unique():
            torch.testing.assert_close(cloud[labels == label].mean(0).float(), found.centres[place][label])


def test_points_that_are_all_alike_or_too_few_are_no_reason_to_fail(draw):
    points = torch.ones(2, 10, 3)
    counts = torch.arange(10) < torch.tensor([10, 1])[:, None]
    assert k_means(points, counts, 4, draw).inertia.tolist() == [0, 0]
    assert k_means(points[:0], counts[:0], 4, draw).centres.shape == (0, 4, 3)


def test_more_starts_find_tighter_clusters(draw):
    points, counts = drawn(20, 60, 2, draw=draw), torch.ones(20, 60, dtype=torch.bool)
    one, ten = (k_means(points, counts, 5, torch.Generator().manual_seed(3), n_starts=n).inertia for n in (1, 10))
    assert bool((ten <= one * 1.01).all())
    assert bool((ten < one * 0.98).any())


# -------------------------------------------------------------------------------------- agreement and silhouette


def test_agreement_is_the_adjusted_rand_index_of_scikit_learn(draw):
    metrics = pytest.importorskip("sklearn.metrics")
    for trial in range(60):
        n = 1 + trial
        first = torch.randint(1 + trial % 5, (n,), generator=draw)
        second = torch.randint(1 + trial % 4, (n,), generator=draw)
        second = torch.where(torch.rand(n, generator=draw) < 0.5, first, second)
        expected = metrics.adjusted_rand_score(first.numpy(), second.numpy())
        assert adjusted_rand_index(first, second) == pytest.approx(expected, abs=1e-12)


def test_the_silhouette_is_that_of_scikit_learn(draw):
    metrics = pytest.importorskip("sklearn.metrics")
    for k in (2, 3, 5):
        points, own = lumps(40, 4, k, draw, apart=1.0)
        expected = metrics.silhouette_score(points.numpy(), own.numpy())
        assert _silhouette(points, own) == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------------------------------ what are no clusters


def spread(kind, n, n_inputs, draw):
    """Points of a Gaussian of mean zero and mean square length 1."""
    cloud = drawn(n, n_inputs, draw=draw)
    if kind == "elongated":
        cloud = cloud * torch.logspace(0, -1.5, n_inputs)
    elif kind == "low rank":
        cloud = drawn(n, 3, draw=draw) @ drawn(3, n_inputs, draw=draw)
    return cloud / cloud.pow(2).sum(1).mean().sqrt()


def directions(n_inputs, draw):
    return F.normalize(drawn(n_inputs, draw=draw), dim=0)


@pytest.mark.parametrize(
    ("kind", "n_inputs", "mean"),
    [
        ("isotropic", 32, 0.0),
        ("elongated", 8, 2.0),
        ("low rank", 8, 4.0),
        ("low rank", 32, 2.0),
    ],
)
def test_a_single_cloud_is_left_alone(kind, n_inputs, mean, draw):
    clouds = []
    for _ in range(300):
        n = int(torch.randint(24, 201, (1,), generator=draw))
        clouds.append(spread(kind, n, n_inputs, draw) + mean * directions(n_inputs, draw))
    found = find_clusters(clouds)
    assert sum(clusters is not None for clusters in found) <= 0.02 * 300


def test_vectors_of_one_source_or_all_alike_are_one_cloud(draw):
    alike = torch.ones(60, 5) * torch.rand(60, 1, generator=draw)
    dead = torch.zeros(40, 5)
    assert find_clusters([alike, dead, torch.rand(50, 5, generator=draw) @ torch.eye(5)[:1].expand(5, 5)]) == [None] * 3
    assert find_clusters([torch.ones(60, 1)]) == [None]
    assert find_clusters([]) == []


def test_clusters_that_two_halves_do_not_agree_on_are_dropped(draw):
    """Four tight lumps, two of which are seen by each half: alternating, each half has only two directions."""
    own = torch.arange(120) % 2 + 2 * (torch.rand(120, generator=draw) < 0.5)
    lumps = F.normalize(
        torch.eye(8)[0]
        + 0.6 * torch.stack([torch.eye(8)[k] for k in (1, 2, 1, 2)]) * torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]),
        dim=1,
    )
    vectors = lumps[own] + 0.02 * drawn(120, 8, draw=draw)
    assert find_clusters([vectors]) == [None]
    (found,) = find_clusters([vectors[torch.randperm(120, generator=draw)]])
    assert found.k == 4
    assert found.stability > 0.9


def test_outliers_are_no_cluster(draw):
    n_strange = MIN_SIZE - 1
    cloud = torch.eye(8)[torch.zeros(60, dtype=torch.long)] + 0.05 * drawn(60, 8, draw=draw)
    cloud[7 : 7 + n_strange] += 20 * torch.eye(8)[1]
    assert find_clusters([cloud]) == [None]
    cloud[7 : 7 + 3 * n_strange] += 20 * torch.eye(8)[1]
    (found,) = find_clusters([cloud])
    assert found.labels.bincount().tolist() == [60 - 3 * n_strange, 3 * n_strange]


# ----------------------------------------------------------------------------------------------- what are clusters


@pytest.mark.parametrize("n", [MIN_IMAGES, 61, 200])
@pytest.mark.parametrize("k", [2, 3])
def test_planted_clusters_are_found_with_their_number(k, n, draw):
    clouds, owners = zip(*(planted(n, k, draw) for _ in range(20)), strict=True)
    for found, own in zip(find_clusters(clouds), owners, strict=True):
        assert found.k == k
        assert adjusted_rand_index(found.labels, own) > 0.95
        assert 0.9 < found.stability <= 1
        assert found.excess > 4


def test_clusters_are_numbered_by_their_size(draw):
    vectors, own = planted(120, 4, draw)
    sizes = (own == 2) | (torch.arange(120) % 3 == 0)  # all of one, a third of the others
    (found,) = find_clusters([vectors[sizes]])
    counts = found.labels.bincount().tolist()
    assert counts == sorted(counts, reverse=True)
    assert adjusted_rand_index(found.labels[found.labels == 0], own[sizes][found.labels == 0]) == 1
    assert int(own[sizes][found.labels == 0][0]) == 2
    assert found.k <= MAX_CLUSTERS


def test_lengths_of_vectors_do_not_matter(draw):
    vectors, own = planted(80, 2, draw)
    lengths = 10 ** (4 * torch.rand(80, 1, generator=draw) - 2)
    first, second = (find_clusters([cloud])[0] for cloud in (vectors, vectors * lengths))
    assert torch.equal(first.labels, second.labels)
    assert adjusted_rand_index(first.labels, own) == 1
    one = F.normalize(torch.ones(8), dim=0) + 0.02 * drawn(80, 8, draw=draw)
    assert find_clusters([torch.cat([one[:40], 5 * one[40:]])]) == [None], "two activations, but the same sources"


@pytest.mark.parametrize("most_alike", [0.75, 0.85])
def test_clusters_whose_centres_are_alike_are_dropped(most_alike, draw):
    """Two centres at an angle with a cosine of 0.8."""
    own = torch.arange(100) % 4 < 2
    centres = torch.where(own[:, None], torch.eye(10)[0], 0.8 * torch.eye(10)[0] + 0.6 * torch.eye(10)[1])
    vectors = centres + 0.03 * drawn(100, 10, draw=draw)
    (found,) = find_clusters([vectors], most_alike)
    assert (found is None) == (most_alike == 0.75)
    assert found is None or adjusted_rand_index(found.labels, own.long()) == 1


def test_of_three_clusters_one_that_differs_is_enough(draw):
    centres = torch.stack([torch.eye(6)[0], 0.8 * torch.eye(6)[0] + 0.6 * torch.eye(6)[1], torch.eye(6)[2]])
    own = torch.arange(120) % 3
    (found,) = find_clusters([centres[own] + 0.02 * drawn(120, 6, draw=draw)], most_alike=0.5)
    assert adjusted_rand_index(found.labels, own) == 1


# --------------------------------------------------------------------------------------------------- and besides


def test_batch_mates_do_not_matter(draw):
    """Clouds of other sizes are padded and drawn for together; what is clear stays clear."""
    clear = [planted(40 + 10 * place, 2 + place % 2, draw) for place in range(6)]
    single = [spread("isotropic", 30 + place, 12, draw) + directions(12, draw) for place in range(90)]
    clouds = [vectors for vectors, _ in clear]
    alone = [find_clusters([cloud])[0] for cloud in clouds]
    among = find_clusters([*single[:45], *clouds, *single[45:]])[45:51]
    for first, second, (_, own) in zip(alone, among, clear, strict=True):
        assert adjusted_rand_index(first.labels, second.labels) == 1
        assert adjusted_rand_index(first.labels, own) == 1
        assert first.stability == pytest.approx(second.stability, abs=0.05)


def test_the_order_of_clouds_does_not_matter_where_sizes_differ(draw):
    clouds = [planted(40 + 3 * place, 2, draw, noise=0.15 + 0.05 * (place % 4))[0] for place in range(12)]
    there, back = find_clusters(clouds), find_clusters(clouds[::-1])[::-1]
    assert 0 < sum(found is None for found in there) < 12
    for first, second in zip(there, back, strict=True):
        assert (first is None) == (second is None)
        assert first is None or torch.equal(first.labels, second.labels)
        assert first is None or (first.excess, first.stability) == (second.excess, second.stability)


def test_the_same_is_found_again_and_global_random_numbers_are_left_alone(draw):
    clouds = [planted(60, 2, draw, noise=0.15)[0], spread("isotropic", 60, 12, draw)]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = find_clusters(clouds)
    assert torch.equal(torch.rand(3), expected)
    again = find_clusters(clouds)
    assert torch.equal(first[0].labels, again[0].labels)
    assert (first[0].excess, first[0].stability) == (again[0].excess, again[0].stability)


def test_half_precision_and_many_inputs_are_fine(draw):
    own = torch.arange(60) % 3 == 0
    vectors = 0.02 * drawn(60, 2048, draw=draw)
    vectors[own, :8] += 1
    vectors[~own, 8:16] += 1
    for cloud in (vectors, F.normalize(vectors, dim=1).half()):
        (found,) = find_clusters([cloud])
        assert adjusted_rand_index(found.labels, own.long()) == 1
