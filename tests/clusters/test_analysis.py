"""Batches that the analysis takes, refuses or leaves out, and the classes that they may hold."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_polydis.analyses import analysis_for
from lightning_polydis.batches import labels_of
from lightning_polydis.clusters.analysis import ClusterAnalysis
from lightning_polydis.clusters.evidence import _contents
from lightning_polydis.layers import find_layer
from lightning_polydis.settings import AnalysisSettings
from tests.clusters.runs import analysed, noise, settings, small_net
from tests.runs import n_hooks


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_batches_that_hold_nan_or_infinity_are_left_out_and_counted(bad):
    net, images = small_net(), noise(60, 3, 6, 6)
    spoilt = images[20:40].clone()
    spoilt[3, 0, 0, 0] = bad
    analysis = analysed(net, [images[:20], spoilt, images[40:]])
    clean = analysed(net, [images[:20], images[40:]])
    assert torch.equal(analysis._lists["2"].images, clean._lists["2"].images)
    report = analysis.compute()
    assert (report.n_images, report.n_images_left_out) == (40, 20)
    assert "20 images were left out because their batch held NaN or infinity." in report.notes


def test_few_images_are_noted_and_no_data_is_refused():
    report = analysed(small_net(), [noise(20, 3, 6, 6)]).compute()
    assert any("there were only 20 images" in note for note in report.notes)
    assert report.channels == []
    with pytest.raises(ValueError, match="at least one batch to analyse, but the data was empty"):
        analysed(small_net(), []).compute()


def test_layers_that_do_not_agree_on_the_number_of_images_are_refused_in_words():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.whole, self.parts = nn.Linear(8, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.parts(self.whole(x).relu().reshape(-1, 2, 4).repeat(3, 1, 1))

    net = Windows()
    for names in (["whole", "parts"], ["parts", "whole"]):
        with pytest.raises(ValueError, match="`parts`.*images"):
            analysed(net, [noise(10, 8)], names)


def test_numbers_of_images_go_on_from_batch_to_batch():
    analysis = analysed(small_net(), noise(50, 3, 6, 6).split(7))
    assert set(analysis._lists["2"].images.tolist()) == set(range(50))


def test_release_frees_what_was_kept_and_takes_hooks_off():
    net = small_net()
    analysis = analysed(net, [noise(30, 3, 6, 6)])
    analysis.start_batch((noise(2, 3, 6, 6),))
    analysis.release()
    assert n_hooks(net) == 0
    assert len(analysis._pools["2"]) == 0
    assert analysis._top["2"].vectors == []
    assert analysis._top["2"]._kept == {}


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"layers": None, "concepts": "clusters"}, {"layers": "2", "concepts": "clusters"}),
        ({"layers": None, "concepts": "classes"}, {"layers": "0", "concepts": "clusters"}),
        ({"layers": None, "concepts": "clusters"}, {"layers": "0", "concepts": "classes"}),
    ],
)
def test_a_pass_that_is_made_again_is_for_one_analysis_alone(first, second, order):
    net, batch = classifier(), (noise(40, 8), torch.arange(40) % 3)
    analyses = [analysis_for(net, AnalysisSettings(**own)) for own in (first, second)][::order]
    for _ in range(2):
        for analysis in analyses:
            analysis.start_batch(batch)
        with torch.no_grad():
            net(batch[0])
        for analysis in analyses:
            analysis.finish_batch()
    for analysis in analyses:
        analysis.gather()
        assert analysis.compute().n_images == 80
    assert torch._C._len_torch_function_stack() == n_hooks(net) == 0


def test_a_pass_that_fails_when_it_is_made_again_leaves_nothing_behind():
    class Once(nn.Module):
        n_calls = 0

        def forward(self, x):
            self.n_calls += 1
            if self.n_calls == 2:
                raise OSError("only once")
            return x * 1

    net = classifier().insert(4, Once())
    analysis = ClusterAnalysis(net, settings(None))
    analysis.start_batch((noise(9, 8),))
    net(noise(9, 8))
    with pytest.raises(OSError, match="only once"):
        analysis.finish_batch()
    analysis.close()
    assert torch._C._len_torch_function_stack() == n_hooks(net) == 0
    other = analysed(net, [noise(9, 8)])
    assert other.compute().n_images == 9, "nobody is shut out for good"


# --------------------------------------------------------------------------------------------------- classes, if any

CLASSES = torch.tensor([3, 0, 1])
X = torch.zeros(3, 3, 2, 2)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((X, CLASSES), [3, 0, 1]),
        ((X, CLASSES.int()), [3, 0, 1]),
        ({"image": X, "labels": CLASSES}, [3, 0, 1]),
        (SimpleNamespace(image=X, y=CLASSES), [3, 0, 1]),
        ((X,), None),
        (X, None),
        (None, None),
        ("text", None),
        ({"image": X}, None),
        ((X, CLASSES.float()), None),
        ((X, torch.rand(3, 4)), None),
        ((X, CLASSES > 0), None),
        ((X, CLASSES.new_zeros(3, 2, 2)), None),
        ((X, CLASSES.new_zeros(0)), None),
        ((X, torch.tensor([0, -100, 1])), None),
        ((X, ["cat", "dog", "cat"]), None),
        ((X, [{"boxes": torch.zeros(2, 4), "labels": torch.ones(2)}] * 3), None),
        ((X, None), None),
        ([X, X], None),
    ],
)
def test_classes_are_taken_where_there_are_any_and_nothing_else_is_a_mistake(batch, expected):
    found = labels_of(batch, settings())
    assert (None if found is None else found.tolist()) == expected


def test_a_function_for_targets_is_asked_and_its_mistakes_are_told():
    assert labels_of({"z": CLASSES}, settings(target_fn=lambda batch: batch["z"])).tolist() == [3, 0, 1]
    with pytest.raises(ValueError, match="`target_fn` raised KeyError: 'z'"):
        labels_of({"y": CLASSES}, settings(target_fn=lambda batch: batch["z"]))
    with pytest.raises(ValueError, match="integer class indices, but got torch.float32"):
        labels_of({"y": CLASSES}, settings(target_fn=lambda batch: batch["y"].float()))


def test_contents_are_the_most_frequent_classes_and_numbers_that_are_no_classes_cost_nothing():
    labels = torch.tensor([4, 2, 4, 4, 2, 9, 1, 7, 8, 4])
    assert _contents(labels) == [(4, 0.4), (2, 0.2), (1, 0.1), (7, 0.1), (8, 0.1)]
    assert _contents(torch.tensor([1, -1])) == []
    assert _contents(labels[:0]) == []
    assert _contents(torch.tensor([2**50, 3, 2**50, 2**50])) == [(2**50, 0.75), (3, 0.25)]


def test_labels_that_are_one_for_each_box_are_not_taken_for_those_of_images():
    analysis = analysed(small_net(), [(noise(30, 3, 6, 6), torch.arange(70) % 3)])
    assert analysis._lists["2"].labels.unique().tolist() == [-1]


def test_a_layer_that_does_not_exist_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match=r"Closest names: `2`"):
        ClusterAnalysis(small_net(), settings("22"))
    with pytest.raises(ValueError, match="`1` to be a convolution or `nn.Linear`, but got `ReLU`"):
        ClusterAnalysis(small_net(), settings("1"))
    with pytest.raises(ValueError, match="`logits_module`"):
        ClusterAnalysis(small_net(), settings(None, logits_module="nope"))


def test_find_layer_is_the_one_that_is_watched():
    net = small_net()
    assert ClusterAnalysis(net, settings())._layers["2"] is find_layer(net, "2")
