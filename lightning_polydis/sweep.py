"""What other settings would have found, from one pass: numbers of candidates and flags over a grid."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_polydis._text import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lightning_polydis.planning import LayerEvidence

CLASS_FRACTIONS = (0.25, 0.5, 0.75, 0.9)
SIMILARITY_THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
ENOUGH_CHANNELS = 0.05
ENOUGH_AT_LEAST = 3


@dataclass(frozen=True)
class LayerSweep:
    """Numbers of candidates and flags of one layer over a grid of settings.

    Attributes:
        layer: Name of the layer.
        n_channels: Its output channels.
        relevance_thresholds: ``R`` of them, ascending.
        class_fractions: ``F`` of them, ascending.
        similarity_thresholds: ``S`` of them, numbers ascending, ``"auto"`` last where it was in force.
        n_candidates: Channels relevant for at least two classes, ``[R][F]``.
        n_candidate_pairs: Pairs of classes that a channel is relevant for, over all channels, ``[R][F]``.
        n_polysemantic: Channels flagged, ``[R][F][S]``.
        n_pairs: Pairs flagged, ``[R][F][S]``.
    """

    layer: str
    n_channels: int
    relevance_thresholds: list[float]
    class_fractions: list[float]
    similarity_thresholds: list[float | str]
    n_candidates: list[list[int]]
    n_candidate_pairs: list[list[int]]
    n_polysemantic: list[list[list[int]]]
    n_pairs: list[list[list[int]]]

    def to_json(self) -> dict[str, Any]:
        """The sweep in plain types."""
        return asdict(self)


@dataclass(frozen=True)
class SuggestedSettings:
    """Settings to run the analysis with, and why; as text the settings come first.

    Attributes:
        relevance_threshold: See `AnalysisSettings`.
        class_fraction: See `AnalysisSettings`.
        similarity_threshold: See `AnalysisSettings`.
        method: That of the analysis.
        reason: In words.

    Example:
        >>> print(SuggestedSettings(0.03, 0.4, "auto", "optimized", "The strictest settings that leave enough."))
        relevance_threshold=0.03, class_fraction=0.4, similarity_threshold='auto', method='optimized'
        The strictest settings that leave enough.
    """

    relevance_threshold: float
    class_fraction: float
    similarity_threshold: float | str
    method: str
    reason: str

    def __str__(self) -> str:
        return f"{self.call()}\n{self.reason}"

    def call(self) -> str:
        """The settings as they are written in a call."""
        return ", ".join(f"{name}={value!r}" for name, value in self.arguments().items())

    def arguments(self) -> dict[str, float | str]:
        """The settings as keyword arguments."""
        arguments = asdict(self)
        del arguments["reason"]
        return arguments


def sweep_layer(evidence: LayerEvidence) -> LayerSweep:
    """Count candidates and flags over the grid.

    With ``method="optimized"`` vectors exist for entries that are relevant at the lowest threshold; entries that were
    given up for lack of memory are missing.
    """
    settings, thresholds = evidence.settings, evidence.statistics.thresholds
    order = np.argsort(thresholds)
    fractions = sorted({*CLASS_FRACTIONS, float(settings.class_fraction)})
    similarities: list[float | str] = list(SIMILARITY_THRESHOLDS)
    if settings.threshold == "auto":
        similarities.append("auto")
    elif settings.threshold not in similarities:
        similarities = sorted([*SIMILARITY_THRESHOLDS, float(settings.threshold)])
    relevant = [[evidence.relevant(fraction, int(place)) for fraction in fractions] for place in order]
    candidates, flags = _counted(evidence, [mask for row in relevant for mask in row], similarities)
    shape = (len(order), len(fractions))
    return LayerSweep(
        evidence.name,
        evidence.statistics.counts.shape[2],
        [float(thresholds[place]) for place in order],
        fractions,
        similarities,
        candidates[:, 0].reshape(shape).tolist(),
        candidates[:, 1].reshape(shape).tolist(),
        flags[:, 0].reshape(*shape, -1).tolist(),
        flags[:, 1].reshape(*shape, -1).tolist(),
    )


def _counted(
    evidence: LayerEvidence, relevant: Sequence[Tensor], similarities: Sequence[float | str]
) -> tuple[np.ndarray, np.ndarray]:
    """Channels and pairs: candidates ``[cells, 2]`` and flagged ``[cells, 2, S]``, for cells of the grid."""
    anywhere = np.stack([mask.numpy() for mask in relevant])  # [cells, K, C]
    loosest = np.asarray(anywhere.any(0))
    rule, total = evidence.rule, loosest.sum(0)
    candidates = np.zeros((len(relevant), 2), dtype=int)
    flags = np.zeros((len(relevant), 2, len(similarities)), dtype=int)
    for channel in np.flatnonzero(total >= 2).tolist():
        classes = np.flatnonzero(loosest[:, channel]).tolist()
        own = anywhere[:, classes, channel].astype(np.float32)  # [cells, T]
        found = evidence.similarities(channel, classes)
        compared, threshold = rule.compared(found), rule.threshold(channel)
        low = [compared < threshold if isinstance(value, str) else found.cosine < value for value in similarities]
        # Pairs are counted by products of matrices, as a channel may have hundreds of classes: [S, cells, T].
        partners = own @ np.triu(np.stack(low), k=1).astype(np.float32)
        n_flagged = (partners * own).sum(2).T.round().astype(int)  # [cells, S]
        n_own = own.sum(1).astype(int)
        n_pairs = n_own * (n_own - 1) // 2
        candidates += np.stack([n_pairs > 0, n_pairs], axis=1)
        flags += np.stack([n_flagged > 0, n_flagged], axis=1)
    return candidates, flags


def suggest_settings(sweeps: Sequence[LayerSweep], current: dict[str, Any]) -> SuggestedSettings:
    """The strictest settings of the grid that leave something to look at.

    Enough to look at are at least 3 candidate channels, and 5 % of all channels, with a flag among them. Settings that
    are in force and leave enough are kept.

    Args:
        sweeps: Of all layers.
        current: The settings in force, as in `PolysemanticityReport.settings`.
    """
    first = sweeps[0]
    n_channels = sum(sweep.n_channels for sweep in sweeps)
    enough = max(ENOUGH_AT_LEAST, ENOUGH_CHANNELS * n_channels)
    candidates, pairs, flagged = (
        np.sum([getattr(sweep, name) for sweep in sweeps], axis=0)
        for name in ("n_candidates", "n_candidate_pairs", "n_polysemantic")
    )
    at = (
        first.relevance_thresholds.index(current["relevance_threshold"]),
        first.class_fractions.index(current["class_fraction"]),
    )
    in_force = first.similarity_thresholds.index(current["similarity_threshold"])
    for level in [in_force, *range(in_force + 1, len(first.similarity_thresholds))]:
        good = (candidates >= enough) & (flagged[..., level] > 0)
        if good[at] or good.any():
            best = at if good[at] else min(zip(*good.nonzero(), strict=True), key=lambda cell: pairs[cell])
            cell = (int(best[0]), int(best[1]), level)
            return _suggestion(first, current["method"], cell, candidates, flagged, n_channels, at)
    is_auto = current["similarity_threshold"] == "auto"
    reason = (
        f"Nothing better on the grid: no setting{' with `auto`' * is_auto} leaves {enough:.0f} candidate channels and "
        "a flag among them. On these classes the layer looks monosemantic, or too few of its channels matter; try "
        "another layer."
    )
    if is_auto and (flagged > 0).any():
        reason += " Fixed similarity thresholds would flag channels, but their classes differ no more than any do."
    return SuggestedSettings(
        current["relevance_threshold"],
        current["class_fraction"],
        current["similarity_threshold"],
        current["method"],
        reason,
    )


def _suggestion(
    grid: LayerSweep,
    method: str,
    cell: tuple[int, int, int],
    candidates: np.ndarray,
    flagged: np.ndarray,
    n_channels: int,
    at: tuple[int, int],
) -> SuggestedSettings:
    place = cell[:2]
    verb = "is a candidate" if candidates[place] == 1 else "are candidates"
    numbers = f"{candidates[place]} of {counted(n_channels, 'channel')} {verb}, {flagged[cell]} of them flagged"
    if place == at:
        reason = f"With the settings in force {numbers}: enough to look at."
    else:
        reason = f"The strictest settings that leave enough to look at: {numbers}. With those in force it is "
        reason += f"{candidates[at]} and {flagged[(*at, cell[2])]}."
    return SuggestedSettings(
        grid.relevance_thresholds[cell[0]],
        grid.class_fractions[cell[1]],
        grid.similarity_thresholds[cell[2]],
        method,
        reason,
    )


def sweep_table(sweep: LayerSweep) -> tuple[list[str], list[list[float]]]:
    """The grid as columns and rows: one for each relevance threshold and class fraction, and the channels flagged."""
    header = ["relevance threshold", "class fraction", "candidates", "candidate pairs"]
    header += [
        f"flagged at {value if isinstance(value, str) else f'{value:g}'}" for value in sweep.similarity_thresholds
    ]
    rows: list[list[float]] = []
    for place, threshold in enumerate(sweep.relevance_thresholds):
        for part, fraction in enumerate(sweep.class_fractions):
            counts = [sweep.n_candidates[place][part], sweep.n_candidate_pairs[place][part]]
            rows.append([threshold, fraction, *counts, *sweep.n_polysemantic[place][part]])
    return header, rows


def sweep_markdown(sweep: LayerSweep) -> str:
    """`sweep_table` as markdown."""
    header, rows = sweep_table(sweep)
    lines = [header, ["---:"] * len(header)]
    lines += [[str(cell) if isinstance(cell, int) else f"{cell:g}" for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
