"""The paper's experiment: polysemantic channels of torchvision's ResNet-50 on ImageNet (arXiv:2504.12939).

Takes ImageNet as folders, one for each class, as ``torchvision.datasets.ImageFolder`` reads them::

    <data>/train/n01440764/*.JPEG ...
    <data>/val/n01440764/*.JPEG ...

    python examples/imagenet_resnet50.py <data> --device cuda --workers 16

Four stages, each of which leaves its results in the output folder:

1. *find*: one pass over the training images finds the polysemantic channels of ``layer4.2.conv3`` (``report.json``,
   and ``report.html`` to be looked at);
2. *plan*: the training images of their classes choose how twenty pairs of classes are split (``split_plan.json``);
3. *judge*: the validation images, which took no part in any choice, tell what each part keeps (``quality.json``);
4. *draw*: a picture of each pair, with the densities of the activations before and after the split (``pairs/``).

The tables of the console are in ``tables.txt``. The same command continues a run that was killed: stages that have
ended are not done again, and *find* goes on where it was last saved, ten minutes back at most. The others take minutes
and begin anew. ``stages.json`` holds what each stage was given. If that has changed, *plan*, *judge* and *draw* are
done again; *find* is too dear for that, and the program stops instead.

``--limit 50`` takes 50 images of each class instead of all 1300. ``--method optimized`` goes by the package's own
method; splits are then chosen among the first 32 training images of every class. More is in ``docs/imagenet.md``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from imagenet_tables import kept_table, pairs_table
from long_run import Stages, Watch, digest_of_files, digest_of_weights, write_whole
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.models import ResNet50_Weights, resnet50

from lightning_polydis import (
    ChannelSplit,
    PolysemanticityReport,
    SplitPlan,
    SplitQuality,
    __version__,
    evaluate_splits,
    find_polysemantic_channels,
)

# A pass that can be taken up again needs the analysis step by step. These names are no public ones.
from lightning_polydis.analyses import analysis_for
from lightning_polydis.figures import split_figure
from lightning_polydis.settings import AnalysisSettings
from lightning_polydis.thumbnails import thumbnails

LAYER = "layer4.2.conv3"
PAPER_PAIRS = (
    "522,62,687 1404,385,834 895,631,946 242,515,619 522,61,687 1660,530,938 242,515,846 242,619,808 895,467,946 "
    "242,808,846 1349,27,889 1832,852,984 1773,791,958 1349,27,486 1698,57,515 1698,57,808 1698,58,515 1698,58,808 "
    "1698,53,515 1698,53,808"
)
"""The twenty (channel, class, class) that the paper splits."""

SETTINGS = ("method", "relevance_threshold", "class_fraction", "similarity_threshold", "calibration_memory")
"""Options that are the package's settings."""

OPTIMIZED_SAMPLES = 32
"""Training images of every class among which splits are chosen with ``--method optimized``."""

RESULTS = {
    "find": ["report.json", "report.html"],
    "plan": ["split_plan.json"],
    "judge": ["quality.json"],
    "draw": ["pairs/*.png", "tables.txt"],
}
"""The stages, and the files that each leaves in the output folder."""

SAVE_SECONDS = 600
"""How often the first stage is saved."""

THUMBNAIL = 112


def main(argv: Sequence[str] | None = None) -> None:
    """Find, plan, judge, draw."""
    arguments = parse(argv)
    if find_spec("matplotlib") is None:  # now rather than after the long pass
        raise SystemExit("The pictures need matplotlib: pip install 'lightning-polydis[examples]'.")
    weights = None if arguments.weights == "none" else ResNet50_Weights[arguments.weights]
    torch.manual_seed(0)  # random weights are the same each time, or no run with them could be continued
    model = resnet50(weights=weights) if weights else resnet50(num_classes=arguments.num_classes)
    train = image_folder(arguments.data / "train", model, weights)
    val = image_folder(arguments.data / "val", model, weights)
    if train.classes != val.classes:
        raise SystemExit(f"`{train.root}` and `{val.root}` do not hold the same classes.")
    check_pairs(arguments.pairs, model)
    names = train.classes if weights is None else weights.meta["categories"]
    Experiment(arguments, model.eval().to(arguments.device), train, val, names).run()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Find polysemantic channels of ResNet-50 on ImageNet, split pairs of classes, judge the splits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("data", type=Path, help="folder that holds train/ and val/")
    add("--output", type=Path, default=Path("imagenet_resnet50"), help="where the results go")
    add("--weights", choices=[*(weights.name for weights in ResNet50_Weights), "none"], default="IMAGENET1K_V1")
    add("--num-classes", type=positive, default=1000, help="classes of the network, for --weights none")
    add("--pairs", type=pair, nargs="+", default=PAPER_PAIRS.split(), metavar="CHANNEL,CLASS,CLASS")
    add("--method", choices=["paper", "optimized"], default="paper")
    add("--limit", type=positive, default=None, help="images of each class at most")
    add("--batch-size", type=positive, default=128)
    add("--workers", type=int, default=4, help="processes that load images")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--relevance-threshold", type=float, default=0.03)
    add("--class-fraction", type=float, default=0.75)
    add("--similarity-threshold", type=float, default=None, help="None: 0.5 (paper), or calibrated (optimized)")
    add("--calibration-memory", type=float, default=4096, help="MiB; relevance vectors (optimized) take a quarter")
    arguments = parser.parse_args(argv)
    # argparse converts a default only if it is a string, not a list of them.
    arguments.pairs = [pair(given) if isinstance(given, str) else given for given in arguments.pairs]
    given = {name: getattr(arguments, name) for name in SETTINGS}
    try:
        arguments.settings = AnalysisSettings(layers=LAYER, calibration_samples=0, **given)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def positive(text: str) -> int:
    """A number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, but got {text!r}")
    return int(text)


def pair(text: str) -> tuple[int, int, int]:
    """``"522,62,687"`` -> channel 522, classes 62 and 687."""
    try:
        channel, class_a, class_b = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected CHANNEL,CLASS,CLASS, but got {text!r}") from None
    return channel, class_a, class_b


def check_pairs(pairs: Sequence[tuple[int, int, int]], model: nn.Module) -> None:
    """Stop now rather than after the long pass over the training set."""
    n_channels, n_classes = model.get_submodule(LAYER).out_channels, model.fc.out_features
    for channel, class_a, class_b in pairs:
        if not (0 <= channel < n_channels and 0 <= min(class_a, class_b) < max(class_a, class_b) < n_classes):
            raise SystemExit(
                f"Expected a channel below {n_channels} and two different classes below {n_classes}, "
                f"but got the pair {channel},{class_a},{class_b}."
            )


def image_folder(root: Path, model: nn.Module, weights: ResNet50_Weights | None) -> ImageFolder:
    """The images below ``root``, made ready as the weights expect them."""
    if not root.is_dir():
        raise SystemExit(
            f"There is no folder `{root}`. Expected <data>/train and <data>/val with a folder for each class."
        )
    dataset = ImageFolder(root, (weights or ResNet50_Weights.DEFAULT).transforms())
    # A folder's rank is taken for the network's class index, so a missing one would shift all that follow.
    if len(dataset.classes) != model.fc.out_features:
        raise SystemExit(
            f"`{root}` holds {len(dataset.classes)} classes, but the network has {model.fc.out_features} logits. "
            "The n-th folder has to be the network's n-th class; a part of ImageNet will not do."
        )
    return dataset


class Experiment:
    """The four stages. What a stage needs of those before it, it reads from the output folder.

    Args:
        arguments: The command line.
        model: In evaluation mode, on its device.
        train: Training images.
        val: Validation images.
        names: Names of the classes.
    """

    def __init__(
        self, arguments: argparse.Namespace, model: nn.Module, train: ImageFolder, val: ImageFolder, names: list[str]
    ) -> None:
        self.arguments, self.model, self.train, self.val, self.names = arguments, model, train, val, names
        self.settings: AnalysisSettings = replace(arguments.settings, class_names=names)
        self.output: Path = arguments.output
        self.console = Console()
        paired = {label for _, *classes in arguments.pairs for label in classes}
        limit = arguments.limit
        of_all = first_of_each_class(train, min(limit or OPTIMIZED_SAMPLES, OPTIMIZED_SAMPLES))
        self.images = {
            "find": first_of_each_class(train, limit),
            "plan": first_of_each_class(train, limit, paired) if arguments.method == "paper" else of_all,
            "judge": first_of_each_class(val, limit),
            "draw": first_of_each_class(val, limit, paired),
        }
        self.stages = Stages(self.output, self.given(), RESULTS)
        self.watch = Watch(self.console)

    def given(self) -> dict[str, dict[str, Any]]:
        """What each stage is given, that of those before it included: the same again gives the same results."""
        own = {name: getattr(self.arguments, name) for name in ("weights", "limit", "calibration_memory")}
        find = {
            **self.settings.to_json(),
            **own,
            "network": digest_of_weights(self.model),
            "training_images": digest_of_files(self.train),
            "lightning_polydis": __version__,
        }
        plan = {**find, "pairs": [list(chosen) for chosen in self.arguments.pairs]}
        judge = {**plan, "validation_images": digest_of_files(self.val)}
        return {"find": find, "plan": plan, "judge": judge, "draw": judge}

    def run(self) -> None:
        """Do the stages that are left, and show the results of all."""
        self.refuse_other_results()
        left = self.stages.left()
        for name in RESULTS:
            if name not in left:
                self.console.print(f"{name}: done before")
                continue
            self.stages.begin(name)
            getattr(self, name)()
            self.stages.end(name)
        self.console.print(*self.tables(), sep="\n")
        self.console.print(f"The results are in {escape(str(self.output))}.", soft_wrap=True)

    def refuse_other_results(self) -> None:
        """Nobody loses a long pass by a slip of the pen, and nobody gets another one's."""
        if not self.stages.has_begun("find"):
            self.checkpoint.unlink(missing_ok=True)
        changes = self.stages.changes("find")
        if changes and (self.stages.has_ended("find") or self.checkpoint.exists()):
            raise SystemExit(
                f"`{self.output}` holds the results of another run: {'; '.join(changes)}. "
                "Give this one a folder of its own with --output, or delete that folder."
            )

    @property
    def checkpoint(self) -> Path:
        """Where the first stage is saved on its way."""
        return self.output / "find.checkpoint"

    def find(self) -> None:
        """The polysemantic channels, in one pass that can be continued."""
        n_done, model, analysis = 0, self.model, analysis_for(self.model, self.settings)
        if self.checkpoint.exists():
            # Pickled by this program, hence not only weights. The analysis knows the network that it was saved with.
            saved = torch.load(self.checkpoint, map_location=self.arguments.device, weights_only=False)
            n_done, model, analysis = saved
            self.console.print(f"find: continued after {n_done:,} images")
        last = time.monotonic()
        with torch.no_grad():
            for batch in self.batches("find", self.train, n_done):
                analysis.start_batch(batch)
                model(batch[0])
                analysis.finish_batch()
                n_done += len(batch[1])
                if time.monotonic() - last >= SAVE_SECONDS:
                    state = (n_done, model, analysis)
                    write_whole(self.checkpoint, lambda path, state=state: torch.save(state, path))
                    last = time.monotonic()
        report = analysis.compute()
        report.to_html(self.output / "report.html")
        report.save(self.output / "report.json")
        self.checkpoint.unlink(missing_ok=True)

    def plan(self) -> None:
        """How the pairs are split, chosen by all images of this stage."""
        report = find_polysemantic_channels(
            self.model,
            self.batches("plan", self.train),
            progress=False,
            **{**vars(self.settings), "calibration_samples": None},
        )
        report.plan_pairs([(LAYER, *chosen) for chosen in self.arguments.pairs]).save(self.output / "split_plan.json")

    def judge(self) -> None:
        """What each part of the splits keeps, on images that took no part in any choice."""
        qualities = evaluate_splits(
            self.model,
            SplitPlan.load(self.output / "split_plan.json"),
            self.batches("judge", self.val),
            progress=False,
            relevance_threshold=self.settings.relevance_threshold,
        )
        text = json.dumps([quality.to_json() for quality in qualities], indent=1)
        write_whole(self.output / "quality.json", lambda path: path.write_text(text, encoding="utf-8"))

    def draw(self) -> None:
        """One picture for each pair: the images that activate each part most, and the densities of the activations."""
        plan, layer = SplitPlan.load(self.output / "split_plan.json"), self.model.get_submodule(LAYER)
        preset, inputs, seen = self.val.transform, [], []
        handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        try:
            with torch.no_grad():
                for images, targets in self.batches("draw", self.val):
                    self.model(images)
                    activations = activations_of(layer, plan, inputs.pop())
                    pictures = thumbnails(images, THUMBNAIL, (preset.mean, preset.std))
                    seen.append((pictures, targets.cpu(), activations.cpu()))
        finally:
            handle.remove()
        images, targets, activations = (torch.cat(parts) for parts in zip(*seen, strict=True))
        (self.output / "pairs").mkdir(exist_ok=True)
        for place, split in enumerate(plan):
            self.draw_pair(split, images, targets, activations[:, place])
        with (self.output / "tables.txt").open("w", encoding="utf-8") as file:
            Console(file=file, width=110).print(*self.tables(), sep="\n")

    def draw_pair(self, split: ChannelSplit, images: Tensor, targets: Tensor, activations: Tensor) -> None:
        """The picture of one pair, of the images of its two classes (``activations``: see `activations_of`)."""
        (class_a,), (class_b,) = split.concepts
        own = (targets == class_a) | (targets == class_b)
        images, targets, activations = images[own], targets[own], activations[own]
        # The channel before the split, in the direction in which the image's own class uses it.
        original = torch.where(targets == class_a, activations[:, 0, 0], activations[:, 0, 1])
        title = f"{LAYER}, channel {split.channel}: {self.names[class_a]} and {self.names[class_b]}"
        figure = split_figure(
            images, targets, original, activations[:, 1], split.concepts, title=title, class_names=self.names
        )
        name = f"{split.channel}_{class_a}_{class_b}.png"
        write_whole(self.output / "pairs" / name, lambda path: figure.savefig(path, dpi=130, format="png"))

    def tables(self) -> list[Table]:
        """What was found, what each part of each pair keeps, and that over all pairs."""
        report = PolysemanticityReport.load(self.output / "report.json")
        plan = SplitPlan.load(self.output / "split_plan.json")
        content = json.loads((self.output / "quality.json").read_text(encoding="utf-8"))
        qualities = [SplitQuality.from_json(entry) for entry in content]
        return [report.to_table(), pairs_table(report, plan, qualities, self.names), kept_table(qualities)]

    def batches(self, stage: str, dataset: ImageFolder, n_done: int = 0) -> Iterator[list[Tensor]]:
        """Those of a stage that are left, in the order of the files, on the device."""
        images, device, n_workers = self.images[stage], self.arguments.device, self.arguments.workers
        data, pinned = Subset(dataset, images[n_done:]), device.startswith("cuda")
        loader = DataLoader(data, self.arguments.batch_size, num_workers=n_workers, pin_memory=pinned)
        n_later = sum(len(self.images[name]) for name in self.stages.left() if name != stage)
        watched = self.watch.through(loader, stage, len(images), n_done=n_done, n_later=n_later, n_workers=n_workers)
        for batch in watched:
            yield [part.to(device, non_blocking=True) for part in batch]


def first_of_each_class(dataset: ImageFolder, limit: int | None, classes: AbstractSet[int] | None = None) -> list[int]:
    """Places of at most ``limit`` images of each class, or of some classes; in order, so class by class."""
    seen = [0] * len(dataset.classes)
    kept = []
    for index, target in enumerate(dataset.targets):
        seen[target] += 1
        if (limit is None or seen[target] <= limit) and (classes is None or target in classes):
            kept.append(index)
    return kept


def activations_of(layer: nn.Conv2d, plan: SplitPlan, inputs: Tensor) -> Tensor:
    """How strongly images activate each channel of the plan before the split, and each of its two concepts.

    Returns:
        Position sums of the positive part, ``[B, splits, 2, 2]``: before the split and the concepts themselves; each in
        the direction of the first and of the second concept.
    """
    membership = torch.stack([split.membership for split in plan]).to(inputs)
    shares = torch.stack([torch.ones_like(membership), membership], dim=1)[..., None, None]
    channels = layer.weight[[split.channel for split in plan]]
    weight = shares * channels[:, None, None]  # [splits, 2, 2, inputs, 1, 1], as the layer is 1 x 1, without bias
    outputs = F.conv2d(inputs, weight.flatten(0, 2)).unflatten(1, weight.shape[:3])
    signs = torch.tensor([split.signs() for split in plan], device=inputs.device)[:, None, :, None, None]
    return (signs * outputs).clamp(min=0).sum((-2, -1))


if __name__ == "__main__":
    main()
