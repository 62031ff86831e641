"""A composite decides in Lightning: it works on a copy, and neither the network nor the run notices."""

import copy
import gc
import random
import threading
import weakref
from collections.abc import Mapping

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from zennit import composites as zc
from zennit.core import Hook

from lightning_polydis import disentangle, find_polysemantic_channels
from lightning_polydis.forward import quiet_copy
from lightning_polydis.replay import ModuleCopy
from tests.networks import BottleneckNet, Classifier, conv_relu_net, loader, make_batches, make_images, train_briefly
from tests.runs import SETTINGS, HeadOfBackbone, Recorder, callback_for, make_trainer, n_hooks
from tests.test_compiled import IDS, WAYS, Attentive, CompiledAttribute, Recurrent, counting

FLAT = {"attribution": "epsilon_plus_flat", "strict": True}
EXPECTED = {"attribution": "epsilon_plus_flat", "progress": False, **SETTINGS}


@pytest.fixture(autouse=True)
def _no_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def module(state):
    module = Classifier()
    module.net.load_state_dict(state)
    return module


def found_by(callback):
    return [(p.layer, p.channel, p.class_a, p.class_b, p.cosine_similarity) for p in callback.report.pairs]


def expected_of(model, layers="net.2", batches=None, **kwargs):
    report = find_polysemantic_channels(model, batches or make_batches(), layers, **{**EXPECTED, **kwargs})
    return [(p.layer, p.channel, p.class_a, p.class_b, p.cosine_similarity) for p in report.pairs]


# ------------------------------------------------------------------------------------------------ what is found


@pytest.mark.parametrize("loop", ["validate", "test"])
@pytest.mark.parametrize("layers", ["net.2", ["net.2", "net.4"], None])
def test_the_loops_find_what_the_plain_function_finds(loop, layers, module, tmp_path):
    callback = callback_for(layers, **FLAT)
    getattr(make_trainer(tmp_path, callback), loop)(module, loader(), verbose=False)
    report = find_polysemantic_channels(module, make_batches(), layers, **EXPECTED)
    assert callback.report.pairs == report.pairs
    assert callback.report.channels == report.channels
    assert callback.plan == report.plan
    assert callback.report.notes == report.notes == []
    ordinary = find_polysemantic_channels(
        module, make_batches(), "net.2", **{**EXPECTED, "attribution": "gradient_x_input"}
    )
    assert ordinary.channels != report.channels
    assert len(report.channels) > 0


class Epochs(Callback):
    """Keeps what was found and the weights after each validation, sanity check included."""

    def __init__(self, callback):
        self.callback, self.seen = callback, []

    def on_validation_end(self, trainer, pl_module):
        report = self.callback.report
        self.seen.append((None if report is None else found_by(self.callback), copy.deepcopy(pl_module.state_dict())))


def test_each_epoch_of_a_fit_is_explained_with_its_own_weights(module, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        ModuleCopy, "relevances", lambda self, *args, own=ModuleCopy.relevances: made.append(self) or own(self, *args)
    )
    callback = callback_for(**FLAT)
    epochs = Epochs(callback)
    make_trainer(tmp_path, callback, epochs, max_epochs=3).fit(module, loader(), loader())
    assert len(made) == 9
    assert len(set(map(id, made))) == 3, "one copy for each epoch"
    (first, _), *others = epochs.seen
    assert first is None, "the sanity check is skipped"
    for found, weights in others:
        module.load_state_dict(weights)
        assert found == expected_of(module)
    assert others[0][0] != others[-1][0]


def test_the_copy_does_not_outlive_the_epoch(module, tmp_path, monkeypatch):
    references = []
    monkeypatch.setattr(
        "lightning_polydis.replay.quiet_copy",
        lambda each: (copied := quiet_copy(each), references.append(weakref.ref(copied)))[0],
    )
    make_trainer(tmp_path, callback_for(**FLAT)).validate(module, loader(), verbose=False)
    gc.collect()
    assert [reference() for reference in references] == [None]


# ----------------------------------------------------------------------- network and run stay as they are


class Failing(Hook):
    def backward(self, module, grad_input, grad_output):
        raise ArithmeticError("in the backward pass")


class Stopping(Classifier):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if batch_idx == 1:
            raise ArithmeticError("in the step")


def things_of(module):
    """All that makes up a network: the tensors themselves, their bits, modes, hooks and attributes."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        "tensors": {name: (tensor, tensor.detach().clone(), tensor.requires_grad) for name, tensor in tensors.items()},
        "gradients": {name: tensor.grad for name, tensor in tensors.items()},
        "keys": list(module.state_dict()),
        "modes": [part.training for part in module.modules()],
        "attributes": [{key: type(value) for key, value in vars(part).items()} for part in module.net.modules()],
        "hooks": n_hooks(module),
    }


def assert_same(module, before, *, same_bits=True):
    now = things_of(module)
    tensors, old = now.pop("tensors"), before.pop("tensors")
    assert now.pop("gradients").keys() == before.pop("gradients").keys()
    assert now == before
    for name, (tensor, value, requires_grad) in old.items():
        assert tensors[name][0] is tensor, name
        assert tensors[name][2] == requires_grad
        assert not same_bits or torch.equal(tensor.nan_to_num(-1), value.nan_to_num(-1)), name  # no rho is NaN


ENDS = {
    "well": (Classifier, "epsilon_plus_flat"),
    "backward": (Classifier, zc.LayerMapComposite([(nn.Linear, Failing())])),
    "step": (Stopping, "epsilon_plus_flat"),
}


def run_of(trainer, module, loop):
    if loop == "fit":
        trainer.fit(module, loader(), loader())
    else:
        getattr(trainer, loop)(module, loader(), verbose=False)


LAYERS = {conv_relu_net: ["net.2", "net.4"], BottleneckNet: ["net.blocks.1.conv3", "net.blocks.0.conv1"]}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("loop", ["fit", "validate", "test"])
@pytest.mark.parametrize("make", LAYERS)
def test_every_tensor_of_the_network_stays_the_same_one(make, loop, end, tmp_path):
    kind, attribution = ENDS[end]
    module = kind(make())
    module.test_step = module.validation_step
    next(module.net.parameters()).requires_grad_(False)
    before = things_of(module)
    callbacks = [callback_for(layer, attribution=attribution) for layer in LAYERS[make]]
    trainer = make_trainer(tmp_path, *callbacks, num_sanity_val_steps=0)
    if end == "well":
        run_of(trainer, module, loop)
    else:
        with pytest.raises(Exception, match=f"in the {end}"):
            run_of(trainer, module, loop)
        module.train()  # Lightning leaves it in the mode that it was in
    assert_same(module, before, same_bits=loop != "fit")
    assert torch.is_grad_enabled()
    assert isinstance(attribution, str) or not (attribution.handles or attribution.hook_refs)


class Drawing(nn.Module):
    """Draws random numbers, in validation too, that matter little: a pass too many would show in the next ones."""

    def __init__(self):
        super().__init__()
        self.net = conv_relu_net()

    def forward(self, x):
        return self.net(x + 1e-4 * torch.randn_like(x) + 1e-4 * random.random() + 1e-4 * float(np.random.rand()))


@pytest.mark.parametrize(
    ("make", "layer"),
    [
        (conv_relu_net, "net.2"),
        (BottleneckNet, "net.blocks.1.conv3"),
        (Drawing, "net.net.2"),
        (Drawing, None),
    ],
)
@pytest.mark.parametrize("loop", ["fit", "validate", "test"])
def test_losses_metrics_weights_and_random_numbers_are_those_without_the_callback(make, layer, loop, tmp_path):
    results = []
    for callbacks in ([], [callback_for(layer, **FLAT)]):
        pl.seed_everything(3, verbose=False)
        module, recorder = Classifier(make()), Recorder()
        run_of(make_trainer(tmp_path, recorder, *callbacks, max_epochs=2), module, loop)
        numbers = [torch.rand(3), torch.tensor(random.random()), torch.tensor(np.random.rand())]
        results.append(
            [*numbers, *module.state_dict().values(), *(m[name] for m in recorder.seen for name in sorted(m))]
        )
    assert len(results[0]) == len(results[1]) > 10
    assert all(map(torch.equal, *results))
    assert callbacks[0].report.n_images == 48


class Counter:
    """A hook that counts, and cannot be copied."""

    def __init__(self):
        self.count, self.lock = 0, threading.Lock()

    def called(self, *args):
        self.count += 1


def test_hooks_of_the_user_see_the_real_passes_only_and_are_not_copied(module, tmp_path):
    counters = [Counter() for _ in range(6)]
    for part, name, counter in zip(
        [module.net[2], module.net[2], module.net, module, module, module.net[8]],
        [
            "forward_hook",
            "forward_pre_hook",
            "forward_hook",
            "forward_hook",
            "state_dict_pre_hook",
            "load_state_dict_pre_hook",
        ],
        counters,
        strict=True,
    ):
        getattr(part, f"register_{name}")(counter.called)
    n_before = n_hooks(module)
    make_trainer(tmp_path, callback_for(**FLAT)).validate(module, loader(), verbose=False)
    assert [counter.count for counter in counters] == [3, 3, 3, 3, 0, 0]
    assert n_hooks(module) == n_before


def test_a_composite_in_use_elsewhere_serves_two_callbacks_at_the_same_time(module, tmp_path):
    composite, other = zc.EpsilonPlusFlat(), conv_relu_net()
    images = make_images()[0].requires_grad_()
    with composite.context(other):
        (before,) = torch.autograd.grad(other(images).sum(), images)
        n_handles, n_registered = len(composite.handles), n_hooks(other)
        callbacks = [callback_for(layer, attribution=composite, strict=True) for layer in ("net.2", "net.4")]
        make_trainer(tmp_path, *callbacks).validate(module, loader(), verbose=False)
        assert len(composite.handles) == n_handles
        assert n_hooks(other) == n_registered
        (after,) = torch.autograd.grad(other(images).sum(), images)
    assert torch.equal(before, after)
    for callback, layer in zip(callbacks, ("net.2", "net.4"), strict=True):
        assert found_by(callback) == expected_of(module, layer)
        assert callback.report.settings["attribution"] == "EpsilonPlusFlat"


# --------------------------------------------------------------------------------------------- kinds of networks


def whole_in_place(module):
    module.compile(backend=counting)
    return module


@pytest.mark.parametrize("layers", ["net.2", None])
@pytest.mark.parametrize("way", [*WAYS, whole_in_place], ids=[*IDS, "whole in place"])
def test_compiled_networks_are_explained_as_uncompiled_ones(way, layers, net, tmp_path):
    module = way(Classifier(copy.deepcopy(net)))
    name = "net._orig_mod.2" if layers and way is WAYS[1] else layers
    callback = callback_for(name, **FLAT)
    make_trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    assert [pair[1:] for pair in found_by(callback)] == [pair[1:] for pair in expected_of(Classifier(net), layers)]
    assert len(callback.report.pairs) > 0
    assert n_hooks(module) == 0


def test_what_only_runs_the_live_network_is_refused_in_words(net, tmp_path):
    module = CompiledAttribute(copy.deepcopy(net))  # a function of no module, which knows the network it was made for
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="in a function that is compiled"):
        make_trainer(tmp_path, callback_for(**FLAT)).validate(module, loader(), verbose=False)
    assert n_hooks(module) == 0


@pytest.mark.parametrize(
    ("make", "layer"), [(Attentive, "net.mlp"), (Attentive, "net.last"), (Attentive, None), (Recurrent, "net.embed")]
)
def test_attention_and_lstm_are_explained(make, layer, tmp_path):
    torch.manual_seed(0)
    module = Classifier(train_briefly(make(), steps=20))
    callback = callback_for(layer, attribution="excitation_backprop", strict=True)
    make_trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    wanted = expected_of(module, layer, attribution="excitation_backprop")
    assert [pair[:4] for pair in found_by(callback)] == [pair[:4] for pair in wanted]
    assert callback.report.n_images == 48


class HeadInside(HeadOfBackbone):
    def forward(self, images):
        logits = self.head(self.backbone(images))
        return logits.softmax(1)

    def validation_step(self, batch, batch_idx):
        self(batch[0])


class SeveralCalls(Classifier):
    """The network is called three times in a step, and only the second call runs the layers."""

    def forward(self, images, power=None):
        return self.net(images) if power is None else images.mean((1, 2, 3)) ** power

    def validation_step(self, batch, batch_idx):
        self(batch[0], 2)
        super().validation_step(batch, batch_idx)
        self(batch[0], 3)


class Wrapped(Mapping):
    """A batch's images in something that cannot be made anew from its entries."""

    def __init__(self, *, images):
        self.images = images

    def __getitem__(self, key):
        return {"images": self.images}[key]

    def __iter__(self):
        return iter(["images"])

    def __len__(self):
        return 1


class OddArguments(Classifier):
    def forward(self, wrapped):
        return self.net(wrapped["images"] if isinstance(wrapped, Wrapped) else wrapped)

    def validation_step(self, batch, batch_idx):
        super().validation_step([Wrapped(images=batch[0]), batch[1]], batch_idx)


@pytest.mark.parametrize(("kind", "layers"), [(SeveralCalls, "net.2"), (OddArguments, "net.2"), (OddArguments, None)])
def test_unusual_steps_are_explained(kind, layers, net, tmp_path):
    callback = callback_for(layers, **FLAT)
    make_trainer(tmp_path, callback).validate(kind(copy.deepcopy(net)), loader(), verbose=False)
    assert found_by(callback) == expected_of(Classifier(net), layers)


def test_the_logits_may_come_from_within_the_called_module(state, tmp_path):
    module = HeadInside()
    module.backbone.load_state_dict({k: v for k, v in state.items() if not k.startswith("8")})
    module.head.load_state_dict({k[2:]: v for k, v in state.items() if k.startswith("8")})
    callback = callback_for("backbone.2", logits_module="head", **FLAT)
    make_trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    net = conv_relu_net()
    net.load_state_dict(state)
    assert [pair[1:] for pair in found_by(callback)] == [pair[1:] for pair in expected_of(net.eval(), "2")]


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed", "16-true"])
def test_precisions(precision, module, tmp_path):
    callback = callback_for(**FLAT)
    make_trainer(tmp_path, callback, precision=precision).validate(module, loader(), verbose=False)
    report = callback.report
    assert (report.n_images, report.n_images_left_out) == (48, 0)
    wanted = {pair[1:4] for pair in expected_of(module.float())}
    found = {pair[1:4] for pair in found_by(callback)}
    assert len(found ^ wanted) <= (0 if precision == "64-true" else len(wanted) // 3)


def test_a_split_network_is_judged_by_the_composite(module, tmp_path):
    callback = callback_for(**FLAT)
    make_trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    results = []
    for attribution in ("epsilon_plus_flat", "gradient_x_input"):
        split = disentangle(module, callback.plan)
        before, judge = things_of(split), callback_for(attribution=attribution, strict=True)
        (metrics,) = make_trainer(tmp_path, judge).validate(split, loader(), verbose=False)
        split.train()
        before["modes"] = [part.training for part in split.modules()]
        assert_same(split, before)
        assert judge.plan == callback.plan
        results.append({name: value for name, value in metrics.items() if "split" in name})
    assert results[0].keys() == results[1].keys() != set()


@pytest.mark.parametrize("where", [0, 1], ids=["first batch", "later batch"])
def test_images_with_nan_are_left_out_with_a_composite_too(where, net):
    batches = make_batches()
    batches[where][0][3] = float("nan")
    report = find_polysemantic_channels(net, batches, "2", attribution="epsilon_plus_flat", progress=False)
    assert (report.n_images, report.n_images_left_out) == (32, 16)
    assert any("NaN" in note for note in report.notes)
    finite = [batch for place, batch in enumerate(batches) if place != where]
    alone = find_polysemantic_channels(net, finite, "2", attribution="epsilon_plus_flat", progress=False)
    assert report.layers == alone.layers


class KeepsLosses(Classifier):
    """A common way to average over an epoch: tensors with a graph, as attributes."""

    def __init__(self, net):
        super().__init__(net)
        self.outputs, self.last = [], {}

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.outputs.append(loss)
        self.last["loss"] = loss
        return loss


def test_modules_that_keep_their_losses_are_copied(net, tmp_path):
    callback = callback_for(**FLAT)
    trainer = make_trainer(tmp_path, callback, max_epochs=1)
    module = KeepsLosses(copy.deepcopy(net))
    trainer.fit(module, loader(), loader())
    assert callback.report.n_images == 48
    assert all(loss.grad_fn is not None for loss in module.outputs)
