"""The callback in a run: what it finds, gives back and writes, and when."""

import gc

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F

from lightning_polydis import (
    PolysemanticityReport,
    SplitConv2d,
    SplitPlan,
    find_polysemantic_channels,
)
from lightning_polydis.statistics import CalibrationSamples
from tests.networks import BottleneckNet, Classifier, conv_relu_net, loader, make_batches
from tests.runs import SETTINGS, Recorder, callback_for, make_trainer, n_hooks

# ---------------------------------------------------------------------------------------------------- what is found


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


# ----------------------------------------------------------------------------------------------- what is given back


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


def test_samples_of_past_epochs_are_let_go(module, tmp_path):
    sizes = []

    class Spy(Callback):
        def on_validation_end(self, trainer, pl_module):
            living = [o for o in gc.get_objects() if isinstance(o, CalibrationSamples)]
            sizes.append(sum(len(tensor) for samples in living for tensor in samples.inputs))

    gc.collect()
    make_trainer(tmp_path, callback_for(), Spy(), max_epochs=4, num_sanity_val_steps=0).fit(module, loader(), loader())
    assert sizes == [0, 0, 0, 0]


# ------------------------------------------------------------------------------------------------- when it analyses


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


def test_an_early_stop_that_is_known_is_the_last_validation(module, tmp_path):
    class Stop(Callback):
        def on_validation_start(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    callback = callback_for(every_n_epochs=100)
    trainer = make_trainer(tmp_path, Stop(), callback, max_epochs=50, num_sanity_val_steps=0)
    trainer.fit(module, loader(), loader())
    assert callback._analysed_step == trainer.global_step == 6


def test_scalars_can_be_monitored_in_every_epoch(module, tmp_path):
    callback = callback_for(every_n_epochs=2)
    checkpoint = ModelCheckpoint(tmp_path, monitor="polydis/net.2/n_polysemantic", save_top_k=-1)
    stopping = EarlyStopping("polydis/net.2/mean_cosine", patience=10)
    trainer = make_trainer(tmp_path, callback, checkpoint, stopping, max_epochs=3, enable_checkpointing=True)
    trainer.fit(module, loader(), loader())
    assert trainer.callback_metrics["polydis/net.2/n_polysemantic"] == callback.report.layers[0].n_polysemantic
    assert float(checkpoint.current_score) == callback.report.layers[0].n_polysemantic
    assert len(list(tmp_path.glob("*.ckpt"))) == 3


# --------------------------------------------------------------------------------------------------- what it writes


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


def test_a_second_run_without_analysis_repeats_nothing(module, tmp_path, capsys):
    callback = callback_for(split=True)
    trainer = make_trainer(tmp_path, callback)
    trainer.validate(module, loader(), verbose=False)
    assert "polysemantic channels" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="no validation epoch was analysed"):
        make_trainer(tmp_path, callback).fit(module, loader())
    assert "polysemantic channels" not in capsys.readouterr().out


def test_fast_dev_run_runs_and_writes_nothing(module, tmp_path):
    callback = callback_for(split=True)
    make_trainer(tmp_path, callback, fast_dev_run=True, logger=True).fit(module, loader(), loader())
    assert callback.report.n_images == 16
    assert not list(tmp_path.rglob("*.json"))


# ------------------------------------------------------------------------------- several callbacks, several modules


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
