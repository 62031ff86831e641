"""Checkpoint files whose state dict is split without the network at hand."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_polydis._checks import InputError
from lightning_polydis._files import written_whole

UNFITTING = ("optimizer_states", "lr_schedulers", "current_model_state", "averaging_state")
"""Entries of a Lightning checkpoint that belong to the layers before the split."""


@dataclass(frozen=True)
class CheckpointFile:
    """What a checkpoint file holds.

    Attributes:
        state_dict: Of the network.
        rest: The other entries of a Lightning checkpoint; `None` for a file that is a state dict and nothing else.
        metadata: Of a safetensors file.
        is_ordered: Whether the entries stand in the order of the network's layers; safetensors has one of its own.
        left_out: Entries that `without_states` took out.
    """

    state_dict: Mapping[str, Any]
    rest: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    is_ordered: bool = True
    left_out: tuple[str, ...] = ()

    def without_states(self) -> CheckpointFile:
        """The same without optimizer states and averages, which would not fit a split network."""
        left_out = tuple(name for name in UNFITTING if (self.rest or {}).get(name))
        rest = None if self.rest is None else {key: self.rest[key] for key in self.rest if key not in UNFITTING}
        return replace(self, rest=rest, left_out=left_out)

    def save(self, path: str | Path, state_dict: Mapping[str, Any]) -> None:
        """Write the file with another state dict; it appears whole or not at all."""
        if Path(path).suffix == ".safetensors":
            return self._save_tensors(path, state_dict)
        content: Any = state_dict if self.rest is None else {**self.rest, "state_dict": state_dict}
        with written_whole(path) as file:
            torch.save(content, file)
        return None

    def _save_tensors(self, path: str | Path, state_dict: Mapping[str, Any]) -> None:
        if self.rest is not None:
            raise InputError(f"Expected a Lightning checkpoint to be written as .ckpt or .pt, but got `{path}`.")
        save = _safetensors().save
        plain = {key: value.contiguous() for key, value in state_dict.items()}
        with written_whole(path) as file:
            file.write(save(plain, self.metadata))


def read_checkpoint(path: str | Path, *, trusted: bool = False) -> CheckpointFile:
    """Read a Lightning checkpoint, or a state dict from a .pt or .safetensors file, onto the CPU.

    Args:
        path: The file.
        trusted: Whether objects other than tensors and plain types may be unpickled, which can run code.

    Raises:
        ValueError: If the file is damaged or holds something else.
    """
    if Path(path).is_dir():
        raise InputError(
            f"Expected `{path}` to be a file, but it is a directory. A checkpoint in shards has to be put together "
            "first: `python -m lightning.pytorch.utilities.consolidate_checkpoint`."
        )
    if Path(path).suffix == ".safetensors":
        return _read_tensors(path)
    content = _unpickled(path, trusted)
    whole = isinstance(content, dict) and isinstance(content.get("state_dict"), Mapping)
    state_dict = content["state_dict"] if whole else content
    if not isinstance(state_dict, Mapping) or not any(isinstance(value, Tensor) for value in state_dict.values()):
        kind = type(content).__name__
        raise InputError(f"Expected `{path}` to hold a Lightning checkpoint or a state dict, but got a {kind}.")
    rest = {key: value for key, value in content.items() if key != "state_dict"} if whole else None
    return CheckpointFile(state_dict, rest)


def _unpickled(path: str | Path, trusted: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=not trusted)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged pickle leads to
        refused = isinstance(error, pickle.UnpicklingError) and "Unsupported global" in str(error)
        if refused and not trusted:
            raise InputError(
                f"`{path}` holds more than tensors and plain types ({_what(error)}), and unpickling that can run code. "
                "If you trust the file, add `--trust`."
            ) from error
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'}"
        text = f"`{path}` cannot be read as a checkpoint: it is damaged or of another kind ({reason})."
        raise InputError(text) from error


def _what(error: Exception) -> str:
    """The class that was refused, as torch names it."""
    return str(error).partition("Unsupported global: GLOBAL ")[2].partition(" ")[0] or "objects"


def _read_tensors(path: str | Path) -> CheckpointFile:
    safetensors = _safetensors()
    content = Path(path).read_bytes()
    try:
        state_dict: dict[str, Any] = safetensors.load(content)
    except Exception as error:  # its own error class has no public name in all versions
        raise InputError(f"`{path}` cannot be read as safetensors: {error}.") from error
    return CheckpointFile(state_dict, metadata=_metadata(content), is_ordered=False)


def _metadata(content: bytes) -> dict[str, str] | None:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata: dict[str, str] | None = header.get("__metadata__")
    return metadata


def _safetensors() -> Any:
    try:
        from safetensors import torch as safetensors
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Files of this kind need safetensors: pip install safetensors.") from error
    return safetensors
