"""A layer's clusters at a glance."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from lightning_polydis.card_builder import N_BINS, N_CHANNELS, N_CLASSES, N_NEAR
from lightning_polydis.cards import LayerOverview, NearMiss

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from lightning_polydis.clusters.evidence import ClusterEvidence
    from lightning_polydis.detection import PolysemanticChannel, PolysemanticPair


def cluster_overview(
    evidence: ClusterEvidence, channels: Sequence[PolysemanticChannel], pairs: Sequence[PolysemanticPair]
) -> LayerOverview:
    """One layer at a glance: as `card_builder.build_overview`, of pairs of clusters.

    ``relevance`` holds, for each channel shown, the share of its clusters' images that is of each class; no classes
    are shown where any is unknown.

    Args:
        evidence: Of the layer.
        channels: Those flagged in it, lowest similarity first.
        pairs: Flagged pairs of the layer.
    """
    candidates = list(_candidates(evidence))
    cosines = np.concatenate([np.empty(0), *(own for _, own in candidates)])
    low = min(0.0, float(np.floor(cosines.min(initial=0) * 10) / 10))
    edges = np.linspace(low, 1, N_BINS + 1)
    flagged = [channel.channel for channel in channels]
    others = [miss for miss, _ in candidates if miss.channel not in set(flagged)]
    others.sort(key=lambda miss: miss.compared)
    shown = [*flagged, *(miss.channel for miss in others)][:N_CHANNELS]
    classes, shares = _shares(evidence, shown)
    return LayerOverview(
        evidence.name,
        edges.tolist(),
        np.histogram(cosines, edges)[0].tolist(),
        np.histogram([pair.cosine_similarity for pair in pairs], edges)[0].tolist(),
        (evidence.threshold, evidence.threshold),
        shown,
        classes,
        shares,
        others[:N_NEAR],
        has_clusters=True,
    )


def _candidates(evidence: ClusterEvidence) -> Iterator[tuple[NearMiss, np.ndarray]]:
    """Each channel that has clusters: its two least similar ones, and the similarities of all."""
    for channel in evidence.candidates:
        view = evidence.of_channel(channel)
        numbers = list(range(len(view.statistics.n_images)))
        cosine = view.similarities(channel, numbers).cosine
        rows, columns = np.triu_indices(len(numbers), k=1)
        least = int(cosine[rows, columns].argmin())
        value = float(cosine[rows[least], columns[least]])
        miss = NearMiss(channel, int(rows[least]), int(columns[least]), value, value, evidence.threshold)
        yield miss, cosine[rows, columns]


def _shares(evidence: ClusterEvidence, channels: Sequence[int]) -> tuple[list[int], list[list[float]]]:
    """The classes that fill some channels' clusters most, in order, and the share that each has of each channel."""
    labels = [_labels(evidence, channel) for channel in channels]
    if any(bool((own < 0).any()) for own in labels):
        return [], [[] for _ in channels]
    counts = Counter(label for own in labels for label in own.tolist())
    classes = sorted(label for label, _ in counts.most_common(N_CLASSES))
    shares = [[round(float((own == label).float().mean()), 4) for label in classes] for own in labels]
    return classes, shares


def _labels(evidence: ClusterEvidence, channel: int) -> Tensor:
    return evidence.lists.labels[torch.cat(evidence.members(channel).rows)]
