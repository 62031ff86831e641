"""From what one pass has learned about a layer to splits of its channels, and their quality on held-out samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from lightning_polydis.calibration import CalibratedThresholds
from lightning_polydis.detection import LayerDetection, SimilarityRule, averaged_relevance_vectors, detect
from lightning_polydis.evaluation import SplitEvaluator
from lightning_polydis.forward import full_precision
from lightning_polydis.layers import flat_weight, sources_of
from lightning_polydis.membership import paper_membership
from lightning_polydis.plan import ChannelSplit, fingerprints
from lightning_polydis.similarity import Similarities, grouped_similarities, plain_similarities
from lightning_polydis.soft_membership import WantedSplit, evenly_spread, soft_memberships

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_polydis.clusters.evidence import ClusterEvidence
    from lightning_polydis.evaluation import SplitQuality
    from lightning_polydis.layers import LinearLayer
    from lightning_polydis.settings import AnalysisSettings
    from lightning_polydis.statistics import ClassStatistics, Samples
    from lightning_polydis.vectors import ClassVectors

MAX_SHARED = 512
"""Held-out samples that all splits of a layer are judged on; beyond those each is judged on its own classes' only."""

PIECE_ELEMENTS = 2**23
"""Elements of layer inputs that are judged on together."""


@dataclass(frozen=True, eq=False)
class LayerEvidence:
    """Everything that one pass over the data has learned about a layer.

    Attributes:
        name: Name of the layer.
        layer: A copy of the layer, on the CPU, with the weights that were analysed.
        settings: Of the analysis.
        statistics: Sums and counts by class.
        vectors: Class-conditional relevance vectors; `None` with ``method="paper"``, which goes by the statistics.
        samples: Kept layer inputs, or `None`.
    """

    name: str
    layer: LinearLayer
    settings: AnalysisSettings
    statistics: ClassStatistics
    vectors: ClassVectors | None
    samples: Samples | None

    @property
    def holds_out(self) -> bool:
        """Whether half of the samples is kept back to judge splits."""
        return self.settings.calibration_samples is not None

    @cached_property
    def chosen_from(self) -> Samples | None:
        """The samples that choose memberships."""
        return self.samples.halves()[0] if self.samples is not None and self.holds_out else self.samples

    @cached_property
    def judged_on(self) -> Samples | None:
        """The samples that judge splits; `None` if there are none that took no part in choosing."""
        return self.samples.halves()[1] if self.samples is not None and self.holds_out else None

    def of_channel(self, channel: int) -> LayerEvidence:
        """What is known about one channel: here all, as every channel is told by the same classes."""
        return self

    def completed(self, split: ChannelSplit) -> ChannelSplit:
        """A split with whatever else there is to say of it: here nothing."""
        return split

    def relevant(self, class_fraction: float | None = None, threshold: int = 0) -> Tensor:
        """Which channels are relevant for which class and have vectors to compare, ``[K, C]``, boolean.

        Args:
            class_fraction: `None`: that of the settings.
            threshold: Which of the statistics' relevance thresholds.
        """
        fraction = self.settings.class_fraction if class_fraction is None else class_fraction
        relevant = self.statistics.relevant(fraction, threshold)
        return relevant if self._known is None else relevant & self._known

    @cached_property
    def _known(self) -> Tensor | None:
        return None if self.vectors is None else self.vectors.known(len(self.statistics.n_images))

    def n_missing(self) -> int:
        """Entries that are relevant but have no vectors, for lack of memory."""
        return int((self.statistics.relevant(self.settings.class_fraction) & ~self.relevant()).sum())

    def similarities(self, channel: int, classes: Sequence[int]) -> Similarities:
        """Similarities of the relevance vectors that a channel has for some classes."""
        if self.vectors is None:
            return plain_similarities(self._averaged(channel, classes))
        return grouped_similarities(*self.vectors.groups(channel, classes))

    def mean_vectors(self, channel: int, classes: Sequence[int]) -> Tensor:
        """The relevance vectors that a channel has for some classes, ``[T, I]``, ``float64``."""
        return self._averaged(channel, classes) if self.vectors is None else self.vectors.means(channel, classes)

    def _averaged(self, channel: int, classes: Sequence[int]) -> Tensor:
        sums = self.statistics.mean_window_sums
        assert sums is not None  # kept with this method
        return averaged_relevance_vectors(
            flat_weight(self.layer)[channel], sums[list(classes)][:, sources_of(self.layer, channel)]
        )

    @cached_property
    def rule(self) -> SimilarityRule:
        """When two classes of a channel count as different concepts."""
        if self.settings.threshold != "auto" or self.vectors is None:
            return SimilarityRule(float(self.settings.threshold))
        thresholds = CalibratedThresholds(self.vectors, self.relevant(), self.statistics.helpful)
        return SimilarityRule(thresholds, is_calibrated=True)

    def detect(self) -> LayerDetection:
        """The layer's polysemantic channels."""
        return detect(self.name, self.relevant(), self.similarities, self.rule)


@full_precision()
def plan_splits(
    evidence: LayerEvidence | ClusterEvidence, wanted: Sequence[tuple[int, list[list[int]]]]
) -> list[ChannelSplit]:
    """Choose memberships of some channels' sources by the method of the settings.

    Args:
        evidence: Of the layer, with samples.
        wanted: Channel and the classes (or clusters) of each concept; the rows of a membership come in this order.
    """
    choose = _paper_splits if evidence.settings.method == "paper" else _soft_splits
    marks = fingerprints(evidence.layer.weight, [channel for channel, _ in wanted])
    return [replace(split, fingerprint=own) for split, own in zip(choose(evidence, wanted), marks, strict=True)]


def _paper_splits(
    evidence: LayerEvidence | ClusterEvidence, wanted: Sequence[tuple[int, list[list[int]]]]
) -> list[ChannelSplit]:
    return [_paper_split(evidence.of_channel(channel), channel, concepts) for channel, concepts in wanted]


def _soft_splits(
    evidence: LayerEvidence | ClusterEvidence, wanted: Sequence[tuple[int, list[list[int]]]]
) -> list[ChannelSplit]:
    splits = [_wanted_split(evidence.of_channel(channel), channel, concepts) for channel, concepts in wanted]
    memberships = soft_memberships(evidence.layer, splits, evidence.settings.leak_weight)
    return [
        evidence.completed(
            ChannelSplit(evidence.name, channel, concepts, membership, directions=list(split.directions))
        )
        for (channel, concepts), split, membership in zip(wanted, splits, memberships, strict=True)
    ]


def _wanted_split(evidence: LayerEvidence, channel: int, concepts: list[list[int]]) -> WantedSplit:
    signs, samples = evidence.statistics.directions, evidence.chosen_from
    assert samples is not None  # whoever asks has looked
    return WantedSplit(channel, concepts, [_direction(signs[concept, channel]) for concept in concepts], samples)


def _direction(signs: Tensor) -> int:
    """The direction of a concept: that of most of its classes."""
    return 1 if int(signs.sum()) >= 0 else -1


def _paper_split(evidence: LayerEvidence, channel: int, concepts: list[list[int]]) -> ChannelSplit:
    """A split by the paper's rules. A concept's averaged relevance vector is the mean of its classes'."""
    samples = evidence.chosen_from
    assert samples is not None  # whoever asks has looked
    vectors = torch.stack([evidence._averaged(channel, concept).mean(0) for concept in concepts])
    inputs = [samples.of_classes(concept).inputs for concept in concepts]
    membership, rho = paper_membership(evidence.layer, channel, vectors, inputs)
    return ChannelSplit(evidence.name, channel, concepts, membership, rho)


@full_precision()
def judge_splits(evidence: LayerEvidence | ClusterEvidence, splits: Sequence[ChannelSplit]) -> list[SplitQuality]:
    """Quality of splits of one layer on the samples that took no part in choosing them (empty without such samples).

    Of more than 512 samples, evenly spread ones tell what a split does on classes that are part of no concept
    (``spurious``); all other figures are about its own classes, and about all their samples.
    """
    places: dict[LayerEvidence, list[int]] = {}
    for place, split in enumerate(splits):
        places.setdefault(evidence.of_channel(split.channel), []).append(place)
    found: dict[int, SplitQuality] = {}
    for view, own in places.items():
        if view.judged_on is not None:
            found |= dict(zip(own, _judged(view, view.judged_on, [splits[place] for place in own]), strict=True))
    return [found[place] for place in sorted(found)]


def _judged(evidence: LayerEvidence, held_out: Samples, splits: Sequence[ChannelSplit]) -> list[SplitQuality]:
    evaluator = SplitEvaluator(splits)

    def show(samples: Samples, places: Sequence[int] | None = None) -> None:
        for part in samples.in_pieces(PIECE_ELEMENTS):
            evaluator.update(evidence.layer, part.inputs, part.targets, part.relevant, places)

    by_all = torch.zeros(len(held_out), dtype=torch.bool)
    by_all[evenly_spread(len(held_out), MAX_SHARED)] = True
    show(held_out[by_all])
    others = held_out[~by_all]
    for place, split in enumerate(splits):
        show(others.of_classes([label for concept in split.concepts for label in concept]), [place])
    return evaluator.compute()
