"""What split channels keep of the original, and how well they tell the concepts apart."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_polydis._checks import InputError
from lightning_polydis.layers import channel_outputs, flat_weight, reads_padding
from lightning_polydis.membership import part_weights
from lightning_polydis.processes import everyones, is_distributed
from lightning_polydis.sources import source_contributions
from lightning_polydis.splitting import SplitLayer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lightning_polydis.layers import LinearLayer
    from lightning_polydis.plan import ChannelSplit

CHUNK_ROWS = 256
"""Part channels computed at once; bounds memory to that of a layer of so many channels."""


@dataclass(frozen=True)
class ConceptQuality:
    """How well one concept channel does.

    With ``D`` the position sum, on one image, of ``max(direction * output, 0)`` with the direction of the concept that
    the image's class belongs to (1 in paper mode), ``D_orig`` of the channel before the split and ``D_own`` of this
    concept channel. `None` where there were no images to tell.

    Attributes:
        classes: The concept's classes.
        distortion: ``sum |D_own - D_orig| / sum D_orig`` over images of its classes. 0 is best.
        leak: ``sum D_own / sum D_orig`` over images of the other concepts' classes. 0 is best.
        spurious: What the concept channel fires, in its own direction, above the original on images of all remaining
            classes, mean per image, over the mean ``D_orig`` on its own images. 0 is best. Of held-out samples
            (`report.quality`) at most 512, evenly spread over all classes, are looked at for this.
        kept: Share of ``sum D_orig`` that each concept channel and, last, the residual keep, over those images of its
            classes that the channel is relevant for (the paper's table).
        auroc: How well ``D_own``, taken in this concept's direction for all images (or it would read the label off the
            sign), tells its classes from the other concepts' classes. 1 is best, 0.5 is chance.
        auroc_original: The same for ``D_orig``.
        n_own: Images of its classes.
        n_other: Images of the other concepts' classes.
    """

    classes: list[int]
    distortion: float | None
    leak: float | None
    spurious: float | None
    kept: list[float] | None
    auroc: float | None
    auroc_original: float | None
    n_own: int
    n_other: int


@dataclass(frozen=True)
class SplitQuality:
    """Quality of one channel's split.

    Attributes:
        layer: Name of the layer.
        channel: Index of the output channel.
        concepts: One entry for each concept, in the split's order.
    """

    layer: str
    channel: int
    concepts: list[ConceptQuality]

    def mean(self, name: str) -> float | None:
        """Mean of one figure over the concepts, leaving out what is `None`."""
        values = [value for concept in self.concepts if (value := getattr(concept, name)) is not None]
        return sum(values) / len(values) if values else None

    def to_json(self) -> dict[str, Any]:
        """The quality in plain types."""
        return asdict(self)

    @staticmethod
    def from_json(content: dict[str, Any]) -> SplitQuality:
        """The quality that `to_json` described."""
        concepts = [ConceptQuality(**concept) for concept in content["concepts"]]
        return SplitQuality(content["layer"], content["channel"], concepts)


@dataclass(frozen=True)
class SplitParts:
    """Weights of a split channel's parts, and the channel itself.

    Attributes:
        weight: The channel, its concepts and the residual: ``[K + 2, I, k]``.
        bias: ``[K + 2]`` or `None`.
    """

    weight: Tensor
    bias: Tensor | None


def parts_of(layer: LinearLayer | SplitLayer, split: ChannelSplit) -> SplitParts:
    """The parts of a channel: from the plan for an unsplit layer, as they stand in the layer for a split one."""
    if isinstance(layer, SplitLayer):
        rows = layer.part_rows(split.channel)
        parts = flat_weight(layer.expand)[rows]
        biases = None if layer.expand.bias is None else layer.expand.bias.detach()[rows]
    else:
        bias = None if layer.bias is None else layer.bias.detach()[split.channel]
        parts, biases = part_weights(flat_weight(layer)[split.channel], bias, split.membership.to(layer.weight.device))
    weight = torch.cat([_minus_residual(parts), parts])
    return SplitParts(weight, None if biases is None else torch.cat([_minus_residual(biases), biases]))


def _minus_residual(parts: Tensor) -> Tensor:
    return parts[:-1].sum(0, keepdim=True) - parts[-1:]


class SplitEvaluator:
    """Streams images through the parts of some splits of one layer and keeps a few numbers for each image.

    Args:
        splits: The splits to judge; the same channel may appear more than once.
    """

    def __init__(self, splits: Sequence[ChannelSplit]) -> None:
        self._tallies = [_Tally(split) for split in splits]

    def update(
        self,
        layer: LinearLayer | SplitLayer,
        inputs: Tensor,
        targets: Tensor | None,
        relevant: Tensor,
        places: Sequence[int] | None = None,
    ) -> None:
        """Add images.

        Args:
            layer: The layer, split or not.
            inputs: Its inputs, ``[B, I, H, W]`` or ``[B, ..., I]``.
            targets: Class indices, ``[B]``; `None`: the splits' centres tell which concept an image belongs to.
            relevant: Which channels are relevant for which image, ``[B, C]``, boolean.
            places: Add them only to some of the splits, by their place; `None`: to all.
        """
        wanted = self._tallies if places is None else [self._tallies[place] for place in places]
        geometry = layer.expand if isinstance(layer, SplitLayer) else layer
        for tallies in _chunks(wanted):
            parts = [parts_of(layer, tally.split) for tally in tallies]
            weight = torch.cat([part.weight for part in parts]).to(inputs)
            biases = [part.bias for part in parts if part.bias is not None]
            bias = torch.cat(biases).to(inputs) if biases else None
            sizes = [len(part.weight) for part in parts]
            own = [tally.split.channel for tally in tallies]
            if isinstance(layer, SplitLayer):
                own = [layer.channel_index(channel, 0) for channel in own]
            channels = [channel for channel, size in zip(own, sizes, strict=True) for _ in range(size)]
            outputs = channel_outputs(geometry, inputs, weight, bias, channels).float()
            for tally, channel, part, output in zip(tallies, own, parts, outputs.split(sizes, dim=1), strict=True):
                if targets is None:
                    concepts = nearest_concepts(geometry, inputs, part.weight[0], output[:, 0], tally.split, channel)
                else:
                    concepts = tally.concepts_of(targets)
                tally.add(output, concepts, relevant[:, tally.split.channel])

    def gather(self) -> None:
        """Take in what the other processes of a distributed run have seen, if there are any."""
        if not is_distributed():
            return
        everyone = everyones(self._tallies)
        for position, tally in enumerate(self._tallies):
            others = [
                tallies[position] for rank, tallies in enumerate(everyone) if rank != torch.distributed.get_rank()
            ]
            for other in others:
                tally.merge(other)

    def compute(self) -> list[SplitQuality]:
        """Quality of each split, in the order given."""
        return [SplitQuality(t.split.layer, t.split.channel, t.qualities()) for t in self._tallies]


def _chunks(tallies: list[_Tally]) -> Iterable[list[_Tally]]:
    chunk: list[_Tally] = []
    rows = 0
    for tally in tallies:
        rows += len(tally.split.concepts) + 2
        if chunk and rows > CHUNK_ROWS:
            yield chunk
            chunk, rows = [], len(tally.split.concepts) + 2
        chunk.append(tally)
    if chunk:
        yield chunk


class _Tally:
    """The numbers of one split: activations of concept images, sums for all remaining ones."""

    def __init__(self, split: ChannelSplit) -> None:
        self.split = split
        self._concept_of = {label: index for index, concept in enumerate(split.concepts) for label in concept}
        self._signs = split.signs()
        # Position sums of what is positive and of what is negative: original, concepts, residual, [n, K + 2, 2].
        self._activations: list[Tensor] = []
        self._concepts: list[Tensor] = []  # [n]
        self._relevant: list[Tensor] = []  # [n]
        self._spurious = torch.zeros(len(split.concepts), dtype=torch.float64)
        self._n_remaining = 0

    def concepts_of(self, targets: Tensor) -> Tensor:
        """The concept that each image's class belongs to, -1 for none, ``[B]``."""
        return torch.tensor([self._concept_of.get(target, -1) for target in targets.tolist()])

    def add(self, outputs: Tensor, concepts: Tensor, relevant: Tensor) -> None:
        """Add the outputs ``[B, K + 2, P]`` of original, concepts and residual on images of some concepts."""
        named = concepts >= 0
        if bool(named.any()):
            shown = outputs[named.to(outputs.device)]
            both = [(sign * shown).clamp_(min=0).sum(2, dtype=torch.float64) for sign in (1, -1)]
            self._activations.append(torch.stack(both, dim=2).cpu())
            self._concepts.append(concepts[named])
            self._relevant.append(relevant[named.to(relevant.device)].cpu())
        remaining = outputs[~named.to(outputs.device)]
        signs = torch.tensor(self._signs, device=outputs.device)[:, None]
        original, parts = ((signs * part).clamp_(min=0) for part in (remaining[:, :1], remaining[:, 1:-1]))
        self._spurious += (parts - original).clamp_(min=0).sum((0, 2), dtype=torch.float64).cpu()
        self._n_remaining += len(remaining)

    def merge(self, other: _Tally) -> None:
        """Add what another tally of the same split has seen."""
        self._activations += other._activations
        self._concepts += other._concepts
        self._relevant += other._relevant
        self._spurious += other._spurious
        self._n_remaining += other._n_remaining

    def qualities(self) -> list[ConceptQuality]:
        """Quality of each concept."""
        empty = torch.zeros(0, len(self.split.concepts) + 2, 2, dtype=torch.float64)
        activations = torch.cat([empty, *self._activations])
        concepts = torch.cat([torch.zeros(0, dtype=torch.long), *self._concepts])
        relevant = torch.cat([torch.zeros(0, dtype=torch.bool), *self._relevant])
        return [self._quality(index, activations, concepts, relevant) for index in range(len(self._spurious))]

    def _quality(self, index: int, both: Tensor, concepts: Tensor, relevant: Tensor) -> ConceptQuality:
        is_negative = torch.tensor([sign < 0 for sign in self._signs])
        own = concepts == index
        fixed = both[..., int(is_negative[index])]
        activations = torch.where(is_negative[concepts][:, None], both[..., 1], both[..., 0])
        original, concept = activations[:, 0], activations[:, 1 + index]
        shown = activations[own & relevant]
        spurious = float(self._spurious[index]) / self._n_remaining if self._n_remaining else None
        own_mean = float(original[own].mean()) if bool(own.any()) else 0.0
        return ConceptQuality(
            classes=self.split.concepts[index],
            distortion=_ratio((concept - original)[own].abs().sum(), original[own].sum()),
            leak=_ratio(concept[~own].sum(), original[~own].sum()),
            spurious=None if spurious is None or own_mean == 0 else spurious / own_mean,
            kept=None if float(shown[:, 0].sum()) == 0 else (shown[:, 1:].sum(0) / shown[:, 0].sum()).tolist(),
            auroc=_auroc(fixed[:, 1 + index], own),
            auroc_original=_auroc(fixed[:, 0], own),
            n_own=int(own.sum()),
            n_other=int((~own).sum()),
        )


def nearest_concepts(
    layer: LinearLayer, inputs: Tensor, weight: Tensor, outputs: Tensor, split: ChannelSplit, channel: int
) -> Tensor:
    """The concept that each image belongs to where concepts are clusters, -1 for none, ``[B]``, on the CPU.

    The one whose centre is most like what makes the channel fire on the image, among those of the directions in which
    the image activates the channel enough.

    Args:
        layer: Gives the geometry.
        inputs: ``[B, I, H, W]`` or ``[B, ..., I]``.
        weight: The channel's weights before the split, ``[I, k]``.
        outputs: The channel's outputs, ``[B, P]``.
        split: With centres.
        channel: A channel of ``layer`` that reads what the split one reads.
    """
    centres, floors = split.centres, split.floors
    if centres is None or floors is None:
        raise InputError("Expected a split of clusters, but got one of classes, which needs targets.")
    added = source_contributions(layer, inputs, weight.to(inputs), channel)
    borders = reads_padding(layer, inputs)
    similarities = outputs.new_full((len(outputs), len(floors)), -torch.inf)
    for number, (sign, floor) in enumerate(zip(split.signs(), floors, strict=True)):
        signed = (sign * (outputs - split.zero)).masked_fill(borders, 0)
        vectors = sign * (added * (signed > 0)[..., None]).sum(1).to(outputs)
        likeness = F.normalize(vectors, dim=1) @ centres[number].to(outputs)
        enough = signed.clamp(min=0).sum(1) >= floor
        similarities[:, number] = torch.where(enough, likeness, -torch.inf)
    best = similarities.max(1)
    return torch.where(best.values > -torch.inf, best.indices, -1).cpu()


def _ratio(numerator: Tensor, denominator: Tensor) -> float | None:
    return float(numerator / denominator) if float(denominator) > 0 else None


def _auroc(scores: Tensor, own: Tensor) -> float | None:
    """Share of pairs of an own and another image in which the own one scores higher; equal ones count half."""
    if bool(own.all()) or not bool(own.any()):
        return None
    others, wanted = scores[~own].sort().values, scores[own]
    below = torch.searchsorted(others, wanted) + torch.searchsorted(others, wanted, right=True)
    return float(below.double().mean()) / (2 * len(others))
