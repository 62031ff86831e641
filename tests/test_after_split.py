import copy
import io
import pickle
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch._dynamo.utils import counters
from torch.ao.quantization import quantize_dynamic
from torch.nn import functional as F

from lightning_polydis import ChannelSplit, SplitConv2d, SplitPlan, disentangle, load_from_checkpoint
from lightning_polydis._trainer import check_optimizer_states
from lightning_polydis.surgery import split_further, stored_plan
from tests.networks import Classifier, conv_relu_net, loader, make_batches, make_images
from tests.runs import callback_for, make_trainer, n_hooks

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:Be aware that when using `ckpt_path`")

KINDS = {
    "conv1d": lambda: nn.Conv1d(6, 9, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(6, 9, 3, stride=2, padding=1),
    "conv3d": lambda: nn.Conv3d(6, 9, 2, bias=False),
    "linear": lambda: nn.Linear(6, 9),
    "grouped": lambda: nn.Conv2d(18, 9, 3, padding="same", groups=3),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def shares(n_concepts, n_inputs=6):
    return torch.rand(n_concepts, n_inputs, generator=torch.Generator().manual_seed(n_concepts))


PLAN = SplitPlan(
    [
        ChannelSplit("0", 7, [[0], [1, 3]], shares(2), rho=0.35),
        ChannelSplit("0", 2, [[5], [1], [2]], shares(3), directions=[1, -1, 1]),
    ]
)
FURTHER = ChannelSplit("0", 5, [[2], [0]], shares(2).flip(0))


def inputs(kind, n=4):
    layer = KINDS[kind]()
    size = (3, 6) if kind == "linear" else (layer.in_channels, *[5] * len(layer.kernel_size))
    return torch.randn(n, *size, generator=torch.Generator().manual_seed(0))


def plain_net(kind):
    torch.manual_seed(0)
    layer = KINDS[kind]()
    return nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(layer(inputs(kind)).flatten(1).shape[1], 4))


def split_net(kind):
    return disentangle(plain_net(kind), PLAN)


def assert_close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.detach().abs().max()))


def assert_same_state(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].nan_to_num(-1), value.nan_to_num(-1)), name  # no rho is NaN


def output_and_gradients(run, net, x):
    net.zero_grad()
    output = run(x)
    output.square().mean().backward()
    return [output.detach(), *[parameter.grad.clone() for parameter in net.parameters()]]


def assert_learns(net, x, steps=40):
    targets = torch.arange(len(x)) % 4
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), targets)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


# -------------------------------------------------------------------------------------------- a plain network


@every_kind
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_a_copy_is_the_same_network_and_lives_its_own_life(kind, clone):
    net, x = split_net(kind), inputs(kind)
    before = copy.deepcopy(net.state_dict())
    twin = clone(net)
    assert_same_state(twin.state_dict(), before)
    assert torch.equal(twin(x), net(x))
    assert stored_plan(twin) == PLAN
    twin.load_state_dict({name: 2 * value for name, value in plain_net(kind).state_dict().items()})
    assert_close(twin[0](x), 2 * net[0](x))
    assert_same_state(net.state_dict(), before)


@every_kind
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float16, 5e-3), (torch.bfloat16, 5e-2)], ids=str
)
def test_another_precision(kind, dtype, tolerance):
    plain, net, x = plain_net(kind).to(dtype), split_net(kind).to(dtype), inputs(kind).to(dtype)
    assert_close(net(x), plain(x), tolerance)
    found = [(split.channel, split.concepts, split.directions) for split in stored_plan(net)]
    assert found == [(split.channel, split.concepts, split.directions) for split in PLAN]
    net[0] = net[0].undo()
    assert_close(net[0].weight, plain[0].weight, tolerance)
    assert_close(net(x), plain(x), tolerance)


@pytest.fixture
def _process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@every_kind
@pytest.mark.usefixtures("_process_group")
def test_distributed_data_parallel(kind):
    net, x = split_net(kind), inputs(kind)
    expected = output_and_gradients(net, net, x)
    wrapped = nn.parallel.DistributedDataParallel(net)
    torch.testing.assert_close(output_and_gradients(wrapped, net, x), expected)
    assert_learns(wrapped, x)
    assert stored_plan(net) == PLAN


@every_kind
def test_every_part_learns_as_its_channel_would(kind):
    plain, net, x = plain_net(kind).double(), split_net(kind).double(), inputs(kind).double()
    _, expected, *_ = output_and_gradients(plain, plain, x)
    _, found, *_ = output_and_gradients(net, net, x)
    for split in PLAN:
        *concepts, residual = found[net[0].part_rows(split.channel)]
        for gradient in (*concepts, -residual):
            assert_close(gradient, expected[split.channel], 1e-5)


@every_kind
def test_training_goes_on_and_undo_folds_what_was_learnt(kind):
    net, x = split_net(kind).double(), inputs(kind).double()
    assert_learns(net, x)
    learnt = net(x)
    net[0] = net[0].undo()
    assert repr(net) == repr(plain_net(kind))
    assert_close(net(x), learnt, 1e-12)


@every_kind
def test_a_trained_split_network_is_split_and_trained_again(kind):
    net, x = split_net(kind).double(), inputs(kind).double()
    assert_learns(net, x)
    again = disentangle(net, SplitPlan([FURTHER]))
    assert_close(again(x), net(x), 1e-12)
    assert [split.channel for split in stored_plan(again)] == [7, 2, 5]
    assert_same_state(again[0].state_dict(), split_further(net[0], [FURTHER]).state_dict())
    for channel in (7, 2):
        old, new = (part[0].expand.weight[part[0].part_rows(channel)] for part in (net, again))
        assert torch.equal(old, new), "what was learnt stays where it is"
    assert_learns(again, x.flip(0))
    learnt = again(x)
    again[0] = again[0].undo()
    assert_close(again(x), learnt, 1e-12)


# ------------------------------------------------------------------------------------ export and compilation


@every_kind
@pytest.mark.parametrize("n", [4, 7])
def test_torch_export(kind, n):
    net = split_net(kind).eval()
    shapes = None if n == 4 else ({0: torch.export.Dim("batch", min=2)},)
    torch._dynamo.reset()  # older versions of torch count the exports of all kinds together, and refuse the ninth
    program = torch.export.export(net, (inputs(kind),), dynamic_shapes=shapes)
    torch.testing.assert_close(program.module()(inputs(kind, n)), net(inputs(kind, n)))


@pytest.mark.parametrize("kind", ["conv2d", "grouped", "linear"])
def test_onnx(kind):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    net, shapes = split_net(kind).eval(), ({0: torch.export.Dim("batch", min=2)},)
    program = torch.onnx.export(net, (inputs(kind),), dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(file := io.BytesIO())
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs(kind, 7).numpy()})
    np.testing.assert_allclose(found, net(inputs(kind, 7)).detach(), rtol=1e-4, atol=1e-5)


@every_kind
def test_jit_trace(kind):
    net = split_net(kind).eval()
    traced = torch.jit.trace(net, (inputs(kind),))
    torch.testing.assert_close(traced(inputs(kind, 7)), net(inputs(kind, 7)))


def assert_compiles(net, x, backend):
    expected = output_and_gradients(net, net, x)
    torch._dynamo.reset()
    counters.clear()
    try:
        compiled = torch.compile(net, fullgraph=True, backend=backend)
        found = output_and_gradients(compiled, net, x)
        with torch.compiler.set_stance("fail_on_recompile"):
            again = output_and_gradients(compiled, net, x)
        assert counters["stats"]["unique_graphs"] == 1
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, found)


@every_kind
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(kind, backend):
    assert_compiles(split_net(kind), inputs(kind), backend)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_torch_compile_with_inductor():
    parts = [split_net(kind)[0] for kind in ("grouped", "conv2d", "linear")]
    net = nn.Sequential(parts[0], nn.ReLU(), nn.Conv2d(9, 6, 1), parts[1], nn.ReLU(), nn.Linear(3, 6), parts[2])
    assert_compiles(net, inputs("grouped"), "inductor")


# ----------------------------------------------------------------------------------------------- quantisation


def quantised(net):
    return quantize_dynamic(net.eval(), {nn.Linear})


def test_a_quantised_split_layer_computes_and_knows_its_splits():
    net, x = quantised(split_net("linear")), inputs("linear", 64)
    assert not isinstance(net[0].expand, nn.Linear)
    assert_close(net(x), plain_net("linear")(x), 0.05)
    assert stored_plan(net) == PLAN
    assert net[0].channel_index(2, "residual") == 9 + 2 + 2
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    assert "0.expand.scale" in net.state_dict()
    assert "0.expand.weight" not in net.state_dict()


def test_a_quantised_split_layer_takes_its_own_state_dict():
    net, other, x = quantised(split_net("linear")), split_net("linear"), inputs("linear")
    nn.init.ones_(other[0].expand.weight)
    other = quantised(other)
    assert not torch.equal(other(x), net(x))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))


@pytest.mark.parametrize(
    "change", [lambda net: net[0].undo(), lambda net: disentangle(net, SplitPlan([FURTHER]))], ids=["undo", "split"]
)
def test_a_quantised_split_layer_says_that_it_cannot_be_changed(change):
    with pytest.raises(ValueError, match="`expand` is a `DynamicQuantizedLinear` by now"):
        change(quantised(split_net("linear")))


# ------------------------------------------------------------------------------------------------ the callback

adam = partial(torch.optim.Adam, lr=1e-2)
sgd = partial(torch.optim.SGD, lr=1e-2)
momentum = partial(torch.optim.SGD, lr=1e-2, momentum=0.9)


class Trained(Classifier):
    """A classifier that is trained by an optimizer of the test's choice."""

    def __init__(self, net=None, make=adam):
        super().__init__(net)
        self.make = make

    def configure_optimizers(self):
        return self.make(self.parameters())


@pytest.fixture
def module(state):
    module = Trained()
    module.net.load_state_dict(state)
    return module


def fit(module, folder, *callbacks, ckpt_path=None, **kwargs):
    trainer = make_trainer(folder, *callbacks, **kwargs)
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return trainer


def fit_and_save(module, folder):
    """The checkpoint of a module that fit has split."""
    fit(module, folder, callback_for(split=True)).save_checkpoint(folder / "after.ckpt")
    assert isinstance(module.net[2], SplitConv2d)
    return folder / "after.ckpt"


def test_the_best_checkpoint_is_of_the_unsplit_network_and_is_tested(module, tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="epoch", mode="min")
    trainer = fit(module, tmp_path, callback_for(split=True), best, max_epochs=3, enable_checkpointing=True)
    plain = Classifier.load_from_checkpoint(best.best_model_path).eval()
    assert not torch.equal(module.net[2].undo().weight, plain.net[2].weight)
    (metrics,) = trainer.test(module, loader(), ckpt_path="best", verbose=False)
    assert torch.equal(module.net[2].undo().weight, plain.net[2].weight)
    images, targets = make_images()
    assert metrics["test_loss"] == pytest.approx(float(F.cross_entropy(plain(images), targets).detach()), rel=1e-3)


def test_a_checkpoint_after_the_split_rebuilds_everything(module, tmp_path):
    loaded = load_from_checkpoint(Trained, fit_and_save(module, tmp_path))
    assert_same_state(loaded.state_dict(), module.state_dict())
    images = make_batches()[0][0]
    assert torch.equal(loaded.eval()(images), module.eval()(images))
    assert stored_plan(loaded) == stored_plan(module)


@pytest.mark.parametrize("same_callback", [False, True])
def test_a_second_fit_trains_the_split_module_on(module, same_callback, tmp_path):
    first = callback_for(split=True)
    fit(module, tmp_path, first)
    report, plan, split = first.report, first.plan, module.net[2]
    before = split.expand.weight.clone()
    second = first if same_callback else callback_for(split=True)
    trainer = fit(module, tmp_path, second, max_epochs=2)
    assert module.net[2] is split
    assert not torch.equal(split.expand.weight, before)
    assert second.report is (report if same_callback else None)
    assert second.plan == plan == stored_plan(module)
    logged = {name for name in trainer.callback_metrics if name.startswith("polydis")}
    assert logged == {f"polydis/net.2/split_{name}" for name in ("distortion", "leak", "spurious", "auroc")}


def assert_refused(target, checkpoint, folder):
    message = "optimizer's state in this checkpoint is of the time before layer `net.2` was split"
    with pytest.raises(MisconfigurationException, match=message):
        fit(target, folder, callback_for(split=True), max_epochs=3, ckpt_path=checkpoint)
    assert n_hooks(target) == 1, "the split layer's own load hook"


@pytest.mark.parametrize("make", [adam, momentum, torch.optim.Adagrad])
@pytest.mark.parametrize("is_split", [False, True])
def test_states_from_before_the_split_are_refused(module, make, is_split, tmp_path):
    module.make = make
    checkpoint = fit_and_save(module, tmp_path)
    assert_refused(module if is_split else Trained(make=make), checkpoint, tmp_path)


@pytest.mark.parametrize("make", [adam, torch.optim.Adafactor])
def test_an_unsplit_checkpoint_with_states_is_refused_by_a_split_module(make, tmp_path):
    module = Trained(conv_relu_net(), make)
    module.net[2] = nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2, bias=False)
    fit(module, tmp_path).save_checkpoint(tmp_path / "unsplit.ckpt")
    plan = SplitPlan([ChannelSplit("net.2", 3, [[0], [1]], shares(2, 8))])
    assert_refused(disentangle(module, plan), tmp_path / "unsplit.ckpt", tmp_path)


def test_states_from_before_a_further_split_are_refused(module, tmp_path):
    first, second = (SplitPlan([ChannelSplit("net.2", c, [[0], [1]], shares(2, 8))]) for c in (3, 5))
    trainer = fit(disentangle(module, first, inplace=True), tmp_path)
    disentangle(module, second, inplace=True)
    trainer.save_checkpoint(tmp_path / "further.ckpt")
    assert_refused(Trained(), tmp_path / "further.ckpt", tmp_path)


def test_an_optimizer_without_states_is_resumed(module, tmp_path):
    module.make = sgd
    fresh, checkpoint = Trained(make=sgd), fit_and_save(module, tmp_path)
    trainer = fit(fresh, tmp_path, callback_for(split=True), max_epochs=3, ckpt_path=checkpoint)
    assert trainer.global_step == 9
    assert stored_plan(fresh) == stored_plan(module)
    assert not torch.equal(fresh.net[2].expand.weight, module.net[2].expand.weight)


@pytest.mark.parametrize("kwargs", [{"max_epochs": 1}, {"max_epochs": 3, "limit_val_batches": 0}], ids=str)
def test_a_split_module_is_resumed_without_another_validation(module, kwargs, tmp_path):
    module.make = sgd
    fresh, checkpoint, callback = Trained(make=sgd), fit_and_save(module, tmp_path), callback_for(split=True)
    fit(fresh, tmp_path, callback, ckpt_path=checkpoint, **kwargs)
    assert callback.plan == stored_plan(fresh) == stored_plan(module)


def test_resuming_the_training_of_a_split_module_equals_not_interrupting_it(module, tmp_path):
    fit_and_save(module, tmp_path)
    every = ModelCheckpoint(tmp_path / "every", filename="{epoch}", save_top_k=-1)
    whole = fit(module, tmp_path, callback_for(split=True), every, max_epochs=4, enable_checkpointing=True)
    fresh, callback = Trained(), callback_for(split=True)
    resumed = fit(fresh, tmp_path, callback, max_epochs=4, ckpt_path=tmp_path / "every/epoch=1.ckpt")
    assert_same_state(fresh.state_dict(), module.state_dict())
    assert callback.plan == stored_plan(module)
    for found, expected in zip(fresh.parameters(), module.parameters(), strict=True):
        assert_same_state(resumed.optimizers[0].state[found], whole.optimizers[0].state[expected])
        assert float(resumed.optimizers[0].state[found]["step"]) == 12


def test_a_bf16_checkpoint_is_rebuilt(module, tmp_path):
    fit(module, tmp_path, callback_for(split=True), precision="bf16-true").save_checkpoint(tmp_path / "half.ckpt")
    loaded, saved = load_from_checkpoint(Trained, tmp_path / "half.ckpt"), module.state_dict()
    assert (saved["net.2.expand.weight"].dtype, loaded.dtype) == (torch.bfloat16, torch.float32)
    assert_same_state({name: value.to(saved[name].dtype) for name, value in loaded.state_dict().items()}, saved)
    assert stored_plan(loaded) == stored_plan(module)


# --------------------------------------------------------------------------------------------- averaged weights


@pytest.fixture(params=[1, -1], ids=["average first", "average last"])
def fit_averaged(request, tmp_path):
    def run(module, decay=0.9, callbacks=(), **kwargs):
        if not hasattr(lightning_callbacks, "EMAWeightAveraging"):
            pytest.skip("Lightning has averages from 2.6 on")
        together = [lightning_callbacks.EMAWeightAveraging(decay=decay), callback_for(split=True)][:: request.param]
        trainer = fit(module, tmp_path, *together, *callbacks, **kwargs)
        return trainer, together[:: request.param][1]

    return run


def test_the_averaged_weights_are_split(module, fit_averaged, state, tmp_path):
    _, callback = fit_averaged(module, max_epochs=2)
    plain = [Trained(), Trained()]
    for other, callbacks in zip(plain, ([lightning_callbacks.EMAWeightAveraging(decay=0.9)], []), strict=True):
        other.net.load_state_dict(state)
        fit(other, tmp_path, *callbacks, max_epochs=2)
    assert torch.equal(module.net[2].undo().weight, plain[0].net[2].weight)
    assert not torch.equal(module.net[2].undo().weight, plain[1].net[2].weight)
    assert any("EMAWeightAveraging" in note for note in callback.report.notes)


def test_the_report_names_the_average_whose_weights_were_analysed(module, tmp_path):
    if not hasattr(lightning_callbacks, "WeightAveraging"):
        pytest.skip("Lightning has averages from 2.6 on")
    callback = callback_for(split=True)
    fit(module, tmp_path, lightning_callbacks.WeightAveraging(use_buffers=False), callback, max_epochs=2)
    assert "the weights that `WeightAveraging` puts in place for validation" in callback.report.notes[0]
    assert isinstance(module.net[2], SplitConv2d)


def test_a_split_module_is_validated_beside_an_average(module, fit_averaged):
    trainer, _ = fit_averaged(module)
    before = copy.deepcopy(module.state_dict())
    (metrics,) = trainer.validate(module, loader(), verbose=False)
    assert "polydis/net.2/split_leak" in metrics
    assert_same_state(module.state_dict(), before)


def test_a_checkpoint_beside_an_average_holds_the_split(module, fit_averaged, tmp_path):
    fit_averaged(module)[0].save_checkpoint(tmp_path / "after.ckpt")
    assert_same_state(load_from_checkpoint(Trained, tmp_path / "after.ckpt").state_dict(), module.state_dict())


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_the_structure_of_a_split_module_is_not_averaged(module, decay, fit_averaged, tmp_path):
    fit_and_save(module, tmp_path)
    concepts = [(split.channel, split.concepts) for split in stored_plan(module)]
    merge = copy.deepcopy(module.net[2].merge.state_dict())
    fit_averaged(module, decay, max_epochs=3)
    assert_same_state(module.net[2].merge.state_dict(), merge)
    assert [(split.channel, split.concepts) for split in stored_plan(module)] == concepts


def test_averaged_training_of_a_split_module_is_resumed(module, fit_averaged, tmp_path):
    fit_and_save(module, tmp_path)
    every = ModelCheckpoint(tmp_path / "every", filename="{epoch}", save_top_k=-1)
    fit_averaged(module, 0.99, [every], max_epochs=3, enable_checkpointing=True)
    fresh = Trained()
    fit_averaged(fresh, 0.99, max_epochs=3, ckpt_path=tmp_path / "every/epoch=1.ckpt")
    assert_same_state(fresh.state_dict(), module.state_dict())


def test_matrices_of_an_optimizers_own_are_no_stale_state():
    net = split_net("linear")
    weight = net[0].expand.weight
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    optimizer.state[weight] = {"momentum": torch.zeros_like(weight), "left": torch.eye(9), "right": torch.eye(6)}
    check_optimizer_states([optimizer], net)
    optimizer.state[weight] = {"momentum": torch.zeros(9, 6)}
    with pytest.raises(ValueError, match="of the time before layer `0` was split"):
        check_optimizer_states([optimizer], net)
