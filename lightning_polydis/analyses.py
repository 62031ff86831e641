"""Which analysis the settings ask for; all are used alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_polydis._checks import InputError
from lightning_polydis.analysis import ChannelAnalysis
from lightning_polydis.clusters.analysis import ClusterAnalysis
from lightning_polydis.clusters.split_analysis import ClusterSplitAnalysis
from lightning_polydis.split_analysis import SplitAnalysis

if TYPE_CHECKING:
    from torch import nn

    from lightning_polydis.plan import SplitPlan
    from lightning_polydis.settings import AnalysisSettings
    from lightning_polydis.thumbnails import Normalisation

Analysis = ChannelAnalysis | ClusterAnalysis
Judgement = SplitAnalysis | ClusterSplitAnalysis


def analysis_for(
    model: nn.Module,
    settings: AnalysisSettings,
    note: str | None = None,
    normalisation: Normalisation | None = None,
) -> Analysis:
    """The analysis of a network (arguments: see `ChannelAnalysis`)."""
    kind = ClusterAnalysis if settings.concepts == "clusters" else ChannelAnalysis
    return kind(model, settings, note, normalisation)


def judgement_for(model: nn.Module, plan: SplitPlan, settings: AnalysisSettings) -> Judgement:
    """The judgement of a plan's splits (arguments: see `SplitAnalysis`).

    Raises:
        ValueError: If the plan splits some channels by classes and some by clusters.
    """
    of_clusters = [split.centres is not None for split in plan]
    if any(of_clusters) and not all(of_clusters):
        raise InputError(
            "The plan splits some channels by classes and some by clusters. Judge them one after the other, with a "
            "`SplitPlan` of each kind."
        )
    return (ClusterSplitAnalysis if any(of_clusters) else SplitAnalysis)(model, plan, settings)
