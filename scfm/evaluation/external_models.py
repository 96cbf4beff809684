"""Samplers of other people's weights: a LoRA for the same base, or a whole pipeline."""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from scfm.data.fingerprint import fingerprint
from scfm.evaluation.samplers import InContext, Sampler, lora_digest
from scfm.inference.adapters import load_adapter, lora_file
from scfm.inference.config import InferenceConfig
from scfm.inference.step_lora import StepLora, fixed_shift
from scfm.models.base import PipelineFamily, plain_grid
from scfm.models.loading import DTYPES, no_loading_bars
from scfm.models.lora_file import require_alone
from scfm.models.sampling import as_pipeline_family, start_noise, stock_latents
from scfm.models.source import INDEX, PipelineSource
from scfm.types import Family


@dataclass(frozen=True)
class ExternalModel:
    """Another few-step model.

    path: a LoRA file for the same base, or the folder of a whole pipeline
    lora_scale: of a LoRA
    steps: step counts; empty: those of the evaluation
    guidance_scale: None: the teacher's for a LoRA, the pipeline's own default for a pipeline
    inference_shift: None: the scheduler that the pipeline came with, and its grid
    """

    name: str
    path: Path
    lora_scale: float = 1.0
    steps: tuple[int, ...] = ()
    guidance_scale: float | None = None
    inference_shift: float | None = None

    @property
    def is_pipeline(self) -> bool:
        """Whether it is a pipeline rather than a LoRA."""
        return (self.path / INDEX).is_file()


def step_counts(text: str) -> tuple[int, ...]:
    """(4, 8) of "4+8"."""
    return tuple(int(n) for n in text.split("+"))


OPTIONS: dict[str, Callable[[str], Any]] = {
    "lora_scale": float,
    "steps": step_counts,
    "guidance_scale": float,
    "inference_shift": float,
}
OWN_NAMES = ("teacher", "student", "step")  # "step": the adapter of the LoRA that is judged


def parse_external_model(text: str) -> ExternalModel:
    """An `ExternalModel` of "NAME=PATH,lora_scale=.125,steps=4+8,guidance_scale=3.5,inference_shift=3".

    ValueError or FileNotFoundError names the mistake.
    """
    head, *rest = text.split(",")
    name, _, path = head.partition("=")
    if not path or not re.fullmatch(r"[A-Za-z0-9_]+", name) or name in OWN_NAMES:
        raise ValueError(
            f"--external_model {text}: say NAME=PATH, NAME of letters, digits and _, "
            f"none of {', '.join(OWN_NAMES)}"
        )
    options = parse_options(rest, f"--external_model {name}")
    model = ExternalModel(name, Path(path).expanduser(), **options)
    if not model.is_pipeline:
        path = lora_file(model.path)
        require_alone(path)
        return replace(model, path=path)
    if "lora_scale" in options:
        raise ValueError(f"--external_model {name}: a pipeline has no lora_scale")
    PipelineSource(model.path).check_files()
    return model


def parse_options(words: Sequence[str], where: str) -> dict[str, Any]:
    """{"steps": (4, 8), ...} of ["steps=4+8", ...]. ValueError names the wrong one."""
    options: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in OPTIONS:
            raise ValueError(f"{where}: no option {key!r}; there are {', '.join(OPTIONS)}")
        try:
            options[key] = OPTIONS[key](value)
        except ValueError:
            raise ValueError(
                f"{where}: {key} is {value!r}: give numbers, several step counts as 4+8"
            ) from None
    if min(options.get("steps", (1,))) < 1 or not options.get("inference_shift", 1) > 0:
        raise ValueError(f"{where}: steps are 1 or more, an inference_shift is above 0")
    return options


@contextmanager
def adapter_alone(pipe: Any, name: str, scale: float) -> Iterator[None]:
    """The pipeline with one of its adapters active, at a scale. It stays so: whoever is next sets its own."""
    pipe.set_adapters([name], [scale])
    yield


def lora_samplers(step_lora: StepLora, model: ExternalModel, steps: Sequence[int]) -> Iterator[Sampler]:
    """The samplers of an external LoRA, which joins the pipeline of `step_lora` as one more adapter, active
    only when it generates.

    Without a shift it runs under the scheduler that the pipeline came with, as its makers mean it.
    """
    pipe, scheduler, shift = step_lora.pipe, step_lora.stock_scheduler, model.inference_shift
    load_adapter(pipe, model.path, model.name)
    guidance = model.guidance_scale
    if guidance is None:
        guidance = step_lora.config.teacher_guidance_scale
    if shift:
        scheduler = fixed_shift(shift)
    settings = {
        "lora_scale": model.lora_scale,
        "guidance_scale": guidance,
        "shift": shift,
        "lora": lora_digest(model.path),
    }
    context = partial(adapter_alone, pipe, model.name, model.lora_scale)
    for n in model.steps or steps:
        latents = partial(
            stock_latents,
            step_lora.family,
            steps=n,
            guidance=guidance,
            scheduler=scheduler,
            grid=bool(shift),
        )
        yield Sampler(
            f"{model.name}-{n}",
            "external",
            f"{model.name}, LoRA scale {model.lora_scale:g}",
            n,
            {"steps": n, **settings},
            pipe.transformer,
            InContext(context, latents),
        )


@dataclass(frozen=True)
class PipelineImages:
    """Images of a whole pipeline, called as its makers mean it: its own scheduler and grid, unless a shift is
    given.

    family: of the teacher, whose noise it starts from where it is of the same class; None: from seeds of its
    own
    """

    pipe: Any
    model: ExternalModel
    config: InferenceConfig
    steps: int
    family: Family | None

    def __call__(self, captions: Sequence[str], numbers: Sequence[int]) -> torch.Tensor:
        grid = bool(self.model.inference_shift)
        if self.family is not None:
            noise, guidance = start_noise(self.family, numbers, self.config.seed), self.model.guidance_scale
            other = copy.copy(as_pipeline_family(self.family))
            other.pipe, other.negative_prompt = self.pipe, ""
            return other.call_stock(captions, noise, self.steps, guidance, grid) * 2 - 1
        config, scale = self.config, self.model.guidance_scale
        is_video = "num_frames" in signature(type(self.pipe).__call__).parameters
        seeds = [config.seed * 1_000_003 + number for number in numbers]
        with plain_grid(self.pipe, self.steps) if grid else nullcontext({}) as sigmas:
            output = self.pipe(
                prompt=list(captions),
                height=config.height,
                width=config.width,
                num_inference_steps=self.steps,
                output_type="pt",
                generator=[torch.Generator().manual_seed(s) for s in seeds],
                **({"num_frames": config.num_frames} if is_video else {}),
                **({} if scale is None else PipelineFamily.guidance_of_batch(scale, len(captions))),
                **sigmas,
            )
        if not is_video:
            return output.images * 2 - 1
        return (output.frames[:, 0] if config.num_frames == 1 else output.frames) * 2 - 1


def pipeline_samplers(
    step_lora: StepLora, model: ExternalModel, steps: Sequence[int], device: str | torch.device
) -> Iterator[Sampler]:
    """The samplers of a whole pipeline, loaded onto a device.

    step_lora: says size, dtype and seed, and what the noise is
    """
    config, source = step_lora.config, PipelineSource(model.path)
    with no_loading_bars():
        pipe: Any = DiffusionPipeline.from_pretrained(
            str(source.folder), dtype=DTYPES[config.weight_dtype], variant=source.variant or None
        ).to(device)
    pipe.set_progress_bar_config(disable=True)
    if model.inference_shift:
        pipe.scheduler = fixed_shift(model.inference_shift)
    family = step_lora.family if source.class_name == step_lora.source.class_name else None
    network = getattr(pipe, "transformer", None) or pipe.unet
    settings = {
        "guidance_scale": model.guidance_scale,
        "shift": model.inference_shift,
        "folder": model.path.name,
        "weights": fingerprint(source, *source.parts)[:16],
        "pipeline": source.class_name,
    }
    for n in model.steps or steps:
        yield Sampler(
            f"{model.name}-{n}",
            "external",
            f"{model.name}, a pipeline",
            n,
            {"steps": n, **settings},
            network,
            images=PipelineImages(pipe, model, config, n, family),
        )
