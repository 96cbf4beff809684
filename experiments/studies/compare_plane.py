"""The study `compare` on the plane: each few-step method from the plane's teachers, with all weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from experiments import budgets
from experiments.budgets import PAIR_STEPS, STAGES
from experiments.runner import CellCache, Job, non_defaults
from experiments.scales import schedule_distance, scheduled_field, uniform_curve
from experiments.streams import Stream
from experiments.testbeds import FieldAtScale, Walk
from experiments.testbeds.plane import (
    COUPLED,
    Plane,
    PlaneSizes,
    endpoints,
    load_weights,
    make_recipe,
    plan,
    search_cost,
)
from experiments.testbeds.plane_measures import measure_floor, measure_student, measure_teacher
from scfm.method.baselines import (
    SHORTCUT_GRIDS,
    distillation_loss,
    dpm_solver_pp,
    fit,
    make_pairs,
    meanflow_loss,
    progressive,
    reflow_loss,
    sample_renoised,
    sample_with_step_size,
    shortcut_loss,
)
from scfm.method.distill import CopiedModels, SCFMConfig
from scfm.method.flow import time_grid
from scfm.method.lora_scale import choose_lora_scales
from scfm.method.scale_schedule import parabola_min, search_per_step
from scfm.streams import keyed_generator
from toy.plane import DATA, MLP, with_step

LOSSES = {"consistency": distillation_loss, "shortcut": shortcut_loss, "meanflow": meanflow_loss}
STEP_AWARE = ("shortcut", "meanflow")  # their networks have the step size as second input
TABLE_SCALES = 5  # of the table that `search_per_step` starts from
SCHEDULED = (1, 2, 3, 4, 8)  # the step counts that it serves
Sampler = Callable[[torch.Tensor, int], torch.Tensor]  # (noise, steps) -> points


@dataclass(frozen=True)
class Sizes(PlaneSizes):
    """seeds: of each method; floor_pairs: of data against data."""

    seeds: int = 3
    floor_pairs: int = 60


def schedule_search(sizes: PlaneSizes) -> tuple[int, tuple[float, ...], int]:
    """(noises, scales, evaluations) of finding a scale for each step, which may cost what `search_cost` does:
    a coarser table, fewer noises.
    """
    noises = sizes.dial_noises * 3 // 4
    scales = tuple(torch.linspace(min(sizes.scales), max(sizes.scales), TABLE_SCALES).tolist())
    searched = sum(n * walks_of_search(n) for n in SCHEDULED if n in sizes.steps)
    return noises, scales, noises * (sum(sizes.steps) * TABLE_SCALES + searched + sizes.goal_steps)


def walks_of_search(n: int) -> int:
    """How many walks of n steps `search_per_step` takes, where no scale comes near 0."""
    return 1 + 3 * (1 + 2 * min(n, 4)) if n > 1 else 4


def spent(sizes: PlaneSizes, method: str, budget: int) -> int:
    """The evaluations that a run with this budget really takes."""
    return budgets.spent(method, budget, sizes.batch, search_cost(sizes))


def train_rival(bed: Plane, job: Job) -> tuple[dict[Any, nn.Module], MLP, dict]:
    """{name: network} of a method: its slow EMA under "ema_slow", or one for each stage; the teacher's
    network; the cell's spec.
    """
    network, of_teacher = bed.teacher(job)
    steps, pairs = plan(bed.sizes, job.family, job.budget)
    stages = {"stages": STAGES} if job.family == "progressive" else {}
    grids = {"grids": SHORTCUT_GRIDS} if job.family == "shortcut" else {}
    change = {**job.change, "max_train_steps": steps // len(STAGES) if stages else steps}
    config = SCFMConfig(seed=job.seed, **make_recipe(bed.sizes, change).config)
    spec = {
        "teacher": of_teacher,
        "method": job.family,
        "pairs": pairs,
        "config": non_defaults(config),
        **stages,
        **grids,
    }
    step_aware = job.family in STEP_AWARE

    def make() -> dict:
        networks = fit_rival(job, with_step(network) if step_aware else network, config, pairs)
        return {name: trained.state_dict() for name, trained in networks.items()}

    weights = bed.cache("few_step", spec, make)
    networks = {name: load_weights(MLP(step_input=step_aware), part) for name, part in weights.items()}
    return networks, network, spec


def fit_rival(job: Job, network: nn.Module, config: SCFMConfig, pairs: int) -> dict[Any, nn.Module]:
    def batch_of(generator: torch.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return DATA[job.data](count, generator), torch.randn(count, 2, generator=generator)

    if job.family == "progressive":
        return progressive(network, batch_of, config, STAGES)
    if job.family == "reflow":
        return {"ema_slow": fit_reflow(network, config, pairs)}
    return {"ema_slow": fit(CopiedModels(network), batch_of, config, LOSSES[job.family]).networks["ema_slow"]}


def fit_reflow(network: nn.Module, config: SCFMConfig, count: int) -> nn.Module:
    """The slow EMA of Reflow on so many pairs, drawn once."""
    models = CopiedModels(network)
    noise = torch.randn(count, 2, generator=keyed_generator(config.seed, 0, Stream.PAIRS))
    points, starts = make_pairs(models.teacher, noise, PAIR_STEPS)

    def batch_of(generator: torch.Generator, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.randint(count, (n,), generator=generator)
        return points[index], starts[index]

    return fit(models, batch_of, config, reflow_loss).networks["ema_slow"]


def samplers(method: str, networks: dict[Any, nn.Module], base: nn.Module, seed: int) -> dict[str, Sampler]:
    """{curve: sampler} of a method's networks. base: the teacher's, for more steps than stages."""
    fields = {
        name: CopiedModels(network).field("teacher") for name, network in {**networks, "base": base}.items()
    }

    def own_stage(noise: torch.Tensor, n: int) -> torch.Tensor:
        return endpoints(fields[min((k for k in STAGES if k >= n), default="base")], noise, n)

    def step_size(noise: torch.Tensor, n: int) -> torch.Tensor:
        finest = 1 / max(SHORTCUT_GRIDS) if method == "shortcut" else 0.0
        return sample_with_step_size(fields["ema_slow"], noise, time_grid(n), finest)

    def renoised(noise: torch.Tensor, n: int) -> torch.Tensor:
        generator = keyed_generator(seed, n, Stream.RENOISE)
        return sample_renoised(fields["ema_slow"], noise, time_grid(n), generator)

    if method == "progressive":
        return {"own stage": own_stage, "last stage": partial(endpoints, fields[1])}
    if method in STEP_AWARE:
        return {"raw": step_size}
    return {"raw": partial(endpoints, fields["ema_slow"])} | (
        {"re-noised": renoised} if method == "consistency" else {}
    )


def measure_rival(bed: Plane, job: Job) -> dict:
    """curve: {steps: SW2}; `curve coupling`: {steps: distance to the teacher's own endpoints from the same
    noises}.
    """
    (networks, base, spec), measure = train_rival(bed, job), bed.judge_walks(job)

    def make() -> dict:
        found = {}
        for curve, sampler in samplers(job.family, networks, base, job.seed).items():
            marks = {n: measure(sampler, n) for n in bed.sizes.steps}
            found[curve] = {n: mark["sw2"] for n, mark in marks.items()}
            found[f"{curve} coupling"] = {n: mark["endpoint"] for n, mark in marks.items()}
        return found

    more = {"steps": bed.sizes.steps, "coupled": COUPLED, "goal": bed.sizes.goal_steps}
    return bed.cache("few_step_sw2", {"of": spec, **bed.judged_by(**more)}, make)


def measure_scfm(bed: Plane, job: Job) -> dict:
    """What `measure_student` gives, and the coupling beside it, on noises that chose no scale."""
    value, (models, spec), distance = measure_student(bed, job), bed.student(job), bed.distance(job)

    def make() -> dict:
        field_at = partial(models.field, "ema_slow")
        return {
            "raw coupling": {n: distance(field_at(1.0), n) for n in bed.sizes.steps},
            "dialled coupling": {n: distance(field_at(value["scales"][n]), n) for n in bed.sizes.steps},
        }

    more = {"coupled": COUPLED, "goal": bed.sizes.goal_steps, "scales": value["scales"]}
    coupling = bed.cache("coupling", {"of": spec, **bed.judged_by(**more)}, make)
    return value | coupling | measure_schedules(bed, job, models, spec)


def measure_schedules(bed: Plane, job: Job, models: CopiedModels, spec: dict) -> dict:
    """{"stepwise": {steps: SW2}, "stepwise coupling": ...}: a scale for each step of a walk; beyond 8 steps
    one for all, by a parabola through the table.
    """
    (noises, scales, _), measure = schedule_search(bed.sizes), bed.judge(job)

    def make() -> dict:
        field_at = partial(models.field, "ema_slow")
        search = bed.search(job, models.field("teacher"), noises)
        found = find_schedules(search, field_at, bed.sizes.steps, scales)
        marks = {n: measure(scheduled_field(field_at, schedule), n) for n, schedule in found.items()}
        return {
            "stepwise": {n: mark["sw2"] for n, mark in marks.items()},
            "stepwise coupling": {n: mark["endpoint"] for n, mark in marks.items()},
        }

    more = {
        "steps": bed.sizes.steps,
        "coupled": COUPLED,
        "goal": bed.sizes.goal_steps,
        "noises": noises,
        "scales": scales,
        "served": SCHEDULED,
        "beyond": "parabola",
    }
    return bed.cache("stepwise", {"of": spec, **bed.judged_by(**more)}, make)


def find_schedules(
    search: tuple[Walk, torch.Tensor], field_at: FieldAtScale, steps: Sequence[int], scales: Sequence[float]
) -> dict[int, tuple[float, ...]]:
    """{steps: a scale for each step}."""
    distance = schedule_distance(*search, field_at)
    curve = uniform_curve(distance, steps, scales)
    chosen = choose_lora_scales(curve)
    return {
        n: search_per_step(distance, n, s).scales if n in SCHEDULED else (between(curve, n, s),) * n
        for n, s in zip(chosen.steps, chosen.scales, strict=True)
    }


def between(curve: dict[tuple[int, float], float], n: int, scale: float) -> float:
    """Where the parabola through the squared distances at `scale` and its two neighbours in the table is
    lowest: no further walk.
    """
    scales = sorted({s for _, s in curve})
    i = min(max(scales.index(scale), 1), len(scales) - 2)
    return parabola_min([(s, curve[n, s] ** 2) for s in scales[i - 1 : i + 2]])


def measure_multistep(bed: Plane, job: Job) -> dict:
    """{"multistep": {evaluations: SW2}} of the teacher."""
    network, spec = bed.teacher(job)

    def make() -> dict:
        score, noise = bed.cloud(job), bed.references(job).noise
        velocity = CopiedModels(network).field("teacher")
        return {
            "multistep": {n: score(dpm_solver_pp(velocity, noise, time_grid(n)))[0] for n in bed.sizes.steps}
        }

    return bed.cache("multistep_sw2", {"of": spec, **bed.judged_by(steps=bed.sizes.steps)}, make)


def measure(cache: CellCache, job: Job, sizes: Sizes) -> dict:
    """The measurement of a job, by its family; all but those named here are rivals."""
    named = {
        "teacher": measure_teacher,
        "multistep": measure_multistep,
        "scfm": measure_scfm,
        "floor": partial(measure_floor, pairs=sizes.floor_pairs),
    }
    return named.get(job.family, measure_rival)(Plane(cache, sizes), job)
