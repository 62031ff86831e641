"""What the analysis needs of a batch and of the network that it goes through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_polydis._checks import InputError, closest_names
from lightning_polydis.collection import RelevanceCollector

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_polydis.settings import AnalysisSettings

IMAGE_KEYS = ("image", "images", "pixel_values", "input", "inputs", "x")
TARGET_KEYS = ("label", "labels", "target", "targets", "y")


def inputs_of(batch: Any) -> Any:
    """What the network reads of a batch, where nobody else calls it.

    Args:
        batch: ``(inputs, targets, ...)``, a tensor, or a dictionary, dataclass or the like with one of `IMAGE_KEYS`.

    Returns:
        The inputs, as they are.

    Raises:
        ValueError: If it cannot be found.

    Example:
        >>> inputs_of({"image": 1, "label": 2}), inputs_of((1, 2))
        (1, 1)
    """
    found = _input_of(batch)
    if found is not None:
        return found
    raise InputError(
        "Expected a batch to be (inputs, targets, ...), a tensor of inputs, or a dictionary or dataclass with one of "
        f"the entries {', '.join(IMAGE_KEYS)}, but got {_described(batch)}. Turn yours into pairs: "
        "`((batch['picture'], batch['species']) for batch in loader)`, or use the callback, which takes what "
        "`validation_step` takes."
    )


def images_of(batch: Any) -> Tensor | None:
    """The images of a batch, ``[B, 1, H, W]`` or ``[B, 3, H, W]``; `None` if there seem to be none."""
    found = _input_of(batch)
    return found if isinstance(found, Tensor) and found.ndim == 4 and found.shape[1] in (1, 3) else None


def _input_of(batch: Any) -> Any:
    """The network's input, `None` if it cannot be found."""
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Sequence) and len(batch) and not isinstance(batch, str):
        return batch[0]
    return _named_entry(batch, IMAGE_KEYS)


def _named_entry(batch: Any, keys: Sequence[str]) -> Any:
    """The first of some entries that a dictionary, a dataclass or the like has; `None` if it has none of them."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in keys if key in batch), None)
    return next((getattr(batch, key) for key in keys if hasattr(batch, key)), None)


def targets_of(batch: Any, settings: AnalysisSettings) -> Tensor:
    """The class indices of a batch.

    Raises:
        ValueError: If they cannot be found or are no class indices.
    """
    targets = _default_targets(batch) if settings.target_fn is None else _own_targets(batch, settings.target_fn)
    if not isinstance(targets, Tensor):
        raise InputError(f"Expected the targets to be a tensor of class indices, but got `{type(targets).__name__}`.")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise InputError(
            f"Expected the targets to be integer class indices, but got {targets.dtype} of shape "
            f"{list(targets.shape)}. For soft or multi-label targets pass `target_fn`, which takes a batch and returns "
            "one class for each image."
        )
    if targets.ndim != 1 or not len(targets):
        raise InputError(
            "Expected the targets to have shape [batch size], one class for each image, but got "
            f"{list(targets.shape)}. Pass `target_fn`, which takes a batch and returns class indices."
        )
    return targets.detach().long()


def _own_targets(batch: Any, target_fn: Callable[[Any], Any]) -> Any:
    try:
        return target_fn(batch)
    except Exception as error:
        raise InputError(f"`target_fn` raised {type(error).__name__}: {error}.") from error


def _default_targets(batch: Any) -> Any:
    if isinstance(batch, Sequence) and len(batch) >= 2 and not isinstance(batch, str):
        return batch[1]
    found = _named_entry(batch, TARGET_KEYS)
    if found is not None:
        return found
    raise InputError(
        "Expected a batch to be (inputs, targets, ...), or a dictionary or dataclass with one of the entries "
        f"{', '.join(TARGET_KEYS)}, but got {_described(batch)}. Pass `target_fn`, which takes a batch and returns "
        "class indices; where there are no labels, `concepts='clusters'` needs none."
    )


def _described(batch: Any) -> str:
    """What a batch is, for messages."""
    if isinstance(batch, Mapping):
        return f"the keys {list(batch)}"
    sized = f" of length {len(batch)}" if isinstance(batch, Sequence) and not isinstance(batch, str) else ""
    return f"`{type(batch).__name__}`{sized}"


def labels_of(batch: Any, settings: AnalysisSettings) -> Tensor | None:
    """The class indices of a batch where it has any; they are for reports alone, so that others are no mistake.

    Raises:
        ValueError: If ``target_fn`` is given and raises.
    """
    if settings.target_fn is not None:
        return targets_of(batch, settings)
    try:
        targets = targets_of(batch, settings)
    except InputError:
        return None
    return None if bool((targets < 0).any()) else targets


def check_module_name(model: nn.Module, name: str | None) -> None:
    """Raise `ValueError` unless ``name`` is `None` or a module of ``model``."""
    names = [key for key, _ in model.named_modules() if key]
    if name is not None and name not in names:
        close = closest_names(name, names) or "none"
        raise InputError(
            f"Expected argument `logits_module` to name a module of the model, but got {name!r}. "
            f"Closest names: {close}."
        )


def collector_for(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    settings: AnalysisSettings,
    observe: Callable[[str, Tensor], Any],
) -> RelevanceCollector:
    """The collector that the settings ask for."""
    arguments: dict[str, Any] = {
        "logits_fn": settings.logits_fn,
        "logits_module": settings.logits_module,
        "num_classes": settings.num_classes,
        "observe": observe,
    }
    if settings.attribution == "gradient_x_input":
        return RelevanceCollector(model, layers, **arguments)
    from lightning_polydis.lrp import resolve_composite  # zennit takes its time to import
    from lightning_polydis.replay import CompositeCollector

    return CompositeCollector(model, layers, composite=resolve_composite(settings.attribution), **arguments)
