"""Trained networks with their data, for the benchmarks that need more than one kind of network.

Whatever has to be trained is trained once, seeded, and kept in ``.bench_cache/`` in the repository's root, which may be
deleted at any time, and should be when a network or its training changes here. The digits come with scikit-learn;
photographs and pretrained weights come from a folder, the one that `tests/test_real.py` needs: see CONTRIBUTING.md.

Example:
    python benchmarks/networks.py --root path/to/real/data
"""

from __future__ import annotations

import argparse
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from small_world import LAYER as SMALL_LAYER
from small_world import NUM_CLASSES, ImageMaker, SmallResNet, accuracy, train
from small_world import block as bottleneck
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from torchvision.models import SqueezeNet, squeezenet1_1
from torchvision.models.convnext import CNBlock
from torchvision.transforms import v2

CACHE = Path(__file__).resolve().parent.parent / ".bench_cache"
BATCH_SIZE = 64
PHOTO_SIZE = 112
TRAIN_SIZE = 96
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Images = tuple[Tensor, Tensor]
"""Images and their targets."""


@dataclass(frozen=True)
class World:
    """A trained network and images to look at it with.

    Attributes:
        name: What to call it in a table.
        model: In evaluation mode.
        layers: Late convolutions or linear layers with at least 16 inputs per channel.
        choose: Batches ``(images, targets)`` to analyse and to choose splits with.
        judge: Batches of other images, that took no part in anything, training included.
        class_names: Names of the classes, one for each logit.
        accuracy: On ``judge``.
    """

    name: str
    model: nn.Module
    layers: list[str]
    choose: list[Images]
    judge: list[Images]
    class_names: list[str]
    accuracy: float


class DigitsCNN(nn.Module):
    """Four plain convolutions, the last of 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, 10]`` of images ``[B, 1, 16, 16]``."""
        return self.head(self.features(images).mean((2, 3)))


class DigitsConvNeXt(nn.Module):
    """Four ConvNeXt blocks: depthwise convolution, layer norm, two linear layers with GELU, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 2, stride=2)
        self.blocks = nn.Sequential(
            *(CNBlock(32, 1.0, 0.0), CNBlock(32, 1.0, 0.0)),
            nn.Conv2d(32, 64, 2, stride=2),
            *(CNBlock(64, 1.0, 0.0), CNBlock(64, 1.0, 0.0)),
        )
        self.head = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, 10]`` of images ``[B, 1, 16, 16]``."""
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def _photo_net(stem: nn.Module, blocks: nn.Module, n_features: int, n_classes: int) -> nn.Sequential:
    parts = {"stem": stem, "blocks": blocks, "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return nn.Sequential(OrderedDict(parts, head=nn.Linear(n_features, n_classes)))


def _resnet_blocks() -> nn.Module:
    """Four bottlenecks, the last of 128 inner and 512 outer channels."""
    return nn.Sequential(
        bottleneck(128, 64, stride=1),
        bottleneck(256, 64, stride=1),
        bottleneck(256, 128, stride=2),
        bottleneck(512, 128, stride=1),
    )


def _vgg_blocks() -> nn.Module:
    """Four plain convolutions, the last of 256 channels."""
    first, last = (*_conv_norm(128, 128), *_conv_norm(128, 128)), (*_conv_norm(128, 256), *_conv_norm(256, 256))
    return nn.Sequential(*first, nn.MaxPool2d(2), *last)


def _conv_norm(n_inputs: int, n_outputs: int) -> list[nn.Module]:
    conv = nn.Conv2d(n_inputs, n_outputs, 3, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(n_outputs), nn.ReLU(inplace=True)]


def digits_cnn() -> World:
    """A plain CNN; 700 digits train it, 550 choose, 547 judge."""
    return _digits_world("digits CNN", DigitsCNN, ["features.4", "features.6"])


def digits_convnext() -> World:
    """A small ConvNeXt, whose layers are the two linear ones of its last block; digits as for `digits_cnn`."""
    return _digits_world("digits ConvNeXt", DigitsConvNeXt, ["blocks.4.block.3", "blocks.4.block.5"])


def made_up_resnet() -> World:
    """A ResNet of bottleneck blocks with batch norm and 16 classes of made-up images, see `small_world`."""
    maker, name = ImageMaker(), "made-up ResNet"
    model = _trained(name, SmallResNet, lambda model: train(model, *maker.make(100, seed=1), epochs=6))
    choose, judge = (_shuffled(*maker.make(40, seed=seed)) for seed in (2, 3))
    return _world(name, model, [SMALL_LAYER], choose, judge, [str(label) for label in range(NUM_CLASSES)])


def _shuffled(images: Tensor, targets: Tensor) -> Images:
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    return images[order], targets[order]


def photo_resnet(root: Path) -> World:
    """A ResNet of bottleneck blocks with batch norm behind the first layers of SqueezeNet.

    The few photographs that train it also choose, without augmentation: on them it is surer than on others. Those that
    judge are new to it, but perhaps not to SqueezeNet, whose first layers it has taken over and whose answers to the
    training photographs have taught it.
    """
    return _photo_world("photo ResNet", ["blocks.3.conv3"], _resnet_blocks, 512, root)


def photo_vgg(root: Path) -> World:
    """Plain convolutions with batch norm behind the first layers of SqueezeNet; the rest as for `photo_resnet`."""
    return _photo_world("photo VGG", ["blocks.10"], _vgg_blocks, 256, root)


def squeezenet(root: Path) -> World:
    """SqueezeNet 1.1 with 1000 classes, pretrained on ImageNet, where it may have seen any of these photographs."""
    indices, names = _classes(root)
    class_names = [str(index) for index in range(1000)]
    for index, name in zip(indices.tolist(), names, strict=True):
        class_names[index] = name
    layers = ["features.12.expand1x1", "features.12.expand3x3"]
    pairs = (_photographs(root, part, 224) for part in ("train", "val"))
    parts = [(images, indices[targets]) for images, targets in pairs]
    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are loaded
        model = _pretrained(root)
    return _world("SqueezeNet 1.1", model, layers, *parts, class_names)


def worlds(root: Path | None) -> Iterator[World]:
    """All worlds that are possible, each made when its turn comes; without a root, none for photographs."""
    yield digits_cnn()
    yield digits_convnext()
    yield made_up_resnet()
    if root is not None:
        yield from (make(root) for make in (photo_resnet, photo_vgg, squeezenet))


def _world(
    name: str, model: nn.Module, layers: list[str], choose: Images, judge: Images, class_names: list[str]
) -> World:
    batches = [list(zip(*(part.split(BATCH_SIZE) for part in pair), strict=True)) for pair in (choose, judge)]
    return World(name, model, layers, *batches, class_names, accuracy(model, *judge))


def _digits_world(name: str, make: Callable[[], nn.Module], layers: list[str]) -> World:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images, targets = F.interpolate(images, scale_factor=2, mode="bilinear"), torch.tensor(data.target)
    parts = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).split([700, 550, 547])
    learn, choose, judge = ((images[rows], targets[rows]) for rows in parts)
    model = _trained(name, make, lambda model: train(model, *learn, epochs=30))
    return _world(name, model, layers, choose, judge, [str(digit) for digit in range(10)])


def _photo_world(name: str, layers: list[str], blocks: Callable[[], nn.Module], n_features: int, root: Path) -> World:
    _, names = _classes(root)

    def make() -> nn.Sequential:
        return _photo_net(_pretrained(root).features[:6], blocks(), n_features, len(names))

    model = _trained(name, make, lambda model: _distil(model, root))
    choose, judge = (_photographs(root, part, PHOTO_SIZE) for part in ("train", "val"))
    return _world(name, model, layers, choose, judge, names)


def _trained(name: str, make: Callable[[], nn.Module], fit: Callable[[nn.Module], None]) -> nn.Module:
    """The network, with weights from the cache if they are there."""
    path = CACHE / f"{name.lower().replace(' ', '_')}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        if not path.exists():
            fit(model)
            CACHE.mkdir(exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")  # another benchmark may be running, and never reads half a file
            save_file(model.state_dict(), part)
            part.replace(path)
    model.load_state_dict(load_file(path))
    return model.eval()


def _distil(model: nn.Sequential, root: Path, epochs: int = 6) -> None:
    """Train on random crops of the photographs and on what SqueezeNet makes of each; the stem stays as it is.

    Forty photographs of a class alone teach a network little that holds for others.
    """
    model.to(memory_format=torch.channels_last)  # on a CPU about 1.6 times as fast
    stem, *rest = model
    train(nn.Sequential(_Lesson(stem), *rest), *_crops(root), epochs)
    model.to(memory_format=torch.contiguous_format)


class _Lesson(nn.Module):
    """What stored crops pass through before they come to the layers in training: a random part, mirrored or not."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.stem = stem

    @torch.no_grad()
    def forward(self, crops: Tensor) -> Tensor:
        """Features of the stem for crops ``[B, 3, H, W]``, ``uint8``."""
        top, left = torch.randint(PHOTO_SIZE - TRAIN_SIZE + 1, (2,)).tolist()
        part = crops[:, :, top : top + TRAIN_SIZE, left : left + TRAIN_SIZE]
        part = torch.where(torch.rand(len(part), 1, 1, 1) < 0.5, part, part.flip(3))
        return self.stem(_normalised(part).contiguous(memory_format=torch.channels_last))


@torch.no_grad()
def _crops(root: Path, n_crops: int = 8, temperature: float = 2.0) -> tuple[Tensor, Tensor]:
    """Random crops of each training photograph, ``uint8``, and SqueezeNet's opinion of them as probabilities."""
    crop = v2.Compose([v2.ToImage(), v2.RandomResizedCrop(160, scale=(0.25, 1.0)), v2.ColorJitter(0.3, 0.3, 0.3)])
    teacher = _pretrained(root).to(memory_format=torch.channels_last)
    indices, _ = _classes(root)
    images, opinions = [], []
    for photo, _ in ImageFolder(root / "photos" / "train"):
        crops = torch.stack([crop(photo) for _ in range(n_crops)])
        opinions.append((teacher(_normalised(crops))[:, indices] / temperature).softmax(1))
        images.append(F.interpolate(crops, PHOTO_SIZE, mode="bilinear", antialias=True))
    return torch.cat(images), torch.cat(opinions)


def _photographs(root: Path, part: str, size: int) -> Images:
    """All photographs of a part, without augmentation and in random order, and their classes, 0 to 19."""
    folder = ImageFolder(root / "photos" / part, v2.Compose([v2.ToImage(), v2.Resize((size, size))]))
    images = torch.stack([image for image, _ in folder])
    order = torch.randperm(len(folder), generator=torch.Generator().manual_seed(0))
    return _normalised(images[order]), torch.tensor(folder.targets)[order]


def _normalised(images: Tensor) -> Tensor:
    return (images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _pretrained(root: Path) -> SqueezeNet:
    net = squeezenet1_1()
    net.load_state_dict(load_file(root / "squeezenet1_1.safetensors"))
    return net.eval()


def _classes(root: Path) -> tuple[Tensor, list[str]]:
    """ImageNet's index and the name of each class of the photographs, in the order of their folders."""
    entries = json.loads((root / "classes.json").read_text())
    known = [entries[folder.name] for folder in sorted((root / "photos" / "train").iterdir())]
    return torch.tensor([entry["imagenet_index"] for entry in known]), [entry["name"] for entry in known]


def main(root: Path | None) -> None:
    """Make all worlds and say what they are."""
    for world in worlds(root):
        n_images = [sum(len(targets) for _, targets in part) for part in (world.choose, world.judge)]
        layers = ", ".join(world.layers)
        print(f"{world.name}: accuracy {world.accuracy:.3f}; {layers}; {n_images[0]} choose, {n_images[1]} judge")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the benchmarks' networks, or take them from .bench_cache/.")
    parser.add_argument("--root", type=Path, default=os.environ.get("POLYDIS_REAL_DATA"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="1 is best on a busy machine")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    main(parsed.root)
