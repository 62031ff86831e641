"""The report as one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lightning_polydis._checks import InputError
from lightning_polydis._files import written_whole
from lightning_polydis._text import counted
from lightning_polydis._version import __version__
from lightning_polydis.cards import cluster_label
from lightning_polydis.clusters.names import cluster_name
from lightning_polydis.html_cards import CardView, chip_of, view_of
from lightning_polydis.html_figures import Drawing, history_drawing, overview_drawings, sweep_drawing

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_polydis.cards import LayerOverview
    from lightning_polydis.detection import PolysemanticChannel, PolysemanticPair
    from lightning_polydis.evaluation import SplitQuality
    from lightning_polydis.report import PolysemanticityReport
    from lightning_polydis.sweep import LayerSweep

TEMPLATES = Path(__file__).parent / "templates"
NAMES_SHOWN, NAMES_LISTED = 3, 40
"""Class names of a concept in the table: always, and when unfolded. Channels may have hundreds of classes."""

QUALITY = (("distortion", "Distortion"), ("leak", "Leak"), ("spurious", "Spurious"), ("auroc", "AUROC"))
ANALYSED = "Analysed: "
"""How the note on the weights begins that the callback makes where they were exchanged."""


@dataclass(frozen=True)
class ClusterText:
    """What the page says of a concept that is made of clusters.

    Attributes:
        name: Its name; `None` where that says no more than ``shares``.
        shares: Real classes that fill it and their shares of its images, where known.
    """

    name: str | None
    shares: list[tuple[int, str]]


@dataclass(frozen=True)
class ChannelRow:
    """One channel of the table, and of the cards.

    Attributes:
        found: The channel; `None` for a card whose channel the report does not list.
        card: Name of its card in the page, or `None`.
        view: The card, or `None`.
        lowest: The flagged pair of classes with the lowest similarity; `None` if the report lists none.
        measured: Quality of its split, or `None`.
        clusters: What its concepts are, if they are made of clusters; else empty.
    """

    found: PolysemanticChannel | None
    card: str | None
    view: CardView | None
    lowest: PolysemanticPair | None
    measured: SplitQuality | None
    clusters: list[ClusterText]

    @property
    def cosine_similarity(self) -> float:
        """Of the lowest flagged pair; without one the channel's, to which no interval belongs."""
        if self.lowest is not None:
            return self.lowest.cosine_similarity
        return math.inf if self.found is None else self.found.cosine_similarity

    @property
    def quality(self) -> dict[str, float | None]:
        """Means over the concepts."""
        return {name: None if self.measured is None else self.measured.mean(name) for name, _ in QUALITY}


@dataclass(frozen=True)
class OverviewPart:
    """One layer at a glance, and its figures."""

    overview: LayerOverview
    drawings: list[Drawing]

    @property
    def compares_without_noise(self) -> bool:
        """Whether a near miss has one similarity as measured and, as the page shows it, another that was compared."""
        return any(
            _number(miss.compared, 3) != _number(miss.cosine_similarity, 3) for miss in self.overview.near_misses
        )


@dataclass(frozen=True)
class SweepPart:
    """What other settings find in one layer, and its figure."""

    sweep: LayerSweep
    drawing: Drawing


def to_html(report: PolysemanticityReport) -> str:
    """The report as one page that needs no other file and no network.

    Whatever the report can still work out and was not asked for before is worked out now: the plan, the quality of its
    splits, cards, overviews and the sweep. Everything that comes from the data or the network is escaped. Pictures are
    part of the page; those that matplotlib draws are left out, in words, where it is missing.

    Args:
        report: The report.

    Returns:
        The page.

    Example:
        >>> from lightning_polydis import PolysemanticityReport
        >>> from lightning_polydis.summary import LayerSummary
        >>> layer = LayerSummary("<conv>", 8, 4, 0, 0, 0, 0, 1.0, 1.0, 1.0)
        >>> page = to_html(PolysemanticityReport([layer], [], [], {}, n_images=100))
        >>> page.count("&lt;conv&gt;") > 0, "<conv>" in page
        (True, False)
    """
    return _environment().get_template("report.html.j2").render(_context(report))


def write_html(report: PolysemanticityReport, path: str | Path) -> None:
    """Write the page of a report; the file appears whole or not at all."""
    page = to_html(report).encode()
    with written_whole(path) as file:
        file.write(page)


@lru_cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {
        "style": Markup(_asset("report.css")),
        "script": Markup(script),
        "script_hash": f"sha256-{digest}",  # no other script runs, even if one slipped in
        "version": __version__,
        "number": _number,
        "counted": counted,
        "literal": repr,
        "cluster_label": cluster_label,
        "chip_of": chip_of,
        "names_shown": NAMES_SHOWN,
        "names_listed": NAMES_LISTED,
        "figures_of_quality": (),
    }
    return environment


def _asset(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "\N{EN DASH}"
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _context(report: PolysemanticityReport) -> dict[str, Any]:
    label = _labels(report)
    rows = _rows(report)
    channels = [row for row in rows if row.found is not None]
    sweeps = _sweeps(report)
    overviews = [OverviewPart(part, overview_drawings(report, part)) for part in report.overviews]
    cards = [row for row in rows if row.view is not None]
    names = [layer.name for layer in report.layers]
    suggestion = report.suggest_settings() if sweeps else None
    return {
        "report": report,
        "label": label,
        "title": f"Polysemantic channels: {', '.join(names) if len(names) < 4 else f'{len(names)} layers'}",
        "n_found": len(report.channels),
        "n_channels": sum(layer.n_channels for layer in report.layers),
        "contents": _contents(bool(overviews), bool(cards), bool(sweeps), bool(report.history)),
        "weights": _weights(report),
        "caveats": _caveats(report),
        "settings": _settings(report),
        "channels": channels,
        "has_clusters": report.has_clusters,
        "own": "images" if report.has_clusters else "classes",  # what a concept is made of
        "has_stability": any(found.stability is not None for found in report.channels),
        "has_reliability": any(found.reliability is not None for found in report.channels),
        "has_clear": any(found.is_clear is not None for found in report.channels),
        "figures_of_quality": QUALITY if report.quality else (),
        "overviews": overviews,
        "cards": cards,
        "any_images": any(row.images for card in report.cards for row in card.rows),
        "suggestion": suggestion,
        "is_new": suggestion and any(report.settings.get(key) != own for key, own in suggestion.arguments().items()),
        "layers_literal": repr(names[0] if len(names) == 1 else names),
        "sweeps": sweeps,
        "history": history_drawing(report) if report.history else None,
    }


def _labels(report: PolysemanticityReport) -> Callable[[int], str]:
    """Name of a class; its number where there is none."""
    names = [str(name) for name in report.class_names or []]
    return lambda index: names[index] if index < len(names) else f"class {index}"


def _rows(report: PolysemanticityReport) -> list[ChannelRow]:
    """The channels, lowest similarity first."""
    flagged = _flagged(report)
    views = {}
    for card in report.cards:
        pairs = flagged.get((card.layer, card.channel), [])
        views[card.layer, card.channel] = view_of(card, {(pair.class_a, pair.class_b) for pair in pairs})
    places = {key: f"card-{place}" for place, key in enumerate(views)}
    measured = {(part.layer, part.channel): part for part in report.quality}
    found = {(part.layer, part.channel): part for part in report.channels}
    rows = []
    for key in dict.fromkeys([*found, *views]):
        lowest = min(flagged.get(key, []), key=lambda pair: pair.cosine_similarity, default=None)
        clusters = _clusters(report, found.get(key), views.get(key))
        rows.append(ChannelRow(found.get(key), places.get(key), views.get(key), lowest, measured.get(key), clusters))
    return sorted(rows, key=lambda row: row.cosine_similarity)


def _clusters(
    report: PolysemanticityReport, found: PolysemanticChannel | None, view: CardView | None
) -> list[ClusterText]:
    """What the concepts of a channel are, if they are made of clusters."""
    if not report.has_clusters:
        return []
    if found is None:  # a card alone: what fills its clusters is not known
        return [ClusterText(name, []) for name in (view and view.card.names) or []]
    names = report.concept_names[found.layer, found.channel]
    contents = found.contents or [[] for _ in names]
    return [_cluster(report, *one) for one in zip(range(1, len(names) + 1), names, contents, strict=True)]


def _cluster(report: PolysemanticityReport, number: int, name: str, content: list[tuple[int, float]]) -> ClusterText:
    says_more = not content or name != cluster_name(number, content, report.class_names)
    shares = [(index, f"({100 * share:.0f}\N{NO-BREAK SPACE}%)") for index, share in content]
    return ClusterText(name if says_more else None, shares)


def _flagged(report: PolysemanticityReport) -> dict[tuple[str, int], list[PolysemanticPair]]:
    """The flagged pairs of each channel."""
    flagged: dict[tuple[str, int], list[PolysemanticPair]] = {}
    for pair in report.pairs:
        flagged.setdefault((pair.layer, pair.channel), []).append(pair)
    return flagged


def _sweeps(report: PolysemanticityReport) -> list[SweepPart]:
    try:
        sweeps = report.sweeps
    except InputError:  # the file that it was loaded from holds none
        return []
    return [SweepPart(sweep, sweep_drawing(report, sweep)) for sweep in sweeps]


def _contents(overviews: bool, cards: bool, sweeps: bool, history: bool) -> list[tuple[str, str]]:
    parts = [
        (True, "summary", "Summary"),
        (True, "caveats", "Caveats"),
        (True, "settings", "Settings and data"),
        (True, "channels-title", "Channels"),
        (overviews, "layers", "Layers at a glance"),
        (cards, "cards", "Cards"),
        (sweeps, "other-settings", "Other settings"),
        (history, "history", "History"),
    ]
    return [(name, text) for is_there, name, text in parts if is_there]


def _weights(report: PolysemanticityReport) -> str:
    noted = [note.removeprefix(ANALYSED) for note in report.notes if note.startswith(ANALYSED)]
    if noted:
        return " ".join(noted)
    when = ""
    if report.history:
        last = report.history[-1]
        when = f" (epoch {last.epoch}, step {last.step})"
    return f"those of the network when it was analysed{when}."


def _caveats(report: PolysemanticityReport) -> list[str]:
    caveats = [note for note in report.notes if not note.startswith(ANALYSED)]
    doubtful = sum(found.is_clear is False for found in report.channels)
    if doubtful:
        caveats.append(
            f"Flags that are not clear: {doubtful} of {len(report.channels)}. The interval of their similarity reaches "
            "up to the threshold; more images would tell."
        )
    if report.channels and not report.quality:
        caveats.append("The quality of the splits was not measured.")
    return caveats


def _settings(report: PolysemanticityReport) -> list[tuple[str, str]]:
    n_classes = len(report.class_names) if report.class_names else None
    data = [
        ("images analysed", str(report.n_images)),
        ("images left out (NaN or infinity)", str(report.n_images_left_out)),
        ("classes with names", str(n_classes or "none")),
    ]
    return [*data, *((name, _setting(value)) for name, value in report.settings.items())]


def _setting(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)
