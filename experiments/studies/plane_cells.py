"""What is measured on the plane beside students: ways to choose a scale, and the teacher's own sampling
shift.
"""

from functools import partial

import torch

from experiments.runner import Job
from experiments.testbeds.plane import Plane
from scfm.method.distill import CopiedModels
from scfm.method.lora_scale import choose_lora_scales
from scfm.method.metrics import endpoint_distance, sliced_wasserstein


def median_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).norm(dim=1).median().item()


def spread_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.std(0) / b.std(0) - 1).abs().mean().item()


# data-free: of endpoints of the student and of the teacher, (n, 2)
CRITERIA = {
    "endpoints": endpoint_distance,
    "median endpoint": median_distance,
    "cloud": sliced_wasserstein,
    "spread": spread_difference,
}
CHOSEN_AT = (3, 4, 8)


def measure_choosers(bed: Plane, job: Job) -> dict:
    """{criterion: {steps: (scale that it chooses, SW2 there)}}; `best` looks at the data and is the limit for
    all.

    Each as `choose_lora_scales` does it, with scales that never increase, and `free`: the smallest at each
    step count.
    """
    models, spec = bed.student(job)
    field_at, scales = partial(models.field, "ema_slow"), bed.sizes.scales

    def make() -> dict:
        measure, (walk, goal) = bed.ruler(job), bed.search(job, models.field("teacher"))
        reached = {(n, s): walk(field_at(s), n) for n in CHOSEN_AT for s in scales}
        truth = {(n, s): measure(field_at(s), n)[0] for n, s in reached}
        curves = {
            name: {pair: criterion(points, goal) for pair, points in reached.items()}
            for name, criterion in CRITERIA.items()
        }
        found = {}
        for name, curve in {**curves, "best": truth}.items():
            chosen = choose_lora_scales(curve)
            found[name] = {n: (s, truth[n, s]) for n, s in zip(chosen.steps, chosen.scales, strict=True)}
            found[f"{name}, free"] = {n: (s, truth[n, s]) for n, s in smallest(curve).items()}
        return found

    more = {"noises": bed.sizes.dial_noises, "goal": bed.sizes.goal_steps, "free": True}
    return bed.cache("choosers", {"of": spec, "scales": scales, **bed.judged_by(**more)}, make)


def smallest(curve: dict[tuple[int, float], float]) -> dict[int, float]:
    """{steps: the scale with the smallest distance}, each step count alone."""
    return {n: min((s for m, s in curve if m == n), key=lambda s, n=n: curve[n, s]) for n, _ in curve}


def measure_teacher_shift(bed: Plane, job: Job) -> dict:
    """{shift: {evaluations: SW2}}, Euler: what the teacher does at its own best sampling shift."""
    network, spec = bed.teacher(job)

    def make() -> dict:
        measure, velocity = bed.ruler(job), CopiedModels(network).field("teacher")
        return {
            shift: {n: measure(velocity, n, shift)[0] for n in (2, 3, 4, 8)}
            for shift in (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
        }

    return bed.cache("teacher_shift", {"of": spec, **bed.judged_by()}, make)
