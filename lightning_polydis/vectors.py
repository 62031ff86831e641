"""Class-conditional relevance vectors, streamed: sums for some (class, channel) entries, never for all of them."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

if TYPE_CHECKING:
    from collections.abc import Sequence

N_GROUPS = 8
"""Groups of images that sums are kept for, so that it can be told how sure a mean is."""

FREE = -1
KEPT_WHEN_FULL = 0.75
"""Part of the entries that stay when there is no room left, so that there is some again for a while."""


class ClassVectors:
    """What `RelevanceVectors` has summed up (no dataclass, as `statistics.ClassStatistics`).

    Args:
        keys: ``class * n_channels + channel`` of each entry, ``[N]``, integer; an entry may appear once per process. -1
            for a row that holds none.
        sums: Sum of the images' relevance vectors, ``[N, G, I]``, by group of images.
        counts: Images in each sum, ``[N, G]``.
        n_channels: Output channels of the layer.
    """

    def __init__(self, keys: Tensor, sums: Tensor, counts: Tensor, n_channels: int) -> None:
        used = (keys != FREE).nonzero()[:, 0]
        merged, place = keys[used].unique(return_inverse=True)
        if len(merged) < len(used):  # several processes
            sums = sums.new_zeros(len(merged), *sums.shape[1:]).index_add_(0, place, sums[used])
            counts = counts.new_zeros(len(merged), counts.shape[1]).index_add_(0, place, counts[used])
            used = torch.arange(len(merged))
        else:
            used = used[place.argsort()]  # the rows stay where they are: they may be a lot
        self._rows = dict(zip(merged.tolist(), used.tolist(), strict=True))
        self._sums, self._counts = sums, counts
        self._n_channels = n_channels
        self._classes: dict[int, list[int]] = {}
        for key in self._rows:
            self._classes.setdefault(key % n_channels, []).append(key // n_channels)

    def classes(self, channel: int) -> list[int]:
        """Classes that have an entry for a channel, ascending."""
        return self._classes.get(channel, [])

    def known(self, num_classes: int) -> Tensor:
        """Which entries there are, ``[K, C]``, boolean."""
        there = torch.zeros(num_classes * self._n_channels, dtype=torch.bool)
        there[list(self._rows)] = True
        return there.view(num_classes, self._n_channels)

    def groups(self, channel: int, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Sums ``[T, G, I]``, ``float64``, and numbers of images ``[T, G]`` of a channel's entries for some classes."""
        rows = [self._rows[label * self._n_channels + channel] for label in classes]
        return self._sums[rows].double(), self._counts[rows]

    def means(self, channel: int, classes: Sequence[int]) -> Tensor:
        """Mean relevance vectors of a channel for some classes, ``[T, I]``, ``float64``."""
        sums, counts = self.groups(channel, classes)
        return sums.sum(1) / counts.sum(1).clamp(min=1)[:, None]


class RelevanceVectors(Metric):
    r"""Means over a class's images of `sources.source_relevances`, for the entries that matter, within a fixed memory.

    An entry is a class and a channel. As many classes as fit into half of the memory have entries for all channels,
    from their first image on (all classes, if all fit); which classes these are does not depend on the order in which
    they are seen. For the others an entry is opened when the channel is first relevant for an image of the class. When
    the memory is full, those entries give way that were relevant for the smallest share of their class's images.

    An entry takes ``groups x inputs x 4`` bytes. For each batch ask which entries are ``wanted``, then ``update``.

    Args:
        num_classes: Number of classes.
        n_channels: Output channels of the layer.
        n_inputs: Input channels that each of them reads.
        max_bytes: Memory for the sums.
        n_groups: Groups of images that sums are kept for.

    Example:
        >>> import torch
        >>> vectors = RelevanceVectors(num_classes=2, n_channels=3, n_inputs=2, max_bytes=2**20)
        >>> targets = torch.tensor([1])
        >>> images, channels = vectors.wanted(torch.tensor([[True, False, False]]), targets)
        >>> vectors.update(torch.ones(len(images), 2), images, channels, targets)
        >>> vectors.compute().means(0, [1])
        tensor([[1., 1.]], dtype=torch.float64)
    """

    full_state_update = False
    keys: list[Tensor]
    sums: list[Tensor]
    counts: list[Tensor]

    def __init__(
        self,
        num_classes: int,
        n_channels: int,
        n_inputs: int,
        max_bytes: float,
        n_groups: int = N_GROUPS,
        **kwargs: Any,
    ) -> None:
        super().__init__(compute_with_cache=False, sync_on_compute=False, **kwargs)
        self.n_channels, self.n_inputs, self.n_groups = n_channels, n_inputs, n_groups
        everything = num_classes * n_channels
        self.max_entries = min(int(max_bytes // (4 * n_inputs * n_groups)), everything)
        self.max_full = num_classes if everything <= self.max_entries else self.max_entries // (2 * n_channels)
        for name in ("keys", "sums", "counts"):
            self.add_state(name, [], dist_reduce_fx="cat")
        # A fixed order of preference, unrelated to the order in which classes are numbered or seen.
        self._rank = torch.randperm(num_classes, generator=torch.Generator().manual_seed(0)).tolist()
        self._forget()

    def _forget(self) -> None:
        self._slots = torch.empty(0)  # row of each entry, [K, C], or FREE
        self._hits = torch.empty(0)  # how often each channel was relevant for each class, [K, C], with an entry or not
        self._n_images = torch.empty(0)  # of each class, [K]
        self._n_used = 0
        self._free = torch.empty(0, dtype=torch.long)  # rows that hold no entry, ascending
        self._turns: dict[int, int] = {}  # images of each class that were given to a group
        self._full: set[int] = set()  # classes with entries for all channels

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._forget()

    def wanted(self, relevant: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Open entries as a batch asks for, and say which images and channels have one.

        Args:
            relevant: Which channels are relevant for which image, ``[B, C]``, boolean.
            targets: Class indices, ``[B]``, integer.

        Returns:
            Place of the image in the batch and channel of each wanted pair, ``[n]`` each, images ascending.
        """
        if not self.keys:
            self._make_room(relevant.device)
        self._hits.index_add_(0, targets, relevant.to(self._hits.dtype))
        self._n_images.index_add_(0, targets, torch.ones_like(targets, dtype=self._n_images.dtype))
        for label in sorted(set(targets.tolist()) - set(self._turns), key=self._rank.__getitem__):
            self._meet(label)
        images, channels = (relevant & (self._slots[targets] == FREE)).nonzero(as_tuple=True)
        if len(images):
            self._open((targets[images] * self.n_channels + channels).unique())
        return (self._slots[targets] != FREE).nonzero(as_tuple=True)  # type: ignore[return-value]

    def _make_room(self, device: torch.device) -> None:
        rows, shape = self.max_entries, (len(self._rank), self.n_channels)
        self.keys.append(torch.full((rows,), FREE, device=device))
        # Group by group in memory: what an image adds to lies together, which is several times as fast.
        self.sums.append(_zeros((self.n_groups, rows, self.n_inputs), device).transpose(0, 1))
        self.counts.append(_zeros((self.n_groups, rows), device).T)
        self._free = torch.arange(rows, device=device)
        self._slots = torch.full(shape, FREE, device=device)
        self._hits, self._n_images = (torch.zeros(s, dtype=torch.float32, device=device) for s in (shape, shape[:1]))

    def _meet(self, label: int) -> None:
        """Give a class entries for all channels, if its turn comes before that of another one."""
        self._turns[label] = 0
        if len(self._full) >= self.max_full:
            last = max(self._full, key=self._rank.__getitem__, default=label)
            if self._rank[label] >= self._rank[last]:
                return
            self._full.discard(last)
            own = self._slots[last]
            self._close(own[(own != FREE) & (self._hits[last] == 0)])
        self._full.add(label)
        row = torch.arange(self.n_channels, device=self._slots.device)
        self._open((label * self.n_channels + row)[self._slots[label] == FREE])

    def _open(self, keys: Tensor) -> None:
        """New entries, as far as there is room for them or they are more likely than others."""
        if self._n_used + len(keys) > self.max_entries:
            keys = self._make_way(keys)
        rows, self._free = self._free[: len(keys)], self._free[len(keys) :]
        self.keys[0][rows] = keys
        self._slots.view(-1)[keys] = rows
        self._n_used += len(keys)

    def _make_way(self, keys: Tensor) -> Tensor:
        """Close the entries that were relevant least often, some more than needed; which of the new ones find room."""
        full = torch.tensor(sorted(self._full), dtype=torch.long, device=keys.device)
        taken = self.keys[0]
        loose = ((taken != FREE) & ~torch.isin(taken // self.n_channels, full)).nonzero()[:, 0]
        n_stay = ceil(KEPT_WHEN_FULL * (self.max_entries - self._n_used + len(loose)))
        everyone = torch.cat([taken[loose], keys])
        labels = everyone // self.n_channels
        share = self._hits.view(-1)[everyone] / self._n_images[labels].clamp(min=1)
        share[torch.isin(labels, full)] = 2  # these come first
        order = share.argsort(descending=True, stable=True)
        self._close(loose[order[n_stay:][order[n_stay:] < len(loose)]])
        return keys[(order[:n_stay][order[:n_stay] >= len(loose)] - len(loose)).sort().values]

    def _close(self, rows: Tensor) -> None:
        self._slots.view(-1)[self.keys[0][rows]] = FREE
        self.keys[0][rows] = FREE
        for values in (self.sums[0], self.counts[0]):
            values[rows] = 0
        self._n_used -= len(rows)
        self._free = torch.cat([rows, self._free]).sort().values

    def update(self, vectors: Tensor, images: Tensor, channels: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            vectors: Relevance vector of each wanted pair, ``[n, I]``.
            images: As ``wanted`` gave them, ``[n]``.
            channels: Likewise, ``[n]``.
            targets: Class indices, ``[B]``, integer.
        """
        turns = [self._next_group(label) for label in targets.tolist()]
        groups = torch.tensor(turns, dtype=torch.long, device=targets.device)
        sums, counts = self.sums[0].transpose(0, 1), self.counts[0].T
        places = groups[images] * self.max_entries + self._slots[targets[images], channels]
        sums.view(-1, self.n_inputs).index_add_(0, places, vectors.to(sums.dtype))
        counts.view(-1).index_add_(0, places, torch.ones_like(places, dtype=counts.dtype))

    def _next_group(self, label: int) -> int:
        turn = self._turns[label]
        self._turns[label] = turn + 1
        return turn % self.n_groups

    def trim(self) -> None:
        """Let rows go that are not used, before the processes exchange theirs. The last thing before ``compute``."""
        if self.keys:
            used = int((self.keys[0] != FREE).nonzero().max()) + 1 if self._n_used else 0
            for state in (self.keys, self.sums, self.counts):
                few = used < len(state[0]) / 2  # whoever pickles a part of them would write all
                state[0] = state[0][:used].clone() if few else state[0][:used]

    def compute(self) -> ClassVectors:
        """The sums of all processes, on the CPU."""
        if isinstance(self.keys, list) and not self.keys:  # not a single usable batch
            self._make_room(torch.device("cpu"))
        keys, sums, counts = (_whole(state).cpu() for state in (self.keys, self.sums, self.counts))
        return ClassVectors(keys, sums, counts, self.n_channels)


def _whole(state: Tensor | list[Tensor]) -> Tensor:
    """All rows of a state, which in a single process is one piece; a copy of that would be a lot."""
    return state[0] if isinstance(state, list) and len(state) == 1 else dim_zero_cat(state)


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=torch.float32, device=device)
    return torch.from_numpy(np.zeros(shape, dtype=np.float32))  # takes memory only once it is written to
