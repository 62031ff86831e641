"""Batched minimisation of hinged least squares over a box: projected Newton with an active set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_STEPS = 30
TOLERANCE = 1e-9
"""Largest projected gradient of a solution, relative to the largest gradient at the start (if rounding lets it)."""

RIDGE = 1e-9
SUFFICIENT_DECREASE = 1e-4
SHORTEST_STEP = 2.0**-30
MOSTLY_FREE = 0.8
"""Part of the variables from which on a system of all of them is solved: the others' rows are those of the identity."""

LENGTHENING = 4
"""How much more of a step is tried than was gone of the last one."""

WORTH_COPYING = 0.4
"""Part of the problems up to which they are copied out to go on with them alone: a copy costs two readings."""


@dataclass(frozen=True)
class HingedLeastSquares:
    r"""Problems of one size: minimise :math:`\sum_r w_r \psi_r(y_r \cdot m - g_r)` over :math:`m \in [0, 1]^I`.

    :math:`\psi_r(e)` is :math:`e^2` for two-sided rows and :math:`\max(e, 0)^2` for the others, so the loss is convex
    and has a piecewise constant second derivative.

    Attributes:
        rows: :math:`y`, ``[Q, R, I]``, ``float64``.
        goals: :math:`g`, ``[Q, R]``.
        weights: :math:`w`, not negative, ``[Q, R]``.
        two_sided: ``[Q, R]``, boolean.
    """

    rows: Tensor
    goals: Tensor
    weights: Tensor
    two_sided: Tensor

    def __getitem__(self, problems: Tensor) -> HingedLeastSquares:
        """Some of the problems."""
        parts = (self.rows, self.goals, self.weights, self.two_sided)
        return HingedLeastSquares(*(part[problems] for part in parts))

    def errors(self, solution: Tensor) -> Tensor:
        """:math:`e`, zero where the hinge is idle: ``[Q, R]``."""
        errors = (self.rows @ solution[..., None])[..., 0] - self.goals
        return torch.where(self.two_sided, errors, errors.clamp(min=0))

    def loss(self, errors: Tensor) -> Tensor:
        """``[Q]``."""
        return (self.weights * errors**2).sum(1)

    def gradient(self, errors: Tensor) -> Tensor:
        """``[Q, I]``."""
        return 2 * ((self.weights * errors)[:, None] @ self.rows)[:, 0]

    def curvature(self, errors: Tensor) -> Tensor:
        """Second derivative on the active rows, ``[Q, I, I]``."""
        weights = 2 * self.weights * (self.two_sided | (errors > 0))
        n_active = max(1, int((weights > 0).sum(1).max()))  # often a small part, and this is where the time goes
        weights, places = weights.topk(n_active, dim=1, sorted=False)
        rows = self.rows.gather(1, places[..., None].expand(-1, -1, self.rows.shape[2]))
        rows *= weights.sqrt()[..., None]
        return rows.mT @ rows


@dataclass(frozen=True)
class BoxSolution:
    """Solutions and how good they are.

    Attributes:
        values: ``[Q, I]``, in [0, 1].
        optimality: Largest projected gradient, relative to the largest gradient at the start, ``[Q]``.
        n_steps: Steps that the slowest problem took.
    """

    values: Tensor
    optimality: Tensor
    n_steps: int


def minimise_in_box(problem: HingedLeastSquares, tolerance: float = TOLERANCE) -> BoxSolution:
    """Solve all problems together; those that are done drop out.

    Each step is a Newton step on the variables that are not held at a bound, shortened until the loss falls (Bertsekas,
    *Projected Newton methods for optimization problems with simple constraints*, SIAM J. Control Optim. 20, 1982).
    Starts from all ones: a variable that nothing depends on stays there.

    Args:
        problem: The problems.
        tolerance: See `TOLERANCE`.
    """
    n_problems, _, n_variables = problem.rows.shape
    values = problem.rows.new_ones(n_problems, n_variables)
    optimality = problem.rows.new_zeros(n_problems)
    first: Tensor | None = None
    open_ = torch.arange(n_problems, device=values.device)
    moved = torch.ones_like(open_, dtype=torch.bool)  # what rounding keeps from moving is done
    lengths = torch.ones_like(optimality)  # parts of the last step that were gone
    n_steps = 0
    for n_steps in range(MAX_STEPS + 1):
        current = values[open_]
        errors = problem.errors(current)
        gradient = problem.gradient(errors)
        if first is None:
            first = gradient.abs().amax(1).clamp(min=torch.finfo(gradient.dtype).tiny)
        projected = _projected(current, gradient)
        optimality[open_] = projected.abs().amax(1) / first[open_]
        going = (optimality[open_] > tolerance) & moved
        if not bool(going.any()) or n_steps == MAX_STEPS:
            break
        if int(going.sum()) <= len(going) * WORTH_COPYING:
            problem, open_ = problem[going], open_[going]
            current, errors, gradient, projected = (part[going] for part in (current, errors, gradient, projected))
            going = going[going]
        step = _newton_step(problem.curvature(errors), projected)
        first_tried = (LENGTHENING * lengths[open_]).clamp(max=1)
        reached, gone = _shortened(problem, current, gradient, step, problem.loss(errors), going, first_tried)
        lengths[open_] = gone
        moved = (reached != current).any(1)
        values[open_] = reached
    return BoxSolution(values, optimality, n_steps)


def _projected(values: Tensor, gradient: Tensor) -> Tensor:
    """The gradient without what points out of the box."""
    held = ((values <= 0) & (gradient > 0)) | ((values >= 1) & (gradient < 0))
    return gradient.masked_fill(held, 0)


def _newton_step(curvature: Tensor, projected: Tensor) -> Tensor:
    """Newton step on the free variables, zero on the others."""
    free = projected != 0
    n_free = max(1, int(free.sum(1).max()))
    if n_free > MOSTLY_FREE * free.shape[1]:
        return _solved(curvature, projected, free)
    # A system of the free variables alone: its solution takes the third power of their number.
    places = free.to(torch.uint8).topk(n_free, dim=1, sorted=False).indices
    square = curvature.gather(1, places[..., None].expand(-1, -1, curvature.shape[2]))
    square = square.gather(2, places[:, None].expand(-1, n_free, -1))
    step = _solved(square, projected.gather(1, places), free.gather(1, places))
    return torch.zeros_like(projected).scatter_(1, places, step)


def _solved(curvature: Tensor, projected: Tensor, free: Tensor) -> Tensor:
    both = free[:, :, None] & free[:, None]
    diagonal = curvature.diagonal(dim1=1, dim2=2)
    lift = torch.where(free, RIDGE * diagonal.amax(1, keepdim=True) + torch.finfo(diagonal.dtype).tiny, 1)
    system = torch.where(both, curvature, 0) + torch.diag_embed(lift)
    factor, _ = torch.linalg.cholesky_ex(system)
    return -torch.cholesky_solve(projected[..., None], factor)[..., 0]


def _shortened(
    problem: HingedLeastSquares,
    start: Tensor,
    gradient: Tensor,
    step: Tensor,
    loss: Tensor,
    going: Tensor,
    lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    """Go along the step, bent at the bounds, as far as the loss falls sufficiently; only where it is ``going``.

    Args:
        problem: The problems.
        start: Where they are, ``[Q, I]``.
        gradient: There, ``[Q, I]``.
        step: ``[Q, I]``.
        loss: At the start, ``[Q]``.
        going: Which of them are to go on, ``[Q]``, boolean.
        lengths: The part of the step that is tried first, ``[Q]``: from one step to the next it changes little.

    Returns:
        Where that leads, ``[Q, I]``, and the parts of the step that were gone, ``[Q]``.
    """
    reached, todo, lengths = start.clone(), going.nonzero()[:, 0], lengths.clone()
    while len(todo):
        tried = (start + lengths[:, None] * step).clamp(0, 1)
        expected = (gradient * (tried - start)).sum(1)
        few = len(todo) <= len(start) * WORTH_COPYING
        part, those = (problem[todo], todo) if few else (problem, slice(None))
        falls = torch.zeros_like(loss, dtype=torch.bool)
        allowed = loss + SUFFICIENT_DECREASE * expected
        falls[those] = part.loss(part.errors(tried[those])) < allowed[those]
        done = todo[falls[todo]]
        reached[done] = tried[done]
        todo = todo[~falls[todo]]
        lengths[todo] /= 2
        todo = todo[lengths[todo] >= SHORTEST_STEP]
    return reached, lengths
