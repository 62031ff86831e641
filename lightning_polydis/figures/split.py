"""Picture of a channel before and after its split."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_polydis._text import counted
from lightning_polydis.figures.canvas import (
    CONCEPT_COLOURS,
    OTHER_COLOUR,
    TEXT_COLOUR,
    Canvas,
    check_concept_names,
    literal,
    new_figure,
    pixels_of,
    row_label,
)
from lightning_polydis.figures.heatmap import overlaid
from lightning_polydis.figures.overview import check_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from lightning_polydis.heatmaps import ConceptHeatmaps
    from lightning_polydis.visualization import ChannelVisualization


@literal
def split_figure(
    images: Tensor,
    targets: Tensor,
    original: Tensor,
    parts: Tensor,
    concepts: Sequence[Sequence[int]],
    *,
    title: str = "",
    class_names: Sequence[str] | None = None,
    n_images: int = 8,
    heatmaps: ConceptHeatmaps | None = None,
    visualization: ChannelVisualization | None = None,
    concept_names: Sequence[str] | None = None,
) -> Figure:
    """Draw a polysemantic channel before and after its split (after the teaser of arXiv:2504.12939).

    One row for the original channel and one for each concept channel. A row shows the images that activate it most,
    framed in the colour of the concept that their class belongs to (grey: no concept's), and beside them how its
    activation is distributed over the images of each concept; every curve is drawn with the same height.

    The figure does not go through ``pyplot``: it belongs to the caller alone and needs no closing.

    Args:
        images: ``[N, H, W]``, ``[N, 1, H, W]`` or ``[N, 3, H, W]``, in [0, 1], or ``uint8``.
        targets: Class of each image, ``[N]``, integer.
        original: Activation of the original channel on each image, not negative, ``[N]``; for instance the sum over
            positions of the positive part.
        parts: The same for each concept channel, ``[N, K]``.
        concepts: Classes of each of the ``K`` concepts, as in `ChannelSplit.concepts`.
        title: Title of the picture.
        class_names: Names of all classes; `None`: their indices.
        n_images: Images in a row at most. Images that do not activate the channel are left out.
        heatmaps: Where in each of the ``N`` images the channel and its concepts are seen (`concept_heatmaps`), drawn
            as a second line of each row.
        visualization: Optimised images of the channel and its concepts, drawn first in each row.
        concept_names: Names of the concepts, in place of those of their classes. Clusters of images need them, as their
            numbers are no classes: ``report.concept_names[layer, channel]``; ``targets`` are then
            the clusters of the images, -1 for none.

    Returns:
        The figure; ``figure.savefig(path, dpi=130)`` writes it.

    Raises:
        ValueError: If the arguments do not fit together or are out of range.
        ModuleNotFoundError: If matplotlib is missing; it comes with the extra ``figures``.

    Example:
        >>> import torch
        >>> images, targets = torch.rand(20, 8, 8), torch.arange(20) % 2
        >>> original = torch.rand(20)
        >>> parts = torch.stack([original * (targets == 0), original * (targets == 1)], dim=1)
        >>> figure = split_figure(images, targets, original, parts, [[0], [1]], n_images=5)
        >>> len(figure.axes)  # three rows of five images and one density each
        18
    """
    figure = new_figure("split_figure")
    pixels = pixels_of(images)
    _check(len(images), targets, original, parts, concepts, class_names, n_images)
    _check_extras(len(images), len(concepts), heatmaps, visualization)
    check_concept_names(len(concepts), concept_names)
    colours = [CONCEPT_COLOURS[index] for index in range(len(concepts))]
    concept_of = _concept_of(targets, concepts)
    rows = torch.cat([original[:, None], parts], dim=1).detach().float().cpu()
    aspect, n_strips = pixels.shape[1] / pixels.shape[2], 1 if heatmaps is None else 2
    canvas = Canvas(figure, len(concepts) + 1, n_images, aspect, n_strips=n_strips, lead=visualization is not None)
    canvas.header(title, rows[concept_of >= 0].numpy())
    shown: set[int] = set()
    for row, activation in enumerate(rows.T):
        colour = TEXT_COLOUR if row == 0 else colours[row - 1]
        texts = ("original", "before the split")
        if row > 0:
            texts = row_label(row, concepts, class_names, concept_names)
        canvas.label(row, *texts, colour)
        if visualization is not None:
            lead = visualization.original if row == 0 else visualization.parts[row - 1]
            canvas.lead(row, pixels_of(lead[None])[0], colour)
        for column, index in enumerate(_strongest(activation, n_images)):
            concept = int(concept_of[index])
            shown.add(concept)
            canvas.image(row, column, pixels[index], OTHER_COLOUR if concept < 0 else colours[concept])
            if heatmaps is not None:
                canvas.image(row, column, overlaid(pixels[index], heatmaps, int(index), row), "white", strip=1)
        by_concept = [activation[concept_of == concept].numpy() for concept in range(len(concepts))]
        canvas.densities(row, by_concept, colours)
    if remarks := _remarks(shown, heatmaps, "a class that belongs to " if concept_names is None else ""):
        canvas.note("; ".join(remarks))
    return canvas.figure


def _remarks(shown: set[int], heatmaps: ConceptHeatmaps | None, owner: str) -> list[str]:
    found = [f"grey frame: image of {owner}none of the concepts"] if -1 in shown else []
    if heatmaps is not None:
        against = " (blue: against the class)" if bool((heatmaps.parts < 0).any()) else ""
        found.append(f"below each image: where the channel of the row is seen in it{against}")
    return found


def _check(
    n: int,
    targets: Tensor,
    original: Tensor,
    parts: Tensor,
    concepts: Sequence[Sequence[int]],
    class_names: Sequence[str] | None,
    n_images: int,
) -> None:
    expected = {"targets": (targets, [n]), "original": (original, [n]), "parts": (parts, [n, len(concepts)])}
    for name, (tensor, shape) in expected.items():
        if list(tensor.shape) != shape:
            raise ValueError(f"Expected argument `{name}` to have shape {shape}, but got {list(tensor.shape)}.")
    if targets.is_floating_point():
        raise ValueError(f"Expected argument `targets` to hold class indices, but got {targets.dtype}.")
    for name, values in (("original", original), ("parts", parts)):
        if not bool((torch.isfinite(values) & (values >= 0)).all()):
            raise ValueError(f"Expected argument `{name}` to hold finite activations that are not negative.")
    if not 2 <= len(concepts) <= len(CONCEPT_COLOURS):
        raise ValueError(
            f"Expected argument `concepts` to hold 2 to {len(CONCEPT_COLOURS)} concepts, but got {len(concepts)}."
        )
    check_names([label for concept in concepts for label in concept], class_names)
    if n_images < 1:
        raise ValueError(f"Expected argument `n_images` to be at least 1, but got {n_images}.")


def _check_extras(
    n_images: int, n_concepts: int, heatmaps: ConceptHeatmaps | None, visualization: ChannelVisualization | None
) -> None:
    if heatmaps is not None and heatmaps.parts.shape[:2] != (n_images, n_concepts):
        raise ValueError(
            f"Expected argument `heatmaps` to hold maps of {counted(n_images, 'image')} and {n_concepts} concepts, "
            f"but got {list(heatmaps.parts.shape[:2])}."
        )
    if visualization is not None and len(visualization.parts) != n_concepts:
        raise ValueError(
            f"Expected argument `visualization` to show {n_concepts} concepts, but got {len(visualization.parts)}."
        )


def _concept_of(targets: Tensor, concepts: Sequence[Sequence[int]]) -> Tensor:
    """For each image the concept that its class belongs to, or -1."""
    lookup = {label: index for index, concept in enumerate(concepts) for label in concept}
    return torch.tensor([lookup.get(label, -1) for label in targets.tolist()])


def _strongest(activation: Tensor, n_images: int) -> list[int]:
    order: list[int] = activation.argsort(descending=True, stable=True)[:n_images].tolist()
    return [index for index in order if activation[index] > 0]
