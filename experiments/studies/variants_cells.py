"""What the study `variants` measures: a student, at scales that are chosen in one of four ways."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from experiments.runner import Job
from experiments.scales import by_steps, schedule_distance, scheduled_field, uniform_curve
from experiments.testbeds import Field, FieldAtScale, Walk
from experiments.testbeds.plane import COUPLED, Plane, make_recipe
from experiments.testbeds.tiny_flux import RANK, TinyFlux, load_lora, make_models
from scfm.method.lora_scale import choose_lora_scales
from scfm.method.scale_schedule import search_per_step

JUDGED = (2, 3, 4, 8)
# beyond the ends of the scales of the study `compare`: weak students want more
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
ROUNDS = {"smooth": 0, "each step": 2}  # of `search_per_step`, behind the dial
Schedules = dict[int, tuple[float, ...]]  # steps -> a scale for each of them
Marks = dict[int, dict[str, float]]  # steps -> what a judge says


def choose(rule: str, distance: Callable[[Sequence[float]], float], scales: Sequence[float]) -> Schedules:
    """Scales with small distances. distance(scales of the steps); rule: `dial`, `free` or one of ROUNDS."""
    curve = uniform_curve(distance, JUDGED, scales)
    if rule == "free":  # each step count alone
        return {n: (min(scales, key=lambda s, n=n: curve[n, s]),) * n for n in JUDGED}
    table = by_steps(choose_lora_scales(curve))  # never rising with the step counts
    if rule == "dial":
        return {n: (scale,) * n for n, scale in table.items()}
    return {n: search_per_step(distance, n, scale, rounds=ROUNDS[rule]).scales for n, scale in table.items()}


def without_rule(job: Job, sizes: Any) -> tuple[Job, str, str]:
    """(the job without what only the choice of scales needs, the rule of that choice, the network that is
    read out).
    """
    change = {name: value for name, value in job.change.items() if name != "dial"}
    read_out = make_recipe(sizes, change).reading["read_out"]
    return job._replace(change=change), job.change.get("dial", "dial"), read_out


def choice_info(found: Schedules) -> dict:
    """What the record says of the chosen scales; at_the_end: whether one is the largest of the table."""
    return {"scales": found, "at_the_end": any(max(scales) >= max(SCALES) for scales in found.values())}


def choose_and_judge(
    rule: str,
    search: tuple[Walk, torch.Tensor],
    judge: Callable[[Field, int], dict],
    field_at: FieldAtScale,
    shift: float,
) -> tuple[Schedules, Marks]:
    found = choose(rule, schedule_distance(*search, field_at, shift), SCALES)
    return found, {n: judge(scheduled_field(field_at, scales, shift), n) for n, scales in found.items()}


def column(marks: Marks, metric: str) -> dict[int, float]:
    return {n: mark[metric] for n, mark in marks.items()}


def measure_on_plane(bed: Plane, job: Job) -> dict:
    """quality (SW2) and endpoints (distance to the teacher's), by step count; scales: those that were
    chosen."""
    job, rule, read_out = without_rule(job, bed.sizes)
    (models, of_student), judge = bed.student(job), bed.judge(job)

    def make() -> dict:
        search = bed.search(job, models.field("teacher"))
        found, marks = choose_and_judge(rule, search, judge, partial(models.field, read_out), bed.shift)
        return {"quality": column(marks, "sw2"), "endpoints": column(marks, "endpoint"), **choice_info(found)}

    more = {"noises": bed.sizes.dial_noises, "goal": bed.sizes.goal_steps, "coupled": COUPLED}
    spec = {
        "of": of_student,
        "rule": rule,
        "read_out": read_out,
        "steps": JUDGED,
        "scales": SCALES,
        **bed.judged_by(**more),
    }
    return bed.cache("variant", spec, make)


def measure_on_flux(bed: TinyFlux, job: Job) -> dict:
    """The same on the tiny Flux, where quality is a Frechet distance (not FID); and the accuracy in reading
    what captions name.
    """
    job, rule, read_out = without_rule(job, bed.sizes)
    loras, of_student = bed.student(job)

    def make() -> dict:
        models = make_models(job.seed, RANK)
        field_at, search = load_lora(models, loras[read_out]), bed.search(job, models.teacher)
        found, marks = choose_and_judge(rule, search, bed.judge(job), field_at, bed.shift)
        return {
            "quality": column(marks, "frechet"),
            "accuracy": column(marks, "prompt_accuracy"),
            "endpoints": column(marks, "endpoint"),
            **choice_info(found),
        }

    spec = {
        "of": of_student,
        "rule": rule,
        "read_out": read_out,
        "steps": JUDGED,
        "scales": SCALES,
        "judged": bed.sizes.judged,
        "noises": bed.sizes.dial_noises,
    }
    return bed.cache("flux_variant", spec, make)
