"""What can be told of a tensor that is taken for the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_polydis._checks import InputError

HINT = (
    "Pass `logits_module`, the name of the module whose output is the logits, "
    "or `logits_fn`, which takes the network's output and returns them."
)

OWN_CLASS_ONLY = (
    "each of its channels is the logit of one class, and nothing lies behind it through which another class could make "
    "it relevant, so that none can be polysemantic"
)
"""What is the matter with a layer that makes the logits."""


class LogitsError(InputError):
    """What was taken for the logits cannot be them."""


def checked_logits(logits: Any, targets: Tensor | None, num_classes: int | None, where: str) -> Tensor:
    """The logits, if they go with the targets.

    Args:
        logits: What was taken for the logits, to be ``[B, K]``, with a graph.
        targets: Class indices, ``[B]``, integer; `None`: nobody knows.
        num_classes: Expected ``K``; `None` accepts any.
        where: What returned them, for the message.

    Raises:
        ValueError: If they do not fit, in words.
    """
    if not isinstance(logits, Tensor) or targets is None:
        raise LogitsError(f"Expected {where} to return logits, but got `{type(logits).__name__}`. {HINT}")
    expected = f"[{len(targets)}, {num_classes or 'num_classes'}]"
    wrong_width = logits.ndim == 2 and num_classes not in (None, logits.shape[1])
    if logits.ndim != 2 or len(logits) != len(targets) or wrong_width or logits.shape[1] < 2:
        raise LogitsError(
            f"Expected {where} to return logits of shape {expected}, but got {list(logits.shape)}. {HINT}"
        )
    if not logits.requires_grad:
        raise LogitsError(
            f"The logits that {where} returned do not depend on the layers through gradients: part of the network "
            "runs under `torch.no_grad()`, is detached, or does not use the layers; gradient checkpointing with "
            "`use_reentrant=True` around a layer does the same (pass `use_reentrant=False`)."
        )
    if int(targets.min()) < 0 or int(targets.max()) >= logits.shape[1]:
        raise InputError(
            f"Expected targets to be class indices in [0, {logits.shape[1]}), but got values from "
            f"{int(targets.min())} to {int(targets.max())}."
        )
    return logits


def are_normalised(logits: Tensor) -> bool:
    """Whether the rows look like probabilities or log-probabilities rather than logits."""
    values = logits.float()
    totals = values.sum(1) if bool((values >= 0).all()) else values.exp().sum(1)
    return bool(torch.allclose(totals, torch.ones_like(totals), atol=1e-3)) and bool((values <= 1).all())
