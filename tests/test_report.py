import base64
import io
import json
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from rich.console import Console

from lightning_polydis import PolysemanticityReport, find_polysemantic_channels
from lightning_polydis.cards import ChannelCard, LayerOverview
from lightning_polydis.report_tables import concept_text
from tests.networks import conv_relu_net, make_batches, train_briefly
from tests.sample_reports import sample_report

SETTINGS = {"relevance_threshold": 0.05, "class_fraction": 0.5, "similarity_threshold": 0.9, "progress": False}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return train_briefly(conv_relu_net())


@pytest.fixture
def report(net):
    names = ["cat | dog", "<b>bird</b>", "fish [wild]", "ant[/y]"]
    return find_polysemantic_channels(net, make_batches(), ["2", "4"], class_names=names, **SETTINGS)


FIELDS = ("layers", "channels", "pairs", "settings", "n_images", "n_images_left_out", "class_names", "notes")


@pytest.mark.parametrize("with_quality", [False, True])
def test_a_report_comes_back_from_its_file(report, with_quality, tmp_path):
    expected = report.quality if with_quality else []
    assert bool(expected) == with_quality
    report.save(tmp_path / "report.json")
    loaded = PolysemanticityReport.load(tmp_path / "report.json")
    for name in FIELDS:
        assert getattr(loaded, name) == getattr(report, name), name
    if with_quality:
        assert loaded.quality == expected
    assert loaded.to_markdown() == report.to_markdown()
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "report.json").read_text()


def test_a_loaded_report_holds_no_samples_and_says_so(report, tmp_path):
    report.save(tmp_path / "report.json")
    loaded = PolysemanticityReport.load(tmp_path / "report.json")
    with pytest.raises(ValueError, match="loaded from a file, which holds no calibration samples"):
        _ = loaded.plan
    with pytest.raises(ValueError, match="loaded from a file"):
        loaded.plan_pairs([("2", 0, 0, 1)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "newer lightning_polydis"),
        ({"kind": "else"}, "but got `else`"),
        ({"channels": [{"layer": "a"}]}, "is damaged: TypeError"),
        ({"layers": None}, "is damaged"),
    ],
)
def test_damaged_reports_are_refused_in_words(report, change, message, tmp_path):
    path = tmp_path / "report.json"
    report.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        PolysemanticityReport.load(path)


def damaged_picture(content):
    content["cards"][0]["rows"][0]["images"][0]["jpeg"] = base64.b64encode(b"no picture").decode()
    return content


def test_a_damaged_picture_does_not_stop_a_report(tmp_path):
    path = tmp_path / "report.json"
    sample_report().save(path)
    path.write_text(json.dumps(damaged_picture(json.loads(path.read_text()))))
    loaded = PolysemanticityReport.load(path)
    damaged, *others = loaded.cards[0].rows[0].images
    assert damaged.pixels is None
    assert [image.pixels.shape for image in others] == [(3, 48, 48)] * 7
    loaded.to_html(tmp_path / "report.html")
    assert json.loads(json.dumps(loaded.to_json()))["cards"] == json.loads(path.read_text())["cards"]


def test_pictures_from_a_file_are_decoded_when_asked_for_and_never_encoded_again(tmp_path, monkeypatch):
    report = sample_report()
    report.save(tmp_path / "report.json")

    def forbidden(*args, **kwargs):
        raise AssertionError("neither decoded nor encoded")

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", forbidden)
        patch.setattr(Image.Image, "save", forbidden)
        loaded = PolysemanticityReport.load(tmp_path / "report.json")
        loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "report.json").read_bytes()
    ours, theirs = (one.cards[0].rows[0].images[0] for one in (loaded, report))
    assert (ours.pixels.float() - theirs.pixels.float()).abs().mean() < 60  # JPEG of noise


@pytest.mark.parametrize("cut", [None, (9, 70)])
def test_what_a_card_leaves_out_is_in_its_file(cut):
    report = sample_report(n_flagged=1)
    (card,) = report.cards
    if cut is not None:
        card = replace(card, n_concepts=cut[0], n_classes=cut[1])
    loaded = ChannelCard.from_json(json.loads(json.dumps(card.to_json())))
    assert (loaded.n_concepts, loaded.n_classes) == (cut or (None, None))
    older = {key: value for key, value in card.to_json().items() if key not in ("n_concepts", "n_classes")}
    assert ChannelCard.from_json(older).n_concepts is None


def test_near_misses_of_older_files_have_one_similarity():
    (overview,) = sample_report().overviews
    content = overview.to_json()
    for miss in content["near_misses"]:
        del miss["compared"]
    assert [miss.compared for miss in LayerOverview.from_json(content).near_misses] == [0.61, 0.7]


def test_markdown_is_a_table_whatever_the_class_names(report):
    lines = report.to_markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(report.channels)
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    short = report.to_markdown(max_rows=2)
    assert f"{len(report.channels) - 2} more in the report." in short
    assert len([line for line in short.splitlines() if line.startswith("|")]) == 4


def test_markdown_measures_no_quality_and_says_so(report):
    text = report.to_markdown()
    assert "distortion" not in text
    assert text.endswith("\n\nThe quality of the splits was not measured.")
    assert report.known_plan is None, "no split was solved for"
    assert report.to_markdown() == text
    report.judge()
    assert "| distortion | leak |" in report.to_markdown()
    assert "not measured" not in report.to_markdown()


def test_counts_of_one_are_told_in_the_singular():
    one = sample_report(1, n_channels=1)
    (layer,) = one.layers
    one = replace(one, n_images=1, layers=[replace(layer, n_candidates=1, n_candidate_pairs=1, n_pairs=1)])
    summary = "1 of 1 channel polysemantic, 1 candidate, 1 of 1 class pair flagged, "
    assert summary in one.to_markdown()
    text = " ".join(printed(one, width=200).split())
    assert "1 polysemantic channel (1 image)" in text
    assert summary in text
    assert repr(one).startswith("PolysemanticityReport(1 image; ")


def printed(report, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report.to_table())
    return console.export_text()


def test_the_table_of_one_layer_fits_a_narrow_console(net):
    report = find_polysemantic_channels(net, make_batches(), "2", **SETTINGS)
    _ = report.quality
    text = printed(report, width=80)
    assert "distortion" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_console_table_shows_layers_concepts_and_quality(report):
    _ = report.quality
    text = printed(report, width=200)
    assert f"{len(report.channels)} polysemantic channels (48 images)" in text
    assert "distortion" in text
    assert "<b>bird</b>" in text
    assert "[wild]" in text


def test_nothing_found_still_says_how_close_it_was(net):
    report = find_polysemantic_channels(net, make_batches(), "2", **{**SETTINGS, "similarity_threshold": -0.99})
    assert report.channels == []
    assert report.plan.splits == []
    layer = report.layers[0]
    assert f"cosine similarity {layer.min_cosine:.2f} to {layer.max_cosine:.2f}" in report.to_markdown()
    assert "|" not in report.to_markdown()


def test_scalars_are_those_of_the_layers(report):
    scalars = report.scalars()
    assert scalars["polydis/2/n_polysemantic"] == len([c for c in report.channels if c.layer == "2"])
    assert scalars["polydis/4/n_pairs"] == len([p for p in report.pairs if p.layer == "4"])
    assert scalars["polydis/2/min_cosine"] == min(p.cosine_similarity for p in report.pairs if p.layer == "2")
    assert set(scalars) == {
        f"polydis/{layer}/{name}"
        for layer in ("2", "4")
        for name in ("n_polysemantic", "n_pairs", "n_candidates", "mean_cosine", "min_cosine")
    }


def test_a_dataframe_holds_one_row_for_each_channel(report):
    frame = report.to_dataframe()
    assert list(frame["channel"]) == [channel.channel for channel in report.channels]
    assert "cosine_similarity" in frame.columns


def test_without_pandas_the_extra_is_named(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-polydis\[pandas\]'"):
        report.to_dataframe()


def test_labels_are_names_or_numbers(report, net):
    assert report.label(2) == "fish [wild]"
    nameless = find_polysemantic_channels(net, make_batches(), "2", **SETTINGS)
    assert nameless.label(2) == "2"
    damaged = replace(report, class_names=["cat"])
    assert [damaged.label(index) for index in (0, 1, -1)] == ["cat", "1", "-1"]
    assert "fish" not in printed(damaged, 100)


def test_long_concepts_are_cut(report):
    assert concept_text(report, [0, 1, 2, 3]) == "cat | dog, <b>bird</b>, fish [wild], ant[/y]"
    assert concept_text(report, [0, 1, 2, 3, 3, 3]).endswith(", ant[/y], +2")


def test_changed_weights_are_noticed(report, net):
    assert not report.differs_from(net)
    changed = conv_relu_net()
    changed.load_state_dict(net.state_dict())
    changed[4].weight.data[0, 0] += 1e-6
    assert report.differs_from(changed)


def test_the_representation_is_short(report):
    first, second = (f"{layer.n_polysemantic} of {layer.n_channels} of" for layer in report.layers)
    assert repr(report) == (
        f"PolysemanticityReport({report.n_images} images; polysemantic channels: {first} '2', {second} '4')"
    )
    assert report.layers[0].n_polysemantic
