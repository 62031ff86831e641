"""K-means of many small clouds at once.

A layer has thousands of channels, each with a cloud of its own, and each of those is compared with dozens of made-up
ones. A library that takes one at a time needs minutes where this takes seconds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_STEPS = 20


class Clustering(NamedTuple):
    """Clusters of ``G`` clouds.

    Attributes:
        labels: Cluster of each point, ``[G, n]``, integer; means nothing where a point does not count.
        centres: ``[G, k, P]``.
        inertia: Sum over the points that count of the squared distance to their centre, ``[G]``.
    """

    labels: Tensor
    centres: Tensor
    inertia: Tensor


def k_means(points: Tensor, counts: Tensor, k: int, generator: torch.Generator, n_starts: int = 3) -> Clustering:
    """K-means of each cloud: the best of several starts by k-means++, each improved until nothing changes.

    Args:
        points: ``[G, n, P]``, floating point.
        counts: Which points count, ``[G, n]``, boolean; at least one in each cloud.
        k: Number of clusters.
        generator: Draws the starts.
        n_starts: How many.

    Example:
        >>> import torch
        >>> points = torch.tensor([[[0.0], [0.1], [5.0], [5.1]]])
        >>> found = k_means(points, torch.ones(1, 4, dtype=torch.bool), 2, torch.Generator().manual_seed(0))
        >>> bool(found.labels[0, 0] == found.labels[0, 1] != found.labels[0, 2] == found.labels[0, 3])
        True
    """
    if not len(points):
        return Clustering(counts.long(), points.new_zeros(0, k, points.shape[2]), points.new_zeros(0))
    best = _improved(points, counts, _start(points, counts, k, generator))
    for _ in range(n_starts - 1):
        other = _improved(points, counts, _start(points, counts, k, generator))
        is_better = other.inertia < best.inertia
        best = Clustering(*(_chosen(is_better, new, old) for new, old in zip(other, best, strict=True)))
    return best


def nearest_centre(points: Tensor, centres: Tensor) -> Tensor:
    """Which centre each point is nearest to, ``[G, n]``.

    Args:
        points: ``[G, n, P]``.
        centres: ``[G, k, P]``.
    """
    return ((centres**2).sum(2)[:, None] - 2 * points @ centres.mT).argmin(2)


def _chosen(condition: Tensor, values: Tensor, others: Tensor) -> Tensor:
    return torch.where(condition.view(-1, *[1] * (values.ndim - 1)), values, others)


def _start(points: Tensor, counts: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Centres to start from: points, each drawn in proportion to its squared distance from those drawn before."""
    weights = counts.to(points.dtype)
    distance = torch.full_like(weights, torch.inf)
    centres: list[Tensor] = []
    for _ in range(k):
        drawn = torch.multinomial(weights, 1, generator=generator)[..., None].expand(-1, -1, points.shape[2])
        centres.append(points.gather(1, drawn))
        distance = torch.minimum(distance, ((points - centres[-1]) ** 2).sum(2))
        weights = (distance + 1e-20) * counts  # something, lest there be nothing to draw where all points are alike
    return torch.cat(centres, dim=1)


def _improved(points: Tensor, counts: Tensor, centres: Tensor) -> Clustering:
    labels = nearest_centre(points, centres)
    for _ in range(MAX_STEPS):
        owns = F.one_hot(labels, centres.shape[1]).to(points.dtype) * counts[..., None]
        sizes = owns.sum(1)[..., None]
        centres = torch.where(sizes > 0, owns.mT @ points / sizes.clamp(min=1), centres)
        moved = nearest_centre(points, centres)
        if torch.equal(moved, labels):
            break
        labels = moved
    own = centres.gather(1, labels[..., None].expand(-1, -1, points.shape[2]))
    return Clustering(labels, centres, (((points - own) ** 2).sum(2) * counts).sum(1))
