"""One layer in figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_polydis.detection import LayerDetection


@dataclass(frozen=True)
class LayerSummary:
    """One layer in figures.

    Attributes:
        name: Name of the layer.
        n_channels: Output channels.
        n_inputs: Input channels that each of them reads.
        n_candidates: Channels that are relevant for at least two classes.
        n_candidate_pairs: Pairs of classes that a channel is relevant for, over all channels.
        n_polysemantic: Channels flagged.
        n_pairs: Pairs flagged.
        mean_cosine: Mean cosine similarity of the candidate pairs; 1 if there are none.
        min_cosine: Lowest of them; 1 if there are none.
        max_cosine: Highest of them; 1 if there are none.
    """

    name: str
    n_channels: int
    n_inputs: int
    n_candidates: int
    n_candidate_pairs: int
    n_polysemantic: int
    n_pairs: int
    mean_cosine: float
    min_cosine: float
    max_cosine: float

    @staticmethod
    def of(detection: LayerDetection, n_channels: int, n_inputs: int) -> LayerSummary:
        """The figures of what was found in a layer of so many channels and inputs."""
        values = detection.similarities
        lowest, mean, highest = (values.min(), values.mean(), values.max()) if len(values) else (1, 1, 1)
        return LayerSummary(
            detection.layer,
            n_channels,
            n_inputs,
            detection.n_candidates,
            len(values),
            len(detection.channels),
            len(detection.pairs),
            float(mean),
            float(lowest),
            float(highest),
        )
