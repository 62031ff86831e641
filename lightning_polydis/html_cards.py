"""Cards of channels as the HTML page shows them: pictures, curves and colours as plain values for its template."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch.nn import functional as F

from lightning_polydis._text import counted
from lightning_polydis.cards import CardImage
from lightning_polydis.figures.canvas import CONCEPT_COLOURS, OTHER_COLOUR, density_of

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from lightning_polydis.cards import CardRow, ChannelCard

DARK, LIGHT = "#000000", "#ffffff"
LOW_SIMILARITY = (213, 94, 0)
LARGEST_PICTURE = 144
"""Pixels of a picture's longer side: twice what the page shows, for sharp screens; keeps the file small."""

MAX_CLASSES = 16
"""Classes of a card's table of similarities at most; more do not fit a page."""

WIDTH, HEIGHT, AXIS = 260, 64, 16
"""Size of a density in units of the drawing, and the part below it that the axis takes."""

DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 4", "1 4")


@dataclass(frozen=True)
class Chip:
    """How a concept is marked: a number on a colour, so that neither is needed alone."""

    number: int
    colour: str
    ink: str
    dash: str


@dataclass(frozen=True)
class Picture:
    """One image of a row; ``label`` is its class, where that is known."""

    source: str
    label: int | None
    activation: str
    chip: Chip | None
    frame: str


@dataclass(frozen=True)
class Density:
    """Curves of one row: chip, path of the line and path of the area."""

    curves: list[tuple[Chip, str, str]]
    ticks: list[tuple[float, str]]
    description: str


@dataclass(frozen=True)
class Row:
    """The original, or a concept channel."""

    chip: Chip | None
    classes: list[int]
    pictures: list[Picture]
    density: Density | None


@dataclass(frozen=True)
class Source:
    """A bar of the sources: its length in percent of the longest."""

    source: int
    strength: str
    membership: str
    length: float


@dataclass(frozen=True)
class Cell:
    """One similarity of two classes."""

    text: str
    colour: str
    ink: str
    is_flagged: bool


@dataclass(frozen=True)
class CardView:
    """Everything a card shows that the card itself does not hold in so many words."""

    card: ChannelCard
    rows: list[Row]
    sources: list[tuple[Chip, list[Source]]]
    classes: list[tuple[int, Chip | None]]
    similarities: list[list[Cell]]

    @property
    def n_classes(self) -> int:
        """All classes, or clusters, that the channel is relevant for."""
        return self.card.n_classes or len(self.card.classes)

    @property
    def beyond(self) -> str:
        """What the card leaves out, in words."""
        return self.card.beyond(len(self.card.concepts), len(self.card.classes))


def chip_of(index: int) -> Chip:
    """The mark of a concept; colours come round again after seven, numbers do not.

    Example:
        >>> chip_of(0)
        Chip(number=1, colour='#0072B2', ink='#ffffff', dash='')
    """
    place = index % len(CONCEPT_COLOURS)
    colour = CONCEPT_COLOURS[place]
    return Chip(index + 1, colour, ink_on(_channels(colour)), DASHES[place])


def view_of(card: ChannelCard, flagged: Collection[tuple[int, int]]) -> CardView:
    """A card as the page shows it.

    Args:
        card: The card.
        flagged: The channel's flagged pairs of classes, the smaller class first.
    """
    concept_of = {index: place for place, concept in enumerate(card.concepts) for index in concept}
    top = max((value for row in card.rows for values in row.activations for value in values), default=0.0)
    top = 1.05 * max(top, 1e-12)
    rows = [
        Row(chip_of(place - 1) if place else None, row.classes, _pictures(card, row, concept_of), _density(row, top))
        for place, row in enumerate(card.rows)
    ]
    classes = [
        (index, chip_of(concept_of[index]) if index in concept_of else None) for index in card.classes[:MAX_CLASSES]
    ]
    shown = [index for index, _ in classes]
    cells = [
        [
            _cell(value, (min(row, column), max(row, column)) in flagged)
            for column, value in zip(shown, values, strict=False)
        ]
        for row, values in zip(shown, card.class_similarities, strict=False)
    ]
    return CardView(card, rows, _sources(card), classes, cells)


def quantity(value: float) -> str:
    """An activation in three digits, without powers of ten unless it is tiny.

    Example:
        >>> quantity(1483.2), quantity(0.51372)
        ('1483', '0.514')
    """
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _pictures(card: ChannelCard, row: CardRow, concept_of: dict[int, int]) -> list[Picture]:
    chips = [chip_of(concept_of[image.target]) if image.target in concept_of else None for image in row.images]
    labels = [image.label if card.has_clusters else image.target for image in row.images]
    return [
        Picture(_source(image), label, quantity(image.activation), chip, chip.colour if chip else OTHER_COLOUR)
        for image, label, chip in zip(row.images, labels, chips, strict=True)
    ]


def _source(image: CardImage) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(_reduced(image).jpeg()).decode()}"


def _reduced(image: CardImage) -> CardImage:
    pixels = image.pixels
    if pixels is None:  # damaged; the browser shows the words instead
        return image
    longest = max(pixels.shape[1:])
    if longest <= LARGEST_PICTURE:
        return image
    height, width = (max(1, round(size * LARGEST_PICTURE / longest)) for size in pixels.shape[1:])
    small = F.interpolate(pixels[None].float(), (height, width), mode="bilinear", antialias=True)[0]
    return CardImage(small.round().clamp(0, 255).byte(), image.target, image.activation)


def _density(row: CardRow, top: float) -> Density | None:
    if not any(row.activations):
        return None
    grid = np.linspace(0, top, 90)
    curves = []
    for place, values in enumerate(row.activations):
        if values:
            heights = HEIGHT - AXIS - (HEIGHT - AXIS - 4) * density_of(np.array(values), grid)
            points = [f"{x:.1f} {y:.1f}" for x, y in zip(WIDTH * grid / top, heights, strict=True)]
            line = f"M{' L'.join(points)}"
            curves.append((chip_of(place), line, f"{line} L{WIDTH} {HEIGHT - AXIS} L0 {HEIGHT - AXIS} Z"))
    return Density(curves, _ticks(top), _description(row.activations))


def _ticks(top: float) -> list[tuple[float, str]]:
    """Three or so round numbers along the axis, and where they stand."""
    power = 10 ** np.floor(np.log10(top / 3))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= top / 4)
    values = np.arange(0, top * 0.97, step)
    return [(float(WIDTH * value / top), f"{value:.4g}") for value in values]


def _description(activations: Sequence[Sequence[float]]) -> str:
    """What the curves show, in numbers."""
    parts = []
    for place, values in enumerate(activations):
        if values:
            low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
            parts.append(
                f"on images of concept {place + 1} median {quantity(median)}, middle half {quantity(low)} to "
                f"{quantity(high)} ({counted(len(values), 'image')})"
            )
    return f"Distribution of the activation: {'; '.join(parts)}."


def _sources(card: ChannelCard) -> list[tuple[Chip, list[Source]]]:
    strongest = max((abs(source.strength) for own in card.sources for source in own), default=0.0)
    return [
        (
            chip_of(place),
            [
                Source(
                    source.source,
                    quantity(source.strength),
                    f"{source.membership:.0%}",
                    100 * abs(source.strength) / (strongest or 1.0),
                )
                for source in own
            ],
        )
        for place, own in enumerate(card.sources)
    ]


def _cell(value: float, is_flagged: bool) -> Cell:
    part = min(max(1 - value, 0.0), 1.0)
    mixed = tuple(round(255 + part * (channel - 255)) for channel in LOW_SIMILARITY)
    return Cell(f"{value:.2f}", "#{:02x}{:02x}{:02x}".format(*mixed), ink_on(mixed), is_flagged)


def ink_on(colour: Sequence[int]) -> str:
    """Black or white, whichever is easier to read on a colour (WCAG 2.2 contrast).

    Example:
        >>> ink_on((240, 228, 66))
        '#000000'
    """
    luminance = luminance_of(colour)
    return DARK if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else LIGHT


def luminance_of(colour: Sequence[int]) -> float:
    """Relative luminance of a colour of red, green and blue from 0 to 255 (WCAG 2.2).

    Example:
        >>> luminance_of((255, 255, 255))
        1.0
    """
    shares = [value / 255 for value in colour]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))
