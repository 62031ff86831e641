"""A report's polysemantic channels as tables of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_polydis.report import PolysemanticityReport
    from lightning_polydis.summary import LayerSummary


def markdown_table(report: PolysemanticityReport, max_rows: int | None) -> str:
    """See `PolysemanticityReport.to_markdown`."""
    lines = [_summary_line(layer) for layer in report.layers]
    lines += [f"- {note}" for note in report.notes]
    header, rows = _rows(report)
    first = 1 if len(report.layers) == 1 else 0  # the summary names a single layer
    if rows:
        header, rows = header[first:], [row[first:] for row in rows]
        shown = rows if max_rows is None else rows[:max_rows]
        lines += ["", _markdown_row(header), _markdown_row(["---"] * len(header))]
        lines += [_markdown_row([cell.replace("|", "\\|") for cell in row]) for row in shown]
        lines += [f"\n{len(rows) - len(shown)} more in `report.json`."] if len(shown) < len(rows) else []
    return "\n".join(lines)


def console_table(report: PolysemanticityReport, max_rows: int) -> Table:
    """See `PolysemanticityReport.to_table`."""
    header, rows = _narrowed(*_rows(report))
    n_found, n_images = len(report.channels), report.n_images
    table = Table(title=f"{n_found} polysemantic channel{'s' * (n_found != 1)} ({n_images} images)")
    first = 1 if len(report.layers) == 1 else 0  # the caption names a single layer
    for name in header[first:]:
        fixed = name not in ("layer", "concepts")
        table.add_column(name.split()[0], justify="right" if fixed else "left", no_wrap=fixed, min_width=8 - 2 * fixed)
    for row in rows[:max_rows]:
        table.add_row(*map(escape, row[first:]))
    more = [f"{len(rows) - max_rows} more in the report."] if len(rows) > max_rows else []
    if any(row[3].endswith("~") for row in rows):
        more.append("~: the interval of the similarity reaches up to the threshold.")
    table.caption = escape("\n".join([*more, *(_summary_line(layer) for layer in report.layers), *report.notes]))
    return table


def _rows(report: PolysemanticityReport) -> tuple[list[str], list[list[str]]]:
    header = ["layer", "channel", "concepts", "cosine"]
    measured_well = ["reliability", "clear"] if any(found.is_clear is not None for found in report.channels) else []
    measured = {(quality.layer, quality.channel): quality for quality in report.known_quality}
    figures = ["distortion", "leak", "spurious", "auroc"] if measured else []
    rows = []
    for found in report.channels:
        concepts = " / ".join(concept_text(report, concept) for concept in found.concepts)
        row = [found.layer, str(found.channel), concepts, f"{found.cosine_similarity:.2f}"]
        row += [_figure(found.reliability), "yes" if found.is_clear else "no"] if measured_well else []
        quality = measured.get((found.layer, found.channel))
        row += [_figure(None if quality is None else quality.mean(name)) for name in figures]
        rows.append(row)
    return header + measured_well + figures, rows


def concept_text(report: PolysemanticityReport, concept: Sequence[int], max_names: int = 4) -> str:
    """Names of a concept's classes, of which no more than so many are spelled out."""
    names = [report.label(index) for index in concept[:max_names]]
    more = [f"+{len(concept) - max_names}"] if len(concept) > max_names else []
    return ", ".join(names + more)


def _summary_line(layer: LayerSummary) -> str:
    text = f"{layer.name}: {layer.n_polysemantic} of {layer.n_channels} channels polysemantic, "
    text += f"{layer.n_candidates} candidates, "
    if not layer.n_candidate_pairs:
        return f"{text}so no class pairs to compare."
    return (
        f"{text}{layer.n_pairs} of {layer.n_candidate_pairs} class pairs flagged, "
        f"cosine similarity {layer.min_cosine:.2f} to {layer.max_cosine:.2f}, mean {layer.mean_cosine:.2f}."
    )


def _narrowed(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The table without the columns on how sure a flag is; a mark at the similarity stands for them."""
    if "clear" not in header:
        return header, rows
    marked = [[*row[:3], row[3] + ("" if row[5] == "yes" else " ~"), *row[6:]] for row in rows]
    return header[:4] + header[6:], marked


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
