"""What holds for every figure: names are shown as they are, and it belongs to the caller alone."""

import dataclasses
import io
import pickle

import pytest
import torch

pytest.importorskip("matplotlib")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.text import Text

from lightning_polydis import ConceptHeatmaps, figures
from lightning_polydis.figures import (
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
from lightning_polydis.visualization import ChannelVisualization
from tests.figures.cards import make_card, make_overview
from tests.sample_reports import sample_report


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
