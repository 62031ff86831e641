"""Reports in plain types, and back."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lightning_polydis.cards import ChannelCard, EpochEntry, LayerOverview
from lightning_polydis.detection import PolysemanticChannel, PolysemanticPair
from lightning_polydis.evaluation import SplitQuality
from lightning_polydis.summary import LayerSummary
from lightning_polydis.sweep import LayerSweep

if TYPE_CHECKING:
    from lightning_polydis.report import PolysemanticityReport


def report_to_json(report: PolysemanticityReport) -> dict[str, Any]:
    """A report in plain types; what takes time is in it if it was asked for before, and else `None`."""
    return {
        "settings": report.settings,
        "n_images": report.n_images,
        "n_images_left_out": report.n_images_left_out,
        "class_names": report.class_names,
        "notes": report.notes,
        "layers": [asdict(layer) for layer in report.layers],
        "channels": [asdict(channel) for channel in report.channels],
        "pairs": [dict(vars(pair)) for pair in report.pairs],  # there are many, and `asdict` is slow
        "history": [entry.to_json() for entry in report.history],
        **{name: _entries(report, name) for name in ("quality", "sweeps", "cards", "overviews")},
        "concept_names": _names_to_json(report),
    }


def _entries(report: PolysemanticityReport, name: str) -> list[dict[str, Any]] | None:
    """Something that takes time, if it was asked for before, or came from a file."""
    is_there = name in vars(report) or getattr(report, f"_saved_{name}") is not None
    return [entry.to_json() for entry in getattr(report, name)] if is_there else None


def _names_to_json(report: PolysemanticityReport) -> list[list[Any]] | None:
    """Layer, channel and names; `None` for groups of classes, which name themselves."""
    if not report.has_clusters:
        return None
    return [[layer, channel, names] for (layer, channel), names in report.concept_names.items()]


def report_fields(document: dict[str, Any]) -> dict[str, Any]:
    """The fields of the report that `report_to_json` described, or an older version of it."""
    quality, sweeps = document["quality"], document.get("sweeps")
    cards, overviews, names = document.get("cards"), document.get("overviews"), document.get("concept_names")
    return {
        "layers": [LayerSummary(**layer) for layer in document["layers"]],
        "channels": [_channel_from_json(channel) for channel in document["channels"]],
        "pairs": [_pair_from_json(pair) for pair in document["pairs"]],
        "settings": document["settings"],
        "n_images": document["n_images"],
        "n_images_left_out": document["n_images_left_out"],
        "class_names": document["class_names"],
        "notes": document["notes"],
        "history": [EpochEntry.from_json(entry) for entry in document.get("history", [])],
        "_saved_quality": None if quality is None else [SplitQuality.from_json(entry) for entry in quality],
        "_saved_sweeps": None if sweeps is None else [LayerSweep(**sweep) for sweep in sweeps],
        "_saved_cards": None if cards is None else [ChannelCard.from_json(card) for card in cards],
        "_saved_overviews": None if overviews is None else [LayerOverview.from_json(part) for part in overviews],
        "_saved_names": None if names is None else {(layer, channel): own for layer, channel, own in names},
    }


def _channel_from_json(content: dict[str, Any]) -> PolysemanticChannel:
    contents = content.get("contents")
    pairs = None if contents is None else [[(int(label), float(share)) for label, share in own] for own in contents]
    return PolysemanticChannel(**{**content, "contents": pairs})


def _pair_from_json(content: dict[str, Any]) -> PolysemanticPair:
    interval = content["interval"]
    return PolysemanticPair(**{**content, "interval": None if interval is None else tuple(interval)})
