"""Soft membership: how much of each source (input channel) a concept of a channel takes, by a convex loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_polydis.box_newton import HingedLeastSquares, minimise_in_box
from lightning_polydis.layers import flat_weight, inputs_per_channel, source_contributions

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lightning_polydis.layers import LinearLayer
    from lightning_polydis.statistics import Samples

SPURIOUS_WEIGHT = 1.0
MAX_IMAGES = 64
"""Images of each concept, and of all remaining classes together, that have a say."""

MAX_ROWS = 2**15
"""Positions, over all images of a channel, that have a say; of larger maps a fixed random part."""

CHANNEL_ELEMENTS = 2**25
"""Size that the problems of one channel may have together; of wide layers fewer positions have a say."""

BATCH_ELEMENTS = 2**25
"""Size of the problems that are solved together; bounds memory at three to four times 256 MiB."""


@dataclass(frozen=True)
class WantedSplit:
    """A channel to split.

    Attributes:
        channel: Index of the channel.
        concepts: The classes (or clusters) of each concept.
        directions: The sign with which each concept uses the channel.
        samples: Images that choose the memberships.
    """

    channel: int
    concepts: Sequence[Sequence[int]]
    directions: Sequence[int]
    samples: Samples


@dataclass(frozen=True)
class ChannelRows:
    """What the images say about one channel, position by position (``R`` positions of all images).

    Attributes:
        contributions: Of each source to the channel's output, ``[R, I]``, ``float64``.
        concepts: The concept that each position's image belongs to, -1 for the remaining classes, ``[R]``.
        directions: Of the concepts, ``[K]``.
        bias: The channel's bias.
    """

    contributions: Tensor
    concepts: Tensor
    directions: Tensor
    bias: float


def soft_memberships(layer: LinearLayer, wanted: Sequence[WantedSplit], leak_weight: float) -> list[Tensor]:
    r"""Memberships of the sources of some channels, all solved for together.

    With :math:`d_i` the channel computed from weights :math:`m_{ik} w_k` and the bias, :math:`z` the channel itself and
    :math:`s_i` the direction in which concept :math:`i` uses it, :math:`m_i \in [0, 1]^I` minimises the sum of three
    means over positions,

    * own images: :math:`(d_i - z)^2` where :math:`s_i z > 0`, else :math:`\max(s_i d_i, 0)^2`, over the mean of
      :math:`\max(s_i z, 0)^2` there;
    * images of the other concepts: ``leak_weight`` times :math:`\max(s_j d_i, 0)^2`, over the mean of
      :math:`\max(s_j z, 0)^2` there;
    * images of all remaining classes: :math:`\max(s_i d_i - \max(s_i z, 0), 0)^2`, over the first mean.

    A term without images or with a mean of zero is dropped. The loss is convex; it is minimised until the largest
    projected gradient is 1e-9 of the largest gradient at the start, or as far as thirty Newton steps and rounding let:
    with far fewer active positions than sources the minimum is flat, and its last percent not worth the time.

    Args:
        layer: The layer, on the CPU.
        wanted: What to split, and by which images.
        leak_weight: Weight of what a concept channel answers to the other concepts.

    Returns:
        For each wanted split the membership ``[K, I]``, ``float32``.
    """
    # One channel may be wanted in several ways: results are kept by place.
    rows = ((place, channel_rows(layer, split)) for place, split in enumerate(wanted))
    found: dict[int, Tensor] = {}
    for batch in _batches(rows):
        problems = [membership_problem(part, concept, leak_weight) for _, part in batch for concept in _concepts(part)]
        solutions = iter(minimise_in_box(_stacked(problems)).values.float())
        for place, part in batch:
            found[place] = torch.stack([next(solutions) for _ in _concepts(part)])
    return [found[place] for place in range(len(wanted))]


def _concepts(rows: ChannelRows) -> range:
    return range(len(rows.directions))


def _batches(rows: Iterable[tuple[int, ChannelRows]]) -> Iterator[list[tuple[int, ChannelRows]]]:
    """Channels whose problems, padded to the longest, fit into `BATCH_ELEMENTS`; at least one at a time."""
    batch: list[tuple[int, ChannelRows]] = []
    for entry in rows:
        together = [*batch, entry]
        longest = max(part.contributions.numel() for _, part in together)
        if batch and longest * sum(len(_concepts(part)) for _, part in together) > BATCH_ELEMENTS:
            yield batch
            together = [entry]
        batch = together
    if batch:
        yield batch


def channel_rows(layer: LinearLayer, split: WantedSplit) -> ChannelRows:
    """What the samples say about a channel, for its concepts' images and some of all remaining classes."""
    samples = split.samples
    named = [label for concept in split.concepts for label in concept]
    groups = [samples.of_classes(concept) for concept in split.concepts]
    rest = samples[~torch.isin(samples.targets, torch.tensor(named))]
    kept = [_thinned(part, MAX_IMAGES) for part in (*groups, rest)]
    n_images = sum(map(len, kept))
    n_rows = min(MAX_ROWS, CHANNEL_ELEMENTS // (inputs_per_channel(layer) * len(groups)))
    max_positions = max(1, n_rows // max(n_images, 1))
    contributions, owners = [], []
    for concept, part in zip((*range(len(groups)), -1), kept, strict=True):
        values = _contributions(layer, split.channel, part, max_positions)
        contributions.append(values)
        owners.append(torch.full((len(values),), concept))
    bias = 0.0 if layer.bias is None else float(layer.bias.detach()[split.channel])
    directions = torch.tensor(list(split.directions), dtype=torch.float64)
    return ChannelRows(torch.cat(contributions), torch.cat(owners), directions, bias)


def _thinned(samples: Samples, n_images: int) -> Samples:
    """At most so many images, evenly spread."""
    if len(samples) <= n_images:
        return samples
    return samples[torch.linspace(0, len(samples) - 1, n_images, dtype=torch.float64).round().long()]


def _contributions(layer: LinearLayer, channel: int, samples: Samples, max_positions: int) -> Tensor:
    """Of each source at some positions of each image, ``[R, I]``, ``float64``."""
    weight = flat_weight(layer)[channel].double()
    draw = torch.Generator().manual_seed(0)
    pieces = [weight.new_empty(0, len(weight))]
    for start in range(len(samples)):  # image by image: all positions of all images may be a lot
        values = source_contributions(layer, samples[start : start + 1].inputs.double(), weight, channel)[0]
        if len(values) > max_positions:
            values = values[torch.randperm(len(values), generator=draw)[:max_positions]]
        pieces.append(values)
    return torch.cat(pieces)


def membership_problem(rows: ChannelRows, concept: int, leak_weight: float) -> HingedLeastSquares:
    """The loss of one concept as hinged least squares, see `soft_memberships`; a batch of one."""
    own, rest = rows.concepts == concept, rows.concepts < 0
    direction = rows.directions[torch.where(rest, concept, rows.concepts)]
    positive = (direction * (rows.contributions.sum(1) + rows.bias)).clamp(min=0)
    weights = torch.zeros_like(positive)
    own_scale = _mean_square(positive[own])
    terms = ((own, 1.0, own_scale), (rest, SPURIOUS_WEIGHT, own_scale))
    others = ~own & ~rest
    for where, weight, scale in (*terms, (others, leak_weight, _mean_square(positive[others]))):
        if scale > 0 and bool(where.any()):
            weights[where] = weight / (scale * int(where.sum()))
    goals = torch.where(others, 0, positive) - direction * rows.bias
    signed = direction[:, None] * rows.contributions
    parts = (signed, goals, weights, own & (positive > 0))
    return HingedLeastSquares(*(part[None] for part in parts))


def _mean_square(values: Tensor) -> float:
    return float((values**2).mean()) if len(values) else 0.0


def _stacked(problems: Sequence[HingedLeastSquares]) -> HingedLeastSquares:
    """One batch of all problems, padded with rows of no weight."""
    longest = max(problem.goals.shape[1] for problem in problems)

    def joined(parts: list[Tensor]) -> Tensor:
        pads = [(0, 0) * (part.ndim - 2) + (0, longest - part.shape[1]) for part in parts]
        return torch.cat([F.pad(part, pad) for part, pad in zip(parts, pads, strict=True)])

    return HingedLeastSquares(
        joined([problem.rows for problem in problems]),
        joined([problem.goals for problem in problems]),
        joined([problem.weights for problem in problems]),
        joined([problem.two_sided for problem in problems]),
    )
