"""K-means of many small clouds at once.

A layer has thousands of channels, each with a cloud of its own, and each of those is compared with dozens of made-up
ones. A library that takes one at a time needs minutes where this takes seconds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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
    together, both = points.repeat(n_starts, 1, 1), counts.repeat(n_starts, 1)  # start by start
    found = _improved(together, both, _start(together, both, k, generator))
    best = found.inertia.view(n_starts, -1).argmin(0)
    chosen = best * len(points) + torch.arange(len(points), device=points.device)
    return Clustering(*(part[chosen] for part in found))


def nearest_centre(points: Tensor, centres: Tensor) -> Tensor:
    """Which centre each point is nearest to, ``[G, n]``.

    Args:
        points: ``[G, n, P]``.
        centres: ``[G, k, P]``.
    """
    return torch.baddbmm((centres**2).sum(2)[:, None], points, centres.mT, alpha=-2).argmin(2)


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
    labels, numbers = nearest_centre(points, centres), torch.arange(centres.shape[1], device=points.device)
    for _ in range(MAX_STEPS):
        owns = ((labels[..., None] == numbers) & counts[..., None]).to(points.dtype)
        sizes = owns.sum(1)[..., None]
        centres = torch.where(sizes > 0, owns.mT @ points / sizes.clamp(min=1), centres)
        moved = nearest_centre(points, centres)
        if torch.equal(moved, labels):
            break
        labels = moved
    own = centres.gather(1, labels[..., None].expand(-1, -1, points.shape[2]))
    return Clustering(labels, centres, (((points - own) ** 2).sum(2) * counts).sum(1))
