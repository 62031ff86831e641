"""Made-up reports of any size, for tests of what shows them."""

from dataclasses import replace

import numpy as np
import torch

from lightning_polydis import ConceptQuality, PolysemanticChannel, PolysemanticityReport, PolysemanticPair, SplitQuality
from lightning_polydis.cards import (
    CardImage,
    CardRow,
    ChannelCard,
    EpochEntry,
    LayerOverview,
    NearMiss,
    SourceShare,
)
from lightning_polydis.summary import LayerSummary
from lightning_polydis.sweep import LayerSweep

MAX_CARDS = 20


def sample_report(
    n_flagged=3, n_classes=10, n_channels=64, layers=("net.layer4.2.conv3",), class_names=None, images=True, epochs=5
):
    """A report as it is when a run has ended: with quality, sweeps, cards, overviews and history."""
    rng = np.random.default_rng(0)
    names = [f"class {index}" for index in range(n_classes)] if class_names is None else class_names
    parts = [_layer(layer, n_flagged, n_classes, n_channels, images, rng) for layer in layers]
    channels = [channel for part in parts for channel in part["channels"]]
    return PolysemanticityReport(
        layers=[part["summary"] for part in parts],
        channels=channels,
        pairs=[
            PolysemanticPair(
                c.layer, c.channel, c.concepts[0][0], c.concepts[1][0], c.cosine_similarity, (0.1, 0.4), True
            )
            for c in channels
        ],
        settings={
            "layers": list(layers),
            "method": "optimized",
            "concepts": "classes",
            "attribution": "gradient_x_input",
            "relevance_threshold": 0.03,
            "class_fraction": 0.75,
            "similarity_threshold": "auto",
            "leak_weight": 3.0,
            "calibration_samples": 32,
        },
        n_images=50 * n_classes,
        class_names=list(names),
        notes=["2 of 10 classes had no images and were left out."],
        history=[_epoch(layer, epoch, n_flagged, rng) for epoch in range(epochs) for layer in layers],
        _saved_quality=[_quality(channel, rng) for channel in channels],
        _saved_sweeps=[_sweep(layer, n_channels) for layer in layers],
        _saved_cards=[card for part in parts for card in part["cards"]][:MAX_CARDS],
        _saved_overviews=[part["overview"] for part in parts],
    )


DESCRIBED = "<b>faces</b> of dogs | cats, costing $5 or $6 and seen from the front\nin the evening sun, at most"


def cluster_report(n_flagged=3, labels=True, described=False, class_names=None, images=True, n_channels=64):
    """A report of ``concepts="clusters"``.

    Args:
        n_flagged: Flagged channels: of two concepts, of three, of two, of which one holds two clusters, and so on.
        labels: Whether classes are known.
        described: Whether a function has put names to clusters: long ones that look like markup.
        class_names: Names of the ten classes.
        images: Whether cards have images.
        n_channels: Channels of the layer.
    """
    rng, layer = np.random.default_rng(1), "net.layer4.2.conv3"
    names = [f"class {index}" for index in range(10)] if class_names is None else class_names
    channels = [_clustered(layer, channel, labels, rng) for channel in range(n_flagged)]
    report = sample_report(n_flagged, n_channels=n_channels, class_names=names, layers=(layer,), images=images)
    report = replace(
        report,
        channels=channels,
        pairs=[
            PolysemanticPair(
                layer, c.channel, c.concepts[0][0], c.concepts[1][0], c.cosine_similarity, (0.01, 0.4), c.is_clear
            )
            for c in channels
        ],
        settings={"layers": [layer], "method": "optimized", "concepts": "clusters", "similarity_threshold": 0.5},
        class_names=list(names) if labels else None,
        notes=["Of 12 channels too few images were kept to look for clusters."],
        _saved_quality=[_quality(channel, rng) for channel in channels],
        _saved_sweeps=[],
        _saved_overviews=[_cluster_overview(layer, channels, labels, rng)],
    )
    if described:
        said = {(c.layer, c.channel): [f"{n}: {DESCRIBED}" for n in range(len(c.concepts))] for c in channels}
        report = replace(report, _saved_names=said)
    cards = [_cluster_card(c, report.concept_names[layer, c.channel], labels, images, rng) for c in channels]
    return replace(report, _saved_cards=cards[:MAX_CARDS])


def _clustered(layer, channel, labels, rng):
    concepts = [[[0], [1]], [[0], [1], [2]], [[0, 2], [1]]][channel % 3]
    clusters = sorted(number for concept in concepts for number in concept)
    shares = [
        list(zip(rng.choice(10, 5, replace=False).tolist(), [0.62, 0.2, 0.08, 0.06, 0.04], strict=True))
        for _ in concepts
    ]
    contents = shares if labels else [[] for _ in concepts]
    cosine = 0.05 + 0.01 * channel
    found = PolysemanticChannel(layer, channel, clusters, concepts, cosine, 0.97, 0.5, channel % 2 == 0)
    return replace(found, contents=contents, stability=0.93 - 0.01 * channel)


def _cluster_card(channel, names, labels, images, rng):
    """Of ten classes one image each, every fifth in no cluster."""
    card = _card(channel, images, rng)
    rows = [
        replace(
            row,
            images=[
                replace(
                    image,
                    target=-1 if place % 5 == 4 else channel.classes[place % len(channel.classes)],
                    label=place if labels else None,
                )
                for place, image in enumerate(row.images)
            ],
        )
        for row in card.rows
    ]
    return replace(card, rows=rows, names=list(names))


def _cluster_overview(layer, channels, labels, rng):
    shown = [channel.channel for channel in channels][:40] or [3, 4]
    classes = list(range(10)) if labels else []
    return replace(
        _overview(layer, channels, rng),
        channels=shown,
        classes=classes,
        relevance=[rng.dirichlet(np.ones(10)).tolist() if labels else [] for _ in shown],
        near_misses=[NearMiss(60, 0, 1, 0.61, 0.61, 0.5), NearMiss(61, 0, 2, 0.7, 0.7, 0.5)],
        has_clusters=True,
    )


def _layer(layer, n_flagged, n_classes, n_channels, images, rng):
    channels = []
    for channel in range(n_flagged):
        classes = sorted(rng.choice(n_classes, min(n_classes, int(rng.integers(2, 6))), replace=False).tolist())
        cut = max(1, len(classes) // 2)
        concepts = [classes[:cut], classes[cut:]]
        cosine = 0.05 + 0.4 * channel / max(n_flagged, 1)
        channels.append(PolysemanticChannel(layer, channel, classes, concepts, cosine, 0.9, 0.5, channel % 2 == 0))
    summary = LayerSummary(layer, n_channels, 512, n_flagged + 9, 40, n_flagged, n_flagged, 0.7, 0.05, 0.99)
    cards = [_card(channel, images, rng) for channel in channels[:MAX_CARDS]]
    return {"channels": channels, "summary": summary, "cards": cards, "overview": _overview(layer, channels, rng)}


def _card(channel, images, rng):
    rows = [[], *channel.concepts]
    pixels = [torch.from_numpy(rng.integers(0, 255, (3, 48, 48), dtype=np.uint8)) for _ in range(8)]
    matrix = np.clip(rng.uniform(0, 1, (len(channel.classes),) * 2), 0, 1)
    return ChannelCard(
        channel.layer,
        channel.channel,
        channel.concepts,
        channel.cosine_similarity,
        (max(-1, channel.cosine_similarity - 0.1), channel.cosine_similarity + 0.1),
        0.5,
        0.9,
        [
            CardRow(
                classes,
                [CardImage(part, int(rng.choice(channel.classes)), 9.0 - place) for place, part in enumerate(pixels)]
                if images
                else [],
                [rng.gamma(2, 1 + (row in (0, place + 1)), 40).tolist() for place in range(len(channel.concepts))],
            )
            for row, classes in enumerate(rows)
        ],
        [
            [SourceShare(int(source), 5.0 - place, 1 - 0.1 * place) for place, source in enumerate(range(7, 13))]
            for _ in channel.concepts
        ],
        [label for concept in channel.concepts for label in concept],
        ((matrix + matrix.T) / 2).tolist(),
    )


def _overview(layer, channels, rng):
    shown = [channel.channel for channel in channels][:40] or [3, 4]
    classes = sorted({label for channel in channels[:40] for label in channel.classes})[:60] or [0, 1]
    return LayerOverview(
        layer,
        np.linspace(0, 1, 21).tolist(),
        rng.integers(0, 50, 20).tolist(),
        [5, 4, 3, 2, 1, *[0] * 15] if channels else [0] * 20,
        (0.5, 0.6),
        shown,
        classes,
        rng.uniform(0, 1, (len(shown), len(classes))).tolist(),
        [NearMiss(60, 0, 1, 0.61, 0.55, 0.5), NearMiss(61, 0, 1, 0.7, 0.7, 0.5)],
    )


def _epoch(layer, epoch, n_flagged, rng):
    similarities = {channel: float(rng.uniform(0.1, 0.4)) for channel in range(min(n_flagged, 1 + epoch))}
    return EpochEntry(epoch, 100 * (epoch + 1), layer, len(similarities), 0.9 - 0.05 * epoch, similarities)


def _quality(channel, rng):
    concepts = [
        ConceptQuality(concept, *rng.uniform(0, 0.4, 3).tolist(), [0.9, 0.1, 0.0], 0.95, 0.6, 50, 60)
        for concept in channel.concepts
    ]
    return SplitQuality(channel.layer, channel.channel, concepts)


def _sweep(layer, n_channels):
    grid = [[[1, 2]] * 2] * 3
    return LayerSweep(
        layer, n_channels, [0.01, 0.03, 0.06], [0.5, 0.75], [0.5, "auto"], [[3, 2]] * 3, [[9, 6]] * 3, grid, grid
    )
