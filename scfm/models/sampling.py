"""A family's walk from noise to latents, by any of its fields."""
import torch

from scfm.method.consistency import keyed_generator
from scfm.method.flow import sample, time_grid


def start_noise(family, indices, seed):
    """The noise (n, *latent_shape) from which the images of these numbers start: keyed by seed and number, on the CPU."""
    draw = lambda i: torch.randn(family.latent_shape, generator=keyed_generator(seed, i, stream=7))
    return torch.stack([draw(i) for i in indices])


def teacher_endpoints(family, velocity, captions, noise, steps, shift, guidance, batch=64):
    """Latents, shaped as `noise`, that a field of the family reaches from it in Euler steps, batch by batch, on the CPU."""
    device, ends = family.pipe.device, []
    for rows in torch.arange(len(captions)).split(batch):
        cond = on_device(family.encode_text([captions[i] for i in rows]), device)
        cond["guidance"] = torch.full((len(rows),), float(guidance), device=device)
        ends.append(sample(velocity, noise[rows].to(device), time_grid(steps, shift), cond).cpu())
    return torch.cat(ends)


def on_device(cond, device):
    return {k: v.to(device) for k, v in cond.items()}


def stock_shift(family):
    """The time shift that the family's stock pipeline uses at this size: its scheduler's, or what it works out of the size."""
    return family.pipe.scheduler.shift if family.dynamic_shift is None else family.dynamic_shift


def stock_latents(family, captions, noise, steps, guidance, scheduler, grid=True):
    """Latents, shaped as `noise` (n, ...), that the family's stock pipeline reaches from it under a scheduler.

    guidance: the guidance scale. grid: hand the plain sigmas 1 ... 1/steps over; without it, the scheduler chooses.
    """
    pipe, kept = family.pipe, family.pipe.scheduler
    extra = {"sigmas": [1 - i / steps for i in range(steps)]} if grid else {}
    if getattr(family, "negative_prompt", ""):
        extra["negative_prompt"] = [family.negative_prompt] * len(captions)
    pipe.scheduler = scheduler
    try:
        return pipe(list(captions), height=family.height, width=family.width, num_inference_steps=steps, guidance_scale=guidance,
                    latents=noise.to(pipe.device, pipe.dtype), max_sequence_length=family.max_sequence_length, output_type="latent",
                    **extra).images
    finally:
        pipe.scheduler = kept
