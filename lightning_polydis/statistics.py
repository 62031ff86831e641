"""Sums and counts per class, streamed and mergeable, and a bounded number of calibration samples."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_polydis.processes import joined
from lightning_polydis.thumbnails import as_large_as, exchanged, to_exchange

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def relevant_channels(relevance: Tensor, relevance_threshold: float | Tensor) -> Tensor:
    r"""Which channels are relevant for which image.

    Channel ``c`` is relevant if :math:`r_c > 0` and :math:`r_c \ge \tau \sum_j \max(r_j, 0)` (arXiv:2504.12939,
    section 3; without the first condition an image with no positive relevance makes every silent channel relevant).

    Args:
        relevance: Relevances of all channels of the layer, ``[B, C]``.
        relevance_threshold: Least share of the image's positive relevance, in (0, 1]; several as ``[T, 1, 1]``.

    Returns:
        ``[B, C]``, boolean; for several thresholds ``[T, B, C]``.

    Example:
        >>> import torch
        >>> relevant_channels(torch.tensor([[9.0, 0.5, 0.5, -3.0]]), 0.1)
        tensor([[ True, False, False, False]])
    """
    total = relevance.clamp(min=0).sum(1, keepdim=True)
    return (relevance > 0) & (relevance >= relevance_threshold * total)


class ClassStatistics:
    """What `ChannelStatistics` has counted.

    Not a dataclass, because torchmetrics takes dataclasses that ``compute`` returns apart and squeezes their tensors.

    Attributes:
        n_images: Images of each class, ``[K]``, integer.
        thresholds: Relevance thresholds, the one of the analysis first.
        counts: At each threshold, how many images of each class each channel is relevant for, ``[T, K, C]``, integer.
        directions: How each class uses each channel: the sign of its mean gradient, 1 or -1 (1 if there is none),
            ``[K, C]``, ``int8``.
        helpful: Whether the channel's relevance for the class is positive on average, ``[K, C]``, boolean.
        mean_window_sums: Mean over a class's images of `layers.window_sums`, ``[K, I, k]``, ``float64``; zero for a
            class without images; `None` if they were not asked for.
        n_left_out: Images left out because their batch held NaN or infinity.
    """

    def __init__(
        self,
        n_images: Tensor,
        thresholds: Sequence[float],
        counts: Tensor,
        directions: Tensor,
        helpful: Tensor,
        mean_window_sums: Tensor | None,
        n_left_out: int = 0,
    ) -> None:
        self.n_images = n_images
        self.thresholds = tuple(thresholds)
        self.counts = counts
        self.directions = directions
        self.helpful = helpful
        self.mean_window_sums = mean_window_sums
        self.n_left_out = n_left_out

    def relevant(self, class_fraction: float, threshold: int = 0) -> Tensor:
        """Which channels are relevant for which class: for at least ``class_fraction`` of its images.

        Args:
            class_fraction: In (0, 1].
            threshold: Which of the relevance thresholds, the analysis's own by default.

        Returns:
            ``[K, C]``, boolean; false for classes without images (arXiv:2504.12939, section 3).
        """
        # The least number of images that is a large enough share, by division: rounding makes 0.55 * 20 more than 11.
        total = self.n_images.clamp(min=1)
        near = (class_fraction * total.double()).floor()[:, None] + torch.tensor([-1.0, 0.0, 1.0], dtype=torch.double)
        is_enough = (near / total[:, None] >= class_fraction) & (near > 0)
        enough = near.gather(1, is_enough.int().argmax(1, keepdim=True))
        return (self.counts[threshold] >= enough) & (self.n_images > 0)[:, None]


class ChannelStatistics(Metric):
    """Relevance counts, gradient and input statistics of one layer, by class.

    Its size is ``classes x channels x (4 x thresholds + 8)`` bytes, and where window sums are kept ``classes x inputs x
    kernel offsets x 8`` more, whatever the number of images.

    Args:
        num_classes: Number of classes.
        n_channels: Output channels of the layer.
        relevance_thresholds: Those that relevances are counted at, the one of the analysis first; see
            `relevant_channels`.
        window_shape: ``(inputs, kernel offsets)``; `None`: no window sums are kept.

    Example:
        >>> import torch
        >>> statistics = ChannelStatistics(2, n_channels=3, relevance_thresholds=[0.5])
        >>> statistics.update(torch.tensor([[3.0, 1.0, 0.0]]), torch.ones(1, 3), torch.tensor([1]))
        >>> statistics.compute().counts[0]
        tensor([[0, 0, 0],
                [1, 0, 0]], dtype=torch.int32)
    """

    full_state_update = False
    n_images: Tensor
    counts: Tensor
    gradient_sums: Tensor
    relevance_sums: Tensor
    window_sums: Tensor
    n_left_out: Tensor
    _levels: Tensor

    def __init__(
        self,
        num_classes: int,
        n_channels: int,
        relevance_thresholds: Sequence[float],
        window_shape: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(compute_with_cache=False, sync_on_compute=False, **kwargs)
        self.relevance_thresholds = tuple(relevance_thresholds)
        levels = torch.tensor(self.relevance_thresholds, dtype=torch.float64)
        self.register_buffer("_levels", levels[:, None, None], persistent=False)
        self._has_windows = window_shape is not None
        shape = (num_classes, n_channels)
        self.add_state("n_images", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")
        counts = torch.zeros(len(self.relevance_thresholds), *shape, dtype=torch.int32)
        self.add_state("counts", counts, dist_reduce_fx="sum")
        self.add_state("gradient_sums", torch.zeros(shape, dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("relevance_sums", torch.zeros(shape, dtype=torch.float32), dist_reduce_fx="sum")
        sums = torch.zeros(num_classes, *(window_shape or (0, 0)), dtype=torch.float64)
        self.add_state("window_sums", sums, dist_reduce_fx="sum")
        self.add_state("n_left_out", torch.tensor(0), dist_reduce_fx="sum")

    def update(
        self,
        relevance: Tensor,
        gradient_sums: Tensor,
        targets: Tensor,
        window_sums: Tensor | None = None,
        leave_out: bool = False,
    ) -> None:
        """Add a batch.

        Args:
            relevance: ``[B, C]``.
            gradient_sums: Gradient of the target's logit with respect to the layer's output, summed over positions,
                ``[B, C]``.
            targets: Class indices, ``[B]``, integer.
            window_sums: ``[B, I, k]``, see `layers.window_sums`, if they are kept.
            leave_out: Only count the batch as left out.
        """
        if leave_out:
            self.n_left_out += len(targets)
            return
        self.n_images.index_add_(0, targets, torch.ones_like(targets))
        relevant = relevant_channels(relevance, self._levels.to(relevance.dtype))  # of all thresholds in one go
        self.counts.index_add_(1, targets, relevant.int())
        self.gradient_sums.index_add_(0, targets, gradient_sums.float())
        self.relevance_sums.index_add_(0, targets, relevance.float())
        if window_sums is not None:
            self.window_sums.index_add_(0, targets, window_sums.double())

    def compute(self) -> ClassStatistics:
        """Counts and means over all batches (and processes)."""
        means = self.window_sums / self.n_images.clamp(min=1)[:, None, None]
        directions = torch.where(self.gradient_sums < 0, -1, 1).to(torch.int8)
        return ClassStatistics(
            self.n_images.cpu(),
            self.relevance_thresholds,
            self.counts.cpu(),
            directions.cpu(),
            (self.relevance_sums > 0).cpu(),
            means.cpu() if self._has_windows else None,
            int(self.n_left_out),
        )


class Samples:
    """Layer inputs that were kept to choose and to judge splits (no dataclass, as `ClassStatistics`).

    A part of the samples (`of_classes`, `halves`, an index) refers to the same storage; tensors are copied only when
    they are asked for.

    Args:
        inputs: ``[N, I, H, W]`` or ``[N, ..., I]``, on the CPU.
        targets: Class of each, ``[N]``, integer.
        relevant: Which channels are relevant for the image, ``[N, C]``, boolean.
        rows: Which of them belong to this part, integer; `None`: all.
        thumbnails: Small pictures of the images, ``[N, 3, h, w]``, ``uint8``, or `None`.
        labels: Class of each, ``[N]``, where targets are something else (numbers of clusters) and classes are known.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        relevant: Tensor,
        rows: Tensor | None = None,
        thumbnails: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        self._inputs, self._relevant, self._thumbnails, self._labels = inputs, relevant, thumbnails, labels
        self._rows = torch.arange(len(targets)) if rows is None else rows
        self._all_targets = targets

    @property
    def inputs(self) -> Tensor:
        """``[n, I, H, W]`` or ``[n, ..., I]``, a copy."""
        return self._inputs.index_select(0, self._rows)  # several times faster than an index

    @property
    def targets(self) -> Tensor:
        """``[n]``, integer, a copy."""
        return self._all_targets[self._rows]

    @property
    def relevant(self) -> Tensor:
        """``[n, C]``, boolean, a copy."""
        return self._relevant[self._rows]

    @property
    def thumbnails(self) -> Tensor | None:
        """``[n, 3, h, w]``, ``uint8``, a copy; `None` if the data holds no images."""
        return None if self._thumbnails is None else self._thumbnails[self._rows]

    @property
    def labels(self) -> Tensor | None:
        """``[n]``, integer, a copy; `None` if targets are the classes, or no classes are known."""
        return None if self._labels is None else self._labels[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Tensor | slice) -> Samples:
        rows = self._rows[index]
        return Samples(self._inputs, self._all_targets, self._relevant, rows, self._thumbnails, self._labels)

    def in_pieces(self, n_elements: int) -> Iterator[Samples]:
        """The samples in pieces whose inputs together have at most so many elements, or of one sample each."""
        size = max(1, n_elements // max(1, self._inputs[0].numel())) if len(self) else 1
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def of_classes(self, classes: Sequence[int]) -> Samples:
        """Only the images of some classes."""
        return self[torch.isin(self.targets, torch.tensor(list(classes)))]

    def halves(self) -> tuple[Samples, Samples]:
        """Every other image of each class: one half to choose memberships, one to judge them."""
        targets = self.targets
        first = torch.zeros(len(self), dtype=torch.bool)
        for target in targets.unique():
            first[(targets == target).nonzero()[::2]] = True
        return self[first], self[~first]


STATES = ("inputs", "targets", "relevant", "thumbnails")


class CalibrationSamples(Metric):
    """The first images of each class whose layer input is kept, on the CPU.

    For each batch ask which rows are ``wanted``, then ``update`` with those.

    Args:
        per_class: Images of each class to keep; `None` keeps all.

    Example:
        >>> import torch
        >>> samples = CalibrationSamples(per_class=1)
        >>> inputs, targets, relevant = torch.ones(3, 4), torch.tensor([0, 0, 1]), torch.ones(3, 2, dtype=torch.bool)
        >>> rows = samples.wanted(inputs, targets)
        >>> samples.update(inputs[rows], targets[rows], relevant[rows])
        >>> samples.compute().targets
        tensor([0, 1])
    """

    full_state_update = False
    limit: Tensor
    inputs: list[Tensor]
    targets: list[Tensor]
    relevant: list[Tensor]
    thumbnails: list[Tensor]

    def __init__(self, per_class: int | None, **kwargs: Any) -> None:
        super().__init__(compute_with_cache=False, sync_on_compute=False, **kwargs)
        self.per_class = per_class
        self.add_state("limit", torch.tensor(-1 if per_class is None else per_class), dist_reduce_fx="min")
        for name in STATES:  # not joined: inputs of other processes may have another shape
            self.add_state(name, [], dist_reduce_fx=None)
        self._kept: Counter[int] = Counter()

    def wanted(self, inputs: Tensor, targets: Tensor) -> list[int]:
        """Rows of a batch that are to be kept: those of classes that have not enough yet.

        Images whose input has another shape than those already kept are passed over.

        Args:
            inputs: ``[B, ...]``.
            targets: ``[B]``, integer.
        """
        if self.inputs and inputs.shape[1:] != self.inputs[0].shape[1:]:
            return []
        kept = Counter(self._kept)
        rows = []
        for row, target in enumerate(targets.tolist()):
            if self.per_class is None or kept[target] < self.per_class:
                kept[target] += 1
                rows.append(row)
        return rows

    def update(self, inputs: Tensor, targets: Tensor, relevant: Tensor, thumbnails: Tensor | None = None) -> None:
        """Keep images.

        Args:
            inputs: ``[n, ...]``; half precision is widened to ``float32``.
            targets: ``[n]``, integer.
            relevant: ``[n, C]``, boolean.
            thumbnails: ``[n, 3, h, w]``, ``uint8``; `None` if there are none.
        """
        if self.inputs and not len(targets):
            return
        self._kept.update(targets.tolist())
        self.inputs.append(inputs.float().cpu() if inputs.dtype.itemsize < 4 else inputs.cpu())
        self.targets.append(targets.cpu())
        self.relevant.append(relevant.cpu())
        small = torch.empty(len(targets), 3, 0, 0, dtype=torch.uint8) if thumbnails is None else thumbnails
        self.thumbnails.append(as_large_as(_first_seen([*self.thumbnails, small]), small))

    def join(self) -> None:
        """Make one piece of all samples, before the processes exchange theirs. The last thing before ``compute``."""
        if self.inputs:
            self.inputs, self.targets = [joined(self.inputs)], [torch.cat(self.targets)]
            self.relevant, self.thumbnails = [torch.cat(self.relevant)], [to_exchange(_of_one_size(self.thumbnails))]

    def compute(self) -> Samples | None:
        """The samples of all processes, at most ``per_class`` of each class; `None` if there are none.

        Images whose input has another shape than the first ones are passed over.
        """
        states = [getattr(self, name) for name in STATES]
        pieces = [piece for piece in zip(*states, strict=True) if len(piece[1])]
        pieces = [piece for piece in pieces if piece[0].shape[1:] == pieces[0][0].shape[1:]]
        if not pieces:
            return None
        inputs, targets, relevant, small = map(list, zip(*pieces, strict=True))
        shown = _of_one_size([exchanged(piece) for piece in small])
        thumbnails = shown if shown.numel() else None
        samples = Samples(joined(inputs), torch.cat(targets), torch.cat(relevant), thumbnails=thumbnails)
        if self.per_class is None:
            return samples
        return samples[torch.tensor([rank < int(self.limit) for rank in _ranks(samples.targets)])]

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        self._kept = Counter()


def _first_seen(pieces: list[Tensor]) -> Tensor:
    """The first piece that holds thumbnails, or just the first."""
    return next((piece for piece in pieces if piece.numel()), pieces[0])


def _of_one_size(pieces: list[Tensor]) -> Tensor:
    return joined([as_large_as(_first_seen(pieces), piece) for piece in pieces])


def _ranks(targets: Tensor) -> list[int]:
    """How many images of the same class stand before each image."""
    seen: Counter[int] = Counter()
    ranks = []
    for target in targets.tolist():
        ranks.append(seen[target])
        seen[target] += 1
    return ranks
