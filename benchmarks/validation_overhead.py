"""What the callback adds to a validation epoch: time and memory.

Validation epochs with and without `ChannelDisentanglement` take turns; the ratio of their times is reported. The clock
runs from the first callback's ``on_validation_start`` to the last one's ``on_validation_end``, so everything that the
callback does between its own first and last hook counts, the choice of a plan included. Memory is the largest resident
set of a fresh process, from Linux's ``/proc`` (and on a GPU the largest amount allocated there).

Example:
    python benchmarks/validation_overhead.py --model resnet50 --repeats 7
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_polydis import ChannelDisentanglement

MODELS = {
    "resnet18": (torchvision.models.resnet18, "net.layer4.1.conv2"),
    "resnet50": (torchvision.models.resnet50, "net.layer4.2.conv3"),
    "resnext50": (torchvision.models.resnext50_32x4d, "net.layer4.2.conv2"),
    "vit": (torchvision.models.vit_b_16, "net.encoder.layers.encoder_layer_11.mlp.3"),
    "squeezenet": (torchvision.models.squeezenet1_1, "net.features.12.expand1x1"),
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
IMAGE_SIZE = 224
MEBIBYTE = 2**20


class Classifier(pl.LightningModule):
    """The smallest module that can be validated."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images."""
        return self.net(images)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        images, targets = batch
        logits = self(images)
        self.log("val_loss", F.cross_entropy(logits, targets))
        self.log("val_accuracy", (logits.argmax(1) == targets).float().mean())


class Mark(pl.Callback):
    """Notes when it hears that validation starts and ends.

    Args:
        clock: Gives the time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the start."""
        self.start = self._now(pl_module.device)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the end."""
        self.end = self._now(pl_module.device)

    def _now(self, device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return self._clock()


@dataclass(frozen=True)
class Epoch:
    """One validation epoch: seconds, and how many channels and pairs were flagged in how many images."""

    seconds: float
    n_images: int = 0
    n_candidates: int = 0
    n_flagged: int = 0


def make_module(arguments: argparse.Namespace) -> Classifier:
    """The network, with random weights."""
    torch.manual_seed(0)
    build, _ = MODELS[arguments.model]
    module = Classifier(build(weights=None, num_classes=arguments.classes))
    if arguments.compile:
        module.net.compile()
    return module


def make_loader(arguments: argparse.Namespace) -> DataLoader:
    """Random images and classes, all in memory."""
    draw = torch.Generator().manual_seed(1)
    shape = (arguments.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)
    batches = [
        (torch.randn(shape, generator=draw), torch.randint(arguments.classes, shape[:1], generator=draw))
        for _ in range(arguments.batches)
    ]
    return DataLoader(batches, batch_size=None)


def validate(module: Classifier, loader: DataLoader, arguments: argparse.Namespace, with_callback: bool) -> Epoch:
    """One validation epoch."""
    first, last = (Mark(CLOCKS[arguments.clock]) for _ in range(2))
    polydis = ChannelDisentanglement(
        MODELS[arguments.model][1],
        relevance_threshold=arguments.relevance_threshold,
        similarity_threshold=arguments.similarity_threshold,
        attribution=arguments.attribution,
        concepts=arguments.concepts,
        calibration_samples=arguments.calibration_samples,
        strict=True,
    )
    trainer = pl.Trainer(
        accelerator="gpu" if arguments.device == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[first, polydis, last] if with_callback else [first, last],
    )
    with contextlib.redirect_stdout(io.StringIO()):  # the callback's table of results
        trainer.validate(module, loader, verbose=False)
    seconds = last.end - first.start
    if not with_callback:
        return Epoch(seconds)
    report = polydis.report
    assert report is not None
    assert report.n_images == arguments.batches * arguments.batch_size, "some images were left out"
    return Epoch(seconds, report.n_images, report.layers[0].n_candidates, len(report.channels))


def measure_time(arguments: argparse.Namespace) -> list[tuple[Epoch, Epoch]]:
    """Epochs without and with the callback, in turns; the first of each is thrown away."""
    module, loader = make_module(arguments), make_loader(arguments)
    rounds = []
    for repeat in range(arguments.repeats + 1):
        order = (False, True) if repeat % 2 else (True, False)  # neither always comes first
        epochs = {with_callback: validate(module, loader, arguments, with_callback) for with_callback in order}
        rounds.append((epochs[False], epochs[True]))
    return rounds[1:]


def measure_memory(with_callback: bool) -> dict[str, float]:
    """Largest memory of one validation epoch in a fresh process, in MiB."""
    variant = "with" if with_callback else "without"
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", variant]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(answer.splitlines()[-1])


def report_memory(arguments: argparse.Namespace) -> None:
    """Run one epoch and print this process's largest memory."""
    validate(make_module(arguments), make_loader(arguments), arguments, arguments.memory_of == "with")
    peak = {"resident": _peak_resident()}
    if arguments.device == "cuda":
        peak["allocated on the GPU"] = torch.cuda.max_memory_allocated() / MEBIBYTE
    print(json.dumps(peak))


def _peak_resident() -> float:
    """Largest resident set in MiB; not ``ru_maxrss``, which a new process takes over from its parent."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def print_results(arguments: argparse.Namespace, rounds: list[tuple[Epoch, Epoch]]) -> None:
    """The figures, and a markdown row of them."""
    without, with_callback = ([epoch.seconds for epoch in epochs] for epochs in zip(*rounds, strict=True))
    ratios = [b / a for a, b in zip(without, with_callback, strict=True)]
    memory = {variant: measure_memory(variant) for variant in (False, True)}
    found = rounds[0][1]
    for place in memory[False]:
        print(f"peak memory, {place}: {memory[False][place]:.0f} MiB without, {memory[True][place]:.0f} MiB with")
    print(f"candidates: {found.n_candidates}, threads: {torch.get_num_threads()}")
    cells = [
        f"{arguments.model}{', compiled' if arguments.compile else ''}, {_kind(arguments)}",
        f"`{MODELS[arguments.model][1]}`",
        f"{found.n_images}",
        f"{found.n_flagged}",
        f"{statistics.median(without):.2f} s",
        f"{statistics.median(with_callback):.2f} s",
        f"{statistics.median(ratios):.3f}",
        f"{min(ratios):.3f} to {max(ratios):.3f} (n={len(ratios)})",
        *(f"{memory[variant][place]:.0f}" for variant in (False, True)),
    ]
    print("| model | layer | images | flagged | without | with | ratio | spread | MiB without | MiB with |")
    print(f"| {' | '.join(cells)} |")


def _kind(arguments: argparse.Namespace) -> str:
    return arguments.attribution if arguments.concepts == "classes" else arguments.concepts


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="resnet50")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count, after one that does not")
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--relevance-threshold", type=float, default=0.03)
    parser.add_argument("--similarity-threshold", type=float, default=None)
    parser.add_argument("--attribution", default="gradient_x_input", help="or the name of a zennit composite")
    parser.add_argument("--calibration-samples", type=int, default=32, help="0: nothing is split")
    parser.add_argument("--concepts", choices=["classes", "clusters"], default="classes")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: of this process, for busy machines and --threads 1"
    )
    parser.add_argument("--compile", action="store_true", help="compile the network with torch.compile")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--memory-of", choices=["with", "without"], default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    arguments = parse_arguments()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.memory_of is not None:
        report_memory(arguments)
    else:
        print_results(arguments, measure_time(arguments))


if __name__ == "__main__":
    main()
