"""A network whose channels stand for known patterns, and images of those: concepts without labels have a truth here."""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

N_PATTERNS, N_SOURCES = 6, 3
"""Patterns that an image may show, and sources that see each of them, together."""

CHANNELS = [(0, 1), (0,), (2, 3), (2,), (4,), (1, 4, 5), (5,), (3,)]
"""Patterns that each channel of layer ``mix`` answers to."""

MERGED = [0, 2, 5]

GROUPED = [(0, 1), (0,), (2, 1), (2,), (3, 4), (3,), (5, 4), (5,)]
"""The same for a convolution of two groups, each of which reads the sources of three patterns."""

GROUPED_MERGED = [0, 2, 4, 6]


def templates() -> Tensor:
    """What each source looks for, orthogonal to all others: ``[patterns, sources, 3, 4, 4]``."""
    draw = torch.randn(48, 48, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(draw).Q[: N_PATTERNS * N_SOURCES].reshape(N_PATTERNS, N_SOURCES, 3, 4, 4)


class PlantedNet(nn.Module):
    """An autoencoder in whose layer ``mix`` some channels answer to several patterns."""

    def __init__(self, groups: int = 1, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.patterns = CHANNELS if groups == 1 else GROUPED
        n_sources = N_PATTERNS * N_SOURCES
        self.sources, self.relu = nn.Conv2d(3, n_sources, 4, stride=4), nn.ReLU()
        self.mix, self.act = nn.Conv2d(n_sources, 8, 1, groups=groups), activation or nn.ReLU(inplace=True)
        self.back = nn.ConvTranspose2d(8, 3, 4, stride=4)
        with torch.no_grad():
            self.sources.weight.copy_(templates().flatten(0, 1))
            self.sources.bias.fill_(-0.2)
            own = [weights.chunk(groups, dim=0) for weights in self.weights()]
            group = [channel * groups // 8 for channel in range(8)]
            self.mix.weight.copy_(torch.stack([own[c][g].flatten() for c, g in enumerate(group)])[..., None, None])
            self.mix.bias.fill_(-0.05)

    def weights(self) -> Tensor:
        """Weight of each source of each pattern for each channel, ``[8, patterns, sources]``."""
        gains = 0.7 + 0.6 * torch.rand(N_PATTERNS, N_SOURCES, generator=torch.Generator().manual_seed(1))
        weights = torch.zeros(8, N_PATTERNS, N_SOURCES)
        for channel, patterns in enumerate(self.patterns):
            weights[channel, list(patterns)] = gains[list(patterns)]
        return weights

    def detector(self, images: Tensor, channel: int, pattern: int) -> Tensor:
        """What the channel would put out if it answered to one pattern alone, ``[n, 4, 4]``."""
        weights = torch.zeros(N_PATTERNS, N_SOURCES)
        weights[pattern] = self.weights()[channel, pattern]
        with torch.no_grad():
            return torch.einsum("nkhw,k->nhw", self.relu(self.sources(images)), weights.flatten()).relu()

    def forward(self, images: Tensor) -> Tensor:
        return self.back(self.act(self.mix(self.relu(self.sources(images)))))


def planted_images(n: int = 300, seed: int = 0, noise: float = 0.12) -> tuple[Tensor, Tensor]:
    """Images ``[n, 3, 16, 16]`` that show one pattern twice, patterns in turn, and which it is."""
    draw = torch.Generator().manual_seed(seed)
    images = noise * torch.randn(n, 3, 16, 16, generator=draw)
    own, shown = torch.arange(n) % N_PATTERNS, templates()
    for image, pattern in zip(images, own.tolist(), strict=True):
        for row, column in torch.randint(4, (2, 2), generator=draw).mul(4).tolist():
            gains = 0.8 + 0.8 * torch.rand(N_SOURCES, 1, 1, 1, generator=draw)
            image[:, row : row + 4, column : column + 4] += (gains * shown[pattern]).sum(0)
    return images, own


def planted_loader(n: int = 300, batch_size: int = 50) -> DataLoader:
    """Batches of images alone, ``(images,)``."""
    return DataLoader(TensorDataset(planted_images(n)[0]), batch_size)


class Autoencoder(pl.LightningModule):
    """Its batches hold nothing but images. It learns so slowly that its channels stay what they are."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = PlantedNet() if net is None else net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[0])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-4)
