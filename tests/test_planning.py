"""Judging splits on held-out samples."""

import pytest
import torch

from lightning_polydis import find_polysemantic_channels, planning
from lightning_polydis.evaluation import SplitEvaluator
from lightning_polydis.planning import judge_splits
from tests.networks import conv_relu_net, make_batches


@pytest.fixture(scope="module")
def case():
    """What is known about a layer, and splits between two of its classes each."""
    torch.manual_seed(0)
    settings = {"relevance_threshold": 0.02, "class_fraction": 0.3, "similarity_threshold": 0.9, "progress": False}
    report = find_polysemantic_channels(conv_relu_net(), make_batches(), "2", **settings)
    plan = report.plan_pairs([("2", pair.channel, pair.class_a, pair.class_b) for pair in report.pairs[:5]])
    return report._evidence["2"], plan.splits


def test_few_samples_judge_every_split(case):
    evidence, splits = case
    held_out, evaluator = evidence.judged_on, SplitEvaluator(splits)
    evaluator.update(evidence.layer, held_out.inputs, held_out.targets, held_out.relevant)
    for found, expected in zip(judge_splits(*case), evaluator.compute(), strict=True):
        for own, other in zip(found.concepts, expected.concepts, strict=True):
            for name in ("distortion", "leak", "spurious", "auroc"):
                assert getattr(own, name) == pytest.approx(getattr(other, name), rel=1e-5)


def test_of_many_samples_those_of_other_classes_are_thinned_and_its_own_are_not(case, monkeypatch):
    whole = judge_splits(*case)
    monkeypatch.setattr(planning, "MAX_SHARED", 5)
    some, differ = judge_splits(*case), 0
    for found, expected in zip(some, whole, strict=True):
        for own, other in zip(found.concepts, expected.concepts, strict=True):
            assert (own.n_own, own.n_other) == (other.n_own, other.n_other)
            for name in ("distortion", "leak", "auroc", "auroc_original"):
                assert getattr(own, name) == pytest.approx(getattr(other, name), rel=1e-5)
            differ += own.spurious != pytest.approx(other.spurious, rel=1e-3)
    assert differ, "remaining classes are seen less"


def test_how_many_samples_are_looked_at_together_changes_nothing(case, monkeypatch):
    whole = judge_splits(*case)
    monkeypatch.setattr(planning, "PIECE_ELEMENTS", 1)
    for found, expected in zip(judge_splits(*case), whole, strict=True):
        assert found.mean("distortion") == pytest.approx(expected.mean("distortion"), rel=1e-5)
        assert found.mean("spurious") == pytest.approx(expected.mean("spurious"), rel=1e-5)
