"""Layer inputs of the strongest images, which choose and judge splits, and small pictures of them."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_polydis.processes import joined
from lightning_polydis.thumbnails import LARGEST, SMALLEST, as_large_as, at_most, exchanged, thumbnails, to_exchange

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning_polydis.thumbnails import Normalisation

STATES = ("images", "labels", "inputs", "pictures")


class _Entry(NamedTuple):
    label: int
    inputs: Tensor
    picture: Tensor  # [3, h, w], of no size if there is none


class PooledInputs:
    """What `InputPool` has kept (no dataclass, as `statistics.ClassStatistics`).

    Args:
        images: Number of each image, ``[n]``, integer.
        labels: Its class, or -1, ``[n]``, integer.
        inputs: The layer's inputs, ``[n, G * I, ...]`` or ``[n, ..., I]``.
        pictures: ``[n, 3, h, w]``, ``uint8``, or `None`.
    """

    def __init__(self, images: Tensor, labels: Tensor, inputs: Tensor, pictures: Tensor | None) -> None:
        self.images, self.labels, self.inputs, self.pictures = images, labels, inputs, pictures


class InputPool(Metric):
    """The layer's inputs for images that are asked for by number, on the CPU.

    An image takes its layer input in its own precision (``float32`` at least), and a thumbnail. Thumbnails are made
    smaller when theirs is no longer enough memory, and left out when that is not enough for anything to be seen.

    Args:
        picture_bytes: Memory for thumbnails.

    Example:
        >>> import torch
        >>> pool = InputPool(picture_bytes=0)
        >>> pool.update([5, 6], torch.ones(2, 4), torch.tensor([0, 1]), None, None)
        >>> pool.join({6})
        >>> pool.compute().images
        tensor([6])
    """

    full_state_update = False
    images: list[Tensor]
    labels: list[Tensor]
    inputs: list[Tensor]
    pictures: list[Tensor]

    def __init__(self, picture_bytes: float, **kwargs: Any) -> None:
        super().__init__(compute_with_cache=False, sync_on_compute=False, **kwargs)
        for name in STATES:  # not joined: inputs and pictures of other processes may have another shape
            self.add_state(name, [], dist_reduce_fx=None)
        self._picture_bytes = picture_bytes
        self._forget()

    def _forget(self) -> None:
        self._kept: dict[int, _Entry] = {}
        self._none: Tensor | None = None  # no inputs, but of the shape that they have
        self._side = LARGEST

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._forget()

    def __len__(self) -> int:
        return len(self._kept)

    def update(
        self,
        images: Sequence[int],
        inputs: Tensor,
        labels: Tensor | None,
        pictures: Tensor | None,
        denormalize: Callable[[Tensor], Tensor] | Normalisation | None,
    ) -> None:
        """Keep images; those whose input has another shape than the first ones' are passed over.

        Args:
            images: Their numbers, ``n`` of them.
            inputs: ``[n, ...]``; half precision is widened to ``float32``.
            labels: Classes, -1 if unknown, ``[n]``; `None`: all unknown.
            pictures: The images as the network takes them, ``[n, 1, H, W]`` or ``[n, 3, H, W]``, or `None`.
            denormalize: See `thumbnails.thumbnails`.
        """
        wide = inputs.float().cpu() if inputs.dtype.itemsize < 4 else inputs.cpu()
        self._none = wide[:0].clone() if self._none is None else self._none
        if not images or wide.shape[1:] != self._none.shape[1:]:
            return
        small = torch.empty(len(images), 3, 0, 0, dtype=torch.uint8)
        if pictures is not None and self._side >= SMALLEST and self._picture_bytes > 0:
            small = thumbnails(pictures, self._side, denormalize)
        known = [-1] * len(images) if labels is None else labels.tolist()
        for place, number in enumerate(images):  # copies of rows: a view would keep the whole batch
            self._kept[number] = _Entry(known[place], wide[place].clone(), small[place].clone())
        self._shrink_pictures()

    def _shrink_pictures(self) -> None:
        """Make room when thumbnails take too much: all of them smaller, or none."""
        while self._side >= SMALLEST and self._bytes_of_pictures() > self._picture_bytes:
            self._side = self._side * 3 // 4
            for number, entry in self._kept.items():
                self._kept[number] = entry._replace(picture=_smaller(entry.picture, self._side))

    def _bytes_of_pictures(self) -> int:
        return sum(entry.picture.numel() for entry in self._kept.values())

    @property
    def has_pictures(self) -> bool:
        """Whether thumbnails still find room."""
        return self._side >= SMALLEST

    def keep_only(self, images: set[int]) -> None:
        """Let go of all other images."""
        self._kept = {number: entry for number, entry in self._kept.items() if number in images}

    def keep_first(self, n_images: int) -> None:
        """Let go of all but so many images, those that came first."""
        self._kept = dict(islice(self._kept.items(), n_images))

    def join(self, images: set[int]) -> None:
        """Make one piece of those that are wanted, before the processes exchange theirs. Last before ``compute``."""
        self.keep_only(images)
        entries = list(self._kept.items())
        self._kept = {}
        self.images = [torch.tensor([number for number, _ in entries], dtype=torch.long)]
        self.labels = [torch.tensor([entry.label for _, entry in entries], dtype=torch.long)]
        pictures = _together([entry.picture for _, entry in entries])
        self.pictures = [to_exchange(pictures)]
        inputs = [entry.inputs[None] for _, entry in entries]
        entries.clear()
        nothing = torch.empty(0) if self._none is None else self._none
        self.inputs = [joined(inputs) if inputs else nothing]

    def compute(self) -> PooledInputs | None:
        """The inputs of all processes; `None` if there are none."""
        pieces = [piece for piece in zip(*(getattr(self, name) for name in STATES), strict=True) if len(piece[0])]
        pieces = [piece for piece in pieces if piece[2].shape[1:] == pieces[0][2].shape[1:]]
        if not pieces:
            return None
        images, labels, inputs, pictures = map(list, zip(*pieces, strict=True))
        pictures = list(map(exchanged, pictures))
        has_all = all(piece.numel() for piece in pictures)  # or those of one process would be black
        shown = _together([picture for piece in pictures for picture in piece]) if has_all else None
        return PooledInputs(torch.cat(images), torch.cat(labels), joined(inputs), shown)


def _smaller(picture: Tensor, side: int) -> Tensor:
    """A picture ``[3, h, w]`` with no side longer than that; of no size if nothing could be seen."""
    if side < SMALLEST or not picture.numel():
        return picture.new_empty(3, 0, 0)
    return at_most(side, picture[None].float())[0].round().to(torch.uint8)


def _together(pictures: list[Tensor]) -> Tensor:
    """One tensor of pictures, all as large as the first one that there is."""
    if not pictures:
        return torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    first = next((picture for picture in pictures if picture.numel()), pictures[0])
    return torch.cat([as_large_as(first[None], picture[None]) for picture in pictures])
