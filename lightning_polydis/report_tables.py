"""A report's polysemantic channels as tables of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from lightning_polydis._text import counted
from lightning_polydis.figures.canvas import shortened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_polydis.detection import PolysemanticChannel
    from lightning_polydis.report import PolysemanticityReport
    from lightning_polydis.summary import LayerSummary


MAX_NAME = 40
"""Characters of a cluster's name in the console."""


def markdown_table(report: PolysemanticityReport, max_rows: int | None) -> str:
    """See `PolysemanticityReport.to_markdown`."""
    lines = [_summary_line(layer, report) for layer in report.layers]
    lines += [f"- {note}" for note in report.notes]
    header, rows = _rows(report, [" / ".join(concept_texts(report, found)) for found in report.channels])
    first = 1 if len(report.layers) == 1 else 0  # the summary names a single layer
    if rows:
        header, rows = header[first:], [row[first:] for row in rows]
        shown = rows if max_rows is None else rows[:max_rows]
        lines += ["", _markdown_row(header), _markdown_row(["---"] * len(header))]
        lines += [_markdown_row([cell.replace("|", "\\|") for cell in row]) for row in shown]
        lines += [f"\n{len(rows) - len(shown)} more in the report."] if len(shown) < len(rows) else []
        lines += [] if report.known_quality else ["\nThe quality of the splits was not measured."]
    return "\n".join(lines)


def console_table(report: PolysemanticityReport, max_rows: int) -> Table:
    """See `PolysemanticityReport.to_table`."""
    header, rows = _narrowed(*_rows(report, [_console_cell(report, found) for found in report.channels]))
    n_found = counted(len(report.channels), "polysemantic channel")
    table = Table(title=f"{n_found} ({counted(report.n_images, 'image')})")
    first = 1 if len(report.layers) == 1 else 0  # the caption names a single layer
    for name in header[first:]:
        fixed = name not in ("layer", "concepts")
        table.add_column(name.split()[0], justify="right" if fixed else "left", no_wrap=fixed, min_width=8 - 2 * fixed)
    for row in rows[:max_rows]:
        table.add_row(*map(escape, row[first:]))
    more = [f"{len(rows) - max_rows} more in the report."] if len(rows) > max_rows else []
    if any(row[3].endswith("~") for row in rows):
        more.append("~: the interval of the similarity reaches up to the threshold.")
    table.caption = escape(
        "\n".join([*more, *(_summary_line(layer, report) for layer in report.layers), *report.notes])
    )
    return table


def _rows(report: PolysemanticityReport, concepts: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows.

    Args:
        report: The report.
        concepts: What is said of the concepts of each channel.
    """
    header = ["layer", "channel", "concepts", "cosine"]
    measured_well = ["reliability", "clear"] if any(found.is_clear is not None for found in report.channels) else []
    measured = {(quality.layer, quality.channel): quality for quality in report.known_quality}
    stability = ["stability"] if report.has_clusters else []
    figures = ["distortion", "leak", "spurious", "auroc"] if measured else []
    rows = []
    for found, text in zip(report.channels, concepts, strict=True):
        row = [found.layer, str(found.channel), text, f"{found.cosine_similarity:.2f}"]
        row += [_figure(found.reliability), "yes" if found.is_clear else "no"] if measured_well else []
        row += [_figure(found.stability) for _ in stability]
        quality = measured.get((found.layer, found.channel))
        row += [_figure(None if quality is None else quality.mean(name)) for name in figures]
        rows.append(row)
    return header + measured_well + stability + figures, rows


def concept_texts(report: PolysemanticityReport, found: PolysemanticChannel) -> list[str]:
    """What each concept of a channel is called, in one line: its classes, or the name of a cluster."""
    if report.has_clusters:
        return [" ".join(name.split()) for name in report.concept_names[found.layer, found.channel]]
    return [concept_text(report, concept) for concept in found.concepts]


def _console_cell(report: PolysemanticityReport, found: PolysemanticChannel) -> str:
    """Names of clusters, which may be whole sentences, cut and numbered, each on a line of its own."""
    names = concept_texts(report, found)
    if not report.has_clusters:
        return " / ".join(names)
    return "\n".join(shortened(f"{number}: {name}", MAX_NAME) for number, name in enumerate(names, start=1))


def concept_text(report: PolysemanticityReport, concept: Sequence[int], max_names: int = 4) -> str:
    """Names of a concept's classes, of which no more than so many are spelled out."""
    names = [report.label(index) for index in concept[:max_names]]
    more = [f"+{len(concept) - max_names}"] if len(concept) > max_names else []
    return ", ".join(names + more)


def _summary_line(layer: LayerSummary, report: PolysemanticityReport) -> str:
    kind = "cluster" if report.has_clusters else "class"
    text = f"{layer.name}: {layer.n_polysemantic} of {counted(layer.n_channels, 'channel')} polysemantic, "
    text += f"{counted(layer.n_candidates, 'candidate')}, "
    if not layer.n_candidate_pairs:
        return f"{text}so no {kind} pairs to compare."
    return (
        f"{text}{layer.n_pairs} of {counted(layer.n_candidate_pairs, f'{kind} pair')} flagged, "
        f"cosine similarity {layer.min_cosine:.2f} to {layer.max_cosine:.2f}, mean {layer.mean_cosine:.2f}."
    )


def _narrowed(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The table without the columns on how sure a flag is; a mark at the similarity stands for them.

    That of clusters, whose names need room, is also without two columns on the quality of splits.
    """
    if "clear" in header:
        rows = [[*row[:3], row[3] + ("" if row[5] == "yes" else " ~"), *row[6:]] for row in rows]
        header = header[:4] + header[6:]
    if "stability" in header:
        kept = [place for place, name in enumerate(header) if name not in ("spurious", "auroc")]
        return [header[place] for place in kept], [[row[place] for place in kept] for row in rows]
    return header, rows


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
