"""The tiny Flux of toy/ with LoRAs that are trained on images of its teacher, as `scfm distill` does it."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer

from experiments.runner import CellCache, Job
from experiments.streams import Stream
from experiments.testbeds import BatchOf, Field, FieldAtScale, Walk
from experiments.testbeds.tiny_flux import (
    PROMPTS,
    Adapter,
    family,
    pipeline_fingerprint,
    seeded_walk,
    teacher_field,
)
from scfm.data.prompts import read_prompts
from scfm.method.distill import SCFMConfig
from scfm.method.ema import shorten
from scfm.models.lora import add_adapters, load_adapter_state
from scfm.streams import keyed_generator
from toy.judge import STOCK, Judge
from toy.pipelines import GUIDANCE, load_flux

TAUGHT_RANK, GUIDANCE_RANGE = 48, (1.0, 4.0)
TAUGHT_RECIPE = {
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "adam_weight_decay": 1e-4,
    "max_grad_norm": 10.0,
    "shift": (2.5, 4.5),
}
KINDS = {"seen pairs": False, "held-out pairs": True}  # of captions: is their colour-shape pair held out?


class Images(NamedTuple):
    """The teacher's images of the carried captions as latents (n, N, C), decoded and encoded again; and their
    spec.
    """

    latents: torch.Tensor
    captions: list[str]
    spec: dict[str, Any]


class TaughtFlux:
    """The `Testbed` of LoRAs that are trained on images of the teacher, as `scfm distill` does it.

    A job's change may name `few` images and the `seed` of that subset, which is also the seed of training.
    sizes: updates, batch, images and goal_steps; for the search dial_noises, for the judge captions and
    noises.
    """

    shift = STOCK

    def __init__(self, cache: CellCache, sizes: Any):
        self.cache, self.sizes = cache, sizes

    def teacher(self, job: Job) -> tuple[Field, str]:
        return teacher_field(), pipeline_fingerprint()

    def images(self) -> Images:
        """All that the teacher generates for training."""
        captions, steps = read_prompts(PROMPTS)[: self.sizes.images], self.sizes.goal_steps
        spec = {
            "pipeline": pipeline_fingerprint(),
            "captions": captions,
            "steps": steps,
            "guidance": GUIDANCE,
            "shift": STOCK,
        }

        def make() -> torch.Tensor:
            reached = seeded_walk(captions, 0)(teacher_field(), steps)
            return torch.cat([family().encode_images(family().decode(part)) for part in reached.split(64)])

        return Images(self.cache("few_pictures", spec, make), captions, spec)

    def batches(self, job: Job) -> BatchOf:
        """Latents with their captions, guidance scales drawn from a range; of the job's subset, if it names
        one.
        """
        latents, captions, _ = self.images()
        if "few" in job.change:
            index = subset(job.change["few"], job.change["seed"], len(captions))
            latents, captions = latents[index], [captions[i] for i in index]
        text, (low, high) = family().encode_text(captions), GUIDANCE_RANGE

        def batch_of(generator: torch.Generator, count: int) -> tuple:
            index = torch.randint(len(captions), (count,), generator=generator)
            scale = low + (high - low) * torch.rand(count, generator=generator)
            return latents[index], {name: part[index] for name, part in text.items()} | {"guidance": scale}

        return batch_of

    def config(self, change: dict[str, Any]) -> SCFMConfig:
        """One recipe for all, EMAs as short as the run, with a change."""
        steps = self.sizes.updates
        shortened = {"ema_decay_fast": shorten(0.99, steps), "ema_decay_slow": shorten(0.999, steps)}
        size = {"max_train_steps": steps, "global_batch_size": self.sizes.batch}
        return SCFMConfig(**{**TAUGHT_RECIPE, **shortened, **size, **change})

    def search(self, job: Job, teacher: Field) -> tuple[Walk, torch.Tensor]:
        """From noises with captions of the training: no image, none of the judge's captions."""
        walk = seeded_walk(read_prompts(PROMPTS)[: self.sizes.dial_noises], 2)
        return walk, walk(teacher, self.sizes.goal_steps)

    def judge(self, job: Job, kind: str = "held-out pairs") -> Callable[..., dict[str, float]]:
        """measure(field, steps) -> {"prompt_accuracy", "frechet", "endpoint", "spread"} on captions of a
        kind; spread: over that of the teacher's images from the same noises.
        """
        judge, noises = load_judges(self.sizes.captions, self.sizes.noises)[kind], self.sizes.noises
        judge.goal = self.goal(kind)
        teachers_spread = spread(judge.family.decode(judge.goal), noises)

        def measure(velocity: Field, steps: int) -> dict[str, float]:
            reached = judge.endpoints(velocity, steps, STOCK)
            images = judge.family.decode(reached)
            marks = judge.score(reached, images)
            return {
                **{name: marks[name] for name in ("prompt_accuracy", "frechet", "endpoint")},
                "spread": spread(images, noises) / teachers_spread,
            }

        return measure

    def goal(self, kind: str) -> torch.Tensor:
        """Latents that the teacher reaches in all its steps for a judge's captions."""
        judged, steps = (self.sizes.captions, self.sizes.noises), self.sizes.goal_steps
        spec = {
            "pipeline": pipeline_fingerprint(),
            "kind": kind,
            "asked": judged,
            "known": "left out",
            "steps": steps,
        }

        def make() -> torch.Tensor:
            return load_judges(*judged)[kind].endpoints(teacher_field(), steps, STOCK)

        return self.cache("few_flux_goal", spec, make)


@lru_cache(1)
def load_judges(captions: int, noises: int) -> dict[str, Judge]:
    """{kind: `Judge`} whose goals are not set yet. Their captions are none of those that students are trained
    on.
    """
    known = frozenset(read_prompts(PROMPTS))
    return {
        kind: Judge(family(), captions, progress=False, held_out=held_out, noises=noises, known=known)
        for kind, held_out in KINDS.items()
    }


def subset(size: int, seed: int, count: int) -> torch.Tensor:
    """Numbers of the images of a subset of `count`: the first ones of its own shuffle, so that the larger
    sizes hold the smaller. All of them for size 0.
    """
    return torch.randperm(count, generator=keyed_generator(seed, 0, Stream.SUBSET))[: size or None]


def spread(images: torch.Tensor, noises: int) -> float:
    """Root mean square deviation of the pixels of a caption's images, which stand together."""
    return images.unflatten(0, (-1, noises)).var(1).mean().sqrt().item()


def fused_field(rank: int, lora: Adapter) -> FieldAtScale:
    """The field of a LoRA at any scale, fused into the weights: a third faster than beside them."""
    transformer = load_flux().transformer
    add_adapters(transformer, family().lora_targets, rank)
    load_adapter_state(transformer, "ema_slow", lora)
    transformer.set_adapter("ema_slow")
    transformer.fuse_lora(adapter_names=["ema_slow"])

    def field_at(scale: float) -> Field:
        transformer.unfuse_lora()
        for layer in transformer.modules():
            if isinstance(layer, LoraLayer):
                layer.set_scale("ema_slow", scale)  # fuse_lora's own argument would multiply, time after time
        transformer.fuse_lora(adapter_names=["ema_slow"])
        return partial(family().velocity, transformer)

    return field_at
