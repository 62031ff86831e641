"""Layers of real architectures in every precision and way of collecting, against a slow reference in float64."""

import copy
from functools import cache

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_polydis import (
    ChannelDisentanglement,
    ChannelSplit,
    SplitPlan,
    collection,
    disentangle,
    find_polysemantic_channels,
)
from lightning_polydis.collection import RelevanceCollector
from lightning_polydis.layers import flat_weight, sources_of, window_sums
from lightning_polydis.sources import source_relevances
from lightning_polydis.statistics import ChannelStatistics
from lightning_polydis.vectors import RelevanceVectors
from tests.architectures import NETWORKS, enliven
from tests.networks import Classifier
from tests.reference_layers import Expected, error, own_relevance, slow

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
]
TARGETS = torch.tensor([0, 3, 1, 3, 1, 0])
SETTINGS = {"relevance_threshold": 0.02, "class_fraction": 0.5, "similarity_threshold": 0.9, "calibration_samples": 0}
CASES = [(name, layer) for name, network in NETWORKS.items() for layer in network.layers]
ONE_LAYER_EACH = [(name, network.layers[-1]) for name, network in NETWORKS.items()]


@cache
def plain(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A network, not to be changed, and its images."""
    torch.manual_seed(0)
    net = enliven(NETWORKS[name].make())
    return net.to(dtype), torch.randn(len(TARGETS), *NETWORKS[name].shape).to(dtype)


@cache
def expected(name: str, layer: str, dtype: torch.dtype = torch.float32) -> Expected:
    """Image by image in float64, from the weights as they are in ``dtype``."""
    net, images = plain(name, dtype)
    return slow(net, layer, images, TARGETS)


def collect(net, layer, images, autocast=None):
    collector = RelevanceCollector(net, {layer: net.get_submodule(layer)}, observe=lambda name, x: x.clone())
    collector.start(TARGETS)
    with torch.no_grad(), torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        net(images)
    return collector.finish()[layer]


PRECISIONS = {  # of the weights, of autocast, and how far from float64 it may lead: rounding switches some ReLUs
    "float64": (torch.float64, None, 1e-10),
    "float32": (torch.float32, None, 1e-4),
    "bfloat16": (torch.bfloat16, None, 0.1),
    "autocast-bfloat16": (torch.float32, torch.bfloat16, 0.1),
    "autocast-float16": (torch.float32, torch.float16, 3e-2),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("name", "layer"), CASES)
def test_what_is_collected_equals_the_reference(name, layer, precision):
    dtype, autocast, tolerance = PRECISIONS[precision]
    net, images = plain(name, dtype)
    module, wanted = net.get_submodule(layer), expected(name, layer, dtype)
    record = collect(net, layer, images, autocast)
    n_channels = record.relevance.shape[1]
    everything = torch.arange(6).repeat_interleave(n_channels), torch.arange(n_channels).repeat(6)
    vectors = source_relevances(module, record.seen, record.gradient, *everything).unflatten(0, (6, n_channels))
    sums = window_sums(module, record.seen)
    assert min(part.dtype.itemsize for part in (record.relevance, record.gradient, vectors, sums)) >= 4
    assert error(record.relevance, wanted.relevance) < tolerance
    assert error(vectors, wanted.vectors) < tolerance
    for channel in (0, n_channels // 2, n_channels - 1):
        found = (flat_weight(module)[channel].to(sums.dtype) * sums[:, sources_of(module, channel)]).sum(-1)
        own = torch.stack([own_relevance(wanted.layer, x, channel) for x in wanted.inputs])
        assert error(found, own) < tolerance


def compiled_as_a_whole(net):
    return torch.compile(net, backend="eager"), "_orig_mod."


def compiled_in_place(net):
    net.compile(backend="eager")
    return net, ""


def left_alone(net):
    return net, ""


@pytest.fixture
def floats(monkeypatch):
    """Precisions of everything that is summed up over batches."""
    found = set()
    for metric in (ChannelStatistics, RelevanceVectors):

        def watched(self, compute=metric.compute):
            states = [
                value
                for state in self.metric_state.values()
                for value in (state if isinstance(state, list) else [state])
            ]
            found.update(state.dtype for state in states if state.is_floating_point())
            return compute(self)

        monkeypatch.setattr(metric, "compute", watched)
    yield found
    torch._dynamo.reset()


def validate(net, images, callback, precision, tmp_path):
    trainer = pl.Trainer(
        callbacks=[callback],
        precision=precision,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.validate(Classifier(net), DataLoader(TensorDataset(images, TARGETS), 3), verbose=False)


def by_callback(name, layer, way, precision, tmp_path):
    """What the callback finds in a validation epoch of two batches."""
    net, images = plain(name)
    net, prefix = way(copy.deepcopy(net))
    callback = ChannelDisentanglement(f"net.{prefix}{layer}", strict=True, **SETTINGS)
    validate(net, images, callback, precision, tmp_path)
    return callback.report, callback.report._evidence[f"net.{prefix}{layer}"]


def by_function(name, layer, dtype=torch.float32, autocast=None):
    net, images = plain(name, dtype)
    batches = list(zip(images.split(3), TARGETS.split(3), strict=True))
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        report = find_polysemantic_channels(net, batches, layer, progress=False, **SETTINGS)
    return report, report._evidence[layer]


def class_means(evidence, channels=None):
    """Vectors of every class that has images, ``[C, classes, I]``."""
    labels = TARGETS.unique().tolist()
    n_channels = evidence.statistics.counts.shape[2]
    return torch.stack([evidence.vectors.means(channel, labels) for channel in channels or range(n_channels)])


def expected_means(name, layer, dtype=torch.float32):
    wanted = expected(name, layer, dtype).vectors
    return torch.stack([wanted[label == TARGETS].mean(0) for label in TARGETS.unique()], dim=1)


def expected_counts(name, layer):
    """How many images of each class each channel is relevant for: surely, and at most."""
    relevance = expected(name, layer).relevance
    share = relevance / relevance.clamp(min=0).sum(1, keepdim=True)
    of_class = (torch.arange(5)[:, None] == TARGETS).double()
    return [of_class @ (share > SETTINGS["relevance_threshold"] + slack).double() for slack in (1e-4, -1e-4)]


@pytest.mark.parametrize("way", [left_alone, compiled_as_a_whole, compiled_in_place])
@pytest.mark.parametrize(("name", "layer"), ONE_LAYER_EACH)
def test_the_callback_finds_what_the_reference_finds(name, layer, way, floats, tmp_path):
    report, found = by_callback(name, layer, way, "32-true", tmp_path)
    other_report, other = by_function(name, layer)
    low, high = expected_counts(name, layer)
    assert ((low <= found.statistics.counts[0]) & (found.statistics.counts[0] <= high)).all()
    assert 0 < low.sum() < high.numel()
    assert torch.equal(found.statistics.counts, other.statistics.counts)
    assert found.statistics.n_images.tolist() == [2, 2, 0, 2, 0]
    assert error(class_means(found), expected_means(name, layer)) < 1e-4
    assert error(class_means(found), class_means(other)) < 1e-5
    assert [(p.channel, p.class_a, p.class_b) for p in report.pairs] == [
        (p.channel, p.class_a, p.class_b) for p in other_report.pairs
    ]
    assert floats <= {torch.float32, torch.float64}


LIGHTNINGS_PRECISIONS = {
    "64-true": (torch.float64, None, 1e-6),
    "bf16-true": (torch.bfloat16, None, 0.1),
    "bf16-mixed": (torch.float32, torch.bfloat16, 0.1),
}


@pytest.mark.parametrize("way", [left_alone, compiled_in_place])
@pytest.mark.parametrize("precision", LIGHTNINGS_PRECISIONS)
@pytest.mark.parametrize("name", ["bottleneck", "mobilenet", "convnext", "vit", "conv1d"])
def test_the_callback_in_lightnings_precisions(name, precision, way, floats, tmp_path):
    dtype, autocast, tolerance = LIGHTNINGS_PRECISIONS[precision]
    layer = NETWORKS[name].layers[-1]
    _, found = by_callback(name, layer, way, precision, tmp_path)
    _, other = by_function(name, layer, dtype, autocast)
    assert torch.equal(found.statistics.counts, other.statistics.counts)
    assert torch.equal(found.statistics.directions, other.statistics.directions)
    assert error(class_means(found), expected_means(name, layer, dtype)) < tolerance
    assert floats <= {torch.float32, torch.float64}


class MakesTensors(nn.Module):
    """Relies on the default precision, which is Lightning's in a step."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x + torch.zeros(x.shape[1:]))


@pytest.mark.parametrize("way", [left_alone, compiled_in_place])
@pytest.mark.parametrize("precision", LIGHTNINGS_PRECISIONS)
def test_a_layer_is_chosen_in_lightnings_precisions(precision, way, tmp_path):
    net, images = plain("conv1d")
    net, _ = way(MakesTensors(copy.deepcopy(net)))
    callback = ChannelDisentanglement(strict=True, **SETTINGS)
    validate(net, images, callback, precision, tmp_path)
    dtype, _, tolerance = LIGHTNINGS_PRECISIONS[precision]
    evidence = callback.report._evidence["net.net.5"]
    assert error(class_means(evidence), expected_means("conv1d", "5", dtype)) < tolerance


class Rescaled(nn.Module):
    """Logits in single precision, scaled, behind layers in half precision."""

    def __init__(self, scale):
        super().__init__()
        net, _ = plain("conv3d")
        self.net, self.scale = copy.deepcopy(net), scale

    def forward(self, x):
        return self.net(x).float() * self.scale


@pytest.fixture
def scales(monkeypatch):
    """How often a backward pass was made."""
    made, backward = [], RelevanceCollector._backward
    monkeypatch.setattr(RelevanceCollector, "_backward", staticmethod(lambda *args: made.append(1) or backward(*args)))
    return made


@pytest.mark.parametrize(("scale", "n_passes"), [(1e-6, 1), (1.0, 1), (30.0, 2), (1e3, 3), (3e4, 4)])
def test_gradients_in_float16_neither_vanish_nor_overflow(scale, n_passes, scales):
    net, images = Rescaled(scale), plain("conv3d")[1]
    found = collect(net, "net.5", images, torch.float16)
    assert error(found.relevance, expected("conv3d", "5").relevance * scale) < 1e-2
    assert len(scales) == n_passes


def test_without_scaling_they_would_vanish(monkeypatch):
    monkeypatch.setattr(collection, "HALF_SCALES", (1.0,))
    found = collect(Rescaled(1e-7), "net.5", plain("conv3d")[1], torch.float16)
    assert error(found.relevance, expected("conv3d", "5").relevance * 1e-7) > 0.1


@pytest.mark.parametrize(("autocast", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 2e-2)])
def test_vectors_are_right_under_the_callers_autocast(autocast, tolerance):
    net, images = Rescaled(1e-6), plain("conv3d")[1]
    with torch.autocast("cpu", autocast):
        report = find_polysemantic_channels(net, [(images, TARGETS)], "net.5", progress=False, **SETTINGS)
    found = class_means(report._evidence["net.5"])
    assert error(found, expected_means("conv3d", "5") * 1e-6) < tolerance


class SinglePrecision(Rescaled):
    """Does without the autocast that it is run under."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
def test_the_backward_pass_has_the_precision_of_the_forward_pass(autocast):
    found = collect(SinglePrecision(1e-9), "net.5", plain("conv3d")[1], autocast)
    assert error(found.relevance, expected("conv3d", "5").relevance * 1e-9) < 1e-4


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_splits_preserve_the_network_and_come_undone(name, layer):
    net, images = plain(name, torch.float64)
    module = net.get_submodule(layer)
    generator = torch.Generator().manual_seed(0)
    shares = [torch.rand(n_concepts, module.weight.shape[1], generator=generator) for n_concepts in (2, 3)]
    concepts = [[[0], [3]], [[0], [1, 4], [2]]]
    channels = (len(module.weight) - 1, 1)
    splits = [ChannelSplit(layer, *parts) for parts in zip(channels, concepts, shares, strict=True)]
    split = disentangle(net, SplitPlan(splits))
    before, after = net(images).detach(), split(images).detach()
    assert not torch.equal(split.get_submodule(layer).expand.weight[: len(module.weight)], module.weight)
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10 * float(before.abs().max()))
    restored = split.get_submodule(layer).undo()
    assert torch.equal(restored.weight, module.weight)
    assert module.bias is None or torch.equal(restored.bias, module.bias)
    outer, _, attribute = layer.rpartition(".")
    setattr(split.get_submodule(outer), attribute, restored)
    assert torch.equal(split(images), before)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_layer_chosen_by_default_is_the_last_before_the_head(name):
    net, images = plain(name)
    report = find_polysemantic_channels(net, [(images, TARGETS)], progress=False, **SETTINGS)
    assert [layer.name for layer in report.layers] == [NETWORKS[name].chosen]


@pytest.mark.parametrize("name", [name for name, network in NETWORKS.items() if network.depthwise])
def test_depthwise_layers_are_refused(name):
    net, images = plain(name)
    with pytest.raises(ValueError, match="a depthwise `Conv2d`"):
        find_polysemantic_channels(net, [(images, TARGETS)], NETWORKS[name].depthwise, progress=False)


@pytest.mark.parametrize("method", ["paper", "optimized"])
def test_plan_and_quality_do_not_depend_on_the_callers_autocast(method):
    net, images = plain("conv1d")
    settings = {**SETTINGS, "calibration_samples": 8, "method": method, "progress": False}
    plain_report, other = (find_polysemantic_channels(net, [(images, TARGETS)], "5", **settings) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        plan, quality = other.plan, other.quality
    assert len(plan) > 0
    assert plan == plain_report.plan
    assert quality == plain_report.quality
