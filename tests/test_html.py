"""The HTML page: what it says, that nothing gets out of its text, and how it behaves in a browser."""

import base64
import hashlib
import io
import itertools
import re
import shutil
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from lightning_polydis import PolysemanticityReport, PolysemanticPair, html_figures
from lightning_polydis.cards import CardImage
from lightning_polydis.html import TEMPLATES, to_html
from lightning_polydis.html_cards import DARK, MAX_CLASSES, chip_of, luminance_of
from lightning_polydis.summary import LayerSummary
from tests.sample_reports import sample_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "img", "input", "br", "wbr", "hr", "link"}
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></style></script><script>alert(1)</script>",
    "{{ 1234 * 10 }}{% raw %}",
    "&lt;b&gt; &amp;",
    "javascript:alert(1)",
    "<svg/onload=alert(1)>",
    "-->]]><!--",
    "\u202egnp.exe \U0001f600 \N{COMBINING ACUTE ACCENT}",
]


@pytest.fixture
def real_figures():
    """Asked for by tests that want matplotlib to draw; the others need not wait for it."""


@pytest.fixture(autouse=True)
def _no_figures(request, monkeypatch):
    if "real_figures" not in request.fixturenames:
        monkeypatch.setattr(html_figures, "_picture", lambda draw: ("data:image/png;base64,", 300, 200))


class Page(HTMLParser):
    """Elements, attributes and texts of a page."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self._open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, "elements are not nested"

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else "", data))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(data for tag, data in self.texts if tag not in ("script", "style")).split())


@pytest.fixture(scope="module")
def two_layers():
    return sample_report(n_flagged=4, layers=("net.layer3.5.conv2", "net.layer4.2.conv3"))


def without(report, *names):
    return replace(report, **{f"_saved_{name}": None for name in names})


def test_the_page_says_what_the_report_says(two_layers):
    page = Page(to_html(two_layers))
    assert page.all("html") == [{"lang": "en"}]
    for expected in [
        "8 of 128 channels flagged, on 500 images",
        "2 of 10 classes had no images and were left out.",
        "Flags that are not clear: 4 of 8",
        "similarity_threshold auto",
        "Weights analysed: those of the network when it was analysed (epoch 4, step 500)",
        "Channel 3 of net.layer4.2.conv3",
        "How to read this",
        "arXiv:2504.12939",
    ]:
        assert expected in page.text
    assert len([one for one in page.all("tr") if "data-layer" in one]) == 8


def test_rows_come_with_the_lowest_similarity_first_and_a_link_to_their_card(two_layers):
    page = to_html(two_layers)
    values = [float(value) for value in re.findall(r'<td class="number" data-value="([\d.]+)">[\d.]+<span', page)]
    assert values == sorted(values)
    assert len(values) == 8
    ids = {attributes["id"] for _, attributes in Page(page).elements if "id" in attributes}
    links = [one["href"] for one in Page(page).all("a") if one["href"].startswith("#")]
    assert {link.removeprefix("#") for link in links} <= ids
    assert len([link for link in links if link.startswith("#card-")]) == 8


def test_ids_are_unique_and_headings_skip_no_level(two_layers):
    page = Page(to_html(two_layers))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_pictures_are_described_in_numbers(two_layers, real_figures):
    page = Page(to_html(two_layers))
    alts = [one["alt"] for one in page.all("img")]
    assert len(alts) > 100
    assert all(re.search(r"\d", alt) for alt in alts)
    assert any(re.fullmatch(r"class \d, concept [12], activation [\d.]+", alt) for alt in alts)
    drawn = [one for one in page.all("svg") if "aria-hidden" not in one]
    assert len(drawn) == 8 * 3
    for one in drawn:
        assert one["role"] == "img"
        assert re.search(r"on images of concept 1 median [\d.]+, middle half .* \(40 images\)", one["aria-label"])


def test_every_control_has_a_label(two_layers):
    page = Page(to_html(two_layers))
    labelled = {one.get("for") for one in page.all("label")}
    for one in page.all("input") + page.all("select"):
        assert one["id"] in labelled or one["type"] == "checkbox"  # checkboxes stand inside their labels
    assert all("scope" in one for one in page.all("th"))


def hostile_report():
    report = sample_report(class_names=HOSTILE, layers=("net.<script>alert(2)</script>", 'a"onclick="b'))
    settings = {**report.settings, "attribution": "<i>x</i>", "<u>key</u>": ["<b>", '"']}
    return replace(report, notes=[*report.notes, *HOSTILE], settings=settings)


def test_whatever_comes_from_outside_is_text():
    written = to_html(hostile_report())
    page = Page(written)
    assert len(page.all("script")) == 1
    assert len(page.all("style")) == 1
    assert len(page.all("title")) == 1 + len([one for one in page.all("svg") if "aria-hidden" not in one])
    assert {name for _, own in page.elements for name in own if name.startswith("on")} == set()
    assert {one["src"][:11] for one in page.all("img")} == {"data:image/"}
    for text in HOSTILE:
        assert any(text == data for _, data in page.texts), text
    assert {tag for tag, _ in page.elements} & {"i", "u", "iframe"} == set()
    assert "12340" not in written
    assert "<script>alert(" not in written


def test_nothing_is_loaded_from_elsewhere(two_layers):
    written = to_html(two_layers)
    page = Page(written)
    sources = [own[name] for _, own in page.elements for name in ("src", "srcset", "data", "poster") if name in own]
    assert all(source.startswith("data:image/") for source in sources)
    assert page.all("link") == page.all("iframe") == page.all("object") == page.all("base") == []
    links = {own["href"] for tag, own in page.elements if "href" in own if not own["href"].startswith("#")}
    assert links == {"https://arxiv.org/abs/2504.12939"}
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp|import\(", "".join(d for t, d in page.texts if t != "p"))


def test_the_policy_lets_only_the_pages_own_script_run(two_layers):
    page = Page(to_html(two_layers))
    (script,) = [data for tag, data in page.texts if tag == "script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [one["content"] for one in page.all("meta") if "http-equiv" in one]
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_without_matplotlib_the_page_names_the_extra_and_shows_the_rest(monkeypatch, real_figures):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Page(to_html(sample_report()))
    assert "pip install 'lightning-polydis[figures]'" in page.text
    assert "Histogram of the similarities of" in page.text
    assert {one["src"].partition(";")[0] for one in page.all("img")} == {"data:image/jpeg"}


def test_no_flag_shows_how_close_it_was_and_what_to_try():
    page = Page(to_html(sample_report(n_flagged=0)))
    assert "No channel was flagged" in page.text
    assert (
        "channel 60, whose classes class 0 and class 1 have a similarity of 0.610, 0.550 with noise taken out, "
        "against a threshold of 0.500"
    ) in page.text
    assert sample_report(n_flagged=0).suggest_settings().reason in page.text
    assert [one for one in page.all("details") if "open" in one]
    assert not [one for one in page.all("table") if one.get("id") == "channels"]


def test_no_candidate_at_all_says_which_settings_let_more_in():
    layer = LayerSummary("conv", 8, 4, 0, 0, 0, 0, 1.0, 1.0, 1.0)
    page = Page(to_html(PolysemanticityReport([layer], [], [], {}, n_images=100)))
    assert "none of its 8 channels is relevant for two classes" in page.text
    assert "relevance_threshold" in page.text


def test_settings_worth_trying_are_ready_to_copy():
    report = sample_report()
    suggested = report.suggest_settings().arguments()
    other = {**report.settings, "relevance_threshold": report.sweeps[0].relevance_thresholds[0]}
    page = Page(to_html(replace(report, settings=other)))
    (code,) = [data for tag, data in page.texts if tag == "code" and "find_poly" in data] or [""]
    changed = replace(report, settings=other).suggest_settings().arguments()
    assert bool(code) == (changed != {key: other[key] for key in changed})
    assert suggested["relevance_threshold"] == 0.03


def test_a_suggestion_is_code_that_runs():
    sweep = sample_report().sweeps[0]
    generous = replace(sweep, n_candidates=[[9, 2], [3, 2], [3, 2]])
    page = Page(to_html(replace(sample_report(), _saved_sweeps=[generous])))
    (code,) = [data for tag, data in page.texts if tag == "code" and "find_poly" in data]
    called = {}
    eval(code, {"find_polysemantic_channels": lambda *_, **given: called.update(given), "model": 0, "batches": 0})
    assert called == {
        "layers": "net.layer4.2.conv3",
        "method": "optimized",
        "relevance_threshold": 0.01,
        "class_fraction": 0.5,
        "similarity_threshold": "auto",
    }


def test_a_bare_report_makes_a_page_too(two_layers):
    bare = without(two_layers, "quality", "sweeps", "cards", "overviews")
    page = Page(to_html(replace(bare, history=[], class_names=None)))
    for absent in ("Layers at a glance", "Cards", "Other settings", "History", "Distortion"):
        assert absent not in page.text
    assert "The quality of the splits was not measured" in page.text
    assert "class 3" in page.text


def test_classes_without_a_name_have_their_number(real_figures):
    page = Page(to_html(sample_report(class_names=["only one"])))
    assert "only one" in page.text
    assert "class 9" in page.text


def test_what_was_not_measured_is_a_dash():
    report = sample_report()
    unknown = [replace(found, reliability=None, is_clear=None) for found in report.channels[:1]]
    page = to_html(replace(report, channels=[*unknown, *report.channels[1:]]))
    dash = "\N{EN DASH}"
    assert page.count(f'<td class="number" data-value="">{dash}</td>') == 1
    assert page.count(f'<td data-value="">{dash}</td>') == 1
    alone = to_html(replace(report, channels=unknown))
    assert "Reliability</button>" not in alone
    assert "Clear</button>" not in alone


def test_exchanged_weights_are_named():
    note = "Analysed: the weights that `EMA` puts in place for validation, not those in training."
    page = Page(to_html(replace(sample_report(), notes=[note])))
    assert "Weights analysed: the weights that `EMA` puts in place" in page.text
    assert page.text.count("puts in place") == 1


def test_a_report_from_a_file_makes_the_same_page(tmp_path):
    report = sample_report(images=False)
    report.save(tmp_path / "report.json")
    assert to_html(PolysemanticityReport.load(tmp_path / "report.json")) == to_html(report)


def test_the_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.html"
    sample_report(images=False).to_html(path)
    before = path.read_bytes()
    assert before.rstrip().endswith(b"</html>")

    def full(*_):
        raise OSError("no space")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        sample_report(n_flagged=1, images=False).to_html(path)
    assert path.read_bytes() == before
    assert [one.name for one in path.parent.iterdir()] == ["report.html"]


def test_tables_of_similarities_stay_readable():
    report = sample_report(n_flagged=1, n_classes=60)
    card = report.cards[0]
    concepts = [list(range(20)), list(range(20, 45))]
    wide = replace(card, concepts=concepts, classes=list(range(45)), class_similarities=[[0.5] * 45 for _ in range(45)])
    page = Page(to_html(replace(report, _saved_cards=[wide])))
    assert f"{MAX_CLASSES} of 45 classes" in page.text
    cut = replace(wide, n_concepts=5, n_classes=85)
    page = Page(to_html(replace(report, _saved_cards=[cut])))
    assert "+3 more concepts, 40 more classes" in page.text
    assert f"{MAX_CLASSES} of 85 classes" in page.text


def test_near_misses_name_what_was_compared_where_it_differs():
    report = sample_report()
    page = Page(to_html(report))
    assert "0.610 0.550 0.500" in page.text
    assert "Compared: what is held against the threshold" in page.text
    (overview,) = report.overviews
    plain = [replace(miss, compared=miss.cosine_similarity) for miss in overview.near_misses]
    page = Page(to_html(replace(report, _saved_overviews=[replace(overview, near_misses=plain)])))
    assert "0.610 0.500" in page.text
    assert "Compared" not in page.text


def test_cosine_and_interval_are_those_of_one_flagged_pair():
    """The channel's least similar classes are no flagged pair: under "auto" the raw similarity does not decide."""
    report = sample_report(n_flagged=2)
    found, other = report.channels
    found = replace(found, classes=[1, 2, 3], concepts=[[1], [2, 3]], cosine_similarity=-0.5)
    pairs = [
        PolysemanticPair(found.layer, found.channel, 1, 3, 0.31, (0.21, 0.41), True),
        PolysemanticPair(found.layer, found.channel, 1, 2, 0.11, (0.01, 0.22), True),
    ]
    page = to_html(replace(report, channels=[found, other], pairs=pairs))
    (row,) = re.findall(rf'data-value="{found.channel}".*?</tr>', page, re.DOTALL)
    assert '<td class="number" data-value="0.11">0.11<span class="range">0.01 to 0.22</span></td>' in row
    (row,) = re.findall(rf'data-value="{other.channel}".*?</tr>', page, re.DOTALL)
    value = other.cosine_similarity  # no pair is listed, so no interval is known
    assert f'<td class="number" data-value="{value}">{value:.2f}</td>' in row
    assert "different concepts" not in Page(page).text


def test_flagged_pairs_are_bold_whatever_their_similarity():
    report = sample_report(n_flagged=1)
    card = replace(
        report.cards[0],
        concepts=[[1], [2, 3]],
        classes=[3, 1, 2],
        class_similarities=[[1, 0.71, 0.12], [0.71, 1, 0.13], [0.12, 0.13, 1]],
    )
    pairs = [PolysemanticPair(card.layer, card.channel, 1, 3, 0.71), PolysemanticPair("else", card.channel, 1, 2, 0.1)]
    page = Page(to_html(replace(report, pairs=pairs, _saved_cards=[card])))
    assert [data for tag, data in page.texts if tag == "b"] == ["0.71", "0.71"]


def test_the_page_says_which_samples_it_shows():
    assert "of all calibration samples, also those that chose the split" in Page(to_html(sample_report())).text


def test_a_damaged_picture_is_left_to_the_browser():
    report = sample_report(n_flagged=1)
    card = report.cards[0]
    rows = [replace(row, images=[replace(row.images[0], content=b"no picture")]) for row in card.rows]
    page = Page(to_html(replace(report, _saved_cards=[replace(card, rows=rows)])))
    damaged = f"data:image/jpeg;base64,{base64.b64encode(b'no picture').decode()}"
    assert len([one for one in page.all("img") if one["src"] == damaged and one["alt"]]) == len(rows)


@pytest.mark.parametrize("name", ["a$^$b", "$\\frac$"])
def test_names_that_look_like_formulas_are_drawn(name, real_figures):
    report = sample_report(n_flagged=2, class_names=[name] * 10, layers=(name, f"{name}.2"))
    page = Page(to_html(report))
    assert len([one for one in page.all("img") if one["src"].startswith("data:image/png;base64,i")]) == 9


def test_large_images_are_made_smaller():
    report = sample_report(n_flagged=1)
    card = report.cards[0]
    large = CardImage(torch.full((3, 300, 600), 200, dtype=torch.uint8), card.classes[0], 123456.7)
    rows = [replace(row, images=[large]) for row in card.rows]
    page = Page(to_html(replace(report, _saved_cards=[replace(card, rows=rows)])))
    alts = {one["alt"] for one in page.all("img")}
    sources = [one["src"] for one in page.all("img") if one["src"].startswith("data:image/jpeg;base64,")]
    assert len(sources) == len(rows)
    with Image.open(io.BytesIO(base64.b64decode(sources[0].partition(",")[2]))) as picture:
        assert picture.size == (144, 72)
        assert abs(picture.getpixel((70, 30))[0] - 200) <= 2
    assert any(alt.endswith("activation 123457") for alt in alts)


def test_many_concepts_have_numbers_of_their_own():
    chips = [chip_of(place) for place in range(10)]
    assert [chip.number for chip in chips] == list(range(1, 11))
    assert len({(chip.colour, chip.dash) for chip in chips[:7]}) == 7


def contrast(one, other):
    light, dark = sorted((luminance_of(tuple(bytes.fromhex(colour[1:]))) for colour in (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_texts_have_contrast_in_both_schemes():
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    schemes = [dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in re.findall(r":root \{(.*?)\}", style, re.S)]
    assert len(schemes) == 3  # light, dark, print
    for scheme in schemes:
        for ground in ("page", "panel", "note"):
            assert contrast(scheme["text"], scheme[ground]) >= 7
            assert contrast(scheme["quiet"], scheme[ground]) >= 4.5
            assert contrast(scheme["link"], scheme[ground]) >= 4.5
        assert contrast(scheme["control"], scheme["page"]) >= 3
        assert contrast(scheme["accent"], scheme["page"]) >= 3


def test_chips_have_contrast():
    assert all(contrast(chip_of(place).colour, chip_of(place).ink) >= 4.5 for place in range(7))
    assert chip_of(6).ink == DARK


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    with playwright.sync_playwright() as drive:
        context = drive.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=CHROMIUM,
            headless=True,
            args=[*flags.split(), "--disable-component-update", "--disable-sync"],
        )
        yield context
        context.close()


@pytest.fixture
def show(browser, tmp_path):
    """Open a report's page (`None`: the one that is there); whatever it logs, asks for or says makes the test fail."""
    page, complaints = browser.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: complaints.append(request.url) if "://" in request.url[:8] else None)
    page.on("requestfailed", lambda request: complaints.append(request.url[:100]))

    def opened(report, width=1280, height=900, **media):
        if report is not None:
            report.to_html(tmp_path / "report.html")
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(**media)
        page.goto(f"file://{tmp_path / 'report.html'}")
        return page

    yield opened
    page.close()
    assert [one for one in complaints if not one.startswith("file://")] == []


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


LONG = [f"{number:04d} a class whose name is as long as data sets have them {'x' * 9}" for number in range(1000)]
OVERLAPS = """parts => {
  const boxes = parts.map(part => part.getBoundingClientRect()).filter(box => box.width && box.height);
  let n = 0;
  boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => {
    if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1) n += 1;
  }));
  return n;
}"""


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
    page.get_by_text("1 of 1 channels shown.").wait_for()
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
