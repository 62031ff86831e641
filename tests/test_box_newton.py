import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear, minimize

from lightning_polydis import box_newton
from lightning_polydis.box_newton import HingedLeastSquares, minimise_in_box

GENERATOR = torch.Generator()


def random_problem(seed, n_rows=40, n_variables=7, two_sided=0.5, shift=0.0):
    """Goals lie so that some variables end at either bound and some between."""
    generator = GENERATOR.manual_seed(seed)
    rows = torch.randn(n_rows, n_variables, generator=generator).double()
    inside = torch.randn(n_variables, generator=generator).double() * 0.7 + 0.5
    goals = rows @ inside + 0.3 * torch.randn(n_rows, generator=generator) - shift
    weights = torch.rand(n_rows, generator=generator).double()
    return HingedLeastSquares(rows, goals, weights, torch.rand(n_rows, generator=generator) < two_sided)


def plain_loss(problem, values):
    """Row by row."""
    total = 0.0
    parts = (problem.rows, problem.goals, problem.weights, problem.two_sided)
    for row, goal, weight, two_sided in zip(*parts, strict=True):
        error = row @ values - goal
        total = total + weight * (error**2 if two_sided else error.clamp(min=0) ** 2)
    return total


def by_scipy(problem):
    """L-BFGS-B, started again where it stopped until nothing is gained."""

    def loss_and_slope(values):
        values = torch.from_numpy(values).requires_grad_()
        loss = plain_loss(problem, values)
        return float(loss.detach()), torch.autograd.grad(loss, values)[0].numpy()

    start = np.full(problem.rows.shape[1], 0.5)
    options = {"ftol": 0, "gtol": 1e-13, "maxiter": 5000, "maxfun": 5000, "maxcor": 30}
    for _ in range(3):
        found = minimize(
            loss_and_slope, start, jac=True, method="L-BFGS-B", bounds=[(0, 1)] * len(start), options=options
        )
        start = found.x
    return found.fun, torch.from_numpy(found.x)


def projected_slope(problem, values):
    values = values.clone().requires_grad_()
    (slope,) = torch.autograd.grad(plain_loss(problem, values), values)
    inside = torch.where(values <= 0, slope.clamp(max=0), torch.where(values >= 1, slope.clamp(min=0), slope))
    return float(inside.abs().max())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("two_sided", [0.1, 0.5, 1.0])
def test_the_minimum_is_that_of_another_solver(seed, two_sided):
    problem = random_problem(seed, two_sided=two_sided)
    found = minimise_in_box(problem)
    expected, place = by_scipy(problem)
    values = found.values
    assert float(plain_loss(problem, values)) == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(values, place, rtol=0, atol=1e-5)
    assert bool(((values >= 0) & (values <= 1)).all())
    assert 0 <= found.optimality <= 1e-9
    first = problem.gradient(problem.errors(torch.ones(7).double())).abs().max()
    assert projected_slope(problem, values) <= 1.1e-9 * float(first)


def test_the_random_problems_end_at_both_bounds_and_between():
    values = torch.stack([minimise_in_box(random_problem(seed)).values for seed in range(20)])
    assert bool((values == 0).any())
    assert bool((values == 1).any())
    assert bool(((values > 0) & (values < 1)).any())


def test_plain_least_squares_in_a_box_are_those_of_an_exact_solver():
    problem = random_problem(7, two_sided=1.0)
    root = problem.weights.sqrt()
    expected = lsq_linear(
        (root[:, None] * problem.rows).numpy(), (root * problem.goals).numpy(), (0, 1), method="bvls", tol=1e-15
    )
    torch.testing.assert_close(
        minimise_in_box(problem).values, torch.from_numpy(expected.x).clamp(0, 1), rtol=0, atol=1e-9
    )


def test_problems_with_hinges_only_reach_zero_where_they_can():
    """Goals above every row's largest value can be met by any membership: nothing moves from the start."""
    idle = random_problem(8, two_sided=0.0, shift=-100.0)
    found = minimise_in_box(idle)
    assert torch.equal(found.values, torch.ones(7).double())
    assert (found.optimality, found.n_steps) == (0, 0)
    active = random_problem(8, two_sided=0.0)
    solution = minimise_in_box(active)
    expected, _ = by_scipy(active)
    loss = float(plain_loss(active, solution.values))
    assert loss == pytest.approx(expected, rel=1e-8, abs=1e-12)
    assert loss < 0.5 * float(plain_loss(active, torch.ones(7).double()))
    assert solution.optimality <= 1e-9


@pytest.mark.parametrize("n_rows", [250, 900])
def test_large_problems_which_start_in_single_precision_end_at_the_same_minimum(n_rows, monkeypatch):
    problem = random_problem(9, n_rows=n_rows, n_variables=300)
    assert problem.rows.numel() >= box_newton.LARGE
    found = minimise_in_box(problem)
    monkeypatch.setattr(box_newton, "LARGE", np.inf)
    expected = minimise_in_box(problem)
    assert found.values.dtype == torch.float64
    assert found.optimality <= 1e-9
    loss, least = (float(plain_loss(problem, solution.values)) for solution in (found, expected))
    assert loss == pytest.approx(least, rel=1e-9, abs=1e-12)
    if n_rows > 300:  # else the minimum is not unique
        torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-6)


def test_large_numbers_do_no_harm_in_single_precision():
    problem = random_problem(9, n_rows=300, n_variables=300)
    huge = HingedLeastSquares(1e30 * problem.rows, 1e30 * problem.goals, problem.weights, problem.two_sided)
    torch.testing.assert_close(minimise_in_box(huge).values, minimise_in_box(problem).values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_variables_that_nothing_depends_on_stay_at_one(seed):
    problem = random_problem(seed)
    problem.rows[..., [1, 4]] = 0
    found = minimise_in_box(problem).values
    assert found[[1, 4]].tolist() == [1, 1]
    rest = HingedLeastSquares(problem.rows[..., [0, 2, 3, 5, 6]], problem.goals, problem.weights, problem.two_sided)
    torch.testing.assert_close(found[[0, 2, 3, 5, 6]], minimise_in_box(rest).values, rtol=0, atol=1e-8)


def test_rows_without_weight_have_no_say():
    problem = random_problem(10)
    padded = HingedLeastSquares(
        torch.cat([problem.rows, 1e6 * torch.ones(5, 7).double()]),
        torch.cat([problem.goals, torch.zeros(5).double()]),
        torch.cat([problem.weights, torch.zeros(5).double()]),
        torch.cat([problem.two_sided, torch.zeros(5, dtype=torch.bool)]),
    )
    torch.testing.assert_close(minimise_in_box(padded).values, minimise_in_box(problem).values, rtol=0, atol=1e-9)
    nothing = HingedLeastSquares(problem.rows, problem.goals, torch.zeros_like(problem.weights), problem.two_sided)
    assert torch.equal(minimise_in_box(nothing).values, torch.ones(7).double())


@pytest.mark.parametrize("n_rows", [3, 30])
def test_sources_that_depend_on_one_another_are_no_trouble(n_rows):
    """Fewer rows than variables, and pairs of equal columns: the minimum is not unique, its value is."""
    problem = random_problem(11, n_rows=n_rows, n_variables=10)
    problem.rows[..., 5:] = problem.rows[..., :5]
    found = minimise_in_box(problem)
    expected, _ = by_scipy(problem)
    assert float(plain_loss(problem, found.values)) == pytest.approx(expected, rel=1e-8, abs=1e-12)
    assert found.optimality <= 1e-9


@pytest.mark.parametrize("factor", [1e-12, 1e9])
def test_the_unit_of_the_loss_does_not_matter(factor):
    problem = random_problem(12)
    scaled = HingedLeastSquares(problem.rows, problem.goals, factor * problem.weights, problem.two_sided)
    torch.testing.assert_close(minimise_in_box(scaled).values, minimise_in_box(problem).values, rtol=0, atol=1e-8)


def test_gradient_and_curvature_are_those_of_the_loss():
    problem, some = random_problem(13), torch.tensor([0, 2, 3, 6])
    values = torch.rand(7, generator=GENERATOR).double().requires_grad_()
    loss = plain_loss(problem, values)
    errors = problem.errors(values.detach())
    assert problem.loss(errors) == pytest.approx(loss.item(), rel=1e-12)
    (slope,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(problem.gradient(errors), slope, rtol=1e-10, atol=1e-10)
    expected = torch.autograd.functional.hessian(lambda x: plain_loss(problem, x), values)[some][:, some]
    torch.testing.assert_close(problem.curvature(errors, some), expected, rtol=1e-10, atol=1e-10)


def test_a_system_that_rounding_has_made_indefinite_is_lifted_as_far_as_it_takes():
    system = torch.ones(3, 3).double() - 1e-5 * torch.eye(3).double()
    factor = box_newton._factor(system.clone(), ridge=1e-6)
    torch.testing.assert_close(factor @ factor.T, system, rtol=0, atol=2e-4)
    assert float(torch.linalg.eigvalsh(factor @ factor.T).min()) > 0


def test_a_system_of_nan_ends():
    assert not torch.isfinite(box_newton._factor(torch.full((2, 2), torch.nan).double(), ridge=1e-6)).all()
