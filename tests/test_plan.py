import json

import pytest
import torch
from torch import nn

from lightning_polydis import (
    ChannelSplit,
    SplitPlan,
    concept_heatmaps,
    disentangle,
    evaluate_splits,
    visualize_channels,
)
from lightning_polydis.plan import check_fits


@pytest.fixture
def plan():
    hard = torch.tensor([[1.0, 0, 1, 1], [0, 1, 1, 0]])
    soft = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    return SplitPlan(
        [
            ChannelSplit("a.conv", 3, [[0], [2, 5]], hard, rho=0.35),
            ChannelSplit("b", 0, [[1], [2], [3]], soft),
            ChannelSplit("a.conv", 1, [[7], [2]], hard, rho=1.0),
        ]
    )


def test_a_plan_comes_back_from_its_file_exactly(plan, tmp_path):
    plan.save(tmp_path / "deep" / "plan.json")
    loaded = SplitPlan.load(tmp_path / "deep" / "plan.json")
    assert loaded == plan
    for mine, other in zip(plan, loaded, strict=True):
        assert torch.equal(mine.membership, other.membership)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["plan.json"], "no temporary file is left"


def test_a_plan_lists_its_layers(plan):
    assert plan.layers == ["a.conv", "b"]
    assert [split.channel for split in plan.of_layer("a.conv")] == [3, 1]
    assert len(plan) == 3


def test_splits_differ_if_a_membership_does(plan):
    other = ChannelSplit("a.conv", 3, [[0], [2, 5]], torch.ones(2, 4), rho=0.35)
    assert other != plan.splits[0]
    assert plan.splits[0] != "a.conv"


def test_the_header_says_what_the_file_is(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    assert (document["kind"], document["format_version"]) == ("lightning_polydis.split_plan", 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{not json", "cannot be read"),
        ("\xff", "kind|cannot be read"),
        ("[1]", "of kind `lightning_polydis.split_plan`, but got `list`"),
        ('{"kind": "lightning_polydis.report", "format_version": 1}', "but got `lightning_polydis.report`"),
        ('{"kind": "lightning_polydis.split_plan", "format_version": 2}', "newer lightning_polydis"),
        ('{"kind": "lightning_polydis.split_plan"}', "format_version of at most 1, but got None"),
        ('{"kind": "lightning_polydis.split_plan", "format_version": 1}', "is damaged: KeyError: 'splits'"),
        (
            '{"kind": "lightning_polydis.split_plan", "format_version": 1, "splits": [{"layer": "a"}]}',
            "is damaged: KeyError",
        ),
        (
            '{"kind": "lightning_polydis.split_plan", "format_version": 1, "splits": [{"layer": "a", "channel": 1, '
            '"concepts": [[1], [2]], "membership": [[1, 0]], "rho": null}]}',
            r"is damaged: InputError: Expected `membership` to have shape \[2, inputs\]",
        ),
    ],
)
def test_files_that_are_no_plan_are_refused_in_words(text, message, tmp_path):
    (tmp_path / "plan.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        SplitPlan.load(tmp_path / "plan.json")


def test_a_failed_write_leaves_the_old_file(plan, tmp_path):
    path = tmp_path / "plan.json"
    plan.save(path)
    before = path.read_text()
    broken = SplitPlan([ChannelSplit("a", 0, [[0], [b"no number"]], torch.ones(2, 2))])
    with pytest.raises(TypeError, match="not JSON serializable"):
        broken.save(path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("concepts", "membership", "message"),
    [
        ([[0]], torch.ones(1, 4), r"at least two concepts, but got \[\[0\]\]"),
        ([[0], [1]], torch.ones(3, 4), r"shape \[2, inputs\], one row for each concept, but got \[3, 4\]"),
        ([[0], [1]], torch.full((2, 4), float("nan")), "to be finite"),
        ([[0], []], torch.ones(2, 4), "at least one class each"),
        ([[0], [1, 0]], torch.ones(2, 4), "no class in two of them"),
    ],
)
def test_splits_that_make_no_sense_are_refused(concepts, membership, message):
    with pytest.raises(ValueError, match=message):
        ChannelSplit("layer", 0, concepts, membership)


@pytest.mark.parametrize(
    ("channels", "n_inputs", "message"),
    [
        ([8], 4, r"layer `x`: expected a channel in \[0, 8\), but got 8"),
        ([-1], 4, r"but got -1"),
        ([3], 5, "expected memberships of 5 inputs, but channel 3 has 4"),
        ([3, 3], 4, "channel 3 is split twice"),
    ],
)
def test_plans_that_do_not_fit_are_refused(channels, n_inputs, message):
    splits = [ChannelSplit("x", channel, [[0], [1]], torch.ones(2, 4)) for channel in channels]
    with pytest.raises(ValueError, match=message):
        check_fits(splits, 8, n_inputs)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("split_plan.json", r"Expected argument `plan` to be a `SplitPlan`, but got `str`. `SplitPlan.load\(path\)`"),
        ({"splits": []}, "but got `dict`. A report has one as `.plan`"),
    ],
)
def test_what_is_no_plan_is_refused_everywhere(wrong, message):
    net, images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.rand(2, 3, 8, 8)
    for call in (
        lambda: disentangle(net, wrong),
        lambda: evaluate_splits(net, wrong, [(images, torch.zeros(2, dtype=torch.long))]),
        lambda: concept_heatmaps(net, wrong, images),
        lambda: visualize_channels(net, wrong),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_representation_is_short(plan):
    assert repr(plan) == "SplitPlan(channels to split: 2 of 'a.conv', 1 of 'b')"
    assert repr(SplitPlan([])) == "SplitPlan(channels to split: none)"
    assert repr(plan.splits[1]) == "ChannelSplit('b', channel 0, concepts [[1], [2], [3]])"
