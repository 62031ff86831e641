"""Everything that one pass has learned about a layer's strongest images; clusters take the classes' place from here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_polydis._checks import InputError
from lightning_polydis.clusters.finding import MIN_IMAGES, Clusters, find_clusters
from lightning_polydis.detection import LayerDetection
from lightning_polydis.layers import channel_count
from lightning_polydis.planning import LayerEvidence
from lightning_polydis.soft_membership import evenly_spread
from lightning_polydis.statistics import ClassStatistics, Samples
from lightning_polydis.vectors import ClassVectors

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_polydis.clusters.pool import PooledInputs
    from lightning_polydis.clusters.top_images import TopLists
    from lightning_polydis.detection import PolysemanticChannel
    from lightning_polydis.layers import LinearLayer
    from lightning_polydis.plan import ChannelSplit
    from lightning_polydis.settings import AnalysisSettings

STRONG, N_STRONGEST = 0.5, 10
"""An image is strong if it activates a side at least half as much as the ten strongest do on average. Images that
hardly activate it would look like a concept of their own."""

AUTO_THRESHOLD = 0.85
"""Similarity of centres below which ``"auto"`` takes clusters for different concepts."""

OUTSIDE = -1
"""Number of an image that is in no cluster."""

OTHERS = 4
"""Images in no cluster that are used, for each of a cluster."""

N_GROUPS = 8
MAX_CONTENTS = 5
MAX_DESCRIBED = 16
"""Images of a cluster that ``describe_fn`` is shown."""


@dataclass(frozen=True, eq=False)
class Members:
    """The clusters of a channel, numbered over both of its sides.

    Attributes:
        sides: Side that each cluster belongs to.
        rows: Where the images of each cluster are in the lists, the strongest first.
    """

    sides: list[int]
    rows: list[Tensor]


@dataclass(frozen=True, eq=False)
class ClusterEvidence:
    """Everything that one pass over the data has learned about the strongest images of a layer's channels.

    Attributes:
        name: Name of the layer.
        layer: A copy of the layer, on the CPU, with the weights that were analysed.
        settings: Of the analysis.
        lists: The strongest images of each side of each channel.
        pool: Layer inputs of some of them; `None` if none were kept.
    """

    name: str
    layer: LinearLayer
    settings: AnalysisSettings
    lists: TopLists
    pool: PooledInputs | None

    @cached_property
    def clusters(self) -> dict[int, Clusters]:
        """The clusters of the sides that have several."""
        strong = {side: self._strong(side) for side in range(len(self.lists.sides))}
        able = [side for side, rows in strong.items() if rows.stop - rows.start >= MIN_IMAGES]
        most_alike = (1 + self.threshold) / 2  # further than needed: what misses the threshold is told too
        found = find_clusters([self.lists.vectors[strong[side]] for side in able], most_alike)
        return {side: clusters for side, clusters in zip(able, found, strict=True) if clusters is not None}

    def _strong(self, side: int) -> slice:
        """Where the strong images of a side are."""
        rows = self.lists.rows(side)
        strengths = self.lists.strengths[rows]
        return slice(rows.start, rows.start + int((strengths >= self._floor(side)).sum()))

    def _floor(self, side: int) -> float:
        """The least activation of a strong image."""
        strongest = self.lists.strengths[self.lists.rows(side)][:N_STRONGEST]
        return STRONG * float(strongest.mean()) if len(strongest) else 0.0

    @property
    def candidates(self) -> list[int]:
        """Channels that have several clusters on a side, ascending."""
        return sorted({int(self.lists.sides.channels[side]) for side in self.clusters})

    @property
    def threshold(self) -> float:
        """Similarity of centres below which clusters count as different concepts."""
        return AUTO_THRESHOLD if self.settings.threshold == "auto" else float(self.settings.threshold)

    def detect(self) -> LayerDetection:
        """The layer's polysemantic channels: those with clusters whose centres are not alike."""
        found = [self.of_channel(channel).detect() for channel in self.candidates]
        channels = [self._completed(channel) for detection in found for channel in detection.channels]
        pairs = [pair for detection in found for pair in detection.pairs]
        return LayerDetection(
            self.name,
            sorted(channels, key=lambda channel: channel.cosine_similarity),
            sorted(pairs, key=lambda pair: pair.cosine_similarity),
            len(self.candidates),
            np.concatenate([np.empty(0), *(detection.similarities for detection in found)]),
        )

    def _completed(self, found: PolysemanticChannel) -> PolysemanticChannel:
        """What was found, with the classes that fill each concept and the least stability of the channel's sides."""
        own = self.members(found.channel)
        concepts = _of_one_side(found.concepts, own)
        rows = [torch.cat([own.rows[number] for number in concept]) for concept in concepts]
        stability = min(self.clusters[side].stability for side in own.sides)
        contents = [_contents(self.lists.labels[part]) for part in rows]
        return replace(found, concepts=concepts, contents=contents, stability=stability)

    def members(self, channel: int) -> Members:
        """The clusters of a channel; none if it has not several on any side."""
        sides, rows = [], []
        for side in self.lists.sides.of_channel(channel):
            if side in self.clusters:
                labels, first = self.clusters[side].labels, self.lists.rows(side).start
                rows += [first + (labels == number).nonzero()[:, 0] for number in range(self.clusters[side].k)]
                sides += [side] * self.clusters[side].k
        return Members(sides, rows)

    def of_channel(self, channel: int) -> LayerEvidence:
        """What is known about one channel, with its clusters in the place of classes.

        The clusters are the channel's own, numbered from 0: nothing that this says of another channel means anything.
        """
        if channel not in self._views:
            self._views[channel] = self._view(channel)
        return self._views[channel]

    @cached_property
    def _views(self) -> dict[int, LayerEvidence]:
        return {}

    def _view(self, channel: int) -> LayerEvidence:
        own, n_channels = self.members(channel), channel_count(self.layer)
        return LayerEvidence(
            self.name,
            self.layer,
            replace(self.settings, concepts="classes", similarity_threshold=self.threshold, describe_fn=None),
            _statistics(channel, n_channels, own, self.lists.sides.signs),
            self._vectors(channel, own),
            self._samples(own),
        )

    def _vectors(self, channel: int, own: Members) -> ClassVectors:
        """The clusters' vectors as those of classes, in groups for intervals and reliability."""
        shape = (len(own.rows), N_GROUPS, self.lists.vectors.shape[1])
        sums, counts = (torch.zeros(size, dtype=torch.float32) for size in (shape, shape[:2]))
        for number, rows in enumerate(own.rows):
            groups = torch.arange(len(rows)) % N_GROUPS
            sums[number].index_add_(0, groups, F.normalize(self.lists.vectors[rows].float(), dim=1))
            counts[number].index_add_(0, groups, torch.ones(len(rows), dtype=torch.float32))
        keys = torch.arange(len(own.rows)) * channel_count(self.layer) + channel
        return ClassVectors(keys, sums, counts, channel_count(self.layer))

    @cached_property
    def samples(self) -> Samples | None:
        """All images whose layer input was kept; they belong to no cluster here."""
        return None if self.pool is None else self._as_samples(torch.full((len(self.pool.images),), OUTSIDE))

    def _as_samples(self, numbers: Tensor) -> Samples:
        assert self.pool is not None  # whoever asks has looked
        # All strong images count: there is no class that the channel might not matter to.
        relevant = torch.ones(1, 1, dtype=torch.bool).expand(len(numbers), channel_count(self.layer))
        labels = self.pool.labels if bool((self.pool.labels >= 0).any()) else None
        return Samples(self.pool.inputs, numbers, relevant, thumbnails=self.pool.pictures, labels=labels)

    def _samples(self, own: Members) -> Samples | None:
        """Those images of each cluster whose layer input was kept, the strongest first, and some that are in none."""
        if self.pool is None:
            return None
        limit, numbers = self.settings.calibration_samples, torch.full((len(self.pool.images),), OUTSIDE)
        chosen = []
        for number, rows in enumerate(own.rows):
            places = self._places(self.lists.images[rows])
            places = places[numbers[places] == OUTSIDE]  # one image may be strong on both sides
            numbers[places] = number
            chosen.append(_spread(places, limit))
        others = self._order[numbers[self._order] == OUTSIDE]
        chosen.append(_spread(others, None if limit is None else OTHERS * limit))
        return self._as_samples(numbers)[torch.cat(chosen)]

    @cached_property
    def _by_number(self) -> tuple[Tensor, Tensor]:
        assert self.pool is not None  # whoever asks has looked
        found = self.pool.images.sort()
        return found.values, found.indices

    def _places(self, images: Tensor) -> Tensor:
        """Places in the pool of those of some images that are in it."""
        numbers, places = self._by_number
        found = torch.searchsorted(numbers, images).clamp(max=len(numbers) - 1)
        return places[found[numbers[found] == images]]

    @cached_property
    def _order(self) -> Tensor:
        """Places in the pool in an order that does not depend on which process has seen an image."""
        seen = dict.fromkeys(self.lists.images.tolist())
        return self._places(torch.tensor(list(seen), dtype=torch.long))

    def completed(self, split: ChannelSplit) -> ChannelSplit:
        """A split with what it takes to tell which concept another image belongs to: centres and least activations."""
        own = self.members(split.channel)
        rows = [torch.cat([own.rows[number] for number in concept]) for concept in split.concepts]
        vectors = [F.normalize(self.lists.vectors[part].float(), dim=1) for part in rows]
        centres = torch.stack([F.normalize(part.mean(0), dim=0) for part in vectors])
        floors = [_rounded(self._floor(own.sides[concept[0]])) for concept in split.concepts]
        return replace(split, centres=centres, floors=floors, zero=_rounded(self.lists.sides.zero(split.channel)))

    def described(self, found: PolysemanticChannel) -> list[str | None]:
        """What ``describe_fn`` calls the concepts of a channel; `None` without it, and where there are no images.

        Raises:
            ValueError: If it raises, or returns no text.
        """
        describe, pictures = self.settings.describe_fn, None if self.pool is None else self.pool.pictures
        if describe is None or pictures is None:
            return [None] * len(found.concepts)
        own = self.members(found.channel)
        rows = [torch.cat([own.rows[number] for number in concept]).sort().values for concept in found.concepts]
        places = [self._places(self.lists.images[part])[:MAX_DESCRIBED] for part in rows]
        return [_described(describe, pictures[part]) if len(part) else None for part in places]


def _rounded(value: float) -> float:
    """As many digits as a split layer holds, so that it gives back the split that it was made of."""
    return float(f"{value:.9g}")


def _of_one_side(concepts: list[list[int]], own: Members) -> list[list[int]]:
    """The same concepts, apart where clusters of both sides are in one: it would have no direction."""
    parts = [
        [number for number in concept if own.sides[number] == side] for concept in concepts for side in set(own.sides)
    ]
    return sorted(part for part in parts if part)


def _described(describe: Callable[[Tensor], str], pictures: Tensor) -> str:
    try:
        text = describe(pictures)
    except Exception as error:
        raise InputError(f"`describe_fn` raised {type(error).__name__}: {error}.") from error
    if not isinstance(text, str):
        raise InputError(f"Expected `describe_fn` to return a text, but got `{type(text).__name__}`.")
    return text


def _statistics(channel: int, n_channels: int, own: Members, signs: Tensor) -> ClassStatistics:
    """Statistics of clusters in the place of classes: the channel is relevant for all images of its own clusters."""
    n_images = torch.tensor([len(rows) for rows in own.rows], dtype=torch.long)
    counts = torch.zeros(1, len(n_images), n_channels, dtype=torch.int32)
    counts[0, :, channel] = n_images.int()
    directions = torch.ones(len(n_images), n_channels, dtype=torch.int8)
    directions[:, channel] = signs[own.sides].to(torch.int8)
    return ClassStatistics(n_images, [1.0], counts, directions, directions > 0, None)


def _contents(labels: Tensor) -> list[tuple[int, float]]:
    """The classes that fill a concept, and their shares of its images; none where any class is unknown."""
    if not len(labels) or bool((labels < 0).any()):
        return []
    classes, counts = labels.unique(return_counts=True)  # no `bincount`: what is no class may be a huge number
    order = counts.argsort(descending=True, stable=True)[:MAX_CONTENTS]
    shares = counts[order].double() / len(labels)
    return list(zip(classes[order].tolist(), shares.tolist(), strict=True))


def _spread(places: Tensor, limit: int | None) -> Tensor:
    """At most so many of some places, evenly spread."""
    return places if limit is None else places[evenly_spread(len(places), limit)]
