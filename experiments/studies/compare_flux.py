"""The study `compare` on the tiny Flux: every method that can be a plain LoRA, judged by toy/judge.py."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from experiments import budgets
from experiments.budgets import PAIR_STEPS, STAGES
from experiments.runner import CellCache, Job
from experiments.scales import find_scales
from experiments.streams import Stream
from experiments.testbeds import BatchOf, Field
from experiments.testbeds.tiny_flux import (
    RANK,
    Adapter,
    FluxSizes,
    TinyFlux,
    copy_of_lora,
    load_drawings,
    load_judge,
    load_lora,
    make_models,
    pipeline_fingerprint,
    search_cost,
    walk_from,
)
from scfm.method.baselines import (
    distillation_loss,
    dpm_solver_pp,
    fit,
    progressive_loss,
    reflow_loss,
    sample_renoised,
)
from scfm.method.distill import SCFMConfig
from scfm.method.flow import EVALUATIONS, sample
from scfm.method.lora_scale import LoraScales
from scfm.models.lora import LoraModels, copy_adapter
from scfm.streams import keyed_generator
from toy.judge import STOCK
from toy.pipelines import GUIDANCE

# what the record calls the marks of a curve, behind the curve's name
KINDS = {"": "frechet", " accuracy": "prompt_accuracy", " coupling": "endpoint"}


def spent(sizes: FluxSizes, method: str, budget: int) -> int:
    """The evaluations that a run with this budget really takes."""
    return budgets.spent(method, budget, sizes.batch, search_cost(sizes), lora=True)


class CaptionedModels:
    """`DistillModels` for the losses of scfm.method.baselines, which know no captions: the condition is
    `cond`, that of the batch at hand. teacher: another field in the base's place.
    """

    def __init__(self, models: LoraModels, teacher: Field | None = None):
        self.models, self.cond, self.teacher_field = models, None, teacher or models.teacher
        self.parameters = models.parameters

    def student(self, x: torch.Tensor, t: torch.Tensor, step: torch.Tensor | None = None) -> torch.Tensor:
        return self.models.student(x, t, self.cond)

    def teacher(self, x: torch.Tensor, t: torch.Tensor, step: torch.Tensor | None = None) -> torch.Tensor:
        return self.teacher_field(x, t, self.cond)

    def ema_fast(self, x: torch.Tensor, t: torch.Tensor, step: torch.Tensor | None = None) -> torch.Tensor:
        return self.models.ema_fast(x, t, self.cond)


def with_noise(draw: BatchOf, captioned: CaptionedModels) -> BatchOf:
    """batch_of for `fit`: latents and noise; the captions go to the models."""

    def batch_of(generator: torch.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        latents, captioned.cond = draw(generator, count)
        return latents, torch.randn(latents.shape, generator=generator)

    return batch_of


def train_consistency(bed: TinyFlux, job: Job, config: SCFMConfig, pairs: int) -> dict[Any, Adapter]:
    models = make_models(job.seed, RANK)
    captioned = CaptionedModels(models)
    loss = partial(distillation_loss, shift=config.shift)
    fit(captioned, with_noise(bed.batches(job), captioned), config, loss)
    return {"ema_slow": copy_of_lora(models)}


def train_reflow(bed: TinyFlux, job: Job, config: SCFMConfig, pairs: int) -> dict[Any, Adapter]:
    """On so many pairs: a caption of the drawings and a noise each."""
    drawings, models = load_drawings(bed.sizes.drawings), make_models(job.seed, RANK)
    captioned, rows = CaptionedModels(models), torch.arange(pairs) % len(drawings.captions)
    generator = keyed_generator(config.seed, 0, Stream.FLUX_PAIRS)
    noise = torch.randn(pairs, *drawings.latents.shape[1:], generator=generator)
    ends = walk_from([drawings.captions[i] for i in rows], noise)(models.teacher, PAIR_STEPS)

    def batch_of(generator: torch.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.randint(pairs, (count,), generator=generator)
        captioned.cond = drawings.cond(rows[index])
        return ends[index], noise[index]

    fit(captioned, batch_of, config, reflow_loss)
    return {"ema_slow": copy_of_lora(models)}


def train_progressive(bed: TinyFlux, job: Job, config: SCFMConfig, pairs: int) -> dict[Any, Adapter]:
    """On the stock grid; one LoRA goes through all stages, a copy of it teaches the next. config: of each
    stage.
    """
    made, models = {}, make_models(job.seed, RANK)
    draw, teacher = bed.batches(job), models.teacher
    for stage, steps in enumerate(STAGES):
        captioned = CaptionedModels(models, teacher)
        stage_config = replace(config, seed=len(STAGES) * config.seed + stage)
        loss = partial(progressive_loss, steps=steps, shift=STOCK)
        fit(captioned, with_noise(draw, captioned), stage_config, loss)
        made[steps] = copy_of_lora(models)
        copy_adapter(models.transformer, "ema_slow", "student")
        teacher = copy.deepcopy(models).field("ema_slow")
    return made


TRAINERS = {"consistency": train_consistency, "reflow": train_reflow, "progressive": train_progressive}


def train_method(bed: TinyFlux, job: Job) -> tuple[dict[Any, Adapter], dict]:
    """{name: LoRA}: the slow EMA of a method under "ema_slow" (SCFM's student and fast EMA beside it), or one
    for each stage; and the cell's spec.
    """
    if job.family == "scfm":
        return bed.student(job)
    config, pairs, _, spec = bed.training(job)
    return bed.cache("flux", spec, lambda: TRAINERS[job.family](bed, job, config, pairs)), spec


def measure_method(bed: TinyFlux, job: Job) -> dict:
    """Curves of a trained method: Frechet, and with " accuracy" and " coupling" behind the name the other
    two.
    """
    loras, spec = train_method(bed, job)
    sizes = bed.sizes
    search = [sizes.search_steps, sizes.search_scales, sizes.dial_noises]

    def make() -> dict:
        models = make_models(job.seed, RANK)
        return method_curves(bed, job, models, loras)

    spec = {"of": spec, "judged": sizes.judged, "steps": sizes.steps, "dial": search}
    return bed.cache("flux_scores", spec, make)


def method_curves(bed: TinyFlux, job: Job, models: LoraModels, loras: dict[Any, Adapter]) -> dict:
    measure, curve = bed.judge(job), partial(curve_of, steps=bed.sizes.steps)

    def field(name: Any, scale: float = 1.0) -> Field:
        return models.teacher if name is None else load_lora(models, loras[name])(scale)

    def own_stage(n: int) -> Field:
        return field(min((k for k in STAGES if k >= n), default=None))

    def renoised(n: int) -> dict[str, float]:
        generator = keyed_generator(job.seed, n, Stream.FLUX_RENOISE)  # one for all parts of a walk
        return measure(field("ema_slow"), n, partial(sample_renoised, generator=generator))

    if job.family == "progressive":
        last_stage = curve("last stage", lambda n: measure(field(1), n))
        return curve("own stage", lambda n: measure(own_stage(n), n)) | last_stage
    raw = curve("raw", lambda n: measure(field("ema_slow"), n))
    if job.family == "consistency":
        return raw | curve("re-noised", renoised)
    if job.family == "scfm":
        scales = scale_of_steps(bed, job, models.teacher, partial(field, "ema_slow"))
        dialled = curve("dialled", lambda n: measure(field("ema_slow", scales[n]), n))
        return raw | dialled | {"scales": scales}
    return raw


def scale_of_steps(
    bed: TinyFlux, job: Job, teacher: Field, field_at: Callable[[float], Field]
) -> dict[int, float]:
    """{steps: scale}; 0 beyond the search: the teacher itself."""
    walk, goal = bed.search(job, teacher)
    steps, scales = bed.sizes.search_steps, bed.sizes.search_scales
    found: LoraScales = find_scales(walk, goal, field_at, steps, scales, STOCK)
    return {n: found.scale(n) if n <= max(steps) else 0.0 for n in bed.sizes.steps}


def curve_of(name: str, measure: Callable[[int], dict[str, float]], steps: Iterable[int]) -> dict[str, dict]:
    """{name: {NFE: Frechet}, "name accuracy": ..., "name coupling": ...} of measure(NFE) -> marks."""
    marks = {n: measure(n) for n in steps}
    return {name + kind: {n: mark[metric] for n, mark in marks.items()} for kind, metric in KINDS.items()}


def measure_teacher(bed: TinyFlux, job: Job) -> dict:
    """Curves of the untouched teacher by Euler, midpoint, Heun and DPM-Solver++(2M)."""
    velocity, fingerprint = bed.teacher(job)

    def make() -> dict:
        measure, curves = bed.judge(job), {}
        for solver, cost in EVALUATIONS.items():
            counted = [n for n in bed.sizes.steps if n % cost == 0]
            by_solver = partial(sample, solver=solver)
            curves |= curve_of(solver, lambda n, c=cost, s=by_solver: measure(velocity, n // c, s), counted)
        return curves | curve_of("multistep", lambda n: measure(velocity, n, dpm_solver_pp), bed.sizes.steps)

    spec = {
        "pipeline": fingerprint,
        "judged": bed.sizes.judged,
        "steps": bed.sizes.steps,
        "guidance": GUIDANCE,
        "shift": STOCK,
    }
    return bed.cache("flux_teacher", spec, make)


def measure_floor(bed: TinyFlux, job: Job) -> dict:
    """Frechet of as many fresh drawings as the judge has captions."""

    def make() -> dict:
        return {"mean": load_judge(bed.sizes.judged).floor(), "low": None, "high": None}

    return bed.cache("flux_floor", {"pipeline": pipeline_fingerprint(), "judged": bed.sizes.judged}, make)


def measure(cache: CellCache, job: Job, sizes: FluxSizes) -> dict:
    """The measurement of a job, by its family; all but those named here are methods."""
    named = {"teacher": measure_teacher, "floor": measure_floor}
    return named.get(job.family, measure_method)(TinyFlux(cache, sizes), job)
