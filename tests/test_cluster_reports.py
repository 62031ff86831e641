"""Reports of concepts that are clusters of images: figures, the page, tables and what loggers get."""

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex

from lightning_polydis import ConceptHeatmaps, PolysemanticityReport, cli, html_figures, loggers
from lightning_polydis.cards import ChannelCard, LayerOverview
from lightning_polydis.figures import (
    CONCEPT_COLOURS,
    OTHER_COLOUR,
    card_figure,
    class_similarity_figure,
    heatmap_figure,
    relevance_figure,
    similarity_figure,
    split_figure,
    visualization_figure,
)
from lightning_polydis.figures.canvas import CAPTION_SIZE
from lightning_polydis.html import to_html
from lightning_polydis.visualization import ChannelVisualization
from tests.pictures import assert_nothing_overlaps
from tests.sample_reports import DESCRIBED, cluster_report, sample_report
from tests.test_card_figures import check_layout
from tests.test_html import OVERLAPS, Page, browser, show  # noqa: F401

LAYER = "net.layer4.2.conv3"
LONG_NAMES = [f"a very long name of a class of dogs or of sailing boats {index}" for index in range(10)]
ONE_LINE = " ".join(DESCRIBED.split())
VARIANTS = {
    "labels": {},
    "long names": {"class_names": LONG_NAMES},
    "no labels": {"labels": False},
    "described": {"described": True},
    "described without labels": {"described": True, "labels": False},
}

variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(html_figures, "_picture", lambda draw: ("data:image/png;base64,", 300, 200))


def texts(figure):
    return [text.get_text().replace("\n", " ") for text in figure.texts]


def frames(figure, row):
    axes = [axes for axes in figure.axes if axes.get_label().startswith(f"row {row}, image")]
    return [to_hex(one.spines["left"].get_edgecolor()).upper() for one in axes]


# ----------------------------------------------------------------------------------------------------- figures


def test_a_card_names_its_concepts_and_frames_images_by_cluster():
    report = cluster_report()
    figure = card_figure(report.cards[2], class_names=report.class_names, n_images=5)
    first, second = CONCEPT_COLOURS[:2]
    assert frames(figure, 0) == [first, second, first, first, OTHER_COLOUR], "clusters 1 and 3 are one concept"
    captions = [text.get_text() for text in figure.texts if text.get_fontsize() == CAPTION_SIZE]
    assert captions == [f"class {label}" for label in range(5)] * 3
    leading = report.concept_names[LAYER, 2][0].partition(",")[0].replace(" %", "\N{NO-BREAK SPACE}%")
    assert any(text.startswith(leading) for text in texts(figure))
    assert "similarity of its clusters" in texts(figure)
    assert "grey frame: image of no cluster" in texts(figure)


def test_classes_have_their_numbers_where_a_card_is_given_no_names():
    figure = card_figure(cluster_report().cards[0], n_images=3)
    captions = [text.get_text() for text in figure.texts if text.get_fontsize() == CAPTION_SIZE]
    assert captions[:3] == ["0", "1", "2"]


def test_images_of_unknown_classes_have_no_caption():
    figure = card_figure(cluster_report(labels=False).cards[0], class_names=["only one"])
    assert [text for text in figure.texts if text.get_fontsize() == CAPTION_SIZE] == []
    assert "cluster 2" in texts(figure)


def test_a_card_checks_names_of_classes_not_of_clusters():
    card = cluster_report().cards[1]  # of three clusters; its images are of classes 0 to 7
    with pytest.raises(ValueError, match="`class_names` to name class 7, but got 7 names"):
        card_figure(card, class_names=["a"] * 7)
    assert class_similarity_figure(card, class_names=["only one"])


def test_a_card_says_what_of_its_clusters_it_leaves_out():
    card = replace(cluster_report().cards[0], n_concepts=4, n_classes=5)
    assert card.beyond(2, 2) == "+2 more concepts, 3 more clusters"
    (note,) = (text for text in texts(card_figure(card)) if "grey frame" in text)
    assert note.startswith("grey frame: image of no cluster, or of a concept that is not drawn")


def test_clusters_alone_in_a_concept_have_its_name_and_others_a_number():
    axes = class_similarity_figure(cluster_report(described=True).cards[2], class_names=["cat"] * 10).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["cluster 1", "cluster 3", "1: <b>faces</b> of dogs…"]
    assert axes.figure.get_suptitle() == f"Channel 2 of {LAYER}: similarity of its clusters"


def test_similarities_are_those_of_pairs_of_clusters():
    (overview,) = cluster_report().overviews
    axes = similarity_figure(overview).axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == (
        "pairs of clusters",
        "cosine similarity of the two clusters' centres",
    )
    assert similarity_figure(replace(overview, has_clusters=False)).axes[0].get_ylabel() == "pairs of classes"


def test_the_classes_of_the_strongest_images_are_drawn():
    report = cluster_report()
    (overview,) = report.overviews
    figure = relevance_figure(overview, class_names=report.class_names)
    axes, bar = figure.axes
    np.testing.assert_allclose(axes.get_images()[0].get_array(), overview.relevance)
    assert figure.get_suptitle() == f"{LAYER}: classes of the strongest images"
    assert bar.get_ylabel() == "part of the channel's\nstrongest images"
    some = replace(overview, relevance=[overview.relevance[0], [], overview.relevance[2]])
    drawn = relevance_figure(some).axes[0].get_images()[0].get_array()
    np.testing.assert_allclose(drawn, [overview.relevance[0], [0] * 10, overview.relevance[2]])
    wide = replace(overview, channels=[3], classes=list(range(70)), relevance=[[0.01] * 70])
    assert relevance_figure(wide).axes[0].get_xlabel() == "class (10 rarer ones are not drawn)"


def test_what_there_is_not_is_said_of_clusters():
    (overview,) = cluster_report(labels=False).overviews
    nothing = replace(overview, n_candidate_pairs=[0] * 20, n_flagged_pairs=[0] * 20, channels=[], relevance=[])
    said = [
        [text.get_text() for text in figure.axes[0].texts]
        for figure in (relevance_figure(overview), relevance_figure(nothing), similarity_figure(nothing))
    ]
    assert said == [["the images' classes are not known"], *[["no channel has two clusters"]] * 2]


def test_other_figures_take_names_of_concepts():
    names = ["cats", "dogs"]
    images, maps = torch.rand(4, 8, 8), (torch.rand(4, 8, 8), torch.rand(4, 2, 8, 8))
    heat = heatmap_figure(images, ConceptHeatmaps(LAYER, 3, [[0], [1]], *maps), concept_names=names)
    channel = ChannelVisualization(LAYER, 3, [[0], [1]], torch.rand(3, 20, 20), torch.rand(2, 3, 20, 20))
    visual = visualization_figure([channel], class_names=["only one"], concept_names={(LAYER, 3): names})
    activations = (torch.ones(4), torch.ones(4, 2))
    split = split_figure(images, torch.tensor([0, 1, -1, 0]), *activations, [[0], [1]], concept_names=names)
    for figure in (heat, visual, split):
        assert set(names) <= set(texts(figure))
        assert not {"0", "1"} & set(texts(figure))
    assert "grey frame: image of none of the concepts" in texts(split)


def test_concepts_without_a_name_are_refused():
    images, maps = torch.rand(4, 8, 8), (torch.rand(4, 8, 8), torch.rand(4, 2, 8, 8))
    channel = ChannelVisualization(LAYER, 3, [[0], [1]], torch.rand(3, 20, 20), torch.rand(2, 3, 20, 20))
    message = "`concept_names` to name 2 concepts, but got 1 names"
    with pytest.raises(ValueError, match=message):
        heatmap_figure(images, ConceptHeatmaps(LAYER, 3, [[0], [1]], *maps), concept_names=["cats"])
    with pytest.raises(ValueError, match=message):
        split_figure(
            images,
            torch.zeros(4).long(),
            maps[0].mean((1, 2)),
            maps[1].mean((2, 3)),
            [[0], [1]],
            concept_names=["cats"],
        )
    with pytest.raises(ValueError, match=message):
        visualization_figure([channel], concept_names={(LAYER, 3): ["cats"]})
    with pytest.raises(ValueError, match=f"concepts of channel 3 of layer `{LAYER}`, but that channel is missing"):
        visualization_figure([channel], concept_names={(LAYER, 4): ["cats", "dogs"]})


@variants
def test_nothing_overlaps_in_figures_of_clusters(options):
    report = cluster_report(**options)
    names = report.class_names
    parts = torch.zeros(3, 3, 9, 9)
    lead = SimpleNamespace(original=torch.zeros(3, 9, 9), parts=parts)
    cards = [card_figure(report.cards[1], class_names=names, visualization=lead)]
    cards += [card_figure(card, class_names=names) for card in report.cards]
    for figure in cards:
        assert_nothing_overlaps(figure)
    overviews = [class_similarity_figure(card, class_names=names) for card in report.cards]
    overviews += [similarity_figure(report.overviews[0]), relevance_figure(report.overviews[0], class_names=names)]
    for figure in [*cards, *overviews]:
        check_layout(figure)


# -------------------------------------------------------------------------------------------------------- page


@variants
def test_the_page_is_about_clusters(options, no_figures):
    page = Page(to_html(cluster_report(**options)))
    for expected in (
        "come out the same in two halves of the images",
        "Cluster pairs flagged",
        "Least similar clusters",
        "cluster 1, cluster 3",
        "How similar its clusters are",
        "Filter by concept, layer or channel",
        "the concept that they belong to",
        "stability 0.93",
    ):
        assert expected in page.text
    for absent in (
        "Other settings",
        "relevant for several classes",
        "pairs of classes",
        "their class belongs to",
        "full class",
    ):
        assert absent not in page.text


def table_of(page):
    """Texts of the cells of the table of channels, row by row."""
    table = page.partition('<table id="channels" class="clusters">')[2].partition("</table>")[0]
    rows = table.partition("<tbody>")[2].split("</tr>")[:-1]
    return [Page(row[row.index("<tr") :] + "</tr>").text for row in rows]


def test_the_table_shows_names_contents_and_stability(no_figures):
    report = cluster_report(described=True)
    page = to_html(report)
    assert "Stability</button>" in page
    for row, found in zip(table_of(page), report.channels, strict=True):
        assert f"{found.stability:.2f}" in row
        for number, content in enumerate(found.contents):
            assert f"{number}: {ONE_LINE}" in row
            assert (
                " ".join(f"class {label} {share:.0%}".replace("%", " %") + "," for label, share in content[:4]) in row
            )


def test_a_name_that_tells_the_contents_stands_there_once(no_figures):
    report = cluster_report(1)
    (row,) = table_of(to_html(report))
    (label, share), *_ = report.channels[0].contents[0]
    assert row.count(f"class {label} {share:.0%}".replace("%", " %")) == 1
    assert " ".join(row.split()).count("%") == 10, "all that fills the two clusters, also what names leave out"
    (row,) = table_of(to_html(cluster_report(1, labels=False)))
    assert "cluster 1 2 cluster 2" in row
    assert "%" not in row


def test_pictures_are_described_by_class_and_concept(no_figures):
    report = cluster_report(1)
    alts = [one["alt"] for one in Page(to_html(report)).all("img")]
    assert "class 0, concept 1, activation 9" in alts
    assert "class 4, of no concept, activation 5" in alts
    alts = [one["alt"] for one in Page(to_html(cluster_report(1, labels=False))).all("img")]
    assert "concept 1, activation 9" in alts
    assert not any("class" in alt for alt in alts if "activation" in alt)


HOSTILE = ['"><img src=x onerror=alert(1)>', "<script>alert(1)</script>", "' onmouseover='alert(1)"]


def test_names_of_clusters_are_text_whatever_they_look_like(no_figures):
    report = cluster_report()
    said = {key: HOSTILE[: len(names)] for key, names in report.concept_names.items()}
    cards = [replace(card, names=said[card.layer, card.channel]) for card in report.cards]
    page = Page(to_html(replace(report, _saved_names=said, _saved_cards=cards)))
    assert len(page.all("script")) == 1
    assert {name for _, own in page.elements for name in own if name.startswith("on")} == set()
    assert {one["src"][:11] for one in page.all("img")} == {"data:image/"}
    for text in HOSTILE:
        assert any(text == data for _, data in page.texts), text


def test_without_classes_the_page_has_no_empty_picture():
    names = [
        drawing.title for drawing in html_figures.overview_drawings(cluster_report(), cluster_report().overviews[0])
    ]
    assert names == ["Similarities", "Classes of the strongest images", "Quality of the splits"]
    report = cluster_report(labels=False)
    names = [drawing.title for drawing in html_figures.overview_drawings(report, report.overviews[0])]
    assert names == ["Similarities", "Quality of the splits"]


def test_no_flagged_channel_still_says_how_close_it_was(no_figures):
    page = Page(to_html(cluster_report(0)))
    assert "9 of 64 channels have several clusters; the lowest similarity of two of them is 0.05." in page.text
    assert (
        f"Closest in {LAYER}: channel 60, of which cluster 1 and cluster 2 have a similarity of 0.610, against"
        in page.text
    )


def test_a_card_whose_channel_is_not_listed_has_its_names(no_figures):
    report = cluster_report(1, described=True)
    page = Page(to_html(replace(report, channels=[], pairs=[])))
    assert f"1: {ONE_LINE}" in page.text


def test_a_cluster_report_from_a_file_makes_the_same_page(no_figures, tmp_path):
    report = cluster_report(described=True, images=False)
    report.save(tmp_path / "report.json")
    loaded = PolysemanticityReport.load(tmp_path / "report.json")
    assert to_html(loaded) == to_html(report)
    assert loaded.to_markdown() == report.to_markdown()


@pytest.mark.parametrize("width", [390, 1280])
@variants
def test_nothing_overlaps_or_sticks_out_of_the_page(show, no_figures, options, width):  # noqa: F811
    page = show(cluster_report(12, **options), width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for parts in (".card:nth-of-type(1) :is(.name, .cluster-name)", "#channels :is(.name, .cluster-name)"):
        assert page.locator(parts).evaluate_all(OVERLAPS) == 0, parts
    if width > 1000:
        assert page.locator(".scroll:has(#channels)").evaluate("one => one.scrollWidth <= one.clientWidth")
    if options.get("described"):
        name = page.locator("#channels .cluster-name").first
        assert name.evaluate("one => one.scrollHeight <= one.clientHeight + 1 || one.title.length > 60")
        assert name.inner_text().startswith("0: <b>faces</b>")


def test_long_names_of_clusters_unfold(show, no_figures):  # noqa: F811
    report = cluster_report(1, described=True)
    said = {key: [f"{n}: {ONE_LINE} {'and so on ' * 20}" for n in range(2)] for key in report.concept_names}
    page = show(replace(report, _saved_names=said))
    name = page.locator("#channels .cluster-name").first
    cut = "one => one.scrollHeight > one.clientHeight + 1"
    assert name.evaluate(cut)
    assert name.get_attribute("title").endswith("and so on ")
    page.check("#full-names")
    assert not name.evaluate(cut)


# ------------------------------------------------------------------------------------------- tables and loggers


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
    assert "│ 1: 0: <b>faces</b> of dogs | cats,… │" in text
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
