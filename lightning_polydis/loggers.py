"""Reports in the loggers of a run: what is logged. How each logger takes it: ``logger_adapters.py``."""

from __future__ import annotations

import html
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from rich.console import Console

from lightning_polydis.cards import cluster_label
from lightning_polydis.figures import (
    card_figure,
    history_figure,
    quality_figure,
    relevance_figure,
    similarity_figure,
    sweep_figure,
)
from lightning_polydis.figures.canvas import names_up_to, shortened
from lightning_polydis.logger_adapters import LogItem, LogTable, adapter_of
from lightning_polydis.report_tables import concept_texts
from lightning_polydis.sweep import sweep_markdown, sweep_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from lightning.pytorch import LightningModule
    from lightning.pytorch.loggers import Logger
    from matplotlib.figure import Figure

    from lightning_polydis.detection import PolysemanticChannel
    from lightning_polydis.evaluation import SplitQuality
    from lightning_polydis.report import PolysemanticityReport
    from lightning_polydis.sweep import LayerSweep

MAX_ROWS = 20
MAX_CARDS, CARD_IMAGES = 6, 5
CONCEPT_LENGTH = 36
SPLIT_SCALARS = ("distortion", "leak", "spurious", "auroc")
FINAL_SCALARS = ("distortion", "leak", "auroc")


@rank_zero_only
def log_report(loggers: Iterable[Logger], report: PolysemanticityReport, step: int) -> None:
    """Write a table of each layer's polysemantic channels into every logger that takes tables.

    Scalars reach all loggers by ``self.log``. What cannot be written is a warning.

    Args:
        loggers: The loggers of a run.
        report: The report.
        step: Global step of the analysis.
    """
    items = _tables(report, [])
    for logger in loggers:
        adapter = adapter_of(logger)
        if adapter is not None and adapter.takes_every_epoch:
            _write(logger, items, step)


@rank_zero_only
def log_results(loggers: Iterable[Logger], report: PolysemanticityReport, step: int) -> None:
    """Write all that is known when a run has ended into every logger, as far as it takes it.

    Scalars ``polydis/<layer>/final_<figure>`` for all; tables, overview figures and the cards of the first channels
    under tags that are the same in every run: ``polydis/<layer>/overview``, ``.../card_1``. Nothing is drawn that no
    logger takes; without matplotlib tables have to do. What cannot be written is a warning.

    Args:
        loggers: The loggers of a run.
        report: The report.
        step: Global step of the analysis.
    """
    loggers = list(loggers)
    if not loggers:
        return
    scalars = final_scalars(report)
    takers = [logger for logger in loggers if adapter_of(logger) is not None]
    items = _items(report) if takers else []
    for logger in loggers:
        with _writing(logger):
            logger.log_metrics(scalars, step)
        if logger in takers:
            _write(logger, items, step)


@rank_zero_only
def log_embeddings(loggers: Iterable[Logger], report: PolysemanticityReport, step: int) -> None:
    """Write the relevance vectors of flagged channels into TensorBoard's projector.

    Args:
        loggers: The loggers of a run; others than TensorBoard's are passed over.
        report: The report, not one from a file.
        step: Global step of the analysis.
    """
    kind = "cluster" if report.has_clusters else "class"
    header = [f"channel and {kind}", "channel", kind, "concept"]
    for layer in report.layers:
        table = report.relevance_vectors(layer.name)
        rows = [
            [f"{channel}: {name}", channel, name, concept + 1]
            for channel, label, concept in table.rows
            for name in [cluster_label(label) if report.has_clusters else report.label(label)]
        ]
        for logger in loggers if len(rows) > 1 else ():
            if isinstance(logger, TensorBoardLogger):
                with _writing(logger):
                    tag = _tag(layer.name, "relevance_vectors")
                    logger.experiment.add_embedding(table.vectors, rows, None, step, tag, header)


def final_scalars(report: PolysemanticityReport) -> dict[str, float]:
    """A few figures of a finished run, fit to compare runs by: ``polydis/<layer>/final_<figure>``.

    The number of polysemantic channels and, where splits were judged, the means of their distortion, leak and AUROC.

    Example:
        >>> from lightning_polydis.summary import LayerSummary
        >>> from lightning_polydis import PolysemanticityReport
        >>> layer = LayerSummary("conv", 8, 4, 3, 5, 2, 2, 0.7, 0.1, 0.9)
        >>> final_scalars(PolysemanticityReport([layer], [], [], {}, n_images=10))
        {'polydis/conv/final_n_polysemantic': 2.0}
    """
    scalars = {f"polydis/{layer.name}/final_n_polysemantic": float(layer.n_polysemantic) for layer in report.layers}
    for layer in report.layers:
        for name, value in _means(report.quality, layer.name, FINAL_SCALARS):
            scalars[f"polydis/{layer.name}/final_{name}"] = value
    return scalars


def _write(logger: Logger, items: Sequence[LogItem], step: int) -> None:
    adapter = adapter_of(logger)
    if adapter is None:
        return
    for item in items:
        content = item.content  # mistakes in here are ours, and no reason to blame the logger
        if content is None:
            continue
        with _writing(logger) as written:
            (adapter.figure if item.is_figure else adapter.table)(logger, item.tag, content, step)
        if not written:  # a server that does not answer will not answer the next time either
            return


@contextmanager
def _writing(logger: Logger) -> Iterator[list[bool]]:
    """Makes a warning of whatever a logger raises; holds a `True` in the end if nothing."""
    written: list[bool] = []
    try:
        yield written
        written.append(True)
    except Exception as error:  # each of the loggers' packages has errors of its own
        text = f"{type(logger).__name__}: {type(error).__name__}: {error}"
        rank_zero_warn(f"The report could not be written to the loggers: {text}.")


def _items(report: PolysemanticityReport) -> list[LogItem]:
    """All that is logged when a run has ended."""
    items = _tables(report, report.quality)
    items += [LogItem(_tag(sweep.layer, "settings"), partial(_sweep_table, report, sweep)) for sweep in report.sweeps]
    for overview in report.overviews:
        items.append(_figure(overview.layer, "similarities", similarity_figure, overview))
        if overview.classes or not overview.has_clusters:  # of clusters the classes may not be known
            names = names_up_to(report.class_names, overview.classes)
            items.append(_figure(overview.layer, "relevance", relevance_figure, overview, class_names=names))
    for layer in dict.fromkeys(quality.layer for quality in report.quality):
        items.append(_figure(layer, "quality", quality_figure, report.quality, layer))
    items += [_figure(sweep.layer, "settings", sweep_figure, sweep, report.settings) for sweep in report.sweeps]
    for layer in (summary.name for summary in report.layers):
        history = [entry for entry in report.history if entry.layer == layer]
        if len(history) > 1:
            items.append(_figure(layer, "history", history_figure, history))
        cards = [card for card in report.cards if card.layer == layer][:MAX_CARDS]
        for rank, card in enumerate(cards, start=1):
            names = names_up_to(report.class_names, card.real_classes)
            items.append(_figure(layer, f"card_{rank}", card_figure, card, class_names=names, n_images=CARD_IMAGES))
    return items


def _tag(layer: str, name: str) -> str:
    return f"polydis/{layer}/{name}"


def _figure(layer: str, name: str, draw: Callable[..., Figure], *args: Any, **options: Any) -> LogItem:
    return LogItem(_tag(layer, name), partial(draw, *args, **options), is_figure=True)


def _tables(report: PolysemanticityReport, qualities: Sequence[SplitQuality]) -> list[LogItem]:
    """A table for each layer."""
    return [
        LogItem(_tag(layer.name, "overview"), partial(_overview_table, report, layer.name, qualities))
        for layer in report.layers
    ]


def _overview_table(report: PolysemanticityReport, layer: str, qualities: Sequence[SplitQuality]) -> LogTable:
    own = [found for found in report.channels if found.layer == layer]
    measured = {quality.channel: quality for quality in qualities if quality.layer == layer}
    stability = ["stability"] if report.has_clusters else []
    columns = ["channel", "concepts", "cosine", "reliability", "clear", *stability]
    columns += SPLIT_SCALARS if measured else ()
    rows = []
    for found in own[:MAX_ROWS]:
        row = [found.channel, " / ".join(_names(report, found)), found.cosine_similarity]
        row += [found.reliability, found.is_clear, *(found.stability for _ in stability)]
        quality = measured.get(found.channel)
        rows.append(row + [None if quality is None else quality.mean(name) for name in SPLIT_SCALARS if measured])
    lines = _introduction(report, layer)
    if rows:
        lines += ["", _line(columns), _line(["---"] * len(columns))]
    for found, row in zip(own, rows, strict=False):
        lines.append(_line([_cell(report, found) if place == 1 else value for place, value in enumerate(row)]))
    lines += [f"\n{len(own) - len(rows)} more in the report."] if len(rows) < len(own) else []
    return LogTable(columns, rows, "\n".join(lines))


def _introduction(report: PolysemanticityReport, layer: str) -> list[str]:
    summaries = [summary for summary in report.layers if summary.name == layer]
    text = replace(report, layers=summaries, channels=[], notes=[]).to_markdown()
    return [text, *(["", *(f"- {note}" for note in report.notes)] if report.notes else [])]


def _names(report: PolysemanticityReport, found: PolysemanticChannel) -> list[str]:
    """Of its concepts, with all their classes; each in one line."""
    if report.has_clusters:
        return concept_texts(report, found)
    return [", ".join(map(report.label, concept)) for concept in found.concepts]


def _cell(report: PolysemanticityReport, found: PolysemanticChannel) -> str:
    """A line for each concept: a wide column would break the numbers in its neighbours, digit by digit."""
    lines = [shortened(name, CONCEPT_LENGTH) for name in _names(report, found)]
    return "<br>".join(html.escape(line, quote=False) for line in lines)


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(_text, cells))} |"


def _text(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell).replace("|", "\\|")


def _sweep_table(report: PolysemanticityReport, sweep: LayerSweep) -> LogTable:
    suggested = report.suggest_settings()
    text = f"Suggested: `{suggested.call()}`. {suggested.reason}\n\n{sweep_markdown(sweep)}"
    return LogTable(*sweep_table(sweep), text)


def log_split_quality(pl_module: LightningModule, qualities: Sequence[SplitQuality]) -> None:
    """Log the mean of each figure over a layer's splits as ``polydis/<layer>/split_<figure>``.

    Args:
        pl_module: The module whose ``log`` is used.
        qualities: The same on all ranks, or the ranks would wait for one another.
    """
    for layer in dict.fromkeys(quality.layer for quality in qualities):
        for name, value in _means(qualities, layer, SPLIT_SCALARS):
            pl_module.log(_tag(layer, f"split_{name}"), value, sync_dist=True)


def _means(qualities: Sequence[SplitQuality], layer: str, names: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Mean of each figure over a layer's splits, without figures that none of them has."""
    for name in names:
        values = [quality.mean(name) for quality in qualities if quality.layer == layer]
        known = [value for value in values if value is not None]
        if known:
            yield name, sum(known) / len(known)


@rank_zero_only
def show_report(report: PolysemanticityReport) -> None:
    """Print the report's table on the console, by one process."""
    Console().print(report.to_table())
