"""The result of an analysis: data that can be read, saved and shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from lightning_polydis._checks import InputError
from lightning_polydis._files import parse, read_json, write_json
from lightning_polydis._text import counted
from lightning_polydis.card_builder import RelevanceTable, build_card, build_overview, relevance_table
from lightning_polydis.cards import MAX_TRACKED, ChannelCard, EpochEntry, LayerOverview
from lightning_polydis.clusters.evidence import ClusterEvidence
from lightning_polydis.clusters.names import cluster_name
from lightning_polydis.clusters.overview import cluster_overview
from lightning_polydis.layers import find_layer
from lightning_polydis.plan import ChannelSplit, SplitPlan
from lightning_polydis.planning import LayerEvidence, judge_splits, plan_splits
from lightning_polydis.report_json import report_fields, report_to_json
from lightning_polydis.report_tables import console_table, markdown_table
from lightning_polydis.sweep import LayerSweep, SuggestedSettings, suggest_settings, sweep_layer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from pandas import DataFrame
    from rich.table import Table
    from torch import Tensor, nn

    from lightning_polydis.detection import PolysemanticChannel, PolysemanticPair
    from lightning_polydis.evaluation import SplitQuality
    from lightning_polydis.summary import LayerSummary

MAX_CARDS = 20

SCALARS = ("n_polysemantic", "n_pairs", "n_candidates", "mean_cosine", "min_cosine")
"""Figures of a layer that are logged as scalars."""


@dataclass(frozen=True, eq=False)
class PolysemanticityReport:
    """What an analysis found.

    Attributes:
        layers: One summary for each analysed layer.
        channels: Polysemantic channels with their concepts, by layer, lowest similarity first.
        pairs: Flagged pairs of classes (the paper's list), by layer, lowest similarity first.
        settings: The settings of the analysis, in plain types.
        n_images: Images that were analysed.
        n_images_left_out: Images that were not, because their batch held NaN or infinity.
        class_names: Names of the classes, or `None`.
        notes: What a reader should know: classes without images, images left out, fewer samples than wanted.
        history: One entry for each analysed epoch of the run and each layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_polydis import find_polysemantic_channels
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> batches = [(torch.randn(32, 4), torch.randint(3, (32,))) for _ in range(4)]
        >>> report = find_polysemantic_channels(net, batches, layers="2", class_fraction=0.2, progress=False)
        >>> report.layers[0].n_channels, report.n_images
        (8, 128)
    """

    layers: list[LayerSummary]
    channels: list[PolysemanticChannel]
    pairs: list[PolysemanticPair]
    settings: dict[str, Any]
    n_images: int
    n_images_left_out: int = 0
    class_names: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    history: list[EpochEntry] = field(default_factory=list, repr=False)
    _evidence: Mapping[str, LayerEvidence | ClusterEvidence] | None = field(default=None, repr=False)
    _saved_plan: SplitPlan | None = field(default=None, repr=False)
    _saved_quality: list[SplitQuality] | None = field(default=None, repr=False)
    _saved_sweeps: list[LayerSweep] | None = field(default=None, repr=False)
    _saved_cards: list[ChannelCard] | None = field(default=None, repr=False)
    _saved_overviews: list[LayerOverview] | None = field(default=None, repr=False)
    _saved_names: dict[tuple[str, int], list[str]] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        counts = [f"{own.n_polysemantic} of {own.n_channels} of {own.name!r}" for own in self.layers]
        own = f"polysemantic channels: {', '.join(counts) or 'none'}"
        return f"PolysemanticityReport({counted(self.n_images, 'image')}; {own})"

    @cached_property
    def plan(self) -> SplitPlan | None:
        """A split of every flagged channel, chosen when first asked for; `None` with ``calibration_samples=0``.

        Raises:
            ValueError: If the report was loaded from a file, which holds no calibration samples.
        """
        if self._saved_plan is not None:
            return self._saved_plan
        wanted = [(found.layer, found.channel, found.concepts) for found in self.channels]
        return self._planned(wanted) if self._has_samples() else None

    @property
    def is_restored(self) -> bool:
        """Whether the report comes from a file or a checkpoint, and knows no more than those hold."""
        return self._evidence is None

    @property
    def known_plan(self) -> SplitPlan | None:
        """The plan, if it was chosen already."""
        return self.__dict__.get("plan", self._saved_plan)

    @cached_property
    def quality(self) -> list[SplitQuality]:
        """Quality of the plan's splits on calibration samples that did not choose them (empty if there are none)."""
        if self._saved_quality is not None:
            return self._saved_quality
        plan = None if self._evidence is None else self.plan
        if plan is None or self._evidence is None:
            return []
        return [
            quality for layer in plan.layers for quality in judge_splits(self._evidence[layer], plan.of_layer(layer))
        ]

    @cached_property
    def sweeps(self) -> list[LayerSweep]:
        """What other settings would have found, one for each layer; counted when first asked for. Empty for clusters.

        Raises:
            ValueError: If the report was loaded from a file that holds none.
        """
        if self._saved_sweeps is not None:
            return self._saved_sweeps
        if self._evidence is None:
            raise InputError("This report was loaded from a file that holds no sweep. Run the analysis again.")
        return [sweep_layer(found) for found in self._evidence.values() if isinstance(found, LayerEvidence)]

    @cached_property
    def cards(self) -> list[ChannelCard]:
        """Cards of the most polysemantic channels, 20 at most; made when first asked for.

        Empty without calibration samples, and if the report was loaded from a file that holds none.
        """
        if self._saved_cards is not None or self._evidence is None or self.plan is None:
            return self._saved_cards or []
        splits = {(split.layer, split.channel): split for split in self.plan}
        first = sorted(self.channels, key=lambda found: found.cosine_similarity)[:MAX_CARDS]
        return [
            self._card(self._evidence[found.layer].of_channel(found.channel), found, splits[found.layer, found.channel])
            for found in first
        ]

    def _card(self, evidence: LayerEvidence, found: PolysemanticChannel, split: ChannelSplit) -> ChannelCard:
        pairs = [pair for pair in self.pairs if (pair.layer, pair.channel) == (found.layer, found.channel)]
        card = build_card(evidence, found, pairs, split)
        names = self.concept_names[found.layer, found.channel][: len(card.concepts)]
        return replace(card, names=names) if self.has_clusters else card

    @cached_property
    def overviews(self) -> list[LayerOverview]:
        """Each layer at a glance; made when first asked for, empty if no file that was loaded holds any."""
        if self._saved_overviews is not None or self._evidence is None:
            return self._saved_overviews or []
        return [
            self._overview(
                evidence,
                [found for found in self.channels if found.layer == name],
                [pair for pair in self.pairs if pair.layer == name],
            )
            for name, evidence in self._evidence.items()
        ]

    @staticmethod
    def _overview(
        evidence: LayerEvidence | ClusterEvidence, channels: list[PolysemanticChannel], pairs: list[PolysemanticPair]
    ) -> LayerOverview:
        if isinstance(evidence, ClusterEvidence):
            return cluster_overview(evidence, channels, pairs)
        return build_overview(evidence, channels, pairs)

    def relevance_vectors(self, layer: str) -> RelevanceTable:
        """The relevance vectors of a layer's flagged channels, one for each class that a channel is relevant for.

        Raises:
            ValueError: If the layer was not analysed, or the report comes from a file, which holds no vectors.
        """
        if self._evidence is None or layer not in self._evidence:
            known = ", ".join(self._evidence or {}) or "none, as this report was loaded from a file"
            raise InputError(f"Expected a layer whose vectors are known ({known}), but got {layer!r}.")
        return relevance_table(self._evidence[layer], [found for found in self.channels if found.layer == layer])

    def suggest_settings(self) -> SuggestedSettings:
        """Settings that suit these layers and data, and why, from the `sweeps`.

        Raises:
            ValueError: If concepts are clusters, whose settings are the same for all layers.
        """
        if self.has_clusters:
            raise InputError(
                "`suggest_settings` is about classes, and this report's concepts are clusters, whose settings are the "
                "same for all layers. More images, of more kinds, show more of them."
            )
        return suggest_settings(self.sweeps, self.settings)

    def judge(self) -> None:
        """Measure the quality of the plan's splits now, so that tables and files show it."""
        _ = self.quality

    def plan_pairs(self, pairs: Iterable[tuple[str, int, int, int]]) -> SplitPlan:
        """Plan splits of chosen channels between two classes each, flagged or not (the paper's case).

        Args:
            pairs: ``(layer, channel, class_a, class_b)`` each; with clusters, two of the channel's clusters.

        Returns:
            A plan with ``concepts == [[class_a], [class_b]]`` and membership rows in that order.

        Raises:
            ValueError: If a layer, channel or class is unknown, or the calibration samples that this takes are missing.
        """
        wanted = []
        for layer, channel, class_a, class_b in pairs:
            self._check_pair(layer, channel, class_a, class_b)
            wanted.append((layer, channel, [[class_a], [class_b]]))
        if not self._has_samples():
            raise InputError("A plan needs calibration samples: run the analysis with `calibration_samples` above 0.")
        return self._planned(wanted)

    def _has_samples(self) -> bool:
        if self._evidence is None:
            raise InputError(
                "This report was loaded from a file, which holds no calibration samples. "
                "Load the plan with `SplitPlan.load`, or run the analysis again."
            )
        return all(evidence.samples is not None for evidence in self._evidence.values())

    def _planned(self, wanted: list[tuple[str, int, list[list[int]]]]) -> SplitPlan:
        by_layer: dict[str, list[tuple[int, list[list[int]]]]] = {}
        for layer, channel, concepts in wanted:
            by_layer.setdefault(layer, []).append((channel, concepts))
        evidence = self._evidence or {}
        splits = {layer: iter(plan_splits(evidence[layer], own)) for layer, own in by_layer.items()}
        return SplitPlan([next(splits[layer]) for layer, _, _ in wanted])  # in the order in which they were asked for

    def _check_pair(self, layer: str, channel: int, class_a: int, class_b: int) -> None:
        summaries = {summary.name: summary for summary in self.layers}
        if layer not in summaries:
            raise InputError(f"Expected an analysed layer ({', '.join(summaries)}), but got {layer!r}.")
        if not 0 <= channel < summaries[layer].n_channels:
            raise InputError(f"Expected a channel in [0, {summaries[layer].n_channels}), but got {channel}.")
        if self._evidence is None or class_a == class_b:
            self._has_samples()
            raise InputError(f"Expected two different classes, but got {class_a} twice.")
        n_images = self._evidence[layer].of_channel(channel).statistics.n_images
        for label in (class_a, class_b):
            if self.has_clusters and not 0 <= label < len(n_images):
                known = f"one of its clusters, 0 to {len(n_images) - 1}" if len(n_images) else "a channel with clusters"
                raise InputError(f"Expected {known}, but got {label} for channel {channel}, which has {len(n_images)}.")
            if not 0 <= label < len(n_images) or n_images[label] == 0:
                raise InputError(f"Expected a class that has images, but got {label}.")

    def sample_inputs(self, n_samples: int = 64) -> dict[str, Tensor]:
        """Some kept inputs of each layer, ``[n, I, H, W]`` or ``[n, ..., I]``."""
        found = {name: evidence.samples for name, evidence in (self._evidence or {}).items()}
        return {name: samples[:n_samples].inputs for name, samples in found.items() if samples is not None}

    def differs_from(self, model: nn.Module) -> bool:
        """Whether a layer of ``model`` has other weights than those that were analysed."""
        for name, evidence in (self._evidence or {}).items():
            weight = find_layer(model, name).weight.detach().cpu()
            if not torch.equal(weight, evidence.layer.weight):
                return True
        return False

    def label(self, class_index: int) -> str:
        """Name of a class, or its index where it has none."""
        names = self.class_names or []
        return names[class_index] if 0 <= class_index < len(names) else str(class_index)

    @property
    def has_clusters(self) -> bool:
        """Whether concepts are clusters (``concepts="clusters"``), not groups of classes."""
        return self.settings.get("concepts") == "clusters"

    @cached_property
    def concept_names(self) -> dict[tuple[str, int], list[str]]:
        """Name of each concept of each flagged channel, by layer and channel; worked out when first asked for.

        The names of its classes. For clusters what ``describe_fn`` says of their images; without it the classes that
        fill them, with their shares, and where no classes are known a number.
        """
        if self._saved_names is not None:
            return self._saved_names
        return {(found.layer, found.channel): self._names_of(found) for found in self.channels}

    def _names_of(self, found: PolysemanticChannel) -> list[str]:
        evidence = None if self._evidence is None else self._evidence[found.layer]
        if found.contents is None:
            return [", ".join(map(self.label, concept)) for concept in found.concepts]
        names = [cluster_name(number, own, self.class_names) for number, own in enumerate(found.contents, start=1)]
        if not isinstance(evidence, ClusterEvidence):
            return names
        return [text or name for text, name in zip(evidence.described(found), names, strict=True)]

    def scalars(self) -> dict[str, float]:
        """Figures to log: ``polydis/<layer>/<figure>``."""
        return {
            f"polydis/{layer.name}/{name}": float(getattr(layer, name)) for layer in self.layers for name in SCALARS
        }

    def entries(self, epoch: int, step: int) -> list[EpochEntry]:
        """What this report says of each layer, for the history of a run.

        Args:
            epoch: Number of the epoch.
            step: Global step of the analysis.
        """
        by_layer: dict[str, dict[int, float]] = {layer.name: {} for layer in self.layers}
        for found in self.channels:
            if len(by_layer[found.layer]) < MAX_TRACKED:  # lowest similarity first
                by_layer[found.layer][found.channel] = found.cosine_similarity
        return [
            EpochEntry(epoch, step, layer.name, layer.n_polysemantic, layer.mean_cosine, by_layer[layer.name])
            for layer in self.layers
        ]

    def save(self, path: str | Path) -> None:
        """Write the report as JSON (see `to_json`); the file appears whole or not at all."""
        write_json(path, "report", self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The report in plain types, without the calibration samples.

        The quality of the splits and the sweeps are included if they were asked for before.
        """
        return report_to_json(self)

    @staticmethod
    def load(path: str | Path) -> PolysemanticityReport:
        """Read a report that `save` wrote.

        Raises:
            ValueError: If the file is damaged, of another kind, or of a newer format.
        """
        report: PolysemanticityReport = parse(path, PolysemanticityReport.from_json, read_json(path, "report"))
        return report

    @staticmethod
    def from_json(document: dict[str, Any]) -> PolysemanticityReport:
        """The report that `to_json` described."""
        return PolysemanticityReport(**report_fields(document))

    def to_markdown(self, max_rows: int | None = None) -> str:
        """The report as markdown: a summary of each layer and a table of the polysemantic channels.

        Reliability: how well the relevance vectors are known, 0 to 1. Clear: whether the interval of a similarity lies
        below the threshold as a whole.

        The quality of the splits has its columns once it was measured: by `judge`, or by the callback when a run ends.
        Not by this method, as every split has to be solved for, which may take minutes; a line below the table says so.

        Args:
            max_rows: Rows of the table at most; `None`: all.
        """
        return markdown_table(self, max_rows)

    def to_table(self, max_rows: int = 20) -> Table:
        """The polysemantic channels as a `rich` table that fits a narrow console."""
        return console_table(self, max_rows)

    def to_html(self, path: str | Path) -> None:
        """Write the report as one self-contained HTML page, see `html.to_html`; it appears whole or not at all.

        What was not asked for before (quality, cards, sweeps) is worked out now.
        """
        from lightning_polydis.html import write_html  # jinja2 takes its time to import

        write_html(self, path)

    def to_dataframe(self) -> DataFrame:
        """The polysemantic channels as a pandas table.

        Raises:
            ModuleNotFoundError: If pandas is missing; it comes with the extra ``pandas``.
        """
        try:
            import pandas as pd
        except ModuleNotFoundError as error:
            text = "`to_dataframe` needs pandas: pip install 'lightning-polydis[pandas]'."
            raise ModuleNotFoundError(text) from error
        return pd.DataFrame([asdict(channel) for channel in self.channels])

    @property
    def known_quality(self) -> list[SplitQuality]:
        """The quality of the splits, if it was asked for before; else empty."""
        return self.__dict__.get("quality", self._saved_quality) or []
