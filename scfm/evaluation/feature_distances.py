"""Distances between two sets of images, on the features of a metric."""

from functools import cached_property
from typing import NamedTuple

import torch

from scfm.method.metrics import frechet_distance
from scfm.streams import Stream, keyed_generator

NEIGHBOURS = 5  # whose distance is a point's radius, as Naeem et al. have it; Kynkaanniemi et al. take 3
BLOCK = 1024  # rows of a matrix of all pairs that are in memory at once


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


class FeatureSet:
    """Features of images, (n, D), with what is computed of them once and compared with many others."""

    def __init__(self, features: torch.Tensor) -> None:
        self.points = features.double()

    def __len__(self) -> int:
        return len(self.points)

    @cached_property
    def kernel_sums(self) -> torch.Tensor:
        """(n,): the kernel of each image with all others, summed."""
        return kernel_sums(self.points, self.points, others_only=True)[0]

    @cached_property
    def radii(self) -> torch.Tensor:
        """(n,): `radii` with the usual number of neighbours."""
        return radii(self.points, NEIGHBOURS)


def frechet(features: torch.Tensor | None, others: torch.Tensor | None) -> float | None:
    """`frechet_distance`, or None where one of the two is missing or has fewer than 2 rows."""
    if features is None or others is None or min(len(features), len(others)) < 2:
        return None
    return frechet_distance(features, others)


def kernel_distance(
    features: torch.Tensor | FeatureSet, others: torch.Tensor | FeatureSet, paired: bool = False
) -> Estimate:
    """KID (arXiv 1801.01401): the squared MMD with the kernel (x.y / D + 1)^3, unbiased, so that it is honest
    at small counts and may be below 0.

    features, others: (n, D) and (m, D), 3 rows and more
    paired: row i of both is made from the same noise; such pairs are not compared, and leave together
    returns: the value, and its standard error by the jackknife, which leaves each row out in turn: the value
        without row i follows from the sums over the rows of the kernel's matrices. Of two sets of one
        distribution the statistic is not normal: there the error is a rough one.

    ValueError for fewer rows, or for pairs of sets that differ in length.
    """
    x, y = as_set(features), as_set(others)
    n, m = len(x), len(y)
    if min(n, m) < 3:
        raise ValueError(f"{n} and {m} images: a kernel distance needs 3 of each and more")
    if paired and n != m:
        raise ValueError(f"{n} and {m} images cannot be paired")
    across, down = kernel_sums(x.points, y.points, others_only=paired)
    sums = (x.kernel_sums.sum(), y.kernel_sums.sum(), across.sum())
    own, theirs = sums[0] - 2 * x.kernel_sums, sums[1] - 2 * y.kernel_sums  # without row i
    if paired:
        left = [unbiased(own, theirs, sums[2] - across - down, n - 1, m - 1, True)]
    else:
        left = [
            unbiased(own, sums[1], sums[2] - across, n - 1, m),
            unbiased(sums[0], theirs, sums[2] - down, n, m - 1),
        ]
    variance = sum(float((len(v) - 1) / len(v) * (v - v.mean()).square().sum()) for v in left)
    return Estimate(float(unbiased(*sums, n, m, paired)), variance**0.5)


def as_set(features: torch.Tensor | FeatureSet) -> FeatureSet:
    """Features as a `FeatureSet`."""
    return features if isinstance(features, FeatureSet) else FeatureSet(features)


def kernel_sums(x: torch.Tensor, y: torch.Tensor, others_only: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(n,) and (m,): sums over the rows and over the columns of the kernel's matrix, a block of rows at once.

    others_only: without its diagonal
    """
    across, down = [], torch.zeros(len(y), dtype=y.dtype)
    for start in range(0, len(x), BLOCK):
        block = cubic(x[start : start + BLOCK], y)
        if others_only:
            block.diagonal(start).zero_()
        across.append(block.sum(1))
        down += block.sum(0)
    return torch.cat(across), down


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


def manifold(
    features: torch.Tensor | FeatureSet, reference: torch.Tensor | FeatureSet, k: int = NEIGHBOURS
) -> Manifold:
    """How generated images lie among reference images, by balls that reach to each point's k-th neighbour.

    precision: share of the generated in a ball of the reference; recall: the other way round; density: how
    many balls of the reference a generated image lies in, over k (may pass 1); coverage: share of the balls
    of the reference with a generated image in them. All depend on the numbers of images: compare nothing
    with numbers of other counts.

    features, reference: (n, D) and (m, D), more than k rows each. ValueError for fewer.
    """
    x, y = as_set(features), as_set(reference)
    if min(len(x), len(y)) <= k:
        raise ValueError(f"{len(x)} and {len(y)} images: more than {k} of each are needed")
    own, theirs = (s.radii if k == NEIGHBOURS else radii(s.points, k) for s in (x, y))
    balls, reached = [], torch.zeros(len(y), dtype=torch.bool)
    nearest = torch.full((len(y),), torch.inf, dtype=torch.float64)
    for start in range(0, len(x), BLOCK):
        apart = torch.cdist(x.points[start : start + BLOCK], y.points)
        balls.append((apart <= theirs).sum(1))
        reached |= (apart <= own[start : start + BLOCK, None]).any(0)
        nearest = nearest.minimum(apart.min(0).values)
    inside = torch.cat(balls).double()
    return Manifold(
        precision=(inside > 0).double().mean().item(),
        recall=reached.double().mean().item(),
        density=inside.mean().item() / k,
        coverage=(nearest <= theirs).double().mean().item(),
    )


def radii(points: torch.Tensor, k: int) -> torch.Tensor:
    """(n,): the distance of each point to its k-th nearest other."""
    found = []
    for start in range(0, len(points), BLOCK):
        apart = torch.cdist(points[start : start + BLOCK], points)
        apart.diagonal(start).zero_()  # the nearest of all is the point itself
        found.append(apart.kthvalue(k + 1, 1).values)
    return torch.cat(found)


def compare_sets(
    features: FeatureSet, others: FeatureSet | None, paired: bool = False
) -> dict[str, float] | None:
    """{"kid", "kid_error", and the names of `Manifold`} of images against others; None where there are too
    few, or where they are the same.

    paired: as of `kernel_distance`; the other numbers know no pairs, and the shared noise makes them high
    """
    if others is None or others is features or min(len(features), len(others)) <= NEIGHBOURS:
        return None
    kid = kernel_distance(features, others, paired)
    return {"kid": kid.value, "kid_error": kid.error, **manifold(features, others)._asdict()}


def floor_of(reference: torch.Tensor) -> dict[str, object] | None:
    """What images as good as the reference would be given: a random half of it against the other half.

    reference: (n, D)
    returns: {"counts": [of the one half, of the other], "frechet", and the names of `compare_sets`}; None
        where a half has too few. A Frechet distance of half as many images is biased upward more.
    """
    if len(reference) < 2 * (NEIGHBOURS + 1):
        return None
    order = torch.randperm(len(reference), generator=keyed_generator(0, len(reference), Stream.DATA))
    one, other = reference[order].tensor_split(2)
    return {
        "counts": [len(one), len(other)],
        "frechet": frechet(one, other),
        **(compare_sets(FeatureSet(one), FeatureSet(other)) or {}),
    }
