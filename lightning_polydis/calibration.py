"""The similarity threshold that suits a layer and a channel: pure functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_polydis.similarity import corrected_similarities, reliabilities

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from lightning_polydis.vectors import ClassVectors

LOW_QUANTILE = 0.1
LOWEST = 0.5
"""A similarity below this is low in any layer: it is the paper's threshold (arXiv:2504.12939, section 4)."""

HIGHEST = 0.9
"""Vectors more alike than this are not worth telling apart in any layer."""

MIN_PAIRS = 10
MIN_RELIABILITY = 0.5


def calibrated_thresholds(
    vectors: ClassVectors, relevant: Tensor, helpful: Tensor, channels: Iterable[int]
) -> dict[int, float]:
    r"""A similarity threshold for each channel, from what two arbitrary classes give (``similarity_threshold="auto"``).

    In a narrow layer all relevance vectors are alike, and in a wide one hardly any two are: a cosine similarity means
    nothing by itself. What it is compared with is the similarity of pairs of arbitrary classes: the channel helps both
    (its relevance is positive on average), is relevant for at most one of them, so that the pairs in question are not
    compared with themselves, and both vectors are known well enough. A pair of classes counts as two concepts if it is

    * at least as unlike as two arbitrary classes typically are for this channel (the median), and as unlike as the most
      unlike tenth of arbitrary pairs in the whole layer; but below 0.5 is low in any layer, and above 0.9 there is next
      to nothing to tell apart (labels without meaning give 0.93 and more, and some pair is always the most unlike); and
    * more unlike than two halves of one class are: noise is taken out of all these similarities, after which two halves
      give 1, and the pair's interval must end below 1 (that last rule is `detection`'s).

    So the threshold is :math:`\min(\text{median}_c, q_{0.1})`, kept within 0.5 and 0.9. Channels with fewer than ten
    arbitrary pairs take the layer's median.

    Args:
        vectors: Relevance vectors of the layer.
        relevant: Which channels are relevant for which class, ``[K, C]``, boolean.
        helpful: See `statistics.ClassStatistics`, ``[K, C]``, boolean.
        channels: Those to calibrate for.

    Returns:
        The threshold of each channel, for noise-corrected similarities; 0.5 if the layer has fewer than ten pairs.
    """
    found = {channel: _arbitrary_similarities(vectors, relevant, helpful, channel) for channel in channels}
    everything = np.concatenate([np.empty(0), *found.values()])
    if len(everything) < MIN_PAIRS:
        return dict.fromkeys(found, LOWEST)
    low = float(np.quantile(everything, LOW_QUANTILE))
    layer_median = float(np.median(everything))
    medians = {
        channel: float(np.median(values)) if len(values) >= MIN_PAIRS else layer_median
        for channel, values in found.items()
    }
    return {channel: min(max(min(median, low), LOWEST), HIGHEST) for channel, median in medians.items()}


def _arbitrary_similarities(vectors: ClassVectors, relevant: Tensor, helpful: Tensor, channel: int) -> np.ndarray:
    """Similarities of pairs of classes that have nothing to do with one another, ``[pairs]``."""
    classes = [label for label in vectors.classes(channel) if bool(helpful[label, channel])]
    if len(classes) < 2:
        return np.empty(0)
    sums, counts = vectors.groups(channel, classes)
    known = reliabilities(sums) >= MIN_RELIABILITY
    is_relevant = relevant[classes, channel].numpy()
    rows, columns = np.triu_indices(len(classes), k=1)
    wanted = known[rows] & known[columns] & ~(is_relevant[rows] & is_relevant[columns])
    values = corrected_similarities(sums, counts)[rows[wanted], columns[wanted]]
    return np.asarray(values[np.isfinite(values)])
