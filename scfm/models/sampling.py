"""A family's path from noise to latents: by any of its fields, or by its stock pipeline."""

from collections.abc import Sequence
from typing import Any

import torch

from scfm.method.flow import sample, time_grid
from scfm.models.base import PipelineFamily, scheduler_shift
from scfm.streams import Stream, keyed_generator
from scfm.types import Family, VelocityField


def start_noise(family: Family, indices: Sequence[int], seed: int) -> torch.Tensor:
    """The noise (n, *latent_shape) from which the images of these numbers start: keyed by seed and number, on
    the CPU."""
    return torch.stack(
        [
            torch.randn(family.latent_shape, generator=keyed_generator(seed, i, Stream.START_NOISE))
            for i in indices
        ]
    )


def euler_endpoints(
    family: Family,
    velocity: VelocityField,
    captions: Sequence[str],
    noise: torch.Tensor,
    steps: int,
    shift: float,
    guidance: float,
    batch_size: int = 64,
) -> torch.Tensor:
    """Latents, shaped as `noise` (n, *latent_shape), that a field of the family reaches from it in Euler
    steps, on the CPU.

    captions: n of them. shift: of the time grid. guidance: the guidance scale. batch_size: images of one
    forward; fewer videos.
    """
    device, endpoints = family.pipe.device, []
    for rows in torch.arange(len(captions)).split(together(family, batch_size)):
        cond = on_device(family.encode_text([captions[int(i)] for i in rows]), device)
        cond["guidance"] = torch.full((len(rows),), float(guidance), device=device)
        endpoints.append(sample(velocity, noise[rows].to(device), time_grid(steps, shift), cond).cpu())
    return torch.cat(endpoints)


def image_shape(family: Family) -> tuple[int, ...]:
    """Of one image, (3, height, width), or of a video of several frames, (F, 3, height, width)."""
    frames = getattr(family, "num_frames", 1)
    return (*([frames] if frames > 1 else []), 3, family.height, family.width)


def together(family: Family, count: int) -> int:
    """How many examples to take at once where `count` images would do: of videos fewer, as each has as many
    images' latents as it has frames of them."""
    return max(1, count // getattr(family, "latent_frames", 1))


def on_device(cond: dict[str, torch.Tensor], device: str | torch.device) -> dict[str, torch.Tensor]:
    """The same condition on a device."""
    return {name: tensor.to(device) for name, tensor in cond.items()}


def stock_shift(family: Family) -> float:
    """The time shift that the family's stock pipeline uses at this size: its scheduler's, or what it works
    out of the size."""
    return scheduler_shift(family.pipe.scheduler) if family.dynamic_shift is None else family.dynamic_shift


def stock_latents(
    family: Family,
    captions: Sequence[str],
    noise: torch.Tensor,
    steps: int,
    guidance: float,
    scheduler: Any,
    grid: bool = True,
) -> torch.Tensor:
    """Latents, shaped as `noise` (n, ...), that the family's stock pipeline reaches from it under a
    scheduler.

    guidance: the guidance scale. grid: hand the plain sigmas 1 ... 1/steps over; without it, the scheduler
    chooses.
    """
    pipe, own_scheduler, bound = family.pipe, family.pipe.scheduler, as_pipeline_family(family)
    pipe.scheduler = scheduler
    try:
        return bound.latents_from_stock(bound.call_stock(captions, noise, steps, guidance, grid, "latent"))
    finally:
        pipe.scheduler = own_scheduler


def as_pipeline_family(family: Family) -> PipelineFamily:
    """The family itself, or a base class's for one that has its own base: called as most pipelines are."""
    if isinstance(family, PipelineFamily):
        return family
    base = PipelineFamily.__new__(PipelineFamily)  # its size has been checked by the family
    base.pipe, base.height, base.width = family.pipe, family.height, family.width
    base.max_sequence_length = family.max_sequence_length
    base.negative_prompt = getattr(family, "negative_prompt", "")
    return base
