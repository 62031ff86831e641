"""The analysis of a network's strongest images, batch by batch, whoever runs it: no labels, no logits, no gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_polydis._checks import InputError
from lightning_polydis._text import counted, images_left_out
from lightning_polydis.batches import check_module_name, images_of, labels_of
from lightning_polydis.clusters.evidence import ClusterEvidence
from lightning_polydis.clusters.finding import MIN_IMAGES
from lightning_polydis.clusters.pool import InputPool
from lightning_polydis.clusters.top_images import TopImages, TopLists, sides_of
from lightning_polydis.clusters.watching import LayerWatcher, Seen
from lightning_polydis.discovery import LayerDiscovery
from lightning_polydis.forward import full_precision
from lightning_polydis.layers import (
    LinearLayer,
    at_least_single,
    channel_count,
    find_layer,
    inputs_per_channel,
    is_finite,
    plain_copy,
    reads_padding,
)
from lightning_polydis.processes import cpu_group, everyones, is_distributed, let_go
from lightning_polydis.report import PolysemanticityReport
from lightning_polydis.settings import MEBIBYTE
from lightning_polydis.summary import LayerSummary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchmetrics import Metric

    from lightning_polydis.settings import AnalysisSettings
    from lightning_polydis.thumbnails import Normalisation

MAX_IMAGES = 200
"""Images of each side of a channel that are kept at most."""

ROOM = 0.9
"""Part of the memory for inputs that is used once some had to go, lest some have to go with each batch."""

VECTOR_SHARE = 2
"""Memory for the strongest images' vectors, over what class-conditional vectors may take."""

RANK_BITS = 40
"""Bits of an image's number that count it; those before name the process."""


class ClusterAnalysis:
    """Collects the strongest images of some layers' channels; used like `analysis.ChannelAnalysis`.

    Args:
        model: The network, or whatever contains it.
        settings: How to analyse, with ``concepts="clusters"``.
        note: What the report's reader should know.
        normalisation: That of the data set's transforms, for pictures.

    Raises:
        ValueError: If a layer is unknown or cannot be analysed.
    """

    outermost: nn.Module | None = None  # nothing has to come after the layers

    def __init__(
        self,
        model: nn.Module,
        settings: AnalysisSettings,
        note: str | None = None,
        normalisation: Normalisation | None = None,
    ) -> None:
        check_module_name(model, settings.logits_module)
        self._model, self._settings = model, settings
        self._denormalize = normalisation if settings.denormalize is None else settings.denormalize
        self._notes = [] if note is None else [note]
        self._layers: dict[str, LinearLayer] = {}
        self._copies: dict[str, LinearLayer] = {}
        self._top: dict[str, TopImages] = {}
        self._pools: dict[str, InputPool] = {}
        self._image_bytes: dict[str, int] = {}
        self._lists: dict[str, TopLists] = {}
        self._pruned: dict[str, int] = {}  # inputs that were left when the pool was last looked through
        self._n_images = self._n_left_out = 0
        self._labels: Tensor | None = None
        self._images: Tensor | None = None
        self._cpu_group = cpu_group()  # here, where all processes come by
        self._observer: LayerWatcher | LayerDiscovery
        if settings.layer_names is None:
            self._observer = LayerDiscovery(model, logits_fn=settings.logits_fn, logits_module=settings.logits_module)
        else:
            self._observer = self._watcher_for(settings.layer_names)

    def _watcher_for(self, names: Sequence[str]) -> LayerWatcher:
        self._layers = {name: find_layer(self._model, name) for name in names}
        return LayerWatcher(self._model, self._layers)

    def start_batch(self, batch: Any, *, wrapped: bool = False, rehearsal: bool = False) -> None:
        """As `analysis.ChannelAnalysis.start_batch`; classes, where the batch holds any, are only for the report."""
        self._labels, self._images = labels_of(batch, self._settings), images_of(batch)
        if isinstance(self._observer, LayerDiscovery):
            self._observer.start(wrapped=wrapped, rehearsal=rehearsal)
        else:
            self._observer.start(rehearsal=rehearsal)

    def finish_batch(self) -> None:
        """As `analysis.ChannelAnalysis.finish_batch`."""
        if isinstance(self._observer, LayerDiscovery):
            self._observer = self._chosen(self._observer)
        seen = self._observer.finish()
        if seen:
            with torch.no_grad(), full_precision():
                self._add(seen, self._observer)
        self._images = None

    def _chosen(self, discovery: LayerDiscovery) -> LayerWatcher:
        """Settle on a layer after the first pass, and make that pass again to see the layer in it."""
        name, call = discovery.finish()
        self._observer = watcher = self._watcher_for([name])  # before the hooks are on, which `close` takes off
        watcher.start()
        with watcher.alone():
            call.replay()
        return watcher

    @property
    def is_empty(self) -> bool:
        """Whether not a single batch was taken in."""
        return not self._top

    def close(self) -> None:
        """Take every hook off."""
        self._observer.close()

    def release(self) -> None:
        """Take every hook off and let the data go."""
        self.close()
        self._images = None
        let_go(self._metrics())

    def _metrics(self) -> list[Metric]:
        return [*self._top.values(), *self._pools.values()]

    def _add(self, seen: dict[str, Seen], watcher: LayerWatcher) -> None:
        if not self._top:
            self._prepare(seen, watcher)
        n_images = _number_of_images(seen)
        if not all(is_finite(part) for one in seen.values() for part in one):
            self._n_left_out += n_images
            return
        rank = torch.distributed.get_rank() if is_distributed() else 0
        numbers = (rank << RANK_BITS) + self._n_images + torch.arange(n_images)
        self._n_images += n_images
        for name, one in seen.items():
            labels = self._labels if self._labels is not None and len(self._labels) == len(one.inputs) else None
            inputs, outputs = at_least_single(one.inputs), at_least_single(one.outputs)
            self._top[name].update(self._layers[name], inputs, outputs, numbers, labels)
            if name in self._pools:
                self._keep(name, inputs, outputs, numbers, labels)

    def _keep(self, name: str, inputs: Tensor, outputs: Tensor, numbers: Tensor, labels: Tensor | None) -> None:
        """Keep the inputs of those images that are now among the strongest, and make room for them."""
        top, pool = self._top[name], self._pools[name]
        needed = top.least(int(top.depth)).clamp(min=torch.finfo(torch.float32).tiny)  # silent images have no strength
        rows = (top.strengths_of(self._layers[name], inputs, outputs) >= needed).any(1).nonzero()[:, 0]
        own = rows.cpu()
        images = self._images if self._images is not None and len(self._images) == len(inputs) else None
        shown = None if images is None else images[rows.to(images.device)]
        known = None if labels is None else labels[rows.to(labels.device)]
        pool.update(numbers[own].tolist(), inputs[rows], known, shown, self._denormalize)
        self._make_room(name)

    def _make_room(self, name: str) -> None:
        """When inputs take too much memory, let those go whose images are no longer strong, then the less strong."""
        top, pool, limit = self._top[name], self._pools[name], self._most_images(name)
        if len(pool) <= (max(MAX_IMAGES, 2 * self._pruned.get(name, 0)) if limit is None else limit):
            return
        pool.keep_only(top.strongest(int(top.depth)))
        self._pruned[name] = len(pool)
        if limit is None:
            return
        while len(pool) > ROOM * limit and top.depth > 1:
            top.depth.fill_(_next_depth(int(top.depth)))
            pool.keep_only(top.strongest(int(top.depth)))
        pool.keep_first(limit)  # where there is not even room for the strongest image of each side

    def _most_images(self, name: str) -> int | None:
        """Images whose layer input fits into the memory that the user allows; `None`: any number."""
        if self._settings.calibration_samples is None:
            return None
        return int(self._settings.calibration_memory * MEBIBYTE / len(self._layers) // self._image_bytes[name])

    def _prepare(self, seen: dict[str, Seen], watcher: LayerWatcher) -> None:
        # Copies now, because by the end of the epoch somebody may have exchanged the weights.
        self._copies = {name: plain_copy(layer) for name, layer in self._layers.items()}
        for name, layer in self._layers.items():
            self._warn_of_padding(name, seen[name].inputs)
            sides = sides_of(channel_count(layer), watcher.uses[name])
            per_image = len(sides) * (2 * inputs_per_channel(layer) + 20)
            affordable = int(self._settings.vector_bytes * VECTOR_SHARE / len(self._layers) // per_image)
            limit = max(1, min(MAX_IMAGES, affordable))
            if limit < MAX_IMAGES:
                self._note_limit(name, limit, 2 * len(self._layers) * per_image / MEBIBYTE)
            device = seen[name].inputs.device
            self._top[name] = TopImages(sides, inputs_per_channel(layer), limit).to(device)
            inputs = seen[name].inputs
            self._image_bytes[name] = inputs[0].numel() * max(4, inputs.dtype.itemsize)
            if self._settings.calibration_samples != 0:
                picture_bytes = self._settings.thumbnail_bytes / len(self._layers)
                self._pools[name] = pool = InputPool(picture_bytes, process_group=self._cpu_group)
                pool.update([], inputs[:0], None, None, None)  # a process may keep nothing, but has to know its shape

    def _warn_of_padding(self, name: str, inputs: Tensor) -> None:
        if bool(reads_padding(self._layers[name], inputs).all()):
            self._note(
                f"Every position of `{name}` reads padding. Such positions are left out, because which of them are on "
                "makes clusters that are no concepts, so nothing is found here. Take larger images, or another layer."
            )

    def _note_limit(self, name: str, limit: int, per_image: float) -> None:
        few = f"; fewer than {MIN_IMAGES} show no clusters, which takes {MIN_IMAGES * per_image:.3g} MiB"
        self._note(
            f"Only the {limit} strongest images of each channel of `{name}`, not {MAX_IMAGES}, fit into half of "
            f"`calibration_memory`={self._settings.calibration_memory:g} MiB{few if limit < MIN_IMAGES else ''}; "
            f"{MAX_IMAGES * per_image:.3g} MiB would hold them all."
        )

    def _note(self, text: str) -> None:
        rank_zero_warn(text)
        self._notes.append(text)

    def gather(self) -> None:
        """Exchange what the processes of a distributed run have seen; all of them, and then ``compute`` does not."""
        self._n_images = sum(everyones(self._n_images))
        self._n_left_out = sum(everyones(self._n_left_out))
        if not all(everyones(all(pool.has_pictures for pool in self._pools.values()))):
            self._note("The images do not fit into an eighth of `calibration_memory`, so the reports show none.")
        for name, top in self._top.items():
            top.trim()
            top.sync()
            depth = int(top.depth)  # of all processes; `compute` puts that of this one back
            self._lists[name] = top.compute()
            if name in self._pools:
                wanted = self._lists[name].strongest(self._fitting_depth(name, depth)).tolist()
                self._pools[name].join(set(wanted[: self._most_images(name)]))
                self._pools[name].sync()

    def _fitting_depth(self, name: str, depth: int) -> int:
        """How many images of each side have their inputs kept, now that those of all processes are to fit."""
        limit = self._most_images(name)
        while limit is not None and depth > 1 and len(self._lists[name].strongest(depth)) > limit:
            depth = _next_depth(depth)
        if limit is not None and len(self._lists[name].strongest(depth)) > limit:
            self._note(
                f"The layer inputs of only {counted(limit, 'image')} fit into `calibration_memory`="
                f"{self._settings.calibration_memory:g} MiB for `{name}`: too few to choose and judge splits well."
            )
        elif depth < self._top[name].limit:
            self._note(
                f"The layer inputs of only the {depth} strongest images of each channel of `{name}` fit into "
                f"`calibration_memory`={self._settings.calibration_memory:g} MiB; those choose and judge splits."
            )
        return depth

    def compute(self) -> PolysemanticityReport:
        """As `analysis.ChannelAnalysis.compute`.

        Raises:
            ValueError: If not a single batch was seen.
        """
        if not self._top:
            raise InputError("Expected at least one batch to analyse, but the data was empty.")
        evidence = {name: self._evidence(name, layer) for name, layer in self._copies.items()}
        self.release()
        with full_precision():
            found = [layer.detect() for layer in evidence.values()]
        names = self._settings.class_names
        return PolysemanticityReport(
            layers=[LayerSummary.of(one, *_size(self._copies[one.layer])) for one in found],
            channels=[channel for detection in found for channel in detection.channels],
            pairs=[pair for detection in found for pair in detection.pairs],
            settings={"layers": list(self._layers), **self._settings.to_json()},
            n_images=self._n_images,
            n_images_left_out=self._n_left_out,
            class_names=None if names is None else list(map(str, names)),
            notes=[*self._notes, *self._remarks()],
            _evidence=evidence,
        )

    def _evidence(self, name: str, layer: LinearLayer) -> ClusterEvidence:
        pool = self._pools[name].compute() if name in self._pools else None
        return ClusterEvidence(name, layer, self._settings, self._lists[name], pool)

    def _remarks(self) -> list[str]:
        remarks = []
        if self._n_left_out:
            remarks.append(images_left_out(self._n_left_out))
        if self._n_images < MIN_IMAGES:
            remarks.append(
                f"Clusters take at least {MIN_IMAGES} images that activate a channel strongly, and there were only "
                f"{counted(self._n_images, 'image')}."
            )
        return remarks


def _number_of_images(seen: dict[str, Seen]) -> int:
    """Images of a batch, which every layer has to read alike."""
    counts = {name: len(one.inputs) for name, one in seen.items()}
    first, *others = counts
    odd = next((name for name in others if counts[name] != counts[first]), None)
    if odd is not None:
        raise InputError(
            f"Expected the layers to read as many images as each other, but `{first}` reads {counts[first]} and "
            f"`{odd}` {counts[odd]} (parts of images, perhaps). Analyse one at a time."
        )
    return counts[first]


def _next_depth(depth: int) -> int:
    return max(1, depth * 4 // 5)


def _size(layer: LinearLayer) -> tuple[int, int]:
    return channel_count(layer), inputs_per_channel(layer)
