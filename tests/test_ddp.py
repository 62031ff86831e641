import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_polydis import PolysemanticityReport, SplitPlan, find_polysemantic_channels
from lightning_polydis.cards import CardImage
from tests.ddp_run import shared_classes
from tests.networks import Classifier, conv_relu_net, make_batches, train_briefly

ROOT = Path(__file__).parent.parent
SETTINGS = {"relevance_threshold": 0.05, "class_fraction": 0.5, "similarity_threshold": 0.9, "progress": False}


def run(folder, loop, script="ddp_run.py"):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, str(ROOT / "tests" / script), str(folder), loop],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder and printed text of each loop's run, which is made once."""

    @functools.cache
    def made(loop):
        folder = tmp_path_factory.mktemp(loop)
        return folder, run(folder, loop)

    return made


@pytest.mark.parametrize("loop", ["validate", "fit"])
def test_two_processes_find_what_one_finds(loop, runs):
    folder, printed = runs(loop)
    reports = [PolysemanticityReport.load(folder / f"report_{rank}.json") for rank in (0, 1)]
    plans = [SplitPlan.load(folder / f"plan_{rank}.json") for rank in (0, 1)]
    assert reports[0].pairs == reports[1].pairs
    assert plans[0] == plans[1]
    assert printed.count("polysemantic channels (48 images)") == 1, "one process reports"
    if loop == "validate":
        metrics = [json.loads((folder / f"metrics_{rank}.json").read_text()) for rank in (0, 1)]
        shared = [{name: value for name, value in m.items() if "split_" in name} for m in metrics]
        assert shared[0] == shared[1]
        assert "polydis/net.2/split_auroc" in shared[0]
    weights = [torch.load(folder / f"weights_{rank}.pt") for rank in (0, 1)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value.nan_to_num(-1), weights[1][name].nan_to_num(-1)), name  # no rho is NaN

    torch.manual_seed(0)
    module = Classifier(train_briefly(conv_relu_net()))
    if loop == "fit":  # the weights that were analysed are those of the run
        from lightning_polydis.surgery import rebuild_splits

        rebuild_splits(module, weights[0])
        module.load_state_dict(weights[0])
        module.net[2] = module.net[2].undo()
    expected = find_polysemantic_channels(
        module,
        make_batches(),
        "net.2",
        **SETTINGS,
    )
    assert len(expected.pairs) > 2
    assert reports[0].n_images == 48
    found = [(pair.channel, pair.class_a, pair.class_b) for pair in reports[0].pairs]
    assert found == [(pair.channel, pair.class_a, pair.class_b) for pair in expected.pairs]
    cosines = [[pair.cosine_similarity for pair in report.pairs] for report in (reports[0], expected)]
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-6)


def test_two_processes_that_share_every_class_calibrate_as_one_does(runs):
    """Groups of images are formed in each process, so the one process sees the images of the first, then the others."""
    folder, _ = runs("validate")
    reports = [PolysemanticityReport.load(folder / f"shared_report_{rank}.json") for rank in (0, 1)]
    plans = [SplitPlan.load(folder / f"shared_plan_{rank}.json") for rank in (0, 1)]
    assert plans[0] == plans[1]
    assert reports[0].pairs == reports[1].pairs
    torch.manual_seed(5)
    net = train_briefly(conv_relu_net())
    images, targets = shared_classes()
    order = torch.cat([torch.arange(0, 64, 2), torch.arange(1, 64, 2)])
    settings = {"relevance_threshold": 0.02, "class_fraction": 0.3, "progress": False}
    expected = find_polysemantic_channels(net, [(images[order], targets[order])], "2", **settings)
    assert reports[0].n_images == expected.n_images == 64
    assert len(expected.pairs) > 1

    def figures(report):
        return {
            (pair.channel, pair.class_a, pair.class_b, pair.is_clear): [pair.cosine_similarity, *pair.interval]
            for pair in report.pairs
        }

    found, alone = figures(reports[0]), figures(expected)
    assert found.keys() == alone.keys()
    for key, values in alone.items():
        assert found[key] == pytest.approx(values, abs=1e-5)
    measured = [
        {channel.channel: channel.threshold for channel in report.channels} for report in (reports[0], expected)
    ]
    assert measured[0] == pytest.approx(measured[1], abs=1e-5)
    known = [{channel.channel: channel.reliability for channel in report.channels} for report in (reports[0], expected)]
    assert known[0] == pytest.approx(known[1], abs=1e-5)


def test_a_composite_decides_in_two_processes_as_in_one(runs):
    folder, _ = runs("validate")
    reports = [PolysemanticityReport.load(folder / f"composite_report_{rank}.json") for rank in (0, 1)]
    plans = [SplitPlan.load(folder / f"composite_plan_{rank}.json") for rank in (0, 1)]
    assert reports[0].pairs == reports[1].pairs
    assert plans[0] == plans[1]
    torch.manual_seed(0)
    net = train_briefly(conv_relu_net())
    found, composite, plain = (
        {(pair.channel, pair.class_a, pair.class_b): pair.cosine_similarity for pair in report.pairs}
        for report in (
            reports[0],
            find_polysemantic_channels(net, make_batches(n=40), "2", attribution="epsilon_plus_flat", **SETTINGS),
            find_polysemantic_channels(net, make_batches(n=40), "2", **SETTINGS),
        )
    )
    assert found == pytest.approx(composite, abs=1e-6)
    assert found.keys() != plain.keys()
    assert len(found) > 2
    assert reports[0].n_images == 40


def test_cards_hold_the_images_of_both_processes(runs):
    folder, _ = runs("validate")
    reports = [PolysemanticityReport.load(folder / f"composite_report_{rank}.json") for rank in (0, 1)]
    torch.manual_seed(0)
    net, settings = train_briefly(conv_relu_net()), {**SETTINGS, "attribution": "epsilon_plus_flat"}
    alone = find_polysemantic_channels(net, make_batches(n=40), "2", **settings)
    assert len(alone.cards) > 1
    for report in reports:
        assert report.overviews[0].n_candidate_pairs == alone.overviews[0].n_candidate_pairs
        for found, expected in zip(report.cards, alone.cards, strict=True):
            assert (found.channel, found.concepts) == (expected.channel, expected.concepts)
            original, other = found.rows[0].images, expected.rows[0].images
            assert [image.target for image in original] == [image.target for image in other]
            assert [image.activation for image in original] == pytest.approx([image.activation for image in other])
            for one, two in zip(original, other, strict=True):  # both have been, or will be, a JPEG
                assert (one.pixels.float() - CardImage.from_json(two.to_json()).pixels.float()).abs().mean() < 2


def test_a_process_without_a_usable_batch_takes_part(tmp_path):
    run(tmp_path, "nan")
    reports = [PolysemanticityReport.load(tmp_path / f"report_{rank}.json") for rank in (0, 1)]
    torch.manual_seed(0)
    expected = find_polysemantic_channels(train_briefly(conv_relu_net()), make_batches(), "2", **SETTINGS)
    for report in reports:
        assert (report.n_images, report.n_images_left_out) == (48, 48)
        found = [(pair.channel, pair.class_a, pair.class_b) for pair in report.pairs]
        assert found == [(pair.channel, pair.class_a, pair.class_b) for pair in expected.pairs]


def test_failures_uneven_batches_compiled_networks_and_training_after_a_split(tmp_path):
    """The script asserts that both processes drop what fails in one; here their results are compared."""
    run(tmp_path, "all", "ddp_faults.py")
    torch.manual_seed(0)
    net = train_briefly(conv_relu_net())
    for name, batches in (("uneven", make_batches(n=40)), ("compiled", make_batches())):
        expected = find_polysemantic_channels(net, batches, "2", **SETTINGS)
        assert len(expected.pairs) > 2
        for rank in (0, 1):
            report = PolysemanticityReport.load(tmp_path / f"{name}_{rank}.json")
            assert report.n_images == expected.n_images
            found, alone = (
                {(pair.channel, pair.class_a, pair.class_b): pair.cosine_similarity for pair in each.pairs}
                for each in (report, expected)
            )
            assert found == pytest.approx(alone, abs=1e-6)
    plans = [SplitPlan.load(tmp_path / f"sizes_{rank}.json") for rank in (0, 1)]
    assert plans[0] == plans[1]
    assert len(plans[0]) > 0
    weights = [torch.load(tmp_path / f"trained_{rank}.pt") for rank in (0, 1)]
    assert "net.2.expand.weight" in weights[0]
    for name, value in weights[0].items():
        assert torch.equal(value.nan_to_num(-1), weights[1][name].nan_to_num(-1)), name


def test_spawned_processes_leave_their_results_in_files(tmp_path):
    run(tmp_path, "spawned", "ddp_faults.py")
    report = PolysemanticityReport.load(tmp_path / "spawned" / "report.json")
    assert report.n_images == 48
    plan = SplitPlan.load(tmp_path / "spawned" / "split_plan.json")
    assert len(plan) == len(report.channels) > 0
    module = Classifier()
    module.load_state_dict(torch.load(tmp_path / "spawned.pt"))
    again = find_polysemantic_channels(
        module,
        make_batches(),
        "net.2",
        **SETTINGS,
    )
    assert [channel.channel for channel in again.channels] == [channel.channel for channel in report.channels]
