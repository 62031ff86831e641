"""Figures of concepts that are clusters of images."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex

from lightning_polydis import ConceptHeatmaps
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
from lightning_polydis.figures.canvas import CAPTION_SIZE, row_label
from lightning_polydis.visualization import ChannelVisualization
from tests.clusters.reports import LAYER, variants
from tests.pictures import assert_nothing_overlaps, check_layout
from tests.sample_reports import cluster_report


def texts(figure):
    return [text.get_text().replace("\n", " ") for text in figure.texts]


def frames(figure, row):
    axes = [axes for axes in figure.axes if axes.get_label().startswith(f"row {row}, image")]
    return [to_hex(one.spines["left"].get_edgecolor()).upper() for one in axes]


def test_a_card_names_its_concepts_and_frames_images_by_cluster():
    report = cluster_report()
    figure = card_figure(report.cards[2], class_names=report.class_names, n_images=5)
    first, second = CONCEPT_COLOURS[:2]
    assert frames(figure, 0) == [first, second, first, first, OTHER_COLOUR], "clusters 1 and 3 are one concept"
    captions = [text.get_text() for text in figure.texts if text.get_fontsize() == CAPTION_SIZE]
    assert captions == [f"class {label}" for label in range(5)] * 3
    leading = report.concept_names[LAYER, 2][0].partition(",")[0].replace(" (", "\xa0(").replace(" %", "\xa0%")
    assert any(text.startswith(leading) for text in texts(figure))
    assert "similarity of its clusters" in texts(figure)
    assert "grey frame: image of no cluster" in texts(figure)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("6 (62 %), 0 (20 %), 9 (8 %)", ["6 (62 %),", "0 (20 %), 9 (8 %)"]),
        ("classes 6 (62 %), 0 (20 %)", ["classes 6 (62 %),", "0 (20 %)"]),
        ("Staffordshire bullterrier (20 %), church (9 %)", ["Staffordshire", "bullterrier ..."]),
    ],
)
def test_no_line_ends_between_a_number_and_its_share(name, lines):
    _, text = row_label(1, [[0], [1]], None, [name, "other"])
    assert text.replace("\N{NO-BREAK SPACE}", " ").splitlines() == lines


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
    message = "`concept_names` to name 2 concepts, but got 1 name\\."
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
