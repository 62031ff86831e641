"""The picture of optimised images: what it shows, and that nothing in it overlaps."""

import sys

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex

from lightning_polydis.figures import CONCEPT_COLOURS
from lightning_polydis.figures.visualization import visualization_figure
from lightning_polydis.visualization import ChannelVisualization
from tests.pictures import assert_nothing_overlaps


def example(n_concepts=2, layer="layer4.2.conv3", channel=1234):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(n_concepts + 1, 3, 10, 10, generator=generator)
    concepts = [[2 * number, 2 * number + 1] for number in range(n_concepts)]
    return ChannelVisualization(layer, channel, concepts, images[0], images[1:])


def test_the_picture_shows_the_images_in_the_concepts_colours():
    first, second = example(3), example(2, channel=7)
    figure = visualization_figure([first, second], class_names=list("abcdef"))
    shown = [np.asarray(axes.get_images()[0].get_array()) for axes in figure.axes]
    expected = [first.original, *first.parts, second.original, *second.parts]
    assert len(shown) == len(expected)
    for pixels, image in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(pixels, image.permute(1, 2, 0).numpy())
    frames = [to_hex(axes.spines["left"].get_edgecolor()).upper() for axes in figure.axes]
    assert frames[1:4] == [*frames[5:], CONCEPT_COLOURS[2]] == list(CONCEPT_COLOURS[:3])
    texts = [text.get_text() for text in figure.texts]
    assert {"layer4.2.conv3, channel 1234", "layer4.2.conv3, channel 7", "original", "concept 3", "e, f"} <= set(texts)


def test_classes_without_names_have_numbers():
    assert "2, 3" in [text.get_text() for text in visualization_figure([example()]).texts]


def test_pictures_that_cannot_be_drawn(monkeypatch):
    with pytest.raises(ValueError, match="`visualizations` to hold at least one channel"):
        visualization_figure([])
    with pytest.raises(ValueError, match="`class_names` to name class 3, but got 2 names"):
        visualization_figure([example()], class_names=["ant", "bee"])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"`visualization_figure` needs matplotlib"):
        visualization_figure([example()])


@pytest.mark.parametrize("counts", [[1], [2], [7], [7, 1, 3], [2] * 12])
def test_nothing_overlaps(counts):
    """With long names, few and many rows and concepts."""
    layer = "features.denseblock4.denselayer16.conv2"
    names = [f"Staffordshire_bull {index} terrier, a kind of dog" for index in range(14)]
    figure = visualization_figure([example(count, layer) for count in counts], class_names=names)
    assert_nothing_overlaps(figure)
