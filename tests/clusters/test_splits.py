"""Splits by clusters: what they do, how they are judged, planned, saved and loaded."""

import copy
import json

import pytest
import torch
from torch import nn

from lightning_polydis import (
    ChannelSplit,
    PolysemanticityReport,
    SplitPlan,
    disentangle,
    evaluate_splits,
    find_polysemantic_channels,
)
from lightning_polydis.surgery import rebuild_splits, stored_plan
from tests.clusters.runs import boxes, class_batches, find, found_in, pattern_of, plain_batches
from tests.planted import CHANNELS, GROUPED_MERGED, MERGED, N_PATTERNS, PlantedNet, planted_images


def correlation(first, second):
    return float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]).double())[0, 1])


def test_concept_channels_are_the_detectors_that_were_added_up(planted, report, images):
    split = disentangle(planted, report.plan)
    with torch.no_grad():
        parts = split.mix.expand(split.relu(split.sources(images[0]))).relu()
    for channel in MERGED:
        for number in range(len(CHANNELS[channel])):
            pattern = pattern_of(report, channel, number)
            concept = parts[:, split.mix.channel_index(channel, number)]
            assert correlation(concept, planted.detector(images[0], channel, pattern)) > 0.95
            for other in set(CHANNELS[channel]) - {pattern}:
                assert correlation(concept, planted.detector(images[0], channel, other)) < 0.3


def test_the_network_computes_the_same_before_and_after_and_undone(planted, report, images):
    split = disentangle(planted, report.plan)
    with torch.no_grad():
        torch.testing.assert_close(split(images[0]), planted(images[0]), rtol=1e-5, atol=1e-5)
    split.mix = split.mix.undo()
    assert torch.equal(split.mix.weight, planted.mix.weight)
    assert torch.equal(split.mix.bias, planted.mix.bias)
    with torch.no_grad():
        assert torch.equal(split(images[0]), planted(images[0]))


def figures(qualities, name):
    return [getattr(concept, name) for quality in qualities for concept in quality.concepts]


def test_quality_on_new_images_without_targets_is_near_the_reports(planted, report, images):
    batches = [(part,) for part in images[0].split(64)]
    qualities = evaluate_splits(planted, report.plan, batches, progress=False)
    assert [(quality.layer, quality.channel) for quality in qualities] == [(s.layer, s.channel) for s in report.plan]
    for name in ("distortion", "leak", "auroc"):
        assert figures(qualities, name) == pytest.approx(figures(report.quality, name), abs=0.05)
    assert max(figures(qualities, "distortion")) < 0.05
    assert max(figures(qualities, "leak")) < 0.05
    assert min(figures(qualities, "auroc")) > 0.95


def test_new_images_belong_to_the_concept_of_their_pattern(planted, report, images):
    """Each concept has all fifty images of its pattern: those that are strong enough; others belong to none."""
    for pattern in range(N_PATTERNS):
        own = images[0][images[1] == pattern]
        for quality in evaluate_splits(planted, report.plan, [(own,)], progress=False):
            counts = [concept.n_own for concept in quality.concepts]
            patterns = [pattern_of(report, quality.channel, number) for number in range(len(counts))]
            for other, count in zip(patterns, counts, strict=True):
                assert count >= 45 if other == pattern else count == 0


def test_targets_of_batches_do_not_matter_to_quality(planted, report, images):
    expected = evaluate_splits(planted, report.plan, [(images[0],)], progress=False)
    for batch in (images, (images[0], images[1].float()), (images[0], boxes(images[0]))):
        assert evaluate_splits(planted, report.plan, [batch], progress=False) == expected


def assert_same_quality(found, expected):
    for name in ("n_own", "n_other"):
        assert figures(found, name) == figures(expected, name)
    for name in ("distortion", "leak", "spurious"):
        assert figures(found, name) == pytest.approx(figures(expected, name), abs=1e-4)


def test_the_split_network_is_judged_as_the_network_before(planted, report, images):
    split = disentangle(planted, report.plan)
    before, after = (evaluate_splits(net, report.plan, [images], progress=False) for net in (planted, split))
    assert_same_quality(after, before)
    assert min(figures(before, "n_own")) > 0


def test_a_split_grouped_convolution_is_judged_as_before(images):
    net = PlantedNet(groups=2).eval()
    report = find(net, class_batches())
    assert sorted(found_in(report)) == GROUPED_MERGED
    split = disentangle(net, report.plan)
    before, after = (evaluate_splits(one, report.plan, [images], progress=False) for one in (net, split))
    assert max(figures(before, "leak")) < 0.05
    assert_same_quality(after, before)


def test_grouped_convolutions_are_split_within_their_groups(images):
    net = PlantedNet(groups=2).eval()
    report = find(net, class_batches())
    assert sorted(found_in(report)) == GROUPED_MERGED
    split = disentangle(net, report.plan)
    with torch.no_grad():
        torch.testing.assert_close(split(images[0]), net(images[0]), rtol=1e-5, atol=1e-5)
    qualities = evaluate_splits(net, report.plan, [images], progress=False)
    assert max(figures(qualities, "leak")) < 0.05
    assert min(figures(qualities, "n_own")) > 40


def test_clusters_behind_a_shifting_batch_norm_are_found_split_and_judged():
    """The same channels as without, moved away from 0 and back again by a batch norm."""
    net = PlantedNet(activation=nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())).eval().requires_grad_(False)
    net.mix.bias -= 3
    net.act[0].running_mean.fill_(-3.0)
    batches = [(part,) for part in planted_images()[0].split(50)]
    report = find_polysemantic_channels(net, batches, "mix", concepts="clusters", progress=False)
    assert sorted(found.channel for found in report.channels) == MERGED
    assert all(split.zero == pytest.approx(-3, abs=1e-2) for split in report.plan)
    split = disentangle(net, report.plan)
    assert list(stored_plan(split)) == list(report.plan)
    assert SplitPlan.from_json(report.plan.to_json()) == report.plan
    judged = evaluate_splits(split, report.plan, batches, progress=False)
    assert all(concept.n_own > 20 for quality in judged for concept in quality.concepts)


def test_without_samples_there_is_no_plan_and_with_all_of_them_nothing_is_held_out(planted, report):
    none = find(planted, plain_batches(), calibration_samples=0)
    assert none.plan is None
    assert none.quality == []
    assert none.cards == []
    assert none.pairs == report.pairs
    with pytest.raises(ValueError, match="A plan needs calibration samples"):
        none.plan_pairs([("mix", 0, 0, 1)])
    every = find(planted, plain_batches(), calibration_samples=None)
    assert every.quality == []
    assert [split.channel for split in every.plan] == [split.channel for split in report.plan]
    few = find(planted, plain_batches(), calibration_samples=4)
    assert all(concept.n_own == 2 for quality in few.quality for concept in quality.concepts)


def test_pairs_of_clusters_can_be_planned_flagged_or_not(planted, report):
    plan = report.plan_pairs([("mix", 5, 2, 0), ("mix", 0, 0, 1)])
    assert [(split.channel, split.concepts) for split in plan] == [(5, [[2], [0]]), (0, [[0], [1]])]
    whole = {split.channel: split for split in report.plan}
    torch.testing.assert_close(plan.splits[0].centres, whole[5].centres[[2, 0]])
    assert plan.splits[0].floors == [whole[5].floors[number] for number in (2, 0)]
    assert plan.splits[1] == whole[0]
    disentangle(planted, plan)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("nix", 0, 0, 1), r"Expected an analysed layer \(mix\), but got 'nix'"),
        (("mix", 8, 0, 1), r"Expected a channel in \[0, 8\), but got 8"),
        (("mix", 0, 1, 1), "Expected two different classes, but got 1 twice"),
        (("mix", 0, 0, 2), "Expected one of its clusters, 0 to 1, but got 2 for channel 0, which has 2"),
        (("mix", 0, -1, 0), "Expected one of its clusters, 0 to 1, but got -1 for channel 0"),
        (("mix", 1, 0, 1), "Expected a channel with clusters, but got 0 for channel 1, which has 0"),
    ],
)
def test_pairs_that_cannot_be_planned_are_refused_in_words(pair, message, report):
    with pytest.raises(ValueError, match=message):
        report.plan_pairs([pair])


def test_settings_are_not_suggested_for_clusters(report):
    with pytest.raises(ValueError, match="`suggest_settings` is about classes, and this report's concepts are clus"):
        report.suggest_settings()
    assert report.sweeps == []


def test_a_plan_of_classes_and_clusters_is_refused_in_words(planted, report, images):
    of_classes = ChannelSplit("mix", 3, [[0], [1]], report.plan.splits[0].membership[:2])
    mixed = SplitPlan([*report.plan, of_classes])
    with pytest.raises(ValueError, match="splits some channels by classes and some by clusters. Judge them one after"):
        evaluate_splits(planted, mixed, [images], progress=False)
    split = disentangle(planted, mixed)
    kept = {one.channel: one for one in stored_plan(split)}
    assert kept[3].centres is None
    assert kept[3].floors is None
    assert SplitPlan([kept[one.channel] for one in report.plan]) == report.plan


def test_centres_and_floors_have_to_fit(report):
    split = report.plan.splits[0]
    arguments = (split.layer, split.channel, split.concepts, split.membership, None, None)
    with pytest.raises(ValueError, match="Expected `centres`, and with them `floors` for 3 concepts, or neither"):
        ChannelSplit(*arguments, split.centres, None)
    with pytest.raises(ValueError, match="Expected `centres`, and with them `floors` for 3 concepts, or neither"):
        ChannelSplit(*arguments, split.centres, [1.0])
    with pytest.raises(ValueError, match=r"`centres` to be finite and as large as `membership`, \[3, 18\], but got"):
        ChannelSplit(*arguments, split.centres[:, :5], split.floors)
    with pytest.raises(ValueError, match="`centres` to be finite"):
        ChannelSplit(*arguments, split.centres * float("nan"), split.floors)


# ------------------------------------------------------------------------------------------------ saved and loaded


def test_report_and_plan_survive_files(planted, report, images, tmp_path):
    report.save(tmp_path / "report.json")
    report.plan.save(tmp_path / "plan.json")
    json.loads((tmp_path / "plan.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    loaded, plan = PolysemanticityReport.load(tmp_path / "report.json"), SplitPlan.load(tmp_path / "plan.json")
    assert loaded.channels == report.channels
    assert loaded.pairs == report.pairs
    assert loaded.concept_names == report.concept_names
    assert loaded.settings == report.settings
    assert loaded.to_markdown() == report.to_markdown()
    assert loaded.has_clusters
    assert plan == report.plan
    for split, own in zip(plan, report.plan, strict=True):
        assert torch.equal(split.centres, own.centres)
        assert split.floors == own.floors
        torch.testing.assert_close(split.centres.norm(dim=1), torch.ones(len(split.concepts)))
    found, expected = (evaluate_splits(planted, one, [images], progress=False) for one in (plan, report.plan))
    assert found == expected
    with pytest.raises(ValueError, match="loaded from a file, which holds no calibration samples"):
        _ = loaded.plan


def test_the_state_of_a_split_network_tells_its_clusters(planted, report, images):
    split = disentangle(planted, report.plan)
    assert stored_plan(split) == report.plan
    again = PlantedNet().eval()
    assert rebuild_splits(again, split.state_dict()) == ["mix"]
    again.load_state_dict(split.state_dict())
    assert stored_plan(again) == report.plan
    with torch.no_grad():
        assert torch.equal(again(images[0]), split(images[0]))
    qualities = evaluate_splits(again, stored_plan(again), [images], progress=False)
    assert_same_quality(qualities, evaluate_splits(split, report.plan, [images], progress=False))
    assert stored_plan(copy.deepcopy(split)) == report.plan


def test_a_split_network_in_half_precision_is_still_judged(planted, report, images):
    split = disentangle(planted, report.plan).bfloat16()
    qualities = evaluate_splits(split, report.plan, [(images[0].bfloat16(),)], progress=False)
    assert max(figures(qualities, "leak")) < 0.05
    assert min(figures(qualities, "n_own")) > 40
    assert all(one.centres is not None for one in stored_plan(split))
