"""Overview figures show what the report says, and nothing in them overlaps."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from lightning_polydis import ConceptQuality, SplitQuality
from lightning_polydis.cards import EpochEntry
from lightning_polydis.figures import (
    CONCEPT_COLOURS,
    class_similarity_figure,
    history_figure,
    quality_figure,
    relevance_figure,
    similarity_figure,
    sweep_figure,
)
from tests.figures.cards import LONG_LAYER, LONG_NAMES, make_card, make_overview
from tests.pictures import check_layout
from tests.sample_reports import sample_report


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
    with pytest.raises(ValueError, match=r"`class_names` to name class \d, but got 1 name\."):
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
