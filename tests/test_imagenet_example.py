"""The programs for ImageNet in examples/ do what they say."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.models.resnet import Bottleneck, ResNet, resnet50
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.functional import to_pil_image

from lightning_polydis import ChannelSplit, ConceptQuality, PolysemanticityReport, SplitPlan, SplitQuality
from lightning_polydis.figures import split_figure
from tests import reference
from tests.examples import load_example

CLASSES = ("ant", "bee", "cat")
PAIRS = ("1934,0,2", "1725,2,1")
FOUND = {"relevance_threshold": 2e-3, "class_fraction": 0.5, "similarity_threshold": 0.95}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three classes, told by colour and stripes: four images each for training, three for validation."""
    root = tmp_path_factory.mktemp("imagenet")
    generator = torch.Generator().manual_seed(0)
    for part, n_images in (("train", 4), ("val", 3)):
        for number, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for index in range(n_images):
                image = 60 * torch.rand(3, 32, 32, generator=generator)
                image[number] += 150
                image[:, :: number + 2] += 40
                to_pil_image(image.to(torch.uint8)).save(root / part / name / f"{index}.png")
    return root


class KilledError(Exception):
    pass


class Drawing:
    """What a picture is to show, instead of the picture."""

    def __init__(self, images, targets, original, parts, concepts, *, title, class_names):
        self.shown = {"images": images, "targets": targets, "original": original, "parts": parts}
        self.shown |= {"concepts": concepts, "title": title, "class_names": class_names}

    def savefig(self, path, **settings):
        torch.save(self.shown, path)


class ImageNetExample:
    """The program with a network of few inputs and small images; it can be killed after some images.

    Its page and its pictures are stubs, as to draw them takes longer than all the rest; one test has the real ones.
    """

    def __init__(self, data):
        self.data = data
        self.program = load_example("imagenet_resnet50")
        self.program.resnet50 = lambda num_classes: ResNet(Bottleneck, [1, 1, 1, 3], num_classes, width_per_group=8)
        self.program.ImageFolder = self._folder
        self.program.SAVE_SECONDS = 0
        self.program.split_figure = Drawing
        self.served = []
        self.limit = None

    @staticmethod
    def write_page(report, path):
        path.write_text(f"a page of {report.n_images} images", encoding="utf-8")

    def _folder(self, root, transform):
        def load(path):
            if len(self.served) == self.limit:
                raise KilledError
            self.served.append(str(Path(path).relative_to(self.data).with_suffix("")))
            return default_loader(path)

        return ImageFolder(root, ImageClassification(crop_size=32, resize_size=32), loader=load)

    def run(self, output, *arguments, kill_after=None):
        """The images that were looked at."""
        self.served, self.limit = [], kill_after
        small = ["--weights", "none", "--num-classes", "3", "--workers", "0", "--batch-size", "5", "--device", "cpu"]
        settings = [part for name, value in FOUND.items() for part in (f"--{name.replace('_', '-')}", value)]
        command = [self.data, *small, "--pairs", *PAIRS, *settings, "--output", output, *arguments]
        with patch.object(PolysemanticityReport, "to_html", self.write_page):
            self.program.main([str(part) for part in command])
        return self.served


def results(folder):
    """All files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


@pytest.fixture
def imagenet(folders):
    return ImageNetExample(folders)


@pytest.fixture(scope="module")
def imagenet_runs(folders, tmp_path_factory):
    """Uninterrupted runs by both methods."""
    outputs = {method: tmp_path_factory.mktemp(method) for method in ("paper", "optimized")}
    for method, output in outputs.items():
        ImageNetExample(folders).run(output, "--method", method)
    return outputs


@pytest.fixture(scope="module")
def seen_by_hand(folders):
    """Of both parts of the data: targets, inputs of the layer and relevances, image by image in ``float64``."""
    torch.manual_seed(0)
    net = ResNet(Bottleneck, [1, 1, 1, 3], 3, width_per_group=8).double().eval()
    seen = {"layer": net.layer4[2].conv3}
    for part in ("train", "val"):
        data = ImageFolder(folders / part, ImageClassification(crop_size=32, resize_size=32))
        images = [reference.captured(net, "layer4.2.conv3", image) for image, _ in data]
        relevances = []
        for (_, z, logits), target in zip(images, data.targets, strict=True):
            logits[0, target].backward()
            relevances.append((z * z.grad).sum((0, 2, 3)).detach())
        seen[part] = torch.tensor(data.targets), torch.cat([x for x, _, _ in images]), torch.stack(relevances)
    return seen


def test_imagenet_leaves_the_results_of_all_stages(imagenet_runs):
    documents = {"report.json", "report.html", "split_plan.json", "quality.json", "stages.json"}
    tables_and_pictures = {"tables.txt", "pairs/1934_0_2.png", "pairs/1725_2_1.png"}
    assert set(results(imagenet_runs["paper"])) == documents | tables_and_pictures


def test_imagenet_page_and_pictures(imagenet, tmp_path):
    imagenet.program.split_figure, imagenet.write_page = split_figure, PolysemanticityReport.to_html
    imagenet.run(tmp_path, "--pairs", PAIRS[0], "--limit", 2)
    assert "layer4.2.conv3" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "pairs" / "1934_0_2.png").read_bytes().startswith(b"\x89PNG")


def test_imagenet_finds_what_the_papers_rules_find(imagenet_runs, seen_by_hand):
    report = PolysemanticityReport.load(imagenet_runs["paper"] / "report.json")
    assert (report.n_images, report.class_names, report.settings["method"]) == (12, list(CLASSES), "paper")
    targets, inputs, relevances = seen_by_hand["train"]
    relevant = torch.tensor([reference.is_relevant(row, FOUND["relevance_threshold"]) for row in relevances])
    weight = seen_by_hand["layer"].weight[:, :, 0, 0].detach()
    vectors = torch.stack([weight * inputs[targets == label].sum((2, 3)).mean(0) for label in range(3)])
    expected = {}
    for a, b in ((0, 1), (0, 2), (1, 2)):
        both = [relevant[targets == label].double().mean(0) >= FOUND["class_fraction"] for label in (a, b)]
        cosine = F.cosine_similarity(vectors[a], vectors[b], dim=1)
        for channel in (both[0] & both[1] & (cosine < FOUND["similarity_threshold"])).nonzero()[:, 0].tolist():
            expected[channel, a, b] = float(cosine[channel])
    found = {(one.channel, one.class_a, one.class_b): one.cosine_similarity for one in report.pairs}
    assert len(found) > 100
    assert found == pytest.approx(expected, abs=1e-4)


def plain_parts(seen, part, split):
    """Weights of both concepts, and on each image the activation of channel, concepts and residual, ``[n, 4]``."""
    targets, inputs, _ = seen["train"]
    weight = seen["layer"].weight[split.channel, :, 0, 0].detach()
    vectors = [weight * inputs[targets == concept[0]].sum((2, 3)).mean(0) for concept in split.concepts]
    kinds = reference.two_concept_sources(*vectors, split.rho)
    rows = torch.stack([weight, *reference.two_concept_rows(weight, kinds)])
    outputs = torch.einsum("ri,bihw->brhw", rows, seen[part][1])
    return rows[1:3], outputs.clamp(min=0).sum((2, 3))


def test_imagenet_splits_by_all_training_images_of_the_classes(imagenet_runs, seen_by_hand):
    plan = SplitPlan.load(imagenet_runs["paper"] / "split_plan.json")
    assert [(split.channel, split.concepts) for split in plan] == [(1934, [[0], [2]]), (1725, [[2], [1]])]
    targets = seen_by_hand["train"][0]
    for split in plan:
        (a,), (b,) = split.concepts
        scores = []
        for step in range(1, 21):
            own, other = plain_parts(seen_by_hand, "train", replace(split, rho=step / 20))[1][:, 1:3].unbind(1)
            scores.append((own / (other + 1e-5))[targets == a].mean() + (other / (own + 1e-5))[targets == b].mean())
        assert split.rho == pytest.approx((scores.index(max(scores)) + 1) / 20)
        kept = seen_by_hand["layer"].weight[split.channel, :, 0, 0].detach() * split.membership
        torch.testing.assert_close(plain_parts(seen_by_hand, "train", split)[0], kept)


def test_imagenet_tells_what_each_part_keeps(imagenet_runs, seen_by_hand):
    qualities = json.loads((imagenet_runs["paper"] / "quality.json").read_text(encoding="utf-8"))
    targets, _, relevances = seen_by_hand["val"]
    is_relevant = torch.tensor([reference.is_relevant(row, FOUND["relevance_threshold"]) for row in relevances])
    for split, quality in zip(SplitPlan.load(imagenet_runs["paper"] / "split_plan.json"), qualities, strict=True):
        _, activations = plain_parts(seen_by_hand, "val", split)
        for concept in quality["concepts"]:
            shown = activations[(targets == concept["classes"][0]) & is_relevant[:, split.channel]].sum(0)
            assert concept["kept"] == pytest.approx((shown[1:] / shown[0]).tolist(), rel=1e-4, abs=1e-5)
            assert (concept["n_own"], concept["n_other"]) == (3, 3)


def test_imagenet_draws_the_activations_of_the_parts(imagenet_runs, seen_by_hand):
    for split in SplitPlan.load(imagenet_runs["paper"] / "split_plan.json"):
        (a,), (b,) = split.concepts
        drawn = torch.load(imagenet_runs["paper"] / "pairs" / f"{split.channel}_{a}_{b}.png")
        all_targets, (_, activations) = seen_by_hand["val"][0], plain_parts(seen_by_hand, "val", split)
        own = (all_targets == a) | (all_targets == b)
        assert drawn["title"] == f"layer4.2.conv3, channel {split.channel}: {CLASSES[a]} and {CLASSES[b]}"
        assert (drawn["concepts"], drawn["class_names"]) == ([[a], [b]], list(CLASSES))
        assert drawn["targets"].tolist() == all_targets[own].tolist()
        assert (drawn["images"].shape, drawn["images"].dtype) == ((6, 3, 32, 32), torch.uint8)
        torch.testing.assert_close(drawn["original"].double(), activations[own, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(drawn["parts"].double(), activations[own, 1:3], rtol=1e-4, atol=1e-5)


def test_imagenet_draws_each_class_in_its_direction(imagenet, tmp_path):
    """A class that uses the channel through negative values is drawn by those (``--method optimized``)."""
    layer = nn.Conv2d(2, 1, 1, bias=False)
    layer.weight.data[:] = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1)
    split = ChannelSplit("layer", 0, [[0], [1]], torch.tensor([[1.0, 0.5], [0.0, 0.5]]), directions=[1, -1])
    inputs = torch.tensor([[[3.0, 1.0]], [[1.0, 2.0]]]).view(1, 2, 1, 2)  # outputs 1 and -3
    activations = imagenet.program.activations_of(layer, SplitPlan([split]), inputs)
    assert activations.tolist() == [[[[1.0, 3.0], [2.0, 1.0 + 2.0]]]]
    (tmp_path / "pairs").mkdir()
    experiment = SimpleNamespace(names=["ant", "bee"], output=tmp_path)
    images, targets, activations = torch.zeros(2, 3, 1, 1), torch.tensor([1, 0]), activations[:, 0].expand(2, 2, 2)
    imagenet.program.Experiment.draw_pair(experiment, split, images, targets, activations)
    drawn = torch.load(tmp_path / "pairs" / "0_0_1.png")
    assert (drawn["original"].tolist(), drawn["parts"].tolist()) == ([3.0, 1.0], [[2.0, 3.0]] * 2)


@pytest.mark.parametrize(
    ("method", "kill_after", "n_left"),
    [
        ("paper", 3, 12 + 12 + 9 + 9),  # before anything was saved
        ("paper", 8, 7 + 12 + 9 + 9),  # in the first pass, five images after it was begun
        ("optimized", 11, 2 + 12 + 9 + 9),
        ("paper", 12 + 7, 12 + 9 + 9),  # in the second stage
        ("paper", 24 + 9 + 1, 9),  # in the last one
    ],
)
def test_imagenet_continues_a_killed_run(imagenet, imagenet_runs, tmp_path, method, kill_after, n_left):
    with pytest.raises(KilledError):
        imagenet.run(tmp_path, "--method", method, kill_after=kill_after)
    assert len(imagenet.run(tmp_path, "--method", method)) == n_left
    assert results(tmp_path) == results(imagenet_runs[method])


def test_imagenet_does_nothing_twice(imagenet, imagenet_runs, tmp_path, capsys):
    shutil.copytree(imagenet_runs["paper"], tmp_path, dirs_exist_ok=True)
    assert imagenet.run(tmp_path, "--batch-size", 3) == []
    printed = capsys.readouterr().out
    assert [f"{stage}: done before" in printed for stage in ("find", "plan", "judge", "draw")] == [True] * 4
    assert "2 pairs of classes, split, and judged" in printed


def test_imagenet_plans_other_pairs_without_the_long_pass(imagenet, imagenet_runs, tmp_path):
    shutil.copytree(imagenet_runs["paper"], tmp_path, dirs_exist_ok=True)
    served = imagenet.run(tmp_path, "--pairs", "1360,1,2")
    assert set(served[:8]) == {f"train/{name}/{index}" for name in ("bee", "cat") for index in range(4)}
    assert len(served) == 8 + 9 + 6
    assert [split.channel for split in SplitPlan.load(tmp_path / "split_plan.json")] == [1360]
    assert [path.name for path in (tmp_path / "pairs").iterdir()] == ["1360_1_2.png"]


def test_imagenet_leaves_no_old_results_beside_new_ones(imagenet, imagenet_runs, tmp_path):
    shutil.copytree(imagenet_runs["paper"], tmp_path, dirs_exist_ok=True)
    with pytest.raises(KilledError):
        imagenet.run(tmp_path, "--pairs", "1360,1,2", kill_after=4)
    assert set(results(tmp_path)) == {"report.json", "report.html", "stages.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "2"], "limit was None and is 2"),
        (["--relevance-threshold", "0.2"], "relevance_threshold was 0.002 and is 0.2"),
        (["--method", "optimized"], "method was 'paper' and is 'optimized'"),
    ],
)
def test_imagenet_keeps_a_long_pass_of_other_arguments(imagenet, imagenet_runs, tmp_path, arguments, message):
    shutil.copytree(imagenet_runs["paper"], tmp_path, dirs_exist_ok=True)
    with pytest.raises(SystemExit, match=f"holds the results of another run: {message}.*with --output"):
        imagenet.run(tmp_path, *arguments)
    assert results(tmp_path) == results(imagenet_runs["paper"])


def test_imagenet_keeps_a_long_pass_of_other_weights(imagenet, imagenet_runs, tmp_path):
    shutil.copytree(imagenet_runs["paper"], tmp_path, dirs_exist_ok=True)
    build = imagenet.program.resnet50
    imagenet.program.resnet50 = lambda num_classes: nudged(build(num_classes))
    with pytest.raises(SystemExit, match="network was '[0-9a-f]{12}' and is '[0-9a-f]{12}'"):
        imagenet.run(tmp_path)


def nudged(model):
    model.layer1[0].bn1.running_mean[3] += 1e-6  # one number of a buffer
    return model


def test_imagenet_keeps_a_begun_pass_of_other_arguments(imagenet, tmp_path):
    with pytest.raises(KilledError):
        imagenet.run(tmp_path, kill_after=8)
    with pytest.raises(SystemExit, match="limit was None and is 2"):
        imagenet.run(tmp_path, "--limit", "2")
    (tmp_path / "stages.json").unlink()  # now nobody knows what was begun
    with pytest.raises(KilledError):
        imagenet.run(tmp_path, kill_after=12)
    assert imagenet.served[0] == "train/ant/0"


def test_imagenet_judges_again_on_other_validation_images(folders, imagenet_runs, tmp_path):
    shutil.copytree(imagenet_runs["paper"], tmp_path / "out")
    shutil.copytree(folders, tmp_path / "data")
    (tmp_path / "data" / "val" / "ant" / "0.png").unlink()
    assert len(ImageNetExample(tmp_path / "data").run(tmp_path / "out")) == 8 + 8


def test_imagenet_limits_the_images_of_each_class(imagenet, tmp_path):
    served = imagenet.run(tmp_path, "--limit", 1, "--pairs", "1934,0,2")
    everything = [*(f"train/{name}/0" for name in CLASSES), "train/ant/0", "train/cat/0"]
    assert served == [*everything, *(f"val/{name}/0" for name in CLASSES), "val/ant/0", "val/cat/0"]


def test_imagenet_optimized_plans_by_the_first_images_of_every_class(imagenet, tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet.program, "OPTIMIZED_SAMPLES", 2)
    with pytest.raises(KilledError):
        imagenet.run(tmp_path, "--method", "optimized", kill_after=12 + 6)
    assert imagenet.served[12:] == [f"train/{name}/{index}" for name in CLASSES for index in range(2)]


def test_imagenet_tables(capsys):
    """Own, other and residual are those of the concept whose images are looked at."""
    tables = load_example("imagenet_tables")
    concept = ConceptQuality([4], 0.1, 0.2, 0.0, [0.9, 0.2, 0.1], 0.8, 0.5, n_own=5, n_other=5)
    quality = SplitQuality("layer4.2.conv3", 522, [concept, replace(concept, classes=[7], kept=[0.4, 0.7, 0.3])])
    third = SplitQuality("layer4.2.conv3", 1, [replace(concept, kept=[0.2, 0.1, 0]), replace(concept, kept=None)])
    assert tables.kept_by(quality, 0) == (0.9, 0.2, 0.1)
    assert tables.kept_by(quality, 1) == (0.7, 0.4, 0.3)
    Console().print(tables.kept_table([quality, third]))
    printed = capsys.readouterr().out
    assert re.search(r"median\W+0.700\W+0.200\W+0.100\W", printed)
    assert re.search(r"mean\W+0.600\W+0.233\W+0.133\W", printed)
    assert "over 3 of 4 concepts" in printed


def test_imagenet_table_of_pairs(imagenet_runs):
    """The numbers of the files, a row for each class."""
    printed = (imagenet_runs["paper"] / "tables.txt").read_text(encoding="utf-8")
    plan = SplitPlan.load(imagenet_runs["paper"] / "split_plan.json")
    content = json.loads((imagenet_runs["paper"] / "quality.json").read_text(encoding="utf-8"))
    report = PolysemanticityReport.load(imagenet_runs["paper"] / "report.json")
    cosine = next(p.cosine_similarity for p in report.pairs if (p.channel, p.class_a, p.class_b) == (1934, 0, 2))
    numbers = ["-" if value is None else f"{value:.2f}" for value in content[0]["concepts"][0]["kept"] or [None] * 3]
    row = ["1934", f"{cosine:.2f}", f"{plan.splits[0].rho:.2f}", "A: 0 ant", *numbers]
    assert re.search(r"\s+".join(map(re.escape, row)), printed)
    assert re.search(r"^ +B: 2 cat +\d", printed, re.M)


def test_imagenet_defaults_are_the_papers():
    arguments = load_example("imagenet_resnet50").parse(["data"])
    assert len(arguments.pairs) == 20
    assert arguments.pairs[0] == (522, 62, 687)
    assert arguments.pairs[-1] == (1698, 53, 808)
    assert (arguments.weights, arguments.method, arguments.limit) == ("IMAGENET1K_V1", "paper", None)
    with torch.device("meta"):
        layer = resnet50().get_submodule(load_example("imagenet_resnet50").LAYER)
    assert (layer.out_channels, layer.kernel_size, layer.bias) == (2048, (1, 1), None)  # as the pictures expect it
    settings = arguments.settings
    assert (settings.relevance_threshold, settings.class_fraction, settings.threshold) == (0.03, 0.75, 0.5)


@pytest.mark.parametrize(
    ("folder", "arguments", "message"),
    [
        (".", ["--num-classes", "4"], "holds 3 classes, but the network has 4 logits"),
        ("train", [], "There is no folder"),
    ],
)
def test_imagenet_refuses_folders_that_do_not_fit(folders, tmp_path, folder, arguments, message):
    with pytest.raises(SystemExit, match=message):
        ImageNetExample(folders / folder).run(tmp_path, *arguments)


def test_imagenet_refuses_different_classes(folders, tmp_path):
    (tmp_path / "train").symlink_to(folders / "train")
    shutil.copytree(folders / "val", tmp_path / "val")
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "dog")
    with pytest.raises(SystemExit, match="do not hold the same classes"):
        ImageNetExample(tmp_path).run(tmp_path / "out")


@pytest.mark.parametrize("pair", ["2048,0,1", "5,0,3", "5,1,1"])
def test_imagenet_refuses_pairs_before_the_long_pass(imagenet, tmp_path, pair):
    with pytest.raises(SystemExit, match=f"two different classes below 3, but got the pair {pair}"):
        imagenet.run(tmp_path, "--pairs", "5,0,1", pair)
    assert not list(tmp_path.iterdir())


def test_imagenet_needs_matplotlib_before_the_long_pass(imagenet, tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet.program, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"need matplotlib: pip install 'lightning-polydis\[examples\]'"):
        imagenet.run(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "5,1"], "expected CHANNEL,CLASS,CLASS, but got '5,1'"),
        (["--limit", "0"], "expected a whole number of at least 1, but got '0'"),
        (["--relevance-threshold", "3"], "Expected argument `relevance_threshold` to be a number in (0, 1], but got 3"),
    ],
)
def test_imagenet_refuses_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit):
        load_example("imagenet_resnet50").parse(["data", *arguments])
    assert message in capsys.readouterr().err
