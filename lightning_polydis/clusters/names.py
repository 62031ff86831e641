"""What clusters of images are called."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

N_CLASSES = 3


def cluster_name(number: int, contents: Sequence[tuple[int, float]], label: Callable[[int], str]) -> str:
    """Name of a cluster: the classes that fill it with their shares, or its number where no classes are known.

    Args:
        number: Of the concept, from 1.
        contents: Classes and their share of the cluster's images, most frequent first.
        label: Name of a class.

    Example:
        >>> cluster_name(1, [(0, 0.62), (7, 0.2)], lambda index: {0: "tench", 7: "church"}[index])
        'tench 62 %, church 20 %'
        >>> cluster_name(2, [], str)
        'cluster 2'
    """
    if not contents:
        return f"cluster {number}"
    return ", ".join(f"{label(index)} {share:.0%}".replace("%", " %") for index, share in contents[:N_CLASSES])
