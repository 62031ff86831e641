"""Is the relevance of a split channel on the right concept? And does the split change where relevance goes?

On each network, at the settings that ``report.suggest_settings()`` proposes, every flagged channel is split. On images
that took no part, for which the channel speaks for the image's class, two figures for each concept: the share of images
on which the concept that the class belongs to has more relevance than any other (chance: one in as many as there are
concepts), and its share of the concepts' relevance (absolute values). Medians over concepts, with quartiles.

Then, for each composite: the largest difference between the heat maps of the split and of the unsplit network,
relative to the largest value, and by how much the relevance in front of the layer differs, for the rules of
`lightning_polydis.lrp` and for what one would do without (``Norm`` on ``merge``, the composite's rule on ``expand``).

Example:
    python benchmarks/concept_relevance.py --root path/to/real/data --only squeezenet
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import World, worlds
from torch import Tensor, nn
from zennit.composites import EpsilonAlpha2Beta1, EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat, LayerMapComposite
from zennit.composites import layer_map_base as base_rules
from zennit.core import Composite
from zennit.rules import Epsilon, Norm
from zennit.types import Linear

from lightning_polydis import PolysemanticityReport, SplitPlan, disentangle, find_polysemantic_channels
from lightning_polydis.forward import quiet_copy
from lightning_polydis.heatmaps import concept_relevances
from lightning_polydis.lrp import fitted_composite
from lightning_polydis.merging import MergeChannels

ATTRIBUTIONS = ("gradient_x_input", "epsilon_plus", "epsilon_plus_flat", "epsilon_alpha2_beta1")


def analyse(world: World, layer: str) -> PolysemanticityReport:
    """The layer at suggested settings."""
    common = {"calibration_samples": None, "progress": False}
    suggested = find_polysemantic_channels(
        world.model, world.choose, layer, relevance_threshold=0.01, **common
    ).suggest_settings()
    return find_polysemantic_channels(world.model, world.choose, layer, **common, **suggested.arguments())


def on_right_concept(
    plan: SplitPlan, relevances: Sequence[Tensor], targets: Tensor
) -> list[tuple[float, float, float]]:
    """For each concept: share of images on which it has most relevance, its share of the relevance, chance."""
    found = []
    for split, parts in zip(plan, relevances, strict=True):
        for index, concept in enumerate(split.concepts):
            own = torch.isin(targets, torch.tensor(concept)) & (parts.sum(1) > 0)
            concepts = parts[own][:, :-1]
            if len(concepts):
                largest = (concepts.argmax(1) == index).float().mean()
                share = concepts[:, index].abs().sum() / concepts.abs().sum()
                found.append((float(largest), float(share), 1 / len(split.concepts)))
    return found


def spread(values: Sequence[float]) -> str:
    """Median and quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def composites(images: Tensor) -> dict[str, Any]:
    """Makers of the composites whose conservation is measured; each takes rules that come first."""
    low, high = images.amin((0, 2, 3), keepdim=True), images.amax((0, 2, 3), keepdim=True)
    return {
        "EpsilonPlus": lambda first: EpsilonPlus(layer_map=first),
        "EpsilonPlusFlat": lambda first: EpsilonPlusFlat(layer_map=first),
        "EpsilonAlpha2Beta1": lambda first: EpsilonAlpha2Beta1(layer_map=first),
        "EpsilonGammaBox": lambda first: EpsilonGammaBox(low, high, layer_map=first),
        "epsilon everywhere": lambda first: LayerMapComposite([*first, *base_rules(), (Linear, Epsilon())]),
    }


def relevance(model: nn.Module, composite: Composite, images: Tensor, targets: Tensor, layer: str) -> list[Tensor]:
    """Relevance behind a layer and in front of it, and at the images."""
    seen: list[Tensor] = []
    module = model.get_submodule(layer)
    with composite.context(model), torch.enable_grad():
        handles = [
            module.register_forward_pre_hook(lambda m, args: seen.append(args[0]), prepend=True),  # before zennit
            module.register_forward_hook(lambda m, args, output: seen.append(output)),
        ]
        images = images.clone().requires_grad_()
        score = model(images).gather(1, targets[:, None])[:, 0]
        gradients = torch.autograd.grad((score * score.detach()).sum(), [seen[1], seen[0], images])
        for handle in handles:
            handle.remove()
    return list(gradients)


def conservation(world: World, plan: SplitPlan, layer: str) -> None:
    """Print how the split changes what a composite says."""
    images, targets = (torch.cat(parts)[:24] for parts in zip(*world.judge, strict=True))
    plan = SplitPlan(plan.of_layer(layer))
    plain = quiet_copy(world.model)
    split = disentangle(plain, plan)
    for name, make in composites(images).items():
        fitted, _ = fitted_composite(make([]), plain, lambda: plain(images))
        before = relevance(plain, fitted, images, targets, layer)
        ours, _ = fitted_composite(make([]), split, lambda: split(images))
        naive = make([(MergeChannels, Norm())])
        naive.canonizers = [*ours.canonizers]
        for label, composite in (("ours", ours), ("Norm on merge", naive)):
            after = relevance(split, composite, images, targets, layer)
            difference = float((after[2] - before[2]).abs().max() / before[2].abs().max())
            print(f"| {name} | {label} | {difference:.1e} | {lost(after, before):.1e} |", flush=True)


def lost(after: list[Tensor], before: list[Tensor]) -> float:
    """By how much the relevance in front of the split layer differs from that before the split: largest, relative."""
    found, expected = (parts[1].flatten(1).sum(1) for parts in (after, before))
    return float(((found - expected).abs() / expected.abs()).max())


def measure(world: World, layer: str) -> None:
    """Everything about one layer."""
    report = analyse(world, layer)
    plan = report.plan
    print(f"\n{world.name} `{layer}`: {len(plan)} channels split", flush=True)
    if not len(plan):
        return
    images, targets = (torch.cat(parts) for parts in zip(*world.judge, strict=True))
    for attribution in ATTRIBUTIONS:
        parts = concept_relevances(world.model, plan, images, targets, attribution=attribution)
        right, shares, chance = zip(*on_right_concept(plan, parts, targets), strict=True)
        print(f"| {attribution} | {spread(right)} | {spread(shares)} | {np.mean(chance):.2f} |", flush=True)
    conservation(world, plan, layer)


def main() -> None:
    """Measure all networks."""
    parser = argparse.ArgumentParser(description="Relevance of concept channels.")
    parser.add_argument("--root", type=Path, default=os.environ.get("POLYDIS_REAL_DATA"))
    parser.add_argument("--only", default="", help="part of a network's name")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for world in worlds(None if arguments.root is None else Path(arguments.root)):
        if arguments.only.lower() in world.name.lower():
            for layer in world.layers:
                measure(world, layer)


if __name__ == "__main__":
    main()
