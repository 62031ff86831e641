"""Cards show what the report says, and nothing in them overlaps."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex

from lightning_polydis.figures import CONCEPT_COLOURS, OTHER_COLOUR, card_figure, class_similarity_figure
from lightning_polydis.figures.canvas import CAPTION_SIZE
from tests.figures.cards import LONG_LAYER, LONG_NAMES, make_card
from tests.pictures import check_layout


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


@pytest.mark.parametrize(
    ("n_concepts", "n_images", "has_lead"), [(2, 0, False), (2, 1, True), (2, 8, False), (7, 0, True), (9, 3, True)]
)
def test_nothing_overlaps_in_a_card(n_concepts, n_images, has_lead):
    card = make_card(n_concepts, n_images, sizes=[(48, 48), (10, 90), (90, 10)], stranger=True)
    lead = SimpleNamespace(original=torch.zeros(3, 9, 9), parts=torch.zeros(n_concepts, 3, 9, 9)) if has_lead else None
    check_layout(card_figure(dataclasses.replace(card, layer=LONG_LAYER), class_names=LONG_NAMES, visualization=lead))
