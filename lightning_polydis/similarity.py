"""How alike relevance vectors are, and how sure that is: pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import t as student_t
from torch import Tensor

CONFIDENCE = 0.95


@dataclass(frozen=True, eq=False)
class Similarities:
    """Similarities of ``T`` vectors with one another, ``[T, T]`` and ``float64`` each.

    Attributes:
        cosine: Cosine similarity of the vectors as they are.
        corrected: What it would be without the noise of averaging over a limited number of images, which makes vectors
            look less alike than they are; the vectors of two halves of one class give 1, up to the interval. May
            exceed 1. As ``cosine`` where it cannot be estimated.
        lower: Lower end of the corrected similarity's 95 % interval, at least -1; NaN where it was not measured.
        upper: Upper end, at most 1.
        reliability: How well each vector is known, in [0, 1], ``[T]``; NaN where it was not measured.
    """

    cosine: np.ndarray
    corrected: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    reliability: np.ndarray


def cosine_similarities(vectors: Tensor) -> np.ndarray:
    """Cosine similarity of all rows with one another.

    A row of zeros has no direction, so it is no evidence of another concept: its similarity is set to 1.

    Args:
        vectors: ``[T, I]``.

    Returns:
        ``[T, T]``, ``float64``, symmetric, in [-1, 1].
    """
    values = vectors.double().numpy()
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    unit = values / np.where(norms == 0, 1, norms)
    similarities = np.clip(unit @ unit.T, -1, 1)
    silent = norms[:, 0] == 0
    similarities[silent] = similarities[:, silent] = 1
    return similarities


def plain_similarities(vectors: Tensor) -> Similarities:
    """Similarities of vectors ``[T, I]`` of which nothing more is known."""
    cosine = cosine_similarities(vectors)
    unknown = np.full_like(cosine, np.nan)
    return Similarities(cosine, cosine, unknown, unknown, unknown.diagonal())


def grouped_similarities(sums: Tensor, counts: Tensor) -> Similarities:
    r"""Similarities of class means, with jackknife intervals over groups of images.

    With group sums :math:`S_g` of :math:`n_g` images, :math:`U = \sum_{g \ne h} S_g \cdot S_h / \sum_{g \ne h} n_g n_h`
    estimates a mean's squared length without noise (products of different images have none on average), so
    :math:`\bar a \cdot \bar b / \sqrt{U_a U_b}` is the similarity without noise. The delete-one-group jackknife over
    the groups of both classes takes out its bias and gives its variance; the interval is Student's, with one degree of
    freedom less than there are groups. Coverage: 0.95 or more in simulations with 16 and 48 images of a class.

    Args:
        sums: Sum of the images' vectors, ``[T, G, I]``, ``float64``.
        counts: Images in each sum, ``[T, G]``.

    Example:
        >>> import torch
        >>> noise = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0)).double()
        >>> found = grouped_similarities(torch.eye(2, 5).double()[:, None] + 0.1 * noise, torch.ones(2, 8))
        >>> bool(found.lower[0, 1] < 0 < found.upper[0, 1])
        True
    """
    cosine = cosine_similarities(sums.sum(1))
    corrected, variance, n_groups = _jackknife(sums.double(), counts.double())
    known = np.isfinite(corrected) & np.isfinite(variance)
    degrees = np.maximum(np.minimum(n_groups[:, None], n_groups) - 1, 1)
    reach = student_t.ppf((1 + CONFIDENCE) / 2, degrees) * np.sqrt(np.where(known, variance, 0))
    lower = np.where(known, np.clip(corrected - reach, -1, 1), -1)
    upper = np.where(known, np.clip(corrected + reach, -1, 1), 1)
    return Similarities(cosine, np.where(known, corrected, cosine), lower, upper, reliabilities(sums))


def reliabilities(sums: Tensor) -> np.ndarray:
    r"""How well each mean is known: the cosine of two halves of its images, stepped up to all of them.

    :math:`2 c / (1 + c)` for the cosine :math:`c` of the halves, at least 0 (Spearman and Brown).

    Args:
        sums: Sum of the images' vectors by group, ``[T, G, I]``.

    Returns:
        ``[T]``, in [0, 1].
    """
    first, second = sums[:, ::2].double().sum(1), sums[:, 1::2].double().sum(1)
    lengths = (first.norm(dim=1) * second.norm(dim=1)).clamp(min=torch.finfo(torch.float64).tiny)
    halves = ((first * second).sum(1) / lengths).clamp(0, 1)
    return np.asarray(2 * halves / (1 + halves))


def corrected_similarities(sums: Tensor, counts: Tensor) -> np.ndarray:
    """The corrected similarities of `grouped_similarities` without bias correction; NaN where there is no estimate."""
    total, number = sums.double().sum(1), counts.double().sum(1)
    length = _noiseless(total, number, (sums**2).sum((1, 2)), (counts**2).sum(1)).sqrt()
    means = total / number[:, None] / length[:, None]
    return (means @ means.T).numpy()


def _jackknife(sums: Tensor, counts: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Corrected similarity without its bias, its variance ``[T, T]``, and the number of groups with images ``[T]``."""
    squares = (sums**2).sum(2)
    total, number = sums.sum(1), counts.sum(1)
    length = _noiseless(total, number, squares.sum(1), (counts**2).sum(1)).sqrt()
    means = total / number[:, None] / length[:, None]
    rest, rest_number = total[:, None] - sums, number[:, None] - counts
    rest_square = _noiseless(
        rest, rest_number, squares.sum(1, keepdim=True) - squares, (counts**2).sum(1, keepdim=True) - counts**2
    )
    rest_means = rest / rest_number[..., None] / rest_square.sqrt()[..., None]
    full = means @ means.T
    without = torch.einsum("tgi,ui->tgu", rest_means, means)  # one of the first class's groups left out
    groups = (counts > 0).sum(1).double()[:, None]
    there = (counts > 0)[..., None]
    mean = torch.where(there, without, 0).sum(1) / groups
    spread = torch.where(there, (without - mean[:, None]) ** 2, 0).sum(1)
    bias, variance = (groups - 1) * (mean - full), (groups - 1) / groups * spread
    return (full - bias - bias.T).numpy(), (variance + variance.T).numpy(), groups[:, 0].numpy()


def _noiseless(total: Tensor, number: Tensor, squares: Tensor, number_squares: Tensor) -> Tensor:
    """Squared length of a mean without noise: from products of different groups; NaN where it is not positive."""
    products = ((total**2).sum(-1) - squares) / (number**2 - number_squares)
    return torch.where(products > 0, products, torch.nan)
