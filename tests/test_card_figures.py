"""Cards and overview figures show what the report says, and nothing in them overlaps."""

import dataclasses
import io
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from lightning_polydis import ConceptHeatmaps, ConceptQuality, SplitQuality, figures
from lightning_polydis.cards import CardImage, CardRow, ChannelCard, EpochEntry, LayerOverview, SourceShare
from lightning_polydis.figures import (
    CONCEPT_COLOURS,
    OTHER_COLOUR,
    card_figure,
    class_similarity_figure,
    heatmap_figure,
    history_figure,
    quality_figure,
    relevance_figure,
    similarity_figure,
    split_figure,
    sweep_figure,
    visualization_figure,
)
from lightning_polydis.figures.canvas import CAPTION_SIZE
from lightning_polydis.visualization import ChannelVisualization
from tests.sample_reports import sample_report

LONG_NAMES = [f"a very long name of a class of dogs or of sailing boats {index:04}" for index in range(1000)]
LONG_LAYER = "backbone.features.denseblock4.denselayer16.conv2.parametrizations.weight"


def make_card(n_concepts=2, n_images=8, sizes=((48, 48),), stranger=False):
    """A card of concepts of one and two classes; of its images the last class is ``stranger``'s, if there is one."""
    rng = np.random.default_rng(0)
    concepts = [[3 * index, 3 * index + 1][: 1 + index % 2] for index in range(n_concepts)]
    classes = [label for concept in concepts for label in concept]
    targets = [*classes, 999] if stranger else classes
    matrix = rng.uniform(-0.2, 1, (len(classes),) * 2)
    matrix = np.triu(matrix, 1) + np.triu(matrix, 1).T + np.eye(len(classes))

    def images(row):
        return [
            CardImage(
                torch.full((3, *sizes[place % len(sizes)]), (10 * row + place) % 256, dtype=torch.uint8),
                targets[(row + place) % len(targets)],
                9.0 - place,
            )
            for place in range(n_images)
        ]

    return ChannelCard(
        "net.conv",
        7,
        concepts,
        0.1234,
        (-0.05, 0.3),
        0.5,
        0.87,
        [
            CardRow(classes, images(row), [[4.0 + 4 * (row == 1 + place)] * 9 for place in range(n_concepts)])
            for row, classes in enumerate([[], *concepts])
        ],
        [
            [SourceShare(100 * index + place, 6.0 - place - index, 1 - 0.1 * place) for place in range(6)]
            for index in range(n_concepts)
        ],
        classes,
        matrix.tolist(),
    )


def axes_of(figure, label):
    (axes,) = [axes for axes in figure.axes if axes.get_label() == label]
    return axes


def images_of(figure, row):
    return [axes for axes in figure.axes if axes.get_label().startswith(f"row {row}, image")]


def texts(figure):
    return [text.get_text() for text in figure.texts]


def test_a_row_of_a_card_shows_its_images_in_order():
    figure = card_figure(make_card(), n_images=4)
    for row in range(3):
        found = [
            round(255 * float(np.asarray(axes.get_images()[0].get_array()).mean())) for axes in images_of(figure, row)
        ]
        assert found == [10 * row + place for place in range(4)]


def test_frames_and_captions_tell_the_class_of_an_image():
    names = [f"name {label}" for label in range(1000)]
    figure = card_figure(make_card(stranger=True), class_names=names, n_images=4)
    colours = [to_hex(axes.spines["left"].get_edgecolor()).upper() for axes in images_of(figure, 0)]
    assert colours == [CONCEPT_COLOURS[0], CONCEPT_COLOURS[1], CONCEPT_COLOURS[1], OTHER_COLOUR]
    captions = [text.get_text() for text in figure.texts if text.get_fontsize() == CAPTION_SIZE]
    assert captions[:4] == ["name 0", "name 3", "name 4", "name 999"]
    long = [text.get_text() for text in card_figure(make_card(), class_names=LONG_NAMES).texts]
    assert "a very long…" in long
    (note,) = (text.replace("\n", " ") for text in texts(figure) if "grey" in text)
    assert note == "grey frame: image of a class that belongs to none of the concepts"
    assert not any("grey frame" in text for text in texts(card_figure(make_card())))


def test_densities_are_those_of_each_concept():
    figure = card_figure(make_card())
    for row, peaks in enumerate([[4, 4], [8, 4], [4, 8]]):
        lines = axes_of(figure, f"row {row}, densities").get_lines()
        assert [line.get_color() for line in lines] == list(CONCEPT_COLOURS[:2])
        found = [line.get_xdata()[line.get_ydata().argmax()] for line in lines]
        np.testing.assert_allclose(found, peaks, atol=0.05)


def test_bars_are_the_strongest_sources_on_one_scale():
    first, second = (axes_of(card_figure(make_card()), f"row {row}, sources") for row in (1, 2))
    assert [bar.get_width() for bar in first.patches] == [6, 5, 4, 3, 2]
    assert [bar.get_width() for bar in second.patches] == [5, 4, 3, 2, 1]
    assert [label.get_text() for label in second.get_yticklabels()] == ["100", "101", "102", "103", "104"]
    assert [text.get_text() for text in second.texts] == ["100%", "90%", "80%", "70%", "60%"]
    assert first.get_xlim() == second.get_xlim()
    tops = [bar.get_window_extent().y0 for bar in first.patches]
    assert tops == sorted(tops, reverse=True), "the strongest on top"


def test_a_card_names_similarity_interval_threshold_and_reliability():
    figure = card_figure(make_card())
    assert "Channel 7 of net.conv" in texts(figure)
    assert "lowest flagged 0.12\n95 %: -0.05 to 0.30\nthreshold 0.50\nreliability 0.87" in texts(figure)
    unsure = dataclasses.replace(make_card(), interval=None, reliability=None)
    assert "lowest flagged 0.12\nthreshold 0.50" in texts(card_figure(unsure))
    matrix = axes_of(figure, "row 0, similarities").get_images()[0].get_array()
    np.testing.assert_allclose(matrix, make_card().class_similarities)


def test_without_images_there_is_no_room_for_them():
    with_images, without = card_figure(make_card()), card_figure(make_card(n_images=0))
    assert "images that activate it most" in texts(with_images)
    assert "images that activate it most" not in texts(without)
    assert without.get_figwidth() < with_images.get_figwidth() - 5
    assert images_of(without, 0) == []


def test_a_card_of_many_concepts_draws_the_first_seven():
    figure = card_figure(make_card(n_concepts=9))
    assert axes_of(figure, "row 7, densities")
    assert not any(axes.get_label().startswith("row 8") for axes in figure.axes)
    assert any("+2 more concepts" in text.replace("\n", " ") for text in texts(figure))


def cut_card():
    """Two concepts of 41 classes are shown, but of their classes only 30."""
    concepts = [list(range(28)), list(range(100, 113))]
    classes = [*concepts[0], *concepts[1][:2]]
    matrix = np.eye(30).tolist()
    shown = {"concepts": concepts, "classes": classes, "class_similarities": matrix}
    return dataclasses.replace(make_card(), **shown, n_concepts=5, n_classes=70)


def test_what_a_card_leaves_out_is_named():
    whole = make_card()
    assert whole.beyond(2, 3) == ""
    assert whole.beyond(1, 1) == "+1 more concept, 2 more classes"
    assert whole.beyond(2, 2) == "+1 more class"
    figure = card_figure(cut_card())
    assert any("+3 more concepts, 40 more classes" in text.replace("\n", " ") for text in texts(figure))
    strips = axes_of(figure, "row 0, similarities").get_lines()
    assert max(float(np.max(line.get_data())) for line in strips) <= 1, "strips end where the matrix does"
    axes = class_similarity_figure(cut_card()).axes[0]
    assert len(axes.get_xticklabels()) == 30
    assert axes.get_xlabel().endswith("\n+3 more concepts, 40 more classes")
    check_layout(figure)
    check_layout(class_similarity_figure(cut_card(), class_names=LONG_NAMES))


def test_images_of_concepts_that_are_left_out_have_a_grey_frame():
    cut = dataclasses.replace(make_card(stranger=True), n_concepts=5)
    assert any("none of the concepts drawn" in text.replace("\n", " ") for text in texts(card_figure(cut)))


def test_a_visualization_shows_all_concepts_of_a_card_that_is_cut():
    all_five = SimpleNamespace(original=torch.zeros(3, 8, 8), parts=torch.zeros(5, 3, 8, 8))
    assert axes_of(card_figure(cut_card(), visualization=all_five), "row 2, optimised image")


def test_a_damaged_picture_is_skipped():
    card = make_card(n_images=3)
    images = [dataclasses.replace(card.rows[0].images[0], content=b"no picture"), *card.rows[0].images[1:]]
    card = dataclasses.replace(card, rows=[dataclasses.replace(card.rows[0], images=images), *card.rows[1:]])
    assert [axes.get_label() for axes in images_of(card_figure(card), 0)] == ["row 0, image 1", "row 0, image 2"]


def test_a_card_shows_optimised_images():
    parts = torch.stack([torch.full((3, 8, 8), 0.2), torch.full((3, 8, 8), 0.4)])
    figure = card_figure(make_card(), visualization=SimpleNamespace(original=torch.zeros(3, 8, 8), parts=parts))
    found = [
        float(axes_of(figure, f"row {row}, optimised image").get_images()[0].get_array().mean()) for row in range(3)
    ]
    assert found == pytest.approx([0, 0.2, 0.4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_names": ["cat", "dog"]}, "`class_names` to name class 4, but got 2 names"),
        ({"n_images": 0}, "`n_images` to be at least 1, but got 0"),
        ({"visualization": SimpleNamespace(parts=torch.zeros(3, 3, 8, 8))}, "to show 2 concepts, but got 3"),
    ],
)
def test_a_card_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        card_figure(make_card(), **arguments)


# -------------------------------------------------------------------------------------------------- overviews


def make_overview(**changes):
    known = {
        "layer": "net.conv",
        "edges": [0.0, 0.25, 0.5, 0.75, 1.0],
        "n_candidate_pairs": [1, 2, 7, 4],
        "n_flagged_pairs": [1, 1, 0, 0],
        "thresholds": (0.4, 0.4),
        "channels": [5, 9],
        "classes": [2, 4, 6],
        "relevance": [[0.9, 0.1, 0.8], [0.0, 1.0, 0.3]],
        "near_misses": [],
    }
    return LayerOverview(**{**known, **changes})


def test_similarities_are_drawn_with_what_was_flagged_and_the_threshold():
    (axes,) = similarity_figure(make_overview()).axes
    assert [bar.get_height() for bar in axes.patches] == [1, 2, 7, 4, 1, 1, 0, 0]
    (line,) = axes.get_lines()
    assert (list(line.get_xdata()), line.get_label()) == ([0.4, 0.4], "threshold 0.40")
    (axes,) = similarity_figure(make_overview(thresholds=(0.3, 0.45))).axes
    band = axes.patches[-1]
    (left, _), (right, _) = band.get_path().get_extents(band.get_patch_transform()).get_points()
    assert (left, right) == pytest.approx((0.3, 0.45))
    assert band.get_label() == "thresholds of the channels, 0.30 to 0.45"


def test_relevances_are_drawn_by_channel_and_class():
    axes = relevance_figure(make_overview(), class_names=[f"name {label}" for label in range(7)]).axes[0]
    np.testing.assert_array_equal(axes.get_images()[0].get_array(), make_overview().relevance)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["name 2", "name 4", "name 6"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["5", "9"]


def test_of_very_many_classes_the_most_relevant_are_drawn():
    relevance = np.zeros((1, 1000))
    relevance[0, 300:360] = 1
    overview = make_overview(channels=[5], classes=list(range(1000)), relevance=relevance.tolist())
    axes = relevance_figure(overview).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == [str(label) for label in range(300, 360)]
    assert axes.get_xlabel() == "class (940 less relevant ones are not drawn)"


def test_class_similarities_are_drawn_concept_by_concept():
    card = make_card(n_concepts=3)
    axes = class_similarity_figure(card).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "3", "4", "6"]
    np.testing.assert_allclose(axes.get_images()[0].get_array(), card.class_similarities)
    assert axes.texts[1].get_text() == f"{card.class_similarities[0][1]:.2f}"
    strips = {line.get_color() for line in axes.get_lines()}
    assert strips == set(CONCEPT_COLOURS[:3])


def test_of_very_many_classes_each_concept_keeps_some():
    concepts = [list(range(100)), [200, 201]]
    classes = [*concepts[0], *concepts[1]]
    card = dataclasses.replace(make_card(), concepts=concepts, classes=classes, class_similarities=np.eye(102).tolist())
    axes = class_similarity_figure(card).axes[0]
    shown = [int(label.get_text()) for label in axes.get_xticklabels()]
    assert shown == [*range(28), 200, 201]
    assert axes.get_xlabel() == "lowest flagged pair 0.12, threshold 0.50\n+72 more classes"


@pytest.mark.parametrize("draw", [relevance_figure, class_similarity_figure])
def test_a_class_without_a_name_is_refused(draw):
    content = make_overview() if draw is relevance_figure else make_card()
    with pytest.raises(ValueError, match=r"`class_names` to name class \d, but got 1 names"):
        draw(content, class_names=["cat"])


def quality(channel, distortion, leak, before, after, layer="net.conv"):
    concept = ConceptQuality([0], distortion, leak, 0.0, None, after, before, 9, 9)
    return SplitQuality(layer, channel, [concept])


def test_each_split_is_a_point_after_and_one_point_is_before():
    qualities = [quality(1, 0.2, 0.1, 0.6, 0.9), quality(2, 0.4, 0.3, 0.5, 0.8), quality(3, 9, 9, 0, 0, "other")]
    losses, separation = quality_figure(qualities, "net.conv").axes
    after, before = losses.collections
    np.testing.assert_allclose(after.get_offsets(), [[0.2, 0.1], [0.4, 0.3]])
    np.testing.assert_allclose(before.get_offsets(), [[0, 1]])
    assert before.get_label() == "before the split, by definition"
    np.testing.assert_allclose(separation.collections[0].get_offsets(), [[0.6, 0.9], [0.5, 0.8]])
    assert any(line.get_label() == "median: distortion 0.30, leak 0.20" for line in losses.get_lines())


def test_what_is_far_worse_is_at_the_edge_and_what_is_unknown_left_out():
    qualities = [quality(1, 0.2, 0.1, 0.6, 0.9), quality(2, 50.0, 0.3, None, 0.8), quality(3, None, 0.1, 0.5, 0.5)]
    losses, separation = quality_figure(qualities, "net.conv").axes
    assert losses.get_xlim()[1] == 2
    np.testing.assert_allclose(losses.collections[0].get_offsets(), [[0.2, 0.1], [1.97, 0.3]])
    assert losses.get_title() == "a point for each channel; 1 at the edge are worse"
    assert len(separation.collections[0].get_offsets()) == 2


def test_history_counts_and_follows_channels():
    history = [
        EpochEntry(0, 10, "net.conv", 1, 0.8, {3: 0.4}),
        EpochEntry(1, 20, "net.conv", 2, 0.8, {8: 0.1, 3: 0.3}),
        EpochEntry(2, 30, "net.conv", 1, 0.8, {3: 0.2}),
    ]
    counts, tracks = history_figure(history).axes
    assert list(counts.lines[0].get_ydata()) == [1, 2, 1]
    lost, followed = tracks.lines
    np.testing.assert_array_equal(followed.get_ydata(), [0.4, 0.3, 0.2])
    np.testing.assert_array_equal(lost.get_ydata(), [np.nan, 0.1, np.nan])
    assert [text.get_text() for text in tracks.texts] == ["channel 3"]
    assert counts.get_xlabel() == "epoch"


def test_steps_tell_validations_within_an_epoch_apart():
    history = [EpochEntry(0, step, "net.conv", 1, 0.8, {3: 0.4}) for step in (10, 20)]
    counts, _ = history_figure(history).axes
    assert (counts.get_xlabel(), list(counts.lines[0].get_xdata())) == ("step", [10, 20])


def test_an_empty_history_is_refused():
    with pytest.raises(ValueError, match="`history` to hold at least one analysed epoch, but got none"):
        history_figure([])


def test_what_there_is_not_is_said():
    empty = make_overview(n_candidate_pairs=[0] * 4, n_flagged_pairs=[0] * 4, channels=[], classes=[], relevance=[])
    for figure in (similarity_figure(empty), relevance_figure(empty)):
        assert [text.get_text() for text in figure.axes[0].texts] == ["no channel is relevant for two classes"]
    losses, _ = quality_figure([], "net.conv").axes
    assert [text.get_text() for text in losses.texts] == ["no images to judge the splits by"]
    _, tracks = history_figure([EpochEntry(0, 1, "net.conv", 0, 1.0)]).axes
    assert [text.get_text() for text in tracks.texts] == ["no channel was flagged"]


# --------------------------------------------------------------------------------------------- nothing overlaps


def check_layout(figure):
    """All texts, tick labels and axes lie within the figure, and no text lies on another or on other axes' inside."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    words = [(text, None) for text in figure.texts]
    for axes in figure.axes:
        labels = [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
        ticks = [
            tick.label1
            for axis in (axes.xaxis, axes.yaxis)
            for tick in axis.get_major_ticks()
            if min(axis.get_view_interval()) - 1e-9 <= tick.get_loc() <= max(axis.get_view_interval()) + 1e-9
        ]
        words += [(text, axes) for text in [*labels, *ticks]]
    boxes = [
        (text.get_text(), axes, text.get_window_extent(renderer))
        for text, axes in words
        if text.get_text() and text.get_visible()
    ]
    assert boxes
    for index, (name, own, box) in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, name
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, name
        for other_name, _, other in boxes[:index]:
            assert not overlaps(box, other), (name, other_name)
        for axes in figure.axes:
            assert axes is own or not overlaps(box, axes.get_window_extent(renderer)), (name, axes.get_label())
    for index, axes in enumerate(figure.axes):
        for other in figure.axes[:index]:
            assert not overlaps(axes.get_window_extent(renderer), other.get_window_extent(renderer))


def overlaps(box, other):
    across = min(box.x1, other.x1) - max(box.x0, other.x0)
    down = min(box.y1, other.y1) - max(box.y0, other.y0)
    return across > 1 and down > 1


@pytest.mark.parametrize(
    ("n_concepts", "n_images", "has_lead"), [(2, 0, False), (2, 1, True), (2, 8, False), (7, 0, True), (9, 3, True)]
)
def test_nothing_overlaps_in_a_card(n_concepts, n_images, has_lead):
    card = make_card(n_concepts, n_images, sizes=[(48, 48), (10, 90), (90, 10)], stranger=True)
    lead = SimpleNamespace(original=torch.zeros(3, 9, 9), parts=torch.zeros(n_concepts, 3, 9, 9)) if has_lead else None
    check_layout(card_figure(dataclasses.replace(card, layer=LONG_LAYER), class_names=LONG_NAMES, visualization=lead))


@pytest.mark.parametrize(("n_flagged", "n_classes"), [(0, 10), (1, 10), (40, 1000)])
def test_nothing_overlaps_in_overviews(n_flagged, n_classes):
    report = sample_report(n_flagged, n_classes, 512, (LONG_LAYER,), LONG_NAMES[:n_classes], images=False, epochs=12)
    (overview,) = report.overviews
    for figure in (
        similarity_figure(overview),
        relevance_figure(overview, class_names=report.class_names),
        quality_figure(report.quality, overview.layer),
        history_figure(report.history),
        sweep_figure(report.sweeps[0], report.settings),
        *(class_similarity_figure(card, class_names=report.class_names) for card in report.cards[:1]),
    ):
        check_layout(figure)


@pytest.mark.parametrize("n_concepts", [2, 19])
def test_nothing_overlaps_in_class_similarities(n_concepts):
    check_layout(class_similarity_figure(make_card(n_concepts), class_names=LONG_NAMES))


@pytest.mark.parametrize("name", ["a$^$b", "$\\frac$", "$", "\\$a$"])
def test_names_that_look_like_formulas_are_shown_as_they_are(name):
    names = [name] * 1000
    report = sample_report(n_classes=10, layers=(name, f"{name}.2"), class_names=names[:10])
    card = dataclasses.replace(make_card(), layer=name)
    images, targets, concepts = torch.rand(6, 8, 8), torch.arange(6) % 2, [[0], [1]]
    maps = ConceptHeatmaps(name, 3, concepts, torch.rand(6, 8, 8), torch.rand(6, 2, 8, 8))
    seen = ChannelVisualization(name, 3, concepts, torch.rand(3, 8, 8), torch.rand(2, 3, 8, 8))
    split = (images, targets, torch.rand(6), torch.rand(6, 2), concepts)
    empty = make_overview(layer=name, channels=[], classes=[], relevance=[])
    drawn = [
        relevance_figure(empty),
        card_figure(card, class_names=names),
        class_similarity_figure(card, class_names=names),
        similarity_figure(report.overviews[0]),
        relevance_figure(report.overviews[0], class_names=names),
        quality_figure(report.quality, name),
        history_figure(report.history),
        sweep_figure(report.sweeps[0], report.settings),
        split_figure(*split, title=name, class_names=names),
        heatmap_figure(images, maps, title=name, class_names=names),
        visualization_figure([seen], class_names=names),
    ]
    assert len(drawn) - 1 == len([name for name in figures.__all__ if name.endswith("_figure")])
    for figure in drawn:
        figure.savefig(io.BytesIO(), format="svg")
        figure.savefig(io.BytesIO(), format="png", bbox_inches="tight")
        found = figure.findobj(Text)
        assert any(name in text.get_text() for text in found)
        assert not any(text.get_parse_math() for text in found)
        pickle.loads(pickle.dumps(figure)).savefig(io.BytesIO())
        assert type(figure) is Figure, "Neptune knows figures by the name of their class"


def test_figures_belong_to_the_caller_alone():
    before = plt.get_fignums()
    report = sample_report()
    card_figure(make_card())
    similarity_figure(report.overviews[0])
    history_figure(report.history)
    assert plt.get_fignums() == before
