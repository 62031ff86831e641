"""Small networks and data for the tests."""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import Bottleneck
from zennit.layer import Sum

from lightning_polydis import ChannelSplit, SplitPlan
from lightning_polydis.layers import inputs_per_channel


def conv_relu_net(num_classes: int = 4, in_channels: int = 3) -> nn.Sequential:
    """Strides, paddings, dilation and in-place ReLUs; layer ``"2"`` has 8 inputs and a 3 x 3 kernel with bias."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(12, 10, 1, bias=False),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, num_classes),
    )


class BottleneckNet(nn.Module):
    """A ResNet with two bottleneck blocks; ``blocks.1.conv3`` is the paper's layer in small."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        down = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2, bias=False), nn.BatchNorm2d(32))
        self.blocks = nn.Sequential(Bottleneck(16, 8, stride=2, downsample=down), Bottleneck(32, 8))
        self.fc = nn.Linear(32, num_classes)
        self._give_the_batch_norms_a_life()

    def _give_the_batch_norms_a_life(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.normal_(module.weight, mean=1, std=0.3)
                nn.init.normal_(module.bias, std=0.3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(images)).mean((2, 3)))


def plain_vgg(bias: bool = False, num_classes: int = 4) -> nn.Sequential:
    """Convolutions, ReLUs and both kinds of pooling, for images of 8 x 8; piecewise linear if without biases."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=bias), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 12, 3, padding=1, bias=bias), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(48, 16, bias=bias), nn.ReLU(), nn.Linear(16, num_classes, bias=bias)),
    )


class PlainResNet(nn.Module):
    """One residual block without biases and batch norms, with zennit's module for the sum."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 12, 1, bias=False)
        self.first, self.second = (nn.Conv2d(8, width, 3, padding=1, bias=False) for width in (8, 12))
        self.relus, self.sum, self.pool = nn.ModuleList(nn.ReLU() for _ in range(3)), Sum(), nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(12, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relus[0](self.stem(images))
        branches = torch.stack([self.down(x), self.second(self.relus[1](self.first(x)))], -1)
        return self.fc(self.pool(self.relus[2](self.sum(branches))).flatten(1))


SPLIT_KINDS = [(2, "below"), (2, "above"), (2, "hard"), (3, "below"), (3, "above"), (3, "hard"), (2, "an empty row")]


def memberships(n_concepts: int, n_inputs: int, kind: str, generator: torch.Generator) -> Tensor:
    """Of each kind: sums over concepts below 1 or above it, zeros and ones, a concept of nothing."""
    values = torch.rand(n_concepts, n_inputs, generator=generator)
    if kind == "below":
        return values / n_concepts
    if kind == "above":
        return 0.6 + 0.4 * values
    if kind == "hard":
        return (values > 0.5).float()
    return values * torch.tensor([[0.0], [1.0]])


def plan_for(net: nn.Module, *layers: str) -> SplitPlan:
    """Channels 0 to 6 of each layer, one for each kind of membership."""
    generator, splits = torch.Generator().manual_seed(0), []
    for name in layers:
        n_inputs = inputs_per_channel(net.get_submodule(name))
        for channel, (count, kind) in enumerate(SPLIT_KINDS):
            rows = memberships(count, n_inputs, kind, generator)
            splits.append(ChannelSplit(name, channel, [[label] for label in range(count)], rows))
    return SplitPlan(splits)


def make_images(n: int = 48, num_classes: int = 4, size: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise images with a class-dependent pattern, classes in turn: ``[n, 3, size, size]`` and ``[n]``."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(num_classes, 3, size, size, generator=generator)
    targets = torch.arange(n) % num_classes
    return patterns[targets] + 0.5 * torch.randn(n, 3, size, size, generator=generator), targets


def make_batches(batch_size: int = 16, **kwargs: int) -> list[tuple[Tensor, Tensor]]:
    """`make_images` in batches."""
    images, targets = make_images(**kwargs)
    return list(zip(images.split(batch_size), targets.split(batch_size), strict=True))


def train_briefly(net: nn.Module, steps: int = 60, lr: float = 1e-2, **kwargs: int) -> nn.Module:
    """Train until relevances mean something; evaluation mode."""
    images, targets = make_images(**kwargs)
    optimizer = torch.optim.Adam(net.parameters(), lr)
    net.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(images), targets).backward()
        optimizer.step()
    optimizer.zero_grad()
    return net.eval()


class Classifier(pl.LightningModule):
    """A LightningModule around a network, with loss and accuracy logged in every loop."""

    def __init__(self, net: nn.Module | None = None, num_classes: int = 4) -> None:
        super().__init__()
        self.net = conv_relu_net(num_classes) if net is None else net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


def loader(batch_size: int = 16, shuffle: bool = False, **kwargs: int) -> DataLoader:
    """A DataLoader over `make_images`."""
    return DataLoader(TensorDataset(*make_images(**kwargs)), batch_size, shuffle=shuffle)
