"""The path: closed forms, orders of the solvers, and equality with diffusers' scheduler."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.method.flow import (
    EVALUATIONS,
    SOLVERS,
    interpolate,
    per_row,
    sample,
    shift_time,
    time_grid,
    velocity,
)
from toy.plane import Mixture, ring_mixture

quick = settings(deadline=None, max_examples=50)
times = st.floats(0, 1)
shifts = st.floats(0.1, 10)
solvers = pytest.mark.parametrize("solver", SOLVERS)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def even(steps, end=0.0):
    """Equal steps from 1 to `end` in float64, for measuring orders."""
    return torch.linspace(1, end, steps + 1, dtype=torch.float64)


# The path


@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 3, 4, 4)])
def test_interpolate_ends_and_velocity(shape):
    data, noise = normal(*shape), normal(*shape, seed=1)
    assert torch.equal(interpolate(data, noise, torch.zeros(5)), data)
    assert torch.equal(interpolate(data, noise, torch.ones(5)), noise)
    t, later = torch.linspace(0.1, 0.5, 5), torch.linspace(0.3, 0.9, 5)
    moved = interpolate(data, noise, later) - interpolate(data, noise, t)
    torch.testing.assert_close(moved, per_row(later - t, data) * velocity(data, noise))


def test_every_row_has_its_own_time():
    x = interpolate(torch.zeros(3, 2), torch.ones(3, 2), torch.tensor([0.1, 0.5, 0.7]))
    torch.testing.assert_close(x, torch.tensor([[0.1, 0.1], [0.5, 0.5], [0.7, 0.7]]))


# Time shift and grids


@quick
@given(times, shifts, shifts)
def test_shifts_multiply_and_undo(t, s, r):
    assert shift_time(shift_time(t, s), r) == pytest.approx(shift_time(t, s * r), abs=1e-9)
    assert shift_time(shift_time(t, s), 1 / s) == pytest.approx(t, abs=1e-9)
    assert shift_time(t, 1.0) == t


@quick
@given(st.floats(0.001, 0.999), shifts)
def test_a_shift_multiplies_the_odds(t, s):
    moved = shift_time(t, s)
    assert moved / (1 - moved) == pytest.approx(s * t / (1 - t), rel=1e-6)


@quick
@given(times, times, shifts)
def test_a_shift_is_monotone_and_stays_in_the_unit_interval(a, b, s):
    low, high = shift_time(min(a, b), s), shift_time(max(a, b), s)
    assert -1e-12 <= low <= high + 1e-12 <= 1 + 1e-9
    assert shift_time(0.0, s) == 0 and shift_time(1.0, s) == pytest.approx(1)


def test_shift_time_broadcasts():
    t, s = torch.rand(4, 3), torch.rand(4, 1) + 0.5
    moved = shift_time(t, s)
    assert moved.shape == (4, 3)
    torch.testing.assert_close(moved[2], shift_time(t[2], s[2].item()))


@quick
@given(st.integers(1, 200), shifts)
def test_grids_decrease_from_one_to_zero(steps, shift):
    grid = time_grid(steps, shift)
    assert grid.shape == (steps + 1,) and grid.dtype == torch.float32
    assert grid[0].item() == pytest.approx(1, abs=1e-6) and grid[-1] == 0
    assert (grid.diff() < 0).all()


@pytest.mark.parametrize("steps, shift", [(0, 1.0), (-3, 1.0), (4, 0.0), (4, -1.0), (4, math.nan)])
def test_bad_grids_are_refused(steps, shift):
    with pytest.raises(ValueError, match="steps=|shift="):
        time_grid(steps, shift)


# The exact field


def test_the_mixture_field_is_the_conditional_mean():
    ring, g = ring_mixture(), torch.Generator().manual_seed(0)
    data, noise, t = ring.sample(400_000, g), torch.randn(400_000, 2, generator=g), torch.tensor([0.6])
    place = torch.tensor([[0.5, -0.4]])
    near = (interpolate(data, noise, t) - place).norm(dim=1) < 0.1
    pairs = velocity(data, noise)[near]
    error = pairs.std(0) / len(pairs) ** 0.5
    assert len(pairs) > 2000
    assert ((pairs.mean(0) - ring.field(place, t)[0]).abs() < 4 * error).all()


def test_one_euler_step_gives_the_mean_of_the_data():
    mixture = Mixture(torch.tensor([[1.0, 2.0], [3.0, -1.0]]), 0.3)
    x = sample(mixture.field, normal(64, 2), time_grid(1))
    torch.testing.assert_close(x, torch.tensor([[2.0, 0.5]]).expand(64, 2), atol=1e-5, rtol=0)


@solvers
def test_a_gaussian_road_ends_at_its_closed_form(solver):
    mixture, noise = (
        Mixture(torch.tensor([[0.7, -0.3]], dtype=torch.float64), 0.3),
        normal(100, 2, dtype=torch.float64),
    )
    exact = mixture.means + 0.3 * noise
    error = (sample(mixture.field, noise, even(400), solver=solver) - exact).abs().max()
    assert error < (0.01 if solver == "euler" else 1e-4)


# Solvers


@solvers
@pytest.mark.parametrize("end", [0.0, 0.3])
def test_order_of_convergence(solver, end):
    x = torch.linspace(0.5, 2, 20, dtype=torch.float64)[
        :, None
    ]  # dx/dt = x^2: 1/x falls by 1 in a unit of time
    exact = x / (1 + (1 - end) * x)
    errors = [
        (sample(lambda x, t, cond: x**2, x, even(n, end), solver=solver) - exact).abs().max().item()
        for n in (64, 128)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(
        {"euler": 1, "midpoint": 2, "heun": 2}[solver], abs=0.06
    )


@solvers
def test_order_of_convergence_in_time(solver):
    def field(x, t, cond):
        return (3 * t.square())[:, None].expand_as(x)  # x falls by 1 from t = 1 to 0

    x = normal(4, 2, dtype=torch.float64)
    errors = [(sample(field, x, even(n), solver=solver) - (x - 1)).abs().max().item() for n in (32, 64)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(
        {"euler": 1, "midpoint": 2, "heun": 2}[solver], abs=0.06
    )


@solvers
@pytest.mark.parametrize("grid", [[1.0, 0.0], [1.0, 0.9, 0.2, 0.0]])
def test_a_straight_field_is_exact_in_any_number_of_steps(solver, grid):
    data, noise = normal(8, 3, 4, 4), normal(8, 3, 4, 4, seed=1)
    x = sample(lambda x, t, cond: cond, noise, grid, velocity(data, noise), solver)
    torch.testing.assert_close(x, data, atol=1e-5, rtol=0)


@solvers
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_what_the_field_is_asked(solver, steps):
    times_of_calls = []

    def field(x, t, cond):
        assert t.shape == (len(x),) and t.dtype == torch.float32 and cond == "a caption"
        assert not torch.is_grad_enabled()
        times_of_calls.append(t[0].item())
        return torch.zeros_like(x)

    x = sample(
        field,
        torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=False),
        time_grid(steps),
        "a caption",
        solver,
    )
    assert len(times_of_calls) == steps * EVALUATIONS[solver]
    assert x.dtype == torch.bfloat16 and times_of_calls[0] == 1 and min(times_of_calls) >= -1e-7


@solvers
def test_trajectory_holds_every_point(solver):
    ring, noise, grid = ring_mixture(), normal(10, 2), time_grid(5, 2.0)
    path = sample(ring.field, noise, grid, solver=solver, trajectory=True)
    assert path.shape == (6, 10, 2) and torch.equal(path[0], noise)
    assert torch.equal(path[-1], sample(ring.field, noise, grid, solver=solver))
    assert torch.equal(
        path[-1], sample(ring.field, path[2], grid[2:], solver=solver)
    )  # a trajectory can be taken up again


def test_times_may_be_a_list_and_the_noise_is_left_alone():
    ring, noise = ring_mixture(), normal(10, 2)
    before = noise.clone()
    assert torch.equal(sample(ring.field, noise, [1.0, 0.5, 0.0]), sample(ring.field, noise, time_grid(2)))
    assert torch.equal(noise, before)


@pytest.mark.parametrize(
    "bad", [[0.0, 1.0], [1.0, 0.5, 0.5, 0.0], [1.0, 0.2, 0.4, 0.0], [1.0], [], [1.0, math.nan, 0.0]]
)
def test_times_that_do_not_decrease_are_refused(bad):
    with pytest.raises(ValueError, match="times"):
        sample(ring_mixture().field, normal(4, 2), bad)


def test_an_unknown_solver_is_refused_by_name():
    with pytest.raises(ValueError, match="leap.*euler"):
        sample(ring_mixture().field, normal(4, 2), time_grid(2), solver="leap")


# diffusers


@pytest.fixture(scope="module")
def scheduler():
    diffusers = pytest.importorskip("diffusers")

    def make(steps, shift, given=True):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(
            **({"sigmas": np.linspace(1, 1 / steps, steps)} if given else {"num_inference_steps": steps})
        )
        return scheduler

    return make


@pytest.mark.parametrize("shift", [1.0, 1.7, 3.0, 3.25, 7.5])
def test_grids_equal_those_of_diffusers(scheduler, shift):
    for steps in range(1, 51):
        torch.testing.assert_close(time_grid(steps, shift), scheduler(steps, shift).sigmas, atol=2e-7, rtol=0)


@pytest.mark.parametrize("steps, shift", [(1, 1.0), (2, 3.0), (3, 3.0), (4, 1.7), (8, 3.25), (20, 1.0)])
def test_sampling_equals_diffusers_step_for_step(scheduler, steps, shift):
    ring, noise, stock = ring_mixture(), normal(50, 2), scheduler(steps, shift)
    theirs = [noise]
    for t, sigma in zip(stock.timesteps, stock.sigmas, strict=False):
        theirs.append(stock.step(ring.field(theirs[-1], sigma.expand(50)), t, theirs[-1]).prev_sample)
    ours = sample(ring.field, noise, time_grid(steps, shift), trajectory=True)
    torch.testing.assert_close(ours, torch.stack(theirs), atol=1e-5, rtol=0)


def test_the_default_grid_of_diffusers_wastes_a_step(scheduler):
    left_alone = scheduler(3, 3.0, given=False).sigmas
    torch.testing.assert_close(left_alone, torch.tensor([1, 0.7511, 0.0089, 0]), atol=2e-4, rtol=0)
    assert (left_alone - time_grid(3, 3.0)).abs().max() > 0.5


# Imports


@pytest.mark.slow
def test_flow_and_metrics_need_torch_alone():
    code = "import scfm.method.flow, scfm.method.metrics, sys\n"
    code += "print([m for m in ('diffusers', 'transformers', 'peft', 'toy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
