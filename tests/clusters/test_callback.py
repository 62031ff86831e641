"""Polysemantic channels without labels, found by the callback."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F

from lightning_polydis import ChannelDisentanglement, evaluate_splits, load_from_checkpoint
from lightning_polydis.surgery import stored_plan
from tests.clusters.runs import find, found_in, n_modes, plain_batches
from tests.planted import MERGED, Autoencoder, PlantedNet, planted_images, planted_loader
from tests.runs import Recorder, make_trainer, n_hooks


def callback_for(layers="net.mix", **settings):
    return ChannelDisentanglement(layers, concepts="clusters", **{"strict": True, **settings})


def same_findings(found, expected):
    keys = ("channel", "concepts", "contents", "stability")
    one, two = ([[getattr(c, key) for key in keys] for c in report.channels] for report in (found, expected))
    assert one == two
    assert len(one) > 0


@pytest.mark.parametrize(("loop", "layers"), [("validate", "net.mix"), ("test", None)])
def test_the_loops_find_what_the_plain_function_finds(loop, layers, tmp_path):
    module, callback = Autoencoder(), callback_for(layers)
    getattr(make_trainer(tmp_path, callback), loop)(module, planted_loader(), verbose=False)
    expected = find(module, plain_batches(), "net.mix")
    assert callback.report.pairs == expected.pairs
    assert callback.plan == expected.plan
    assert callback.report.quality == expected.quality
    assert sorted(found_in(callback.report)) == MERGED
    assert n_hooks(module) == 0


class Noisy(PlantedNet):
    """Draws random numbers in validation too, so that a pass too many would show."""

    def forward(self, images):
        return super().forward(images + 0.01 * torch.randn_like(images))


@pytest.mark.parametrize(
    ("loop", "layers"), [("fit", "net.mix"), ("fit", None), ("validate", None), ("test", "net.mix")]
)
def test_losses_and_metrics_are_bit_for_bit_those_without_the_callback(loop, layers, tmp_path):
    results, weights, draws = [], [], []
    for callbacks in ([], [callback_for(layers)]):
        module, recorder = Autoencoder(Noisy()), Recorder()
        module.load_state_dict(Autoencoder().state_dict())
        torch.manual_seed(3)
        trainer = make_trainer(tmp_path, recorder, *callbacks, max_epochs=2)
        data = planted_loader(120)
        if loop == "fit":
            trainer.fit(module, data, data)
        else:
            getattr(trainer, loop)(module, data, verbose=False)
        results.append(recorder.seen)
        weights.append(module.state_dict())
        draws.append(torch.rand(3))
    assert results[0]
    for plain, watched in zip(*results, strict=True):
        assert plain.keys() == watched.keys()
        assert all(torch.equal(value, watched[name]) for name, value in plain.items())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert torch.equal(*draws)


class Failing(Autoencoder):
    fail_at = 0

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if batch_idx == self.fail_at:
            raise RuntimeError("on purpose")


@pytest.mark.parametrize("inference_mode", [True, False])
def test_an_exception_in_the_step_leaves_nothing_behind(inference_mode, tmp_path):
    module, callback = Failing(), callback_for()
    trainer = make_trainer(tmp_path, callback, inference_mode=inference_mode)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.validate(module, planted_loader(), verbose=False)
    assert n_hooks(module) == n_modes() == 0
    assert torch.is_grad_enabled()
    assert trainer.validate_loop.inference_mode is inference_mode
    assert callback.report is None
    module.fail_at = None
    trainer = make_trainer(tmp_path, callback, inference_mode=inference_mode)
    trainer.validate(module, planted_loader(), verbose=False)
    assert trainer.validate_loop.inference_mode is inference_mode
    assert callback.report.n_images == 300


def test_the_trained_module_is_split_and_later_validations_judge_it(tmp_path):
    module, callback = Autoencoder(), callback_for(split=True)
    x = planted_images(seed=2)[0]
    trainer = make_trainer(tmp_path, callback, max_epochs=2)
    trainer.fit(module, planted_loader(), planted_loader())
    assert module.net.mix.channels.tolist() == [split.channel for split in callback.plan]
    assert sorted(found_in(callback.report)) == MERGED
    unsplit = copy.deepcopy(module)
    unsplit.net.mix = unsplit.net.mix.undo()
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(x), unsplit.eval()(x), rtol=1e-5, atol=1e-5)
    report, other = callback.report, callback_for()
    for own in (callback, other):
        (metrics,) = make_trainer(tmp_path, own).validate(module, planted_loader(), verbose=False)
        assert metrics["polydis/net.mix/split_leak"] < 0.05
        assert metrics["polydis/net.mix/split_distortion"] < 0.05
        assert metrics["polydis/net.mix/split_auroc"] > 0.95
    assert callback.report is report
    assert other.plan == callback.plan
    expected = evaluate_splits(unsplit, callback.plan, plain_batches(), progress=False)
    assert metrics["polydis/net.mix/split_auroc"] == pytest.approx(
        sum(quality.mean("auroc") for quality in expected) / len(expected), abs=1e-5
    )


class Stop(Callback):
    """Ends a run between the last validation and the split."""

    def on_train_end(self, trainer, pl_module):
        raise RuntimeError("power cut")


def test_a_run_that_ended_before_the_split_is_split_when_it_is_taken_up_again(tmp_path):
    callback = callback_for(split=True)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    trainer = make_trainer(tmp_path, callback, checkpoint, Stop(), max_epochs=2, enable_checkpointing=True)
    module = Autoencoder()
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.fit(module, planted_loader(), planted_loader())
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][callback.state_key]
    restored = callback_for()
    restored.load_state_dict(state)
    assert restored.plan == callback.plan
    assert restored.report.concept_names == callback.report.concept_names
    assert restored.report.channels == callback.report.channels
    fresh, again = Autoencoder(), callback_for(split=True)
    with torch.no_grad():
        fresh.net.mix.weight.zero_()
    trainer = make_trainer(tmp_path, again, max_epochs=2)
    trainer.fit(fresh, planted_loader(), planted_loader(), ckpt_path=tmp_path / "last.ckpt")
    assert stored_plan(fresh).splits[0].centres is not None
    assert fresh.net.mix.channels.tolist() == [split.channel for split in callback.plan]
    trainer.save_checkpoint(tmp_path / "split.ckpt")
    loaded = load_from_checkpoint(Autoencoder, tmp_path / "split.ckpt")
    assert stored_plan(loaded) == stored_plan(fresh) == again.plan
    x = planted_images(20)[0]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), fresh.eval()(x))


@pytest.mark.parametrize("layers", ["net.mix", None])
def test_a_compiled_module_gives_what_an_eager_one_gives(layers, tmp_path):
    torch._dynamo.reset()
    eager, compiled = Autoencoder(), Autoencoder()
    compiled.net.compile(backend="eager")
    callbacks = [callback_for(layers), callback_for(layers)]
    metrics = []
    for module, callback in zip((eager, compiled), callbacks, strict=True):
        metrics += make_trainer(tmp_path, callback).validate(module, planted_loader(), verbose=False)
    assert metrics[0] == metrics[1]
    same_findings(callbacks[1].report, callbacks[0].report)
    assert callbacks[0].report.pairs == callbacks[1].report.pairs
    assert callbacks[0].plan == callbacks[1].plan
    assert n_hooks(compiled) == 0
    torch._dynamo.reset()


class Attentive(nn.Module):
    """Attention in the form that has a faster path without gradients, before and after the layer that mixes sources."""

    def __init__(self):
        super().__init__()
        self.before = nn.TransformerEncoderLayer(48, 2, 16, batch_first=True)
        self.planted = PlantedNet()
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.last, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(16)

    def forward(self, images):
        net = self.planted
        images = images + 1e-3 * self.before(
            images.flatten(2).unflatten(2, (16, 16)).reshape(len(images), 16, 48)
        ).view_as(images)
        tokens = self.attention(net.act(net.mix(net.relu(net.sources(images)))).flatten(2).mT)
        return net.back(self.last(self.norm(tokens)).relu().mT.unflatten(2, (4, 4)))


class Keeping(Autoencoder):
    def validation_step(self, batch, batch_idx):
        self.kept = [*getattr(self, "kept", []), self(batch[0])]


@pytest.mark.parametrize("layers", ["net.planted.mix", "net.last", ["net.planted.mix", "net.last"], None])
def test_attention_keeps_its_fast_path_and_its_results(layers, tmp_path):
    torch.manual_seed(0)
    net = Attentive().eval()
    without, module = Keeping(copy.deepcopy(net)), Keeping(copy.deepcopy(net))
    callback = callback_for(layers)
    make_trainer(tmp_path).validate(without, planted_loader(), verbose=False)
    make_trainer(tmp_path, callback).validate(module, planted_loader(), verbose=False)
    assert len(module.kept) == 6
    assert all(map(torch.equal, module.kept, without.kept))
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in module.net.state_dict().items())
    assert n_modes() == 0
    expected = find(module, plain_batches(), callback.report.settings["layers"])
    assert [channel.channel for channel in callback.report.channels] == [c.channel for c in expected.channels]
    if layers == "net.planted.mix":
        same_findings(callback.report, expected)
        assert sorted(found_in(callback.report)) == MERGED


def test_two_callbacks_watch_at_once(tmp_path):
    module, callbacks = Autoencoder(), [callback_for(name) for name in ("net.mix", "net.sources")]
    make_trainer(tmp_path, *callbacks).validate(module, planted_loader(), verbose=False)
    for callback, name in zip(callbacks, ("net.mix", "net.sources"), strict=True):
        assert callback.report.pairs == find(module, plain_batches(), name).pairs
    assert sorted(found_in(callbacks[0].report)) == MERGED
    assert n_modes() == 0


class Regressor(Autoencoder):
    """Batches are dictionaries; the target is a number."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.mse_loss(self(batch["image"]).mean((1, 2, 3)), batch["y"]))


def test_dictionaries_with_numbers_as_targets_are_fine(tmp_path):
    images, _ = planted_images()
    batches = [{"image": part, "y": part.mean((1, 2, 3))} for part in images.split(50)]
    callback = callback_for()
    data = torch.utils.data.DataLoader(batches, batch_size=None)
    make_trainer(tmp_path, callback).validate(Regressor(), data, verbose=False)
    assert sorted(found_in(callback.report)) == MERGED
    assert callback.report.cards[0].rows[0].images[0].pixels is not None


def test_mistakes_in_descriptions_and_functions_for_targets_end_the_run_in_words(tmp_path):
    for settings, message in (
        ({"describe_fn": lambda pictures: 3}, "Expected `describe_fn` to return a text, but got `int`"),
        ({"target_fn": lambda batch: batch["nope"]}, "`target_fn` raised TypeError"),
    ):
        module = Autoencoder()
        trainer = make_trainer(tmp_path, callback_for(dirpath=tmp_path, **settings))
        with pytest.raises(MisconfigurationException, match=message):
            trainer.validate(module, planted_loader(), verbose=False)
        assert n_hooks(module) == n_modes() == 0


class TwoPasses(Autoencoder):
    def validation_step(self, batch, batch_idx):
        self(batch[0])
        super().validation_step(batch, batch_idx)


def test_a_layer_that_runs_twice_in_a_step_is_refused_in_words(tmp_path):
    module = TwoPasses()
    with pytest.raises(MisconfigurationException, match="`net.mix` to run once in each forward pass, but it ran twice"):
        make_trainer(tmp_path, callback_for()).validate(module, planted_loader(), verbose=False)
    assert n_hooks(module) == n_modes() == 0
