"""K-means of many small clouds at once.

A layer has thousands of channels, each with a cloud of its own, and for each cloud there are clouds to compare it with.
One at a time, by a library, that takes minutes where this takes seconds; that both find clusters equally tight is tested.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_STEPS = 20


class Clustering(NamedTuple):
    """Clusters of ``G`` clouds.

    Attributes:
        labels: Cluster of each point, ``[G, n]``, integer; that of points that do not count means nothing.
        centres: ``[G, k, P]``.
        inertia: Sum of squared distances to the own centre, ``[G]``.
    """

    labels: Tensor
    centres: Tensor
    inertia: Tensor


def k_means(points: Tensor, counts: Tensor, k: int, generator: torch.Generator, n_starts: int = 3) -> Clustering:
    """K-means of each cloud, the best of several starts (k-means++, arXiv:cs/0703125 has none of it by that name).

    Args:
        points: ``[G, n, P]``.
        counts: Which points count, ``[G, n]``, boolean; at least ``k`` in each cloud.
        k: Number of clusters.
        generator: Draws the starts.
        n_starts: How many.
    """
    best = _lloyd(points, counts, _start(points, counts, k, generator))
    for _ in range(n_starts - 1):
        other = _lloyd(points, counts, _start(points, counts, k, generator))
        is_better = other.inertia < best.inertia
        best = Clustering(*(_where(is_better, new, old) for new, old in zip(other, best, strict=True)))
    return best


def _where(condition: Tensor, values: Tensor, others: Tensor) -> Tensor:
    return torch.where(condition.view(-1, *[1] * (values.ndim - 1)), values, others)


def _start(points: Tensor, counts: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Centres to start from, each a point drawn in proportion to its squared distance from those before it."""
    weights = counts.to(points.dtype)
    centres: list[Tensor] = []
    nearest = torch.full_like(weights, torch.inf)
    for _ in range(k):
        drawn = torch.multinomial(weights, 1, generator=generator)[:, :, None].expand(-1, -1, points.shape[2])
        centres.append(points.gather(1, drawn))
        nearest = torch.minimum(nearest, ((points - centres[-1]) ** 2).sum(2))
        weights = nearest * counts + counts * 1e-20  # where all points are alike, any will do
    return torch.cat(centres, dim=1)


def _lloyd(points: Tensor, counts: Tensor, centres: Tensor) -> Clustering:
    weights = counts.to(points.dtype)
    labels = nearest_centre(points, centres)
    for _ in range(MAX_STEPS):
        owns = torch.nn.functional.one_hot(labels, centres.shape[1]).to(points.dtype) * weights[..., None]
        sizes = owns.sum(1)[..., None]
        centres = torch.where(sizes > 0, owns.mT @ points / sizes.clamp(min=1), centres)
        moved = nearest_centre(points, centres)
        if torch.equal(moved, labels):
            break
        labels = moved
    own = centres.gather(1, labels[..., None].expand(-1, -1, points.shape[2]))
    return Clustering(labels, centres, (((points - own) ** 2).sum(2) * weights).sum(1))


def nearest_centre(points: Tensor, centres: Tensor) -> Tensor:
    """Which centre each point is nearest to, ``[G, n]``.

    Args:
        points: ``[G, n, P]``.
        centres: ``[G, k, P]``.
    """
    return ((centres**2).sum(2)[:, None] - 2 * points @ centres.mT).argmin(2)
