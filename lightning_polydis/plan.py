"""Which channels to split, and how: plain data that can be saved."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_polydis._checks import InputError
from lightning_polydis._files import parse, read_json, write_json
from lightning_polydis._text import counted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

FINGERPRINT = 8
"""Weights of a channel that a split remembers."""

ROUNDING = 2**-7
"""Relative change of a weight that casts to half precision explain: ``bfloat16`` rounds by half as much at most."""


@dataclass(frozen=True, eq=False)
class ChannelSplit:
    """How one channel is split.

    Attributes:
        layer: Name of the layer.
        channel: Index of the output channel.
        concepts: Classes of each concept, at least two concepts.
        membership: Share of each source (input channel) that each concept keeps, ``[K, I]``, ``float32``.
        rho: The dominance ratio that was chosen, in (0, 1]; `None` unless ``method="paper"``.
        directions: For each concept 1 or -1: whether its classes use the channel through positive or negative values.
            `None`: all through positive ones.
        centres: Where concepts are clusters, what tells them apart: the mean relevance of the sources for the channel
            on the images of each, scaled to unit length, ``[K, I]``, ``float32``. ``concepts`` then holds numbers of
            clusters. `None` where concepts are groups of classes.
        floors: With ``centres``, the activation from which on an image belongs to a concept at all, ``K`` numbers.
        zero: With ``centres``, the output above which the channel is on; not 0 where a batch norm shifts the output
            before it is rectified.
        fingerprint: Some of the weights of the channel for which the split was chosen (see `fingerprints`), by which a
            plan for other weights is noticed; no part of what makes two splits equal. `None`: not known.

    Raises:
        ValueError: If there are fewer than two concepts or the membership, directions or centres do not fit them.
    """

    layer: str
    channel: int
    concepts: list[list[int]]
    membership: Tensor
    rho: float | None = None
    directions: list[int] | None = None
    centres: Tensor | None = None
    floors: list[float] | None = None
    zero: float = 0.0
    fingerprint: list[float] | None = None

    def __post_init__(self) -> None:
        if len(self.concepts) < 2:
            raise InputError(f"Expected a split to have at least two concepts, but got {self.concepts!r}.")
        labels = [label for concept in self.concepts for label in concept]
        if not all(self.concepts) or len(set(labels)) < len(labels):
            raise InputError(
                f"Expected concepts of at least one class each and no class in two of them, but got {self.concepts!r}."
            )
        if self.membership.ndim != 2 or len(self.membership) != len(self.concepts):
            raise InputError(
                f"Expected `membership` to have shape [{len(self.concepts)}, inputs], one row for each concept, "
                f"but got {list(self.membership.shape)}."
            )
        if not bool(torch.isfinite(self.membership).all()):
            raise InputError("Expected `membership` to be finite, but got NaN or infinity.")
        if self.directions is not None and (
            len(self.directions) != len(self.concepts) or not set(self.directions) <= {1, -1}
        ):
            raise InputError(
                f"Expected `directions` to hold 1 or -1 for each of {len(self.concepts)} concepts, "
                f"but got {self.directions!r}."
            )
        self._check_centres()

    def _check_centres(self) -> None:
        if self.centres is None and self.floors is None:
            return
        if self.centres is None or self.floors is None or len(self.floors) != len(self.concepts):
            raise InputError(
                f"Expected `centres`, and with them `floors` for {len(self.concepts)} concepts, or neither."
            )
        if self.centres.shape != self.membership.shape or not bool(torch.isfinite(self.centres).all()):
            raise InputError(
                f"Expected `centres` to be finite and as large as `membership`, {list(self.membership.shape)}, but got "
                f"{list(self.centres.shape)}."
            )

    def __repr__(self) -> str:
        name = "clusters" if self.centres is not None else "concepts"
        return f"ChannelSplit({self.layer!r}, channel {self.channel}, {name} {self.concepts})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChannelSplit) and (
            self.to_json() | {"fingerprint": None} == other.to_json() | {"fingerprint": None}
        )

    __hash__ = None  # type: ignore[assignment]  # holds a tensor

    def to_json(self) -> dict[str, Any]:
        """The split in plain types."""
        values = self.membership.tolist()
        if bool(((self.membership == 0) | (self.membership == 1)).all()):
            values = self.membership.int().tolist()
        return {
            "layer": self.layer,
            "channel": self.channel,
            "concepts": self.concepts,
            "membership": values,
            "rho": self.rho,
            "directions": self.directions,
            "centres": None if self.centres is None else self.centres.tolist(),
            "floors": self.floors,
            "zero": self.zero,
            "fingerprint": self.fingerprint,
        }

    def signs(self) -> list[int]:
        """The directions, one for each concept."""
        return [1] * len(self.concepts) if self.directions is None else self.directions

    @staticmethod
    def from_json(content: dict[str, Any]) -> ChannelSplit:
        """The split that `to_json` described."""
        return ChannelSplit(
            str(content["layer"]),
            int(content["channel"]),
            [[int(index) for index in concept] for concept in content["concepts"]],
            torch.tensor(content["membership"], dtype=torch.float32),
            content["rho"],
            content.get("directions"),
            None if content.get("centres") is None else torch.tensor(content["centres"], dtype=torch.float32),
            content.get("floors"),
            content.get("zero", 0.0),
            None if content.get("fingerprint") is None else [float(value) for value in content["fingerprint"]],
        )


@dataclass(frozen=True)
class SplitPlan:
    """The splits of a network's channels.

    Attributes:
        splits: One for each channel to split.

    Example:
        >>> import torch
        >>> split = ChannelSplit("features.3", 7, [[0], [4, 5]], torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> SplitPlan([split]).layers
        ['features.3']
    """

    splits: list[ChannelSplit]

    def __repr__(self) -> str:
        counts = [f"{len(self.of_layer(name))} of {name!r}" for name in self.layers]
        return f"SplitPlan(channels to split: {', '.join(counts) or 'none'})"

    def __len__(self) -> int:
        return len(self.splits)

    def __iter__(self) -> Iterator[ChannelSplit]:
        return iter(self.splits)

    @property
    def layers(self) -> list[str]:
        """Names of the layers that have splits, in order of appearance."""
        return list(dict.fromkeys(split.layer for split in self.splits))

    def of_layer(self, layer: str) -> list[ChannelSplit]:
        """The splits of one layer."""
        return [split for split in self.splits if split.layer == layer]

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; the file appears whole or not at all."""
        write_json(path, "split_plan", self.to_json())

    @staticmethod
    def load(path: str | Path) -> SplitPlan:
        """Read a plan that `save` wrote.

        Raises:
            ValueError: If the file is damaged, of another kind, or of a newer format.
        """
        plan: SplitPlan = parse(path, SplitPlan.from_json, read_json(path, "split_plan"))
        return plan

    def to_json(self) -> dict[str, Any]:
        """The plan in plain types."""
        return {"splits": [split.to_json() for split in self.splits]}

    @staticmethod
    def from_json(content: dict[str, Any]) -> SplitPlan:
        """The plan that `to_json` described."""
        return SplitPlan([ChannelSplit.from_json(split) for split in content["splits"]])


def of_one_kind(plan: SplitPlan, *, of_clusters: bool) -> SplitPlan:
    """The plan, or of one that splits some channels by classes and some by clusters those of one kind."""
    own = [split for split in plan if (split.centres is not None) == of_clusters]
    return SplitPlan(own) if own else plan


def checked_plan(plan: Any) -> SplitPlan:
    """Raise `ValueError` unless this is a plan, and say where one is."""
    if isinstance(plan, SplitPlan):
        return plan
    hint = "`SplitPlan.load(path)` reads one" if isinstance(plan, str | PathLike) else "A report has one as `.plan`"
    raise InputError(f"Expected argument `plan` to be a `SplitPlan`, but got `{type(plan).__name__}`. {hint}.")


def check_fits(splits: Sequence[ChannelSplit], n_channels: int, n_inputs: int) -> None:
    """Raise `ValueError` unless the splits, all of one layer, fit a layer with so many channels and inputs."""
    seen: set[int] = set()
    for split in splits:
        where = f"The plan does not fit layer `{split.layer}`:"
        if not 0 <= split.channel < n_channels:
            raise InputError(f"{where} expected a channel in [0, {n_channels}), but got {split.channel}.")
        if split.membership.shape[1] != n_inputs:
            raise InputError(
                f"{where} expected memberships of {n_inputs} inputs, but channel {split.channel} has "
                f"{split.membership.shape[1]}."
            )
        if split.channel in seen:
            raise InputError(
                f"{where} channel {split.channel} is split twice. Keep one of the two splits, or merge their concepts."
            )
        seen.add(split.channel)


def fingerprints(weight: Tensor, channels: Sequence[int]) -> list[list[float]]:
    """A few weights of each of some channels, evenly spread: single ones show a change that sums would average out.

    Args:
        weight: Of a layer, ``[C, I, ...]``.
        channels: Which channels.

    Returns:
        At most `FINGERPRINT` weights of each of those channels.

    Example:
        >>> fingerprints(torch.arange(20.0).view(2, 10), [1])
        [[10.0, 11.0, 12.0, 13.0, 15.0, 16.0, 17.0, 19.0]]
    """
    rows = weight.detach()[list(channels)].flatten(1)
    n_weights, n_kept = rows.shape[1], min(rows.shape[1], FINGERPRINT)
    places = [place * (n_weights - 1) // max(n_kept - 1, 1) for place in range(n_kept)]
    found: list[list[float]] = rows[:, places].tolist()
    return found


def warn_of_other_weights(plan: SplitPlan, weights: Mapping[str, Tensor]) -> None:
    """Warn if splits were chosen for other weights than a cast to half precision leaves of these.

    Args:
        plan: The splits, which fit.
        weights: Weight of each of its layers.
    """
    counts = {name: _n_chosen_for_others(plan.of_layer(name), weight) for name, weight in weights.items()}
    found = [f"{counted(count, 'channel')} of layer `{name}`" for name, count in counts.items() if count]
    if found:
        rank_zero_warn(
            f"Expected the weights that the plan was chosen for, but got others in {', '.join(found)}. The network's "
            "output stays what it is, but the parts may not be the plan's concepts. Analyse this network and take the "
            "plan of that report, or see with `evaluate_splits` what this plan is worth here."
        )


def _n_chosen_for_others(splits: Sequence[ChannelSplit], weight: Tensor) -> int:
    known = [(split.channel, split.fingerprint) for split in splits if split.fingerprint is not None]
    found = fingerprints(weight, [channel for channel, _ in known])
    return sum(not _is_near(own, wanted) for own, (_, wanted) in zip(found, known, strict=True))


def _is_near(own: Sequence[float], wanted: Sequence[float]) -> bool:
    """Whether two fingerprints are of one channel; the smallest numbers of ``float16`` are 6e-8 apart."""
    return len(own) == len(wanted) and all(
        math.isclose(one, other, rel_tol=ROUNDING, abs_tol=1e-7) for one, other in zip(own, wanted, strict=True)
    )
