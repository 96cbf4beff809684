"""The samplers that need nobody else's weights: the student, its teacher, and what costs nothing to try on
the teacher."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import safe_open

from scfm.evaluation.solvers import dpm_solver_pp, second_order
from scfm.inference.step_lora import StepLora, format_scales
from scfm.models.sampling import stock_latents

Latents: TypeAlias = Callable[[Sequence[str], torch.Tensor], torch.Tensor]
"""(captions, noise (n, ...)) -> latents (n, ...)."""
Images: TypeAlias = Callable[[Sequence[str], Sequence[int]], torch.Tensor]
"""(captions, their numbers) -> images (n, 3, H, W) in [-1, 1]."""


class Sampler(NamedTuple):
    """One row of an evaluation.

    name: of its folder
    kind: teacher, student, solver or external
    label: for people
    steps: number of them
    settings: all that its images depend on, for JSON
    network: the module whose calls are the evaluations
    latents: from noise; or, where it is None,
    images: from the captions' numbers
    """

    name: str
    kind: str
    label: str
    steps: int
    settings: dict[str, Any]
    network: torch.nn.Module
    latents: Latents | None = None
    images: Images | None = None


@dataclass(frozen=True)
class InContext:
    """`latents` while a context lasts, such as the LoRA being off, or at a scale."""

    context: Callable[[], AbstractContextManager[None]]
    latents: Latents

    def __call__(self, captions: Sequence[str], noise: torch.Tensor) -> torch.Tensor:
        with self.context():
            return self.latents(captions, noise)


@contextmanager
def lora_disabled(pipe: Any) -> Iterator[None]:
    """The pipeline without its LoRAs, within the block."""
    pipe.disable_lora()
    try:
        yield
    finally:
        pipe.enable_lora()


class ReferenceSamplers:
    """Makes the samplers of a `StepLora`. The teacher is the pipeline without the LoRA, at its own guidance
    scale."""

    def __init__(self, step_lora: StepLora) -> None:
        self.step_lora, config = step_lora, step_lora.config
        self.family, self.pipe = step_lora.family, step_lora.pipe
        self.guidance, self.shift = config.teacher_guidance_scale, config.inference_shift
        self.scheduler = self.pipe.scheduler

    def teacher(self, name: str, label: str, steps: int, latents: Latents, **settings: Any) -> Sampler:
        """A sampler of the teacher, by its function from noise to latents."""
        settings = {"steps": steps, "guidance_scale": self.guidance, **settings}
        latents = InContext(partial(lora_disabled, self.pipe), latents)
        kind, label = "solver", f"teacher, {label}"
        return Sampler(f"{name}-{steps}", kind, label, steps, settings, self.pipe.transformer, latents)

    def euler(self, steps: int) -> Sampler:
        """The teacher in Euler steps, by its stock pipeline."""
        latents = partial(
            stock_latents, self.family, steps=steps, guidance=self.guidance, scheduler=self.scheduler
        )
        return self.teacher("teacher", "Euler", steps, latents, solver="Euler", shift=self.shift)

    def second_order(self, solver: str, evaluations: int) -> Sampler:
        """The teacher by Heun's or the midpoint method."""
        latents = partial(
            second_order,
            self.family,
            evaluations=evaluations,
            guidance=self.guidance,
            shift=self.shift,
            solver=solver,
        )
        name, label = f"teacher-{solver}", solver.capitalize()
        return self.teacher(name, label, evaluations, latents, solver=solver, shift=self.shift)

    def dpm(self, steps: int) -> Sampler:
        """The teacher by DPM-Solver++(2M)."""
        latents = partial(dpm_solver_pp, self.family, steps=steps, guidance=self.guidance, shift=self.shift)
        return self.teacher("teacher-dpm", "DPM++ 2M", steps, latents, solver="DPM++ 2M", shift=self.shift)

    def stock(self, steps: int) -> Sampler:
        """The teacher by its stock pipeline, left alone: scheduler, shift and grid as it came."""
        latents = partial(
            stock_latents,
            self.family,
            steps=steps,
            guidance=self.guidance,
            scheduler=self.step_lora.stock_scheduler,
            grid=False,
        )
        return self.teacher("teacher-stock", "stock grid", steps, latents, solver="stock")

    def student(self, steps: int) -> Sampler:
        """The LoRA at the scale that its file says for so many steps."""
        scales, config = self.step_lora.scales_for(steps), self.step_lora.config
        latents = partial(
            stock_latents, self.family, steps=steps, guidance=config.guidance_scale, scheduler=self.scheduler
        )
        settings = {
            "steps": steps,
            "shift": self.shift,
            "guidance_scale": config.guidance_scale,
            "lora_scale": scales[0] if len(set(scales)) == 1 else list(scales),
            "lora": " ".join(lora_digest(path) for path in self.step_lora.files.values()),
        }
        return Sampler(
            f"student-{steps}",
            "student",
            f"student, LoRA scale {format_scales(scales)}",
            steps,
            settings,
            self.pipe.transformer,
            InContext(partial(self.step_lora.scale_schedule, scales), latents),
        )


def reference_samplers(step_lora: StepLora, steps: Sequence[int], teacher_steps: int) -> Iterator[Sampler]:
    """The teacher at its steps, then for each step count: the student, and what costs nothing to try on the
    teacher."""
    make = ReferenceSamplers(step_lora)
    yield make.euler(teacher_steps)._replace(kind="teacher")
    for n in steps:
        yield make.student(n)
        if n != teacher_steps:
            yield make.euler(n)
        if n > 1:
            yield make.second_order("heun", n)
            if n % 2 == 0:
                yield make.second_order("midpoint", n)
        yield make.dpm(n)
        yield make.stock(n)


def lora_digest(path: str | Path) -> str:
    """What a LoRA file is known by: a digest of its tensors, not of the header with the LoRA scales."""
    digest = hashlib.sha256()
    with safe_open(str(path), framework="pt") as opened:
        for key in sorted(opened.keys()):
            tensor = opened.get_tensor(key)
            digest.update(f"{key} {tuple(tensor.shape)} ".encode() + tensor.float().numpy().tobytes())
    return digest.hexdigest()[:16]
