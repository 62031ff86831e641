"""Networks with known polysemantic channels: are they found, and does splitting them give the originals back?

A network for handwritten digits is trained in which every channel of the layer of interest feeds the logit of one
class alone: monosemantic by construction. With ``--early`` the images are made-up textures, and the layer is the
second of the network, right behind a first convolution. Then some channels are merged in pairs and triples that do not
answer to one another's classes (weights and biases added up), and what comes after is fine-tuned, with the layer's
biases, so that the network works again; now every channel may feed every logit. Last, and without changing what is
computed, the sources are given something in common: to each is added a multiple of the mean over all
(``--in-common``), and the layer's weights undo it. Sources of real networks share much, and relevance vectors of narrow
layers are all alike. The classes are halved at random, so that channels that were not merged are relevant for two
classes as well: flagging one of those is a mistake. Both methods with their default thresholds, and
``concepts="clusters"``, which is shown no classes.

* precision, recall: of the merged channels, among those that are candidates (for clusters: that answer to two of their
  classes, to one at least half as strongly as to the other);
* concepts: share of the found ones whose concepts are those that were merged, one for each;
* correlation: between a concept channel's activation and its original's, over all positions of held-out images.

Example:
    python benchmarks/planted.py --seeds 5
    python benchmarks/planted.py --early
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits
from small_world import NUM_CLASSES, ImageMaker
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_polydis import ChannelSplit, PolysemanticityReport, SplitPlan, disentangle, find_polysemantic_channels

UNITS_PER_CLASS = 6
N_PAIRS, N_TRIPLES = 9, 4
SPARSITY = 1e-3
QUIET = 1.0
"""How much the trunk's features are kept from answering to everything."""

N_SOURCES = 128
DEAF = 0.1
"""What a unit may answer to the classes that it is merged with, relative to its own."""
LAYER = "units"


class UnitNet(nn.Module):
    """A CNN whose layer of interest, ``units``, feeds a head, at first only where ``mask`` says so.

    Args:
        mask: ``[classes, units]`` of 0 and 1.
        trunk: What comes before the layer, with `N_SOURCES` channels at its end.
    """

    def __init__(self, mask: Tensor, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.register_buffer("mixing", torch.eye(N_SOURCES))
        self.units = nn.Conv2d(N_SOURCES, mask.shape[1], 1)
        self.strength = nn.Parameter(torch.ones(mask.shape))
        self.extra = nn.Parameter(torch.zeros(mask.shape))
        self.bias = nn.Parameter(torch.zeros(len(mask)))
        self.register_buffer("mask", mask)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images."""
        return self.judged(self.trunk(images))

    def sources(self, features: Tensor) -> Tensor:
        """What ``units`` reads."""
        return F.conv2d(features, self.mixing[:, :, None, None])

    def judged(self, features: Tensor) -> Tensor:
        """Logits of the trunk's features."""
        activation = F.relu(self.units(self.sources(features))).mean((2, 3))
        return F.linear(activation, self.strength.clamp(min=0) * self.mask + self.extra, self.bias)


Images = tuple[Tensor, Tensor]
"""Images and their classes."""


@dataclass(frozen=True)
class Task:
    """What a network is trained for.

    Attributes:
        n_classes: Number of classes.
        data: ``data(seed)``: images and classes to train with, to analyse, and to judge with.
        trunk: Makes what comes before the layer of interest.
        selective: Weight of what units answer to classes that they do not feed. Units behind a single convolution
            answer to several classes even if they feed one, and would be polysemantic without any planting.
        balanced: Whether units are scaled to answer equally strongly before they are merged. Of units that differ much
            the weaker one hardly shows: a channel's strongest images are the stronger one's.
    """

    n_classes: int
    data: Callable[[int], tuple[Images, Images, Images]]
    trunk: Callable[[], nn.Module]
    selective: float = 0.0
    balanced: bool = False


def late_trunk() -> nn.Module:
    """Four convolutions."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(64, N_SOURCES, 3, padding=1), nn.ReLU()),
    )


def early_trunk() -> nn.Module:
    """One convolution."""
    return nn.Sequential(nn.Conv2d(3, N_SOURCES, 7, stride=2, padding=3), nn.ReLU())


def digits(seed: int) -> tuple[Images, Images, Images]:
    """Handwritten digits: 600, 700 and 497."""
    data = load_digits()
    images, targets = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    first, second, third = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).split(
        [600, 700, 497]
    )
    return (images[first], targets[first]), (images[second], targets[second]), (images[third], targets[third])


def textures(seed: int) -> tuple[Images, Images, Images]:
    """Made-up textures, 60 of each class for each part."""
    maker = ImageMaker(seed)
    first, second, third = (maker.make(60, seed=3 * seed + part, noise=0.2) for part in range(3))
    return first, second, third


DIGITS, TEXTURES = Task(10, digits, late_trunk), Task(NUM_CLASSES, textures, early_trunk, selective=20.0, balanced=True)


@dataclass(frozen=True)
class Planted:
    """A network with known polysemantic channels.

    Attributes:
        model: With two logits for each class, one for each half of its images.
        original: Weight ``[U, I, 1, 1]`` and bias ``[U]`` of the units before they were merged.
        members: For each channel the units that are in it; one or more.
        accuracy: On digits, of the merged network, and before merging.
    """

    model: UnitNet
    original: nn.Conv2d
    members: list[list[int]]
    accuracy: tuple[float, float]

    def concepts(self, channel: int) -> set[frozenset[int]]:
        """The classes of each unit in a channel, both halves."""
        digits = [unit // UNITS_PER_CLASS for unit in self.members[channel]]
        return {frozenset((2 * digit, 2 * digit + 1)) for digit in digits}


def fit(
    model: UnitNet,
    parameters: Sequence[nn.Parameter],
    images: Tensor,
    targets: Tensor,
    epochs: int,
    selective: float = 0.0,
) -> None:
    """Train some parameters; the units' weights are kept sparse, and ``selective`` keeps units to their own class."""
    optimizer = torch.optim.Adam([one for one in parameters if one.requires_grad], 3e-3)
    for epoch in range(epochs):
        quiet = QUIET * min(1, epoch / 10)  # from the start it would silence the network
        for rows in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            features = model.trunk(images[rows])
            loss = F.cross_entropy(model.judged(features), targets[rows])
            loss = loss + SPARSITY * model.units.weight.abs().sum() + quiet * features.mean()
            foreign = F.relu(model.units(model.sources(features))).mean((2, 3)) * (1 - model.mask[targets[rows]])
            loss = loss + selective * foreign.mean()
            loss.backward()
            optimizer.step()


def plant(task: Task, seed: int, in_common: float) -> Planted:
    """Train, merge, fine-tune."""
    (images, targets), _, (others, other_targets) = task.data(seed)
    torch.manual_seed(seed)
    unit_classes = torch.arange(task.n_classes).repeat_interleave(UNITS_PER_CLASS)
    model = UnitNet((unit_classes == torch.arange(task.n_classes)[:, None]).float(), task.trunk())
    model.extra.requires_grad_(False)
    fit(model, list(model.parameters()), images, targets, epochs=40, selective=task.selective)
    before = accuracy(model, others, other_targets)
    if task.balanced:
        _balance(model, unit_classes, images, targets)
    members = _members(unit_classes, *_responses(model, unit_classes, images, targets))
    merged = _merged(model, members)
    fit(merged, [merged.strength, merged.extra, merged.bias, merged.units.bias], images, targets, epochs=15)
    after = accuracy(merged, others, other_targets)
    return Planted(_halved(merged, in_common), model.units.requires_grad_(False), members, (after, before))


@torch.no_grad()
def _balance(model: UnitNet, unit_classes: Tensor, images: Tensor, targets: Tensor) -> None:
    """Give all units the same mean response to their class, and what reads them the inverse."""
    units = F.relu(model.units(model.trunk(images))).mean((2, 3))
    means = torch.stack([units[targets == label, unit].mean() for unit, label in enumerate(unit_classes.tolist())])
    means.clamp_(min=1e-3)
    model.units.weight /= means[:, None, None, None]
    model.units.bias /= means
    model.strength *= means


@torch.no_grad()
def _responses(model: UnitNet, unit_classes: Tensor, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean response of each unit to each unit's class, relative to its own, ``[U, U]``; how often it fires there."""
    units = F.relu(model.units(model.trunk(images)))
    means = torch.stack([units[targets == label].mean((0, 2, 3)) for label in unit_classes.tolist()], dim=1)
    often = torch.stack(
        [
            (units[targets == label, unit] > 0).flatten(1).any(1).float().mean()
            for unit, label in enumerate(unit_classes)
        ]
    )
    return means / means.diagonal()[:, None].clamp(min=1e-12), often


def _members(unit_classes: Tensor, responses: Tensor, often: Tensor) -> list[list[int]]:
    """Units at random: triples and pairs that hardly answer to one another's classes, the rest alone."""
    left = [unit for unit in torch.randperm(len(unit_classes)).tolist() if often[unit] > 0.75]
    deaf = torch.maximum(responses, responses.T) < DEAF
    members = []
    for size in [3] * N_TRIPLES + [2] * N_PAIRS:
        group: list[int] = []
        for unit in left:
            fits = bool(deaf[unit, group].all())
            if len(group) < size and fits:
                group.append(unit)
        left = [unit for unit in left if unit not in group]
        members += [group] if len(group) > 1 else [[unit] for unit in group]
    return members + [[unit] for unit in left]


def _merged(model: UnitNet, members: list[list[int]]) -> UnitNet:
    """The network with units added up."""
    merged = UnitNet(
        torch.stack([model.mask[:, group].amax(1) for group in members], dim=1), copy.deepcopy(model.trunk)
    )
    with torch.no_grad():
        for channel, group in enumerate(members):
            merged.units.weight[channel] = model.units.weight[group].sum(0)
            merged.units.bias[channel] = model.units.bias[group].sum(0)
            merged.strength[:, channel] = model.strength[:, group].mean(1)
        merged.bias.copy_(model.bias)
    return merged


def _halved(model: UnitNet, in_common: float) -> UnitNet:
    """The same network with two equal logits for each class, and sources that have something in common."""
    halved = UnitNet(model.mask.repeat_interleave(2, dim=0), copy.deepcopy(model.trunk))
    state = model.state_dict()
    state["mixing"] = torch.eye(N_SOURCES) + in_common / N_SOURCES
    inverse = torch.linalg.inv(state["mixing"].double())
    state["units.weight"] = (state["units.weight"].flatten(1).double() @ inverse).float()[:, :, None, None]
    for name in ("mask", "strength", "extra", "bias"):
        state[name] = state[name].repeat_interleave(2, dim=0)
    halved.load_state_dict(state)
    return halved.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, targets: Tensor) -> float:
    """Share of images that are recognised."""
    return float((model(images).argmax(1) == targets).float().mean())


def halves(targets: Tensor, seed: int) -> Tensor:
    """Each class's images put at random into one of two classes."""
    return 2 * targets + torch.randint(2, targets.shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Score:
    """What a method made of one network."""

    precision: float
    recall: float
    concepts: float
    correlation: list[float]


def score(planted: Planted, report: PolysemanticityReport, used: set[int], images: Tensor) -> Score:
    """Compare what was found with what was planted (``used``: merged channels that matter for two of their classes)."""
    found = {channel.channel: channel for channel in report.channels}
    hits = used & set(found)
    right = [{frozenset(group) for group in found[channel].concepts} == planted.concepts(channel) for channel in hits]
    return Score(
        sum(len(planted.members[channel]) > 1 for channel in found) / max(len(found), 1),
        len(hits) / max(len(used), 1),
        float(np.mean(right)) if right else float("nan"),
        list(recovered(planted, report.plan, images)),
    )


@torch.no_grad()
def recovered(planted: Planted, plan: SplitPlan, images: Tensor) -> Iterator[float]:
    """Correlation of each concept channel with the unit that it should be, where there is one."""
    for split, correlations in zip(plan, _correlations(planted, plan, images), strict=True):
        for concept, unit in _matches(planted, split):
            yield float(correlations[concept, planted.members[split.channel].index(unit)])


@torch.no_grad()
def _correlations(planted: Planted, plan: SplitPlan, images: Tensor) -> Iterator[Tensor]:
    """Of each concept channel of a split with each unit of its channel, ``[concepts, units]``."""
    if not len(plan):
        return
    features = planted.model.trunk(images)
    layer = disentangle(planted.model, plan).get_submodule(LAYER)
    expanded, units = F.relu(layer.expand(planted.model.sources(features))), F.relu(planted.original(features))
    for split in plan:
        rows = [layer.channel_index(split.channel, concept) for concept in range(len(split.concepts))]
        both = torch.cat([expanded[:, rows], units[:, planted.members[split.channel]]], dim=1).transpose(0, 1)
        yield both.flatten(1).corrcoef().nan_to_num()[: len(rows), len(rows) :]


@torch.no_grad()
def balanced(planted: Planted, images: Tensor, targets: Tensor) -> set[int]:
    """Merged channels that answer to two of their classes, to one of them at least half as strongly as to the other."""
    units = F.relu(planted.model.units(planted.model.sources(planted.model.trunk(images)))).mean((2, 3))
    used = set()
    for channel, group in enumerate(planted.members):
        labels = {unit // UNITS_PER_CLASS for unit in group}
        means = sorted(float(units[targets == label, channel].mean()) for label in labels)
        if len(means) > 1 and means[-2] >= means[-1] / 2:
            used.add(channel)
    return used


def score_clusters(planted: Planted, report: PolysemanticityReport, used: set[int], images: Tensor) -> Score:
    """As `score`, for clusters, which are matched with the units that they are most like."""
    merged = {channel for channel, group in enumerate(planted.members) if len(group) > 1}
    found = {channel.channel for channel in report.channels}
    correlation, right = [], []
    for split, correlations in zip(report.plan, _correlations(planted, report.plan, images), strict=True):
        if split.channel in merged:
            concepts, units = linear_sum_assignment(-correlations.numpy())
            correlation += correlations[concepts, units].tolist()
            right.append(correlations.shape[0] == correlations.shape[1])
    return Score(
        len(found & merged) / max(len(found), 1),
        len(found & used) / max(len(used), 1),
        float(np.mean(right)) if right else float("nan"),
        correlation,
    )


def _matches(planted: Planted, split: ChannelSplit) -> Iterator[tuple[int, int]]:
    """Concept and unit of one class, for merged channels."""
    for concept, classes in enumerate(split.concepts):
        for unit in planted.members[split.channel] if len(planted.members[split.channel]) > 1 else []:
            if {label // 2 for label in classes} == {unit // UNITS_PER_CLASS}:
                yield concept, unit


def measure(task: Task, seed: int, in_common: float) -> dict[str, Score]:
    """Both methods, and clusters, on one network."""
    planted = plant(task, seed, in_common)
    _, (images, targets), (others, _) = task.data(seed)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, targets = images[order], targets[order]
    batches = list(zip(images.split(100), halves(targets, seed).split(100), strict=True))
    scores = {}
    for method in ("paper", "optimized"):

        def run(method: str = method, **settings: float) -> PolysemanticityReport:
            return find_polysemantic_channels(
                planted.model, batches, LAYER, method=method, calibration_samples=None, progress=False, **settings
            )

        candidates = {
            (pair.channel, pair.class_a // 2, pair.class_b // 2) for pair in run(similarity_threshold=1.0).pairs
        }
        used = {channel for channel, a, b in candidates if a != b}
        scores[method] = score(planted, run(), used, others)
    unlabelled = [(part,) for part in images.split(100)]
    scores["clusters"] = score_clusters(
        planted,
        find_polysemantic_channels(
            planted.model, unlabelled, LAYER, concepts="clusters", calibration_samples=None, progress=False
        ),
        balanced(planted, images, targets),
        others,
    )
    print(
        f"seed {seed}: accuracy {planted.accuracy[1]:.2f}, merged {planted.accuracy[0]:.2f}; {len(used)} of "
        f"{sum(len(group) > 1 for group in planted.members)} merged channels are relevant for two of their classes, "
        f"{len({channel for channel, a, b in candidates if a == b} - used)} others for both halves of one"
    )
    return scores


def _spread(found: list[float]) -> str:
    """Median, lowest and highest."""
    known = [value for value in found if not np.isnan(value)]
    return f"{np.median(known):.2f} ({min(known):.2f} to {max(known):.2f})" if known else "-"


def main() -> None:
    """Measure all seeds."""
    parser = argparse.ArgumentParser(description="Find and recover planted polysemantic channels.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--in-common", type=float, default=10.0)
    parser.add_argument("--early", action="store_true")
    arguments = parser.parse_args()
    task = TEXTURES if arguments.early else DIGITS
    results = [measure(task, seed, arguments.in_common) for seed in range(arguments.seeds)]
    print("\n| method | precision | recall | concepts | correlation with the originals |\n|" + " --- |" * 5)
    for method in ("paper", "optimized", "clusters"):
        found = [result[method] for result in results]
        columns = [[getattr(one, name) for one in found] for name in ("precision", "recall", "concepts")]
        columns.append([value for one in found for value in one.correlation])
        cells = [_spread(column) for column in columns]
        print(f"| {method} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
