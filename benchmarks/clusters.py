"""Clusters without labels: what do they find, what are their splits worth, and what would other ways find?

On SqueezeNet with the photographs, layer by layer:

* channels flagged, and how well two halves of a channel's images agree on its clusters (adjusted Rand index);
* distortion and leak of their splits on held-out strong images, beside those of class-based splits on held-out images
  of the classes, at looser settings than the default ones, which flag too few channels to compare;
* agreement of clusters with the photographs' classes, which are not used (adjusted mutual information, over all
  channels that have clusters): relevance vectors, at all positions where the channel is on or at its maximum alone,
  against the layer's inputs without the channel's weights, and the channel's own activation map; and k-means against
  Ward's method and HDBSCAN, on the same vectors.

On networks of random weights, and on layers whose channels each have one Gaussian cloud of sources: the share of
channels flagged. Any is one too many.

Example:
    python benchmarks/clusters.py --root path/to/real/data
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from networks import World, squeezenet
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.cluster import HDBSCAN
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18, squeezenet1_1

from lightning_polydis import PolysemanticityReport, find_polysemantic_channels
from lightning_polydis.clusters.evidence import ClusterEvidence
from lightning_polydis.clusters.finding import MIN_IMAGES, Clusters, find_clusters
from lightning_polydis.evaluation import SplitQuality
from lightning_polydis.layers import channel_outputs, flat_weight, plain_copy, reads_padding
from lightning_polydis.planning import judge_splits, plan_splits
from lightning_polydis.sources import source_relevances

Labels = list[tuple[Tensor, Tensor]]
"""For each channel the clusters of its images, and their classes."""

LOOSE = {"relevance_threshold": 0.01, "class_fraction": 0.5}


def clusters_of(model: nn.Module, batches: list, layers: list[str], **settings: object) -> PolysemanticityReport:
    """The report of an analysis by clusters."""
    return find_polysemantic_channels(model, batches, layers, concepts="clusters", progress=False, **settings)


def quality(report: PolysemanticityReport, layer: str) -> str:
    """Distortion, leak and their sum: medians over the layer's splits, with quartiles."""
    own = [one for one in report.quality if one.layer == layer]
    columns = [[one.mean(name) for one in own] for name in ("distortion", "leak")]
    columns.append([one.mean("distortion") + one.mean("leak") for one in own if _is_known(one)])
    return " | ".join(_spread([value for value in column if value is not None]) for column in columns)


def _is_known(one: SplitQuality) -> bool:
    return one.mean("distortion") is not None and one.mean("leak") is not None


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def on_photographs(world: World) -> None:
    """Flags, stability and splits, beside those of classes."""
    batches = [*world.choose, *world.judge]
    by_clusters = clusters_of(world.model, batches, world.layers)
    by_classes = find_polysemantic_channels(world.model, batches, world.layers, progress=False, **LOOSE)
    print("| layer | concepts | flagged | stability | distortion | leak | sum |\n|" + " --- |" * 7)
    for layer in world.layers:
        for name, report in (("clusters", by_clusters), ("classes", by_classes)):
            found = [channel for channel in report.channels if channel.layer == layer]
            stability = [channel.stability for channel in found if channel.stability is not None]
            print(f"| {layer} | {name} | {len(found)} | {_spread(stability)} | {quality(report, layer)} |")
    both = {(channel.layer, channel.channel) for channel in by_clusters.channels} & {
        (channel.layer, channel.channel) for channel in by_classes.channels
    }
    print(f"\nChannels that both flag: {len(both)}.\n")
    columns = "channels with clusters | adjusted mutual information | stability | distortion + leak | seconds"
    print(f"| layer | vectors | by | {columns} |\n|" + " --- |" * 8)
    for layer in world.layers:
        assert by_clusters._evidence is not None
        _compare(by_clusters._evidence[layer], batches)


def _compare(evidence: ClusterEvidence, batches: list) -> None:
    """Vectors and methods on one layer, in lines of a table."""
    targets = torch.cat([targets for _, targets in batches])
    images = {number: row for row, number in enumerate(evidence.pool.images.tolist())}
    clouds = dict(_clouds(evidence, images))
    kinds = ("relevance, where on", "relevance, at the maximum", "inputs without weights", "activation map")
    for place, kind in enumerate(kinds):
        begin = time.perf_counter()
        found = find_clusters([cloud[place] for cloud in clouds.values()])
        seconds = time.perf_counter() - begin
        pairs = zip(clouds, found, strict=True)
        labels = [(one.labels, _targets(evidence, side, targets)) for side, one in pairs if one is not None]
        stability = [one.stability for one in found if one is not None]
        worth = _worth(evidence, dict(zip(clouds, found, strict=True)))
        _row(evidence.name, kind, "k-means", _agreement(labels), _spread(stability), worth, f"{seconds:.1f}")
    own = dict(zip(clouds, find_clusters([c[0] for c in clouds.values()]), strict=True))
    sides = [side for side, found in own.items() if found is not None]
    for name, method in (("Ward", _ward), ("HDBSCAN", _hdbscan)):
        begin = time.perf_counter()
        labels = [(method(clouds[side][0], own[side].k), _targets(evidence, side, targets)) for side in sides]
        seconds = time.perf_counter() - begin
        _row(evidence.name, kinds[0], f"{name}, on these channels", _agreement(labels), "-", "-", f"{seconds:.1f}")


def _row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |")


def _worth(evidence: ClusterEvidence, found: dict[int, Clusters | None]) -> str:
    """Distortion and leak of the splits that some clusters lead to, flagged or not, on held-out images."""
    other = replace(evidence)
    other.__dict__["clusters"] = {side: clusters for side, clusters in found.items() if clusters is not None}
    wanted = [
        (channel, [[number] for number in range(len(other.members(channel).rows))]) for channel in other.candidates
    ]
    qualities = judge_splits(other, plan_splits(other, wanted))
    return _spread([one.mean("distortion") + one.mean("leak") for one in qualities if _is_known(one)])


def _targets(evidence: ClusterEvidence, side: int, targets: Tensor) -> Tensor:
    rows = evidence._strong(side)
    return targets[evidence.lists.images[rows]]


def _agreement(labels: Labels) -> str:
    values = [adjusted_mutual_info_score(targets.numpy(), found.numpy()) for found, targets in labels]
    return f"{len(values)} | {_spread(values)}"


def _ward(cloud: Tensor, k: int) -> Tensor:
    return torch.from_numpy(fcluster(linkage(F.normalize(cloud.float(), dim=1).numpy(), "ward"), k, "maxclust"))


def _hdbscan(cloud: Tensor, k: int) -> Tensor:
    return torch.from_numpy(
        HDBSCAN(min_cluster_size=5, copy=True).fit_predict(F.normalize(cloud.float(), dim=1).numpy())
    )


def _clouds(evidence: ClusterEvidence, places: dict[int, int]) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """For each side with enough strong images its vectors in four ways, ``[n, ...]`` each."""
    layer = evidence.layer
    for side in range(len(evidence.lists.sides)):
        rows = evidence._strong(side)
        if rows.stop - rows.start < MIN_IMAGES:
            continue
        channel = int(evidence.lists.sides.channels[side])
        own = [places[number] for number in evidence.lists.images[rows].tolist()]
        inputs = evidence.pool.inputs[own]
        weight, bias = flat_weight(layer)[channel : channel + 1], None if layer.bias is None else layer.bias[[channel]]
        output = channel_outputs(layer, inputs, weight, bias, [channel]).masked_fill(reads_padding(layer, inputs), 0)
        is_on = (output > 0).float()
        at_most = torch.zeros_like(output).scatter_(2, output.argmax(2, keepdim=True), 1.0)
        plain = plain_copy(layer)
        plain.weight.fill_(1.0)
        yield (
            side,
            (
                evidence.lists.vectors[rows],
                _vectors(layer, inputs, at_most, channel),
                _vectors(plain, inputs, is_on, channel),
                output.clamp(min=0)[:, 0],
            ),
        )


def _vectors(layer: nn.Conv2d, inputs: Tensor, where: Tensor, channel: int) -> Tensor:
    """Relevance of the sources of a channel at some positions ``[n, 1, P]``."""
    with torch.no_grad():
        shape = layer(inputs[:1]).shape
    gradient = torch.zeros(len(inputs), *shape[1:])
    gradient[:, channel] = where[:, 0].unflatten(1, shape[2:])
    images = torch.arange(len(inputs))
    return source_relevances(layer, inputs, gradient, images, torch.full_like(images, channel))


def on_random_weights(batches: list) -> None:
    """The share of channels flagged in networks that have learned nothing."""
    cases: list[tuple[str, Callable[[], nn.Module], list[str]]] = [
        (
            "SqueezeNet",
            squeezenet1_1,
            [f"features.{block}.expand{kind}" for block in (3, 7, 12) for kind in ("1x1", "3x3")],
        ),
        ("ResNet-18", resnet18, ["layer1.1.conv2", "layer3.1.conv1", "layer4.1.conv2"]),
    ]
    print("\n| random weights | layer | flagged |\n| --- | --- | --- |")
    for name, make, layers in cases:
        torch.manual_seed(0)
        report = clusters_of(make().eval(), batches, layers, calibration_samples=0)
        for layer in report.layers:
            print(f"| {name} | {layer.name} | {layer.n_polysemantic} of {layer.n_channels} |")
        flagged, channels = len(report.channels), sum(layer.n_channels for layer in report.layers)
        print(f"| {name} | all of these | {flagged} of {channels} ({flagged / channels:.1%}) |")


def on_single_clouds(n_images: int = 1000, n_inputs: int = 64, n_channels: int = 256) -> None:
    """The share flagged where every channel's sources are one Gaussian cloud."""
    print("\n| sources | flagged |\n| --- | --- |")
    draw = torch.Generator().manual_seed(0)
    for name, falloff in (("all alike", 0.0), ("few strong directions", 1.0), ("one strong direction", 2.0)):
        spread = torch.arange(1, n_inputs + 1) ** -falloff
        mixing = torch.linalg.qr(torch.randn(n_inputs, n_inputs, generator=draw)).Q * spread
        images = 1 + torch.randn(n_images, n_inputs, generator=draw) @ mixing.T
        layer = nn.Linear(n_inputs, n_channels)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(n_channels, n_inputs, generator=draw) / n_inputs**0.5)
            layer.bias.zero_()
        model = nn.Sequential(layer, nn.ReLU())
        report = clusters_of(model, [(part,) for part in images.split(100)], ["0"], calibration_samples=0)
        print(f"| {name} | {len(report.channels)} of {n_channels} |")


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description="Measure clusters without labels.")
    parser.add_argument("--root", type=Path, default=os.environ.get("POLYDIS_REAL_DATA"))
    arguments = parser.parse_args()
    on_single_clouds()
    if arguments.root is None:
        print("\nWithout photographs (`--root`) there is nothing more to measure.")
        return
    world = squeezenet(arguments.root)
    on_random_weights([*world.choose, *world.judge])
    print()
    on_photographs(world)


if __name__ == "__main__":
    main()
