"""What a split layer costs: a network with split channels against the original, and the layer alone.

Channels of ResNet-50's `layer4.2.conv3` are split at random into two concepts and a residual each. Original and split
networks take turns, batch by batch; the ratio of their times is reported, median and range over the rounds. The layer
alone is also compared with a dense merge, a 1 x 1 convolution that adds all channels up.

Example:
    python benchmarks/split_layers.py
    python benchmarks/split_layers.py --device cuda --batch-size 64 --eager
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torchvision
from measuring import in_turns, ratios, spread, table, wait_for
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck

from lightning_polydis import ChannelSplit, SplitPlan, disentangle

LAYER = "layer4.2.conv3"
COUNTS = [1, 16, 64, 256]
TARGET_COUNT = 64
"""Compiling and exporting take their time, so that is done for the number that the target names."""
NUM_CLASSES = 1000
STEPS_AT_ONCE = 20
"""Passes through the layer alone that are timed together."""


def resnet(quick: bool) -> nn.Module:
    """ResNet-50, or one with the same last stage and little before it."""
    depths = [1, 1, 1, 3] if quick else [3, 4, 6, 3]
    return torchvision.models.ResNet(Bottleneck, depths, num_classes=NUM_CLASSES)


def random_plan(layer: nn.Conv2d, count: int) -> SplitPlan:
    """Split some channels into two concepts at random, a third of the sources belonging to both."""
    draw = torch.Generator().manual_seed(0)
    splits = []
    for channel in torch.randperm(layer.out_channels, generator=draw)[:count].tolist():
        owner = torch.randint(3, (layer.in_channels,), generator=draw)
        membership = torch.stack([owner != 1, owner != 0]).float()
        splits.append(ChannelSplit(LAYER, channel, [[0], [1]], membership))
    return SplitPlan(splits)


def dense_merge(split: nn.Module) -> nn.Sequential:
    """The same split layer with a dense 1 x 1 convolution in the place of `merge`."""
    expand = copy.deepcopy(split.expand)
    n_rows, n_channels = expand.out_channels, split.n_channels
    merge = nn.Conv2d(n_rows, n_channels, 1, bias=False)
    with torch.no_grad():
        merge.weight.copy_(split.merge(torch.eye(n_rows)[..., None, None]).movedim(0, 1))
    return nn.Sequential(expand, merge)


def networks(original: nn.Module, counts: list[int]) -> dict[str, nn.Module]:
    """The original and split networks, each with weights of its own."""
    layer = original.get_submodule(LAYER)
    return {"original": original} | {str(count): disentangle(original, random_plan(layer, count)) for count in counts}


def inference(network: nn.Module, images: Tensor, steps: int = 1) -> Callable[[], float]:
    """Seconds of forward passes."""

    @torch.no_grad()
    def run() -> float:
        started = time.perf_counter()
        for _ in range(steps):
            network(images)
        wait_for(images.device.type)
        return time.perf_counter() - started

    return run


def training(
    network: nn.Module, images: Tensor, loss: Callable[[Tensor], Tensor], steps: int = 1
) -> Callable[[], float]:
    """Seconds of training steps."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)

    def run() -> float:
        started = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            loss(network(images)).backward()
            optimizer.step()
        wait_for(images.device.type)
        return time.perf_counter() - started

    return run


def exported(network: nn.Module, images: Tensor, folder: Path) -> Callable[[], float]:
    """Seconds of an inference of the network in ONNX's form, by onnxruntime."""
    import onnxruntime

    program = torch.onnx.export(network, (images,), dynamo=True, verbose=False)
    program.save(folder / "network.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or it would disturb the other one's turn
    session = onnxruntime.InferenceSession(folder / "network.onnx", options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}

    def run() -> float:
        started = time.perf_counter()
        session.run(None, feed)
        return time.perf_counter() - started

    return run


def compared(what: str, variants: Mapping[str, Callable[[], float]], arguments: argparse.Namespace) -> list[str]:
    """A row of the table."""
    seconds = in_turns(variants, arguments.repeats)
    plain = seconds.pop("original")
    found = {name: spread(ratios(own, plain)) for name, own in seconds.items()}
    return [what, f"{1000 * statistics.median(plain):.1f}", *(found.get(str(count), "-") for count in arguments.counts)]


def whole_network(arguments: argparse.Namespace) -> str:
    """The table of whole networks."""
    torch.manual_seed(0)
    original = resnet(arguments.quick).eval().to(arguments.device)
    images = torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size, device=arguments.device)
    loss = image_loss(arguments)
    split = networks(original, arguments.counts)
    rows = [compared("inference", {name: inference(own, images) for name, own in split.items()}, arguments)]
    if not (arguments.quick or arguments.eager):  # before training changes weights and modes
        two = {name: split[name] for name in ("original", str(TARGET_COUNT))}
        if arguments.device == "cpu":
            rows.append(compared_exported(two, images, arguments))
        rows += compared_compiled(two, images, loss, arguments)
    steps = {name: training(own.train(), images, loss) for name, own in split.items()}
    rows.insert(1, compared("training step", steps, arguments))
    return table(["ResNet-50", "ms, original", *(f"{count} split" for count in arguments.counts)], rows)


def compared_exported(split: dict[str, nn.Module], images: Tensor, arguments: argparse.Namespace) -> list[str]:
    """The row of networks in ONNX's form."""
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, own in split.items():
            place = Path(folder, name)
            place.mkdir()
            runs[name] = exported(own, images, place)
        return compared("inference, ONNX (onnxruntime)", runs, arguments)


def compared_compiled(
    split: dict[str, nn.Module], images: Tensor, loss: Callable[[Tensor], Tensor], arguments: argparse.Namespace
) -> list[list[str]]:
    """The rows of compiled networks."""
    compiled = {name: torch.compile(own) for name, own in split.items()}
    runs = {name: inference(own, images) for name, own in compiled.items()}
    first = compared("inference, compiled", runs, arguments)
    steps = {name: training(own.train(), images, loss) for name, own in compiled.items()}
    return [first, compared("training step, compiled", steps, arguments)]


def image_loss(arguments: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    """Cross-entropy with random targets."""
    targets = torch.randint(NUM_CLASSES, (arguments.batch_size,), device=arguments.device)
    return lambda logits: F.cross_entropy(logits, targets)


def layer_alone(arguments: argparse.Namespace) -> str:
    """The table of the layer by itself."""
    torch.manual_seed(0)
    layer = resnet(arguments.quick).get_submodule(LAYER).to(arguments.device)
    size = arguments.image_size // 32
    inputs = torch.randn(arguments.batch_size, layer.in_channels, size, size, device=arguments.device)
    holder = nn.ModuleDict({"layer4": nn.ModuleDict({"2": nn.ModuleDict({"conv3": layer})})})
    plans = {str(count): random_plan(layer, count) for count in arguments.counts}
    split = {name: disentangle(holder, plan).get_submodule(LAYER) for name, plan in plans.items()}
    dense = {name: dense_merge(own.cpu()).to(arguments.device) for name, own in copy.deepcopy(split).items()}
    rows, steps = [], 1 if arguments.quick else STEPS_AT_ONCE
    for kind, own in (("split layer", split), ("dense merge", dense)):
        everything = {"original": layer, **own}
        runs = {name: inference(part, inputs, steps) for name, part in everything.items()}
        rows.append(compared(f"{kind}, inference", runs, arguments))
        runs = {name: training(part, inputs, Tensor.sum, steps) for name, part in everything.items()}
        rows.append(compared(f"{kind}, training step", runs, arguments))
    return table([f"layer alone ({steps} passes)", "ms, original", *(f"{n} split" for n in arguments.counts)], rows)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=11, help="rounds that count, after one that does not")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--eager", action="store_true", help="nothing compiled or exported")
    parser.add_argument("--quick", action="store_true", help="small, and nothing compiled or exported")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.batch_size, arguments.image_size = 1, 2, 32
    arguments.counts = [TARGET_COUNT] if arguments.quick else COUNTS
    return arguments


def main() -> None:
    """Run the benchmark."""
    arguments = parse_arguments()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    print(layer_alone(arguments), flush=True)
    print()
    print(whole_network(arguments), flush=True)


if __name__ == "__main__":
    main()
