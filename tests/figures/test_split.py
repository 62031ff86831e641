"""Pictures show the images, classes and activations that they are given."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib")
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

from lightning_polydis.figures import CONCEPT_COLOURS, OTHER_COLOUR, split_figure
from tests.pictures import assert_nothing_overlaps

CONCEPTS = [[0], [1, 3]]


@pytest.fixture
def data():
    """Twelve images whose grey level is their index; classes 0 to 3; the original answers to classes 0, 1 and 3."""
    grey = torch.arange(12) / 12
    targets = torch.arange(12) % 4
    original = torch.tensor([5.0, 9, 1, 3, 7, 2, 0, 8, 6, 4, 0, 1])
    parts = torch.stack([original * (targets == 0), original * ((targets == 1) | (targets == 3))], dim=1)
    return {
        "images": grey[:, None, None].expand(12, 4, 6),
        "targets": targets,
        "original": original,
        "parts": parts,
        "concepts": CONCEPTS,
    }


def image_axes(figure, row):
    return [axes for axes in figure.axes if axes.get_label().startswith(f"row {row}, image")]


def shown(figure, row):
    """Indices of the images in a row, from left to right."""
    axes = sorted(image_axes(figure, row), key=lambda axes: axes.get_position().x0)
    return [round(float(np.asarray(one.get_images()[0].get_array()).mean()) * 12) for one in axes]


def frames(figure, row):
    return [to_hex(axes.spines["left"].get_edgecolor()).upper() for axes in image_axes(figure, row)]


def curves(figure, row):
    (axes,) = [axes for axes in figure.axes if axes.get_label() == f"row {row}, densities"]
    return axes.get_lines()


def texts(figure):
    return [text.get_text() for text in figure.texts]


def test_rows_show_the_strongest_images_first(data):
    figure = split_figure(**data, n_images=4)
    assert shown(figure, 0) == [1, 7, 4, 8]
    assert shown(figure, 1) == [4, 8, 0]  # nothing else activates the first concept's channel
    assert shown(figure, 2) == [1, 7, 9, 3]


def test_frames_have_the_colour_of_the_concept(data):
    figure = split_figure(**data, n_images=4)
    first, second = CONCEPT_COLOURS[:2]
    assert frames(figure, 0) == [second, second, first, first]
    assert frames(figure, 1) == [first] * 3
    assert frames(figure, 2) == [second] * 4


def test_images_of_other_classes_are_marked_and_explained(data):
    note = "grey frame: image of a class that belongs to none of the concepts"
    assert note not in texts(split_figure(**data, n_images=4))
    data["original"] = data["original"].index_fill(0, torch.tensor([10]), 20.0)
    figure = split_figure(**data, n_images=6)
    assert shown(figure, 0)[0] == 10
    assert frames(figure, 0)[0] == OTHER_COLOUR
    assert note in texts(figure)


def test_densities_tell_the_concepts_apart(data):
    """Each curve peaks where the activations of its concept's images are."""
    own = torch.isin(data["targets"], torch.tensor([0]))
    other = torch.isin(data["targets"], torch.tensor([1, 3]))
    data["original"] = torch.where(own, 4.0, 6.0)
    data["parts"] = torch.stack([torch.where(own, 4.0, 0.0), torch.where(other, 5.0, 1.0)], dim=1)
    figure = split_figure(**data)
    peaks = [[line.get_xdata()[line.get_ydata().argmax()] for line in curves(figure, row)] for row in range(3)]
    np.testing.assert_allclose(peaks, [[4, 6], [4, 0], [1, 5]], atol=0.05)
    for row in range(3):
        assert [line.get_ydata().max() for line in curves(figure, row)] == pytest.approx([1, 1])
        assert [line.get_color() for line in curves(figure, row)] == list(CONCEPT_COLOURS[:2])


def test_a_heap_at_zero_is_not_cut_in_half(data):
    """Mirrored at zero, the density of exponential values falls from its very start."""
    torch.manual_seed(0)
    n = 4000
    targets = torch.arange(n) % 2
    values = torch.empty(n).exponential_()
    images = torch.zeros(n, 2, 2)
    figure = split_figure(images, targets, values, torch.stack([values, values], 1), [[0], [1]], n_images=1)
    density = curves(figure, 0)[0].get_ydata()
    assert density[:3].min() > 0.9


def test_silent_channels_and_missing_concepts_are_drawn(data):
    silent = split_figure(**{**data, "original": torch.zeros(12), "parts": torch.zeros(12, 2)})
    assert [shown(silent, row) for row in range(3)] == [[], [], []]
    missing = split_figure(**{**data, "concepts": [[0], [9]]})
    assert [len(curves(missing, row)) for row in range(3)] == [1, 1, 1]


def test_labels_name_classes(data):
    assert "1, 3" in texts(split_figure(**data))
    named = texts(split_figure(**data, title="Channel 7", class_names=["ant", "bee", "cat", "dog"]))
    assert {"Channel 7", "original", "concept 1", "ant", "concept 2", "bee, dog"} <= set(named)


def test_kinds_of_images(data):
    torch.manual_seed(0)
    colour = torch.randint(256, (12, 3, 4, 6), dtype=torch.uint8)

    def first_pixels(images):
        figure = split_figure(**{**data, "images": images}, n_images=1)
        return np.asarray(image_axes(figure, 0)[0].get_images()[0].get_array())

    expected = colour[1].permute(1, 2, 0).numpy() / 255
    np.testing.assert_allclose(first_pixels(colour), expected, atol=1e-6)
    np.testing.assert_allclose(first_pixels(colour / 255), expected, atol=1e-6)
    np.testing.assert_array_equal(first_pixels(data["images"][:, None]), first_pixels(data["images"]))


def test_gradients_and_half_precision_do_no_harm(data):
    figure = split_figure(
        data["images"].clone().requires_grad_(),
        data["targets"],
        data["original"].bfloat16().requires_grad_(),
        data["parts"].half().requires_grad_(),
        CONCEPTS,
        n_images=2,
    )
    assert shown(figure, 0) == [1, 7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": torch.zeros(12, 2, 4, 6)},
            r"`images` to have shape \[N, H, W\] or \[N, 3, H, W\], but got \[12, 2",
        ),
        ({"images": torch.zeros(0, 4, 6)}, r"but got \[0, 4, 6\]"),
        ({"images": torch.full((12, 4, 6), -1.5)}, r"in \[0, 1\], but got -1.5 to -1.5. Undo the normalisation"),
        ({"images": torch.full((12, 4, 6), torch.nan)}, r"in \[0, 1\], but got nan"),
        ({"targets": torch.zeros(11, dtype=torch.long)}, r"`targets` to have shape \[12\], but got \[11\]"),
        ({"targets": torch.zeros(12)}, r"`targets` to hold class indices, but got torch.float32"),
        ({"original": torch.zeros(12, 1)}, r"`original` to have shape \[12\], but got \[12, 1\]"),
        ({"parts": torch.zeros(2, 12)}, r"`parts` to have shape \[12, 2\], but got \[2, 12\]"),
        ({"parts": torch.full((12, 2), -1.0)}, "`parts` to hold finite activations that are not negative"),
        ({"original": torch.full((12,), torch.inf)}, "`original` to hold finite activations"),
        ({"concepts": [[0, 1]], "parts": torch.zeros(12, 1)}, "to hold 2 to 7 concepts, but got 1"),
        ({"n_images": 0}, "`n_images` to be at least 1, but got 0"),
        ({"class_names": ["ant", "bee"]}, "`class_names` to name class 3, but got 2 names"),
    ],
)
def test_bad_arguments(data, changes, message):
    with pytest.raises(ValueError, match=message):
        split_figure(**{**data, **changes})


def test_missing_matplotlib_is_explained(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-polydis\[figures\]'"):
        split_figure(**data)


def test_pyplot_is_left_alone(data):
    before = plt.get_fignums()
    split_figure(**data)
    assert plt.get_fignums() == before


def test_the_background_is_opaque_white(data):
    buffer = io.BytesIO()
    split_figure(**data).savefig(buffer, dpi=50)
    corners = np.asarray(Image.open(buffer).convert("RGBA"))[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).all()


@pytest.mark.parametrize("n_concepts", [2, 7])
@pytest.mark.parametrize("n_images", [1, 8])
@pytest.mark.parametrize("size", [(4, 40), (8, 8), (40, 10)])
def test_nothing_overlaps(n_concepts, n_images, size):
    """With long names, all kinds of frames, and images of any proportions."""
    n = 40
    names = [f"Staffordshire_bull {index} terrier, a kind of dog" for index in range(2 * n_concepts + 1)]
    targets = torch.arange(n) % len(names)
    activations = 1 + torch.rand(n, n_concepts, generator=torch.Generator().manual_seed(0)) * 1e6
    figure = split_figure(
        torch.rand(n, *size),
        targets,
        activations[:, 0],
        activations,
        [[2 * index, 2 * index + 1] for index in range(n_concepts)],
        title="A long title: channel 1234 of features.denseblock4.denselayer16.conv2, before and after its split",
        class_names=names,
        n_images=n_images,
    )
    assert_nothing_overlaps(figure)
