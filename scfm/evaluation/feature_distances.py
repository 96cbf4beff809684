"""Distances between two sets of images, on the features of a metric."""

from typing import NamedTuple

import torch

from scfm.method.metrics import frechet_distance

NEIGHBOURS = 5  # whose distance is a point's radius, as Naeem et al. have it


class Estimate(NamedTuple):
    """A number with its standard error."""

    value: float
    error: float


class Manifold(NamedTuple):
    """How two sets of points lie in each other.

    precision, recall: arXiv 1904.06991, equation 2
    density, coverage: arXiv 2002.09797, section 3
    """

    precision: float
    recall: float
    density: float
    coverage: float


def frechet(features: torch.Tensor | None, others: torch.Tensor | None) -> float | None:
    """`frechet_distance`, or None where one of the two is missing or has fewer than 2 rows."""
    if features is None or others is None or min(len(features), len(others)) < 2:
        return None
    return frechet_distance(features, others)


def kernel_distance(features: torch.Tensor, others: torch.Tensor, paired: bool = False) -> Estimate:
    """KID (arXiv 1801.01401): the squared MMD with the kernel (x.y / D + 1)^3, unbiased, so that it is honest
    at small counts and may be below 0.

    features, others: (n, D) and (m, D), 3 rows and more
    paired: row i of both is made from the same noise; such pairs are not compared, and leave together
    returns: the value, and its standard error by the jackknife, which leaves each row out in turn. Of two
        sets of one distribution the statistic is not normal: there the error is a rough one.

    ValueError for fewer rows, or for pairs of sets that differ in length.
    """
    n, m = len(features), len(others)
    if min(n, m) < 3:
        raise ValueError(f"{n} and {m} images: a kernel distance needs 3 of each and more")
    if paired and n != m:
        raise ValueError(f"{n} and {m} images cannot be paired")
    x, y = features.double(), others.double()
    within, beside, across = cubic(x, x).fill_diagonal_(0), cubic(y, y).fill_diagonal_(0), cubic(x, y)
    if paired:
        across.fill_diagonal_(0)
    sums = (within.sum(), beside.sum(), across.sum())
    rows, columns = (2 * within.sum(1), 2 * beside.sum(1)), (across.sum(1), across.sum(0))
    value = unbiased(*sums, n, m, paired)
    if paired:
        own, theirs, cross = sums[0] - rows[0], sums[1] - rows[1], sums[2] - columns[0] - columns[1]
        left = [unbiased(own, theirs, cross, n - 1, m - 1, True)]
    else:
        left = [
            unbiased(sums[0] - rows[0], sums[1], sums[2] - columns[0], n - 1, m),
            unbiased(sums[0], sums[1] - rows[1], sums[2] - columns[1], n, m - 1),
        ]
    variance = sum(float((len(v) - 1) / len(v) * (v - v.mean()).square().sum()) for v in left)
    return Estimate(float(value), variance**0.5)


def cubic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(n, m) values of the kernel."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def unbiased(
    within: torch.Tensor, beside: torch.Tensor, across: torch.Tensor, n: int, m: int, paired: bool = False
) -> torch.Tensor:
    """The squared MMD from the sums of three kernel matrices, the first two without their diagonals, the
    third too where rows are paired."""
    pairs = n * (n - 1) if paired else n * m
    return within / (n * (n - 1)) + beside / (m * (m - 1)) - 2 * across / pairs


def manifold(features: torch.Tensor, reference: torch.Tensor, k: int = NEIGHBOURS) -> Manifold:
    """How generated images lie among reference images, by balls that reach to each point's k-th neighbour.

    precision: share of the generated in a ball of the reference; recall: the other way round; density: how
    many balls of the reference a generated image lies in, over k (may pass 1); coverage: share of the balls
    of the reference with a generated image in them.

    features, reference: (n, D) and (m, D), more than k rows each. ValueError for fewer.
    """
    if min(len(features), len(reference)) <= k:
        raise ValueError(f"{len(features)} and {len(reference)} images: more than {k} of each are needed")
    apart = torch.cdist(features.double(), reference.double())
    own, theirs = radii(features, k), radii(reference, k)
    inside = apart <= theirs[None]
    return Manifold(
        precision=inside.any(1).double().mean().item(),
        recall=(apart <= own[:, None]).any(0).double().mean().item(),
        density=inside.sum(1).double().mean().item() / k,
        coverage=(apart.min(0).values <= theirs).double().mean().item(),
    )


def radii(points: torch.Tensor, k: int) -> torch.Tensor:
    """(n,): the distance of each point to its k-th nearest other."""
    apart = torch.cdist(points.double(), points.double()).fill_diagonal_(0)
    return apart.kthvalue(k + 1, 1).values  # the nearest of all is the point itself


def compare_sets(
    features: torch.Tensor, others: torch.Tensor | None, paired: bool = False
) -> dict[str, float] | None:
    """{"kid", "kid_error", and the names of `Manifold`} of images against others; None where there are too
    few, or where they are the same."""
    if others is None or others is features or min(len(features), len(others)) <= NEIGHBOURS:
        return None
    kid = kernel_distance(features, others, paired)
    return {"kid": kid.value, "kid_error": kid.error, **manifold(features, others)._asdict()}
