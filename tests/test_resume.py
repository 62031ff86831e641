"""Interrupted runs, and what a checkpoint knows of an analysis."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_polydis import PolysemanticityReport, SplitConv2d, SplitPlan
from lightning_polydis.state import FORMAT_VERSION, CallbackState
from tests.networks import Classifier, conv_relu_net, loader, make_images, train_briefly
from tests.runs import callback_for, make_trainer
from tests.sample_reports import sample_report

ROOT = Path(__file__).parent.parent


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Classifier(train_briefly(conv_relu_net()))


def run(folder, where, every_n_epochs=1):
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/killed_run.py"), str(folder), where, str(every_n_epochs)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run(folder, "never").returncode == 0
    return folder


@pytest.mark.parametrize("where", ["train-2-1", "validate-3-1"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(where, uninterrupted, tmp_path):
    killed = run(tmp_path / "run", where)
    assert killed.returncode == -9, killed.stderr[-3000:]
    assert not (tmp_path / "run" / "statistics.pt").exists()
    resumed = run(tmp_path / "run", "never")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    found, expected = (torch.load(folder / "statistics.pt") for folder in (tmp_path / "run", uninterrupted))
    assert found["n_validations"] == expected["n_validations"] == 5
    assert torch.equal(found["counts"], expected["counts"])
    assert torch.equal(found["n_images"], expected["n_images"])
    assert found["vectors"].keys() == expected["vectors"].keys()
    assert all(torch.equal(value, expected["vectors"][key]) for key, value in found["vectors"].items())
    for name, kind in (("report.json", PolysemanticityReport), ("split_plan.json", SplitPlan)):
        assert (tmp_path / "run" / name).read_text() == (uninterrupted / name).read_text()
        kind.load(tmp_path / "run" / name)
    assert not list((tmp_path / "run").glob(".*")), "half-written files"


class Stop(Callback):
    """Ends a run between the last validation and the split."""

    def on_train_end(self, trainer, pl_module):
        raise RuntimeError("power cut")


def interrupted(module, callback, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    trainer = make_trainer(tmp_path, callback, checkpoint, Stop(), max_epochs=2, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.fit(module, loader(), loader())
    return tmp_path / "last.ckpt"


def test_report_and_plan_survive_in_a_checkpoint_of_plain_types(module, tmp_path):
    callback = callback_for()
    path = interrupted(module, callback, tmp_path)
    state = torch.load(path, weights_only=True)["callbacks"][callback.state_key]
    assert state["format_version"] == FORMAT_VERSION
    restored = callback_for()
    restored.load_state_dict(state)
    assert restored.plan == callback.plan
    assert len(restored.plan) > 0
    assert restored.report.pairs == callback.report.pairs
    assert restored.report.channels == callback.report.channels
    assert restored.report.to_markdown() == callback.report.to_markdown()


def test_a_run_that_ended_before_the_split_is_split_when_it_is_taken_up_again(module, tmp_path):
    path = interrupted(module, callback_for(split=True), tmp_path)
    x = make_images()[0]
    expected = module.eval()(x)
    fresh, callback = Classifier(), callback_for(split=True)
    make_trainer(tmp_path, callback, max_epochs=2).fit(fresh, loader(), loader(), ckpt_path=path)
    assert isinstance(fresh.net[2], SplitConv2d)
    assert fresh.net[2].channels.tolist() == [split.channel for split in callback.plan]
    torch.testing.assert_close(fresh.eval()(x), expected, rtol=1e-4, atol=1e-5)


def test_the_schedule_of_a_resumed_run_is_that_of_the_whole(module, tmp_path):
    class Analysed(Callback):
        def __init__(self, callback):
            self.callback, self.steps = callback, []

        def on_validation_end(self, trainer, pl_module):
            self.steps.append(self.callback._analysed_step)

    def trainer_for(folder, max_epochs, analysed):
        checkpoint = ModelCheckpoint(folder, save_last=True)
        arguments = {"max_epochs": max_epochs, "num_sanity_val_steps": 0, "enable_checkpointing": True}
        return make_trainer(folder, analysed.callback, analysed, checkpoint, **arguments)

    whole = Analysed(callback_for(every_n_epochs=3))
    trainer_for(tmp_path / "whole", 8, whole).fit(copy.deepcopy(module), loader(), loader())
    first, second = Analysed(callback_for(every_n_epochs=3)), Analysed(callback_for(every_n_epochs=3))
    trainer_for(tmp_path / "parts", 2, first).fit(module, loader(), loader())
    trainer_for(tmp_path / "parts", 8, second).fit(
        Classifier(), loader(), loader(), ckpt_path=tmp_path / "parts" / "last.ckpt"
    )
    assert whole.steps == [3, 3, 3, 12, 12, 12, 21, 24]
    assert second.steps[1:] == whole.steps[3:]


OLD = {"report": None}


def test_a_checkpoint_does_not_replace_what_led_to_the_split(module, tmp_path):
    callback = callback_for(split=True)
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    trainer = make_trainer(tmp_path, callback, checkpoint, max_epochs=2, enable_checkpointing=True)
    trainer.fit(module, loader(), loader())
    report, plan, step = callback.report, callback.plan, callback._analysed_step
    trainer.test(module, loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    trainer.validate(module, loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert callback.report is report
    assert callback.plan is plan
    assert callback._analysed_step == step


def test_numbers_and_names_of_numpy_are_plain_in_checkpoints(module, tmp_path):
    callback = callback_for(
        relevance_threshold=np.float64(0.05),
        class_names=list(np.array(["a", "b", "c", "d"])),
    )
    trainer = make_trainer(tmp_path, callback)
    trainer.fit(module, loader(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert state["report"]["class_names"] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("state", [{}, OLD, {"format_version": 1, "report": None, "plan": None}])
def test_an_older_state_loads(state):
    callback = callback_for()
    callback.load_state_dict(state)
    assert callback.report is None
    assert callback.plan is None


def test_an_older_state_with_a_report_and_no_more_loads(module, tmp_path):
    callback = callback_for()
    make_trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    state = {"report": callback.state_dict()["report"]}
    restored = callback_for()
    restored.load_state_dict(state)
    assert restored.report.pairs == callback.report.pairs


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"format_version": FORMAT_VERSION + 1}, "written by a newer lightning_polydis: update the package"),
        ({"report": {"settings": {}}}, "The callback state is damaged: KeyError: "),
        ({"format_version": None}, "The callback state is damaged: TypeError: a format_version of None"),
        ({"report": 3}, "The callback state is damaged: TypeError: "),
    ],
)
def test_a_state_that_cannot_be_read_is_a_warning(state, message):
    callback = callback_for()
    with pytest.warns(UserWarning, match=message):
        callback.load_state_dict(state)
    assert callback.report is None


def test_a_damaged_picture_in_a_checkpoint_stops_nothing():
    report = sample_report()
    content = CallbackState(report, 7).to_dict()
    content["report"]["cards"][0]["rows"][0]["images"][0]["jpeg"] = "bm8gcGljdHVyZQ=="
    restored = CallbackState.from_dict(content)
    assert restored.analysed_step == 7
    assert restored.report.channels == report.channels
    assert restored.report.cards[0].rows[0].images[0].pixels is None
    assert restored.to_dict()["report"]["cards"] == content["report"]["cards"]


def test_a_checkpoint_before_the_last_validation_holds_the_report_without_choosing_a_plan(module, tmp_path):
    callback = callback_for()
    trainer = make_trainer(tmp_path, callback)
    trainer.validate(module, loader(), verbose=False)
    assert callback.state_dict()["plan"] is not None  # the end of a run has chosen it
    report = callback.report
    early = callback_for()
    early.load_state_dict({**callback.state_dict(), "plan": None})
    assert early.report.pairs == report.pairs
    assert early.plan is None
