"""What the study `few_shot` measures: students of few points or images, judged on data and captions that they
never saw.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from experiments.runner import Job, non_defaults
from experiments.scales import by_steps, find_scales
from experiments.streams import Stream
from experiments.testbeds import Field, plane
from experiments.testbeds.plane import COUPLED, Plane, endpoints
from experiments.testbeds.taught_flux import (
    GUIDANCE_RANGE,
    KINDS,
    TAUGHT_RANK,
    TaughtFlux,
    fused_field,
    load_judges,
)
from experiments.testbeds.tiny_flux import Adapter, copy_of_lora, make_models
from scfm.method.distill import CopiedModels, distill
from scfm.method.lora_scale import SCALES
from scfm.method.metrics import endpoint_distance, sliced_wasserstein
from scfm.streams import keyed_generator
from toy.judge import STOCK
from toy.plane import DATA

QUERIES = 2000  # points for the coverage
COVERED = 0.95  # what other fresh data cover, by the choice of the radius
Marks = dict[str, float]  # metric -> number


# The plane


@dataclass(frozen=True)
class PlaneSizes(plane.PlaneSizes):
    """The teachers are those of the study `plane`, so its cache has them. steps: judged."""

    updates: int = 1000
    samples: int = 5000
    dial_noises: int = 256
    scales: tuple = SCALES[::2]
    steps: tuple = (3, 4, 8, 32)


def nearest(points: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Distance from each of the points (n, 2) to the nearest of the others (m, 2): (n,)."""
    return torch.cat([torch.cdist(part, others).amin(1) for part in points.split(500)])


def plane_ruler(bed: Plane, job: Job, goal: torch.Tensor) -> tuple[Callable[[torch.Tensor], Marks], Marks]:
    """A function (points (samples, 2) reached from the noises) -> marks, and what other fresh data would
    score.

    sw2: sliced Wasserstein to fresh data; coverage: share of fresh data with a sample within a radius (the
    one within which 95 % have other fresh data); endpoint: distance to the teacher's own endpoints; spread:
    deviation over the data's.
    """
    data = bed.references(job).data
    others = DATA[job.data](bed.sizes.samples, keyed_generator(job.seed, 0, Stream.OTHER_DATA))
    radius = nearest(data[:QUERIES], others).quantile(COVERED)

    def cloud(points: torch.Tensor) -> Marks:
        return {
            "sw2": sliced_wasserstein(points, data, bed.sizes.directions),
            "coverage": (nearest(data[:QUERIES], points) <= radius).float().mean().item(),
            "spread": (points.std(0) / data.std(0)).mean().item(),
        }

    def judge(points: torch.Tensor) -> Marks:
        return cloud(points) | {"endpoint": endpoint_distance(points[:COUPLED], goal)}

    return judge, cloud(others)


def plane_spec(bed: Plane, spec: dict[str, Any]) -> dict[str, Any]:
    sizes = bed.sizes
    more = {
        "queries": QUERIES,
        "coupled": COUPLED,
        "steps": sizes.steps,
        "noises": sizes.dial_noises,
        "goal": sizes.goal_steps,
        "scales": sizes.scales,
    }
    return {"of": spec, **bed.judged_by(**more)}


def teacher_on_plane(bed: Plane, job: Job) -> dict:
    """Curve "raw", and "floor": {metric: what other fresh data score}."""
    (network, spec), goal = bed.teacher(job), bed.goal(job)

    def make() -> dict:
        (judge, floor), noise = plane_ruler(bed, job, goal), bed.references(job).noise
        velocity = CopiedModels(network).field("teacher")
        return {"raw": {n: judge(endpoints(velocity, noise, n)) for n in bed.sizes.steps}, "floor": floor}

    return bed.cache("few_teacher", plane_spec(bed, spec), make)


def student_on_plane(bed: Plane, job: Job) -> dict:
    """Curves "raw" (scale 1) and, where it is SCFM, "dialled"; "scales": {steps: the dial's}."""
    goal, (models, spec), sizes = bed.goal(job), bed.student(job), bed.sizes

    def make() -> dict:
        (judge, _), noise = plane_ruler(bed, job, goal), bed.references(job).noise
        field_at = partial(models.field, "ema_slow")
        found = {"raw": {n: judge(endpoints(field_at(), noise, n)) for n in sizes.steps}}
        if job.family == "scfm":
            walk, far = bed.search(job, models.field("teacher"))
            found["scales"] = by_steps(find_scales(walk, far, field_at, sizes.steps, sizes.scales))
            found["dialled"] = {
                n: judge(endpoints(field_at(scale), noise, n)) for n, scale in found["scales"].items()
            }
        return found

    return bed.cache("few_sw2", plane_spec(bed, spec), make)


# The tiny Flux


@dataclass(frozen=True)
class FluxSizes:
    """images: that there are in all; captions: judged, of each kind, each with `noises` noises; goal_steps:
    the teacher's; scales, dial_noises: of the search for scales.
    """

    steps: tuple = (3, 4, 8, 32)
    updates: int = 100
    batch: int = 16
    images: int = 256
    captions: int = 32
    noises: int = 2
    goal_steps: int = 32
    scales: tuple = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.25)
    dial_noises: int = 16


def flux_student(bed: TaughtFlux, job: Job) -> tuple[Adapter, dict]:
    """The slow EMA's LoRA after training on the images of a subset, and the spec of its cell."""
    change = {name: value for name, value in job.change.items() if name != "few"}
    config, images = bed.config(change), bed.images()
    spec = {
        "images": images.spec,
        "size": job.change["few"],
        "subset": job.change["seed"],
        "rank": TAUGHT_RANK,
        "guidance": GUIDANCE_RANGE,
        "config": non_defaults(config),
    }

    def make() -> Adapter:
        models = make_models(config.seed, TAUGHT_RANK)
        return copy_of_lora(distill(models, bed.batches(job), config, progress=False))

    return bed.cache("few_lora", spec, make), spec


def flux_scales(bed: TaughtFlux, job: Job, lora: Adapter, spec: dict[str, Any]) -> dict[int, float]:
    """{steps: scale} of a student, by the endpoints of a few noises."""
    sizes = bed.sizes

    def make() -> dict[int, float]:
        walk, goal = bed.search(job, bed.teacher(job)[0])
        field_at = fused_field(TAUGHT_RANK, lora)
        return by_steps(find_scales(walk, goal, field_at, sizes.steps, sizes.scales, STOCK))

    spec = {"of": spec, "steps": sizes.steps, "scales": sizes.scales, "noises": sizes.dial_noises}
    return bed.cache("few_dial", spec, make)


def flux_curves(bed: TaughtFlux, job: Job, field_for: Callable[[int], Field]) -> dict[str, dict[int, Marks]]:
    """{kind: {steps: marks}} of field_for(steps)."""
    found = {}
    for kind in KINDS:
        judge = bed.judge(job, kind)
        found[kind] = {n: judge(field_for(n), n) for n in bed.sizes.steps}
    return found


def flux_spec(bed: TaughtFlux, of: Any) -> dict[str, Any]:
    sizes = bed.sizes
    return {
        "of": of,
        "asked": (sizes.captions, sizes.noises),
        "known": "left out",
        "steps": sizes.steps,
        "goal": sizes.goal_steps,
    }


def teacher_on_flux(bed: TaughtFlux, job: Job) -> dict:
    """Curve "raw", and "floor": {kind: {metric: what as many fresh drawings score}}. Makes all images
    first."""
    bed.images()
    velocity, fingerprint = bed.teacher(job)

    def make() -> dict:
        judges = load_judges(bed.sizes.captions, bed.sizes.noises)
        floors = {kind: {"frechet": judge.floor()} for kind, judge in judges.items()}
        return {"raw": flux_curves(bed, job, lambda n: velocity), "floor": floors}

    return bed.cache("few_flux_teacher", flux_spec(bed, fingerprint), make)


def student_on_flux(bed: TaughtFlux, job: Job) -> dict:
    """Curves "raw" (scale 1) and, where it is SCFM, "dialled"; "scales": {steps: the dial's}."""
    lora, spec = flux_student(bed, job)
    scales = flux_scales(bed, job, lora, spec) if job.family == "scfm" else {}

    def make() -> dict:
        field_at = fused_field(TAUGHT_RANK, lora)
        found = {"raw": flux_curves(bed, job, lambda n: field_at(1.0))}
        if scales:
            found |= {"dialled": flux_curves(bed, job, lambda n: field_at(scales[n])), "scales": scales}
        return found

    return bed.cache("few_flux", flux_spec(bed, spec) | {"scales": scales}, make)
