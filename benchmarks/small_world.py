"""Images of sixteen made-up classes, and a small bottleneck ResNet that learns to tell them apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck

NUM_CLASSES = 16
IMAGE_SIZE = 32
N_BLOBS = 3
LAYER = "blocks.4.conv3"
"""The network's last convolution: 1x1, 128 inputs, 512 channels, followed by a batch norm."""


class SmallResNet(nn.Module):
    """A ResNet of five bottleneck blocks for images of 32 x 32 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(
            block(64, 16, stride=1),
            block(64, 32, stride=2),
            block(128, 64, stride=2),
            block(256, 128, stride=2),
            block(512, 128, stride=1),
        )
        self.head = nn.Linear(512, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, 16]`` of images ``[B, 3, 32, 32]``."""
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def block(n_inputs: int, planes: int, stride: int) -> Bottleneck:
    """A bottleneck block, with a convolution as its shortcut where the shapes differ."""
    n_outputs = planes * Bottleneck.expansion
    shortcut = None
    if stride != 1 or n_inputs != n_outputs:
        shortcut = nn.Sequential(
            nn.Conv2d(n_inputs, n_outputs, 1, stride, bias=False),
            nn.BatchNorm2d(n_outputs),
        )
    return Bottleneck(n_inputs, planes, stride, shortcut)


class ImageMaker:
    """Makes images: each class has its own colour, grating and blobs; phases, places and noise are drawn anew.

    Args:
        seed: Seeds the classes' looks.
    """

    def __init__(self, seed: int = 0) -> None:
        looks = torch.Generator().manual_seed(seed)
        self._ground = _uniform((NUM_CLASSES, 3), 0.8, looks)
        self._stripes = _uniform((NUM_CLASSES, 3), 1.0, looks)
        self._blobs = _uniform((NUM_CLASSES, 3), 2.0, looks)
        self._angle = math.pi * torch.rand(NUM_CLASSES, generator=looks)
        self._frequency = 1.5 + 5 * torch.rand(NUM_CLASSES, generator=looks)
        self._width = 0.08 + 0.15 * torch.rand(NUM_CLASSES, generator=looks)

    def make(self, n_per_class: int, seed: int, noise: float = 0.5) -> tuple[Tensor, Tensor]:
        """Images ``[16 * n, 3, 32, 32]`` and their classes ``[16 * n]``, class after class."""
        draw = torch.Generator().manual_seed(seed)
        targets = torch.arange(NUM_CLASSES).repeat_interleave(n_per_class)
        strength = 0.4 + torch.rand(3, len(targets), 1, 1, 1, generator=draw)
        parts = (self._ground[targets][..., None, None], self._grating(targets, draw), self._spots(targets, draw))
        images = sum(weight * part for weight, part in zip(strength, parts, strict=True))
        return images + noise * torch.randn(len(targets), 3, IMAGE_SIZE, IMAGE_SIZE, generator=draw), targets

    def _grating(self, targets: Tensor, draw: torch.Generator) -> Tensor:
        angle = self._angle[targets] + 0.1 * torch.randn(len(targets), generator=draw)
        along = angle.cos()[:, None, None] * _grid() + angle.sin()[:, None, None] * _grid().T
        phase = 2 * math.pi * torch.rand(len(targets), 1, 1, generator=draw)
        wave = (2 * math.pi * self._frequency[targets][:, None, None] * along + phase).sin()
        return self._stripes[targets][..., None, None] * wave[:, None]

    def _spots(self, targets: Tensor, draw: torch.Generator) -> Tensor:
        centres = torch.rand(2, N_BLOBS, len(targets), 1, 1, generator=draw)
        distance = (_grid() - centres[0]) ** 2 + (_grid().T - centres[1]) ** 2
        spots = (-distance / (2 * self._width[targets][:, None, None] ** 2)).exp().amax(0)
        return self._blobs[targets][..., None, None] * spots[:, None]


def _uniform(shape: tuple[int, ...], limit: float, generator: torch.Generator) -> Tensor:
    return limit * (2 * torch.rand(shape, generator=generator) - 1)


def _grid() -> Tensor:
    return torch.linspace(0, 1, IMAGE_SIZE).repeat(IMAGE_SIZE, 1)


def train(model: nn.Module, images: Tensor, targets: Tensor, epochs: int, batch_size: int = 64) -> None:
    """Train ``model`` and leave it in evaluation mode."""
    n_steps = epochs * math.ceil(len(images) / batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=n_steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), targets[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, targets: Tensor, batch_size: int = 64) -> float:
    """Share of images that ``model`` puts into their own class."""
    guesses = torch.cat([model(part).argmax(1) for part in images.split(batch_size)])
    return float((guesses == targets).float().mean())
