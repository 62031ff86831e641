"""Layers of real architectures, small, in every precision and way of collecting, against a slow reference in float64."""

import copy
from functools import cache
from typing import NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.resnet import BasicBlock, Bottleneck

from lightning_polydis import (
    ChannelDisentanglement,
    ChannelSplit,
    SplitPlan,
    collection,
    disentangle,
    find_polysemantic_channels,
)
from lightning_polydis.collection import RelevanceCollector
from lightning_polydis.layers import flat_weight, source_relevances, sources_of, window_sums
from lightning_polydis.statistics import ChannelStatistics
from lightning_polydis.vectors import RelevanceVectors
from tests.networks import Classifier

TARGETS = torch.tensor([0, 3, 1, 3, 1, 0])
SETTINGS = {"relevance_threshold": 0.02, "class_fraction": 0.5, "similarity_threshold": 0.9, "calibration_samples": 0}


def resnet(block, **kwargs):
    """Its first two stages, with one block each."""
    net = models.ResNet(block, [1, 1, 1, 1], **kwargs)
    net.layer3, net.layer4, net.fc = nn.Identity(), nn.Identity(), nn.Linear(128 * block.expansion, 5)
    return net


def vgg11():
    """An eighth as wide; without the hundred million weights that `VGG` would draw for its classifier."""
    with torch.device("meta"):
        net = models.VGG(nn.Identity(), init_weights=False)
    net.features = models.vgg.make_layers([w if w == "M" else w // 8 for w in models.vgg.cfgs["A"]])
    net.avgpool = nn.AdaptiveAvgPool2d(1)
    net.classifier = nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 5)
    )
    return net


def mobilenet():
    blocks = [(16, 3, 16, 16, True, "RE", 2, 1, 1), (16, 3, 48, 24, False, "RE", 1, 1, 1)]
    blocks.append((24, 5, 64, 24, True, "HS", 1, 1, 1))
    return models.MobileNetV3([InvertedResidualConfig(*block) for block in blocks], last_channel=32, num_classes=5)


def efficientnet():
    blocks = [MBConvConfig(1, 3, 1, 16, 16, 1), MBConvConfig(6, 3, 2, 16, 24, 2)]
    return models.EfficientNet(blocks, dropout=0.2, num_classes=5, last_channel=64)


def conv1d_net():
    return nn.Sequential(
        *(nn.Conv1d(3, 16, 5, stride=2, padding=2), nn.BatchNorm1d(16), nn.ReLU(inplace=True)),
        *(nn.Conv1d(16, 18, 4, padding="same", groups=2, padding_mode="circular"), nn.SiLU(inplace=True)),
        *(nn.Conv1d(18, 12, 3, dilation=2), nn.ReLU6(inplace=True)),
        *(nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(24, 5)),
    )


def conv3d_net():
    return nn.Sequential(
        *(nn.Conv3d(3, 16, 3, padding=1), nn.BatchNorm3d(16), nn.Hardswish(inplace=True)),
        *(nn.Conv3d(16, 12, (1, 3, 2), stride=(1, 2, 1), groups=2, bias=False), nn.ReLU(inplace=True)),
        *(nn.Conv3d(12, 10, 2, padding="same"), nn.LeakyReLU(inplace=True)),
        *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(10, 5)),
    )


def linear_net():
    """Positions are the two dimensions between batch and features."""
    body = [nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 12), nn.ReLU(inplace=True), nn.Linear(12, 4)]
    return nn.Sequential(*body, nn.Tanh(), nn.Flatten(), nn.Linear(3 * 5 * 4, 5))


class Network(NamedTuple):
    make: object
    layers: list[str]
    chosen: str  # by ``layers=None``
    depthwise: str | None = None
    shape: tuple[int, ...] = (3, 32, 32)


NETWORKS = {
    "resnet": Network(lambda: resnet(BasicBlock), ["layer1.0.conv1", "layer2.0.conv2"], "layer2.0.downsample.0"),
    "bottleneck": Network(
        lambda: resnet(Bottleneck, width_per_group=16), ["layer2.0.conv3"], "layer2.0.downsample.0"
    ),
    "resnext": Network(
        lambda: resnet(Bottleneck, groups=4, width_per_group=4),
        ["layer1.0.conv2", "layer2.0.conv2"],
        "layer2.0.downsample.0",
    ),
    "mobilenet": Network(
        mobilenet, ["features.3.block.3.0", "features.3.block.2.fc1"], "classifier.0", "features.2.block.1.0"
    ),
    "efficientnet": Network(
        efficientnet,
        ["features.2.0.block.0.0", "features.2.1.block.2.fc1"],
        "features.3.0",
        "features.2.0.block.1.0",
    ),
    "densenet": Network(
        lambda: models.DenseNet(8, (2, 2), 16, num_classes=5),
        ["features.denseblock1.denselayer2.conv2", "features.transition1.conv"],
        "features.denseblock2.denselayer2.conv2",
    ),
    "checkpointed": Network(
        lambda: models.DenseNet(8, (2, 2), 16, num_classes=5, memory_efficient=True),
        ["features.denseblock1.denselayer2.conv1"],
        "features.denseblock2.denselayer2.conv2",
    ),
    "vgg": Network(vgg11, ["features.6", "classifier.0"], "classifier.3"),
    "convnext": Network(
        lambda: models.ConvNeXt([CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 1)], num_classes=5),
        ["features.1.0.block.3", "features.1.1.block.5"],
        "features.3.0.block.5",
        "features.1.0.block.0",
    ),
    "vit": Network(
        lambda: models.VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=5),
        ["encoder.layers.encoder_layer_0.mlp.3", "encoder.layers.encoder_layer_1.mlp.0"],
        "encoder.layers.encoder_layer_1.mlp.3",
    ),
    "swin": Network(
        lambda: models.SwinTransformer([4, 4], 16, [2, 2], [2, 2], [2, 2], num_classes=5),
        ["features.1.1.mlp.3", "features.3.0.mlp.0"],
        "features.3.1.mlp.3",
    ),
    "squeezenet": Network(
        lambda: models.SqueezeNet("1_1", num_classes=5), ["features.4.squeeze", "features.4.expand3x3"], "features.12.expand3x3"
    ),
    "conv1d": Network(conv1d_net, ["3", "5"], "5", shape=(3, 24)),
    "conv3d": Network(conv3d_net, ["3", "5"], "5", shape=(3, 6, 5, 4)),
    "linear": Network(linear_net, ["3", "5"], "5", shape=(3, 5, 6)),
}
CASES = [(name, layer) for name, network in NETWORKS.items() for layer in network.layers]
ONE_LAYER_EACH = [(name, network.layers[-1]) for name, network in NETWORKS.items()]


def enliven(net: nn.Module) -> nn.Module:
    """Weights that let something through, norms that have seen data."""
    for module in net.modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm):
            nn.init.normal_(module.weight, mean=1, std=0.3)
            nn.init.normal_(module.bias, std=0.3)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if isinstance(module, models.convnext.CNBlock):
            nn.init.normal_(module.layer_scale, std=0.5)
    return net.eval()


@cache
def plain(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A network, not to be changed, and its images."""
    torch.manual_seed(0)
    net = enliven(NETWORKS[name].make())
    return net.to(dtype), torch.randn(len(TARGETS), *NETWORKS[name].shape).to(dtype)


class Expected(NamedTuple):
    relevance: Tensor  # [B, C]
    vectors: Tensor  # [B, C, I]
    inputs: list[Tensor]
    layer: nn.Module


@cache
def expected(name: str, layer: str, dtype: torch.dtype = torch.float32) -> Expected:
    """Image by image in float64, from the weights as they are in ``dtype``."""
    net, images = plain(name, dtype)
    return slow(net, layer, images)


def slow(net: nn.Module, layer: str, images: Tensor) -> Expected:
    net = copy.deepcopy(net).double()
    for module in net.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    module, seen = net.get_submodule(layer), []
    module.register_forward_hook(lambda _, args, output: seen.append((args[0].detach().clone(), output)))
    relevances, vectors, inputs = [], [], []
    for image, target in zip(images.double(), TARGETS, strict=True):
        seen.clear()
        logit = net(image[None])[0, target]
        x, z = seen[0]
        slope, weight_slope = torch.autograd.grad(logit, [z, module.weight])
        relevances.append(by_channel(module, (z * slope).detach()).sum(1))
        product = (module.weight * weight_slope).detach()
        vectors.append(product.reshape(*product.shape[:2], -1).sum(2))
        inputs.append(x)
    return Expected(torch.stack(relevances), torch.stack(vectors), inputs, module)


def by_channel(layer: nn.Module, values: Tensor) -> Tensor:
    """One image's values, ``[channels, positions]``."""
    return values[0].movedim(-1, 0).flatten(1) if isinstance(layer, nn.Linear) else values[0].flatten(1)


def own_relevance(layer: nn.Module, x: Tensor, channel: int) -> Tensor:
    """Input x gradient of the sum of one channel's own output, for the inputs that it reads: [I]."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).select(-1 if isinstance(layer, nn.Linear) else 1, channel).sum(), x)
    found = by_channel(layer, (x * gradient).detach()).sum(1)
    groups = getattr(layer, "groups", 1)
    return found.chunk(groups)[channel * groups // len(layer.weight)]


def error(found: Tensor, wanted: Tensor) -> float:
    assert float(wanted.norm()) > 0
    return float((found.double() - wanted).norm() / wanted.norm())


def collect(net, layer, images, autocast=None):
    collector = RelevanceCollector(net, {layer: net.get_submodule(layer)}, observe=lambda name, x: x.clone())
    collector.start(TARGETS)
    with torch.no_grad(), torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        net(images)
    return collector.finish()[layer]


PRECISIONS = {  # of the weights, of autocast, and how far from float64 it may lead
    "float64": (torch.float64, None, 1e-10),
    "float32": (torch.float32, None, 1e-4),
    "bfloat16": (torch.bfloat16, None, 5e-2),
    "autocast-bfloat16": (torch.float32, torch.bfloat16, 5e-2),
    "autocast-float16": (torch.float32, torch.float16, 1e-2),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("name", "layer"), CASES)
def test_what_is_collected_equals_the_reference(name, layer, precision):
    dtype, autocast, tolerance = PRECISIONS[precision]
    net, images = plain(name, dtype)
    module, wanted = net.get_submodule(layer), expected(name, layer, dtype)
    record = collect(net, layer, images, autocast)
    n_channels = record.relevance.shape[1]
    image, channel = (part.flatten() for part in torch.meshgrid(torch.arange(6), torch.arange(n_channels), indexing="ij"))
    vectors = source_relevances(module, record.seen, record.gradient, image, channel).unflatten(0, (6, n_channels))
    sums = window_sums(module, record.seen)
    assert min(part.dtype.itemsize for part in (record.relevance, record.gradient, vectors, sums)) >= 4
    assert error(record.relevance, wanted.relevance) < tolerance
    assert error(vectors, wanted.vectors) < tolerance
    for channel in (0, n_channels // 2, n_channels - 1):
        found = (flat_weight(module)[channel].to(sums.dtype) * sums[:, sources_of(module, channel)]).sum(-1)
        own = torch.stack([own_relevance(wanted.layer, x, channel) for x in wanted.inputs])
        assert error(found, own) < tolerance
