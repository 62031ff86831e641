"""The similarity threshold that suits a layer and a channel: pure functions."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from lightning_polydis.similarity import corrected_similarities, reliabilities

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_polydis.vectors import ClassVectors

LOW_QUANTILE = 0.1
LOWEST = 0.5
"""A similarity below this is low in any layer: it is the paper's threshold (arXiv:2504.12939, section 4)."""

HIGHEST = 0.9
"""Vectors more alike than this are not worth telling apart in any layer."""

MIN_PAIRS = 10
MAX_CHANNELS = 256
MIN_RELIABILITY = 0.5


class CalibratedThresholds:
    r"""A similarity threshold for each channel, from what two arbitrary classes give (``similarity_threshold="auto"``).

    In a narrow layer all relevance vectors are alike, and in a wide one hardly any two are: a cosine similarity means
    nothing by itself. What it is compared with is the similarity of pairs of arbitrary classes: the channel helps both
    (its relevance is positive on average), is relevant for at most one of them, so that the pairs in question are not
    compared with themselves, and both vectors are known well enough. A pair of classes counts as two concepts if it is

    * at least as unlike as two arbitrary classes typically are for this channel (the median), and as unlike as the most
      unlike tenth of arbitrary pairs in the whole layer; but below 0.5 is low in any layer, and above 0.9 there is next
      to nothing to tell apart (labels without meaning give 0.93 and more, and some pair is always the most unlike); and
    * more unlike than two halves of one class are: noise is taken out of all these similarities, after which two halves
      give 1, and the pair's interval must end below 1 (that last rule is `detection.SimilarityRule`'s).

    So the threshold is :math:`\min(\text{median}_c, q_{0.1})`, kept within 0.5 and 0.9. Channels with fewer than ten
    arbitrary pairs take the layer's median; a layer with fewer takes 0.5. The layer's pairs are those of at most 256 of
    its channels, evenly spread.

    Args:
        vectors: Relevance vectors of the layer.
        relevant: Which channels are relevant for which class, ``[K, C]``, boolean.
        helpful: See `statistics.ClassStatistics`, ``[K, C]``, boolean.
    """

    def __init__(self, vectors: ClassVectors, relevant: Tensor, helpful: Tensor) -> None:
        self._vectors = vectors
        self._relevant, self._helpful = relevant.numpy(), helpful.numpy()
        self._known: dict[int, float] = {}

    def __getitem__(self, channel: int) -> float:
        """The threshold of a channel, for noise-corrected similarities; worked out when first asked for."""
        if channel not in self._known:
            self._known[channel] = self._threshold(channel)
        return self._known[channel]

    def _threshold(self, channel: int) -> float:
        if len(self._layer) < MIN_PAIRS:
            return LOWEST
        own = self._arbitrary(channel)
        low, typical = self._of_layer
        if len(own) >= MIN_PAIRS:
            typical = float(np.median(own))
        return min(max(min(typical, low), LOWEST), HIGHEST)

    @cached_property
    def _of_layer(self) -> tuple[float, float]:
        """The low quantile of the layer's similarities, and their median."""
        low, median = np.quantile(self._layer, (LOW_QUANTILE, 0.5))
        return float(low), float(median)

    @cached_property
    def _layer(self) -> np.ndarray:
        """Similarities of arbitrary pairs of all channels, or of some if there are many."""
        n_channels = self._relevant.shape[1]
        channels = range(0, n_channels, -(-n_channels // MAX_CHANNELS))
        return np.concatenate([self._arbitrary(channel) for channel in channels])

    def _arbitrary(self, channel: int) -> np.ndarray:
        """Similarities of pairs of classes that have nothing to do with one another, ``[pairs]``."""
        classes = [label for label in self._vectors.classes(channel) if self._helpful[label, channel]]
        if len(classes) < 2:
            return np.empty(0)
        sums, counts = self._vectors.groups(channel, classes)
        known = reliabilities(sums) >= MIN_RELIABILITY
        is_relevant = self._relevant[classes, channel]
        rows, columns = np.triu_indices(len(classes), k=1)
        wanted = known[rows] & known[columns] & ~(is_relevant[rows] & is_relevant[columns])
        values = corrected_similarities(sums, counts)[rows[wanted], columns[wanted]]
        return np.asarray(values[np.isfinite(values)])
