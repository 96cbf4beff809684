"""Validation images during a run, and which of the three adapters is saved on top at its end."""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from scfm.data.animation import save_pictures
from scfm.files import atomic_write
from scfm.method.distill import STEP_SCALED
from scfm.method.lora_scale import LoraScales, choose_lora_scales, endpoint_curve
from scfm.models.loading import with_vae
from scfm.models.lora import save_lora
from scfm.models.lora_file import write_lora_scales
from scfm.models.sampling import euler_endpoints, start_noise
from scfm.models.scaled_lora import ScaledLoraModels
from scfm.streams import Stream, keyed_generator
from scfm.training.config import DistillConfig

if TYPE_CHECKING:
    from scfm.training.distill_trainer import DistillTrainer

VALIDATION_IMAGES, VALIDATION_VIDEOS = 8, 2
Curve: TypeAlias = dict[tuple[int, float], float]  # {(steps, LoRA scale): distance to the endpoints}


def eval_captions(trainer: "DistillTrainer", count: int) -> tuple[list[str], torch.Tensor]:
    """`count` of the run's own captions and noises for them, the same at every call."""
    captions, seed = trainer.dataset.captions, trainer.config.seed
    pick = torch.randint(len(captions), (count,), generator=keyed_generator(seed, 0, Stream.EVAL))
    return [captions[i] for i in pick], start_noise(trainer.family, range(count), seed + 1)


def endpoints(
    trainer: "DistillTrainer",
    name: str,
    captions: Sequence[str],
    noise: torch.Tensor,
    steps: int,
    scale: float = 1.0,
) -> torch.Tensor:
    """Latents that the model `name`, its LoRA at `scale`, reaches in `steps` Euler steps at
    config.inference_shift.

    captions: of the run, whose embeddings are read from its cache. noise: (n, *latent_shape) -> the same
    shape.
    """
    config = trainer.config
    return euler_endpoints(
        trainer.family,
        trainer.models.field(name, scale),
        captions,
        noise,
        steps,
        config.inference_shift,
        config.teacher_guidance_scale,
        # without a gradient: twice as many as training takes at once, so it fits where training did
        batch_size=2 * (config.micro_batch_size or config.global_batch_size),
    )


def scale_for(trainer: "DistillTrainer", steps: int) -> float:
    """The LoRA scale at which the student is looked at during a run."""
    config = trainer.config
    return config.step_scale.scale(steps) if config.algorithm == STEP_SCALED else 1.0


@torch.no_grad()
def validation_image(trainer: "DistillTrainer", count: int = VALIDATION_IMAGES) -> torch.Tensor | None:
    """(3, H, W), also written to validation/STEP.png: a row of the teacher's, then one of the student's per
    step count; of videos, fewer, a strip of each, in this order, and rows of moving ones in a GIF beside it.
    None in a process that only takes part in the forwards."""
    count = min(count, VALIDATION_VIDEOS) if getattr(trainer.family, "num_frames", 1) > 1 else count
    captions, noise = eval_captions(trainer, count)
    config = trainer.config
    if trainer.teacher_images is None:
        trainer.teacher_images = endpoints(trainer, "teacher", captions, noise, config.teacher_steps)
    rows = [
        trainer.teacher_images,
        *(
            endpoints(trainer, "student", captions, noise, n, scale_for(trainer, n))
            for n in config.eval_num_steps
        ),
    ]
    if not trainer.is_main:
        return None
    with with_vae(trainer.pipe, trainer.source):
        images = torch.cat([trainer.family.decode(row.to(trainer.pipe.device)).cpu().float() for row in rows])
    path = trainer.output_dir / "validation" / f"{trainer.global_step:06d}.png"
    return save_pictures(images, path, count, padding=1)


def scales_of(config: DistillConfig, curve: Callable[..., Curve]) -> tuple[LoraScales, Curve]:
    """(the scales of a model, the distances where they were measured). curve: (scales, steps) -> distances"""
    inside = config.guidance_mode == "distilled"
    guidance = config.teacher_guidance_scale if inside else 0.0
    if config.algorithm != STEP_SCALED:
        distances = curve(config.eval_lora_scales)
        return choose_lora_scales(distances, config.inference_shift)._replace(guidance=guidance), distances
    rule, steps = config.step_scale, tuple(sorted({*config.step_counts, *config.eval_num_steps}))
    scales = LoraScales(
        steps,
        tuple(rule.scale(n) for n in steps),
        config.inference_shift,
        exponent=rule.exponent,
        order=config.scale_order,
        lowest=0 if inside else 1,
        guidance=guidance,
    )
    distances: Curve = {}
    for n in config.eval_num_steps:
        distances |= curve((rule.scale(n),), (n,))
    return scales, distances


def save_model(trainer: "DistillTrainer", folder: Path, name: str) -> Path:
    """Writes one model's LoRA, or those of all powers of the scale, into a folder; returns the file of the
    first power."""
    models, pipeline_class = trainer.models, trainer.family.pipeline_class
    if isinstance(models, ScaledLoraModels):
        return models.save(pipeline_class, folder, name)
    return save_lora(pipeline_class, models.transformer, folder, name)


@torch.no_grad()
def select_and_save(trainer: "DistillTrainer") -> dict[str, Any] | None:
    """Saves all models with their scales, puts the one that lands nearest on top; returns the record, None in
    a process that only takes part in the forwards.

    Each is given, for each of config.eval_num_steps, the scale among config.eval_lora_scales at which its
    endpoints lie nearest to the teacher's own in config.teacher_steps, with step_scaled the one that its rule
    says; the smallest sum of log distances is saved on top, or the one that config.select_adapter names.
    """
    config = trainer.config
    captions, noise = eval_captions(trainer, config.num_eval_prompts)
    target = endpoints(trainer, "teacher", captions, noise, config.teacher_steps)

    def curve(name: str, scales: Sequence[float], steps: Sequence[int] = config.eval_num_steps) -> Curve:
        return endpoint_curve(
            lambda n, scale: endpoints(trainer, name, captions, noise, n, scale), target, steps, scales
        )

    distance = {"teacher": {str(n): round(d, 5) for (n, _), d in curve("teacher", (0.0,)).items()}}
    chosen: dict[str, LoraScales] = {}
    sums: dict[str, float] = {}
    for name in config.model_names:
        chosen[name], distances = scales_of(config, partial(curve, name))
        at_chosen = {n: distances[n, chosen[name].scale(n)] for n in config.eval_num_steps}
        distance[name] = {str(n): round(d, 5) for n, d in at_chosen.items()}
        sums[name] = sum(math.log(max(d, 1e-12)) for d in at_chosen.values())
    if not trainer.is_main:
        return None
    best = min(sums, key=sums.__getitem__) if config.select_adapter == "best" else config.select_adapter
    out = trainer.output_dir
    for name, folder in [*((name, out / name) for name in config.model_names), (best, out)]:
        path = save_model(trainer, folder, name)
        write_lora_scales(path, chosen[name])
    # what `scfm dial` wrote was of the file that has just been replaced
    (out / "lora_scales.json").unlink(missing_ok=True)
    record = {
        "train_steps": trainer.global_step,
        "selected": best,
        "captions": config.num_eval_prompts,
        "teacher_steps": config.teacher_steps,
        "shift": config.inference_shift,
        "guidance": config.teacher_guidance_scale,
        "guidance_mode": config.guidance_mode,
        "endpoint_distance": distance,
        "lora_scales": {
            name: {str(n): s for n, s in zip(c.steps, c.scales, strict=True)} for name, c in chosen.items()
        },
    }
    text = json.dumps(record, indent=1)
    atomic_write(out / "selection.json", lambda new: new.write_text(text, encoding="utf-8"))
    return record
