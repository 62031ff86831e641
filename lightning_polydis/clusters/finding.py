"""From the relevance vectors of a channel's strongest images to clusters: are there several, and are they real?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_polydis.clusters.kmeans import k_means, nearest_centre

if TYPE_CHECKING:
    from collections.abc import Sequence

MIN_IMAGES = 24
"""Vectors that it takes to look for clusters at all."""

MAX_CLUSTERS = 5
MIN_SHARE, MIN_SIZE = 0.05, 5
"""The smallest cluster that counts, as a share of the images and as a number of them."""

MIN_EXCESS = 4.0
"""How much tighter than those of one cloud the clusters have to be, in standard deviations."""

MIN_STABILITY = 0.7
"""Least adjusted Rand index between what two halves of the images find."""

ALL_ALIKE = 1 - 1e-5
"""Similarity of centres that rounding alone may fall short of."""

SLACK = 1.1
"""How much larger than it was found to be a variance may be."""

N_AXES = 16
"""Principal axes that clusters are looked for in."""

N_ITERATIONS = 2
"""Steps of subspace iteration that find the axes: where there are clusters, a few axes stand out."""

N_FIRST, N_CLOUDS = 4, 24
"""Made-up clouds that a channel is compared with: to begin with, and if it may have clusters."""

BATCH = 64
"""Clouds that are worked on together."""


@dataclass(frozen=True)
class Clusters:
    """The clusters of one cloud of vectors.

    Attributes:
        labels: Cluster of each vector, from 0, the largest first, ``[n]``, integer.
        excess: By how much the clusters are tighter than those of one Gaussian cloud with the same covariance, in
            standard deviations of the latter.
        stability: Adjusted Rand index between the clusters that two halves of the vectors lead to.
    """

    labels: Tensor
    excess: float
    stability: float

    @property
    def k(self) -> int:
        """Number of clusters."""
        return int(self.labels.max()) + 1


def find_clusters(clouds: Sequence[Tensor], most_alike: float = 1.0) -> list[Clusters | None]:
    """Clusters in clouds of relevance vectors; `None` is the usual answer: the cloud is one.

    Vectors are scaled to unit length, so that it matters which sources made the channel fire and not how much, and
    looked at along their principal axes. For each number of clusters k-means has to find none that is tiny, some whose
    centres differ, and the same from two halves of the vectors (`MIN_STABILITY`); and it has to be tighter than on
    clouds that are one, drawn from a Gaussian of the same covariance (as in SigClust: Liu et al., J. Am. Stat. Assoc.
    103, 2008), by `MIN_EXCESS` standard deviations of the logarithm of the inertia. Of the numbers of clusters that
    pass, the one with the largest silhouette is taken.

    Args:
        clouds: ``[n, I]`` each, floating point, with at least `MIN_IMAGES` vectors. In an order that does not depend
            on what is looked for, for every other vector is in the other half: by activation, for instance.
        most_alike: Cosine similarity that some two centres have to fall below.

    Example:
        >>> import torch
        >>> draw = torch.Generator().manual_seed(0)
        >>> one = torch.randn(60, 8, generator=draw) * 0.1 + torch.eye(8)[0]
        >>> two = torch.cat([one[:30], torch.randn(30, 8, generator=draw) * 0.1 + torch.eye(8)[1]])
        >>> [found and found.k for found in find_clusters([one, two])]
        [None, 2]
    """
    found: list[Clusters | None] = [None] * len(clouds)
    able = [place for place, cloud in enumerate(clouds) if _may_differ(cloud, most_alike)]
    order = sorted(able, key=lambda place: (-len(clouds[place]), place))  # alike in size: little padding
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        # Seeded for each batch: what is found in it does not depend on how many were before.
        generator = torch.Generator().manual_seed(start)
        points = _principal([clouds[place] for place in places], generator)
        able_too = _may_part(points, most_alike)
        places, points = (
            [place for place, is_able in zip(places, able_too.tolist(), strict=True) if is_able],
            points[able_too],
        )
        for place, clusters in zip(places, _of_batch(points, most_alike, generator), strict=True):
            found[place] = clusters
    return found


def _may_differ(cloud: Tensor, most_alike: float) -> bool:
    """Whether two clusters' centres can be so far apart at all; often not, and that is quickly seen.

    The cosine of a centre with the mean of all vectors is at least the mean of its members' cosines, and so at least
    that of as many members as the smallest cluster may have, those with the lowest.
    """
    units = F.normalize(cloud.float(), dim=1)
    cosines = units @ F.normalize(units.mean(0), dim=0)
    lowest = cosines.topk(min(_least_members(len(cloud)), len(cloud)), largest=False).values.mean()
    angle = 2 * math.acos(min(1.0, max(-1.0, float(lowest))))
    return angle >= math.pi or math.cos(angle) < most_alike


def _may_part(points: _Points, most_alike: float) -> Tensor:
    r"""Whether two clusters' centres can be so far apart, given the variance along the first axis, ``[G]``, boolean.

    Centres of clusters that hold shares :math:`p` and :math:`q` are no further apart than
    :math:`\sqrt{\lambda (1 / p + 1 / q)}`, with the largest variance :math:`\lambda`; they are as long as `_may_differ`
    says.
    """
    n = points.counts.sum(1)
    least = torch.tensor([_least_members(count) for count in n.tolist()])
    cosines = (points.units @ F.normalize(points.units.sum(1), dim=1)[..., None])[..., 0]
    ascending = cosines.masked_fill(~points.counts, torch.inf).sort(1).values
    shortest = ascending.cumsum(1).gather(1, least[:, None] - 1)[:, 0] / least
    furthest = SLACK * points.spreads[:, 0] ** 2 * 2 * n / least
    return (shortest <= 0) | (1 - furthest / (2 * shortest**2) < most_alike)


def _least_members(n: int) -> int:
    """Members that a cluster of so many vectors needs."""
    return max(MIN_SIZE, math.ceil(MIN_SHARE * n))


def _of_batch(points: _Points, most_alike: float, generator: torch.Generator) -> list[Clusters | None]:
    best: dict[int, tuple[float, Clusters]] = {}
    for k in range(2, MAX_CLUSTERS + 1):
        fitted = k_means(points.points, points.counts, k, generator)
        # The cheap questions first: hardly any cloud is left for the expensive one.
        live = _is_plain(points, fitted.labels, k, most_alike).nonzero()[:, 0]
        stability = _stability(points[live], k, generator)
        live, stability = live[stability > MIN_STABILITY], stability[stability > MIN_STABILITY]
        excess = _excess(points[live], fitted.inertia[live], k, generator)
        for place, agreement, own in zip(live.tolist(), stability.tolist(), excess.tolist(), strict=True):
            counts = points.counts[place]
            labels = fitted.labels[place][counts]
            shape = _silhouette(points.points[place][counts], labels)
            if own > MIN_EXCESS and (place not in best or shape > best[place][0]):
                best[place] = (shape, Clusters(_by_size(labels), own, agreement))
    return [best[place][1] if place in best else None for place in range(len(points.points))]


@dataclass(frozen=True)
class _Points:
    """Clouds along their principal axes.

    Attributes:
        points: ``[G, n, P]``, centred.
        counts: Which of them count, ``[G, n]``; the others are padding.
        spreads: Standard deviation along each axis, ``[G, P]``.
        units: The unit vectors themselves, ``[G, n, I]``.
    """

    points: Tensor
    counts: Tensor
    spreads: Tensor
    units: Tensor

    def __getitem__(self, which: Tensor) -> _Points:
        return _Points(self.points[which], self.counts[which], self.spreads[which], self.units[which])


def _principal(clouds: Sequence[Tensor], generator: torch.Generator) -> _Points:
    """Unit vectors, centred, along their principal axes, by subspace iteration: exact enough, and much faster."""
    n, n_inputs = max(map(len, clouds)), clouds[0].shape[1]
    units = torch.zeros(len(clouds), n, n_inputs, dtype=torch.float32)
    counts = torch.zeros(len(clouds), n, dtype=torch.bool)
    for place, cloud in enumerate(clouds):
        units[place, : len(cloud)] = F.normalize(cloud.float(), dim=1)
        counts[place, : len(cloud)] = True
    centred = (units - units.sum(1, keepdim=True) / counts.sum(1)[:, None, None]) * counts[..., None]
    n_axes = min(N_AXES, n, n_inputs)
    axes = torch.randn(len(clouds), n_inputs, n_axes, dtype=units.dtype, generator=generator)
    for _ in range(N_ITERATIONS):
        axes = torch.linalg.qr(centred.mT @ (centred @ axes)).Q
    found = centred @ axes
    found = found @ torch.linalg.eigh(found.mT @ found).eigenvectors.flip(2)
    spreads = ((found**2).sum(1) / (counts.sum(1, keepdim=True) - 1)).sqrt()
    return _Points(found, counts, spreads, units)


def _is_plain(points: _Points, labels: Tensor, k: int, most_alike: float) -> Tensor:
    """Whether no cluster is tiny and two centres differ, ``[G]``, boolean."""
    owns = F.one_hot(labels, k).to(points.units.dtype) * points.counts[..., None]
    least = torch.tensor([_least_members(n) for n in points.counts.sum(1).tolist()])
    centres = F.normalize(owns.mT @ points.units, dim=2)
    return (owns.sum(1).amin(1) >= least) & ((centres @ centres.mT).flatten(1).amin(1) < min(most_alike, ALL_ALIKE))


def _stability(points: _Points, k: int, generator: torch.Generator) -> Tensor:
    """How well the clusters agree that the centres found in either half of the points make of all of them, ``[G]``."""
    is_even = torch.arange(points.counts.shape[1]) % 2 == 0
    halves = (points.counts & is_even, points.counts & ~is_even)
    found = [nearest_centre(points.points, k_means(points.points, half, k, generator).centres) for half in halves]
    pairs = zip(*found, points.counts, strict=True)
    return torch.tensor([adjusted_rand_index(first[own], second[own]) for first, second, own in pairs])


def _excess(points: _Points, inertia: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """By how many standard deviations the logarithm of the inertia is below that of Gaussian clouds, ``[G]``.

    A few clouds tell for most channels that there is nothing to find; only for the others it takes many.
    """
    if not len(inertia):
        return inertia
    own = _log_share(inertia, points.points)
    first = _of_gaussians(points, k, N_FIRST, generator)
    excess = torch.full_like(own, -torch.inf)
    hopeful = (own < first.mean(0)).nonzero()[:, 0]
    if not len(hopeful):
        return excess
    more = _of_gaussians(points[hopeful], k, N_CLOUDS - N_FIRST, generator)
    null = torch.cat([first[:, hopeful], more])
    excess[hopeful] = (null.mean(0) - own[hopeful]) / null.std(0).clamp(min=1e-6)
    return excess


def _of_gaussians(points: _Points, k: int, n_clouds: int, generator: torch.Generator) -> Tensor:
    """Logarithm of k-means' share of the total, of Gaussian clouds with the points' spreads, ``[n_clouds, G]``."""
    logs = []
    for together in torch.arange(n_clouds).split(max(1, BATCH // len(points.points))):
        counts = points.counts.repeat(len(together), 1)
        shape = (len(counts), *points.points.shape[1:])
        noise = torch.randn(shape, dtype=points.points.dtype, generator=generator)
        cloud = noise * points.spreads.repeat(len(together), 1)[:, None] * counts[..., None]
        sizes = counts.sum(1)[:, None, None]
        cloud = (cloud - cloud.sum(1, keepdim=True) / sizes) * counts[..., None]
        logs.append(_log_share(k_means(cloud, counts, k, generator).inertia, cloud).view(len(together), -1))
    return torch.cat(logs)


def _log_share(inertia: Tensor, points: Tensor) -> Tensor:
    """Logarithm of an inertia over the total of centred points, ``[G]``."""
    tiny = torch.finfo(points.dtype).tiny
    return (inertia / (points**2).sum((1, 2)).clamp(min=tiny)).clamp(min=tiny).log()


def adjusted_rand_index(first: Tensor, second: Tensor) -> float:
    """How well two clusterings of the same points agree: 1 is perfect, 0 is chance (Hubert and Arabie, 1985).

    Args:
        first: Cluster of each point, ``[n]``, integer.
        second: Likewise.

    Example:
        >>> import torch
        >>> adjusted_rand_index(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1, 0, 0]))
        1.0
    """
    width = int(second.max()) + 1
    table = (first * width + second).bincount(minlength=(int(first.max()) + 1) * width).view(-1, width).double()
    both, rows, columns = (float((counts * (counts - 1) / 2).sum()) for counts in (table, table.sum(1), table.sum(0)))
    chance = rows * columns / max(len(first) * (len(first) - 1) / 2, 1)
    largest = (rows + columns) / 2
    return 1.0 if largest == chance else (both - chance) / (largest - chance)


def _silhouette(points: Tensor, labels: Tensor) -> float:
    """Mean silhouette of some points ``[n, P]``: how much nearer each is to its own cluster than to the next one."""
    owns = F.one_hot(labels).to(points.dtype)
    sums, sizes = torch.cdist(points, points) @ owns, owns.sum(0)
    own = labels[:, None]
    inside = sums.gather(1, own)[:, 0] / (sizes[labels] - 1).clamp(min=1)
    outside = (sums / sizes).scatter(1, own, torch.inf).amin(1)
    return float(((outside - inside) / torch.maximum(inside, outside)).mean())


def _by_size(labels: Tensor) -> Tensor:
    """The same clusters, numbered from the largest to the smallest."""
    order = labels.bincount().argsort(descending=True, stable=True)
    return order.argsort()[labels]
