"""What the study `ablations` measures: runs that are looked at several times on their way, on the plane and
on the tiny Flux.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache, partial
from typing import Any

import torch

from experiments.runner import Job, non_defaults
from experiments.scales import by_steps, find_scales, finite
from experiments.testbeds import BatchOf, FieldAtScale, Walk
from experiments.testbeds.plane import Plane, load_weights, make_recipe
from experiments.testbeds.plane_measures import score_student
from experiments.testbeds.taught_flux import GUIDANCE_RANGE, TAUGHT_RANK, TaughtFlux
from experiments.testbeds.tiny_flux import (
    PROMPTS,
    family,
    make_models,
    pipeline_fingerprint,
    seeded_walk,
    teacher_field,
)
from scfm.data.prompts import read_prompts
from scfm.method.distill import CopiedModels, SCFMConfig, distill
from scfm.method.metrics import endpoint_distance
from scfm.models.lora import LoraModels
from toy.judge import STOCK, Judge
from toy.plane import MLP

SHIFTS = (1.0, 1.5, 2.0, 3.0, 4.5)  # at which the teacher is sampled
# of the plane
DEFAULT = {"lr_scheduler": "constant", "ema_decay_fast": 0.99, "ema_decay_slow": 0.999, "read_out": "student"}
OURS = {"rank": 0, "restart_when_stalled": False}  # what is no field of `SCFMConfig`
LAYERS = ("layers.0", "layers.1", "layers.2", "layers.3", "out")
READ = ("student", "ema_slow")  # who is measured on the tiny Flux


class RestartWhenStalled:
    """Sets both EMAs to the student when the student has stopped moving away from the slow one.

    Every `every` training steps it looks at the distance |student - slow EMA| of all weights together. A
    student that has done what its targets ask for stays where it is, the slow EMA catches up, and the
    distance no longer grows: after `patience` looks without a new largest one nothing is to be learned from
    these EMAs, and a restart makes new ones. restarts: when.
    """

    def __init__(self, models: Any, every: int = 20, patience: int = 3):
        self.student, self.ema_fast, self.ema_slow = (
            models.parameters(name) for name in ("student", "ema_fast", "ema_slow")
        )
        self.every, self.patience = every, patience
        self.restarts: list[int] = []
        self.largest, self.idle = 0.0, 0

    @torch.no_grad()
    def __call__(self, steps: int) -> None:
        """To be called after each training step with the number of steps done."""
        if steps % self.every:
            return
        squares = [(a - b).square().sum() for a, b in zip(self.student, self.ema_slow, strict=True)]
        distance = torch.stack(squares).sum().sqrt().item()
        self.idle = 0 if distance > self.largest else self.idle + 1
        self.largest = max(self.largest, distance)
        if self.idle >= self.patience:
            torch._foreach_copy_(self.ema_fast, self.student)
            torch._foreach_copy_(self.ema_slow, self.student)
            self.restarts.append(steps)
            self.largest, self.idle = 0.0, 0


def run(
    models: Any,
    batch_of: BatchOf,
    config: SCFMConfig,
    ours: dict[str, Any],
    looks: Sequence[int],
    look: Callable[[int], Any],
) -> dict[str, Any]:
    """`distill`, watched: {"looks": {steps: look(steps)}, "restarts": when the rule restarted, "numbers":
    trained, "done": steps}. A run whose gradient is no longer finite ends there; its student stands for the
    looks that were to come.
    """
    stalled, found, done = RestartWhenStalled(models), {}, 0

    def on_step(step: int, _: Any) -> None:
        nonlocal done
        done = step + 1
        if ours["restart_when_stalled"]:
            stalled(done)
        if done in looks:
            found[done] = look(done)

    with suppress(FloatingPointError):
        distill(models, batch_of, config, on_step, progress=False)
    found |= {steps: look(steps) for steps in looks if steps not in found}
    numbers = sum(weight.numel() for weight in models.parameters("student"))
    return {"looks": found, "restarts": stalled.restarts, "numbers": numbers, "done": done}


def split(change: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A change as (what `SCFMConfig` or the measurement takes, ours)."""
    theirs = {name: value for name, value in change.items() if name not in OURS}
    return theirs, {name: change.get(name, value) for name, value in OURS.items()}


# The plane


def plane_lora_models(network: MLP, rank: int, seed: int) -> LoraModels:
    """`LoraModels` on a copy of an `MLP`: an adapter on each of its linear layers."""
    from diffusers.loaders import PeftAdapterMixin  # heavy, and most cells need none of it

    class Adaptable(MLP, PeftAdapterMixin):
        """What diffusers' transformers have, for a small network."""

    torch.manual_seed(seed)  # PEFT draws A from the global state
    copy = load_weights(Adaptable(), network.state_dict())
    return LoraModels(copy, lambda network, x, t, cond: network(x, t), LAYERS, rank)


def measure_plane_run(bed: Plane, job: Job) -> dict:
    """What `run` gives; at each look what `score_student` does."""
    network, of_teacher = bed.teacher(job)
    change, ours = split(DEFAULT | job.change)
    recipe, sizes = make_recipe(bed.sizes, change), bed.sizes
    config, reading = SCFMConfig(**{"seed": job.seed, **recipe.config}), recipe.reading

    def make() -> dict:
        models = (
            plane_lora_models(network, ours["rank"], config.seed) if ours["rank"] else CopiedModels(network)
        )
        measure, search = bed.ruler(job), bed.search(job, models.field("teacher"))
        field_at = partial(models.field, reading["read_out"])

        def look(_: int) -> dict:
            shift = reading["sampling_shift"]
            return score_student(measure, search, field_at, sizes.steps, sizes.scales, shift)

        return run(models, bed.batches(job._replace(change={})), config, ours, sizes.looks, look)

    more = {
        "looks": sizes.looks,
        "noises": sizes.dial_noises,
        "goal": sizes.goal_steps,
        "scales": sizes.scales,
        "steps": sizes.steps,
    }
    spec = {"teacher": of_teacher, "config": non_defaults(config), **ours, **reading, **bed.judged_by(**more)}
    return bed.cache("ablation", spec, make)


# The tiny Flux


@lru_cache(1)
def held_out_judge(captions: int) -> Judge:
    """Of captions whose pairs no training image shows."""
    return Judge(family(), captions, progress=False)


def walks(sizes: Any) -> tuple[Walk, Walk]:
    """(for the judge, for the search), each walk(field, steps) -> endpoints (n, N, C), at the stock shift and
    guidance scale.
    """
    judge = held_out_judge(sizes.captions)
    return (
        lambda velocity, steps: judge.endpoints(velocity, steps, STOCK),
        seeded_walk(read_prompts(PROMPTS)[: sizes.dial_captions], 1000),
    )


def goals(bed: TaughtFlux) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the teacher's many steps take the judge's noises, and those of the search: two of (n, N, C)."""
    sizes = bed.sizes
    spec = {
        "pipeline": pipeline_fingerprint(),
        "captions": sizes.captions,
        "dial": sizes.dial_captions,
        "steps": sizes.goal_steps,
    }
    return bed.cache(
        "ablation_goals",
        spec,
        lambda: tuple(walk(teacher_field(), sizes.goal_steps) for walk in walks(sizes)),
    )


def measure_flux_run(bed: TaughtFlux, job: Job) -> dict:
    """What `run` gives; at each look who -> {"raw": {steps: endpoint distance}}, at the last also "dialled"
    and "scales".
    """
    change, ours = split(job.change)
    sizes, config = bed.sizes, bed.config({"lr_scheduler": "constant", **change})
    ours["rank"] = ours["rank"] or TAUGHT_RANK
    spec, both = bed.images().spec, goals(bed)

    def make() -> dict:
        models, batch_of = make_models(config.seed, ours["rank"]), bed.batches(job)

        def look(steps: int) -> dict:
            return {
                who: look_at_flux(sizes, both, partial(models.field, who), steps == max(sizes.looks))
                for who in READ
            }

        return run(models, batch_of, config, ours, sizes.looks, look)

    spec = {
        "images": spec,
        "guidance": GUIDANCE_RANGE,
        "config": non_defaults(config),
        **ours,
        "protocol": asdict(sizes),
    }
    return bed.cache("ablation_flux", spec, make)


def look_at_flux(
    sizes: Any, both: tuple[torch.Tensor, torch.Tensor], field_at: FieldAtScale, last: bool
) -> dict:
    """both: the goals of the judge and of the search."""
    (judge, search), (goal, search_goal) = walks(sizes), both

    def distance(n: int, scale: float) -> float:
        return finite(endpoint_distance(judge(field_at(scale), n), goal))

    found = {"raw": {n: distance(n, 1.0) for n in sizes.steps}}
    if last:
        found["scales"] = by_steps(find_scales(search, search_goal, field_at, sizes.steps, sizes.scales))
        found["dialled"] = {
            n: found["raw"][n] if scale == 1 else distance(n, scale) for n, scale in found["scales"].items()
        }
    return found


def measure_flux_teacher(bed: TaughtFlux, job: Job) -> dict:
    """{shift: {steps: endpoint distance}} of the untouched teacher. Makes all that the runs share."""
    bed.images()
    sizes, (goal, _) = bed.sizes, goals(bed)

    def make() -> dict:
        judge = held_out_judge(sizes.captions)
        return {
            shift: {
                n: endpoint_distance(judge.endpoints(teacher_field(), n, shift), goal) for n in sizes.steps
            }
            for shift in SHIFTS
        }

    spec = {"pipeline": pipeline_fingerprint(), "protocol": asdict(sizes)}
    return bed.cache("ablation_flux_teacher", spec, make)
