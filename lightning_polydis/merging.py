"""Modules with tensors that say which channel is which, and the one that puts split channels together again."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class StructuredModule(nn.Module):
    """Keeps tensors that are moved, saved and loaded like buffers, and are none.

    Averages of weights take buffers along (those of Lightning's `EMAWeightAveraging` by default) and cut integers off:
    ``int(0.9 * 7 + 0.1 * 7)`` is 6. What says which channel is which must not be averaged.
    """

    def __init__(self) -> None:
        super().__init__()
        self._structure: list[str] = []

    def register_structure(self, name: str, tensor: Tensor | None) -> None:
        """Add a tensor of this kind as attribute ``name``."""
        setattr(self, name, tensor)
        self._structure.append(name)

    @contextmanager
    def _as_buffers(self) -> Iterator[None]:
        names = [name for name in self._structure if name in self.__dict__]  # none where one `with` is inside another
        self._buffers.update({name: self.__dict__.pop(name) for name in names})
        try:
            yield
        finally:
            self.__dict__.update({name: self._buffers.pop(name) for name in names})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        with self._as_buffers():
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, *args: Any) -> None:
        with self._as_buffers():
            super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        with self._as_buffers():
            super()._load_from_state_dict(*args)


class MergeChannels(StructuredModule):
    """Puts split channels together again: adds the appended channels to those they came from.

    A module of its own, and a leaf, so that tools see where the old channels are whole again. Only the appended
    channels are touched; a dense 1 x 1 convolution in its place would cost as much as the layer itself.

    Args:
        target: For each appended channel the channel it is added to, ``[E]``, integer.
        sign: 1 for a concept, -1 for a residual, ``[E]``.
        dim: Dimension of the channels.
        rows: Rows of the old and of the appended channels, ``[C + E]``; `None`: the appended ones come last. In a
            grouped convolution every group has appended channels, some of which may be empty and stay unused.
    """

    target: Tensor
    sign: Tensor
    rows: Tensor | None

    def __init__(self, target: Tensor, sign: Tensor, dim: int, rows: Tensor | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.register_structure("target", target)
        self.register_structure("sign", sign)
        self.register_structure("rows", rows)

    def forward(self, expanded: Tensor) -> Tensor:
        """``[B, C + E, ...]`` -> ``[B, C, ...]`` (channels last for linear layers)."""
        n_extra = self.target.shape[0]
        if self.rows is not None:
            expanded = expanded.index_select(self.dim, self.rows)
        kept, extra = expanded.split([expanded.shape[self.dim] - n_extra, n_extra], dim=self.dim)
        shape = [1] * expanded.ndim
        shape[self.dim] = n_extra
        return torch.index_add(kept, self.dim, self.target, extra * self.sign.view(shape).to(extra.dtype))
