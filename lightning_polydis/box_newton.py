"""Minimisation of hinged least squares over a box: projected Newton with an active set."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

MAX_STEPS = 30
TOLERANCE = 1e-9
"""Largest projected gradient of a solution, relative to the largest gradient at the start (if rounding lets it)."""

LARGE = 2**16
"""Size of a problem (rows times variables) from which on `float32` leads near the minimum: it is twice as fast."""

ROUGH = 1e-4
"""Tolerance of that."""

RIDGE = {torch.float32: 1e-6, torch.float64: 1e-9}
"""What is added to the system of a step, relative to its largest diagonal entry."""

MAX_RIDGES = 4
SUFFICIENT_DECREASE = 1e-4
SHORTEST_STEP = 2.0**-30
LENGTHENING = 2
"""How much more of a step is tried than was gone of the last one."""


@dataclass(frozen=True)
class HingedLeastSquares:
    r"""A problem: minimise :math:`\sum_r w_r \psi_r(y_r \cdot m - g_r)` over :math:`m \in [0, 1]^I`.

    :math:`\psi_r(e)` is :math:`e^2` for two-sided rows and :math:`\max(e, 0)^2` for the others, so the loss is convex
    and has a piecewise constant second derivative.

    Attributes:
        rows: :math:`y`, ``[R, I]``, ``float64``.
        goals: :math:`g`, ``[R]``.
        weights: :math:`w`, not negative, ``[R]``.
        two_sided: ``[R]``, boolean.
    """

    rows: Tensor
    goals: Tensor
    weights: Tensor
    two_sided: Tensor

    def __getitem__(self, rows: Tensor) -> HingedLeastSquares:
        """The problem of some of the rows alone, by their numbers."""
        # `index_select` copies several times faster than an index does.
        parts = (self.rows, self.goals, self.weights, self.two_sided)
        return HingedLeastSquares(*(part.index_select(0, rows) for part in parts))

    def to(self, dtype: torch.dtype) -> HingedLeastSquares:
        """The same in another precision."""
        return HingedLeastSquares(self.rows.to(dtype), self.goals.to(dtype), self.weights.to(dtype), self.two_sided)

    def errors(self, solution: Tensor) -> Tensor:
        """:math:`e`, zero where the hinge is idle: ``[R]``."""
        errors = torch.mv(self.rows, solution) - self.goals
        return torch.where(self.two_sided, errors, errors.clamp(min=0))

    def loss(self, errors: Tensor) -> float:
        """The sum."""
        return float(self.weights @ errors**2)

    def gradient(self, errors: Tensor) -> Tensor:
        """``[I]``."""
        return torch.mv(self.rows.T, 2 * self.weights * errors)

    def curvature(self, errors: Tensor, variables: Tensor) -> Tensor:
        """Second derivative with respect to ``F`` of the variables, by their numbers: ``[F, F]``."""
        active = ((self.two_sided | (errors > 0)) & (self.weights > 0)).nonzero()[:, 0]  # often a small part
        rows = self.rows.index_select(0, active).index_select(1, variables)
        rows *= (2 * self.weights[active]).sqrt()[:, None]
        return rows.T @ rows


@dataclass(frozen=True)
class BoxSolution:
    """A solution and how good it is.

    Attributes:
        values: ``[I]``, in [0, 1].
        optimality: Largest projected gradient, relative to the largest gradient at the start.
        n_steps: Steps that it took.
    """

    values: Tensor
    optimality: float
    n_steps: int


def minimise_in_box(problem: HingedLeastSquares) -> BoxSolution:
    """Solve a problem, to `TOLERANCE` or as far as `MAX_STEPS` steps in each precision lead.

    Each step is a Newton step on the variables that are not held at a bound, shortened until the loss falls (Bertsekas,
    *Projected Newton methods for optimization problems with simple constraints*, SIAM J. Control Optim. 20, 1982).
    Starts from all ones: a variable that nothing depends on stays there. Of large problems the first steps are taken in
    ``float32``, the last ones always in ``float64``.

    Args:
        problem: The problem.
    """
    problem = problem[problem.weights.nonzero()[:, 0]]
    start = problem.rows.new_ones(problem.rows.shape[1])
    slope = max(float(problem.gradient(problem.errors(start)).abs().max()), torch.finfo(start.dtype).tiny)
    if problem.rows.numel() < LARGE:
        return _descended(problem, start, slope, TOLERANCE)
    rough = _descended(problem.to(torch.float32), start.float(), slope, ROUGH)
    fine = _descended(problem, rough.values.double(), slope, TOLERANCE)
    return replace(fine, n_steps=rough.n_steps + fine.n_steps)


def _descended(problem: HingedLeastSquares, values: Tensor, slope: float, tolerance: float) -> BoxSolution:
    """Go down from somewhere.

    Args:
        problem: The problem.
        values: Where to start, ``[I]``.
        slope: The largest gradient at the very start.
        tolerance: Projected gradient at which it ends, relative to that.
    """
    errors = problem.errors(values)
    length = 1.0  # part of the last step that was gone
    for n_steps in range(MAX_STEPS + 1):
        gradient = problem.gradient(errors)
        projected = _projected(values, gradient)
        optimality = float(projected.abs().max()) / slope
        if optimality <= tolerance or n_steps == MAX_STEPS:
            break
        step = _newton_step(problem, errors, projected)
        reached, length = _shortened(problem, values, errors, gradient, step, min(1, LENGTHENING * length))
        if torch.equal(reached, values):
            break  # rounding keeps it from moving
        values, errors = reached, problem.errors(reached)
    return BoxSolution(values, optimality, n_steps)


def _projected(values: Tensor, gradient: Tensor) -> Tensor:
    """The gradient without what points out of the box."""
    held = ((values <= 0) & (gradient > 0)) | ((values >= 1) & (gradient < 0))
    return gradient.masked_fill(held, 0)


def _newton_step(problem: HingedLeastSquares, errors: Tensor, projected: Tensor) -> Tensor:
    """Newton step on the free variables, zero on the others."""
    free = projected.nonzero()[:, 0]
    system = problem.curvature(errors, free).double()
    factor = _factor(system, RIDGE[projected.dtype])
    step = -torch.cholesky_solve(projected[free][:, None].double(), factor)[:, 0]
    return torch.zeros_like(projected).index_copy_(0, free, step.to(projected.dtype))


def _factor(system: Tensor, ridge: float) -> Tensor:
    """Cholesky's factor, with as much of a ridge as it takes where rounding has made the system indefinite."""
    diagonal = system.diagonal()
    lift = ridge * diagonal.max() + torch.finfo(diagonal.dtype).tiny
    factor = system
    for _ in range(MAX_RIDGES):
        diagonal += lift
        factor, failed = torch.linalg.cholesky_ex(system)
        if not bool(failed):
            break
        lift *= 100
    return factor


def _shortened(
    problem: HingedLeastSquares, start: Tensor, errors: Tensor, gradient: Tensor, step: Tensor, length: float
) -> tuple[Tensor, float]:
    """Go along the step, bent at the bounds, as far as the loss falls sufficiently.

    Args:
        problem: The problem.
        start: Where it is, ``[I]``.
        errors: There, ``[R]``.
        gradient: There, ``[I]``.
        step: ``[I]``.
        length: The part of the step that is tried first: from one step to the next it changes little.

    Returns:
        Where that leads, ``[I]``, and the part of the step that was gone.
    """
    loss = problem.loss(errors)
    while length >= SHORTEST_STEP:
        tried = (start + length * step).clamp_(0, 1)
        allowed = loss + SUFFICIENT_DECREASE * float(gradient @ (tried - start))
        if problem.loss(problem.errors(tried)) < allowed:
            return tried, length
        length /= 2
    return start, length
