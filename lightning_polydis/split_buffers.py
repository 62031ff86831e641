"""Splits as tensors of a split layer's state, and back."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lightning_polydis.plan import ChannelSplit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


def structure_of(splits: Sequence[ChannelSplit], device: torch.device) -> dict[str, Tensor]:
    """What must be neither averaged nor rounded: which channels are split, into which concepts, and what bounds them.

    Args:
        splits: Of one layer.
        device: That of the layer.
    """
    rows = [(row, label) for row, concept in enumerate(c for s in splits for c in s.concepts) for label in concept]
    signs = [sign for split in splits for sign in split.directions or [0] * len(split.concepts)]
    structure = {
        "channels": _integers([split.channel for split in splits], device),
        "n_concepts": _integers([len(split.concepts) for split in splits], device),
        "concept_classes": _integers(rows, device).view(-1, 2),
        "concept_directions": _integers(signs, device),
    }
    if _has_centres(splits):
        floors = [floor for split in splits for floor in split.floors or [math.nan] * len(split.concepts)]
        structure["concept_floors"] = _bits(floors, device)
        structure["channel_zeros"] = _bits([split.zero for split in splits], device)
    return structure


def buffers_of(splits: Sequence[ChannelSplit], n_inputs: int, device: torch.device) -> dict[str, Tensor]:
    """Memberships, ratios and, if there are clusters, what tells them apart; NaN where a split has no such.

    Args:
        splits: Of one layer.
        n_inputs: Input channels that each of its channels reads.
        device: That of the layer.
    """
    ratios = [math.nan if split.rho is None else split.rho for split in splits]
    memberships = [split.membership for split in splits] or [torch.empty(0, n_inputs)]
    buffers = {
        "rho": torch.tensor(ratios, dtype=torch.float32, device=device),
        "membership": torch.cat(memberships).to(device),
    }
    if _has_centres(splits):
        unknown = [torch.full_like(split.membership, torch.nan) for split in splits]
        centres = [own if split.centres is None else split.centres for split, own in zip(splits, unknown, strict=True)]
        buffers["concept_centres"] = torch.cat(centres).to(device)
    return buffers


def stored_splits(buffers: Mapping[str, Tensor], layer_name: str) -> list[ChannelSplit]:
    """The splits that the entries of a split layer in a state dict describe."""
    counts = buffers["n_concepts"].tolist()
    concepts: list[list[int]] = [[] for _ in range(sum(counts))]
    for row, label in buffers["concept_classes"].tolist():
        concepts[row].append(label)
    memberships = buffers["membership"].float().cpu().split(counts)
    directions: list[int] = buffers["concept_directions"].tolist()
    centres = buffers.get("concept_centres")
    floors, zeros = (_numbers(buffers.get(name)) for name in ("concept_floors", "channel_zeros"))
    splits: list[ChannelSplit] = []
    first = 0
    for channel, membership, rho in zip(
        buffers["channels"].tolist(), memberships, buffers["rho"].tolist(), strict=True
    ):
        last = first + len(membership)
        ratio = None if math.isnan(rho) else round(rho, 6)  # NaN marks a split without a ratio, 0 one without a sign
        signs = directions[first:last] if all(directions[first:last]) else None
        split = ChannelSplit(layer_name, channel, concepts[first:last], membership, ratio, signs)
        if centres is not None and floors and zeros and not math.isnan(floors[first]):
            own = centres[first:last].float().cpu()
            split = replace(split, centres=own, floors=floors[first:last], zero=zeros[len(splits)])
        splits.append(split)
        first = last
    return splits


def _has_centres(splits: Sequence[ChannelSplit]) -> bool:
    return any(split.centres is not None for split in splits)


def _integers(values: Sequence[Any], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)


def _bits(values: Sequence[float], device: torch.device) -> Tensor:
    """Numbers as their bits, which stay what they are in a layer of half precision, whose largest one is too small."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(torch.int32)


def _numbers(bits: Tensor | None) -> list[float] | None:
    """What `_bits` has made, to nine digits."""
    return None if bits is None else [float(f"{value:.9g}") for value in bits.cpu().view(torch.float32).tolist()]
