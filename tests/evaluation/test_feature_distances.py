"""Distances of sets of features, beside torchmetrics, torch-fidelity, brute force and closed forms."""

import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.kid import poly_mmd

from scfm.evaluation import feature_distances
from scfm.evaluation.feature_distances import (
    FeatureSet,
    Manifold,
    compare_sets,
    floor_of,
    frechet,
    kernel_distance,
    manifold,
)
from scfm.evaluation.table import sets_of, text_table


def draws(n, m, move=0.3, dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator), torch.randn(m, dim, generator=generator) + move


def test_the_kernel_distance_is_that_of_torchmetrics():
    x, y = draws(30, 30)
    assert kernel_distance(x, y).value == pytest.approx(float(poly_mmd(x.double(), y.double())), rel=1e-6)


@pytest.mark.parametrize("n, m, paired", [(7, 11, False), (9, 9, False), (8, 8, True)])
def test_the_error_is_the_jackknife_of_brute_force(n, m, paired):
    x, y = draws(n, m)

    def without(rows, i):
        return torch.cat([rows[:i], rows[i + 1 :]])

    if paired:
        parts = [[kernel_distance(without(x, i), without(y, i), True).value for i in range(n)]]
    else:
        parts = [
            [kernel_distance(without(x, i), y).value for i in range(n)],
            [kernel_distance(x, without(y, j)).value for j in range(m)],
        ]
    variance = 0.0
    for left in map(torch.tensor, parts):
        left = left.double()
        variance += float((len(left) - 1) / len(left) * (left - left.mean()).square().sum())
    assert kernel_distance(x, y, paired).error == pytest.approx(variance**0.5, rel=1e-5)


@pytest.mark.parametrize("paired", [False, True])
def test_the_kernel_distance_is_right_in_the_mean_and_its_error_is_its_spread(paired):
    """Of one-dimensional normals the expectation of the kernel is a polynomial of their moments."""
    move, seeds = 1.0, range(150)

    def kernel_mean(a, b):  # E (xy + 1)^3 of x ~ N(a, 1), y ~ N(b, 1)
        one, two, three = (lambda c: c), (lambda c: 1 + c * c), (lambda c: c**3 + 3 * c)
        return three(a) * three(b) + 3 * two(a) * two(b) + 3 * one(a) * one(b) + 1

    want = kernel_mean(0, 0) + kernel_mean(move, move) - 2 * kernel_mean(0, move)
    found = []
    for seed in seeds:
        x, y = draws(60, 60, move, 1, seed)
        if paired:
            y = move + 0.5 * x + 0.75**0.5 * (y - move)
        found.append(kernel_distance(x, y, paired))
    values = torch.tensor([estimate.value for estimate in found])
    assert abs(values.mean() - want) < 4 * values.std() / len(seeds) ** 0.5
    errors = torch.tensor([estimate.error for estimate in found])
    assert 0.7 < errors.mean() / values.std() < 1.4


def test_precision_and_recall_are_those_of_torch_fidelity():
    x, y = draws(60, 60, 0.8, 3)
    theirs = prc_features_to_metric(
        x, y, prc_neighborhood=3, prc_batch_size=60, save_cpu_ram=False, verbose=False
    )
    ours = manifold(x, y, 3)
    assert ours.precision == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours.recall == pytest.approx(theirs["recall"], abs=1e-6)


def test_density_and_coverage_are_counted():
    reference = torch.tensor([[0.0], [1.0], [2.0], [10.0]])  # radii with k = 1: 1, 1, 1, 8
    made = torch.tensor([[0.5], [2.5], [30.0]])  # in the balls of 0, 1; of 2, 10; of none
    assert manifold(made, reference, 1) == pytest.approx(
        Manifold(precision=2 / 3, recall=1.0, density=4 / 3, coverage=1.0)
    )
    with pytest.raises(ValueError, match="more than 5"):
        manifold(made, reference)


@pytest.mark.parametrize("paired", [False, True])
def test_large_sets_are_compared_in_blocks(monkeypatch, paired):
    """The whole matrix of pairs of 50,000 images has 20 GB."""
    x, y = draws(23, 23)
    whole = kernel_distance(x, y, paired), manifold(x, y), manifold(x, y, 3)
    monkeypatch.setattr(feature_distances, "BLOCK", 4)
    for one, other in zip(
        whole, (kernel_distance(x, y, paired), manifold(x, y), manifold(x, y, 3)), strict=True
    ):
        assert one == pytest.approx(other, rel=1e-9)


def test_the_floor_is_one_half_of_the_reference_against_the_other():
    x = draws(41, 1)[0]
    floor = floor_of(x)
    assert floor["counts"] == [21, 20] and floor == floor_of(x) and floor_of(x[:11]) is None
    assert abs(floor["kid"]) < 4 * floor["kid_error"] and floor["frechet"] > 0
    halves = torch.tensor([0.0] * 10 + [9.0] * 10)[:, None] + draws(20, 1, dim=1)[0]
    assert floor_of(halves)["frechet"] < frechet(halves[:10], halves[10:]) / 3  # the halves are random ones


def test_too_few_or_the_same_images_are_not_compared():
    x, y = draws(6, 6)
    one, other = FeatureSet(x), FeatureSet(y)
    assert compare_sets(one, one) is None and compare_sets(one, None) is None
    assert compare_sets(FeatureSet(x[:5]), other) is None
    assert compare_sets(one, other, paired=True).keys() == {"kid", "kid_error", *Manifold._fields}
    with pytest.raises(ValueError, match="cannot be paired"):
        kernel_distance(x, y[:4], paired=True)


def test_the_tables_show_each_metric_and_set():
    numbers = {
        "kid": 0.0123,
        "kid_error": 0.004,
        "precision": 0.5,
        "recall": 0.25,
        "density": 1.5,
        "coverage": 1.0,
    }
    row = {
        "label": "student",
        "steps": 2,
        "evaluations": 2,
        "name": "student-2",
        "endpoint_distance": 1.0,
        "seconds": 1.0,
    }
    teacher = row | {
        "label": "teacher",
        "name": "teacher",
        "sets": {"net": {"teacher": None, "reference": numbers}},
    }
    record = {
        "rows": [teacher, row | {"sets": {"net": {"teacher": numbers, "reference": numbers}}}],
        "floors": {"net": numbers | {"counts": [7, 6], "frechet": 2.5, "kid": 0.001}},
    }
    (first, lines), (second, more) = sets_of(record)
    assert "teacher" in first and "reference" in second and len(lines) == 2 and len(more) == 4
    assert "7 and 6 images: Frechet distance 2.5" in second
    assert more[1] == ["its own halves", "-", "1", "4", "0.500", "0.250", "1.500", "1.000"]
    assert lines[1] == ["student", "2", "12.3", "4", "0.500", "0.250", "1.500", "1.000"]
    assert "KID x 1000" in text_table(record)


def test_precision_and_recall_of_what_is_known():
    real = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    same, far = manifold(real, real), manifold(real + 100, real)
    assert (same.precision, same.recall) == (1.0, 1.0) and far == Manifold(0.0, 0.0, 0.0, 0.0)
    one_mode = real[:1].repeat(200, 1) + 1e-4 * torch.randn(200, 4)  # true, and not all of it
    lies = manifold(one_mode, real)
    assert lies.precision == 1.0 and lies.recall < 0.1
