"""The tiny Flux of toy/: LoRAs on its teacher, judged on captions that name pairs which it never saw, or on
others.

`TinyFlux` trains on drawings with their captions, as the teacher was trained, at the guidance scale and the
shift at which the pipeline is sampled. `TaughtFlux` trains on images that the teacher generated, as `scfm
distill` does. A LoRA's backward passes through frozen weights: it counts 1 network evaluation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

from experiments import budgets
from experiments.runner import CellCache, Job, non_defaults
from experiments.streams import Stream
from experiments.testbeds import BatchOf, Field, FieldAtScale, Walk
from experiments.testbeds.plane import make_recipe, ramp_teacher_ratio
from scfm.data.fingerprint import fingerprint
from scfm.method.distill import SCFMConfig, distill
from scfm.method.flow import sample, time_grid
from scfm.method.lora_scale import STEPS
from scfm.models.flux import Flux
from scfm.models.lora import ADAPTERS, LoraModels, adapter_state, load_adapter_state
from scfm.models.sampling import euler_endpoints, on_device, start_noise
from scfm.models.source import PipelineSource
from scfm.streams import keyed_generator
from toy.judge import STOCK, Judge
from toy.pipelines import FLUX, GUIDANCE, TOKENS, WEIGHTS, load_flux
from toy.shapes import draw_captions, draw_images

NAME, PROMPTS = "tiny Flux", WEIGHTS / "prompts.txt"
Adapter = dict[str, torch.Tensor]  # a LoRA, as `adapter_state` gives it


@lru_cache(1)
def family() -> Flux:
    """The pipeline's family; nobody trains its transformer."""
    return Flux(load_flux(), 32, 32, TOKENS)


@lru_cache(1)
def pipeline_fingerprint() -> str:
    """What tells the carried pipeline from another."""
    return fingerprint(PipelineSource(FLUX), *(part.name for part in FLUX.iterdir() if part.is_dir()))


def teacher_field() -> Field:
    return partial(family().velocity, family().pipe.transformer)


def make_models(seed: int, rank: int) -> LoraModels:
    """`LoraModels` on a pipeline of their own."""
    velocity, targets = family().velocity, family().lora_targets
    torch.manual_seed(seed)  # PEFT draws A from the global state
    return LoraModels(load_flux().transformer, velocity, targets, rank)


def copy_of_lora(models: LoraModels, adapter: str = "ema_slow") -> Adapter:
    return {name: tensor.clone() for name, tensor in adapter_state(models.transformer, adapter).items()}


def load_lora(models: LoraModels, lora: Adapter) -> FieldAtScale:
    """The field, at any scale, of a LoRA that takes the slow EMA's place."""
    load_adapter_state(models.transformer, "ema_slow", lora)
    return partial(models.field, "ema_slow")


def seeded_walk(captions: Sequence[str], seed: int) -> Walk:
    """walk(field, steps) -> latents (n, N, C), from a noise for each caption."""
    return walk_from(captions, start_noise(family(), range(len(captions)), seed))


def walk_from(captions: Sequence[str], noise: torch.Tensor) -> Walk:
    """walk(field, steps) -> latents, shaped as `noise` (n, N, C), which has one for each caption."""

    def walk(velocity: Field, steps: int) -> torch.Tensor:
        return euler_endpoints(family(), velocity, captions, noise, steps, STOCK, GUIDANCE)

    return walk


# Trained on drawings

RANK, LEARNING_RATE = 16, 1e-3
SHIFT_RANGE = (2.5, 4.5)  # in training, around the scheduler's own 3


@dataclass(frozen=True)
class FluxSizes:
    """updates: of `make_recipe`, which every job replaces; batch: examples of a step; drawings: that are
    trained on; judged: captions of a measurement; dial_noises, search_steps, search_scales: of the search for
    scales, beyond which the teacher stands; steps: that are measured.
    """

    updates: int = 0
    batch: int = 32
    drawings: int = 2048
    judged: int = 256
    dial_noises: int = 16
    search_steps: tuple = (1, 2, 3, 4, 8)
    search_scales: tuple = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
    steps: tuple = STEPS


SMOKE_SIZES = FluxSizes(
    batch=2,
    drawings=8,
    judged=2,
    dial_noises=1,
    search_steps=(1, 3),
    search_scales=(0.0, 0.5, 1.0),
    steps=(1, 3, 4),
)


class Drawings:
    """`count` drawings as latents, with what their captions are encoded to."""

    def __init__(self, count: int):
        captions = draw_captions(count, keyed_generator(0, 0, Stream.DRAWINGS))
        images, _ = draw_images(captions, keyed_generator(0, 1, Stream.DRAWINGS))
        self.captions = captions.text
        self.latents = torch.cat([family().encode_images(part) for part in images.split(256)])
        parts = [family().encode_text(list(self.captions[i : i + 256])) for i in range(0, count, 256)]
        self.text = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def cond(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """The condition of the drawings with these numbers."""
        text = {name: part[index] for name, part in self.text.items()}
        return text | {"guidance": torch.full((len(index),), GUIDANCE)}


load_drawings = lru_cache(1)(Drawings)


@lru_cache(1)
def load_judge(captions: int) -> Judge:
    """The judge, its goal set: where the teacher's own 32 steps end."""
    judge = Judge(family(), captions, progress=False)
    judge.set_goal(teacher_field())
    return judge


class Training(NamedTuple):
    """What a method's training is determined by, and the spec of its cell. pairs: of Reflow;
    teacher_ratio_end: where a moving k/N ends, None where it stays.
    """

    config: SCFMConfig
    pairs: int
    teacher_ratio_end: float | None
    spec: dict[str, Any]


class TinyFlux:
    """The `Testbed` of methods that can be a plain LoRA. A job's family names the method, its seed is that of
    training.
    """

    shift = STOCK

    def __init__(self, cache: CellCache, sizes: FluxSizes):
        self.cache, self.sizes = cache, sizes

    def teacher(self, job: Job) -> tuple[Field, str]:
        return teacher_field(), pipeline_fingerprint()

    def batches(self, job: Job) -> BatchOf:
        """Latents of drawings with the condition of their captions."""
        drawings = load_drawings(self.sizes.drawings)

        def batch_of(generator: torch.Generator, count: int) -> tuple:
            index = torch.randint(len(drawings.latents), (count,), generator=generator)
            return drawings.latents[index], drawings.cond(index)

        return batch_of

    def training(self, job: Job) -> Training:
        """Of a method, by the job's budget."""
        steps, pairs = plan(self.sizes, job.family, job.budget)
        stages = {"stages": budgets.STAGES} if job.family == "progressive" else {}
        usual = {
            "max_train_steps": steps // len(budgets.STAGES) if stages else steps,
            "shift": SHIFT_RANGE,
            "global_batch_size": self.sizes.batch,
            "learning_rate": LEARNING_RATE,
        }
        recipe = make_recipe(self.sizes, usual | job.change)
        config = SCFMConfig(seed=job.seed, **recipe.config)
        ramp = {name: value for name, value in recipe.training.items() if name == "teacher_ratio_end"}
        spec = {
            "pipeline": pipeline_fingerprint(),
            "method": job.family,
            "pairs": pairs,
            "rank": RANK,
            "drawings": self.sizes.drawings,
            "guidance": GUIDANCE,
            "shift": STOCK,
            "config": non_defaults(config),
            **ramp,
            **stages,
        }
        return Training(config, pairs, ramp.get("teacher_ratio_end"), spec)

    def student(self, job: Job) -> tuple[dict[str, Adapter], dict]:
        """{name: LoRA} of SCFM's student and EMAs, and the spec of their cell."""
        config, _, teacher_ratio_end, spec = self.training(job)

        def make() -> dict[str, Adapter]:
            batch_of, models = self.batches(job), make_models(job.seed, RANK)
            distill(models, batch_of, config, ramp_teacher_ratio(config, teacher_ratio_end), progress=False)
            return {name: copy_of_lora(models, name) for name in ADAPTERS}

        return self.cache("flux", spec, make), spec

    def search(self, job: Job, teacher: Field) -> tuple[Walk, torch.Tensor]:
        """From noises with captions of the drawings: no image, none of the judge's captions."""
        walk = seeded_walk(load_drawings(self.sizes.drawings).captions[: self.sizes.dial_noises], 1000)
        return walk, walk(teacher, budgets.PAIR_STEPS)

    def judge(self, job: Job) -> Callable[..., dict[str, float]]:
        """measure(field, steps, sampler) -> {"frechet", "prompt_accuracy", "endpoint"}. sampler(field, noise,
        times).
        """
        judge = load_judge(self.sizes.judged)

        @torch.no_grad()
        def measure(velocity: Field, steps: int, sampler: Callable = sample) -> dict[str, float]:
            reached = sampled(judge, velocity, steps, sampler)
            images = torch.cat([judge.family.decode(part) for part in reached.split(256)])
            marks = judge.score(reached, images)
            return {name: marks[name] for name in ("frechet", "prompt_accuracy", "endpoint")}

        return measure


def search_cost(sizes: FluxSizes) -> int:
    """Evaluations that the search for scales takes."""
    return budgets.search_cost(sizes.dial_noises, sizes.search_steps, sizes.search_scales, budgets.PAIR_STEPS)


def plan(sizes: FluxSizes, method: str, budget: int) -> tuple[int, int]:
    """(training steps, pairs) that a budget of evaluations buys."""
    return budgets.plan(method, budget, sizes.batch, search_cost(sizes), lora=True)


def sampled(judge: Judge, velocity: Field, steps: int, sampler: Callable) -> torch.Tensor:
    """Where a sampler takes the judge's noises (n, ...). sampler(field, noise, times) of a field without
    captions.
    """
    reached = []
    for index in torch.arange(len(judge.noise)).split(64):
        text = judge.family.encode_text([judge.captions.text[i] for i in index])
        cond = on_device(text, "cpu") | {"guidance": torch.full((len(index),), GUIDANCE)}
        field = with_cond(velocity, cond)
        reached.append(sampler(field, judge.noise[index], time_grid(steps, STOCK)))
    return torch.cat(reached)


def with_cond(velocity: Field, cond: dict[str, torch.Tensor]) -> Field:
    """The field with a condition of its own, whatever it is given."""
    return lambda x, t, *_: velocity(x, t, cond)
