"""Real weights, real photographs: a pretrained SqueezeNet, where the environment says where they lie."""

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.models import squeezenet1_1
from torchvision.transforms import v2
from zennit.composites import EpsilonPlus

from lightning_polydis import SplitPlan, disentangle, evaluate_splits, find_polysemantic_channels
from lightning_polydis.collection import RelevanceCollector
from lightning_polydis.heatmaps import concept_relevances
from lightning_polydis.lrp import with_split_rules
from lightning_polydis.surgery import split_checked

LAYERS = ["features.12.expand1x1", "features.12.expand3x3"]

pytestmark = pytest.mark.skipif(
    "POLYDIS_REAL_DATA" not in os.environ, reason="POLYDIS_REAL_DATA names no folder with weights and photographs"
)


@pytest.fixture(scope="module")
def root():
    return Path(os.environ["POLYDIS_REAL_DATA"])


@pytest.fixture(scope="module")
def net(root):
    net = squeezenet1_1()
    net.load_state_dict(load_file(root / "squeezenet1_1.safetensors"))
    return net.eval()


def photographs(root, part, per_class):
    """Batches of photographs with ImageNet's class indices."""
    classes = json.loads((root / "classes.json").read_text())
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    folder = ImageFolder(root / "photos" / part, transform)
    lookup = [classes[wnid]["imagenet_index"] for wnid in folder.classes]
    for label in range(len(folder.classes)):
        rows = [row for row, target in enumerate(folder.targets) if target == label][:per_class]
        yield torch.stack([folder[row][0] for row in rows]), torch.full((len(rows),), lookup[label])


@pytest.fixture(scope="module")
def report(net, root):
    return find_polysemantic_channels(
        net,
        photographs(root, "train", 12),
        LAYERS,
        method="paper",
        relevance_threshold=0.005,
        class_fraction=0.25,
        similarity_threshold=0.75,
        progress=False,
    )


def collected(net, images, targets):
    collector = RelevanceCollector(net, {name: net.get_submodule(name) for name in LAYERS})
    collector.start(targets)
    with torch.no_grad():
        net(images)
    return collector.finish()


def test_the_network_knows_the_photographs(net, root):
    batches = list(photographs(root, "val", 5))
    with torch.no_grad():
        right = [int((net(images).argmax(1) == targets).sum()) for images, targets in batches]
    assert sum(right) > 0.5 * sum(len(targets) for _, targets in batches)


def test_relevances_are_those_of_a_copy_without_in_place_relus(net, root):
    images, targets = next(iter(photographs(root, "val", 4)))
    found = collected(net, images, targets)
    plain = copy.deepcopy(net)
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    kept = {}
    for name in LAYERS:
        hook = lambda module, args, output, name=name: kept.update({name: output})  # noqa: E731
        plain.get_submodule(name).register_forward_hook(hook)
    logits = plain(images)
    gradients = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), [kept[name] for name in LAYERS])
    for name, gradient in zip(LAYERS, gradients, strict=True):
        expected = (kept[name] * gradient).sum((2, 3)).detach()
        torch.testing.assert_close(found[name].relevance, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_relevances_of_both_layers_and_the_bias_make_up_the_logit(net, root):
    """Behind the last fire module the network is piecewise linear, so gradient x input is complete."""
    images, targets = next(iter(photographs(root, "val", 4)))
    found = collected(net, images, targets)
    with torch.no_grad():
        logits = net(images).gather(1, targets[:, None])[:, 0]
        maps = net.classifier[1](net.features(images))  # dropout is off
        on = torch.stack([image[target] > 0 for image, target in zip(maps, targets, strict=True)]).float().mean((1, 2))
        bias = net.classifier[1].bias[targets] * on
    total = sum(found[name].relevance.sum(1) for name in LAYERS)
    torch.testing.assert_close(total + bias, logits, rtol=1e-5, atol=1e-5)


def test_known_figures(report):
    for layer in report.layers:
        assert layer.n_candidates > 60
        assert 0.55 < layer.min_cosine < 0.85
        assert layer.max_cosine > 0.97


def test_splits_preserve_the_network_and_are_judged_on_other_photographs(net, root, report):
    splits = [report.plan.of_layer(layer)[:5] for layer in LAYERS if report.plan.of_layer(layer)]
    plan = SplitPlan([split for part in splits for split in part])
    assert len(plan) >= 3
    images, _ = next(iter(photographs(root, "val", 8)))
    split = disentangle(net, plan)
    with torch.no_grad():
        before, after = net(images), split(images)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    deviations = split_checked(copy.deepcopy(net), plan, report.sample_inputs())
    assert all(deviation < 1e-5 for deviation in deviations.values())
    quality = evaluate_splits(split, plan, photographs(root, "val", 5), relevance_threshold=0.005, progress=False)
    figures = [concept.distortion for entry in quality for concept in entry.concepts]
    assert all(np.isfinite(figure) for figure in figures)
    assert all(concept.n_own == 5 * len(concept.classes) for entry in quality for concept in entry.concepts)


def test_calibrated_flags_are_pairs_that_can_be_told_apart(net, root):
    """Better by 0.1 than random candidate pairs, judged on photographs that took no part."""
    layer = LAYERS[0]
    place = {"relevance_threshold": 0.01, "class_fraction": 0.5, "calibration_samples": None, "progress": False}
    train = list(photographs(root, "train", 30))
    flagged = find_polysemantic_channels(net, train, layer, **place)
    everything = find_polysemantic_channels(net, train, layer, similarity_threshold=1.0, **place)
    assert len(flagged.pairs) > 10

    def separation(pairs):
        pairs = [(pair.layer, pair.channel, pair.class_a, pair.class_b) for pair in pairs]
        plan = everything.plan_pairs(pairs)
        judged = evaluate_splits(net, plan, photographs(root, "val", 10), progress=False)
        return float(np.median([quality.mean("auroc") for quality in judged]))

    order = np.random.default_rng(0).permutation(len(everything.pairs))[:30]
    at_random = separation([everything.pairs[place] for place in order])
    assert separation(flagged.pairs[:: max(1, len(flagged.pairs) // 30)]) > at_random + 0.1


def test_relevance_is_on_the_right_concept_and_heat_maps_stay(net, root):
    """Held-out photographs: most have most relevance on their own concept; z+ maps are those of the unsplit network."""
    place = {"relevance_threshold": 0.01, "class_fraction": 0.5, "progress": False}
    report = find_polysemantic_channels(net, photographs(root, "train", 15), LAYERS[0], **place)
    plan = SplitPlan([split for split in report.plan if len(split.concepts) == 2][:8])
    images, targets = (torch.cat(parts) for parts in zip(*photographs(root, "val", 5), strict=True))
    found = concept_relevances(net, plan, images, targets, attribution="gradient_x_input")
    right = []
    for split, parts in zip(plan, found, strict=True):
        for index, concept in enumerate(split.concepts):
            own = torch.isin(targets, torch.tensor(concept)) & (parts.sum(1) > 0)
            right += (parts[own][:, :-1].argmax(1) == index).tolist()
    assert len(right) > 50
    assert np.mean(right) > 0.8
    few, wanted = images[::25], targets[::25]
    before, after = (_heat_map(model, few, wanted) for model in (net, disentangle(net, plan)))
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))


def _heat_map(model, images, targets):
    model, images = copy.deepcopy(model).requires_grad_(False), images.clone().requires_grad_()
    with with_split_rules(EpsilonPlus()).context(model):
        (found,) = torch.autograd.grad(model(images).gather(1, targets[:, None]).sum(), images)
    return found
