"""What the analyses have to do with the other processes of a distributed run."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor
    from torchmetrics import Metric


def is_distributed() -> bool:
    """Whether there are other processes, or might be."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def everyones(value: Any) -> list[Any]:
    """What each process has, by rank; any plain object."""
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def cpu_group() -> Any:
    """A process group that exchanges tensors on the CPU, which that of GPUs (NCCL) cannot; `None`: the default one can.

    Made by all processes together, once for each default group.
    """
    if not is_distributed() or "gloo" in torch.distributed.get_backend():
        return None
    return _gloo_beside(torch.distributed.group.WORLD)


@functools.lru_cache(maxsize=1)
def _gloo_beside(default: Any) -> Any:
    return torch.distributed.new_group(backend="gloo")


def let_go(metrics: Iterable[Metric]) -> None:
    """Let the data of metrics go; they refer to themselves, so nothing else frees it soon."""
    for metric in metrics:
        if metric._is_synced:
            metric.unsync()
        metric.reset()


def joined(pieces: list[Tensor]) -> Tensor:
    """One tensor of all pieces, each of which is let go as soon as it is copied: twice the memory would be a lot."""
    if len(pieces) == 1:
        return pieces[0]
    whole = pieces[0].new_empty(sum(len(piece) for piece in pieces), *pieces[0].shape[1:])
    end = len(whole)
    while pieces:
        piece = pieces.pop()
        whole[end - len(piece) : end] = piece
        end -= len(piece)
    return whole
