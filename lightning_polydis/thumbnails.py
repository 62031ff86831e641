"""Small pictures of the images that are kept as samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_polydis._checks import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

LARGEST, SMALLEST, UNCOUNTED = 96, 32, 48
"""Longest side of a thumbnail, in pixels: where there is room for such, where there is hardly any, and where nobody
knows how many images there will be."""

MAX_SHRINK = 64
"""By how much a GPU shrinks an image: its multiprocessors have no room for the weights of more pixels."""

NOTHING = (1, 1)
"""Size of thumbnails, in an exchange between processes, where there are none."""

Normalisation = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of each colour."""


def to_exchange(pictures: Tensor) -> Tensor:
    """Thumbnails ``[n, 3, h, w]`` as processes exchange them: those of no size cannot be padded to that of others."""
    return pictures if pictures.numel() else pictures.new_zeros(len(pictures), 3, *NOTHING)


def exchanged(pictures: Tensor) -> Tensor:
    """Thumbnails as they were before `to_exchange`."""
    return pictures.new_empty(len(pictures), 3, 0, 0) if pictures.shape[2:] == NOTHING else pictures


def thumbnail_side(n_images: int | None, memory: float) -> int:
    """Longest side of thumbnails of which so many fit into so many bytes; 0 if that would be too small to see anything.

    Args:
        n_images: How many there will be at most; `None`: all of a data set, beside layer inputs that are far larger.
        memory: Bytes for all of them.
    """
    if n_images is None:
        return UNCOUNTED
    side = math.isqrt(int(memory / (3 * max(n_images, 1))))
    return 0 if side < SMALLEST else min(LARGEST, side)


def thumbnails(images: Tensor, side: int, denormalize: Callable[[Tensor], Tensor] | Normalisation | None) -> Tensor:
    """Small pictures of images.

    Args:
        images: ``[n, 1, H, W]`` or ``[n, 3, H, W]``, as the network takes them.
        side: Longest side of the pictures; smaller images keep their size.
        denormalize: What makes values in [0, 1] of the images: a function, or mean and standard deviation of each
            colour. `None`: values in [0, 1] and bytes are taken as they are, others stretched, image by image.

    Returns:
        ``[n, 3, h, w]``, ``uint8``, on the CPU.

    Example:
        >>> import torch
        >>> thumbnails(torch.rand(2, 1, 8, 8), 96, None).shape
        torch.Size([2, 3, 8, 8])
    """
    images = images.detach()
    if not images.is_cuda or max(images.shape[2:]) > MAX_SHRINK * side:  # other devices may not have antialiasing
        images = images.cpu()
    if callable(denormalize):
        shown = at_most(side, _own(images.cpu().clone(), denormalize))  # it may work in place
    else:  # what is the same for all pixels of an image costs less on few of them
        shown = _between_0_and_1(at_most(side, images.float()), images, denormalize)
    return (255 * shown.clamp(0, 1)).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous().cpu()


def at_most(side: int, images: Tensor) -> Tensor:
    """Images ``[n, C, H, W]``, floating point, with no side longer than so many pixels; those that fit as they are."""
    height, width = images.shape[2:]
    scale = min(1.0, side / max(height, width))
    if scale == 1:
        return images
    size = (max(1, round(scale * height)), max(1, round(scale * width)))
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def _between_0_and_1(small: Tensor, images: Tensor, denormalize: Normalisation | None) -> Tensor:
    """Small versions of images with the values of what the images show."""
    if not images.is_floating_point():
        return small / 255
    if denormalize is not None:
        mean, std = (small.new_tensor(part).view(1, -1, 1, 1) for part in denormalize)
        return small * std + mean
    low, high = (extreme((1, 2, 3), keepdim=True).float() for extreme in (images.amin, images.amax))
    if bool((low >= 0).all()) and bool((high <= 1).all()):
        return small
    return (small - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)


def _own(images: Tensor, denormalize: Callable[[Tensor], Tensor]) -> Tensor:
    try:
        found = denormalize(images)
    except Exception as error:
        raise InputError(f"`denormalize` raised {type(error).__name__}: {error}.") from error
    if not isinstance(found, Tensor) or found.ndim != 4 or found.shape[1] not in (1, 3) or len(found) != len(images):
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"Expected `denormalize` to return images [n, 3, H, W] in [0, 1], but got {shape}.")
    return found.float()


def as_large_as(wanted: Tensor, thumbnails: Tensor) -> Tensor:
    """Thumbnails of the size of others."""
    size = wanted.shape[2:]
    if thumbnails.shape[2:] == size:
        return thumbnails
    if not thumbnails.numel() or not size.numel():  # some with, some without: then none at all
        return thumbnails.new_zeros(len(thumbnails), 3, *size)
    return F.interpolate(thumbnails.float(), size, mode="bilinear").round().to(torch.uint8)


def check_denormalize(value: Any) -> None:
    """Raise `ValueError` unless ``value`` can be used as an argument ``denormalize``."""
    if value is None or callable(value):
        return
    parts = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    numbers = [list(part) for part in parts if isinstance(part, Sequence) and not isinstance(part, str)]
    fits = len(numbers) == 2 and len(numbers[0]) == len(numbers[1]) in (1, 3)
    if not fits or not all(isinstance(number, int | float) for part in numbers for number in part):
        raise InputError(
            "Expected argument `denormalize` to be a function, a pair of means and standard deviations of the 1 or 3 "
            f"colours, or None, but got {value!r}."
        )
    if not all(0 < deviation < math.inf for deviation in numbers[1]):
        raise InputError(f"Expected the standard deviations of `denormalize` to be above 0, but got {value[1]!r}.")


def normalisation_of(loaders: Any, place: int = 0) -> Normalisation | None:
    """Mean and standard deviation by which a data set normalises its images, if it says so.

    Looks for a transform with a ``mean`` and a ``std``, as torchvision's ``Normalize`` has them, in a loader's data set
    and whatever that wraps; the last one counts.

    Args:
        loaders: A loader, or a list or dictionary of them.
        place: Which of them is looked at.
    """
    try:
        if isinstance(loaders, Mapping):
            loaders = list(loaders.values())
        loader = loaders[place] if isinstance(loaders, list | tuple) else loaders
        return _normalisation_of(getattr(loader, "dataset", None))
    except Exception:  # it is the user's data set that was asked, and only for a picture
        return None


def _normalisation_of(dataset: Any) -> Normalisation | None:
    found = None
    for _ in range(8):  # data sets in data sets; an end even if one wraps itself
        if dataset is None or found is not None:
            break
        for name in ("transform", "transforms"):
            found = _normalisation_in(getattr(dataset, name, None), depth=0) or found
        parts = getattr(dataset, "datasets", None)  # joined ones
        dataset = parts[0] if isinstance(parts, Sequence) and parts else getattr(dataset, "dataset", None)
    return found


def _normalisation_in(transform: Any, depth: int) -> Normalisation | None:
    mean, std = getattr(transform, "mean", None), getattr(transform, "std", None)
    if isinstance(mean, Sequence | Tensor) and isinstance(std, Sequence | Tensor):
        own = tuple(torch.as_tensor(part, dtype=torch.float64).flatten().tolist() for part in (mean, std))
        return own if len(own[0]) == len(own[1]) in (1, 3) else None  # type: ignore[return-value]
    inner = getattr(transform, "transforms", None) or getattr(transform, "transform", None)
    parts = inner if isinstance(inner, Sequence) else [inner] if inner is not None else []
    if depth > 8:
        return None
    found = [_normalisation_in(part, depth + 1) for part in parts]
    return next((one for one in reversed(found) if one is not None), None)
