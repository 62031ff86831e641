"""Reports of concepts that are clusters of images: tables, what loggers get, and cards in files."""

import io
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

pytest.importorskip("matplotlib")

from lightning_polydis import PolysemanticityReport, cli, loggers
from lightning_polydis.cards import ChannelCard, LayerOverview
from lightning_polydis.figures.canvas import CAPTION_SIZE
from lightning_polydis.html import to_html
from tests.clusters.reports import ONE_LINE, variants
from tests.sample_reports import cluster_report, sample_report


def printed(report, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report.to_table())
    return console.export_text()


@variants
def test_markdown_is_a_table_whatever_clusters_are_called(options):
    lines = cluster_report(**options).to_markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    quality = "distortion | leak | spurious | auroc"
    assert table[0] == f"| channel | concepts | cosine | reliability | clear | stability | {quality} |"
    assert len(table) == 2 + 3
    assert {line.replace("\\|", "").count("|") for line in table} == {11}
    assert "| 0.05 | 0.97 | yes | 0.93 |" in table[2]
    assert "3 of 40 cluster pairs flagged" in lines[0]


def test_markdown_names_clusters_in_full():
    text = cluster_report(described=True).to_markdown()
    assert f"0: {ONE_LINE} / 1: {ONE_LINE}".replace("|", "\\|") in text
    assert "stability" not in sample_report().to_markdown()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, ["classes 3 (62 %), 0 (20 %), 6 (8 %)", "class 1 (100 %)"]),
        (list("abcdefghij"), ["d (62 %), a (20 %), g (8 %)", "b (100 %)"]),
        ([str(index) for index in range(10)], ["3 (62 %), 0 (20 %), 6 (8 %)", "1 (100 %)"]),
    ],
)
def test_numbers_of_classes_are_told_from_their_shares(names, expected, no_figures):
    report = cluster_report(1)
    contents = [[(3, 0.62), (0, 0.2), (6, 0.08), (8, 0.1)], [(1, 1.0)]]
    found = replace(report.channels[0], contents=contents)
    report = replace(report, channels=[found], class_names=names)
    assert report.concept_names[found.layer, found.channel] == expected
    assert f"| 0 | {' / '.join(expected)} |" in report.to_markdown()
    text = printed(report, 200)
    assert f"│ 1: {expected[0]} " in text
    assert f"│ 2: {expected[1]} " in text
    assert f"<br>{expected[1]} |" in loggers._tables(report, report.quality)[0].content.markdown
    label = "class 3" if names is None else names[3]
    assert f'{label}</span><span class="share">(62\N{NO-BREAK SPACE}%),</span>' in to_html(report)


def test_no_pairs_are_no_cluster_pairs():
    report = cluster_report(0)
    layers = [replace(layer, n_candidate_pairs=0) for layer in report.layers]
    assert "so no cluster pairs to compare." in replace(report, layers=layers).to_markdown()


@variants
def test_the_table_of_clusters_fits_a_narrow_console(options):
    text = printed(cluster_report(**options), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "stability" in text
    assert "leak" in text
    assert "0.06 ~" in text
    assert "auroc" not in text, "names need the room"
    assert "1: " in text


def test_the_console_cuts_names_of_clusters():
    text = printed(cluster_report(1, described=True), 200)
    assert "│ 1: 0: <b>faces</b> of dogs | cats, cost… │" in text
    assert "evening" not in text


def test_loggers_get_a_table_of_clusters():
    report = cluster_report(described=True)
    (item,) = loggers._tables(report, report.quality)
    table = item.content
    assert table.columns[:6] == ["channel", "concepts", "cosine", "reliability", "clear", "stability"]
    assert table.rows[0][:6] == [0, f"0: {ONE_LINE} / 1: {ONE_LINE}", 0.05, 0.97, True, 0.93]
    assert {len(row) for row in table.rows} == {len(table.columns)}
    (line,) = [line for line in table.markdown.splitlines() if line.startswith("| 0 |")]
    assert line.startswith("| 0 | 0: &lt;b&gt;faces&lt;/b&gt; of dogs \\| cats, cos…<br>1: ")
    assert "<b>" not in table.markdown
    assert "cluster pairs flagged" in table.markdown


def test_classes_without_a_name_stop_no_logger():
    items = loggers._items(cluster_report(1, class_names=["cat"]))
    figures = {item.tag.rpartition("/")[2]: item.content for item in items if item.is_figure}
    captions = [text.get_text() for text in figures["card_1"].texts if text.get_fontsize() == CAPTION_SIZE]
    assert captions[:3] == ["cat", "class 1", "class 2"]
    assert [label.get_text() for label in figures["relevance"].axes[0].get_xticklabels()][:2] == ["cat", "class 1"]


@pytest.mark.parametrize("labels", [True, False])
def test_loggers_get_pictures_of_clusters(labels):
    items = loggers._items(cluster_report(labels=labels))
    names = [item.tag.rpartition("/")[2] for item in items]
    assert ("relevance" in names) == labels
    assert "settings" not in names
    assert [name for name in names if name.startswith("card")] == ["card_1", "card_2", "card_3"]
    assert all(item.content is not None for item in items)


def test_the_projector_gets_clusters_not_classes(monkeypatch):
    report, seen = cluster_report(1), []
    table = SimpleNamespace(vectors=torch.zeros(2, 4), rows=[(0, 0, 0), (0, 1, 1)])
    monkeypatch.setattr(PolysemanticityReport, "relevance_vectors", lambda self, layer: table)
    logger = SimpleNamespace(experiment=SimpleNamespace(add_embedding=lambda *given: seen.append(given)))
    monkeypatch.setattr(loggers, "TensorBoardLogger", SimpleNamespace)
    loggers.log_embeddings([logger], report, 5)
    ((_, rows, _, _, _, header),) = seen
    assert header == ["channel and cluster", "channel", "cluster", "concept"]
    assert rows == [["0: cluster 1", 0, "cluster 1", 1], ["0: cluster 2", 0, "cluster 2", 2]]


def test_show_suggests_no_settings_for_clusters(tmp_path, capsys):
    cluster_report(0).save(tmp_path / "report.json")
    assert cli.main(["show", str(tmp_path / "report.json")]) == 0
    printed = capsys.readouterr().out
    assert "More images may show clusters that so few do not." in printed
    assert "Suggested" not in printed


# ------------------------------------------------------------------------------------------------------- cards


def test_cards_and_overviews_of_clusters_come_back_from_json():
    report = cluster_report(described=True)
    for card in report.cards:
        back = ChannelCard.from_json(card.to_json())
        assert back.names == card.names
        assert back.has_clusters
        assert [image.label for image in back.rows[0].images] == list(range(8))
    (overview,) = report.overviews
    assert LayerOverview.from_json(overview.to_json()) == overview
    older = {key: value for key, value in overview.to_json().items() if key != "has_clusters"}
    assert not LayerOverview.from_json(older).has_clusters


def test_a_card_of_classes_asks_for_their_names():
    card = sample_report(1).cards[0]
    assert not card.has_clusters
    assert card.label(3, lambda index: f"name {index}") == "name 3"
