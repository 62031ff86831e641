"""Heat maps and optimised images in pictures."""

import numpy as np
import pytest
import torch

from lightning_polydis import ChannelVisualization, ConceptHeatmaps
from lightning_polydis.figures import heatmap_figure, split_figure
from lightning_polydis.figures.heatmap import AGAINST, FOR, overlaid
from tests.pictures import assert_nothing_overlaps

CONCEPTS = [[0], [1]]


def maps(n=6, size=12, k=2, value=None):
    generator = torch.Generator().manual_seed(0)
    original, parts = (
        torch.randn(n, size, size, generator=generator),
        torch.randn(n, k, size, size, generator=generator),
    )
    if value is not None:
        original, parts = torch.full_like(original, value), torch.full_like(parts, value)
    return ConceptHeatmaps("conv", 3, [[place] for place in range(k)], original, parts)


def split_arguments(n=6, size=12):
    activation = torch.linspace(1, 2, n)
    return (
        torch.rand(n, size, size),
        torch.arange(n) % 2,
        activation,
        torch.stack([activation, activation], 1),
        CONCEPTS,
    )


def labels(figure):
    return [axes.get_label() for axes in figure.axes]


def test_a_row_for_the_images_the_channel_and_each_concept():
    figure = heatmap_figure(torch.rand(4, 12, 12), maps(), title="Channel 3", class_names=["cat", "dog"])
    assert labels(figure) == [f"row {row}, image {column}" for column in range(4) for row in range(4)]
    texts = [text.get_text() for text in figure.texts]
    assert {"Channel 3", "image", "original", "concept 1", "cat", "concept 2", "dog"} <= set(texts)
    assert "red: for the class, blue: against it" in texts
    positive = heatmap_figure(torch.rand(2, 12, 12), maps(value=1.0))
    assert "red: where it is seen" in [text.get_text() for text in positive.texts]


@pytest.mark.parametrize(("n_images", "k"), [(1, 2), (6, 2), (12, 7)])
def test_nothing_overlaps(n_images, k):
    names = [f"Staffordshire_bull {index} terrier, a kind of dog" for index in range(k)]
    title = "A long title: channel 1234 of features.denseblock4.denselayer16.conv2"
    found = maps(n=n_images, k=k)
    assert_nothing_overlaps(heatmap_figure(torch.rand(n_images, 12, 12), found, title=title, class_names=names))
    assert_nothing_overlaps(heatmap_figure(torch.rand(n_images, 12, 12), found))


@pytest.mark.parametrize(("value", "colour"), [(2.0, FOR), (-2.0, AGAINST)])
def test_the_strongest_relevance_has_the_full_colour(value, colour):
    picture = overlaid(np.ones((12, 12)), maps(value=value), 0, 1)
    assert np.allclose(picture, colour, atol=1e-6)


def test_no_relevance_shows_a_pale_image():
    found = maps(value=0.0)
    picture = overlaid(np.zeros((12, 12, 3)), found, 0, 0)
    assert np.allclose(picture, picture[0, 0, 0])
    assert 0.4 < picture[0, 0, 0] < 1


def test_all_rows_of_an_image_have_one_scale():
    found = maps(value=1.0)
    found.parts[0, 1] *= 4
    weak, strong = (overlaid(np.ones((12, 12)), found, 0, row) for row in (1, 2))
    assert np.allclose(strong, FOR)
    assert np.abs(weak - FOR).max() > 0.1


def test_a_split_with_maps_and_optimised_images():
    images = ChannelVisualization("conv", 3, CONCEPTS, torch.rand(3, 20, 20), torch.rand(2, 3, 20, 20))
    figure = split_figure(*split_arguments(), heatmaps=maps(), visualization=images, n_images=4)
    found = labels(figure)
    for row in range(3):
        assert f"row {row}, optimised image" in found
        assert sum(label.startswith(f"row {row}, map") for label in found) == 4
    assert any("below each image" in text.get_text() for text in figure.texts)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: heatmap_figure(torch.rand(9, 12, 12), maps()), r"at least 9 of size \[12, 12\], but got 6"),
        (lambda: heatmap_figure(torch.rand(2, 8, 8), maps()), r"of size \[8, 8\], but got 6 of size \[12, 12\]"),
        (lambda: split_figure(*split_arguments(), heatmaps=maps(n=5)), "maps of 6 images and 2 concepts, but got"),
        (lambda: split_figure(*split_arguments(), heatmaps=maps(k=3)), r"6 images and 2 concepts, but got \[6, 3\]"),
        (
            lambda: split_figure(
                *split_arguments(),
                visualization=ChannelVisualization("conv", 3, [[0]], torch.rand(3, 8, 8), torch.rand(1, 3, 8, 8)),
            ),
            "`visualization` to show 2 concepts, but got 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
