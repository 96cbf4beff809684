"""A family's path from noise to latents: by any of its fields, or by its stock pipeline."""

from collections.abc import Sequence
from typing import Any

import torch

from scfm.method.flow import sample, time_grid
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

    captions: n of them. shift: of the time grid. guidance: the guidance scale. batch_size: examples of one
    forward.
    """
    device, endpoints = family.pipe.device, []
    for rows in torch.arange(len(captions)).split(batch_size):
        cond = on_device(family.encode_text([captions[int(i)] for i in rows]), device)
        cond["guidance"] = torch.full((len(rows),), float(guidance), device=device)
        endpoints.append(sample(velocity, noise[rows].to(device), time_grid(steps, shift), cond).cpu())
    return torch.cat(endpoints)


def on_device(cond: dict[str, torch.Tensor], device: str | torch.device) -> dict[str, torch.Tensor]:
    """The same condition on a device."""
    return {name: tensor.to(device) for name, tensor in cond.items()}


def stock_shift(family: Family) -> float:
    """The time shift that the family's stock pipeline uses at this size: its scheduler's, or what it works
    out of the size."""
    return family.pipe.scheduler.shift if family.dynamic_shift is None else family.dynamic_shift


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
    pipe, own_scheduler = family.pipe, family.pipe.scheduler
    extra: dict[str, Any] = {"sigmas": [1 - i / steps for i in range(steps)]} if grid else {}
    # families whose guidance is an input have none
    negative_prompt = getattr(family, "negative_prompt", "")
    if negative_prompt:
        extra["negative_prompt"] = [negative_prompt] * len(captions)
    pipe.scheduler = scheduler
    try:
        return pipe(
            list(captions),
            height=family.height,
            width=family.width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=noise.to(pipe.device, pipe.dtype),
            max_sequence_length=family.max_sequence_length,
            output_type="latent",
            **extra,
        ).images
    finally:
        pipe.scheduler = own_scheduler
