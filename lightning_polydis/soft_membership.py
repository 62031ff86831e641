"""Soft membership: how much of each source (input channel) a concept of a channel takes, by a convex loss."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_polydis.box_newton import HingedLeastSquares, minimise_in_box
from lightning_polydis.layers import channel_outputs, flat_weight, inputs_per_channel
from lightning_polydis.sources import source_contributions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_polydis.layers import LinearLayer
    from lightning_polydis.statistics import Samples

SPURIOUS_WEIGHT = 1.0
MAX_IMAGES = 64
"""Images of each concept, and of all remaining classes together, that have a say."""

PROBLEM_ELEMENTS = 2**19
"""Size of a problem, positions times sources: of larger maps some positions stand for all."""

LEAST_ROWS = 320
"""Positions of each concept, and of the remaining classes, that may have a say however many sources there are."""

CHUNK_ELEMENTS = 2**24
"""Elements of layer inputs that are looked at together: what a worker takes is some copies of that."""

MAX_WORKERS = 8
"""Channels that are worked on at once; bounds memory, on a machine of many cores."""


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
        counts: How many positions each row stands for, ``[R]``.
        totals: Positions of all images of each concept and, last, of the remaining classes, ``[K + 1]``.
        directions: Of the concepts, ``[K]``.
        bias: The channel's bias.
    """

    contributions: Tensor
    concepts: Tensor
    counts: Tensor
    totals: Tensor
    directions: Tensor
    bias: float


def soft_memberships(layer: LinearLayer, wanted: Sequence[WantedSplit], leak_weight: float) -> list[Tensor]:
    r"""Memberships of the sources of some channels, each solved for by itself.

    With :math:`d_i` the channel computed from weights :math:`m_{ik} w_k` and the bias, :math:`z` the channel itself and
    :math:`s_i` the direction in which concept :math:`i` uses it, :math:`m_i \in [0, 1]^I` minimises the sum of three
    means over positions,

    * own images: :math:`(d_i - z)^2` where :math:`s_i z > 0`, else :math:`\max(s_i d_i, 0)^2`, over the mean of
      :math:`\max(s_i z, 0)^2` there;
    * images of the other concepts: ``leak_weight`` times :math:`\max(s_j d_i, 0)^2`, over the mean of
      :math:`\max(s_j z, 0)^2` there;
    * images of all remaining classes: :math:`\max(s_i d_i - \max(s_i z, 0), 0)^2`, over the first mean.

    A term without images or with a mean of zero is dropped. The loss is convex; it is minimised until the largest
    projected gradient is 1e-9 of the largest gradient at the start, or as far as thirty Newton steps (in each
    precision, see `box_newton`) and rounding let:
    with far fewer active positions than sources the minimum is flat, and its last percent not worth the time.

    The means are over at most 64 images of each concept and of the remaining classes. Of their positions as many have a
    say as a problem may hold (about 1000 with 512 sources, 8000 with 64): drawn, always the same ones, with chances in
    proportion to the square of :math:`\sum_k |w_k x_k| + |b|`, the most that the channel could put out there, and
    weighted by one over their chances, so that the sums are on average those of all positions.

    Args:
        layer: The layer, on the CPU.
        wanted: What to split, and by which images.
        leak_weight: Weight of what a concept channel answers to the other concepts.

    Returns:
        For each wanted split the membership ``[K, I]``, ``float32``.
    """
    n_threads = torch.get_num_threads()
    n_workers = max(1, min(n_threads, len(wanted), MAX_WORKERS))
    try:
        # The work on one channel is hardly worth sharing: channels are shared out, and threads that are left over.
        with ThreadPoolExecutor(n_workers, initializer=lambda: torch.set_num_threads(n_threads // n_workers)) as pool:
            return list(pool.map(lambda split: _memberships(layer, split, leak_weight), wanted))
    finally:
        torch.set_num_threads(n_threads)  # torch keeps the last number for threads that begin later


def _memberships(layer: LinearLayer, split: WantedSplit, leak_weight: float) -> Tensor:
    rows = channel_rows(layer, split)
    problems = (membership_problem(rows, concept, leak_weight) for concept in range(len(split.concepts)))
    return torch.stack([minimise_in_box(problem).values.float() for problem in problems])


def channel_rows(layer: LinearLayer, split: WantedSplit) -> ChannelRows:
    """What the samples say about a channel, for its concepts' images and some of all remaining classes."""
    samples = split.samples
    named = [label for concept in split.concepts for label in concept]
    groups = [samples.of_classes(concept) for concept in split.concepts]
    rest = samples[~torch.isin(samples.targets, torch.tensor(named))]
    bias = 0.0 if layer.bias is None else float(layer.bias.detach()[split.channel])
    n_rows = max(LEAST_ROWS, PROBLEM_ELEMENTS // (inputs_per_channel(layer) * (len(groups) + 1)))
    found = [_rows(layer, split.channel, _thinned(part, MAX_IMAGES), bias, n_rows) for part in (*groups, rest)]
    contributions, counts = (torch.cat(parts) for parts in list(zip(*found, strict=True))[:2])
    numbers = torch.tensor([*range(len(groups)), -1])
    owners = numbers.repeat_interleave(torch.tensor([len(own) for _, own, _ in found]))
    totals = torch.tensor([total for *_, total in found])
    directions = torch.tensor(list(split.directions), dtype=torch.float64)
    return ChannelRows(contributions, owners, counts, totals, directions, bias)


def _thinned(samples: Samples, n_images: int) -> Samples:
    """At most so many images."""
    return samples if len(samples) <= n_images else samples[evenly_spread(len(samples), n_images)]


def evenly_spread(total: int, n_wanted: int) -> Tensor:
    """At most so many of the numbers below ``total``, evenly spread, ascending."""
    return torch.linspace(0, total - 1, min(total, n_wanted), dtype=torch.float64).round().long()


def _rows(layer: LinearLayer, channel: int, samples: Samples, bias: float, n_rows: int) -> tuple[Tensor, Tensor, int]:
    """Contributions of each source at some positions, ``[R, I]``, how many each stands for, and how many there are."""
    weight = flat_weight(layer)[channel].double()
    if not len(samples):
        return weight.new_empty(0, len(weight)), weight.new_empty(0), 0
    absolute = weight.abs()[None].to(samples[:1].inputs)
    pieces = list(samples.in_pieces(CHUNK_ELEMENTS))
    found = (channel_outputs(layer, part.inputs.abs(), absolute, None, [channel])[:, 0] for part in pieces)
    reaches = torch.cat(list(found)).double() + abs(bias)
    chances = inclusion_chances(reaches.flatten() ** 2, n_rows)
    chosen = systematic_sample(chances)
    images, positions = chosen // reaches.shape[1], chosen % reaches.shape[1]
    contributions, start = [], 0
    for part in pieces:
        inside = (images >= start) & (images < start + len(part))
        places = (images[inside] - start, positions[inside])
        contributions.append(source_contributions(layer, part.inputs, weight, channel, places))
        start += len(part)
    return torch.cat(contributions), 1 / chances[chosen], len(chances)


def inclusion_chances(sizes: Tensor, n_wanted: int) -> Tensor:
    """Chances in proportion to sizes, 1 at most, that add up to so many (or to all that have a size)."""
    if int((sizes > 0).sum()) <= n_wanted:
        return (sizes > 0).double()
    ordered = sizes.sort(descending=True).values
    rest = ordered.flip(0).cumsum(0).flip(0)
    room = n_wanted - torch.arange(len(sizes))
    certain = int((ordered * room <= rest).int().argmax())  # so many of the largest are taken in any case
    return (sizes * (room[certain] / rest[certain])).clamp(max=1)


def systematic_sample(chances: Tensor) -> Tensor:
    """Numbers drawn with these chances, ascending, evenly spread over the order; always the same ones."""
    count = (chances.cumsum(0) + 0.5).floor()
    return count.diff(prepend=count.new_zeros(1)).nonzero()[:, 0]


def membership_problem(rows: ChannelRows, concept: int, leak_weight: float) -> HingedLeastSquares:
    """The loss of one concept as hinged least squares, see `soft_memberships`."""
    own, rest = rows.concepts == concept, rows.concepts < 0
    others = ~own & ~rest
    direction = rows.directions[torch.where(rest, concept, rows.concepts)]
    positive = (direction * (rows.contributions.sum(1) + rows.bias)).clamp(min=0)
    n_own, n_rest = int(rows.totals[concept]), int(rows.totals[-1])
    own_energy, other_energy = ((rows.counts * positive**2)[part].sum() for part in (own, others))
    weights = torch.zeros_like(positive)
    if own_energy > 0:
        weights[own] = 1 / own_energy
        weights[rest] = SPURIOUS_WEIGHT * n_own / (max(n_rest, 1) * own_energy)
    if other_energy > 0:
        weights[others] = leak_weight / other_energy
    weights *= rows.counts
    goals = torch.where(others, 0, positive) - direction * rows.bias
    return HingedLeastSquares(direction[:, None] * rows.contributions, goals, weights, own & (positive > 0))
