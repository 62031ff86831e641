"""The page of a report whose concepts are clusters of images."""

from dataclasses import replace

import pytest

pytest.importorskip("matplotlib")

from lightning_polydis import PolysemanticityReport, html_figures
from lightning_polydis.html import to_html
from tests.clusters.reports import LAYER, ONE_LINE, variants
from tests.pages import OVERLAPS, Page
from tests.sample_reports import cluster_report


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
                " ".join(f"class {label} ({share:.0%})".replace("%", " %") + "," for label, share in content[:4]) in row
            )


def test_a_name_that_tells_the_contents_stands_there_once(no_figures):
    report = cluster_report(1)
    (row,) = table_of(to_html(report))
    (label, share), *_ = report.channels[0].contents[0]
    assert row.count(f"class {label} ({share:.0%})".replace("%", " %")) == 1
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
def test_nothing_overlaps_or_sticks_out_of_the_page(show, no_figures, options, width):
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


def test_long_names_of_clusters_unfold(show, no_figures):
    report = cluster_report(1, described=True)
    said = {key: [f"{n}: {ONE_LINE} {'and so on ' * 20}" for n in range(2)] for key in report.concept_names}
    page = show(replace(report, _saved_names=said))
    name = page.locator("#channels .cluster-name").first
    cut = "one => one.scrollHeight > one.clientHeight + 1"
    assert name.evaluate(cut)
    assert name.get_attribute("title").endswith("and so on ")
    page.check("#full-names")
    assert not name.evaluate(cut)
