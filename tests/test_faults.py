"""Whatever goes wrong around the callback: what it touched is given back, and the next epoch is fine."""

import copy
import errno
import gc
import os

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from torchmetrics import MeanMetric

from lightning_polydis import find_polysemantic_channels
from tests.networks import Classifier, loader, make_batches
from tests.runs import SETTINGS, callback_for, make_trainer, n_hooks


class OwnError(Exception):
    """The user's own."""


class InTheStep(Classifier):
    """Fails in the second validation step, before, in or after the forward pass."""

    def __init__(self, net, where="after", error=OwnError):
        super().__init__(net)
        self.where, self.error, self.is_failing = where, error, True
        self.net[4].register_forward_hook(self._in_the_pass)
        self.index = 0

    def fail(self, where):
        if self.is_failing and where == self.where and self.index == 1 and not self.training:
            raise self.error("the user's own")

    def _in_the_pass(self, module, args, output):
        self.fail("in")

    def validation_step(self, batch, batch_idx):
        self.index = batch_idx
        self.fail("before")
        logits = self(batch[0])
        self.fail("after")
        self.log("val_loss", F.cross_entropy(logits, batch[1]))


class FailingMetric(MeanMetric):
    is_failing = True

    def update(self, value):
        if self.is_failing:
            raise OwnError("the user's own")
        super().update(value)


class InTheMetric(Classifier):
    def __init__(self, net):
        super().__init__(net)
        self.metric = FailingMetric()

    def validation_step(self, batch, batch_idx):
        self.metric(F.cross_entropy(self(batch[0]), batch[1]))


class FailingLogger(CSVLogger):
    is_failing = True

    def log_metrics(self, metrics, step=None):
        if self.is_failing:
            raise OwnError("the user's own")


class FailingCallback(Callback):
    def __init__(self, hook):
        self.is_failing = True

        def fail(trainer, pl_module, *args, **kwargs):
            if self.is_failing and not trainer.sanity_checking:
                raise OwnError("the user's own")

        setattr(self, hook, fail)


def case(name, net, tmp_path):
    """The module, the trainer's arguments, and what to call to make it well again."""
    module, kwargs, callbacks = Classifier(net), {}, []
    sick = module
    if name.startswith("step"):
        module = sick = InTheStep(net, name.removeprefix("step "))
    elif name == "metric":
        module = InTheMetric(net)
        sick = module.metric
    elif name == "logger":
        kwargs["logger"] = sick = FailingLogger(tmp_path)
    elif name.startswith("on_"):
        sick = FailingCallback(name)
        callbacks.append(sick)
    return module, kwargs, callbacks, sick


CASES = ["step before", "step in", "step after", "metric", "logger", "on_validation_start", "on_validation_batch_end"]
CASES += ["on_validation_epoch_end", "on_validation_end"]


def assert_given_back(module, trainer):
    assert n_hooks(module) == (1 if isinstance(module, InTheStep) else 0)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert trainer.validate_loop.inference_mode
    assert trainer.test_loop.inference_mode


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("loop", ["fit", "validate"])
@pytest.mark.parametrize("name", CASES)
def test_an_exception_leaves_nothing_behind_and_the_next_epoch_is_fine(name, loop, first, net, tmp_path):
    if name == "logger" and loop == "validate":
        name = "on_validation_end"
    module, kwargs, others, sick = case(name, copy.deepcopy(net), tmp_path)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.0)
    callback = callback_for(strict=True)
    callbacks = [callback, *others] if first else [*others, callback]
    trainer = make_trainer(tmp_path, *callbacks, log_every_n_steps=1, num_sanity_val_steps=0, **kwargs)
    arguments = (loader(), loader()) if loop == "fit" else (loader(),)
    with pytest.raises(OwnError, match="the user's own"):
        getattr(trainer, loop)(module, *arguments)
    assert_given_back(module, trainer)
    sick.is_failing = False
    trainer = make_trainer(tmp_path, *callbacks, log_every_n_steps=1, **kwargs)
    getattr(trainer, loop)(module, *arguments)
    assert_given_back(module, trainer)
    expected = find_polysemantic_channels(net, make_batches(), "2", progress=False, **SETTINGS)
    assert [pair.cosine_similarity for pair in callback.report.pairs] == [p.cosine_similarity for p in expected.pairs]


@pytest.mark.parametrize("where", ["before", "in", "after"])
def test_control_c_in_the_middle_of_validation(where, net, tmp_path):
    module = InTheStep(copy.deepcopy(net), where, KeyboardInterrupt)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.0)
    callback = callback_for(split=True)
    trainer = make_trainer(tmp_path, callback, num_sanity_val_steps=0)
    with pytest.raises(SystemExit):
        trainer.fit(module, loader(), loader())
    assert_given_back(module, trainer)
    assert callback.report is None
    module.is_failing = False
    make_trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    assert callback.report.n_images == 48


# ------------------------------------------------------------------------------------------------------------- files


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_a_warning_and_leaves_no_half_file(net, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "fsync", full)
    module, callback = Classifier(copy.deepcopy(net)), callback_for(strict=True, dirpath=tmp_path / "files")
    with pytest.warns(UserWarning, match=r"`report.json` could not be written to `.*`: .* No space left"):
        make_trainer(tmp_path, callback, max_epochs=2).fit(module, loader(), loader())
    assert callback.report is not None
    assert callback.plan is not None
    assert list((tmp_path / "files").iterdir()) == []


def test_a_file_that_is_there_survives_a_disk_that_is_full(net, monkeypatch, tmp_path):
    callback = callback_for(dirpath=tmp_path)
    module = Classifier(copy.deepcopy(net))
    make_trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    before = (tmp_path / "report.json").read_text()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="could not be written"):
        make_trainer(tmp_path, callback).validate(module, loader(seed=3), verbose=False)
    assert (tmp_path / "report.json").read_text() == before


@pytest.mark.parametrize("method", ["add_text", "add_figure"])
def test_a_logger_that_cannot_write_is_a_warning(method, net, monkeypatch, tmp_path):
    monkeypatch.setattr(SummaryWriter, method, full)
    module, callback = Classifier(copy.deepcopy(net)), callback_for(strict=True)
    trainer = make_trainer(tmp_path, callback, logger=TensorBoardLogger(tmp_path))
    with pytest.warns(UserWarning, match="could not be written to the loggers: .* No space left"):
        trainer.fit(module, loader(), loader())
    assert callback.report is not None


# -------------------------------------------------------------------------------------------------------------- soak


class Census(Callback):
    """Counts tensors and hooks at the end of validations."""

    def __init__(self):
        self.tensors, self.hooks, self.objects = [], [], []

    def on_validation_end(self, trainer, pl_module):
        if (trainer.current_epoch + 1) % 50 == 0:
            gc.collect()
            everything = gc.get_objects()
            tensors = [thing for thing in everything if type(thing) in (torch.Tensor, torch.nn.Parameter)]
            self.tensors.append((len(tensors), sum(tensor.nbytes for tensor in tensors)))
            self.hooks.append(n_hooks(pl_module))
            self.objects.append(len(everything))


@pytest.mark.filterwarnings("ignore")
def test_two_hundred_epochs_leave_memory_and_hooks_as_they_were(net, tmp_path):
    census, module = Census(), Classifier(copy.deepcopy(net))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.0)
    callback = callback_for(calibration_samples=4)
    trainer = make_trainer(tmp_path, callback, census, max_epochs=200)
    trainer.fit(module, loader(n=16), loader(n=16))
    assert len(census.hooks) == 4
    assert len(set(census.hooks)) == 1
    assert len(set(census.tensors[:3])) == 1  # the last epoch also holds its plan
    assert census.objects[2] - census.objects[1] < 100
