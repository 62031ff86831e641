"""Compiled networks are analysed by an uncompiled rehearsal; compiled code, its graphs and results stay as they are."""

import copy

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_polydis import disentangle, evaluate_splits, find_polysemantic_channels
from lightning_polydis.rehearsal import changes_under_gradients, is_compiled, rehearsal
from tests.networks import BottleneckNet, Classifier, loader, make_batches, train_briefly
from tests.runs import SETTINGS, HeadOfBackbone, as_loader, callback_for, make_trainer, n_hooks

GRAPHS = []


def counting(graph, example_inputs):
    """A compiler that compiles nothing and notes each graph of the network (there are others in Lightning's `log`)."""
    if any(node.target is torch.conv2d for node in graph.graph.nodes):
        GRAPHS.append(graph)
    return graph.forward


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    GRAPHS.clear()
    yield
    torch._dynamo.reset()


def whole(module):
    return torch.compile(module, backend=counting)


def child(module):
    module.net = torch.compile(module.net, backend=counting)
    return module


def in_place(module):
    module.net.compile(backend=counting)
    return module


class CompiledForward(Classifier):
    def __init__(self, net):
        super().__init__(net)
        self.forward = torch.compile(self.forward, backend=counting)


def check_compiled(way, n_graphs):
    if way is in_place and not n_graphs:
        pytest.skip("older versions of torch compile no `nn.Sequential` in place")
    assert n_graphs > 0


WAYS = [whole, child, in_place, lambda module: CompiledForward(module.net)]
IDS = ["whole", "child", "in place", "forward"]


def validated(module, tmp_path, *callbacks, data=None):
    torch._dynamo.reset()
    GRAPHS.clear()
    torch.manual_seed(3)
    (metrics,) = make_trainer(tmp_path, *callbacks).validate(module, data or loader(), verbose=False)
    return {name: value for name, value in metrics.items() if "polydis" not in name}, len(GRAPHS)


@pytest.mark.parametrize("layers", ["net.2", None])
@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_a_compiled_network_gives_the_same_results_and_graphs_and_is_analysed(way, layers, net, tmp_path):
    without = validated(way(Classifier(copy.deepcopy(net))), tmp_path)
    check_compiled(way, without[1])
    module = way(Classifier(copy.deepcopy(net)))
    name = layers if layers is None or way is not child else "net._orig_mod.2"
    callback = callback_for(name)
    assert validated(module, tmp_path, callback) == without
    expected = find_polysemantic_channels(Classifier(net), make_batches(), layers, progress=False, **SETTINGS)
    found, wanted = (
        [(p.channel, p.class_a, p.class_b, p.cosine_similarity) for p in r.pairs] for r in (callback.report, expected)
    )
    assert found == wanted
    assert len(found) > 0
    assert n_hooks(module) == 0


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_training_a_compiled_network_ends_with_the_same_weights_and_graphs(way, net, tmp_path):
    results = []
    for callbacks in ([], [callback_for("net._orig_mod.2" if way is child else "net.2")]):
        torch._dynamo.reset()
        GRAPHS.clear()
        module = way(Classifier(copy.deepcopy(net)))
        make_trainer(tmp_path, *callbacks, max_epochs=2).fit(module, loader(), loader())
        results.append(([parameter.detach().clone() for parameter in module.parameters()], len(GRAPHS)))
    (without, n_without), (with_callback, n_with) = results
    assert all(map(torch.equal, without, with_callback))
    assert n_without == n_with
    check_compiled(way, n_with)
    assert callbacks[0].report is not None


def test_a_split_compiled_network_computes_the_same(net, tmp_path):
    module = in_place(Classifier(copy.deepcopy(net)))
    callback = callback_for(split=True)
    make_trainer(tmp_path, callback).fit(module, loader(), loader())
    x = make_batches()[0][0]
    restored = copy.deepcopy(module.net)
    restored[2] = restored[2].undo()
    torch.testing.assert_close(module(x), restored(x), rtol=1e-4, atol=1e-5)
    assert len(callback.plan) > 0
    evaluated = callback_for()
    make_trainer(tmp_path, evaluated).validate(module, loader(), verbose=False)
    assert evaluated.plan == callback.plan


class Busy(Classifier):
    """Does before and after the logits what must not happen twice."""

    def __init__(self, net):
        super().__init__(net)
        self.accuracy, self.images_seen = MulticlassAccuracy(4), SumMetric()
        self.outputs = []

    def validation_step(self, batch, batch_idx):
        images, targets = batch["data"]
        self.log("batch", float(batch_idx))
        self.print(f"batch {batch_idx}")
        self.images_seen.update(images.abs())
        images.mul_(0.5)
        images = images + 0.01 * torch.randn_like(images)
        logits = self(images)
        self.accuracy(logits, targets)
        self.outputs.append(logits)
        self.log("val_acc", self.accuracy)
        self.log("seen", self.images_seen)
        self.log("val_loss", F.cross_entropy(logits, targets))


def test_nothing_happens_twice(net, tmp_path, capsys):
    results = []
    for callbacks in ([], [callback_for(target_fn=lambda batch: batch["data"][1])]):
        module = Busy(copy.deepcopy(net))
        module.net.compile(backend=counting)
        data = as_loader([{"data": list(batch)} for batch in make_batches()])
        metrics = validated(module, tmp_path, *callbacks, data=data)
        results.append((metrics, len(module.outputs), capsys.readouterr().out.count("batch ")))
    assert results[0] == results[1]
    assert results[0][1:] == (3, 3)
    assert callbacks[0].report.n_images == 48
    assert "log" not in module.__dict__


@pytest.mark.parametrize("layers", ["backbone.2", None])
@pytest.mark.parametrize("head", ["eager", "compiled"])
def test_a_head_behind_a_compiled_backbone_has_to_be_named(layers, head, tmp_path):
    module = HeadOfBackbone()
    module.backbone.compile(backend=counting)
    if head == "compiled":
        module.head.compile(backend=counting)
    ran = "ran" if head == "eager" else "may run"
    with pytest.raises(MisconfigurationException, match=f'`head` {ran} after the output .*`logits_module="head"`'):
        validated(module, tmp_path, callback_for(layers))
    assert n_hooks(module) == 0
    assert "log" not in module.__dict__
    named = callback_for("backbone.2", logits_module="head")
    validated(module, tmp_path, named)
    plain = callback_for("backbone.2", logits_module="head")
    uncompiled = HeadOfBackbone()
    uncompiled.load_state_dict(module.state_dict())
    validated(uncompiled, tmp_path, plain)
    assert named.report.layers == plain.report.layers
    assert plain.report.n_images == 48


class Failing(Classifier):
    def validation_step(self, batch, batch_idx):
        self(batch[0])
        if batch_idx == 1:
            raise RuntimeError("the user's own")
        super().validation_step(batch, batch_idx)


class FailingEarly(Failing):
    def validation_step(self, batch, batch_idx):
        if batch_idx == 1:
            raise RuntimeError("the user's own")
        super().validation_step(batch, batch_idx)


class FailingInside(Failing):
    def __init__(self, net):
        super().__init__(net)
        self.index = 0
        self.net[4].register_forward_hook(self._fail)

    def _fail(self, module, args, output):
        if self.index == 1:
            raise RuntimeError("the user's own")

    def validation_step(self, batch, batch_idx):
        self.index = batch_idx
        Classifier.validation_step(self, batch, batch_idx)


class OtherNames(Classifier):
    def validation_step(self, b, i):
        Classifier.validation_step(self, b, i)


class BatchOnly(Classifier):
    def validation_step(self, batch):
        Classifier.validation_step(self, batch, 0)


class SeveralLoaders(Classifier):
    def validation_step(self, b, i, dataloader_idx):
        self.log(f"loss_{dataloader_idx}", F.cross_entropy(self(b[0]), b[1]), add_dataloader_idx=False)


@pytest.mark.parametrize(("kind", "n_loaders"), [(OtherNames, 1), (BatchOnly, 1), (SeveralLoaders, 2)])
def test_steps_get_the_arguments_that_lightning_passes(kind, n_loaders, net, tmp_path):
    module, callback = in_place(kind(copy.deepcopy(net))), callback_for(strict=True)
    loaders = loader() if n_loaders == 1 else [loader()] * n_loaders
    make_trainer(tmp_path, callback).validate(module, loaders, verbose=False)
    assert callback.report.n_images == 48 * n_loaders


class CompiledMethod(Classifier):
    def __init__(self, net):
        super().__init__(net)
        self.features = torch.compile(self.net[:6], backend=counting)

    @torch.compile(backend=counting)
    def head(self, features):
        return self.net[6:](features)

    def forward(self, images):
        return self.head(self.features(images))


class CompiledAttribute(Classifier):
    def __init__(self, net):
        super().__init__(net)
        self.run = torch.compile(lambda images: self.net(images), backend=counting)

    def forward(self, images):
        return self.run(images)


@pytest.mark.parametrize("kind", [CompiledMethod, CompiledAttribute])
def test_compiled_methods_and_attributes_are_noticed(kind, net, tmp_path):
    without = validated(kind(copy.deepcopy(net)), tmp_path)
    callback = callback_for(None)
    assert validated(kind(copy.deepcopy(net)), tmp_path, callback) == without
    assert without[1] > 0
    assert callback.report.n_images == 48


@pytest.mark.parametrize("kind", [Failing, FailingEarly, FailingInside])
@pytest.mark.filterwarnings("ignore:The analysis of this epoch failed")
def test_an_error_of_the_step_reaches_the_user(kind, net, tmp_path):
    module = in_place(kind(copy.deepcopy(net)))
    with pytest.raises(RuntimeError, match="the user's own"):
        validated(module, tmp_path, callback_for())
    assert n_hooks(module) == (1 if kind is FailingInside else 0)
    assert torch.is_grad_enabled()
    assert "log" not in module.__dict__


class FailingOnce(HeadOfBackbone):
    """Fails between layer and logits, in the rehearsal only."""

    def validation_step(self, batch, batch_idx):
        features = self.backbone(batch[0])
        if "log" in self.__dict__:
            raise RuntimeError("only in the rehearsal")
        self.grad_modes = [*getattr(self, "grad_modes", []), torch.is_grad_enabled()]
        self.head(features)


def test_a_failed_rehearsal_leaves_the_grad_mode_of_the_steps_alone(tmp_path):
    module = FailingOnce()
    module.backbone.compile(backend=counting)
    with pytest.warns(UserWarning, match=r"(?s)analysis of this epoch failed .*only in the rehearsal"):
        validated(module, tmp_path, callback_for("backbone.2", logits_module="head"))
    assert module.grad_modes == [False] * 3
    assert n_hooks(module) == 0


class WithTeacher(Classifier):
    """Modules with parameters beside the network, one of which runs before it."""

    def __init__(self, net):
        super().__init__(net)
        self.teacher, self.idle = copy.deepcopy(net), nn.Linear(3, 3)

    def validation_step(self, batch, batch_idx):
        self.teacher(batch[0])
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))


def test_modules_that_run_before_or_never_are_no_heads(net, tmp_path):
    callback = callback_for()
    validated(in_place(WithTeacher(copy.deepcopy(net))), tmp_path, callback)
    expected = find_polysemantic_channels(net, make_batches(), "2", progress=False, **SETTINGS)
    assert [pair.cosine_similarity for pair in callback.report.pairs] == [p.cosine_similarity for p in expected.pairs]


def test_functions_on_a_compiled_network_run_its_own_code(net):
    compiled = torch.compile(copy.deepcopy(net), backend=counting)
    report = find_polysemantic_channels(compiled, make_batches(), "_orig_mod.2", progress=False, **SETTINGS)
    expected = find_polysemantic_channels(net, make_batches(), "2", progress=False, **SETTINGS)
    assert [pair.cosine_similarity for pair in report.pairs] == [pair.cosine_similarity for pair in expected.pairs]
    split = disentangle(compiled, report.plan)
    assert evaluate_splits(split, report.plan, make_batches(), progress=False)[0].concepts
    assert GRAPHS == []
    x = make_batches()[0][0]
    torch.testing.assert_close(split(x), net(x), rtol=1e-4, atol=1e-5)


class Attentive(nn.Module):
    """Attention before and after the convolution-like layers, in the form that has a faster path without gradients."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 3, stride=3)
        self.first = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.mlp = nn.Linear(16, 16)
        self.second = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.last = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, images):
        tokens = self.first(self.patch(images).flatten(2).mT)
        tokens = self.second(tokens + self.mlp(tokens).relu())
        return self.head((tokens + self.last(tokens).relu()).mean(1))


class Keeping(Classifier):
    def validation_step(self, batch, batch_idx):
        self.kept = [*getattr(self, "kept", []), self(batch[0])]


@pytest.mark.parametrize(
    "layers", ["net.patch", "net.first.linear1", "net.mlp", "net.second.linear2", "net.last", None]
)
def test_attention_keeps_its_fast_path_and_its_results(layers, tmp_path):
    torch.manual_seed(0)
    net = train_briefly(Attentive(), steps=20)
    without, module = Keeping(copy.deepcopy(net)), Keeping(copy.deepcopy(net))
    callback = callback_for(layers, strict=True)
    validated(without, tmp_path)
    validated(module, tmp_path, callback)
    assert len(module.kept) == 3
    assert all(map(torch.equal, module.kept, without.kept))
    expected = find_polysemantic_channels(module, make_batches(), layers, progress=False, **SETTINGS)
    found, wanted = ([pair.cosine_similarity for pair in report.pairs] for report in (callback.report, expected))
    assert found == pytest.approx(wanted, abs=1e-5)
    assert changes_under_gradients(module, None if layers is None else [layers]) == (layers != "net.last")


def test_projections_of_attention_do_not_run_and_are_refused_in_words(tmp_path):
    callback = callback_for("net.first.self_attn.out_proj")
    with pytest.raises(MisconfigurationException, match="`net.first.self_attn.out_proj` did not run, or not through"):
        validated(Classifier(Attentive()), tmp_path, callback)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm = nn.Linear(27, 16), nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, images):
        return self.head(self.lstm(self.embed(images.flatten(2).mT.reshape(len(images), 9, 27)).relu())[0].mean(1))


def test_lstm_keeps_its_results(tmp_path):
    torch.manual_seed(0)
    net, callback = train_briefly(Recurrent(), steps=20), callback_for("net.embed", strict=True)
    without, module = Keeping(copy.deepcopy(net)), Keeping(copy.deepcopy(net))
    validated(without, tmp_path)
    validated(module, tmp_path, callback)
    assert all(map(torch.equal, module.kept, without.kept))
    assert callback.report.n_images == 48


@pytest.mark.parametrize("layers", [["net.last", "net.mlp"], ["net.mlp", "net.last"]])
def test_all_callbacks_rehearse_or_none(layers, tmp_path):
    torch.manual_seed(0)
    module = Keeping(train_briefly(Attentive(), steps=20))
    callbacks = [callback_for(name, strict=True) for name in layers]
    validated(module, tmp_path, *callbacks)
    assert [callback.report.n_images for callback in callbacks] == [48, 48]


def test_batch_norm_and_random_numbers_are_as_they_were_after_a_rehearsal():
    module = Classifier(BottleneckNet())
    state = copy.deepcopy(module.state_dict())
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with rehearsal(module):
        module.train()(torch.randn(4, 3, 9, 9))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_what_is_switched_off_is_not_compiled():
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].forward = torch.compiler.disable(net[0].forward)
    assert not is_compiled(net)


@pytest.mark.filterwarnings("ignore")
def test_inductor_with_reduced_overhead_is_served(tmp_path):
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(243, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)]
    net = train_briefly(nn.Sequential(*layers))
    module = Classifier(copy.deepcopy(net))
    module.net.compile(mode="reduce-overhead")
    callback = callback_for("net.3")
    validated(module, tmp_path, callback)
    expected = find_polysemantic_channels(net, make_batches(), "3", progress=False, **SETTINGS)
    assert [pair.cosine_similarity for pair in callback.report.pairs] == [p.cosine_similarity for p in expected.pairs]
