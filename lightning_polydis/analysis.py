"""The analysis of a network, batch by batch, whoever runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_polydis._checks import InputError
from lightning_polydis._text import images_left_out
from lightning_polydis.batches import check_module_name, collector_for, images_of, targets_of
from lightning_polydis.collection import LayerRecord, RelevanceCollector
from lightning_polydis.discovery import LayerDiscovery
from lightning_polydis.forward import full_precision
from lightning_polydis.layers import (
    LinearLayer,
    channel_count,
    channels_are_last,
    find_layer,
    inputs_per_channel,
    is_finite,
    plain_copy,
    sum_over_positions,
    window_sums,
)
from lightning_polydis.planning import LayerEvidence
from lightning_polydis.processes import cpu_group, let_go
from lightning_polydis.report import PolysemanticityReport
from lightning_polydis.settings import MEBIBYTE
from lightning_polydis.sources import elements_at_once, source_relevances
from lightning_polydis.statistics import CalibrationSamples, ChannelStatistics, relevant_channels
from lightning_polydis.summary import LayerSummary
from lightning_polydis.thumbnails import thumbnail_side, thumbnails
from lightning_polydis.vectors import RelevanceVectors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchmetrics import Metric

    from lightning_polydis.detection import LayerDetection
    from lightning_polydis.settings import AnalysisSettings
    from lightning_polydis.statistics import Samples
    from lightning_polydis.thumbnails import Normalisation
    from lightning_polydis.vectors import ClassVectors


@dataclass(frozen=True)
class Observation:
    """What is kept of a layer's input in one batch.

    Attributes:
        sums: `layers.window_sums`, ``[B, I, k]``, or `None` where they are not used.
        inputs: The rows that are still needed, ``[n, ...]``.
        rows: Which rows these are; `None`: all.
    """

    sums: Tensor | None
    inputs: Tensor
    rows: list[int] | None


CHUNK_ELEMENTS = 2**22
"""Elements of relevance vectors that a CPU makes at once."""


class ChannelAnalysis:
    """Collects what one pass over the data says about some layers.

    For each batch: ``start_batch``, then the forward pass by whoever makes it, then ``finish_batch``. At the end
    ``compute`` gives the report, once. ``close`` takes the hooks off at any time, ``release`` lets all data go.

    Args:
        model: The network, or whatever contains it.
        settings: How to analyse.
        note: What the report's reader should know.
        normalisation: How the data set normalises images, if it says so; the settings may say otherwise.

    Raises:
        ValueError: If a named layer or module cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: AnalysisSettings,
        note: str | None = None,
        normalisation: Normalisation | None = None,
    ) -> None:
        check_module_name(model, settings.logits_module)
        self._model = model
        self._settings = settings
        self._denormalize = normalisation if settings.denormalize is None else settings.denormalize
        self._observer: RelevanceCollector | LayerDiscovery
        self._layers: dict[str, LinearLayer] = {}
        self._statistics: dict[str, ChannelStatistics] = {}
        self._vectors: dict[str, RelevanceVectors] = {}
        self._samples: dict[str, CalibrationSamples] = {}
        self._copies: dict[str, LinearLayer] = {}
        self._notes = [] if note is None else [note]
        self._targets = torch.empty(0)
        self._images: Tensor | None = None
        self._thumbnail_side = 0
        self._cpu_group = cpu_group()  # here, where all processes come by
        if settings.layer_names is None:
            self._observer = LayerDiscovery(model, logits_fn=settings.logits_fn, logits_module=settings.logits_module)
        else:
            self._observer = self._collector_for(settings.layer_names)

    def _collector_for(self, names: Sequence[str]) -> RelevanceCollector:
        self._layers = {name: find_layer(self._model, name) for name in names}
        return collector_for(self._model, self._layers, self._settings, self._observe)

    def _observe(self, name: str, inputs: Tensor) -> Observation:
        if self._settings.method == "optimized":  # relevance vectors will need the inputs once there are gradients
            return Observation(None, inputs.clone(), None)
        sums = window_sums(self._layers[name], inputs)
        samples = self._samples.get(name)
        if not self._statistics:  # the first batch: how many samples there is room for is not known yet
            return Observation(sums, inputs.clone() if self._settings.calibration_samples != 0 else inputs[:0], None)
        # Inputs that are no batch of images are left to the collector, which says what is wrong.
        kept = samples is not None and len(inputs) == len(self._targets)
        rows = samples.wanted(inputs, self._targets) if samples is not None and kept else []
        return Observation(sums, inputs[torch.tensor(rows, dtype=torch.long, device=inputs.device)], rows)

    def start_batch(self, batch: Any, *, wrapped: bool = False, rehearsal: bool = False) -> None:
        """Get ready for the forward pass on ``batch`` (arguments: see `RelevanceCollector.start`).

        Raises:
            ValueError: If the batch's targets cannot be used.
        """
        self._targets = targets_of(batch, self._settings)
        self._images = images_of(batch)
        if isinstance(self._observer, LayerDiscovery):
            self._observer.start(wrapped=wrapped, rehearsal=rehearsal)
        else:
            self._observer.start(self._targets, wrapped=wrapped, rehearsal=rehearsal)

    def finish_batch(self) -> None:
        """Take in what the forward pass showed.

        Raises:
            ValueError: If the pass could not be analysed.
        """
        if isinstance(self._observer, LayerDiscovery):
            self._choose_layer(self._observer)
        assert isinstance(self._observer, RelevanceCollector)
        with full_precision():
            self._add(self._observer.finish(), self._observer)
        self._images = None

    def _choose_layer(self, discovery: LayerDiscovery) -> None:
        """Settle on a layer after the first pass, and make that pass again to see the layer in it."""
        name, call = discovery.finish()
        self._observer = collector = self._collector_for([name])
        collector.start(self._targets)
        with collector.alone():
            call.replay()

    @property
    def outermost(self) -> nn.Module | None:
        """The module whose call contained the layers, once a pass was seen."""
        return self._observer.outermost if isinstance(self._observer, RelevanceCollector) else None

    @property
    def is_empty(self) -> bool:
        """Whether not a single batch was taken in."""
        return not self._statistics

    def close(self) -> None:
        """Take every hook off."""
        self._observer.close()

    def release(self) -> None:
        """Take every hook off and let the data go."""
        self.close()
        self._images = None
        if isinstance(self._observer, RelevanceCollector):
            self._observer.release()
        let_go(self._metrics())

    def _metrics(self) -> list[Metric]:
        return [*self._statistics.values(), *self._vectors.values(), *self._samples.values()]

    def gather(self) -> None:
        """Exchange what the processes of a distributed run have seen; all of them, and then ``compute`` does not."""
        for vectors in self._vectors.values():
            vectors.trim()
        for samples in self._samples.values():
            samples.join()
        for metric in self._metrics():
            metric.sync()

    def _add(self, records: dict[str, LayerRecord], collector: RelevanceCollector) -> None:
        if not self._statistics:
            self._prepare(records, collector)
        for text in collector.notes:
            if text not in self._notes:  # a composite may find out late that it needs another way
                self._note(text)
        finite = all(_is_usable(record) for record in records.values())
        for name, record in records.items():
            targets = self._targets.to(record.relevance.device)
            self._count(name, record, targets, finite)
            if name in self._vectors:
                self._follow(name, record, targets, finite)
            if name in self._samples:
                self._keep(self._samples[name], record.seen, targets, record.relevance, finite)

    def _count(self, name: str, record: LayerRecord, targets: Tensor, finite: bool) -> None:
        channels_last = channels_are_last(self._layers[name])
        gradients = sum_over_positions(record.gradient, channels_last=channels_last)
        self._statistics[name].update(record.relevance, gradients, targets, record.seen.sums, leave_out=not finite)

    def _follow(self, name: str, record: LayerRecord, targets: Tensor, finite: bool) -> None:
        """Add up relevance vectors, of nothing if the batch is left out."""
        vectors, lowest = self._vectors[name], min(self._settings.relevance_thresholds)
        relevance, targets = (record.relevance, targets) if finite else (record.relevance[:0], targets[:0])
        images, channels = vectors.wanted(relevant_channels(relevance, lowest), targets)
        at_once = elements_at_once(relevance.device, CHUNK_ELEMENTS)
        step = max(1, at_once // (vectors.n_channels * vectors.n_inputs))
        ends = [0, *torch.bincount(images, minlength=max(len(targets), 1)).cumsum(0).tolist()]
        for start in range(0, max(len(targets), 1), step):  # some images at a time: all their vectors may be a lot
            part = slice(start, start + step)
            rows = slice(ends[start], ends[min(start + step, len(ends) - 1)])
            pairs = images[rows] - start, channels[rows]
            found = source_relevances(self._layers[name], record.seen.inputs[part], record.gradient[part], *pairs)
            vectors.update(found, *pairs, targets[part])

    def _keep(
        self, samples: CalibrationSamples, seen: Observation, targets: Tensor, relevance: Tensor, finite: bool
    ) -> None:
        rows, inputs = seen.rows, seen.inputs
        if rows is None or not finite:
            rows = samples.wanted(inputs, targets) if finite else []
            inputs = inputs[torch.tensor(rows, dtype=torch.long, device=inputs.device)]
        if rows or not samples.update_called:  # an update with nothing tells torchmetrics that nothing is intended
            relevant = relevant_channels(relevance[rows], self._settings.relevance_threshold)
            samples.update(inputs, targets[rows], relevant, self._pictures(rows))

    def _pictures(self, rows: list[int]) -> Tensor | None:
        """Thumbnails of some images of the batch."""
        if not rows or not self._thumbnail_side or self._images is None or len(self._images) != len(self._targets):
            return None
        every = len(rows) == len(self._images)  # no copy of a whole batch
        images = self._images if every else self._images[rows]
        return thumbnails(images, self._thumbnail_side, self._denormalize)

    def _prepare(self, records: dict[str, LayerRecord], collector: RelevanceCollector) -> None:
        """Make room for the statistics, now that the number of classes and the sizes are known."""
        num_classes = collector.num_logits or 0
        names = self._settings.class_names
        if names is not None and len(names) != num_classes:
            raise InputError(
                f"Expected `class_names` to hold {num_classes} names, one for each logit, but got {len(names)}."
            )
        if collector.logits_are_normalised:
            self._note(
                "The network's output looks like probabilities or log-probabilities, not logits; relevances are then "
                "those of probabilities. Pass `logits_module` or `logits_fn` to point to the logits."
            )
        # Now, because by the end of the epoch somebody may have exchanged the weights.
        self._copies = {name: plain_copy(layer) for name, layer in self._layers.items()}
        per_class = self._affordable_samples(records, num_classes)
        n_thumbnails = None if per_class is None else per_class * num_classes * len(records)
        self._thumbnail_side = thumbnail_side(n_thumbnails, self._settings.thumbnail_bytes)
        if self._images is not None and not self._thumbnail_side:
            self._note("The images do not fit into an eighth of `calibration_memory`, so the reports show none.")
        keeps = self._settings.calibration_samples != 0  # the same in all processes, whatever they can afford
        for name, record in records.items():
            n_channels, device = record.relevance.shape[1], record.relevance.device
            n_inputs = inputs_per_channel(self._layers[name])
            if n_inputs == 1:
                self._note(
                    f"Each channel of `{name}` reads a single input, so similarities are 1 or -1 and say little."
                )
            optimized = self._settings.method == "optimized"
            windows = None if optimized else tuple(record.seen.sums.shape[1:])
            thresholds = self._settings.relevance_thresholds
            self._statistics[name] = ChannelStatistics(num_classes, n_channels, thresholds, windows).to(device)
            if optimized:
                memory = self._settings.vector_bytes / len(records)
                self._vectors[name] = RelevanceVectors(num_classes, n_channels, n_inputs, memory).to(device)
            if keeps:
                self._samples[name] = CalibrationSamples(per_class, process_group=self._cpu_group)

    def _affordable_samples(self, records: dict[str, LayerRecord], num_classes: int) -> int | None:
        """Samples of each class that fit into the memory that the user allows."""
        wanted = self._settings.calibration_samples
        if wanted is None or wanted == 0:
            return wanted
        per_image = sum(_sample_bytes(record) for record in records.values())
        affordable = int(self._settings.calibration_memory * MEBIBYTE // (num_classes * per_image))
        if affordable < wanted:
            need = wanted * num_classes * per_image / MEBIBYTE
            self._note(
                f"Only {affordable} of {wanted} calibration samples of each class fit into `calibration_memory`="
                f"{self._settings.calibration_memory:g} MiB; {need:.0f} MiB would hold them all."
            )
        return min(wanted, affordable)

    def _note(self, text: str) -> None:
        rank_zero_warn(text)
        self._notes.append(text)

    def compute(self) -> PolysemanticityReport:
        """The report of everything seen so far.

        Raises:
            ValueError: If not a single batch was seen.
        """
        if not self._statistics:
            raise InputError("Expected at least one batch to analyse, but the data was empty.")
        evidence = {name: self._evidence(name, layer) for name, layer in self._copies.items()}
        self.release()
        found = [layer.detect() for layer in evidence.values()]
        statistics = next(iter(evidence.values())).statistics
        return PolysemanticityReport(
            layers=[self._summary(detection) for detection in found],
            channels=[channel for detection in found for channel in detection.channels],
            pairs=[pair for detection in found for pair in detection.pairs],
            settings={"layers": list(self._layers), **self._settings.to_json()},
            n_images=int(statistics.n_images.sum()),
            n_images_left_out=statistics.n_left_out,
            class_names=None if self._settings.class_names is None else list(map(str, self._settings.class_names)),
            notes=[*self._notes, *_remarks(statistics.n_images, statistics.n_left_out), *_losses(evidence)],
            _evidence=evidence,
        )

    def _evidence(self, name: str, layer: LinearLayer) -> LayerEvidence:
        vectors: ClassVectors | None = None
        if name in self._vectors:
            vectors = self._vectors[name].compute()
        samples: Samples | None = self._samples[name].compute() if name in self._samples else None
        statistics = self._statistics[name].compute()
        return LayerEvidence(name, layer, self._settings, statistics, vectors, samples)

    def _summary(self, detection: LayerDetection) -> LayerSummary:
        layer = self._layers[detection.layer]
        return LayerSummary.of(detection, channel_count(layer), inputs_per_channel(layer))


def _remarks(n_images: Tensor, n_left_out: int) -> list[str]:
    empty = int((n_images == 0).sum())
    remarks = []
    if n_left_out:
        remarks.append(images_left_out(n_left_out))
    if empty == len(n_images) - 1:
        remarks.append("All images are of one class; a channel is polysemantic for two classes or more.")
    elif empty:
        verb = "was" if empty == 1 else "were"
        remarks.append(f"{empty} of {len(n_images)} classes had no images and {verb} left out.")
    return remarks


def _losses(evidence: Mapping[str, LayerEvidence]) -> list[str]:
    return [
        f"{n_missing} of the (class, channel) entries that are relevant in `{name}` did not fit into the memory for "
        "relevance vectors, a quarter of `calibration_memory`, and were left out."
        for name, layer in evidence.items()
        if (n_missing := layer.n_missing())
    ]


def _is_usable(record: LayerRecord) -> bool:
    """Whether there is no NaN and no infinity."""
    sums = record.seen.inputs if record.seen.sums is None else record.seen.sums
    return is_finite(record.relevance) and is_finite(sums)  # a gradient that is not finite shows in the relevance


def _sample_bytes(record: LayerRecord) -> int:
    inputs: Tensor = record.seen.inputs
    return inputs[0].numel() * max(4, inputs.dtype.itemsize) + record.relevance.shape[1]
