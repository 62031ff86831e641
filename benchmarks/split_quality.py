"""How good are splits? The same pairs of classes, split by both methods, judged on images that took no part.

On each network, at the settings that ``report.suggest_settings()`` proposes: pairs that ``similarity_threshold="auto"``
flags, and random candidate pairs, split by ``method="paper"``, ``method="optimized"`` and symmetric dominance, a hard
rule between the two. Medians over pairs, with
quartiles. Both methods are measured in the direction in which a class uses the channel; the paper, which knows only
positive values, would look worse without. Then: how well does the similarity of a pair foretell what its split is
worth, with the relevance vectors of either method? (Spearman's correlation with the AUROC, over random candidate pairs;
-1 is best.)

Example:
    python benchmarks/split_quality.py --root path/to/real/data
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from networks import World, worlds
from scipy.stats import spearmanr

from lightning_polydis import (
    ChannelSplit,
    PolysemanticityReport,
    SplitPlan,
    SplitQuality,
    evaluate_splits,
    find_polysemantic_channels,
)
from lightning_polydis.layers import channel_outputs, flat_weight
from lightning_polydis.membership import DOMINANCE_RATIOS, part_weights
from lightning_polydis.planning import LayerEvidence

FIGURES = ("distortion", "leak", "spurious", "auroc")
Pair = tuple[str, int, int, int]


@dataclass(frozen=True)
class Reports:
    """One network's layer, analysed: with every candidate pair listed by either method, and with calibrated flags."""

    optimized: PolysemanticityReport
    paper: PolysemanticityReport
    auto: PolysemanticityReport

    def shared_pairs(self) -> list[Pair]:
        """Candidate pairs; which they are does not depend on the method."""
        known = set(_similarities(self.paper))
        return [pair for pair in _similarities(self.optimized) if pair in known]


def _similarities(report: PolysemanticityReport) -> dict[Pair, float]:
    return {(pair.layer, pair.channel, pair.class_a, pair.class_b): pair.cosine_similarity for pair in report.pairs}


def analyse(world: World, layer: str, leak_weight: float) -> Reports:
    """Analyse a layer at suggested settings."""

    def run(**settings: object) -> PolysemanticityReport:
        common = {"calibration_samples": None, "progress": False, "leak_weight": leak_weight}
        return find_polysemantic_channels(world.model, world.choose, layer, **common, **settings)

    suggested = run(relevance_threshold=0.01).suggest_settings()
    place = {"relevance_threshold": suggested.relevance_threshold, "class_fraction": suggested.class_fraction}
    everything = {**place, "similarity_threshold": 1.0}
    return Reports(run(**everything), run(**everything, method="paper"), run(**place))


def split(reports: Reports, pairs: Sequence[Pair]) -> dict[str, SplitPlan]:
    """The pairs split by both methods and by symmetric dominance, with the same directions."""
    optimized, paper = reports.optimized.plan_pairs(pairs), reports.paper.plan_pairs(pairs)
    directed = [replace(theirs, directions=ours.directions) for theirs, ours in zip(paper, optimized, strict=True)]
    symmetric = [symmetric_dominance(reports.optimized, ours) for ours in optimized]
    return {"paper": SplitPlan(directed), "symmetric dominance": SplitPlan(symmetric), "optimized": optimized}


def symmetric_dominance(report: PolysemanticityReport, ours: ChannelSplit) -> ChannelSplit:
    """The paper's hard rule in a form that does not mind the order of classes or inhibition, on optimized's vectors.

    A source is one concept's alone if its vector is larger there by more than ``(1 - ratio)`` of the larger absolute
    value; the ratio of the twenty is the one that the paper's objective likes best, in the concepts' directions.
    """
    evidence = report._evidence[ours.layer]
    a, b = evidence.vectors.means(ours.channel, [concept[0] for concept in ours.concepts])
    larger = torch.maximum(a.abs(), b.abs())
    candidates = []
    for ratio in DOMINANCE_RATIOS:
        only = [difference > (1 - ratio) * larger for difference in (a - b, b - a)]
        candidates.append(replace(ours, membership=torch.stack([~only[1], ~only[0]]).float()))
    return max(candidates, key=lambda candidate: _separation(evidence, candidate))


def _separation(evidence: LayerEvidence, candidate: ChannelSplit) -> float:
    """The paper's objective."""
    layer, total = evidence.layer, 0.0
    bias = None if layer.bias is None else layer.bias[candidate.channel]
    weight, biases = part_weights(flat_weight(layer)[candidate.channel], bias, candidate.membership)
    for own, (concept, sign) in enumerate(zip(candidate.concepts, candidate.signs(), strict=True)):
        inputs = evidence.samples.of_classes(concept).inputs
        own_biases = None if biases is None else biases[:2]
        outputs = channel_outputs(layer, inputs, weight[:2], own_biases, [candidate.channel] * 2)
        activation = (sign * outputs).clamp(min=0).sum(2)
        total += float((activation[:, own] / (activation[:, 1 - own] + 1e-5)).mean())
    return total


def judge(world: World, plan: SplitPlan, reports: Reports) -> list[SplitQuality]:
    """Quality of the splits on images that took no part in anything."""
    threshold = reports.optimized.settings["relevance_threshold"]
    return evaluate_splits(world.model, plan, world.judge, progress=False, relevance_threshold=threshold)


def values(qualities: Sequence[SplitQuality], name: str) -> np.ndarray:
    """A figure of each split, mean over its concepts; NaN where it could not be measured."""
    if name == "fidelity":
        return values(qualities, "distortion") + values(qualities, "leak")
    if name in ("kept", "residual"):
        return np.array([_kept(quality, residual=name == "residual") for quality in qualities])
    found = [quality.mean(name) for quality in qualities]
    return np.array([np.nan if value is None else value for value in found])


def _kept(quality: SplitQuality, residual: bool) -> float:
    """Share of the original that a concept's own channel keeps on its images, or the residual does."""
    shares = [
        concept.kept[-1 if residual else index]
        for index, concept in enumerate(quality.concepts)
        if concept.kept is not None
    ]
    return float(np.mean(shares)) if shares else np.nan


def spread(found: np.ndarray) -> str:
    """Median and quartiles."""
    low, middle, high = np.nanquantile(found, [0.25, 0.5, 0.75])
    return f"{middle:.3g} ({low:.2g} to {high:.2g})"


def report_pairs(label: str, qualities: dict[str, list[SplitQuality]]) -> None:
    """Print a row for each method, and what ours is of theirs."""
    for method, found in qualities.items():
        columns = [spread(values(found, name)) for name in (*FIGURES[:3], "kept", "residual", "auroc")]
        print(f"| {label} | {method} | {' | '.join(columns)} |")
    names = ("fidelity", "spurious", "auroc")
    theirs, ours = (
        {name: np.nanmedian(values(qualities[method], name)) for name in names} for method in ("paper", "optimized")
    )
    print(
        f"  optimized / paper: distortion + leak {ours['fidelity']:.3g} / {theirs['fidelity']:.3g} = "
        f"{ours['fidelity'] / theirs['fidelity']:.2f}, spurious {ours['spurious'] / theirs['spurious']:.3f}; "
        f"AUROC {ours['auroc'] - theirs['auroc']:+.3f}",
        flush=True,
    )


def measure(world: World, layer: str, arguments: argparse.Namespace) -> None:
    """Everything about one layer."""
    reports = analyse(world, layer, arguments.leak_weight)
    settings, summary = reports.auto.settings, reports.auto.layers[0]
    print(
        f"\n{world.name} `{layer}` (accuracy {world.accuracy:.2f}): relevance_threshold "
        f"{settings['relevance_threshold']:g}, class_fraction {settings['class_fraction']:g}; "
        f"{summary.n_polysemantic} of {summary.n_candidates} candidate channels and {summary.n_pairs} of "
        f"{summary.n_candidate_pairs} candidate pairs flagged",
        flush=True,
    )
    candidates, draw = reports.shared_pairs(), random.Random(0)
    groups = {
        "flagged": [pair for pair in _similarities(reports.auto) if pair in set(candidates)],
        "random": candidates,
    }
    judged = {}
    for label, pairs in groups.items():
        if len(pairs) < 2:
            print(f"  {label}: too few pairs")
            continue
        chosen = draw.sample(pairs, min(arguments.pairs, len(pairs)))
        judged[label] = {name: judge(world, plan, reports) for name, plan in split(reports, chosen).items()}
        report_pairs(f"{label}, {len(chosen)} pairs", judged[label])
        if label == "random":
            foretold(reports, chosen, judged[label])
    if len(judged) == 2:
        gain = np.nanmedian(values(judged["flagged"]["optimized"], "auroc")) - np.nanmedian(
            values(judged["random"]["optimized"], "auroc")
        )
        print(f"  AUROC of flagged over random pairs (optimized): {gain:+.3f}")


def foretold(reports: Reports, pairs: Sequence[Pair], judged: dict[str, list[SplitQuality]]) -> None:
    """How well similarities foretell separation."""
    ours, theirs = ([_similarities(report)[pair] for pair in pairs] for report in (reports.optimized, reports.paper))
    separation = {name: values(found, "auroc") for name, found in judged.items()}
    rows = {
        "optimized's vectors, optimized's splits": (ours, separation["optimized"]),
        "paper's vectors, optimized's splits": (theirs, separation["optimized"]),
        "paper's vectors, paper's splits": (theirs, separation["paper"]),
    }
    texts = [f"{label} {spearmanr(*pair, nan_policy='omit').statistic:.2f}" for label, pair in rows.items()]
    print(f"  Spearman, similarity and AUROC: {'; '.join(texts)}")


def main() -> None:
    """Measure all networks."""
    parser = argparse.ArgumentParser(description="Quality of splits by both methods.")
    parser.add_argument("--root", type=Path, default=os.environ.get("POLYDIS_REAL_DATA"))
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--only", default="", help="part of a network's name")
    parser.add_argument("--leak-weight", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| pairs | method | distortion | leak | spurious | kept | residual | AUROC |")
    for world in worlds(None if arguments.root is None else Path(arguments.root)):
        if arguments.only.lower() in world.name.lower():
            for layer in world.layers:
                measure(world, layer, arguments)


if __name__ == "__main__":
    main()
