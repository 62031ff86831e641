"""What the callback makes of the user's mistakes, and of its own."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F

from lightning_polydis import (
    find_polysemantic_channels,
)
from tests.networks import Classifier, loader, make_batches
from tests.runs import SETTINGS, HeadOfBackbone, as_loader, callback_for, make_trainer, n_hooks

# ------------------------------------------------------------------------------------------------------- the user's


class OtherBatches(Classifier):
    def validation_step(self, batch, batch_idx):
        self(batch["image"])


class LossFromForward(Classifier):
    def forward(self, images, targets):
        return F.cross_entropy(self.net(images), targets)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(*batch))


class Twice(Classifier):
    def validation_step(self, batch, batch_idx):
        self(batch[0] + self(batch[0]).mean())


class Never(Classifier):
    def validation_step(self, batch, batch_idx):
        pass


@pytest.mark.parametrize(
    ("make", "layers", "kwargs", "message"),
    [
        (Classifier, "net.22", {}, r"to name modules of the model, but got 'net.22'. Closest names: `net.2`"),
        (Classifier, "net.1", {}, "Expected layer `net.1` to be .* but got `ReLU`"),
        (HeadOfBackbone, "backbone.2", {}, 'pass `logits_module="head"`'),
        (HeadOfBackbone, None, {}, "several calls"),
        (HeadOfBackbone, "head", {}, "If `head` makes the logits, name a layer before it: each of its channels is"),
        (LossFromForward, "net.2", {}, r"but got \[\]. Pass `logits_module`"),
        (Twice, "net.2", {}, "it ran twice"),
        (Never, "net.2", {}, "`net.2` did not run"),
        (Classifier, "net.2", {"num_classes": 9}, r"logits of shape \[16, 9\], but got \[16, 4\]"),
        (Classifier, "net.2", {"target_fn": lambda batch: batch[0]}, "integer class indices, but got torch.float32"),
        (Classifier, "net.2", {"logits_module": "net.88"}, "`logits_module` to name a module of the model"),
        (Classifier, "net.2", {"class_names": ["a"]}, "`class_names` to hold 4 names"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_what_the_user_can_mend_raises_in_words(make, layers, kwargs, message, strict, tmp_path):
    module = make()
    trainer = make_trainer(tmp_path, callback_for(layers, strict=strict, **kwargs))
    with pytest.raises(MisconfigurationException, match=message):
        trainer.validate(module, loader(), verbose=False)
    assert n_hooks(module) == 0
    assert torch.is_grad_enabled()
    assert trainer.validate_loop.inference_mode


def test_batches_of_other_kinds_need_a_key_or_a_function(tmp_path):
    batches = as_loader([{"image": x, "kind": y} for x, y in make_batches()])
    with pytest.raises(MisconfigurationException, match=r"but got the keys \['image', 'kind'\]. Pass `target_fn`"):
        make_trainer(tmp_path, callback_for()).validate(OtherBatches(), batches, verbose=False)
    callback = callback_for(target_fn=lambda batch: batch["kind"])
    make_trainer(tmp_path, callback).validate(OtherBatches(), batches, verbose=False)
    assert callback.report.n_images == 48
    named = callback_for()
    batches = as_loader([{"image": x, "label": y} for x, y in make_batches()])
    make_trainer(tmp_path, named).validate(OtherBatches(), batches, verbose=False)
    assert named.report.n_images == 48


def test_logits_module_serves_a_head_of_its_own(tmp_path):
    torch.manual_seed(0)
    module, callback = HeadOfBackbone(), callback_for("backbone.2", logits_module="head")
    make_trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    whole = nn.Sequential(module.backbone, module.head)
    expected = find_polysemantic_channels(whole, make_batches(), "0.2", progress=False, **SETTINGS)
    assert [pair.cosine_similarity for pair in callback.report.pairs] == [p.cosine_similarity for p in expected.pairs]


def test_two_instances_for_one_layer_are_refused(module, tmp_path):
    trainer = make_trainer(tmp_path, callback_for(["net.4", "net.2"]), callback_for(relevance_threshold=0.5))
    with pytest.raises(
        MisconfigurationException, match="Two `ChannelDisentanglement` callbacks analyse the same layer,"
    ):
        trainer.validate(module, loader(), verbose=False)
    assert trainer.validate_loop.inference_mode
    assert n_hooks(module) == 0


# ---------------------------------------------------------------------------------------------------------- its own


class OursError(Exception):
    pass


@pytest.mark.parametrize("where", ["ChannelAnalysis.finish_batch", "ChannelAnalysis.compute", "log_report"])
def test_a_failure_of_ours_drops_the_analysis_not_the_training(module, where, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise OursError("ours")

    owner = "lightning_polydis.analysis." if "." in where else "lightning_polydis._outputs."
    what = "analysis of this epoch failed and is dropped" if "." in where else "could not be written to the loggers"
    with monkeypatch.context() as patch:
        patch.setattr(owner + where, fail)
        with pytest.warns(UserWarning, match=rf"(?s){what}:.*OursError: ours"):
            make_trainer(tmp_path, callback_for(), max_epochs=1).fit(module, loader(), loader())
        with pytest.raises(OursError, match="ours"):
            make_trainer(tmp_path, callback_for(strict=True)).validate(module, loader(), verbose=False)
    assert n_hooks(module) == 0
    assert torch.is_grad_enabled()
    callback = callback_for()
    make_trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    assert callback.report is not None


def test_an_error_of_numpy_is_no_error_of_the_user(module, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise ValueError("from numpy")

    monkeypatch.setattr("lightning_polydis.analysis.ChannelAnalysis.compute", fail)
    with pytest.warns(UserWarning, match="(?s)analysis of this epoch failed and is dropped:.*from numpy"):
        make_trainer(tmp_path, callback_for()).fit(module, loader(), loader())


def test_a_plan_that_fails_does_not_end_the_training(module, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise OursError("no plan")

    monkeypatch.setattr("lightning_polydis.report.plan_splits", fail)
    with pytest.warns(UserWarning, match="OursError: no plan"):
        make_trainer(tmp_path, callback_for(split=True)).fit(module, loader(), loader())
    assert isinstance(module.net[2], nn.Conv2d)


def test_a_batch_with_nan_does_not_stop_training(module, tmp_path):
    batches = make_batches()
    batches[1] = (batches[1][0] * float("nan"), batches[1][1])
    callback = callback_for()
    make_trainer(tmp_path, callback).validate(module, as_loader(batches), verbose=False)
    assert (callback.report.n_images, callback.report.n_images_left_out) == (32, 16)


def test_an_empty_validation_set_is_an_empty_report_less_run(module, tmp_path):
    callback = callback_for()
    make_trainer(tmp_path, callback, limit_val_batches=0).fit(module, loader(), loader())
    assert callback.report is None
    assert callback.plan is None
