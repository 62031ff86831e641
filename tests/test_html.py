"""The HTML page: what it says, and that nothing gets out of its text."""

import base64
import hashlib
import io
import itertools
import re
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from lightning_polydis import PolysemanticityReport, PolysemanticPair
from lightning_polydis.cards import CardImage
from lightning_polydis.html import TEMPLATES, to_html
from lightning_polydis.html_cards import DARK, MAX_CLASSES, chip_of, luminance_of
from lightning_polydis.summary import LayerSummary
from tests.pages import HOSTILE, Page, hostile_report
from tests.sample_reports import sample_report

pytestmark = pytest.mark.usefixtures("no_figures")


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
    assert "no channel is relevant for two classes" in page.text
    assert "relevance_threshold" in page.text


@pytest.mark.parametrize(("n", "channels", "verb"), [(1, "1 channel", "is"), (2, "2 channels", "are")])
def test_counts_of_one_are_told_in_the_singular(n, channels, verb):
    page = Page(to_html(sample_report(n_flagged=n, n_channels=n)))
    assert f"{n} of {channels} flagged, on 500 images." in page.text
    assert f"{n} of {channels} shown." in page.text
    layer = LayerSummary("conv", n, 4, n, n, 0, 0, 1.0, 1.0, 1.0)
    page = Page(to_html(PolysemanticityReport([layer], [], [], {}, n_images=1)))
    assert f"{n} of {channels} {verb} relevant for several classes" in page.text
    assert f"0 of {channels} flagged, on 1 image." in page.text


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
