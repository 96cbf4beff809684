"""Solvers that cost nothing to try on the teacher, each counted in network evaluations."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler

from scfm.method.flow import EVALUATIONS, sample, time_grid
from scfm.models.sampling import on_device
from scfm.types import Condition, Family, VelocityField


def conditioned_field(family: Family, captions: Sequence[str], guidance: float) -> VelocityField:
    """A field of the family's transformer that knows its captions; the condition it is given is ignored."""
    device, transformer = family.pipe.device, family.pipe.transformer
    cond = on_device(family.encode_text(list(captions)), device)
    cond["guidance"] = torch.full((len(captions),), float(guidance), device=device)

    def field(x: torch.Tensor, t: torch.Tensor, _: Condition = None) -> torch.Tensor:
        return family.velocity(transformer, x, t, cond)

    return field


@torch.no_grad()
def second_order(
    family: Family,
    captions: Sequence[str],
    noise: torch.Tensor,
    evaluations: int,
    guidance: float,
    shift: float,
    solver: str,
) -> torch.Tensor:
    """Latents that Heun's method or the midpoint method reaches in exactly so many evaluations.

    An odd number ends with an Euler step, as in diffusers' `FlowMatchHeunDiscreteScheduler`. ValueError below
    2 evaluations.
    """
    if evaluations < 2:
        raise ValueError(f"{solver} needs 2 evaluations, not {evaluations}")
    field, x = conditioned_field(family, captions, guidance), noise.to(family.pipe.device)
    times = time_grid(-(-evaluations // EVALUATIONS[solver]), shift)
    if evaluations % 2:
        return sample(field, sample(field, x, times[:-1], solver=solver), times[-2:])
    return sample(field, x, times, solver=solver)


@torch.no_grad()
def dpm_solver_pp(
    family: Family,
    captions: Sequence[str],
    noise: torch.Tensor,
    steps: int,
    guidance: float,
    shift: float,
) -> torch.Tensor:
    """Latents that DPM-Solver++(2M), diffusers' own with flow sigmas, reaches in a loop of ours.

    The Flux pipeline would choose the shift itself, and a stock pipeline hands the network times rounded down
    to thousandths.
    """
    solver: Any = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
    )
    solver.set_timesteps(steps)
    field, x = conditioned_field(family, captions, guidance), noise.to(family.pipe.device)
    for t, sigma in zip(solver.timesteps, solver.sigmas[:-1], strict=True):  # the last sigma is 0
        x = solver.step(field(x, sigma.to(x).expand(len(x))), t, x).prev_sample
    return x
