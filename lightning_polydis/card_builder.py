"""From what one pass has learned about a layer to cards of its channels and an overview."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_polydis.cards import CardImage, CardRow, ChannelCard, LayerOverview, NearMiss, SourceShare
from lightning_polydis.evaluation import parts_of
from lightning_polydis.forward import full_precision
from lightning_polydis.layers import channel_outputs, flat_weight, sources_of, window_sums

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning_polydis.clusters.evidence import ClusterEvidence
    from lightning_polydis.detection import PolysemanticChannel, PolysemanticPair
    from lightning_polydis.plan import ChannelSplit
    from lightning_polydis.planning import LayerEvidence
    from lightning_polydis.statistics import Samples

N_IMAGES, N_ACTIVATIONS, N_SOURCES = 8, 64, 6
MAX_CONCEPTS, MAX_CLASSES = 7, 30
N_BINS, N_CHANNELS, N_CLASSES, N_NEAR = 40, 40, 60, 10
SAMPLES_PER_STEP = 64

CROP, LEAST_SIDE = 0.6, 48
"""Part of an image's side that a crop shows, and the size from which on an image is cropped at all."""


@full_precision()
def build_card(
    evidence: LayerEvidence, channel: PolysemanticChannel, pairs: Sequence[PolysemanticPair], split: ChannelSplit
) -> ChannelCard:
    """The card of one channel.

    Args:
        evidence: Of its layer, with samples.
        channel: What was found.
        pairs: Flagged pairs of the channel, at least one.
        split: How it is split.
    """
    samples = evidence.samples
    assert samples is not None  # or there would be no split
    seen = _seen(evidence, samples, split)
    concepts = split.concepts[:MAX_CONCEPTS]
    n_classes = sum(map(len, split.concepts))
    share = None if n_classes <= MAX_CLASSES else max(1, MAX_CLASSES // len(concepts))  # some of each concept
    classes = [label for concept in concepts for label in concept[:share]]
    lowest = min(pairs, key=lambda pair: pair.cosine_similarity)
    similarities = evidence.similarities(split.channel, classes).cosine
    threshold = evidence.rule.threshold(split.channel) if channel.threshold is None else channel.threshold
    return ChannelCard(
        split.layer,
        split.channel,
        concepts,
        lowest.cosine_similarity,
        lowest.interval,
        float(threshold),
        channel.reliability,
        [_row(seen, samples, row, concepts) for row in range(len(concepts) + 1)],
        [_sources(evidence, samples, split, index) for index in range(len(concepts))],
        classes,
        np.asarray(similarities).round(4).tolist(),
        n_concepts=len(split.concepts) if len(split.concepts) > len(concepts) else None,
        n_classes=n_classes if n_classes > len(classes) else None,
    )


@dataclass(frozen=True)
class _Seen:
    """What the channel (row 0) and its concepts do on each sample.

    Attributes:
        activations: Position sum of the positive part, in each row's direction, ``[N, K + 1]``.
        places: Where it is largest: row and column as parts of the output's height and width, ``[N, K + 1, 2]``;
            `None` where positions are no place in an image.
    """

    activations: Tensor
    places: Tensor | None


def _seen(evidence: LayerEvidence, samples: Samples, split: ChannelSplit) -> _Seen:
    layer, parts = evidence.layer, parts_of(evidence.layer, split)
    signs = split.signs()
    directions = torch.tensor([1 if sum(signs) >= 0 else -1, *signs])
    channels = [split.channel] * len(directions)
    bias = None if parts.bias is None else parts.bias[:-1]
    is_map = isinstance(layer, nn.Conv2d)
    width = layer(samples[:1].inputs.to(layer.weight)).shape[-1] if is_map else 1
    activations, places = [], []
    for start in range(0, len(samples), SAMPLES_PER_STEP):
        inputs = samples[start : start + SAMPLES_PER_STEP].inputs.to(layer.weight)
        outputs = channel_outputs(layer, inputs, parts.weight[:-1], bias, channels).float()
        values = (outputs * directions[:, None]).clamp(min=0)
        activations.append(values.sum(2))
        at = values.argmax(2)
        height = values.shape[2] // width
        places.append(torch.stack([(at // width + 0.5) / height, (at % width + 0.5) / width], dim=2))
    is_spread = is_map and values.shape[2] > 1
    return _Seen(torch.cat(activations), torch.cat(places) if is_spread else None)


def _row(seen: _Seen, samples: Samples, row: int, concepts: Sequence[Sequence[int]]) -> CardRow:
    activation, targets = seen.activations[:, row], samples.targets
    strongest = activation.argsort(descending=True, stable=True)[:N_IMAGES]
    strongest = strongest[activation[strongest] > 0]
    pictures, labels = samples[strongest].thumbnails, samples.labels
    images = []
    for index, picture in zip(strongest.tolist(), [] if pictures is None else pictures, strict=pictures is not None):
        place = None if seen.places is None else seen.places[index, row]
        label = None if labels is None or labels[index] < 0 else int(labels[index])
        images.append(CardImage(_crop(picture, place), int(targets[index]), float(activation[index]), label))
    own = [activation[torch.isin(targets, torch.tensor(list(concept)))] for concept in concepts]
    return CardRow(list(concepts[row - 1]) if row else [], images, [_spread(values) for values in own])


def _spread(values: Tensor) -> list[float]:
    """At most so many of the values, evenly spread over their order."""
    ordered = values.sort().values
    if len(ordered) > N_ACTIVATIONS:
        ordered = ordered[torch.linspace(0, len(ordered) - 1, N_ACTIVATIONS).round().long()]
    return [float(f"{value:.5g}") for value in ordered.tolist()]


def _crop(picture: Tensor, place: Tensor | None) -> Tensor:
    """The part of a picture ``[3, h, w]`` around a place; the whole where it is small or there is no place."""
    height, width = picture.shape[1:]
    if place is None or min(height, width) < LEAST_SIDE:
        return picture
    size = (round(CROP * height), round(CROP * width))
    top, left = (
        min(max(round(float(middle) * whole - part / 2), 0), whole - part)
        for middle, whole, part in zip(place, (height, width), size, strict=True)
    )
    return picture[:, top : top + size[0], left : left + size[1]].clone()


def _sources(evidence: LayerEvidence, samples: Samples, split: ChannelSplit, concept: int) -> list[SourceShare]:
    """The inputs that add most to a concept channel on the concept's images."""
    layer, channel = evidence.layer, split.channel
    own = samples.of_classes(split.concepts[concept])
    if not len(own):
        return []
    reads = window_sums(layer, own.inputs)[:, sources_of(layer, channel)].double().mean(0)
    membership = split.membership[concept].double()
    strength = split.signs()[concept] * membership * (flat_weight(layer)[channel].double() * reads).sum(1)
    first = sources_of(layer, channel).start
    order = strength.argsort(descending=True)[:N_SOURCES].tolist()
    return [
        SourceShare(first + source, float(strength[source]), float(membership[source]))
        for source in order
        if strength[source] > 0
    ]


class _Candidate(NamedTuple):
    """A candidate channel: how near it comes to a flag, and the similarities of all its pairs."""

    miss: NearMiss
    cosines: np.ndarray


@full_precision()
def build_overview(
    evidence: LayerEvidence, channels: Sequence[PolysemanticChannel], pairs: Sequence[PolysemanticPair]
) -> LayerOverview:
    """One layer at a glance.

    Args:
        evidence: Of the layer.
        channels: Those flagged in it, lowest similarity first.
        pairs: Flagged pairs of the layer.
    """
    candidates = list(_candidates(evidence))
    flagged = [channel.channel for channel in channels]
    seen = [candidate.cosines for candidate in candidates]
    cosines = np.concatenate([np.empty(0), *seen])
    low = min(0.0, float(np.floor(cosines.min(initial=0) * 10) / 10))
    edges = np.linspace(low, 1, N_BINS + 1)
    thresholds = [candidate.miss.threshold for candidate in candidates] or [evidence.rule.threshold(0)]
    others = sorted((c.miss for c in candidates if c.miss.channel not in set(flagged)), key=_missed_by)
    shown = [*flagged, *(miss.channel for miss in others)][:N_CHANNELS]
    classes = _classes_of(evidence, shown)
    return LayerOverview(
        evidence.name,
        edges.tolist(),
        np.histogram(cosines, edges)[0].tolist(),
        np.histogram([pair.cosine_similarity for pair in pairs], edges)[0].tolist(),
        (float(min(thresholds)), float(max(thresholds))),
        shown,
        classes,
        _fractions(evidence, shown, classes),
        # What is no less alike than two halves of one class may be is compared as 1, and misses by any measure.
        [miss for miss in others if miss.compared < 1][:N_NEAR],
    )


def _missed_by(miss: NearMiss) -> float:
    return miss.compared - miss.threshold


def _candidates(evidence: LayerEvidence) -> Iterator[_Candidate]:
    relevant = evidence.relevant()
    for channel in (relevant.sum(0) >= 2).nonzero()[:, 0].tolist():
        classes = relevant[:, channel].nonzero()[:, 0].tolist()
        found = evidence.similarities(channel, classes)
        rows, columns = np.triu_indices(len(classes), k=1)
        compared, cosines = evidence.rule.compared(found)[rows, columns], found.cosine[rows, columns]
        least = int(np.lexsort((cosines, compared))[0])
        miss = NearMiss(
            channel,
            classes[rows[least]],
            classes[columns[least]],
            float(cosines[least]),
            float(compared[least]),
            float(evidence.rule.threshold(channel)),
        )
        yield _Candidate(miss, cosines)


def _classes_of(evidence: LayerEvidence, channels: Sequence[int]) -> list[int]:
    """The classes that most of some channels are relevant for, in order."""
    relevant = evidence.relevant()[:, list(channels)]
    counts = Counter({label: int(count) for label, count in enumerate(relevant.sum(1).tolist()) if count})
    return sorted(label for label, _ in counts.most_common(N_CLASSES))


def _fractions(evidence: LayerEvidence, channels: Sequence[int], classes: Sequence[int]) -> list[list[float]]:
    statistics = evidence.statistics
    counts = statistics.counts[0][list(classes)][:, list(channels)].double()
    fractions: list[list[float]] = (counts / statistics.n_images[list(classes)].clamp(min=1)[:, None]).T.tolist()
    return [[round(value, 4) for value in row] for row in fractions]


class RelevanceTable(NamedTuple):
    """Relevance vectors of a layer.

    Attributes:
        vectors: ``[n, I]``, ``float32``.
        rows: Channel, class and number of the class's concept in the channel, for each of them.
    """

    vectors: Tensor
    rows: list[tuple[int, int, int]]


def relevance_table(
    evidence: LayerEvidence | ClusterEvidence, channels: Sequence[PolysemanticChannel]
) -> RelevanceTable:
    """The vectors that some channels have for the classes of their concepts."""
    vectors = [torch.empty(0, evidence.layer.weight.shape[1])]
    rows: list[tuple[int, int, int]] = []
    for found in channels:
        own = [(found.channel, label, place) for place, concept in enumerate(found.concepts) for label in concept]
        vectors.append(
            evidence.of_channel(found.channel).mean_vectors(found.channel, [label for _, label, _ in own]).float()
        )
        rows += own
    return RelevanceTable(torch.cat(vectors), rows)
