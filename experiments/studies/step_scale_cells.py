"""Trainings and measurements of the study `step_scale`, on the plane and on the tiny Flux."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from experiments import budgets
from experiments.recipes import short_decay
from experiments.runner import CellCache, Job, non_defaults
from experiments.testbeds import Field
from experiments.testbeds.plane import BUDGETED_SIZES, Plane, PlaneSizes, longer, make_recipe
from experiments.testbeds.tiny_flux import (
    LEARNING_RATE,
    FluxSizes,
    TinyFlux,
    family,
    pipeline_fingerprint,
)
from scfm.method.distill import STEP_SCALED, SCFMConfig, distill
from scfm.method.lora_scale import STEPS
from scfm.method.step_scale import ScaledNetwork
from scfm.models.lora import adapter_state, load_adapter_state
from scfm.models.scaled_lora import ScaledLoraModels
from scfm.types import Condition
from toy.judge import STOCK
from toy.pipelines import GUIDANCE, load_flux
from toy.plane import DATA, MLP, train_flow

RANK = 16


class DampedTargets(ScaledNetwork):
    """Whose EMA makes the half-steps of a target at `damping` times their scale."""

    damping = 1.0

    def scaled_velocity(
        self, name: str, scales: torch.Tensor, x: torch.Tensor, t: torch.Tensor, cond: Condition = None
    ) -> torch.Tensor:
        damping = self.damping if name == "ema" else 1.0
        return super().scaled_velocity(name, damping * scales, x, t, cond)


class FromScratch(NamedTuple):
    """batch: examples of a step; steps: that are measured."""

    batch: int = 512
    steps: tuple[int, ...] = (*STEPS, 64)


def train_steps(budget: int, batch: int, lora: bool = False) -> int:
    """Training steps that a budget buys: those of SCFM, without the search that nothing here needs."""
    return budgets.plan("scfm", budget, batch, lora=lora)[0]


def make_config(job: Job, sizes: Any, steps: int, around: float, **usual: Any) -> SCFMConfig:
    """Of a job. around: the shift that is sampled at; a job's `shift_width` says how far training strays."""
    change = dict(job.change)
    width, memory = change.pop("shift_width", 0.1), change.pop("ema_memory", 1)
    recipe = make_recipe(
        sizes,
        {
            "max_train_steps": steps,
            "algorithm": STEP_SCALED,
            "shift": (around / (1 + width), around * (1 + width)),
            "ema_decay": longer(short_decay(steps), memory),
            **usual,
            **change,
        },
    )
    return SCFMConfig(**{"seed": job.seed, **recipe.config})


def curves_of(
    measure: Callable[..., dict],
    field_at: Callable[[float], Field],
    config: SCFMConfig,
    steps: tuple[int, ...],
) -> dict[str, dict[int, dict]]:
    """{metric: {steps: number}} with the scale that the rule says for each number of steps."""
    marks = {n: measure(field_at(config.step_scale.scale(n)), n) for n in steps}
    return {name: {n: mark[name] for n, mark in marks.items()} for name in next(iter(marks.values()))}


def measure_on_plane(cache: CellCache, job: Job, sizes: PlaneSizes) -> dict:
    """{"sw2": {steps: number}, "endpoint": ...}."""
    bed = Plane(cache, sizes)
    network, of_teacher = bed.teacher(job)
    change = dict(job.change)
    damping = change.pop("damping", 1.0)
    plain = job._replace(change=change)
    config = make_config(plain, sizes, train_steps(job.budget, sizes.batch), bed.shift)
    spec = {"teacher": of_teacher, "config": non_defaults(config)}
    spec |= {"damping": damping} if damping != 1 else {}
    models = DampedTargets(network, config.scale_order)

    def make() -> list[torch.Tensor]:
        models.damping = damping
        distill(models, bed.batches(plain), config, progress=False)
        models.damping = 1.0  # what is sampled is not damped
        return [part.clone() for part in models.parameters("ema")]

    for mine, stored in zip(models.parameters("ema"), cache("step_scale", spec, make), strict=True):
        mine.data.copy_(stored)
    more = {"steps": sizes.steps, "goal": sizes.goal_steps}
    return cache(
        "step_scale_marks",
        {"of": spec, **bed.judged_by(**more)},
        lambda: curves_of(bed.judge(job), partial(models.field, "ema"), config, sizes.steps),
    )


def measure_from_scratch(cache: CellCache, job: Job, sizes: FromScratch) -> dict:
    """{"sw2": {steps: number}} of a flow from nothing; where its scale is trained in also "base", at 0.

    A job's change without a `share` of self-consistency examples means plain flow matching.
    """
    data, share = DATA[job.data], job.change.get("share")
    per_example = 3 + 2 * (share or 0)  # forward 1, backward 2, each half-step of a target 1
    steps = int(job.budget / (sizes.batch * per_example))
    spec = {"data": job.data, "seed": job.seed, "share": share, "steps": steps, "batch": sizes.batch}
    torch.manual_seed(job.seed)
    models = ScaledNetwork(MLP(), 2, train_base=True)
    config = SCFMConfig(
        max_train_steps=steps,
        global_batch_size=sizes.batch,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        algorithm=STEP_SCALED,
        non_shortcut_ratio=1 - (share or 0),
        shift=(1 / 1.1, 1.1),
        ema_decay=0.98,
        ema_decay_slow=0.995,
        seed=job.seed,
    )
    spec |= {"difference_lr": config.rate_of_differences} if share else {}

    def make() -> list[torch.Tensor]:
        if share is None:
            network = train_flow(MLP(), data, steps, sizes.batch, seed=job.seed)
            return [w.detach() for w in network.parameters()]
        distill(models, lambda generator, n: data(n, generator), config, progress=False)
        return [part.clone() for part in models.parameters("ema")]

    stored = cache("step_scale_scratch", spec, make)
    mine = models.bases["ema"] if share is None else models.parameters("ema")
    for own, part in zip(mine, stored, strict=True):
        own.data.copy_(part)

    def marks() -> dict:
        measure = Plane(cache, BUDGETED_SIZES).ruler(job)
        base = {n: measure(models.field("ema", 0.0), n)[0] for n in sizes.steps}
        if share is None:
            return {"sw2": base}
        rule = config.step_scale
        return {
            "sw2": {n: measure(models.field("ema", rule.scale(n)), n)[0] for n in sizes.steps},
            "base": base,
        }

    return cache("step_scale_scratch_sw2", {"of": spec, "steps": sizes.steps}, marks)


def make_scaled_lora(seed: int, rank: int, order: int) -> ScaledLoraModels:
    """On a pipeline of its own."""
    torch.manual_seed(seed)  # PEFT draws A from the global state
    known = family()
    return ScaledLoraModels(load_flux().transformer, known.velocity, known.lora_targets, rank, order=order)


def measure_on_flux(cache: CellCache, job: Job, sizes: FluxSizes) -> dict:
    """{"frechet": {steps: number}, "prompt_accuracy": ..., "endpoint": ...}. A change may name a rank, and
    how many drawings the training sees.
    """
    bed, change = TinyFlux(cache, sizes), dict(job.change)
    rank, drawings = change.pop("rank", RANK), change.pop("drawings", sizes.drawings)
    steps, seen = train_steps(job.budget, sizes.batch, lora=True), replace(sizes, drawings=drawings)
    plain = job._replace(change=change)
    config = make_config(
        plain, sizes, steps, STOCK, global_batch_size=sizes.batch, learning_rate=LEARNING_RATE
    )
    spec = {
        "pipeline": pipeline_fingerprint(),
        "rank": rank,
        "drawings": drawings,
        "guidance": GUIDANCE,
        "config": non_defaults(config),
    }
    models = make_scaled_lora(job.seed, rank, config.scale_order)
    adapters = models.adapters["ema"]

    def make() -> dict[str, dict[str, torch.Tensor]]:
        distill(models, TinyFlux(cache, seen).batches(job), config, progress=False)
        states = {name: adapter_state(models.transformer, name) for name in adapters}
        return {name: {key: part.clone() for key, part in state.items()} for name, state in states.items()}

    for name, state in cache("step_scale_flux", spec, make).items():
        load_adapter_state(models.transformer, name, state)
    return cache(
        "step_scale_flux_marks",
        {"of": spec, "judged": sizes.judged, "steps": sizes.steps},
        lambda: curves_of(bed.judge(job), partial(models.field, "ema"), config, sizes.steps),
    )
