"""The images that activate each channel most, and which sources made it fire: streamed, within a fixed memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_polydis.layers import channels_are_last, reads_padding
from lightning_polydis.processes import is_distributed
from lightning_polydis.sources import elements_at_once, source_relevances

if TYPE_CHECKING:
    from lightning_polydis.clusters.watching import Use
    from lightning_polydis.layers import LinearLayer

FREE, UNKNOWN = -1, -1
CHUNK_ELEMENTS, CACHED_ELEMENTS = 2**20, 2**18
"""Elements of relevance vectors that a CPU makes, and scales, at once."""

STATES = ("sides", "strengths", "images", "labels", "vectors")


class Sides:
    """Channels, each in the directions in which it may be used (no dataclass, see `statistics.ClassStatistics`).

    Args:
        channels: Channel of each side, ``[S]``, integer.
        signs: Its direction, 1 or -1, ``[S]``, integer.
        zeros: Output of each channel from which on it is on, ``[C]``, ``float32``; `None`: 0. Another number where a
            batch norm shifts the output before it is rectified.
    """

    def __init__(self, channels: Tensor, signs: Tensor, zeros: Tensor | None = None) -> None:
        self.channels, self.signs, self.zeros = channels, signs, zeros

    def __len__(self) -> int:
        return len(self.channels)

    def zero(self, channel: int) -> float:
        """Output from which on a channel is on."""
        return 0.0 if self.zeros is None else float(self.zeros[channel])

    def of_channel(self, channel: int) -> list[int]:
        """The sides of a channel, one or two."""
        found: list[int] = (self.channels == channel).nonzero()[:, 0].tolist()
        return found


class TopLists:
    """What `TopImages` has kept: for each side its images, the strongest first.

    Args:
        sides: Of the layer.
        starts: Where each side's images begin in what follows, and where the last one's end, ``[S + 1]``.
        strengths: Activation, ``[n]``: position sum of the positive part in the side's direction.
        images: Number of each image, unique over all processes, ``[n]``, integer.
        labels: Its class, or -1, ``[n]``, integer.
        vectors: Relevance of each source for the activation, scaled to unit length, ``[n, I]``, ``float16``.
    """

    def __init__(
        self, sides: Sides, starts: Tensor, strengths: Tensor, images: Tensor, labels: Tensor, vectors: Tensor
    ) -> None:
        self.sides, self.strengths, self.images, self.labels, self.vectors = sides, strengths, images, labels, vectors
        self._starts: list[int] = starts.tolist()

    def rows(self, side: int) -> slice:
        """Where the images of a side are, the strongest first."""
        return slice(self._starts[side], self._starts[side + 1])

    def strongest(self, depth: int) -> Tensor:
        """Numbers of the images that are among the ``depth`` strongest of any side, ascending."""
        starts = torch.tensor(self._starts)
        rank = torch.arange(len(self.images)) - starts[:-1].repeat_interleave(starts.diff())
        found: Tensor = self.images[rank < depth].unique()
        return found


class TopImages(Metric):
    r"""The images with the largest activation of each side of a layer's channels.

    The activation of a side of direction :math:`s` on an image is :math:`\sum_p \max(s z_p, 0)`, with :math:`z` the
    output above the channel's zero (`Sides`). With it goes what each source adds to the output,
    :math:`v_k = \sum_{p: s z_p > 0} \sum_{ij} s w_{kij} x_{k, p \oplus ij}`, at all positions where the side is on (the
    position of the maximum alone, as in arXiv:2404.06453, agrees less well with what images show).

    The memory is ``sides x limit x (2 x inputs + 20)`` bytes, whatever the number of images.

    Args:
        sides: The channels and their directions.
        n_inputs: Input channels that each channel reads.
        limit: Images of each side that are kept.

    Attributes:
        depth: Of how many images of each side the layer input is kept, by whoever does that: the fewest of any process.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.ones_(layer.weight).requires_grad_(False)
        >>> inputs = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, -1.0]])
        >>> top = TopImages(Sides(torch.tensor([0, 0]), torch.tensor([1, -1])), n_inputs=2, limit=1)
        >>> top.update(layer, inputs, layer(inputs), torch.tensor([7, 8, 9]))
        >>> top.trim()
        >>> top.compute().images  # the strongest of either direction
        tensor([8, 9])
    """

    full_state_update = False
    sides: list[Tensor]
    strengths: list[Tensor]
    images: list[Tensor]
    labels: list[Tensor]
    vectors: list[Tensor]
    depth: Tensor

    def __init__(self, sides: Sides, n_inputs: int, limit: int, **kwargs: Any) -> None:
        super().__init__(compute_with_cache=False, sync_on_compute=False, **kwargs)
        self._layer_sides, self._n_inputs, self.limit = sides, n_inputs, limit
        for name in STATES:  # of as many rows as are used, made when the data is complete
            self.add_state(name, [], dist_reduce_fx="cat")
        self.add_state("depth", torch.tensor(limit), dist_reduce_fx="min")
        self._forget()

    def _forget(self) -> None:
        # [S, limit], in no order; the strength of a free place is 0. Vectors, see `_row`: [limit * S, I]
        self._kept: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._forget()

    def update(
        self, layer: LinearLayer, inputs: Tensor, outputs: Tensor, images: Tensor, labels: Tensor | None = None
    ) -> None:
        """Take in a batch.

        Args:
            layer: The layer.
            inputs: Its inputs, ``[B, G * I, ...]`` or ``[B, ..., I]``, in ``float32`` or wider.
            outputs: Its outputs, ``[B, C, ...]`` or ``[B, ..., C]``.
            images: Number of each image, ``[B]``, integer.
            labels: Its class, -1 if unknown, ``[B]``, integer; `None`: all unknown.
        """
        if not self._kept:
            self._make_room(inputs.device)
        flat = self._above_zero(layer, inputs, outputs)
        strengths = self._strengths(flat)
        sides, places, rows = self._entering(strengths)
        self._kept["strengths"][sides, places] = strengths[rows, sides]
        self._kept["images"][sides, places] = images.to(sides.device)[rows]
        self._kept["labels"][sides, places] = UNKNOWN if labels is None else labels.to(sides.device)[rows]
        self._keep_vectors(layer, inputs, flat, sides, places, rows)

    def _make_room(self, device: torch.device) -> None:
        shape = (len(self._layer_sides), self.limit)
        self._channels, self._signs = self._layer_sides.channels.to(device), self._layer_sides.signs.to(device)
        self._kept = {
            "strengths": torch.zeros(shape, dtype=torch.float32, device=device),
            "images": torch.full(shape, FREE, device=device),
            "labels": torch.full(shape, UNKNOWN, device=device),
            "vectors": torch.empty(shape[0] * shape[1], self._n_inputs, dtype=torch.float16, device=device),
        }

    def _strengths(self, flat: Tensor) -> Tensor:
        """Activation of each side, ``[B, S]``, of outputs ``[B, C, P]``."""
        positive, negative = flat.clamp(min=0).sum(2).float(), -flat.clamp(max=0).sum(2).float()
        return torch.where(self._signs > 0, positive[:, self._channels], negative[:, self._channels])

    def _entering(self, strengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which images come in: side, place that they take, and row in the batch, ``[n]`` each, sides ascending."""
        new = torch.where(strengths > 0, strengths, -1.0).T  # below free places, which no silent image takes
        joined = torch.cat([self._kept["strengths"], new], dim=1)
        stays = torch.zeros_like(joined, dtype=torch.bool)
        stays.scatter_(1, joined.topk(self.limit, dim=1).indices, True)
        sides, rows = stays[:, self.limit :].nonzero(as_tuple=True)
        _, places = (~stays[:, : self.limit]).nonzero(as_tuple=True)  # as many in each side as come in
        return sides, places, rows

    def _keep_vectors(
        self, layer: LinearLayer, inputs: Tensor, flat: Tensor, sides: Tensor, places: Tensor, rows: Tensor
    ) -> None:
        n_vectors = max(1, elements_at_once(inputs.device, CHUNK_ELEMENTS) // self._n_inputs)
        order = rows.argsort(stable=True)  # image by image, as they are made
        sides, places, rows = sides[order], places[order], rows[order]
        for sign in (1, -1):
            is_on = (flat > 0) if sign > 0 else (flat < 0)
            own = (self._signs[sides] == sign).nonzero()[:, 0]
            for part in own.split(n_vectors) if len(own) else ():
                first, last = int(rows[part[0]]), int(rows[part[-1]]) + 1
                gradient = _shaped(sign * is_on[first:last].to(inputs.dtype), layer)
                some = (rows[part] - first, self._channels[sides[part]])
                found = source_relevances(layer, inputs[first:last], gradient, *some)
                self._write_units(found, sides[part], places[part])

    def _write_units(self, vectors: Tensor, sides: Tensor, places: Tensor) -> None:
        size = max(1, elements_at_once(vectors.device, CACHED_ELEMENTS) // self._n_inputs)
        for part, own, free in zip(vectors.split(size), sides.split(size), places.split(size), strict=True):
            units = torch.nn.functional.normalize(part.float(), dim=1)
            self._kept["vectors"].index_copy_(0, self._row(own, free), units.to(torch.float16))

    def least(self, depth: int) -> Tensor:
        """The activation of the last of the ``depth`` strongest images of each side, 0 if there are fewer, ``[S]``."""
        return self._kept["strengths"].topk(min(depth, self.limit), dim=1).values[:, -1]

    def strengths_of(self, layer: LinearLayer, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Activation of each side on a batch, ``[B, S]``."""
        return self._strengths(self._above_zero(layer, inputs, outputs))

    def _above_zero(self, layer: LinearLayer, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Outputs above their channels' zeros, ``[B, C, P]``; 0 where padding is read."""
        flat = outputs.movedim(-1, 1) if channels_are_last(layer) else outputs
        flat = flat.flatten(2) if flat.ndim > 2 else flat[..., None]
        zeros = self._layer_sides.zeros
        above = flat if zeros is None else flat - zeros.to(flat)[:, None]
        return above.masked_fill(reads_padding(layer, inputs), 0)

    def strongest(self, depth: int) -> set[int]:
        """Numbers of the images that are, so far, among the ``depth`` strongest of any side."""
        found = self._kept["strengths"].topk(min(depth, self.limit), dim=1)
        return set(self._kept["images"].gather(1, found.indices)[found.values > 0].tolist())

    def trim(self) -> None:
        """Leave out what is not among the strongest of all processes, before they exchange the rest.

        The last thing before ``compute``.
        """
        if not self._kept:
            self._make_room(self.depth.device)  # where the processes exchange
        strengths = self._kept["strengths"]
        least = self._least_of_all(strengths)
        sides, places = ((strengths > 0) & (strengths >= least[:, None])).nonzero(as_tuple=True)
        order = _order(sides, -strengths[sides, places], self._kept["images"][sides, places])
        sides, places = sides[order], places[order]
        self.sides, self.vectors = [sides], [self._kept.pop("vectors")[self._row(sides, places)]]
        for name in ("strengths", "images", "labels"):
            setattr(self, name, [self._kept[name][sides, places]])
        self._kept = {}

    def _row(self, sides: Tensor, places: Tensor) -> Tensor:
        """Where vectors are kept: place by place, so that what one image brings lies together while lists fill."""
        return places * len(self._layer_sides) + sides

    def _least_of_all(self, strengths: Tensor) -> Tensor:
        """The smallest strength that is kept of each side, over all processes, ``[S]``."""
        if not is_distributed():
            return torch.zeros_like(strengths[:, 0])
        everyone = torch.cat(gather_all_tensors(strengths), dim=1)
        return everyone.topk(self.limit, dim=1).values[:, -1]

    def compute(self) -> TopLists:
        """The lists of all processes, on the CPU."""
        sides, strengths, images, labels, vectors = (dim_zero_cat(getattr(self, name)).cpu() for name in STATES)
        order = _order(sides, -strengths, images)
        rank = _ranks(sides[order], len(self._layer_sides))
        order = order[rank < self.limit]
        counts = sides[order].bincount(minlength=len(self._layer_sides))
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        parts = (strengths, images, labels, vectors)
        if not torch.equal(order, torch.arange(len(sides))):  # those of one process are in order, and large
            parts = (strengths[order], images[order], labels[order], vectors[order])
        return TopLists(self._layer_sides, starts, *parts)


def _shaped(flat: Tensor, layer: LinearLayer) -> Tensor:
    """``[B, C, P]`` as `sources.source_relevances` takes gradients of the layer's output."""
    return flat.movedim(1, -1) if channels_are_last(layer) else flat


def _order(*keys: Tensor) -> Tensor:
    """Order by the first key, within it by the second, and so on."""
    order = torch.arange(len(keys[0]), device=keys[0].device)
    for key in reversed(keys):
        order = order[key[order].argsort(stable=True)]
    return order


def _ranks(sides: Tensor, n_sides: int) -> Tensor:
    """Place of each row among those of its side, for ascending sides."""
    counts = sides.bincount(minlength=n_sides)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(sides)) - starts[sides]


def sides_of(n_channels: int, use: Use | None) -> Sides:
    """The sides of a layer's channels.

    Args:
        n_channels: Number of channels.
        use: How they are used; `None`: in both directions.

    Returns:
        One side for each channel, or two.
    """
    channels = torch.arange(n_channels)
    if use is None:
        return Sides(channels.repeat(2), torch.tensor([1, -1]).repeat_interleave(n_channels))
    zeros = use.zeros()
    return Sides(channels, use.signs(), zeros if bool(zeros.any()) else None)
