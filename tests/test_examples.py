"""The programs in examples/ do what they say: handwritten digits, and what long runs have in common."""

import io
from functools import partial
from types import SimpleNamespace

import pytest
from rich.console import Console

from lightning_polydis import ChannelDisentanglement, PolysemanticityReport, SplitPlan
from tests.examples import load_example


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("digits")
    return load_example("digits").main(epochs=2, output_dir=folder), folder


def test_digits_split_changes_nothing(digits_run):
    outcome, _ = digits_run
    assert outcome.n_split > 0
    assert outcome.logit_difference < 1e-4
    assert outcome.accuracy_after == pytest.approx(outcome.accuracy_before, abs=1e-6)


def test_digits_writes_its_files(digits_run):
    outcome, folder = digits_run
    assert outcome.log_dir.is_relative_to(folder)
    report = PolysemanticityReport.load(outcome.log_dir / "report.json")
    plan = SplitPlan.load(outcome.log_dir / "split_plan.json")
    assert [split.channel for split in plan] == [found.channel for found in report.channels]
    assert len(plan) == outcome.n_split
    assert list(outcome.log_dir.glob("events.out.tfevents*"))
    assert (folder / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_digits_with_nothing_to_split(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    example = load_example("digits")
    # No channel can hold all of an image's relevance.
    monkeypatch.setattr(example, "ChannelDisentanglement", partial(ChannelDisentanglement, relevance_threshold=1.0))
    outcome = example.main(epochs=1, output_dir=tmp_path)
    assert (outcome.n_split, outcome.logit_difference, outcome.picture) == (0, 0, None)
    assert "No channel was found to be polysemantic" in capsys.readouterr().out


@pytest.fixture
def long_run(monkeypatch):
    """The module, with a clock that shows what the test says."""
    module = load_example("long_run")
    module.now = 0.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: module.now))
    return module


def lines_of_a_pass(module, seconds, n_images, n_done=0, **numbers):
    """What a log file gets if each batch of ten images takes so many seconds."""
    console = Console(file=io.StringIO(), force_terminal=False)
    n_batches = (n_images - n_done) // 10
    batches = [([], range(10))] * n_batches
    batches = module.Watch(console).through(batches, "find", n_images, n_done=n_done, **numbers)
    for _, took in zip(batches, seconds, strict=True):
        module.now += took
    return [line for line in console.file.getvalue().splitlines() if line]  # older versions of rich add empty ones


def test_progress_in_a_log_file_and_the_time_of_all(long_run):
    """The first two batches do not count; after them, ten images in half a second."""
    lines = lines_of_a_pass(long_run, [500, 500] + [0.5] * 298, 4000, n_done=1000, n_later=8000)
    assert lines[0] == "find: 1,030 of 4,000 images, 20 images/s, 2 min left"
    assert "About 9 min to go: 2,880 images here, 8,000 later, 20 images/s" in lines
    assert "find: 2,230 of 4,000 images, 20 images/s, 88 s left" in lines
    assert lines[-1] == "find: 4,000 images, 20 images/s"


def test_what_workers_have_loaded_ahead_does_not_count(long_run):
    """Eight batches that are there at once, and then four together every two seconds: 20 images a second."""
    bursts = [9, 9, *[0] * 8, *[0, 0, 0, 2] * 10]
    lines = lines_of_a_pass(long_run, bursts, 500, n_workers=4)
    assert [line for line in lines if "About" in line] == ["About 10 s to go: 220 images here, 0 later, 22 images/s"]


def test_old_results_are_taken_away_and_other_files_stay(long_run, tmp_path):
    (tmp_path / "report.json").write_text("somebody else's")
    for change in (1, 2):
        stages = long_run.Stages(tmp_path, {"find": {"limit": change}}, {"find": ["report.json"]})
        assert stages.left() == ["find"]
        stages.begin("find")
        assert (tmp_path / "report.json").exists() == (change == 1)
        stages.end("find")
    assert stages.left() == ["find"]  # there are no results


def test_a_stage_without_its_files_is_done_again_and_all_after_it(long_run, tmp_path):
    stages = long_run.Stages(tmp_path, {"find": {}, "plan": {}}, {"find": ["a.json", "b.html"], "plan": ["plan.json"]})
    for stage, files in (("find", ["a.json", "b.html"]), ("plan", ["plan.json"])):
        stages.begin(stage)
        for name in files:
            (tmp_path / name).touch()
        stages.end(stage)
    assert stages.left() == []
    (tmp_path / "b.html").unlink()
    assert stages.left() == ["find", "plan"]


def test_a_pass_with_nothing_left(long_run):
    assert lines_of_a_pass(long_run, [], 50, n_done=50) == ["find: nothing was left to do"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(41.7, "42 s"), (89.6, "90 s"), (90, "2 min"), (3000, "50 min"), (8000, "2 h 13 min")]
)
def test_durations(seconds, text):
    assert load_example("long_run").duration(seconds) == text
