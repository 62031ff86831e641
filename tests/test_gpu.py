"""On a GPU: the same findings as on the CPU, splits that change nothing, everything given back."""

import copy

import pytest
import torch
from torch.nn import functional as F

from lightning_polydis import (
    ChannelDisentanglement,
    SplitConv2d,
    concept_heatmaps,
    disentangle,
    evaluate_splits,
    find_polysemantic_channels,
    visualize_channels,
)
from tests.networks import BottleneckNet, conv_relu_net, loader, make_batches, make_images, plan_for
from tests.planted import Autoencoder, planted_loader
from tests.runs import SETTINGS, Recorder, callback_for, make_trainer, n_hooks

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
]
GPU = {"accelerator": "gpu", "devices": 1}
METHODS = [
    {"method": "paper"},
    {"method": "optimized"},
    {"attribution": "epsilon_plus_flat", "method": "paper"},
    {"attribution": "epsilon_plus_flat"},
    {"concepts": "clusters"},
]
IDS = ["paper", "optimized", "composite, paper", "composite", "clusters"]


@pytest.fixture(autouse=True)
def _plain_arithmetic():
    """Without the ten bits that convolutions on a GPU usually multiply with."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def settings_for(method):
    return method if "concepts" in method else {**SETTINGS, **method}


def found(report):
    return [(pair.layer, pair.channel, pair.class_a, pair.class_b) for pair in report.pairs]


def assert_alike(report, expected):
    assert expected.channels
    assert found(report) == found(expected)
    assert [channel.channel for channel in report.channels] == [channel.channel for channel in expected.channels]
    ours, theirs = (torch.tensor([pair.cosine_similarity for pair in one.pairs]) for one in (report, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert len(report.plan) == len(expected.plan)


@pytest.mark.parametrize("method", METHODS[:4], ids=IDS[:4])
@pytest.mark.parametrize("layers", ["net.2", ["net.2", "net.4"]])
def test_the_callback_finds_what_it_finds_on_the_cpu(module, method, layers, tmp_path):
    reports = []
    for where in ({}, GPU):
        callback = ChannelDisentanglement(layers, strict=True, **settings_for(method))
        make_trainer(tmp_path, callback, **where).validate(copy.deepcopy(module), loader(n=160), verbose=False)
        reports.append(callback.report)
    assert_alike(reports[1], reports[0])


@pytest.mark.parametrize("method", METHODS[:4], ids=IDS[:4])
def test_the_plain_function_finds_what_it_finds_on_the_cpu(module, method):
    settings = {"progress": False, **settings_for(method)}
    expected = find_polysemantic_channels(module, make_batches(), "net.2", **settings)
    report = find_polysemantic_channels(module, make_batches(), "net.2", device="cuda", **settings)
    assert_alike(report, expected)
    assert next(module.parameters()).device.type == "cpu"


def test_planted_channels_are_found_without_labels(tmp_path):
    reports = []
    for where in ({}, GPU):
        torch.manual_seed(0)
        callback = ChannelDisentanglement("net.mix", concepts="clusters", strict=True)
        make_trainer(tmp_path, callback, **where).validate(Autoencoder(), planted_loader(), verbose=False)
        reports.append(callback.report)
    assert_alike(reports[1], reports[0])


@pytest.mark.parametrize("method", METHODS, ids=IDS)
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_losses_stay_bit_for_bit_what_they_were(module, method, precision, tmp_path):
    plain, watched = Recorder(), Recorder()
    deterministic = {"precision": precision, "deterministic": "warn", **GPU}
    for own in ([plain], [ChannelDisentanglement("net.2", strict=True, **settings_for(method)), watched]):
        make_trainer(tmp_path, *own, **deterministic).validate(copy.deepcopy(module), loader(), verbose=False)
    assert plain.seen
    for before, after in zip(plain.seen, watched.seen, strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_training_is_what_it_was(module, tmp_path):
    after = []
    for own in ([], [callback_for(strict=True)]):
        trained = copy.deepcopy(module)
        torch.manual_seed(3)
        trainer = make_trainer(tmp_path, *own, max_epochs=2, deterministic="warn", **GPU)
        trainer.fit(trained, loader(), loader())
        assert n_hooks(trained) == n_hooks(module)
        assert trainer.validate_loop.inference_mode
        after.append({key: value.cpu() for key, value in trained.state_dict().items()})
    assert all(torch.equal(after[0][key], after[1][key]) for key in after[0])


def test_the_memory_of_the_gpu_is_given_back(module, tmp_path):
    module.cuda()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    callback = callback_for(strict=True)
    make_trainer(tmp_path, callback, **GPU).validate(module, loader(), verbose=False)
    module.cuda()
    assert callback.report.pairs
    assert torch.cuda.memory_allocated() <= before + 2**20  # cuBLAS keeps what it works with elsewhere


def test_the_callback_splits_and_reports(module, tmp_path):
    callback = callback_for(split=True, strict=True)
    trainer = make_trainer(tmp_path, callback, logger=True, max_epochs=1, **GPU)
    trainer.fit(module, loader(n=160), loader(n=160))
    assert isinstance(module.net[2], SplitConv2d)
    assert callback.report.quality
    assert list(tmp_path.rglob("report.html"))
    trainer.validate(module, loader(), verbose=False)


@pytest.mark.parametrize("merge_on", ["cuda", "cpu"])
def test_a_split_changes_no_output_and_can_be_undone(merge_on):
    torch.manual_seed(0)
    net, images = conv_relu_net().eval(), make_images()[0].cuda()
    plan = plan_for(net, "2")
    expected = copy.deepcopy(net).cuda()(images)
    split = disentangle(net.to(merge_on), plan).cuda()
    torch.testing.assert_close(split(images), expected, atol=2e-5, rtol=1e-4)
    undone = split[2].undo()
    assert undone.weight.device.type == "cuda"
    assert torch.equal(undone.weight, net[2].weight.cuda())


def test_a_split_network_trains_on():
    torch.manual_seed(0)
    net = BottleneckNet().eval().cuda()
    split = disentangle(net, plan_for(net, "blocks.1.conv3"))
    images, targets = (part.cuda() for part in make_images())
    loss = F.cross_entropy(split(images), targets)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in split.parameters())


def test_splits_are_judged_as_on_the_cpu(module):
    report = find_polysemantic_channels(module, make_batches(n=160), "net.2", progress=False, **SETTINGS)
    there, here = (
        evaluate_splits(module, report.plan, make_batches(n=160, seed=0), device=device, progress=False)
        for device in ("cuda", "cpu")
    )
    assert len(there) == len(here) > 0
    for ours, theirs in zip(there, here, strict=True):
        for name in ("distortion", "leak", "spurious", "auroc"):
            assert ours.mean(name) == pytest.approx(theirs.mean(name), abs=1e-3)


def test_heatmaps_of_a_network_on_a_gpu(module):
    plan, (images, targets) = plan_for(module.net, "2"), make_images(n=4)
    maps = [concept_heatmaps(module.net, plan, images, targets, device=device) for device in ("cpu", "cuda")]
    for here, there in zip(*maps, strict=True):
        torch.testing.assert_close(there.parts, here.parts, atol=1e-4, rtol=1e-3)


def test_visualisation_of_a_network_on_a_gpu(module):
    pytest.importorskip("horama")
    pictures = visualize_channels(module.net.cuda(), plan_for(module.net, "2"), input_size=16, steps=2, progress=False)
    assert len(pictures) > 0
    for one in pictures:
        assert one.original.device.type == "cpu"
        assert one.parts.isfinite().all()
        assert not torch.equal(one.parts[0], one.parts[1])  # each looks for something else


@pytest.mark.parametrize("method", METHODS[:2], ids=IDS[:2])
def test_a_process_group_of_nccl(module, method, tmp_path):
    expected = ChannelDisentanglement("net.2", strict=True, **settings_for(method))
    make_trainer(tmp_path, expected, **GPU).validate(copy.deepcopy(module), loader(), verbose=False)
    callback = ChannelDisentanglement("net.2", strict=True, **settings_for(method))
    trainer = make_trainer(tmp_path, callback, strategy="ddp", **GPU)
    try:
        trainer.validate(module, loader(), verbose=False)
        assert torch.distributed.get_backend() == "nccl"
    finally:
        torch.distributed.destroy_process_group()
    assert_alike(callback.report, expected.report)
