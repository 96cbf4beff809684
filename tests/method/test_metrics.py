"""The distances against closed forms, scipy, and the cases that fool them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.method.flow import sample, time_grid
from scfm.method.metrics import (
    curvature,
    endpoint_distance,
    frechet_distance,
    moments,
    sliced_wasserstein,
    sorted_columns,
)
from toy.plane import checkerboard, ring_mixture

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 10_000)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def whiten(x):
    mean, cov = moments(x)
    values, vectors = torch.linalg.eigh(cov)
    return (x.double() - mean) @ vectors / values.sqrt()


# Sliced Wasserstein


@pytest.mark.parametrize("deviation", [0.5, 1.0, 2.0])
def test_sw2_of_two_isotropic_normals(deviation):
    assert sliced_wasserstein(deviation * normal(20_000, 2), normal(20_000, 2, seed=1)) == pytest.approx(
        abs(deviation - 1), abs=0.03
    )


@pytest.mark.parametrize("dims", [1, 2, 5])
def test_sw2_of_a_shift(dims):
    x, move = normal(300, dims), normal(dims, seed=3)
    measured = sliced_wasserstein(x, x + move, directions=5000)
    assert measured == pytest.approx(move.norm().item() / math.sqrt(dims), rel=0.02)


def test_sw2_on_a_line_is_the_distance_of_scipy():
    optimize = pytest.importorskip("scipy.optimize")
    a, b = normal(40, 1), 2 * normal(40, 1, seed=1) + 1
    cost = torch.cdist(a, b).square().numpy()
    rows, columns = optimize.linear_sum_assignment(cost)
    assert sliced_wasserstein(a, b) == pytest.approx(math.sqrt(cost[rows, columns].mean()), rel=1e-5)


def test_sw2_is_no_larger_than_w2():
    optimize = pytest.importorskip("scipy.optimize")
    a, b = checkerboard(200, torch.Generator().manual_seed(0)), normal(200, 2)
    cost = torch.cdist(a, b).square().numpy()
    rows, columns = optimize.linear_sum_assignment(cost)
    assert 0 < sliced_wasserstein(a, b) <= math.sqrt(cost[rows, columns].mean())


@quick
@given(seeds, st.floats(0.1, 10), st.integers(1, 6))
def test_sw2_is_a_scaled_symmetric_distance_of_clouds(seed, scale, dims):
    a, b, c = (normal(50, dims, seed=seed + i) for i in range(3))
    ab = sliced_wasserstein(a, b)
    assert sliced_wasserstein(b, a) == pytest.approx(ab, rel=1e-5)
    assert sliced_wasserstein(a, a.flip(0)) == 0
    assert sliced_wasserstein(scale * a, scale * b) == pytest.approx(scale * ab, rel=1e-4)
    assert sliced_wasserstein(a, c) <= ab + sliced_wasserstein(b, c) + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_columns_are_sorted_as_torch_sorts_them(dtype):
    whole = torch.cat([normal(50, 7), normal(50, 7).round()]).to(dtype).requires_grad_()  # with equal numbers
    for x in (whole, whole[:, :1], whole[:, :1].clone(), whole.T):
        kept = x.detach().clone()
        assert torch.equal(sorted_columns(x), kept.sort(0).values) and torch.equal(x, kept)
        assert sorted_columns(x).is_contiguous() and not sorted_columns(x).requires_grad


def test_sw2_depends_on_its_seed_alone():
    a, b = normal(100, 2), normal(100, 2, seed=1)
    first = sliced_wasserstein(a, b)
    torch.manual_seed(7)
    assert sliced_wasserstein(a, b) == first != sliced_wasserstein(a, b, seed=1)


def test_sw2_floor_shrinks_with_the_number_of_points():
    floors = [
        sum(sliced_wasserstein(normal(n, 2, seed=i), normal(n, 2, seed=i + 99)) for i in range(10)) / 10
        for n in (100, 6400)
    ]
    assert floors[0] / floors[1] == pytest.approx(8, rel=0.5)


@pytest.mark.parametrize("a, b", [((5, 2), (6, 2)), ((5, 2), (5, 3)), ((5,), (5,)), ((5, 2, 2), (5, 2, 2))])
def test_sw2_refuses_other_shapes(a, b):
    with pytest.raises(ValueError, match="shape"):
        sliced_wasserstein(torch.zeros(a), torch.zeros(b))


# Frechet distance


def test_frechet_of_a_scaled_and_moved_cloud():
    x = whiten(normal(200, 4))  # mean 0, covariance 1, to rounding
    move = torch.tensor([1.0, 2, 0, -1], dtype=torch.float64)
    assert frechet_distance(x, 3 * x + move) == pytest.approx(6 + 4 * (3 - 1) ** 2, rel=1e-9)


def test_frechet_equals_scipy_where_covariances_do_not_commute():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = normal(300, 5) @ normal(5, 5, seed=1), normal(400, 5, seed=2) @ normal(5, 5, seed=3) + 0.5
    (mean_a, cov_a), (mean_b, cov_b) = moments(a), moments(b)
    root = linalg.sqrtm(cov_a.numpy() @ cov_b.numpy()).real.trace()
    expected = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-8)


@quick
@given(seeds, st.integers(1, 8))
def test_frechet_is_symmetric_and_not_negative(seed, dims):
    a, b = normal(30, dims, seed=seed), 2 * normal(40, dims, seed=seed + 1) + 1
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-8)
    assert frechet_distance(a, b) > 0 and abs(frechet_distance(a, a)) < 1e-9


def test_frechet_with_fewer_points_than_dimensions():
    a = normal(10, 64)
    assert abs(frechet_distance(a, a)) < 1e-4 and frechet_distance(a, normal(10, 64, seed=1)) > 0


def test_frechet_is_no_larger_than_w2_squared():
    a, b = normal(100, 3), checkerboard(100, torch.Generator().manual_seed(0)) @ normal(2, 3)
    scale = 100 / 99  # covariances are divided by n - 1
    assert frechet_distance(a, b) <= scale * (a - b).square().sum(1).mean().item()


def test_frechet_is_blind_beyond_two_moments():
    g = torch.Generator().manual_seed(0)
    board, blot = whiten(checkerboard(2000, g)), whiten(normal(2000, 2))
    assert abs(frechet_distance(board, blot)) < 1e-9 and sliced_wasserstein(board, blot) > 0.1


@pytest.mark.parametrize(
    "a, b", [((1, 3), (5, 3)), ((5, 3), (1, 3)), ((0, 3), (5, 3)), ((5, 3), (5, 4)), ((5,), (5,))]
)
def test_frechet_refuses_what_has_no_covariance(a, b):
    with pytest.raises(ValueError, match="features"):
        frechet_distance(torch.rand(a), torch.rand(b))


# Endpoint distance


def test_endpoint_distance_is_a_root_mean_square():
    x = normal(6, 3, 4, 4)
    assert endpoint_distance(x, x) == 0
    assert endpoint_distance(x, x + 2) == pytest.approx(2, rel=1e-6)
    assert endpoint_distance(torch.zeros(2, 2), torch.tensor([[3.0, 4.0], [0, 0]])) == 2.5


def test_endpoint_distance_prefers_the_mean_to_fresh_samples():
    a, b = normal(20_000, 2), normal(20_000, 2, seed=1)
    assert endpoint_distance(a, b) == pytest.approx(math.sqrt(2), rel=0.02)
    assert endpoint_distance(a, torch.zeros_like(a)) == pytest.approx(1, rel=0.02)


def test_endpoint_distance_refuses_to_broadcast():
    with pytest.raises(ValueError, match="one by one"):
        endpoint_distance(torch.zeros(4, 2), torch.zeros(1, 2))


# Curvature


@pytest.mark.parametrize("grid", [time_grid(1), time_grid(7), time_grid(7, 3.0), [1.0, 0.4, 0.3]])
def test_a_straight_flow_has_none(grid):
    noise = normal(20, 3, 2, 2)
    assert curvature(lambda x, t, cond: cond, noise, grid, cond=normal(20, 3, 2, 2, seed=1)) < 1e-9


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_curvature_of_a_field_that_speeds_up(shift):
    def field(x, t, cond):
        return 2 * t[:, None] * torch.tensor([[3.0, 4.0]], dtype=x.dtype)  # chord c, so S = |c|^2 / 3

    grid = time_grid(2000, shift).double()
    assert curvature(field, normal(4, 2, dtype=torch.float64), grid) == pytest.approx(25 / 3, rel=2e-3)


def test_curvature_is_energy_minus_chord():
    ring, noise = ring_mixture(), normal(200, 2)
    path = sample(ring.field, noise, time_grid(32), trajectory=True)
    energy = ((path[:-1] - path[1:]) * 32).square().sum(2).mean() - (path[0] - path[-1]).square().sum(
        1
    ).mean()
    assert curvature(ring.field, noise, time_grid(32)) == pytest.approx(energy.item(), rel=1e-4)


def test_curvature_is_blind_to_the_end_and_to_coarse_grids():
    ring, noise = ring_mixture(), normal(200, 2)
    assert curvature(lambda x, t, cond: x / t[:, None], noise, time_grid(50)) < 1e-6
    assert curvature(ring.field, noise, time_grid(1)) == pytest.approx(0, abs=1e-9)
    fine = [curvature(ring.field, noise, time_grid(256, shift)) for shift in (1.0, 3.0)]
    assert fine[0] > 0.5 and fine[0] == pytest.approx(fine[1], rel=0.02)
