import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_polydis import ChannelSplit, SplitPlan, disentangle, evaluate_splits, evaluation
from lightning_polydis.evaluation import SplitEvaluator, SplitQuality
from tests import reference
from tests.networks import conv_relu_net, make_batches, make_images, train_briefly


def plan_for(layer_name, n_inputs, soft=False, signs=(None, None, None)):
    shares = torch.rand(3, n_inputs, generator=torch.Generator().manual_seed(0))
    shares = shares if soft else (shares > 0.4).float()
    return SplitPlan(
        [
            ChannelSplit(layer_name, 3, [[0], [2]], shares[:2], directions=signs[0]),
            ChannelSplit(layer_name, 5, [[0, 1], [3], [2]], shares, directions=signs[1]),
            ChannelSplit(layer_name, 3, [[1], [2]], shares[1:], directions=signs[2]),  # the same channel once more
        ]
    )


def slow_quality(net, layer, split, images, targets, tau, index):
    """Rule 9, image by image: activations in the direction of each image's class, AUROC in that of the concept."""
    signs = split.directions or [1] * len(split.concepts)
    module = net.get_submodule(layer)
    weight = module.weight[split.channel].detach()
    shares = [*split.membership, split.membership.sum(0) - 1]
    rows = [weight * share.view(-1, *[1] * (weight.ndim - 1)) for share in shares]
    own, other, remaining = [], [], []
    for image, target in zip(images, targets.tolist(), strict=True):
        x = reference.captured(net, layer, image)[0]
        z = reference.masked_output(module, split.channel, weight, x)[0]
        bias = 0 if module.bias is None else float(module.bias.detach()[split.channel])
        parts = []
        for number, row in enumerate(rows):
            wanted = bias * (len(split.concepts) - 1) if number == len(split.concepts) else bias
            parts.append(reference.masked_output(module, split.channel, row, x)[0] - bias + wanted)
        relevant = reference.is_relevant(reference.relevance(net, layer, image, target), tau)[split.channel]
        (owner,) = [number for number, concept in enumerate(split.concepts) if target in concept] or [index]
        entry = (signs[owner] * z, [signs[owner] * part for part in parts], relevant, signs[index] * signs[owner])
        if target in split.concepts[index]:
            own.append(entry)
        elif any(target in concept for concept in split.concepts):
            other.append(entry)
        else:
            remaining.append(entry)

    def total(values):
        return float(values.clamp(min=0).sum())

    def over(numerator, denominator):
        return numerator / denominator if denominator > 0 else None

    d_own = [(total(z), total(parts[index])) for z, parts, *_ in own]
    d_other = [(total(z), total(parts[index])) for z, parts, *_ in other]
    above = [total(parts[index].clamp(min=0) - z.clamp(min=0)) for z, parts, *_ in remaining]
    shown = [(total(z), [total(part) for part in parts]) for z, parts, relevant, _ in own if relevant]
    kept = [over(sum(p[number] for _, p in shown), sum(z for z, _ in shown)) for number in range(len(rows))]
    fixed = [(total(turn * z), total(turn * parts[index])) for z, parts, _, turn in other]
    wins = [(a > b) + 0.5 * (a == b) for _, a in d_own for _, b in fixed]
    wins_original = [(a > b) + 0.5 * (a == b) for a, _ in d_own for b, _ in fixed]
    return {
        "distortion": over(sum(abs(d - z) for z, d in d_own), sum(z for z, _ in d_own)),
        "leak": over(sum(d for _, d in d_other), sum(z for z, _ in d_other)),
        "spurious": over(np.mean(above), np.mean([z for z, _ in d_own])) if above else None,
        "kept": None if None in kept else kept,
        "auroc": np.mean(wins),
        "auroc_original": np.mean(wins_original),
    }


def assert_same(found, expected, rel):
    for one, two in zip(found, expected, strict=True):
        for mine, other in zip(one.concepts, two.concepts, strict=True):
            for name, value in vars(mine).items():
                expected_value = getattr(other, name)
                assert value == (
                    None if expected_value is None else pytest.approx(expected_value, rel=rel, abs=1e-5)
                ), name


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(1)
    return train_briefly(conv_relu_net())


@pytest.mark.parametrize("layer", ["2", "4"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("signs", [(None, None, None), ([-1, 1], [1, -1, -1], [-1, -1])], ids=["unsigned", "signed"])
def test_figures_are_those_of_the_rule(trained, layer, soft, signs):
    images, targets = make_images(n=24)
    plan = plan_for(layer, trained.get_submodule(layer).in_channels, soft, signs)
    found = evaluate_splits(trained, plan, make_batches(n=24), relevance_threshold=0.05, progress=False)
    assert [(quality.layer, quality.channel) for quality in found] == [(layer, 3), (layer, 5), (layer, 3)]
    for split, quality in zip(plan, found, strict=True):
        assert [concept.classes for concept in quality.concepts] == split.concepts
        for index, concept in enumerate(quality.concepts):
            for name, value in slow_quality(trained, layer, split, images, targets, 0.05, index).items():
                assert getattr(concept, name) == (
                    None if value is None else pytest.approx(value, rel=1e-3, abs=1e-5)
                ), name
            assert concept.n_own == 6 * len(concept.classes)


def test_a_split_network_is_judged_as_the_unsplit_one(trained):
    plan = SplitPlan(plan_for("2", 8).splits[:2])
    settings = {"relevance_threshold": 0.05, "progress": False}
    before = evaluate_splits(trained, plan, make_batches(), **settings)
    after = evaluate_splits(disentangle(trained, plan), plan, make_batches(), **settings)
    assert_same(before, after, rel=1e-3)


def test_a_perfect_split_has_perfect_figures():
    layer = nn.Conv2d(2, 8, 1, bias=False)
    nn.init.ones_(layer.weight)
    split = ChannelSplit("x", 1, [[0], [1]], torch.eye(2))
    inputs = torch.zeros(6, 2, 3, 3)
    inputs[:2, 0], inputs[2:4, 1] = 1, 2
    evaluator = SplitEvaluator([split])
    evaluator.update(layer, inputs, torch.tensor([0, 0, 1, 1, 2, 2]), torch.ones(6, 8, dtype=torch.bool))
    (quality,) = evaluator.compute()
    for index, concept in enumerate(quality.concepts):
        assert (concept.distortion, concept.leak, concept.spurious, concept.auroc) == (0, 0, 0, 1)
        assert concept.kept == [1 - index, index, 0]
    assert quality.concepts[0].auroc_original == 0, "class 1 fires more: the original cannot tell class 0"
    assert quality.mean("auroc_original") == 0.5


def test_large_activations_do_not_tie():
    layer = nn.Conv2d(1, 8, 1, bias=False)
    nn.init.ones_(layer.weight)
    evaluator = SplitEvaluator([ChannelSplit("x", 0, [[0], [1]], torch.ones(2, 1))])
    inputs = torch.tensor([1003.0, 1002, 1001, 1000]).view(4, 1, 1, 1)
    evaluator.update(layer, inputs, torch.tensor([0, 0, 1, 1]), torch.ones(4, 8, dtype=torch.bool))
    assert evaluator.compute()[0].concepts[0].auroc == 1


def test_what_cannot_be_told_is_none():
    evaluator = SplitEvaluator([ChannelSplit("x", 0, [[0], [1]], torch.ones(2, 4))])
    nothing = evaluator.compute()[0].concepts[0]
    assert (nothing.distortion, nothing.leak, nothing.spurious, nothing.kept, nothing.auroc) == (None,) * 5
    evaluator.update(nn.Linear(4, 8), torch.zeros(2, 4), torch.tensor([0, 0]), torch.zeros(2, 8, dtype=torch.bool))
    only_own = evaluator.compute()[0]
    assert (only_own.concepts[0].auroc, only_own.concepts[0].kept, only_own.concepts[1].n_own) == (None, None, 0)
    assert only_own.mean("auroc") is None


def test_many_splits_in_chunks_are_the_same(trained, monkeypatch):
    plan = plan_for("2", 8)
    whole = evaluate_splits(trained, plan, make_batches(), progress=False)
    monkeypatch.setattr(evaluation, "CHUNK_ROWS", 1)
    chunked = evaluate_splits(trained, plan, make_batches(), progress=False)
    assert_same(whole, chunked, rel=1e-5)


def test_batches_with_nan_do_not_count(trained):
    plan = plan_for("2", 8)
    images, targets = make_images(n=8)
    broken = torch.full_like(images, float("nan"))
    expected = evaluate_splits(trained, plan, [(images, targets)], progress=False)
    assert evaluate_splits(trained, plan, [(images, targets), (broken, targets)], progress=False) == expected


def test_quality_survives_json(trained):
    for quality in evaluate_splits(trained, plan_for("2", 8), make_batches(), progress=False):
        assert SplitQuality.from_json(quality.to_json()) == quality


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (SplitPlan([ChannelSplit("9", 0, [[0], [1]], torch.ones(2, 8))]), "to name modules of the model, but got '9'"),
        (SplitPlan([ChannelSplit("2", 12, [[0], [1]], torch.ones(2, 8))]), r"channel in \[0, 12\), but got 12"),
        (SplitPlan([ChannelSplit("2", 1, [[0], [1]], torch.ones(2, 5))]), "expected memberships of 8 inputs"),
    ],
)
def test_plans_that_do_not_fit_are_refused(trained, plan, message):
    with pytest.raises(ValueError, match=message):
        evaluate_splits(trained, plan, make_batches(), progress=False)


@pytest.mark.parametrize(
    "other",
    [
        ChannelSplit("2", 7, [[0], [1]], torch.ones(2, 8)),
        ChannelSplit("2", 3, [[0], [1]], torch.ones(2, 8)),
        ChannelSplit("2", 3, [[0], [2]], torch.ones(2, 8)),
        ChannelSplit("2", 3, [[0], [2], [1]], torch.ones(3, 8)),
    ],
)
def test_a_split_network_is_judged_by_its_own_plan_only(trained, other):
    split = disentangle(trained, SplitPlan(plan_for("2", 8).splits[:1]))
    with pytest.raises(
        ValueError, match=rf"channels \[{other.channel}\] are not split there, or in another way. Judge"
    ):
        evaluate_splits(split, SplitPlan([other]), make_batches(), progress=False)


def test_no_data_and_no_splits(trained):
    assert evaluate_splits(trained, SplitPlan([]), [], progress=False) == []
    with pytest.raises(ValueError, match="the data was empty"):
        evaluate_splits(trained, plan_for("2", 8), [], progress=False)


def test_the_network_is_left_as_it_was(trained):
    net = copy.deepcopy(trained).train()
    net[3].eval()
    evaluate_splits(net, plan_for("2", 8), make_batches(), progress=False)
    assert [module.training for module in net] == [index != 3 for index in range(9)]


def test_splits_of_clusters_that_no_image_belongs_to_are_a_warning():
    layer = nn.Linear(4, 9)
    centres = torch.eye(4)[:2]
    weak = [ChannelSplit("0", channel, [[0], [1]], centres, centres=centres, floors=[0.0, 1e9]) for channel in (0, 1)]
    far = [
        ChannelSplit("0", channel, [[0], [1]], centres, centres=centres, floors=[1e9, 1e9]) for channel in range(2, 9)
    ]
    images = [(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)),)]
    named = "2 of `0`, 3 of `0`, 4 of `0`, 5 of `0`, 6 of `0`, 2 more"
    with pytest.warns(UserWarning, match=f"No image activates these channels .* could not be judged: {named}. Pass"):
        qualities = evaluate_splits(nn.Sequential(layer), SplitPlan([*weak, *far]), images, progress=False)
    assert [bool(quality.concepts[0].n_own) for quality in qualities] == [True] * 2 + [False] * 7
    assert qualities[2].mean("distortion") is None
