"""The callback with `split=True`, and checkpoints of what it has split."""

import copy
import json
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_polydis import (
    SplitConv2d,
    load_from_checkpoint,
)
from tests.networks import Classifier, loader, make_batches
from tests.runs import callback_for, make_trainer, n_hooks

# -------------------------------------------------------------------------------------------------------- the split


def test_fit_ends_with_a_split_module_that_computes_the_same(module, tmp_path, capfd):
    before = {}

    class Keep(Callback):
        def on_train_end(self, trainer, pl_module):
            before.update({k: v.clone() for k, v in pl_module.state_dict().items()})

    callback = callback_for(["net.2", "net.4"], split=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*weights have changed.*")
        make_trainer(tmp_path, callback, Keep(), max_epochs=2).fit(module, loader(), loader())
    assert isinstance(module.net[2], SplitConv2d)
    assert isinstance(module.net[4], SplitConv2d)
    plain = Classifier()
    plain.load_state_dict(before)
    images = make_batches()[0][0]
    torch.testing.assert_close(module.eval()(images), plain.eval()(images), rtol=1e-5, atol=1e-5)
    assert torch.equal(module.net[2].undo().weight, plain.net[2].weight)
    assert {split.channel for split in callback.plan if split.layer == "net.2"} == set(module.net[2].channels.tolist())


def test_nothing_to_split_is_told(module, tmp_path, caplog):
    callback = callback_for(split=True, similarity_threshold=-0.99)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        make_trainer(tmp_path, callback).fit(module, loader(), loader())
    assert any("No channel was flagged, so nothing is split" in record.message for record in caplog.records)
    assert isinstance(module.net[2], nn.Conv2d)


def test_a_fit_without_validation_says_that_there_is_no_report(module, tmp_path):
    callback = callback_for()
    with pytest.warns(UserWarning, match="No validation epoch was analysed, so there is no report"):
        make_trainer(tmp_path, callback).fit(module, loader())
    assert callback.report is None


def test_the_precision_of_the_split_is_told(module, tmp_path, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        make_trainer(tmp_path, callback_for(split=True)).fit(module, loader(), loader())
    assert any("largest relative change of its output" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    "kwargs", [{"max_epochs": 2, "limit_val_batches": 2, "check_val_every_n_epoch": 2, "max_steps": 5}]
)
def test_weights_that_changed_since_the_analysis_are_warned_about(module, kwargs, tmp_path):
    class TrainOn(Callback):
        def on_train_end(self, trainer, pl_module):
            pl_module.net[2].weight.data.mul_(1.01)

    callback = callback_for(split=True)
    with pytest.warns(UserWarning, match="The weights have changed since the analysis"):
        make_trainer(tmp_path, callback, TrainOn()).fit(module, loader(), loader())
    assert isinstance(module.net[2], SplitConv2d), "the final weights are split"


def test_a_step_after_the_analysis_makes_it_stale(module, tmp_path):
    class Frozen(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD([self.net[8].weight], 0.1)  # the layer itself does not change

    frozen = Frozen(module.net)
    callback = callback_for(split=True)
    with pytest.warns(UserWarning, match="The weights have changed since the analysis"):
        make_trainer(tmp_path, callback, max_steps=5, max_epochs=-1, check_val_every_n_epoch=1).fit(
            frozen, loader(), loader()
        )


def test_a_split_that_would_change_the_output_is_refused(module, monkeypatch, tmp_path):
    from lightning_polydis import surgery

    def broken(layer, splits):
        split = original(layer, splits)
        split.expand.weight.data[0] += 1e-3
        return split

    original = surgery.split_layer
    monkeypatch.setattr(surgery, "split_layer", broken)
    callback = callback_for(split=True)
    with pytest.raises(RuntimeError, match="would change its output .* The model was left unsplit"):
        make_trainer(tmp_path, callback).fit(module, loader(), loader())
    assert isinstance(module.net[2], nn.Conv2d)
    assert n_hooks(module) == 0


def test_without_an_analysed_epoch_there_is_nothing_to_split(module, tmp_path):
    with pytest.warns(UserWarning, match="`split=True`, but there is no plan"):
        make_trainer(tmp_path, callback_for(split=True)).fit(module, loader())
    assert isinstance(module.net[2], nn.Conv2d)


def test_a_split_module_is_only_evaluated(module, tmp_path):
    callback = callback_for(split=True)
    trainer = make_trainer(tmp_path, callback, logger=CSVLogger(tmp_path, version=0))
    trainer.fit(module, loader(), loader())
    report, plan = callback.report, callback.plan
    saved = json.loads((tmp_path / "lightning_logs/version_0/report.json").read_text())
    (metrics,) = trainer.validate(module, loader(), verbose=False)
    assert callback.report is report
    assert callback.plan is plan
    assert json.loads((tmp_path / "lightning_logs/version_0/report.json").read_text()) == saved
    assert {f"polydis/net.2/split_{name}" for name in ("distortion", "leak", "auroc")} <= metrics.keys()
    assert n_hooks(module) == 1, "the split layer's own load hook"


def test_a_split_module_validates_in_half_precision(module, tmp_path):
    callback = callback_for(split=True)
    trainer = make_trainer(tmp_path, callback, precision="bf16-mixed")
    trainer.fit(module, loader(), loader())
    assert isinstance(module.net[2], SplitConv2d)
    (metrics,) = trainer.validate(module, loader(), verbose=False)
    assert torch.isfinite(torch.tensor(metrics["val_loss"]))


def test_a_layer_beside_a_split_one_is_analysed(module, tmp_path):
    first, second = callback_for(split=True), callback_for("net.4")
    trainer = make_trainer(tmp_path, first, second)
    trainer.fit(module, loader(), loader())
    pairs = second.report.pairs
    (metrics,) = trainer.validate(module, loader(), verbose=False)
    assert [(p.channel, p.class_a, p.class_b) for p in second.report.pairs] == [
        (p.channel, p.class_a, p.class_b) for p in pairs
    ]
    assert {"polydis/net.2/split_leak", "polydis/net.4/n_pairs"} <= metrics.keys()
    assert not any(name.startswith("polydis/net.4/split") for name in metrics)


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_an_unsplit_checkpoint_loads_into_the_split_module(module, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = make_trainer(tmp_path, callback_for(split=True), checkpoint, enable_checkpointing=True)
    trainer.fit(module, loader(), loader())
    assert isinstance(module.net[2], SplitConv2d)
    (metrics,) = trainer.test(module, loader(), ckpt_path="best", verbose=False)
    plain = Classifier.load_from_checkpoint(checkpoint.best_model_path)
    (expected,) = make_trainer(tmp_path).test(plain, loader(), verbose=False)
    assert metrics["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-5)


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_split_checkpoint_is_rebuilt(module, weights_only, tmp_path):
    trainer = make_trainer(tmp_path, callback_for(split=True))
    trainer.fit(module, loader(), loader())
    trainer.save_checkpoint(tmp_path / "split.ckpt", weights_only=weights_only)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*weights_only.*|.*LeafSpec.*")
        loaded = load_from_checkpoint(Classifier, tmp_path / "split.ckpt")
    images = make_batches()[0][0]
    assert torch.equal(loaded.eval()(images), module.eval()(images))
    assert torch.equal(loaded.net[2].undo().weight, module.net[2].undo().weight)
    fresh, callback = Classifier(), callback_for()
    (metrics,) = make_trainer(tmp_path, callback).test(
        fresh, loader(), ckpt_path=tmp_path / "split.ckpt", verbose=False
    )
    assert torch.equal(fresh.eval()(images), module.eval()(images)), "the callback splits before the weights load"
    assert "polydis/net.2/split_leak" in metrics
    assert n_hooks(fresh) == 1


def test_an_unsplit_checkpoint_loads_as_ever(module, tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.validate(module, loader(), verbose=False)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    loaded = load_from_checkpoint(Classifier, tmp_path / "plain.ckpt")
    assert torch.equal(loaded.net[2].weight, module.net[2].weight)


class Renaming(Classifier):
    """Reads checkpoints in which its parameters have other names."""

    def on_load_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key.replace("old.", "net."): value for key, value in state.items()}


def test_a_checkpoint_that_the_module_migrates_is_rebuilt(module, tmp_path):
    trainer = make_trainer(tmp_path, callback_for(split=True))
    trainer.fit(module, loader(), loader())
    trainer.save_checkpoint(tmp_path / "split.ckpt")
    checkpoint = torch.load(tmp_path / "split.ckpt", weights_only=False)
    checkpoint["state_dict"] = {key.replace("net.", "old."): v for key, v in checkpoint["state_dict"].items()}
    torch.save(checkpoint, tmp_path / "renamed.ckpt")
    loaded = load_from_checkpoint(Renaming, tmp_path / "renamed.ckpt")
    assert type(loaded) is Renaming
    images = make_batches()[0][0]
    assert torch.equal(loaded.eval()(images), module.eval()(images))
    with pytest.raises(ValueError, match="name modules of the model, but got 'old.2'"):
        load_from_checkpoint(Classifier, tmp_path / "renamed.ckpt")


def test_strict_reaches_lightnings_loader(module, tmp_path):
    trainer = make_trainer(tmp_path, callback_for(split=True))
    trainer.fit(module, loader(), loader())
    trainer.save_checkpoint(tmp_path / "split.ckpt")
    checkpoint = torch.load(tmp_path / "split.ckpt", weights_only=False)
    checkpoint["state_dict"]["net.99.weight"] = torch.zeros(1)
    torch.save(checkpoint, tmp_path / "more.ckpt")
    with pytest.raises(RuntimeError, match="Unexpected key.*net.99.weight"):
        load_from_checkpoint(Classifier, tmp_path / "more.ckpt")
    assert isinstance(load_from_checkpoint(Classifier, tmp_path / "more.ckpt", strict=False).net[2], SplitConv2d)


class Averaged(Classifier):
    """Keeps a copy of itself, as modules with an averaged twin do, and has a layer of two names."""

    def __init__(self):
        super().__init__()
        self.body = self.net[:4]
        self.twin = [copy.deepcopy(self)]


def test_a_checkpoint_of_a_layer_with_two_names_is_rebuilt(module, tmp_path):
    averaged = Averaged()
    averaged.net.load_state_dict(module.net.state_dict())
    trainer = make_trainer(tmp_path, callback_for(split=True))
    trainer.fit(averaged, loader(), loader())
    trainer.save_checkpoint(tmp_path / "split.ckpt")
    loaded = load_from_checkpoint(Averaged, tmp_path / "split.ckpt")
    assert isinstance(loaded.net[2], SplitConv2d)
    assert loaded.net[2] is loaded.body[2]
    images = make_batches()[0][0]
    assert torch.equal(loaded.eval()(images), averaged.eval()(images))
    assert "load_state_dict" not in vars(Averaged)
