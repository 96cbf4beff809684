"""What the study `variants` measures: a student, at scales that are chosen in one of four ways."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from experiments.runner import Job
from experiments.scales import by_steps, schedule_distance, scheduled_field, uniform_curve
from experiments.testbeds import Field, FieldAtScale, Walk
from experiments.testbeds.plane import COUPLED, Plane, make_recipe
from experiments.testbeds.tiny_flux import RANK, TinyFlux, load_lora, make_models
from scfm.method.lora_scale import choose_lora_scales
from scfm.method.scale_schedule import search_per_step

ROUNDS = {"smooth": 0, "each step": 2}  # of `search_per_step`, behind the dial
Schedules = dict[int, tuple[float, ...]]  # steps -> a scale for each of them
Marks = dict[int, dict[str, float]]  # steps -> what a judge says


class Table(NamedTuple):
    """The step counts that are judged, and the scales that are tried for each.

    The scales end beyond those of the study `compare`: weak students want more.
    """

    steps: tuple = (2, 3, 4, 8)
    scales: tuple = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)


SMOKE_TABLE = Table((2, 3), (0.0, 1.0, 3.0))


def choose(rule: str, distance: Callable[[Sequence[float]], float], table: Table) -> Schedules:
    """Scales with small distances. distance(scales of the steps); rule: `dial`, `free` or one of ROUNDS."""
    curve = uniform_curve(distance, table.steps, table.scales)
    if rule == "free":  # each step count alone
        return {n: (min(table.scales, key=lambda s, n=n: curve[n, s]),) * n for n in table.steps}
    dial = by_steps(choose_lora_scales(curve))  # never rising with the step counts
    if rule == "dial":
        return {n: (scale,) * n for n, scale in dial.items()}
    return {n: search_per_step(distance, n, scale, rounds=ROUNDS[rule]).scales for n, scale in dial.items()}


def without_rule(job: Job, sizes: Any) -> tuple[Job, str, str]:
    """(the job without what only the choice of scales needs, the rule of that choice, the network that is
    read out).
    """
    change = {name: value for name, value in job.change.items() if name != "dial"}
    read_out = make_recipe(sizes, change).reading["read_out"]
    return job._replace(change=change), job.change.get("dial", "dial"), read_out


def choice_info(found: Schedules, table: Table) -> dict:
    """What the record says of the chosen scales; at_the_end: whether one is the largest of the table."""
    largest = max(max(scales) for scales in found.values())
    return {"scales": found, "at_the_end": largest >= max(table.scales)}


def choose_and_judge(
    rule: str,
    table: Table,
    search: tuple[Walk, torch.Tensor],
    judge: Callable[[Field, int], dict],
    field_at: FieldAtScale,
    shift: float,
) -> tuple[Schedules, Marks]:
    found = choose(rule, schedule_distance(*search, field_at, shift), table)
    return found, {n: judge(scheduled_field(field_at, scales, shift), n) for n, scales in found.items()}


def column(marks: Marks, metric: str) -> dict[int, float]:
    return {n: mark[metric] for n, mark in marks.items()}


def measure_on_plane(bed: Plane, job: Job, table: Table) -> dict:
    """quality (SW2) and endpoints (distance to the teacher's), by step count; scales: those that were
    chosen."""
    job, rule, read_out = without_rule(job, bed.sizes)
    (models, of_student), judge = bed.student(job), bed.judge(job)

    def make() -> dict:
        search = bed.search(job, models.field("teacher"))
        field_at = partial(models.field, read_out)
        found, marks = choose_and_judge(rule, table, search, judge, field_at, bed.shift)
        return {
            "quality": column(marks, "sw2"),
            "endpoints": column(marks, "endpoint"),
            **choice_info(found, table),
        }

    more = {"noises": bed.sizes.dial_noises, "goal": bed.sizes.goal_steps, "coupled": COUPLED}
    spec = {
        "of": of_student,
        "rule": rule,
        "read_out": read_out,
        "steps": table.steps,
        "scales": table.scales,
        **bed.judged_by(**more),
    }
    return bed.cache("variant", spec, make)


def measure_on_flux(bed: TinyFlux, job: Job, table: Table) -> dict:
    """The same on the tiny Flux, where quality is a Frechet distance (not FID); and the accuracy in reading
    what captions name.
    """
    job, rule, read_out = without_rule(job, bed.sizes)
    loras, of_student = bed.student(job)

    def make() -> dict:
        models = make_models(job.seed, RANK)
        field_at, search = load_lora(models, loras[read_out]), bed.search(job, models.teacher)
        found, marks = choose_and_judge(rule, table, search, bed.judge(job), field_at, bed.shift)
        return {
            "quality": column(marks, "frechet"),
            "accuracy": column(marks, "prompt_accuracy"),
            "endpoints": column(marks, "endpoint"),
            **choice_info(found, table),
        }

    spec = {
        "of": of_student,
        "rule": rule,
        "read_out": read_out,
        "steps": table.steps,
        "scales": table.scales,
        "judged": bed.sizes.judged,
        "noises": bed.sizes.dial_noises,
    }
    return bed.cache("flux_variant", spec, make)
