"""What the reports show of a channel and of a layer, in plain types: cards and overviews."""

from __future__ import annotations

import base64
import io
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

JPEG_QUALITY = 85


@dataclass(frozen=True, eq=False)
class CardImage:
    """One of the images that activate a channel most.

    Attributes:
        pixels: The part of the image in which the channel is active, ``[3, h, w]``, ``uint8``.
        target: Its class.
        activation: Of the channel in whose row it stands: position sum of the positive part in the row's direction.
    """

    pixels: Tensor
    target: int
    activation: float

    def jpeg(self) -> bytes:
        """The pixels as a JPEG file."""
        stream = io.BytesIO()
        Image.fromarray(self.pixels.permute(1, 2, 0).numpy()).save(stream, "JPEG", quality=JPEG_QUALITY)
        return stream.getvalue()

    def to_json(self) -> dict[str, Any]:
        """In plain types."""
        return {
            "jpeg": base64.b64encode(self.jpeg()).decode(),
            "target": self.target,
            "activation": self.activation,
        }

    @staticmethod
    def from_json(content: dict[str, Any]) -> CardImage:
        """The image that `to_json` described, as well as JPEG keeps it."""
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(content["jpeg"]))).convert("RGB"))
        return CardImage(torch.from_numpy(pixels).permute(2, 0, 1), content["target"], content["activation"])


@dataclass(frozen=True, eq=False)
class CardRow:
    """One channel of a card: the original, or a concept channel.

    Attributes:
        classes: The concept's classes; empty for the original.
        images: Images that activate it most, strongest first; empty where the data holds no images.
        activations: For each concept of the card some activations of this row's channel on images of its classes.
    """

    classes: list[int]
    images: list[CardImage]
    activations: list[list[float]]

    def to_json(self) -> dict[str, Any]:
        """In plain types."""
        return {
            "classes": self.classes,
            "images": [image.to_json() for image in self.images],
            "activations": self.activations,
        }

    @staticmethod
    def from_json(content: dict[str, Any]) -> CardRow:
        """The row that `to_json` described."""
        images = [CardImage.from_json(image) for image in content["images"]]
        return CardRow(content["classes"], images, content["activations"])


@dataclass(frozen=True)
class SourceShare:
    """An input channel that a concept reads.

    Attributes:
        source: Index of the input channel.
        strength: Mean over the concept's images of what it adds to the concept channel in the concept's direction,
            summed over positions.
        membership: Share of it that belongs to the concept, in [0, 1].
    """

    source: int
    strength: float
    membership: float


@dataclass(frozen=True, eq=False)
class ChannelCard:
    """A polysemantic channel before and after its split.

    Attributes:
        layer: Name of the layer.
        channel: Index of the output channel.
        concepts: Classes of each of the ``K`` concepts.
        cosine_similarity: Lowest similarity of two classes of different concepts.
        interval: 95 % interval of that similarity, or `None`.
        threshold: The similarity threshold of this channel.
        reliability: How well the relevance vectors are known, 0 to 1, or `None`.
        rows: The original, then each concept, ``K + 1``.
        sources: For each concept the sources that add most to it, strongest first.
        class_similarities: Similarity of each two of the classes that the channel is relevant for, in the order of
            ``classes``.
        classes: These classes, concept after concept.
    """

    layer: str
    channel: int
    concepts: list[list[int]]
    cosine_similarity: float
    interval: tuple[float, float] | None
    threshold: float
    reliability: float | None
    rows: list[CardRow]
    sources: list[list[SourceShare]]
    classes: list[int]
    class_similarities: list[list[float]]

    def to_json(self) -> dict[str, Any]:
        """In plain types."""
        plain = {name: value for name, value in vars(self).items() if name not in ("rows", "sources")}
        return {
            **plain,
            "interval": None if self.interval is None else list(self.interval),
            "rows": [row.to_json() for row in self.rows],
            "sources": [[asdict(source) for source in sources] for sources in self.sources],
        }

    @staticmethod
    def from_json(content: dict[str, Any]) -> ChannelCard:
        """The card that `to_json` described."""
        interval = content["interval"]
        read = {
            "interval": None if interval is None else (interval[0], interval[1]),
            "rows": [CardRow.from_json(row) for row in content["rows"]],
            "sources": [[SourceShare(**source) for source in sources] for sources in content["sources"]],
        }
        return ChannelCard(**{**content, **read})


@dataclass(frozen=True)
class NearMiss:
    """A candidate that was not flagged.

    Attributes:
        channel: Index of the channel.
        class_a: One of the two least similar classes.
        class_b: The other.
        cosine_similarity: Of these.
        threshold: What it would have to fall below.
    """

    channel: int
    class_a: int
    class_b: int
    cosine_similarity: float
    threshold: float


@dataclass(frozen=True)
class LayerOverview:
    """One layer at a glance.

    Attributes:
        layer: Name of the layer.
        edges: Edges of the bins of the histograms of similarities, one more than bins.
        n_candidate_pairs: Candidate pairs in each bin.
        n_flagged_pairs: Flagged pairs in each bin.
        thresholds: Lowest and highest similarity threshold of the layer's candidate channels.
        channels: Channels of the relevance matrix: those flagged, lowest similarity first, then other candidates.
        classes: Classes of the relevance matrix: those that these channels are relevant for.
        relevance: For how large a part of a class's images each channel is relevant, a row for each channel.
        near_misses: Candidates that come nearest to being flagged, nearest first.
    """

    layer: str
    edges: list[float]
    n_candidate_pairs: list[int]
    n_flagged_pairs: list[int]
    thresholds: tuple[float, float]
    channels: list[int]
    classes: list[int]
    relevance: list[list[float]]
    near_misses: list[NearMiss]

    def to_json(self) -> dict[str, Any]:
        """In plain types."""
        return {**asdict(self), "thresholds": list(self.thresholds)}

    @staticmethod
    def from_json(content: dict[str, Any]) -> LayerOverview:
        """The overview that `to_json` described."""
        low, high = content["thresholds"]
        near = [NearMiss(**miss) for miss in content["near_misses"]]
        return LayerOverview(**{**content, "thresholds": (low, high), "near_misses": near})


@dataclass(frozen=True)
class EpochEntry:
    """One layer in one analysed epoch of a run.

    Attributes:
        epoch: Number of the epoch.
        step: Global step.
        layer: Name of the layer.
        n_polysemantic: Channels flagged.
        mean_cosine: Mean similarity of the candidate pairs.
        channels: Similarity of each flagged channel, by channel.
    """

    epoch: int
    step: int
    layer: str
    n_polysemantic: int
    mean_cosine: float
    channels: dict[int, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """In plain types."""
        return asdict(self)

    @staticmethod
    def from_json(content: dict[str, Any]) -> EpochEntry:
        """The entry that `to_json` described; keys of JSON are texts."""
        return EpochEntry(**{**content, "channels": {int(key): value for key, value in content["channels"].items()}})
