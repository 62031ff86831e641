import copy
import gc
import json
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F

from lightning_polydis import (
    ChannelDisentanglement,
    PolysemanticityReport,
    SplitConv2d,
    SplitPlan,
    find_polysemantic_channels,
    load_from_checkpoint,
)
from lightning_polydis.statistics import CalibrationSamples
from tests.networks import BottleneckNet, Classifier, conv_relu_net, loader, make_batches

SETTINGS = {"relevance_threshold": 0.05, "class_fraction": 0.5, "similarity_threshold": 0.9}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*does not have many workers.*|.*smaller than the logging interval.*"
        )
        warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)`.*")
        yield


def make_trainer(tmp_path, *callbacks, **kwargs):
    kwargs = {"logger": False, "enable_checkpointing": False, "max_epochs": 1, **kwargs}
    return pl.Trainer(
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


@pytest.fixture
def module(state):
    module = Classifier()
    module.net.load_state_dict(state)
    return module


def callback_for(layers="net.2", **kwargs):
    return ChannelDisentanglement(layers, **{**SETTINGS, **kwargs})


def as_loader(batches):
    return torch.utils.data.DataLoader(batches, batch_size=None)


def n_hooks(net: nn.Module) -> int:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks", "_backward_hooks")
    return sum(len(getattr(module, name)) for module in net.modules() for name in hooks)


# ---------------------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize("loop", ["validate", "test"])
@pytest.mark.parametrize("layers", ["net.2", ["net.2", "net.4"], None])
def test_the_loops_find_what_the_plain_function_finds(module, loop, layers, tmp_path):
    callback = callback_for(layers)
    getattr(make_trainer(tmp_path, callback), loop)(module, loader(), verbose=False)
    expected = find_polysemantic_channels(module, make_batches(), layers, progress=False, **SETTINGS)
    assert callback.report.pairs == expected.pairs
    assert callback.report.channels == expected.channels
    assert callback.plan == expected.plan
    assert callback.report.quality == expected.quality
    assert len(callback.plan) > 0


def test_fit_finds_what_the_plain_function_finds_on_the_final_weights(module, tmp_path):
    callback = callback_for()
    make_trainer(tmp_path, callback, max_epochs=2).fit(module, loader(), loader())
    expected = find_polysemantic_channels(module, make_batches(), "net.2", progress=False, **SETTINGS)
    assert callback.report.pairs == expected.pairs
    assert callback.plan == expected.plan


# ------------------------------------------------------------------------------------- what is given back


class Recorder(Callback):
    """Keeps every logged number and what the step saw."""

    def __init__(self):
        self.seen = []

    def on_validation_epoch_end(self, trainer, pl_module):
        self.seen.append({k: v.clone() for k, v in trainer.callback_metrics.items() if not k.startswith("polydis")})

    on_test_epoch_end = on_validation_epoch_end


class AlwaysDropout(nn.Module):
    """Draws random numbers in validation too, so that a pass too many would show."""

    def __init__(self):
        super().__init__()
        self.net = conv_relu_net()

    def forward(self, x):
        return self.net(F.dropout(x, 0.5, training=True))


@pytest.mark.parametrize(
    ("make", "layer"),
    [
        (conv_relu_net, "net.2"),
        (BottleneckNet, "net.blocks.1.conv3"),
        (AlwaysDropout, "net.net.2"),
        (AlwaysDropout, None),
    ],
)
@pytest.mark.parametrize("loop", ["fit", "validate", "test"])
def test_losses_and_metrics_are_bit_for_bit_those_without_the_callback(make, layer, loop, tmp_path):
    results, weights = [], []
    for callbacks in ([], [callback_for(layer)]):
        pl.seed_everything(3, verbose=False)
        module, recorder = Classifier(make()), Recorder()
        trainer = make_trainer(tmp_path, recorder, *callbacks, max_epochs=2)
        if loop == "fit":
            trainer.fit(module, loader(shuffle=True), loader())
        else:
            getattr(trainer, loop)(module, loader(), verbose=False)
        results.append(recorder.seen)
        weights.append(module.state_dict())
    assert results[0]
    assert results[0][0].keys() == results[1][0].keys()
    for plain, watched in zip(*results, strict=True):
        for name, value in plain.items():
            assert torch.equal(value, watched[name]), name
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


class Watchful(Classifier):
    """Notes the state of the world around the forward pass in validation."""

    def __init__(self, *args, fail_at=None, error=RuntimeError):
        super().__init__(*args)
        self.fail_at, self.error, self.notes = fail_at, error, []

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        note = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), logits.requires_grad, self.training)
        self.notes.append(note)
        if batch_idx == self.fail_at:
            raise self.error("on purpose")
        self.log("val_loss", F.cross_entropy(logits, batch[1]))

    test_step = validation_step


@pytest.mark.parametrize("loop", ["validate", "test"])
@pytest.mark.parametrize("inference_mode", [True, False])
def test_everything_is_given_back(loop, inference_mode, tmp_path):
    module = Watchful()
    module.net[0].weight.requires_grad_(False)
    callback, other = callback_for(), callback_for("net.4")
    trainer = make_trainer(tmp_path, callback, other, inference_mode=inference_mode)
    getattr(trainer, loop)(module, loader(), verbose=False)
    assert set(module.notes) == {(False, False, False, False)}
    assert n_hooks(module) == 0
    assert torch.is_grad_enabled()
    assert trainer.validate_loop.inference_mode is inference_mode
    assert trainer.test_loop.inference_mode is inference_mode
    assert [p.requires_grad for p in module.parameters()].count(False) == 1
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("loop", ["fit", "validate", "test"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_step_leaves_nothing_behind(loop, error, tmp_path):
    module, callback = Watchful(fail_at=1, error=error), callback_for()
    trainer = make_trainer(tmp_path, callback, num_sanity_val_steps=0)
    run = {"fit": lambda: trainer.fit(module, loader(), loader())}
    run = run.get(loop, lambda: getattr(trainer, loop)(module, loader(), verbose=False))
    with pytest.raises((error, SystemExit)):
        run()
    assert n_hooks(module) == 0
    assert torch.is_grad_enabled()
    assert trainer.validate_loop.inference_mode
    assert trainer.test_loop.inference_mode
    assert callback.report is None
    module.fail_at = None
    make_trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    assert callback.report.n_images == 48


class FailingNet(nn.Module):
    """Fails in the middle of the forward pass, behind the layer."""

    def __init__(self, error):
        super().__init__()
        self.conv, self.rest, self.error = nn.Conv2d(3, 8, 1), nn.Linear(8, 4), error

    def forward(self, x):
        self.conv(x)
        raise self.error("on purpose")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_the_network_leaves_nothing_behind(error, tmp_path):
    module = Classifier(FailingNet(error))
    trainer = make_trainer(tmp_path, callback_for("net.conv"))
    with pytest.raises((error, SystemExit)):
        trainer.validate(module, loader(), verbose=False)
    assert n_hooks(module) == 0
    assert torch.is_grad_enabled()


def test_the_sanity_check_is_skipped(module, tmp_path):
    seen = []

    class Spy(Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append((trainer.sanity_checking, callback.report is None))

    callback = callback_for()
    make_trainer(tmp_path, callback, Spy(), num_sanity_val_steps=2).fit(module, loader(), loader())
    assert seen == [(True, True), (False, False)]


# ---------------------------------------------------------------------------------------- when it analyses


@pytest.mark.parametrize(
    ("every", "kwargs", "expected"),
    [
        (1, {"max_epochs": 3}, [0, 1, 2]),
        (2, {"max_epochs": 4}, [0, 2, 3]),
        (10, {"max_epochs": 4}, [0, 3]),
        (10, {"max_epochs": 6, "check_val_every_n_epoch": 2}, [1, 5]),
        (10, {"max_epochs": -1, "max_steps": 9}, [0, 2]),
    ],
)
def test_the_first_and_the_last_validation_are_always_analysed(module, every, kwargs, expected, tmp_path):
    analysed = []

    class Spy(Callback):
        last = None

        def on_validation_end(self, trainer, pl_module):
            if callback.report is not self.last:
                analysed.append(trainer.current_epoch)
            self.last = callback.report

    callback = callback_for(every_n_epochs=every)
    make_trainer(tmp_path, callback, Spy(), num_sanity_val_steps=0, **kwargs).fit(module, loader(), loader())
    assert analysed == expected


def test_scalars_can_be_monitored_in_every_epoch(module, tmp_path):
    callback = callback_for(every_n_epochs=2)
    checkpoint = ModelCheckpoint(tmp_path, monitor="polydis/net.2/n_polysemantic", save_top_k=-1)
    stopping = EarlyStopping("polydis/net.2/mean_cosine", patience=10)
    trainer = make_trainer(tmp_path, callback, checkpoint, stopping, max_epochs=3, enable_checkpointing=True)
    trainer.fit(module, loader(), loader())
    assert trainer.callback_metrics["polydis/net.2/n_polysemantic"] == callback.report.layers[0].n_polysemantic
    assert float(checkpoint.current_score) == callback.report.layers[0].n_polysemantic
    assert len(list(tmp_path.glob("*.ckpt"))) == 3


# ----------------------------------------------------------------------------------------------- what it writes


def test_tensorboard_gets_scalars_and_a_table(module, tmp_path):
    callback = callback_for(class_names=["cat", "dog", "fish", "ant"])
    logger = TensorBoardLogger(tmp_path, name="run", version=0)
    make_trainer(tmp_path, callback, logger=logger, max_epochs=2).fit(module, loader(), loader())
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    values = [event.value for event in events.Scalars("polydis/net.2/n_polysemantic")]
    assert len(values) == 2
    assert values[-1] == len(callback.report.channels) > 0
    tag = "polydis/net.2/overview/text_summary"
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)]
    assert len(texts) == 3, "two epochs, and the quality of the splits at the end"
    assert "| distortion |" in texts[-1]
    assert "| distortion |" not in texts[-2]
    assert "cat" in texts[-1]


@pytest.mark.parametrize("loop", ["fit", "validate"])
def test_files_are_in_the_loggers_directory(module, loop, tmp_path):
    callback, logger = callback_for(), CSVLogger(tmp_path, name="run", version=0)
    trainer = make_trainer(tmp_path, callback, logger=logger)
    trainer.fit(module, loader(), loader()) if loop == "fit" else trainer.validate(module, loader(), verbose=False)
    report = PolysemanticityReport.load(tmp_path / "run/version_0/report.json")
    assert report.pairs == callback.report.pairs
    assert report.quality == callback.report.quality
    assert SplitPlan.load(tmp_path / "run/version_0/split_plan.json") == callback.plan


def test_files_go_to_dirpath_if_given_and_nowhere_without_logger(module, tmp_path):
    make_trainer(tmp_path / "root", callback_for(dirpath=tmp_path / "mine")).validate(module, loader(), verbose=False)
    names = sorted(path.name for path in (tmp_path / "mine").iterdir())
    assert names == ["report.html", "report.json", "split_plan.json"]
    make_trainer(tmp_path / "root", callback_for()).validate(module, loader(), verbose=False)
    assert not [*(tmp_path / "root").rglob("*.json"), *(tmp_path / "root").rglob("*.html")]


def test_an_unwritable_directory_is_a_warning(module, tmp_path):
    (tmp_path / "file").write_text("no directory")
    callback = callback_for(dirpath=tmp_path / "file" / "deeper")
    with pytest.warns(UserWarning, match=r"`report.json` could not be written to"):
        make_trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    assert callback.report is not None


def test_the_console_shows_the_table_at_the_end(module, tmp_path, capsys):
    callback = callback_for()
    make_trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    assert f"{len(callback.report.channels)} polysemantic channels (48 images)" in capsys.readouterr().out


def test_fast_dev_run_runs_and_writes_nothing(module, tmp_path):
    callback = callback_for(split=True)
    make_trainer(tmp_path, callback, fast_dev_run=True, logger=True).fit(module, loader(), loader())
    assert callback.report.n_images == 16
    assert not list(tmp_path.rglob("*.json"))


# ------------------------------------------------------------------------------------------------- the split


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


# --------------------------------------------------------------------------------------------- bad input


class OtherBatches(Classifier):
    def validation_step(self, batch, batch_idx):
        self(batch["image"])


class HeadOfBackbone(pl.LightningModule):
    def __init__(self):
        super().__init__()
        net = conv_relu_net()
        self.backbone, self.head = net[:8], net[8]

    def validation_step(self, batch, batch_idx):
        self.head(self.backbone(batch[0]))


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


def test_a_batch_with_nan_does_not_stop_training(module, tmp_path):
    batches = make_batches()
    batches[1] = (batches[1][0] * float("nan"), batches[1][1])
    callback = callback_for()
    make_trainer(tmp_path, callback).validate(module, as_loader(batches), verbose=False)
    assert (callback.report.n_images, callback.report.n_images_left_out) == (32, 16)


def test_instances_for_several_layers_live_side_by_side(module, tmp_path):
    first, second = callback_for("net.2"), callback_for("net.4")
    assert first.state_key != second.state_key
    trainer = make_trainer(tmp_path, first, second, logger=CSVLogger(tmp_path, version=0))
    trainer.fit(module, loader(), loader())
    folder = tmp_path / "lightning_logs/version_0"
    assert sorted(path.name for path in folder.glob("*.json")) == [
        f"{layer}.{name}" for layer in ("net.2", "net.4") for name in ("report.json", "split_plan.json")
    ]
    assert PolysemanticityReport.load(folder / "net.2.report.json").pairs == first.report.pairs
    both = find_polysemantic_channels(module, make_batches(), ["net.2", "net.4"], progress=False, **SETTINGS)
    found = first.report.pairs + second.report.pairs
    assert [(p.layer, p.channel, p.class_a, p.class_b) for p in found] == [
        (p.layer, p.channel, p.class_a, p.class_b) for p in both.pairs
    ]


def test_two_instances_for_one_layer_are_refused(module, tmp_path):
    trainer = make_trainer(tmp_path, callback_for(["net.4", "net.2"]), callback_for(relevance_threshold=0.5))
    with pytest.raises(
        MisconfigurationException, match="Two `ChannelDisentanglement` callbacks analyse the same layer,"
    ):
        trainer.validate(module, loader(), verbose=False)
    assert trainer.validate_loop.inference_mode
    assert n_hooks(module) == 0


def test_samples_of_past_epochs_are_let_go(module, tmp_path):
    sizes = []

    class Spy(Callback):
        def on_validation_end(self, trainer, pl_module):
            living = [o for o in gc.get_objects() if isinstance(o, CalibrationSamples)]
            sizes.append(sum(len(tensor) for samples in living for tensor in samples.inputs))

    gc.collect()
    make_trainer(tmp_path, callback_for(), Spy(), max_epochs=4, num_sanity_val_steps=0).fit(module, loader(), loader())
    assert sizes == [0, 0, 0, 0]


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


def test_an_early_stop_that_is_known_is_the_last_validation(module, tmp_path):
    class Stop(Callback):
        def on_validation_start(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    callback = callback_for(every_n_epochs=100)
    trainer = make_trainer(tmp_path, Stop(), callback, max_epochs=50, num_sanity_val_steps=0)
    trainer.fit(module, loader(), loader())
    assert callback._analysed_step == trainer.global_step == 6


def test_a_second_run_without_analysis_repeats_nothing(module, tmp_path, capsys):
    callback = callback_for(split=True)
    trainer = make_trainer(tmp_path, callback)
    trainer.validate(module, loader(), verbose=False)
    assert "polysemantic channels" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="no validation epoch was analysed"):
        make_trainer(tmp_path, callback).fit(module, loader())
    assert "polysemantic channels" not in capsys.readouterr().out


def test_an_empty_validation_set_is_an_empty_report_less_run(module, tmp_path):
    callback = callback_for()
    make_trainer(tmp_path, callback, limit_val_batches=0).fit(module, loader(), loader())
    assert callback.report is None
    assert callback.plan is None


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


@pytest.mark.parametrize("order", [[None, "net.2"], ["net.2", None]])
def test_a_chosen_layer_beside_a_named_one(module, order, tmp_path):
    callbacks = [callback_for(layers) for layers in order]
    make_trainer(tmp_path, *callbacks).validate(module, loader(), verbose=False)
    assert {callback.report.layers[0].name for callback in callbacks} == {"net.2", "net.4"}
    assert all(callback.report.n_images == 48 for callback in callbacks)


def test_a_callback_may_serve_one_module_after_another(module, tmp_path):
    callback = callback_for(None, split=True, class_fraction=0.1, similarity_threshold=1.0)
    make_trainer(tmp_path, callback).fit(module, loader(), loader())
    assert isinstance(module.net[4], SplitConv2d)
    shallow = Classifier(
        nn.Sequential(nn.Flatten(), nn.Linear(243, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4))
    )
    make_trainer(tmp_path, callback).validate(shallow, loader(), verbose=False)
    assert [layer.name for layer in callback.report.layers] == ["net.3"]
    with pytest.warns(UserWarning, match="`split=True`, but there is no plan"):
        make_trainer(tmp_path, callback).fit(Classifier(), loader())


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
