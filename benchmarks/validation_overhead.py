"""What the callback adds to a validation epoch: time and memory.

Validation epochs without the callback, with it in several variants, and with nothing but the backward pass that
gradient x input needs (*bare*) take turns; the ratio of their times is reported, median and range over the rounds, and
that of the shortest epochs, which other work on the machine disturbs least. The clock runs from the first hook of
validation to the last but one, so everything that the callback does for an epoch counts. What it does once, when the
run ends (a plan, its quality, the table), is reported by itself. Memory is the largest resident set of a fresh process,
from Linux's ``/proc``; with a GPU, the most that was allocated there.

An epoch is one of ImageNet in small: with a few of the classes, 50 images of each, and as small a part of
``calibration_memory``, an image meets what it would meet there: as many samples of its class and as many vectors.

Example:
    python benchmarks/validation_overhead.py --models resnet50 squeezenet
    python benchmarks/validation_overhead.py --models resnet18 --compile --variants optimized
    python benchmarks/validation_overhead.py --models squeezenet --variants clusters
    python benchmarks/validation_overhead.py --models squeezenet --data-set-classes 25
    python benchmarks/validation_overhead.py --device cuda --batch-size 64 --batches 4
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import io
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torchvision
from measuring import MEBIBYTE, in_turns, keep_freed_memory, peak_resident, ratios, spread, table, table_line, wait_for
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_polydis import ChannelDisentanglement


@dataclass(frozen=True)
class Model:
    """A network, its layer of interest, and how many batches make an epoch of some seconds on two cores."""

    name: str
    build: Callable[..., nn.Module]
    layer: str
    batches: int


MODELS = {
    "resnet18": Model("ResNet-18", torchvision.models.resnet18, "layer4.1.conv2", 40),
    "resnet50": Model("ResNet-50", torchvision.models.resnet50, "layer4.2.conv3", 24),
    "convnext": Model("ConvNeXt-T", torchvision.models.convnext_tiny, "features.7.2.block.5", 16),
    "vit": Model("ViT-B/16", torchvision.models.vit_b_16, "encoder.layers.encoder_layer_11.mlp.3", 8),
    "squeezenet": Model("SqueezeNet 1.1", torchvision.models.squeezenet1_1, "features.12.expand1x1", 80),
    "resnext50": Model("ResNeXt-50, 32 groups", torchvision.models.resnext50_32x4d, "layer4.2.conv2", 8),
}
DEFAULT_MODELS = ["resnet18", "resnet50", "convnext", "vit", "squeezenet"]
PAPER, REPLAY = {"method": "paper"}, {"attribution": "epsilon_plus_flat"}
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    "optimized": {},
    "replay-paper": {**PAPER, **REPLAY},
    "replay-optimized": REPLAY,
    "clusters": {"concepts": "clusters"},
}
"""What differs from the callback's default settings."""
TARGETS = {"paper": 1.05, "optimized": 1.10}
ABOVE_BARE = 0.03
"""The target where the bare backward pass alone costs more."""
HEADER = (
    *("network", "layer", "variant", "images", "s without", "with / without", "shortest / shortest", "target"),
    *("s at the end of the run", "MiB without", "MiB with"),
)
N_IMAGE_BATCHES = 4
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


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
        wait_for(device.type)
        return self._clock()


class BareBackward(pl.Callback):
    """One backward pass from the logits of the images' own classes to the layer, and nothing done with it.

    Args:
        layer: Name of the layer.
    """

    def __init__(self, layer: str) -> None:
        self._layer = layer

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Allow gradients, and put the hooks on."""
        trainer.validate_loop.inference_mode = False
        layer = pl_module.get_submodule(self._layer)
        self._handles = [layer.register_forward_hook(self._begin), pl_module.net.register_forward_hook(self._end)]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep the targets."""
        self._targets = batch[1]

    def _begin(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        torch.set_grad_enabled(True)
        self._output = output.detach().requires_grad_()
        return self._output.clone()  # the in-place ReLU that often follows would overwrite a leaf

    def _end(self, module: nn.Module, args: Any, logits: Tensor) -> Tensor:
        torch.autograd.grad(logits.gather(1, self._targets[:, None]).sum(), self._output)
        torch.set_grad_enabled(False)
        return logits.detach()


class Overhead:
    """Validation epochs of one network.

    Args:
        model: Which.
        arguments: The command line.
        n_batches: Of an epoch.
        in_small: Whether memory and classes are less than those of all classes by as much as the images are.
    """

    def __init__(self, model: Model, arguments: argparse.Namespace, n_batches: int, in_small: bool = True) -> None:
        self.model, self.arguments, self.n_batches = model, arguments, n_batches
        self.small = in_proportion(arguments, n_batches * arguments.batch_size) if in_small else {}
        torch.manual_seed(0)
        self.module = Classifier(model.build(weights=None, num_classes=arguments.classes))
        if arguments.compile:
            self.module.net.compile()
        self.loader = make_loader(arguments, n_batches)
        self.ends: dict[str, list[float]] = {}
        self.on_gpu: dict[str, float] = {}  # the most MiB that each variant had allocated there

    def callbacks(self, variant: str) -> list[pl.Callback]:
        """What is in the Trainer in a variant."""
        layer = f"net.{self.model.layer}"
        if variant == "without":
            return []
        if variant == "bare":
            return [BareBackward(layer)]
        small = {} if variant == "clusters" else self.small  # their memory does not grow with classes
        settings = {"calibration_samples": self.arguments.calibration_samples, **small, **VARIANTS[variant]}
        return [ChannelDisentanglement(layer, strict=True, **settings)]

    def validate(self, variant: str) -> float:
        """Seconds of one epoch; what the end of the run takes is kept in ``ends``."""
        first, last = (Mark(CLOCKS[self.arguments.clock]) for _ in range(2))
        own = self.callbacks(variant)
        trainer = pl.Trainer(
            accelerator="gpu" if self.arguments.device == "cuda" else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[first, *own, last],
        )
        if self.arguments.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with contextlib.redirect_stdout(io.StringIO()):  # the callback's table of results
            trainer.validate(self.module, self.loader, verbose=False)
        if self.arguments.device == "cuda":
            self.on_gpu[variant] = torch.cuda.max_memory_allocated() / MEBIBYTE
        for polydis in own:
            self._check(polydis)
        self.ends.setdefault(variant, []).append(last.end - first.end)  # the callback's `on_validation_end`
        return first.end - first.start

    def _check(self, callback: pl.Callback) -> None:
        expected = self.n_batches * self.arguments.batch_size
        if isinstance(callback, ChannelDisentanglement) and callback.report.n_images != expected:
            raise RuntimeError(f"Expected {expected} images to be analysed, but got {callback.report.n_images}.")


def classes_seen(arguments: argparse.Namespace, n_images: int) -> int:
    """How many classes so many images are of."""
    return min(arguments.classes, max(2, n_images // arguments.images_per_class))


def in_proportion(arguments: argparse.Namespace, n_images: int) -> dict[str, Any]:
    """Settings under which those classes are all there are, with their share of the default memory."""
    seen = classes_seen(arguments, n_images)
    memory = inspect.signature(ChannelDisentanglement).parameters["calibration_memory"].default
    share = min(1.0, seen / arguments.data_set_classes)
    return {"logits_fn": lambda logits: logits[:, :seen], "calibration_memory": memory * share}


def make_loader(arguments: argparse.Namespace, n_batches: int) -> DataLoader:
    """Random images, a few batches of them in turns, all in memory, as many of each class."""
    draw = torch.Generator().manual_seed(1)
    shape = (arguments.batch_size, 3, arguments.image_size, arguments.image_size)
    images = [torch.randn(shape, generator=draw) for _ in range(min(N_IMAGE_BATCHES, n_batches))]
    n_images = n_batches * arguments.batch_size
    order = torch.randperm(n_images, generator=draw) % classes_seen(arguments, n_images)
    targets = order.view(n_batches, arguments.batch_size)
    return DataLoader([(images[row % len(images)], own) for row, own in enumerate(targets)], batch_size=None)


def measure(name: str, arguments: argparse.Namespace) -> list[list[str]]:
    """Rows of the table for one network: epochs in turns, and memory."""
    n_batches = max(1, round(arguments.batches * MODELS[name].batches))
    overhead = Overhead(MODELS[name], arguments, n_batches)
    names = ["without", *arguments.variants]
    seconds = in_turns({own: functools.partial(overhead.validate, own) for own in names}, arguments.repeats)
    plain = seconds.pop("without")
    found = {variant: ratios(own, plain) for variant, own in seconds.items()}
    bare = statistics.median(found["bare"]) if "bare" in found else None
    memory = overhead.on_gpu or {own: peak_memory(name, own, arguments) for own in names if own != "bare"}
    about = [f"{n_batches * arguments.batch_size}", f"{statistics.median(plain):.2f}"]
    least = {variant: f"{min(own) / min(plain):.3f}" for variant, own in seconds.items()}
    return [
        [
            *(_network(name, arguments), f"`{MODELS[name].layer}`", variant, *about),
            *(spread(own, 3), least[variant], _target(variant, bare), _end(overhead.ends[variant], variant)),
            *(f"{memory['without']:.0f}", f"{memory[variant]:.0f}" if variant in memory else "-"),
        ]
        for variant, own in found.items()
    ]


def _end(seconds: list[float], variant: str) -> str:
    return "-" if variant == "bare" else f"{statistics.median(seconds):.2f}"


def _network(name: str, arguments: argparse.Namespace) -> str:
    return MODELS[name].name + (", compiled" if arguments.compile else "")


def _target(variant: str, bare: float | None) -> str:
    if variant not in TARGETS or bare is None:
        return "-"
    return f"{max(TARGETS[variant], bare + ABOVE_BARE):.2f}"


def peak_memory(name: str, variant: str, arguments: argparse.Namespace) -> float:
    """Largest memory of a short validation epoch in a fresh process, in MiB."""
    same = ("batch_size", "classes", "image_size", "images_per_class")
    own = [f"--{key.replace('_', '-')}={getattr(arguments, key)}" for key in same]
    own += [f"--models={name}", f"--memory-of={variant}"]
    command = [sys.executable, __file__, *own, *["--compile"] * arguments.compile]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def report_memory(arguments: argparse.Namespace) -> None:
    """Run one epoch and print this process's largest memory."""
    Overhead(MODELS[arguments.models[0]], arguments, N_IMAGE_BATCHES, in_small=False).validate(arguments.memory_of)
    print(peak_resident())


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=DEFAULT_MODELS)
    parser.add_argument("--variants", nargs="+", choices=["bare", *VARIANTS], default=["bare", "paper", "optimized"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count, after one that does not")
    parser.add_argument("--batches", type=float, default=1, help="how long epochs are, relative to the usual length")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--images-per-class", type=int, default=50)
    parser.add_argument("--data-set-classes", type=int, default=1000, help="of the data set that is shown in small")
    parser.add_argument("--calibration-samples", type=int, default=32, help="0: nothing is split")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: of this process, for busy machines and --threads 1"
    )
    parser.add_argument("--compile", action="store_true", help="compile the network with torch.compile")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--memory-of", default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    arguments = parse_arguments()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if sys.platform == "linux":
        keep_freed_memory()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.memory_of is not None:
        report_memory(arguments)
        return
    print(table(HEADER, []))
    for name in arguments.models:  # a table that is broken off holds the networks so far
        print("\n".join(map(table_line, measure(name, arguments))), flush=True)


if __name__ == "__main__":
    main()
