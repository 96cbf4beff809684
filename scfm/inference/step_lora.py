"""A pipeline with a step LoRA whose scale can be set, and what it generates."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from scfm.data.animation import save_pictures
from scfm.inference.adapters import load_adapter, require_fit
from scfm.inference.config import InferenceConfig
from scfm.method.flow import time_grid
from scfm.method.lora_scale import LoraScales
from scfm.method.scale_schedule import per_step_field
from scfm.models.loading import DTYPES, load_pipeline
from scfm.models.lora_file import read_lora_scales
from scfm.models.sampling import euler_endpoints, start_noise, together
from scfm.models.scaled_lora import names_of, power_file
from scfm.models.source import PipelineSource
from scfm.models.video import frame_options
from scfm.types import Condition, VelocityField

Scales: TypeAlias = tuple[float, ...]
log = logging.getLogger(__name__)


class StepLora:
    """A pipeline with a step LoRA at a scale that can be set: 0 is the teacher, 1 the LoRA as it was trained.

    config: resolved here if it is not.
    source: where the pipeline comes from, if that has been looked up; else config says it
    Attributes: `config`; `path`, the LoRA's file; `files`, {adapter: file}, as of `lora_files`;
    `lora_scales`, those in the header, or None; `source`;
    `family`; `pipe`, whose scheduler has config.inference_shift at every size; `stock_scheduler`, the one
    that the pipeline came with.
    """

    def __init__(
        self,
        config: InferenceConfig,
        device: str | torch.device | None = None,
        source: PipelineSource | None = None,
    ) -> None:
        self.config = config = config.resolved()
        config.check()
        if config.guidance_inside and config.guidance_scale > 1:
            log.warning(
                "guidance scale %g: this LoRA holds the guidance, which is now there twice; leave "
                "--guidance_scale out",
                config.guidance_scale,
            )
        self.path = config.weights
        self.source = source or PipelineSource(config.pretrained_model_name_or_path)
        bind_family(self.source, config, self.source.skeleton)  # refuses before anything is loaded
        self.lora_scales = read_lora_scales(self.path)
        self.files = lora_files(self.path, self.lora_scales)
        for path in self.files.values():
            require_fit(path, self.source.empty_transformer(), config.pretrained_model_name_or_path)
        dtype = DTYPES[config.weight_dtype]
        self.pipe, _ = load_pipeline(self.source, dtype, device or default_device(), quantize=config.quantize)
        self.family = bind_family(self.source, config, self.pipe)
        self.stock_scheduler = self.pipe.scheduler
        self.pipe.scheduler = fixed_shift(config.inference_shift)
        for name, path in sorted(self.files.items()):  # "step" first, as in the card
            load_adapter(self.pipe, path, name)
        self.targets: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def scales_for(self, steps: int) -> Scales:
        """The LoRA scale of each of so many steps: what the file's header says, 1 where it says nothing."""
        return self.lora_scales.per_step(steps) if self.lora_scales else (1.0,) * steps

    def set_scale(self, scale: float) -> None:
        """Sets the LoRA scale of the pipeline."""
        self.pipe.set_adapters(list(self.files), list(self.adapter_scales(scale).values()))

    def adapter_scales(self, scale: float) -> dict[str, float]:
        """{adapter: its own scale} at a LoRA scale s, as of `LoraScales.strengths`: the second has s ** 2,
        one that holds the guidance 1; at 0, the teacher, none counts."""
        strengths = self.lora_scales.strengths(scale) if self.lora_scales else (float(scale),)
        return dict(zip(self.files, strengths, strict=True))

    def field(self, x: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        """The velocity at the LoRA scale that is set."""
        return self.family.velocity(self.pipe.transformer, x, t, cond)

    def at_scale(self, scale: float) -> VelocityField:
        """The field at a LoRA scale of its own, which it sets whenever it is called."""

        def field(x: torch.Tensor, t: torch.Tensor, cond: Condition = None) -> torch.Tensor:
            self.set_scale(scale)
            return self.field(x, t, cond)

        return field

    def endpoints(
        self, captions: Sequence[str], noise: torch.Tensor, steps: int, scale: float | Scales
    ) -> torch.Tensor:
        """Latents, shaped as `noise`, that are reached from it in Euler steps.

        scale: a LoRA scale, or one for each step; 0 is the teacher, at its own guidance scale
        """
        config = self.config
        guidance = config.teacher_guidance_scale if scale == 0 else config.guidance_scale
        if isinstance(scale, tuple):
            field = per_step_field(self.at_scale, time_grid(steps, config.inference_shift), scale)
        else:
            field = self.at_scale(scale)
        return euler_endpoints(self.family, field, captions, noise, steps, config.inference_shift, guidance)

    def target_endpoints(
        self, captions: Sequence[str], steps: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(noise, endpoints): a noise for each caption, and what the teacher reaches from it.

        They are remembered, for with a large model they take minutes.
        """
        key = tuple(captions), steps, seed
        if key not in self.targets:
            noise = start_noise(self.family, range(len(captions)), seed)
            self.targets[key] = noise, self.endpoints(captions, noise, steps, 0)
        return self.targets[key]

    @contextmanager
    def scale_schedule(self, scales: Sequence[float]) -> Iterator[None]:
        """Within the block the pipeline takes its k-th step with the LoRA at scales[k], and after the last it
        starts anew."""
        scheduler, order = self.pipe.scheduler, itertools.cycle(scales)
        step = scheduler.step

        def step_and_set_scale(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            self.set_scale(next(order))
            return output

        self.set_scale(next(order))
        scheduler.step = step_and_set_scale
        try:
            yield
        finally:
            del scheduler.step  # the class's own is visible again


def lora_files(path: Path, lora_scales: LoraScales | None) -> dict[str, Path]:
    """{adapter: file} of a step LoRA: "step", and beside it "step_2" for a pair, "step_0" for the guidance.
    FileNotFoundError where one is missing."""
    powers = lora_scales.powers if lora_scales else (1,)
    files = {name: power_file(path, k) for name, k in zip(names_of("step", powers), powers, strict=True)}
    for file in files.values():
        if not file.is_file():
            raise FileNotFoundError(
                f"{path} is one LoRA of {len(files)} that belong together, and {file.name} is not beside it"
            )
    return files


def bind_family(source: PipelineSource, config: InferenceConfig, pipe: Any) -> Any:
    """The family of a source's pipeline at the size of a config.

    pipe: the pipeline, or the source's skeleton, to refuse before anything is loaded
    ValueError for a size, a number of tokens or of frames, or a negative prompt that the model cannot take.
    """
    family_class: Any = source.family
    more: dict[str, Any] = {"negative_prompt": config.negative_prompt} if config.negative_prompt else {}
    if more and not family_class.uses_cfg:
        raise ValueError(
            f"a negative prompt means nothing to {family_class.__name__}: its guidance is an input of the "
            "network"
        )
    more |= frame_options(family_class, config.num_frames)
    return family_class(pipe, config.height, config.width, config.max_sequence_length, **more)


def fixed_shift(shift: float) -> FlowMatchEulerDiscreteScheduler:
    """The plain Euler flow-matching scheduler with this time shift at every size: the grid that the student
    was made for.

    FLUX.1-dev's own would choose a shift by the size of the image; others of that class bend the grid in
    further ways (Karras,
    exponential or beta sigmas, a terminal shift) or add noise. Nothing of the pipeline's scheduler is taken
    over.
    """
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def default_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def generate(
    step_lora: StepLora,
    prompts: Sequence[str],
    steps: int,
    scale: float | Scales | None = None,
    batch_size: int = 8,
) -> tuple[torch.Tensor, Scales]:
    """(images (n, 3, H, W), or videos (n, F, 3, H, W), in [-1, 1], the LoRA scale of each step) of the stock
    pipeline.

    scale: of the LoRA, or one for each step; None: what the file's header says, or 1 where it says nothing;
        0: the teacher, at its own guidance scale
    batch_size: images generated together, or videos, of which fewer are; each has the noise of its number,
    whatever its company.
    ValueError for steps below 1 or another number of scales.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: give 1 or more")
    if scale is None:
        scales = step_lora.scales_for(steps)
    else:
        scales = scale if isinstance(scale, tuple) else (float(scale),) * steps
    if len(scales) != steps:
        raise ValueError(f"{len(scales)} LoRA scales for {steps} steps: give one, or one for each step")
    family, pipe, config = step_lora.family, step_lora.pipe, step_lora.config
    guidance = config.guidance_scale if any(scales) else config.teacher_guidance_scale
    noise = start_noise(family, range(len(prompts)), config.seed).to(pipe.device, pipe.dtype)
    parts, batch_size = [], together(family, batch_size)
    for some in range(0, len(prompts), batch_size):
        part = slice(some, some + batch_size)
        with step_lora.scale_schedule(scales):
            images = family.sample_stock(prompts[part], noise[part], steps, guidance)
        parts.append(images.cpu())
    return torch.cat(parts), scales


def format_scales(scales: Sequence[float]) -> str:
    """LoRA scales as people read them: one number where all are the same."""
    return ", ".join(f"{scale:.3g}" for scale in (scales[:1] if len(set(scales)) == 1 else scales))


def describe_origin(lora_scales: LoraScales | None, steps: int) -> str:
    """Where the LoRA scale of so many steps comes from, in words."""
    if lora_scales is None:
        return "the LoRA's file has none: scfm dial finds it"
    if any(len(scales) == steps for scales in lora_scales.schedules):
        return "from the LoRA's file, a scale for each step"
    if lora_scales.exponent:
        first, last = lora_scales.steps[0], lora_scales.steps[-1]
        beyond = "" if first <= steps <= last else f", trained for {first} to {last} steps"
        return f"{steps} ** -{lora_scales.exponent:g}, the rule in the LoRA's file{beyond}"
    if steps in lora_scales.steps:
        return "from the LoRA's file"
    below = max((n for n in lora_scales.steps if n < steps), default=None)
    above = min((n for n in lora_scales.steps if n > steps), default=None)
    if below and above:
        return f"between those for {below} and {above} steps in the LoRA's file"
    return f"that for {below or above} steps, the nearest in the LoRA's file"


def save_images(images: torch.Tensor, path: str | Path) -> None:
    """Writes one image, or a grid of several, (n, 3, H, W) in [-1, 1], as a PNG file; of videos (n, F, 3, H,
    W) a strip, and a GIF beside it."""
    save_pictures(images, path)
