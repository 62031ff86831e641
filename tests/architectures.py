"""Real architectures, small, with random weights."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.resnet import BasicBlock, Bottleneck


def resnet(block, **kwargs):
    """Its first two stages, with one block each."""
    net = models.ResNet(block, [1, 1, 1, 1], **kwargs)
    net.layer3, net.layer4, net.fc = nn.Identity(), nn.Identity(), nn.Linear(128 * block.expansion, 5)
    return net


def vgg11():
    """Its first stages, narrow; without the hundred million weights that `VGG` would draw for its classifier."""
    with torch.device("meta"):
        net = models.VGG(nn.Identity(), init_weights=False)
    widths = [width if width == "M" else width // 4 for width in models.vgg.cfgs["A"][:7]]
    hidden = [nn.Linear(64, 128), nn.ReLU(True), nn.Dropout(), nn.Linear(128, 64), nn.ReLU(True), nn.Dropout()]
    net.features, net.avgpool = models.vgg.make_layers(widths), nn.AdaptiveAvgPool2d(1)
    net.classifier = nn.Sequential(*hidden, nn.Linear(64, 5))
    return net


def mobilenet():
    blocks = [(16, 3, 16, 16, True, "RE", 2, 1, 1), (16, 3, 48, 24, False, "RE", 1, 1, 1)]
    blocks.append((24, 5, 64, 24, True, "HS", 1, 1, 1))
    return models.MobileNetV3([InvertedResidualConfig(*block) for block in blocks], last_channel=32, num_classes=5)


def efficientnet():
    blocks = [MBConvConfig(1, 3, 1, 16, 16, 1), MBConvConfig(6, 3, 2, 16, 24, 2)]
    return models.EfficientNet(blocks, dropout=0.2, num_classes=5, last_channel=64)


def squeezenet():
    """Its first two fire modules."""
    net = models.SqueezeNet("1_1", num_classes=5)
    net.features, net.classifier[1] = net.features[:5], nn.Conv2d(128, 5, 1)
    return net


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
    make: Callable[[], nn.Module]
    layers: list[str]
    chosen: str  # by ``layers=None``
    depthwise: str | None = None
    shape: tuple[int, ...] = (3, 32, 32)


NETWORKS = {
    "resnet": Network(lambda: resnet(BasicBlock), ["layer2.0.downsample.0", "layer2.0.conv2"], "layer2.0.downsample.0"),
    "bottleneck": Network(lambda: resnet(Bottleneck, width_per_group=16), ["layer2.0.conv3"], "layer2.0.downsample.0"),
    "resnext": Network(
        lambda: resnet(Bottleneck, groups=4, width_per_group=4),
        ["layer2.0.conv3", "layer2.0.conv2"],
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
    "vgg": Network(vgg11, ["features.8", "classifier.0"], "classifier.3"),
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
    "squeezenet": Network(squeezenet, ["features.4.squeeze", "features.4.expand3x3"], "features.4.expand3x3"),
    "conv1d": Network(conv1d_net, ["3", "5"], "5", shape=(3, 24)),
    "conv3d": Network(conv3d_net, ["3", "5"], "5", shape=(3, 6, 5, 4)),
    "linear": Network(linear_net, ["3", "5"], "5", shape=(3, 5, 6)),
}


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
