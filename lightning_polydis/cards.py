"""What the reports show of a channel and of a layer, in plain types: cards and overviews."""

from __future__ import annotations

import base64
import io
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_polydis._text import counted

if TYPE_CHECKING:
    from collections.abc import Callable

JPEG_QUALITY = 85
MAX_EPOCHS, MAX_TRACKED = 200, 50


@dataclass(frozen=True, eq=False)
class CardImage:
    """One of the images that activate a channel most.

    Attributes:
        content: The part of the image in which the channel is active, ``[3, h, w]``, ``uint8``, or a JPEG file of it.
        target: Its class, or with ``concepts="clusters"`` its cluster, -1 if it is in none.
        activation: Of the channel in whose row it stands: position sum of the positive part in the row's direction.
        label: Its class with ``concepts="clusters"``, where it is known; else `None`.

    Example:
        >>> saved = CardImage(torch.zeros(3, 8, 8, dtype=torch.uint8), target=0, activation=2.0).to_json()
        >>> loaded = CardImage.from_json(saved)
        >>> loaded.pixels.shape, loaded.to_json() == saved
        (torch.Size([3, 8, 8]), True)
    """

    content: Tensor | bytes
    target: int
    activation: float
    label: int | None = None

    @cached_property
    def pixels(self) -> Tensor | None:
        """The picture, ``[3, h, w]``, ``uint8``; `None` if it comes from a file and is damaged."""
        if isinstance(self.content, Tensor):
            return self.content
        try:
            with Image.open(io.BytesIO(self.content), formats=["JPEG"]) as picture:
                pixels = np.array(picture.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def jpeg(self) -> bytes:
        """The picture as a JPEG file; one that came from a file is that file."""
        if isinstance(self.content, bytes):
            return self.content
        stream = io.BytesIO()
        Image.fromarray(self.content.permute(1, 2, 0).numpy()).save(stream, "JPEG", quality=JPEG_QUALITY)
        return stream.getvalue()

    def to_json(self) -> dict[str, Any]:
        """In plain types."""
        return {
            "jpeg": base64.b64encode(self.jpeg()).decode(),
            "target": self.target,
            "activation": self.activation,
            "label": self.label,
        }

    @staticmethod
    def from_json(content: dict[str, Any]) -> CardImage:
        """The image that `to_json` described, as well as JPEG keeps it; decoded when its `pixels` are asked for."""
        pixels = base64.b64decode(content["jpeg"])
        return CardImage(pixels, content["target"], content["activation"], content.get("label"))


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
        concepts: Classes of each of the ``K`` concepts that the card shows.
        cosine_similarity: Similarity of the flagged pair of classes with the lowest one. That of a pair that was not
            flagged, and with it the channel's, may be lower still.
        interval: 95 % interval of that pair's similarity, or `None`.
        threshold: The similarity threshold of this channel.
        reliability: How well the relevance vectors are known, 0 to 1, or `None`.
        rows: The original, then each concept, ``K + 1``.
        sources: For each concept the sources that add most to it, strongest first.
        classes: Classes that the channel is relevant for and the card shows, concept after concept.
        class_similarities: Similarity of each two of these classes, flagged as a pair or not, in their order.
        n_concepts: How many concepts there are; `None`: the card shows all.
        n_classes: How many classes the channel is relevant for; `None`: the card shows all.
        names: With ``concepts="clusters"``, where ``classes`` are numbers of clusters, the name of each concept that
            the card shows; else `None`.
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
    n_concepts: int | None = None
    n_classes: int | None = None
    names: list[str] | None = None

    @property
    def has_clusters(self) -> bool:
        """Whether ``classes`` are numbers of clusters."""
        return self.names is not None

    @property
    def real_classes(self) -> list[int]:
        """The classes that the card speaks of: ``classes``, or where these are clusters those of the images."""
        if not self.has_clusters:
            return self.classes
        return [image.label for row in self.rows for image in row.images if image.label is not None]

    def label(self, index: int, class_name: Callable[[int], str]) -> str:
        """What one of ``classes`` is called.

        Args:
            index: Of a class, or the number of a cluster.
            class_name: Name of a class; not asked about clusters. A cluster that is a concept of its own has the
                concept's name, others have numbers.
        """
        if self.names is None:
            return class_name(index)
        own = [name for name, concept in zip(self.names, self.concepts, strict=True) if concept == [index]]
        return " ".join(own[0].split()) if own else cluster_label(index)

    def shown_classes(self) -> list[int]:
        """How many of ``classes`` belong to each of the concepts."""
        return [sum(label in own for label in self.classes) for own in map(frozenset, self.concepts)]

    def beyond(self, n_concepts: int, n_classes: int) -> str:
        """What the channel has beyond so many concepts and classes, in words.

        Args:
            n_concepts: Concepts that are shown.
            n_classes: Classes that are shown.

        Returns:
            For instance ``"+3 more concepts, 40 more classes"`` (or clusters); empty if all are shown.
        """
        concepts = (self.n_concepts or len(self.concepts)) - n_concepts
        classes = (self.n_classes or len(self.classes)) - n_classes
        counts = {"more concept": concepts, "more cluster" if self.has_clusters else "more class": classes}
        text = ", ".join(counted(count, noun) for noun, count in counts.items() if count > 0)
        return text and f"+{text}"

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


def cluster_label(number: int) -> str:
    """What a cluster without a name is called; people count from 1.

    Example:
        >>> cluster_label(0)
        'cluster 1'
    """
    return f"cluster {number + 1}"


@dataclass(frozen=True)
class NearMiss:
    """A candidate that was not flagged.

    Attributes:
        channel: Index of the channel.
        class_a: One of the two least similar classes.
        class_b: The other.
        cosine_similarity: Of these, as measured.
        compared: What is compared with the threshold: the same, or with ``"auto"`` the similarity without the noise of
            averaging over a limited number of images.
        threshold: What that would have to fall below.
    """

    channel: int
    class_a: int
    class_b: int
    cosine_similarity: float
    compared: float
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
        has_clusters: Whether ``concepts="clusters"``. Then the pairs above are pairs of clusters, and so are those of
            near misses; ``classes`` are the classes of the channels' strongest images (none where they are not known),
            and ``relevance`` is the share of a channel's strongest images that is of each class.
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
    has_clusters: bool = False

    def to_json(self) -> dict[str, Any]:
        """In plain types."""
        return {**asdict(self), "thresholds": list(self.thresholds)}

    @staticmethod
    def from_json(content: dict[str, Any]) -> LayerOverview:
        """The overview that `to_json` described."""
        low, high = content["thresholds"]
        # Older files hold one similarity of a near miss, the one that was compared.
        near = [NearMiss(**{"compared": miss["cosine_similarity"], **miss}) for miss in content["near_misses"]]
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
        channels: Similarity of flagged channels, by channel: of the 50 with the lowest.
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


def thinned(history: list[EpochEntry]) -> list[EpochEntry]:
    """A history of at most 200 epochs: beyond, every other one is left out, so that its ends stay.

    Example:
        >>> long = [EpochEntry(epoch, epoch, "conv", 0, 1.0) for epoch in range(1001)]
        >>> short = thinned(long)
        >>> len(short), short[0].epoch, short[-1].epoch
        (126, 0, 1000)
    """
    steps = sorted({entry.step for entry in history})
    while len(steps) > MAX_EPOCHS:
        steps = sorted({*steps[::2], steps[-1]})
    kept = set(steps)
    return [entry for entry in history if entry.step in kept]
