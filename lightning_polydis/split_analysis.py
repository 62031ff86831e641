"""The judgement of splits, batch by batch, whoever runs the network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_polydis.batches import check_module_name, collector_for, targets_of
from lightning_polydis.evaluation import SplitEvaluator, SplitQuality
from lightning_polydis.forward import full_precision
from lightning_polydis.layers import is_finite
from lightning_polydis.statistics import relevant_channels
from lightning_polydis.surgery import layer_of_plan

if TYPE_CHECKING:
    from torch import nn

    from lightning_polydis.plan import SplitPlan
    from lightning_polydis.settings import AnalysisSettings


class SplitAnalysis:
    """Judges a plan's splits batch by batch, on a network before or after it was split.

    Used like `ChannelAnalysis`; ``compute`` gives the quality of each split.

    Args:
        model: The network.
        plan: The splits to judge.
        settings: How to find targets and logits, and when a channel is relevant.

    Raises:
        ValueError: If the plan does not fit the network.
    """

    def __init__(self, model: nn.Module, plan: SplitPlan, settings: AnalysisSettings) -> None:
        check_module_name(model, settings.logits_module)
        self._settings = settings
        self._layers = {name: layer_of_plan(model, plan, name) for name in plan.layers}
        self._plan = plan
        self._evaluators = {name: SplitEvaluator(plan.of_layer(name)) for name in plan.layers}
        self._collector = collector_for(model, self._layers, settings, lambda name, inputs: inputs.clone())
        self._targets = torch.empty(0)
        self.is_empty = True

    def start_batch(self, batch: Any, *, wrapped: bool = False, rehearsal: bool = False) -> None:
        """As `ChannelAnalysis.start_batch`."""
        self._targets = targets_of(batch, self._settings)
        self._collector.start(self._targets, wrapped=wrapped, rehearsal=rehearsal)

    def finish_batch(self) -> None:
        """As `ChannelAnalysis.finish_batch`."""
        records = self._collector.finish()
        self.is_empty = False
        for name, record in records.items():
            if is_finite(record.relevance):
                relevant = relevant_channels(record.relevance, self._settings.relevance_threshold)
                with torch.no_grad(), full_precision():
                    self._evaluators[name].update(self._layers[name], record.seen, self._targets, relevant)

    def close(self) -> None:
        """Take every hook off."""
        self._collector.close()

    def release(self) -> None:
        """As `ChannelAnalysis.release`."""
        self._collector.release()

    @property
    def outermost(self) -> nn.Module | None:
        """As `ChannelAnalysis.outermost`."""
        return self._collector.outermost

    def gather(self) -> None:
        """As `ChannelAnalysis.gather`."""
        for evaluator in self._evaluators.values():
            evaluator.gather()

    def compute(self) -> list[SplitQuality]:
        """Quality of each split over all processes, layer by layer, in the plan's order within a layer."""
        return [quality for evaluator in self._evaluators.values() for quality in evaluator.compute()]
