"""The judgement of splits of clusters, batch by batch, whoever runs the network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_polydis.clusters.watching import LayerWatcher
from lightning_polydis.evaluation import SplitEvaluator, SplitQuality
from lightning_polydis.forward import full_precision
from lightning_polydis.layers import at_least_single, channel_count, is_finite
from lightning_polydis.splitting import SplitLayer
from lightning_polydis.surgery import layer_of_plan

if TYPE_CHECKING:
    from lightning_polydis.plan import SplitPlan
    from lightning_polydis.settings import AnalysisSettings


MOST_NAMED = 5
"""Channels that a warning names."""


class ClusterSplitAnalysis:
    """Judges splits of clusters on any images, on a network before or after it was split; no targets are needed.

    Used like `split_analysis.SplitAnalysis`. An image that activates a channel strongly enough belongs to the concept
    whose centre is most like what makes the channel fire, see `evaluation.nearest_concepts`.

    Args:
        model: The network.
        plan: The splits to judge, all with centres.
        settings: Not looked at.

    Raises:
        ValueError: If the plan does not fit the network.
    """

    outermost: nn.Module | None = None

    def __init__(self, model: nn.Module, plan: SplitPlan, settings: AnalysisSettings) -> None:
        self._layers = {name: layer_of_plan(model, plan, name) for name in plan.layers}
        self._evaluators = {name: SplitEvaluator(plan.of_layer(name)) for name in plan.layers}
        self._watcher = LayerWatcher(model, self._layers)
        self.is_empty = True

    def start_batch(self, batch: Any, *, wrapped: bool = False, rehearsal: bool = False) -> None:
        """As `analysis.ChannelAnalysis.start_batch`."""
        self._watcher.start(rehearsal=rehearsal)

    def finish_batch(self) -> None:
        """As `analysis.ChannelAnalysis.finish_batch`."""
        seen = self._watcher.finish()
        self.is_empty &= not seen
        for name, one in seen.items():
            if is_finite(one.inputs) and is_finite(one.outputs):
                # All images that are strong enough to belong to a concept count.
                relevant = torch.ones(1, 1, dtype=torch.bool).expand(len(one.inputs), self._n_channels(name))
                with torch.no_grad(), full_precision():
                    self._evaluators[name].update(self._layers[name], at_least_single(one.inputs), None, relevant)

    def _n_channels(self, name: str) -> int:
        layer = self._layers[name]
        return layer.n_channels if isinstance(layer, SplitLayer) else channel_count(layer)

    def close(self) -> None:
        """Take every hook off."""
        self._watcher.close()

    release = close

    def gather(self) -> None:
        """As `analysis.ChannelAnalysis.gather`."""
        for evaluator in self._evaluators.values():
            evaluator.gather()

    def compute(self) -> list[SplitQuality]:
        """Quality of each split over all processes, layer by layer, in the plan's order within a layer."""
        qualities = [quality for evaluator in self._evaluators.values() for quality in evaluator.compute()]
        _warn_of_unseen([found for found in qualities if not any(concept.n_own for concept in found.concepts)])
        return qualities


def _warn_of_unseen(splits: list[SplitQuality]) -> None:
    if not splits:
        return
    names = [f"{split.channel} of `{split.layer}`" for split in splits[:MOST_NAMED]]
    names += [f"{len(splits) - MOST_NAMED} more"] if len(splits) > MOST_NAMED else []
    rank_zero_warn(
        "No image activates these channels as much as the images that their clusters come from, so that their splits "
        f"could not be judged: {', '.join(names)}. Pass more images, or some of the kind that was analysed."
    )
