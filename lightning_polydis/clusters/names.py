"""What clusters of images are called."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

N_CLASSES = 3


def cluster_name(number: int, contents: Sequence[tuple[int, float]], class_names: Sequence[str] | None) -> str:
    """Name of a cluster: the classes that fill it with their shares, or its number where no classes are known.

    Args:
        number: Of the concept, from 1.
        contents: Classes and their share of the cluster's images, most frequent first.
        class_names: Names of the classes, if they have any.

    Example:
        >>> cluster_name(1, [(0, 0.62), (7, 0.2)], ["tench"])
        'tench (62 %), class 7 (20 %)'
        >>> cluster_name(1, [(0, 0.62), (7, 0.2)], None)
        'classes 0 (62 %), 7 (20 %)'
        >>> cluster_name(2, [], None)
        'cluster 2'
    """
    if not contents:
        return f"cluster {number}"
    shown = contents[:N_CLASSES]
    if not class_names:
        kind = "class" if len(shown) == 1 else "classes"
        return f"{kind} {', '.join(_with_share(str(index), share) for index, share in shown)}"
    return ", ".join(
        _with_share(class_names[index] if index < len(class_names) else f"class {index}", share)
        for index, share in shown
    )


def _with_share(label: str, share: float) -> str:
    return f"{label} ({100 * share:.0f} %)"
