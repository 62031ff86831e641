"""Clusters that two processes find together are those that one finds."""

import json

import pytest
import torch

from lightning_polydis import PolysemanticityReport, SplitPlan, evaluate_splits, find_polysemantic_channels
from tests.planted import MERGED, Autoencoder, planted_images
from tests.test_ddp import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clusters")
    run(folder, "clusters")
    return folder


@pytest.fixture(scope="module")
def alone():
    images, own = planted_images(240)
    return find_polysemantic_channels(
        Autoencoder(), zip(images.split(20), own.split(20), strict=True), "net.mix", concepts="clusters", progress=False
    )


def loaded(folder, name):
    reports = [PolysemanticityReport.load(folder / f"{name}_report_{rank}.json") for rank in (0, 1)]
    plans = [SplitPlan.load(folder / f"{name}_plan_{rank}.json") for rank in (0, 1)]
    assert plans[0] == plans[1]
    assert reports[0].pairs == reports[1].pairs
    assert reports[0].channels == reports[1].channels
    assert reports[0].quality == reports[1].quality
    return reports, plans[0]


def test_two_processes_find_what_one_finds(folder, alone):
    reports, plan = loaded(folder, "plain")
    assert sorted(channel.channel for channel in alone.channels) == MERGED
    for report in reports:
        assert report.n_images == 240
        assert report.notes == []
        for found, expected in zip(report.channels, alone.channels, strict=True):
            assert (found.channel, found.concepts, found.contents) == (
                expected.channel,
                expected.concepts,
                expected.contents,
            )
            assert found.stability == pytest.approx(expected.stability, abs=1e-6)
            assert found.cosine_similarity == pytest.approx(expected.cosine_similarity, abs=1e-4)
        assert report.concept_names == alone.concept_names
        for found, expected in zip(report.quality, alone.quality, strict=True):
            assert [concept.n_own for concept in found.concepts] == [concept.n_own for concept in expected.concepts]
            assert found.mean("leak") == pytest.approx(expected.mean("leak"), abs=1e-3)
    for split, expected in zip(plan, alone.plan, strict=True):
        assert (split.channel, split.concepts, split.directions) == (
            expected.channel,
            expected.concepts,
            expected.directions,
        )
        torch.testing.assert_close(split.membership, expected.membership, rtol=0, atol=1e-3)
        torch.testing.assert_close(split.centres, expected.centres, rtol=0, atol=1e-3)
        assert split.floors == pytest.approx(expected.floors, rel=1e-5)


def test_cards_and_overviews_hold_the_images_of_both_processes(folder, alone):
    reports, _ = loaded(folder, "plain")
    for report in reports:
        assert report.overviews[0].channels == alone.overviews[0].channels
        for found, expected in zip(report.cards, alone.cards, strict=True):
            images, others = found.rows[0].images, expected.rows[0].images
            assert [image.label for image in images] == [image.label for image in others]
            assert [image.activation for image in images] == pytest.approx([image.activation for image in others])


def test_split_channels_are_judged_by_the_images_of_all_processes(folder):
    metrics = [json.loads((folder / f"metrics_{rank}.json").read_text()) for rank in (0, 1)]
    own = [{name: value for name, value in each.items() if "split_" in name} for each in metrics]
    assert own[0] == own[1]
    _, plan = loaded(folder, "plain")
    expected = evaluate_splits(Autoencoder(), plan, [(planted_images(240)[0],)], progress=False)
    for name in ("leak", "distortion", "auroc"):
        mean = sum(quality.mean(name) for quality in expected) / len(expected)
        assert own[0][f"polydis/net.mix/split_{name}"] == pytest.approx(mean, abs=1e-4)


def test_where_memory_is_short_both_keep_as_many_images_as_fit_together(folder, alone):
    reports, plan = loaded(folder, "short")
    for report in reports:
        assert [channel.concepts for channel in report.channels] == [channel.concepts for channel in alone.channels]
        judged = sum(concept.n_own for concept in report.quality[0].concepts)
        assert 0 < judged < sum(concept.n_own for concept in alone.quality[0].concepts)
    assert any("The layer inputs of only the" in note for note in reports[0].notes)
    assert len(plan) == len(alone.plan)


def test_a_process_without_a_usable_batch_takes_part(folder, alone):
    reports, plan = loaded(folder, "nan")
    for report in reports:
        assert (report.n_images, report.n_images_left_out) == (240, 240)
        assert [channel.channel for channel in report.channels] == [channel.channel for channel in alone.channels]
        assert [channel.concepts for channel in report.channels] == [channel.concepts for channel in alone.channels]
    assert len(plan) == len(alone.plan)
