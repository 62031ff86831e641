"""Find and split polysemantic channels while a small network learns to read digits.

Trains for a few seconds on the handwritten digits that come with scikit-learn; nothing is downloaded::

    python examples/digits.py

The layer of interest is a bottleneck: everything the network knows about ten classes has to pass through 16 channels,
so that nearly every channel has to serve several classes, and unrelated ones at that. That is what the callback looks
for. A wide last layer on so small a problem would have channels to spare, and little to find.

Of the 1797 images, 1000 train the network, 400 validate it (and give the callback what it needs), and 397 have no part
in either: every number and picture below the first table comes from those.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_polydis import ChannelDisentanglement, ChannelSplit, SplitConv2d, SplitQuality, evaluate_splits
from lightning_polydis.figures import split_figure

LAYER = "bottleneck"


class DigitClassifier(pl.LightningModule):
    """A small CNN whose last convolution has 16 channels for ten classes; it knows nothing of the callback."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_block(1, 32, stride=1), *_block(32, 64, stride=2), *_block(64, 128, stride=2), nn.Dropout2d(0.3)
        )
        self.bottleneck = nn.Conv2d(128, 16, kernel_size=1)
        self.classifier = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, 10]`` of images ``[B, 1, 8, 8]``."""
        return self.classifier(F.relu(self.bottleneck(self.features(images))).mean((2, 3)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        images, targets = batch
        return F.cross_entropy(self(images), targets)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        images, targets = batch
        self.log("val_accuracy", accuracy(self(images), targets), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def _block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]


class LogitsBeforeSplit(pl.Callback):
    """Keeps what the trained network says about some images, to compare it with what it says after the split."""

    def __init__(self, images: Tensor) -> None:
        self._images = images
        self.logits = torch.empty(0)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Runs before ``on_fit_end``, where channels are split."""
        self.logits = logits_of(pl_module, self._images)


@dataclass
class Outcome:
    """What `main` has measured, on the images that had no part in training or validation."""

    accuracy_before: float
    accuracy_after: float
    logit_difference: float
    n_split: int
    log_dir: Path
    picture: Path | None


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Share of images whose largest logit is that of their class."""
    return (logits.argmax(1) == targets).float().mean()


def logits_of(module: nn.Module, images: Tensor) -> Tensor:
    """Logits in evaluation mode, without gradients."""
    module.eval()
    with torch.no_grad():
        return module(images)


def digits() -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Images ``[1, 8, 8]`` in [0, 1] and their classes, for training, validation and test."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    dataset = TensorDataset(images, torch.tensor(data.target))
    parts = random_split(range(len(dataset)), [1000, 400, 397], torch.Generator().manual_seed(0))
    return tuple(TensorDataset(*dataset[list(part)]) for part in parts)


def main(epochs: int = 15, output_dir: str | Path = "demo_logs") -> Outcome:
    """Train, find, split, compare, draw."""
    output_dir = Path(output_dir)
    console = Console()
    pl.seed_everything(0, verbose=False)
    train, validation, test = digits()
    images, targets = test.tensors

    module, trained = DigitClassifier(), LogitsBeforeSplit(images)
    disentanglement = ChannelDisentanglement(LAYER, split=True, class_names=[f"digit {digit}" for digit in range(10)])
    logger = TensorBoardLogger(output_dir, name="digits")
    console.print(f"Training on {len(train)} images for {epochs} epochs ...")
    with lightning_kept_quiet():
        trainer = pl.Trainer(
            max_epochs=epochs,
            logger=logger,
            callbacks=[disentanglement, trained],
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=sys.stdout.isatty(),
            enable_model_summary=False,
            log_every_n_steps=10,
        )
        trainer.fit(module, DataLoader(train, batch_size=64, shuffle=True), DataLoader(validation, batch_size=200))

    before, after = trained.logits, logits_of(module, images)
    outcome = Outcome(
        accuracy_before=float(accuracy(before, targets)),
        accuracy_after=float(accuracy(after, targets)),
        logit_difference=float((after - before).abs().max()),
        n_split=len(disentanglement.plan),
        log_dir=Path(logger.log_dir),
        picture=None,
    )
    console.print(comparison_table(outcome, before))

    qualities = evaluate_splits(module, disentanglement.plan, DataLoader(test, batch_size=200), progress=False)
    if qualities:
        console.print(quality_table(qualities, len(test)))
        outcome.picture = output_dir / "digits.png"
        draw(module, most_telling(disentanglement.plan.splits, qualities), images, targets, outcome.picture)
    else:
        console.print("No channel was found to be polysemantic, so none was split: train for more epochs.")
    console.print(f"Report:           {outcome.log_dir}/report.html", soft_wrap=True)
    console.print(f"Report and plan:  {outcome.log_dir}/report.json, split_plan.json", soft_wrap=True)
    if outcome.picture is not None:
        console.print(f"Picture:          {outcome.picture}", soft_wrap=True)
    console.print(f"TensorBoard:      tensorboard --logdir {output_dir}", soft_wrap=True)
    return outcome


@contextmanager
def lightning_kept_quiet() -> Iterator[None]:
    """Without Lightning's remarks on hardware, worker processes and the end of training."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")  # what the callback has to say passes here too

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(("GPU", "TPU", "\N{ELECTRIC LIGHT BULB}", "`Trainer.fit` stopped"))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec).*")
        log.addFilter(wanted)
        try:
            yield
        finally:
            log.removeFilter(wanted)


def comparison_table(outcome: Outcome, logits: Tensor) -> Table:
    """The network before and after the split."""
    table = Table(title="before and after the split")
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("test accuracy", f"{outcome.accuracy_before:.4f}", f"{outcome.accuracy_after:.4f}")
    table.add_row("largest change of a logit", "", f"{outcome.logit_difference:.1e}")
    table.caption = f"{len(logits)} test images; logits between {logits.min():.1f} and {logits.max():.1f}"
    return table


def quality_table(qualities: Sequence[SplitQuality], n_images: int) -> Table:
    """Mean and worst of each figure over the splits."""
    table = Table(title=f"{len(qualities)} splits on {n_images} test images")
    for name in ("", "mean", "worst", "of a concept channel"):
        table.add_column(name, justify="right" if name in ("mean", "worst") else "left")
    meaning = {
        "distortion": "change on its own classes; 0 is best",
        "leak": "answer to the other concepts; 0 is best",
        "spurious": "fires above the original elsewhere; 0 is best",
        "auroc": "tells own from other concepts; 1 is best",
    }
    for name, text in meaning.items():
        values = [value for quality in qualities if (value := quality.mean(name)) is not None]
        worst = min(values) if name == "auroc" else max(values)
        table.add_row(name, f"{sum(values) / len(values):.3f}", f"{worst:.3f}", text)
    return table


def most_telling(splits: Sequence[ChannelSplit], qualities: Sequence[SplitQuality]) -> ChannelSplit:
    """The split to draw."""

    # Few concepts, because each takes a row. Among those the one whose concept channels do best at both things that a
    # picture can show: silent where another concept is shown (leak), as loud as the original on their own (distortion).
    # Separation as AUROC would not do to choose by: on digits it is close to 1 for nearly every split.
    def cost(pair: tuple[ChannelSplit, SplitQuality]) -> tuple[int, float]:
        split, quality = pair
        return len(split.concepts), (quality.mean("leak") or 0) + (quality.mean("distortion") or 0)

    return min(zip(splits, qualities, strict=True), key=cost)[0]


def draw(module: DigitClassifier, split: ChannelSplit, images: Tensor, targets: Tensor, path: Path) -> None:
    """Write the picture of one split."""
    layer = module.bottleneck
    assert isinstance(layer, SplitConv2d)
    # The concepts are ordinary output channels of `expand`, for any tool that can look at a channel.
    rows = [layer.channel_index(split.channel, concept) for concept in range(len(split.concepts))]
    with torch.no_grad():
        features = module.features(images)
        original = layer(features)[:, split.channel]
        parts = layer.expand(features)[:, rows]
    figure = split_figure(
        1 - F.interpolate(images, scale_factor=8, mode="bicubic").clamp(0, 1),  # dark ink on white paper
        targets,
        original.clamp(min=0).sum((1, 2)),
        parts.clamp(min=0).sum((2, 3)),
        split.concepts,
        title=f"Channel {split.channel} of a network that reads digits, before and after its split",
    )
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Find and split polysemantic channels of a network that reads digits.")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--output-dir", type=Path, default=Path("demo_logs"))
    parsed = parser.parse_args()
    torch.set_num_threads(1)  # the network is so small that a second thread costs more than it brings
    main(parsed.epochs, parsed.output_dir)
