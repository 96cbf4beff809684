"""What several studies measure on the plane: teachers, students at their scales, and data against data."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from experiments.runner import Job
from experiments.scales import by_steps, find_scales, finite
from experiments.streams import Stream
from experiments.testbeds import FieldAtScale, Walk
from experiments.testbeds.plane import Plane, make_recipe
from scfm.method.distill import CopiedModels
from scfm.method.flow import EVALUATIONS
from scfm.method.lora_scale import STEPS
from scfm.method.metrics import sliced_wasserstein
from scfm.streams import keyed_generator
from toy.plane import DATA


def measure_teacher(bed: Plane, job: Job) -> dict:
    """{solver: {evaluations: SW2}}."""
    network, spec = bed.teacher(job)

    def make() -> dict:
        measure, velocity = bed.ruler(job), CopiedModels(network).field("teacher")
        most = {"heun": 8}  # the worse of the two of second order: no more of it
        counts = {
            solver: [n for n in STEPS if n % cost == 0 and n <= most.get(solver, n)]
            for solver, cost in EVALUATIONS.items()
        }
        return {
            solver: {n: measure(velocity, n // EVALUATIONS[solver], solver=solver)[0] for n in counted}
            for solver, counted in counts.items()
        }

    return bed.cache("teacher_sw2", {"of": spec, **bed.judged_by()}, make)


def measure_student(bed: Plane, job: Job, steps: Sequence[int] = ()) -> dict:
    """What `score_student` gives, of the student of a job. steps: others than those of the testbed."""
    models, spec = bed.student(job)
    sizes, reading = bed.sizes, make_recipe(bed.sizes, job.change).reading
    steps = steps or sizes.steps

    def make() -> dict:
        field_at = partial(models.field, reading["read_out"])
        search = bed.search(job, models.field("teacher"))
        return score_student(bed.ruler(job), search, field_at, steps, sizes.scales, reading["sampling_shift"])

    more = {"noises": sizes.dial_noises, "goal": sizes.goal_steps, "scales": sizes.scales, "steps": steps}
    return bed.cache("student_sw2", {"of": spec, **reading, **bed.judged_by(**more)}, make)


def score_student(
    measure: Callable[..., tuple[float, float]],
    search: tuple[Walk, torch.Tensor],
    field_at: FieldAtScale,
    steps: Sequence[int],
    scales: Sequence[float],
    shift: float = 1.0,
) -> dict:
    """raw, dialled: {steps: SW2} at scale 1, and at the scales that were chosen; scales: {steps: chosen};
    deviation: {steps: that of the raw samples over the data's}.
    """
    walk, goal = search
    walk_shifted = partial(walk, shift=shift)
    chosen = by_steps(find_scales(walk_shifted, goal, field_at, steps, scales, shift))
    raw = {n: measure(field_at(1.0), n, shift) for n in steps}
    return {
        "raw": {n: finite(sw2) for n, (sw2, _) in raw.items()},
        "deviation": {n: finite(deviation) for n, (_, deviation) in raw.items()},
        "dialled": {n: finite(measure(field_at(scale), n, shift)[0]) for n, scale in chosen.items()},
        "scales": chosen,
    }


def measure_floor(bed: Plane, job: Job, pairs: int) -> dict[str, float]:
    """SW2 of data against other data: mean, and the band that holds 95 % of the pairs."""

    def draw(i: int) -> torch.Tensor:
        return DATA[job.data](bed.sizes.samples, keyed_generator(0, i, Stream.FLOOR))

    def make() -> dict[str, float]:
        distances = torch.tensor(
            [sliced_wasserstein(draw(2 * i), draw(2 * i + 1), bed.sizes.directions) for i in range(pairs)]
        )
        return {
            "mean": distances.mean().item(),
            "low": distances.quantile(0.025).item(),
            "high": distances.quantile(0.975).item(),
        }

    return bed.cache("floor", {"data": job.data, **bed.judged_by(pairs=pairs)}, make)
