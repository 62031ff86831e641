"""How the HTML page behaves in a browser."""

import re
import time
from dataclasses import replace

import pytest

from lightning_polydis.html_cards import luminance_of
from tests.pages import HOSTILE, OVERLAPS, hostile_report
from tests.sample_reports import sample_report

pytestmark = pytest.mark.usefixtures("no_figures")

LONG = [f"{number:04d} a class whose name is as long as data sets have them {'x' * 9}" for number in range(1000)]


def column(page, number):
    return page.locator(f"#channels tbody tr:not([hidden]) > :nth-child({number})").evaluate_all(
        "cells => cells.map(cell => cell.dataset.value)"
    )


def test_hostile_names_do_nothing_in_a_browser(show):
    page = show(hostile_report())
    names = page.locator("#channels .name").all_inner_texts()
    assert any(name == HOSTILE[0] for name in names)
    page.mouse.move(600, 500)
    page.locator("#channels tr").first.hover()
    assert page.locator("script").count() == 1


def test_headers_sort_by_mouse_and_keyboard(show):
    report = sample_report(n_flagged=12)
    unknown = [
        replace(found, reliability=None if found.channel % 3 else found.channel / 20) for found in report.channels
    ]
    page = show(replace(report, channels=unknown))
    heads = page.locator("#channels thead th")
    names = [text.strip() for text in heads.all_inner_texts()]
    assert heads.nth(names.index("Cosine")).get_attribute("aria-sort") == "ascending"
    place = names.index("Distortion")
    button = heads.nth(place).locator("button")
    button.click()
    ascending = [float(value) for value in column(page, place + 1)]
    assert ascending == sorted(ascending)
    assert len(ascending) == 12
    assert heads.nth(place).get_attribute("aria-sort") == "ascending"
    assert page.locator("#channels [aria-sort]").count() == 1
    button.focus()
    page.keyboard.press("Enter")
    assert [float(value) for value in column(page, place + 1)] == ascending[::-1]
    assert "sorted by Distortion, descending" in page.inner_text("#shown")
    place = names.index("Reliability")
    for expected in (["0", "0.15", "0.3", "0.45"], ["0.45", "0.3", "0.15", "0"]):
        heads.nth(place).locator("button").click()
        found = column(page, place + 1)
        assert [f"{float(value):g}" for value in found[:4]] == expected
        assert found[4:] == [""] * 8  # what was not measured comes last


def test_the_table_is_filtered_and_says_how_much_is_left(show, two_layers):
    page = show(two_layers)
    status = page.locator("#shown")
    assert status.get_attribute("aria-live") == "polite"
    assert status.inner_text() == "8 of 8 channels shown."
    page.select_option("#filter-layer", "net.layer4.2.conv3")
    assert status.inner_text() == "4 of 8 channels shown."
    assert set(column(page, 1)) == {"net.layer4.2.conv3"}
    page.check("#filter-clear")
    assert status.inner_text() == "2 of 8 channels shown."
    page.uncheck("#filter-clear")
    page.fill("#filter-text", "CLASS nothing")
    page.get_by_text("0 of 8 channels shown.").wait_for()
    page.fill("#filter-text", "")
    page.get_by_text("4 of 8 channels shown.").wait_for()


def test_the_table_leads_to_the_cards_and_back(show):
    page = show(sample_report())
    page.locator("#channels a").nth(1).click()
    heading = page.locator("article:target h3")
    assert heading.inner_text() == "Channel 1 of net.layer4.2.conv3"
    assert heading.evaluate("one => { const box = one.getBoundingClientRect(); return box.top >= 0 && box.top < 300; }")
    page.locator("article:target >> text=to the table").click()
    assert page.evaluate("location.hash") == "#channels-title"


def test_the_first_stop_of_the_keyboard_skips_to_the_report(show):
    page = show(sample_report())
    page.keyboard.press("Tab")
    focused = page.locator(":focus")
    assert focused.inner_text() == "Skip to the report"
    assert focused.bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("n_flagged", [0, 1, 40])
def test_nothing_overlaps_or_sticks_out(show, n_flagged, width):
    page = show(sample_report(n_flagged=n_flagged, n_classes=1000, class_names=LONG), width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for parts in (".card:nth-of-type(1) .name", "#channels tbody tr:nth-child(-n+20) .name", "main > section"):
        assert page.locator(parts).evaluate_all(OVERLAPS) == 0, parts


def test_long_names_are_cut_with_a_tooltip_and_shown_in_full_on_demand(show):
    page = show(sample_report(n_classes=1000, class_names=LONG))
    name = page.locator("#channels .name").first
    assert len(name.get_attribute("title")) > 60
    cut = "one => one.scrollWidth > one.clientWidth"
    assert name.evaluate(cut)
    page.check("#full-names")
    assert not name.evaluate(cut)


def test_a_large_report_is_small_enough_and_opens_quickly(show, tmp_path, real_figures):
    report = sample_report(n_flagged=500, n_classes=1000, n_channels=2048, class_names=LONG)
    report.to_html(tmp_path / "report.html")
    assert 2**20 < (tmp_path / "report.html").stat().st_size < 20 * 2**20
    started = time.perf_counter()
    page = show(None)
    assert page.inner_text("#shown") == "500 of 500 channels shown."
    assert time.perf_counter() - started < 10  # about a second where nothing else runs
    started = time.perf_counter()
    page.locator("#channels th button").nth(6).click()
    assert "sorted by" in page.inner_text("#shown")
    assert time.perf_counter() - started < 3


def test_a_class_beyond_the_first_names_is_found_and_can_be_unfolded(show):
    report = sample_report(n_flagged=1, n_classes=300)
    found = replace(report.channels[0], concepts=[list(range(100)), list(range(100, 300))])
    page = show(replace(report, channels=[found]))
    assert page.locator("#channels summary").all_inner_texts() == ["+97 more", "+197 more"]
    page.fill("#filter-text", "class 117")
    page.get_by_text("1 of 1 channel shown.").wait_for()
    page.locator("#channels summary").nth(1).click()
    assert "class 117" in page.inner_text("#channels details[open]")
    assert "and 160 others, in report.json" in page.inner_text("#channels details[open]")


def test_print_unfolds_everything_and_leaves_the_controls_out(show):
    page = show(sample_report(), media="print")
    assert not page.locator("nav").is_visible()
    assert not page.locator("#filter-text").is_visible()
    closed = page.locator("details:not([open])").count()
    assert closed > 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() == closed
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_the_page_follows_the_colour_scheme(show, scheme, is_dark):
    page = show(sample_report(images=False), color_scheme=scheme)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance_of([int(part) for part in re.findall(r"\d+", ground)[:3]]) < 0.1) == is_dark
