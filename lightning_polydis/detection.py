"""From statistics to polysemantic channels and their concepts: pure functions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lightning_polydis.calibration import CalibratedThresholds
    from lightning_polydis.similarity import Similarities


@dataclass(frozen=True)
class PolysemanticPair:
    """Two classes that a channel is relevant for and reads from different sources.

    Attributes:
        layer: Name of the layer.
        channel: Index of the output channel.
        class_a: The smaller class index.
        class_b: The larger class index.
        cosine_similarity: Between the averaged relevance vectors of the two classes, in [-1, 1], as measured. This is
            compared with a threshold that is a number; a calibrated one is compared with the similarity without noise
            (`similarity.Similarities`).
        interval: 95 % interval of the similarity that very many images would give, see
            `similarity.grouped_similarities`; `None` where it was not measured.
        is_clear: Whether the whole interval lies below the threshold; `None` where it was not measured.
    """

    layer: str
    channel: int
    class_a: int
    class_b: int
    cosine_similarity: float
    interval: tuple[float, float] | None = None
    is_clear: bool | None = None


@dataclass(frozen=True)
class PolysemanticChannel:
    """A channel that stands for several concepts.

    Attributes:
        layer: Name of the layer.
        channel: Index of the output channel.
        classes: The classes it is relevant for, ascending.
        concepts: Those classes in groups: any two classes of one group read similar sources. Ordered by smallest class.
        cosine_similarity: The lowest between any two of its classes.
        reliability: How well the averaged relevance vectors of its classes are known, in [0, 1]: that of the least
            known one; `None` where it was not measured.
        threshold: The similarity threshold that applied to it.
        is_clear: Whether the interval of at least one pair lies below the threshold; `None` where it was not measured.
        contents: With ``concepts="clusters"``, where ``classes`` are numbers of clusters: the real classes that fill
            each concept and their share of its images, most frequent first, at most five (none where no classes are
            known). `None` with ``concepts="classes"``.
        stability: With ``concepts="clusters"``, how well clusters found in one half of the images agree with those
            found in the other: adjusted Rand index, 1 is perfect, 0 is chance; the least of its directions.
    """

    layer: str
    channel: int
    classes: list[int]
    concepts: list[list[int]]
    cosine_similarity: float
    reliability: float | None = None
    threshold: float | None = None
    is_clear: bool | None = None
    contents: list[list[tuple[int, float]]] | None = None
    stability: float | None = None


@dataclass(frozen=True)
class LayerDetection:
    """What was found in one layer.

    Attributes:
        layer: Name of the layer.
        channels: Polysemantic channels, lowest similarity first.
        pairs: Polysemantic pairs, lowest similarity first.
        n_candidates: Channels that are relevant for at least two classes.
        similarities: Cosine similarity of every candidate pair, flagged or not, ``[pairs]``, ``float64``.
    """

    layer: str
    channels: list[PolysemanticChannel]
    pairs: list[PolysemanticPair]
    n_candidates: int
    similarities: np.ndarray = field(repr=False)


def averaged_relevance_vectors(weight: Tensor, mean_window_sums: Tensor) -> Tensor:
    r"""Mean relevance of each input channel for a channel's own output, by class.

    :math:`a_{tk} = \sum_{ij} w_{kij} u_{tkij}`: the closed form of input x gradient averaged over the images of class
    :math:`t`, since the layer is linear in its input (arXiv:2504.12939, section 3).

    Args:
        weight: Weights of one channel, ``[I, k]``.
        mean_window_sums: ``[T, I, k]`` for ``T`` classes, see `statistics.ClassStatistics`.

    Returns:
        ``[T, I]``, ``float64``, in units of the channel's output summed over positions.

    Example:
        >>> import torch
        >>> averaged_relevance_vectors(torch.tensor([[2.0], [-1.0]]), torch.ones(1, 2, 1))
        tensor([[ 2., -1.]], dtype=torch.float64)
    """
    return (weight.double() * mean_window_sums.double()).sum(-1)


def group_classes(classes: list[int], similarities: np.ndarray, similarity_threshold: float) -> list[list[int]]:
    """Group classes whose vectors are similar into concepts.

    Complete linkage, cut at the threshold: any two classes of a concept have at least that similarity.

    Args:
        classes: ``T`` class indices, ascending.
        similarities: ``[T, T]``.
        similarity_threshold: Cut.

    Returns:
        The groups, ordered by their smallest class.

    Example:
        >>> import numpy as np
        >>> group_classes([3, 5, 8], np.array([[1, 0.9, 0.1], [0.9, 1, 0.2], [0.1, 0.2, 1]]), 0.5)
        [[3, 5], [8]]
    """
    distances = squareform(1 - similarities, checks=False)
    labels = fcluster(linkage(distances, "complete"), 1 - similarity_threshold, criterion="distance")
    groups: dict[int, list[int]] = {}
    for label, class_index in zip(labels, classes, strict=True):
        groups.setdefault(int(label), []).append(class_index)
    return sorted(groups.values())


@dataclass(frozen=True)
class SimilarityRule:
    """When two classes of a channel count as different concepts.

    Attributes:
        thresholds: Similarity below which they do: one for all channels, or one for each, ``thresholds[channel]``.
        is_calibrated: Whether the thresholds are for noise-corrected similarities. The difference must then also be
            one that two halves of a class would not show: the interval must end below 1.
    """

    thresholds: float | CalibratedThresholds | Mapping[int, float]
    is_calibrated: bool = False

    def threshold(self, channel: int) -> float:
        """The threshold of a channel."""
        return self.thresholds if isinstance(self.thresholds, float) else self.thresholds[channel]

    def compared(self, similarities: Similarities) -> np.ndarray:
        """What is compared with the threshold, ``[T, T]``; 1 for what no image could tell from a half of one class."""
        if not self.is_calibrated:
            return similarities.cosine
        return np.where(similarities.upper < 1, similarities.corrected, 1)


def detect(
    layer: str, relevant: Tensor, similarities_of: Callable[[int, list[int]], Similarities], rule: SimilarityRule
) -> LayerDetection:
    """Find the polysemantic channels of a layer.

    A pair of classes is flagged if the channel is relevant for both and the similarity of their averaged relevance
    vectors is below the threshold (arXiv:2504.12939, section 3). One channel at a time: no array of classes x
    channels x inputs is ever made.

    Args:
        layer: Name of the layer, for the result.
        relevant: Which channels are relevant for which class, ``[K, C]``, boolean.
        similarities_of: ``similarities_of(channel, classes)`` gives the similarities of the classes' vectors.
        rule: When a pair is flagged.
    """
    candidates = (relevant.sum(0) >= 2).nonzero()[:, 0].tolist()
    channels, pairs, seen = [], [], [np.empty(0)]
    for channel in candidates:
        classes = relevant[:, channel].nonzero()[:, 0].tolist()
        similarities = similarities_of(channel, classes)
        seen.append(similarities.cosine[np.triu_indices(len(classes), k=1)])
        flagged = _flagged_pairs(layer, channel, classes, similarities, rule)
        pairs += flagged
        if flagged:
            channels.append(_flagged_channel(layer, channel, classes, similarities, rule, flagged))
    return LayerDetection(
        layer,
        sorted(channels, key=lambda found: found.cosine_similarity),
        sorted(pairs, key=lambda found: found.cosine_similarity),
        len(candidates),
        np.concatenate(seen),
    )


def _flagged_pairs(
    layer: str, channel: int, classes: list[int], similarities: Similarities, rule: SimilarityRule
) -> list[PolysemanticPair]:
    threshold = rule.threshold(channel)
    # The same expression as in `group_classes`, so that rounding cannot make the two disagree.
    low = np.triu(1 - rule.compared(similarities) > 1 - threshold, k=1)
    pairs = []
    for a, b in zip(*low.nonzero(), strict=True):
        interval = (float(similarities.lower[a, b]), float(similarities.upper[a, b]))
        known = not np.isnan(interval[0])
        pairs.append(
            PolysemanticPair(
                layer,
                channel,
                classes[a],
                classes[b],
                float(similarities.cosine[a, b]),
                interval if known else None,
                interval[1] < threshold if known else None,
            )
        )
    return pairs


def _flagged_channel(
    layer: str,
    channel: int,
    classes: list[int],
    similarities: Similarities,
    rule: SimilarityRule,
    flagged: list[PolysemanticPair],
) -> PolysemanticChannel:
    threshold = rule.threshold(channel)
    reliability = float(similarities.reliability.min())
    known = not np.isnan(reliability)
    return PolysemanticChannel(
        layer,
        channel,
        classes,
        group_classes(classes, rule.compared(similarities), threshold),
        float(similarities.cosine.min()),
        reliability if known else None,
        threshold,
        any(pair.is_clear for pair in flagged) if known else None,
    )
