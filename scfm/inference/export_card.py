"""The README of an export, for people who use it in stock diffusers."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from scfm.inference.model_card import call_arguments, grid_and_output
from scfm.models.loading import DTYPES

if TYPE_CHECKING:
    from scfm.inference.export import ExportConfig

CARD = """# {title}

Exported by scfm from the step LoRA `{lora}` for {pipeline}: step LoRA at scale {scale:g}{style}, for {n}
step{s}.

```python
{code}
{grid}{output} = pipe(
    prompt,
    {arguments},
).{output}
```

The LoRA scale is right for {n} step{s} and cannot be changed any more; another number of steps wants another
export. {checked}
"""

FUSED = """import torch
from {module} import {kind}

# its scheduler has the shift {shift:g}
pipe = {kind}.from_pretrained("{folder}", torch_dtype=torch.{dtype})"""

MERGED = """from diffusers import FlowMatchEulerDiscreteScheduler

pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift={shift:g})
pipe.load_lora_weights("{folder}")"""

CHECKED = """Checked when it was written: pixels (0 to 1) differ from those of the separate parts by
{mean:.1e} in the mean and {largest:.1e} at most, where two captions' images differ by {two_captions:.1e}."""


COMFYUI = """# A step LoRA for {pipeline}, for ComfyUI

Exported by scfm from `{lora}`. Put {files} into ComfyUI's `models/loras`, and chain a LoraLoaderModelOnly
node for each of them. The strength is the step size: set it with the number of steps{but}.

| steps | {heads} |
|---|{rules}
{rows}

Sampler `euler`, scheduler `simple`, which takes even steps; time shift {shift:g} by the model's sampling
node; guidance {guidance:g}, as the LoRA was made for. A LoRA of a style is one more loader beside these.

The names are those of the checkpoints that ComfyUI loads, held to the converters by which diffusers reads the
same checkpoints; this file itself was not run in ComfyUI.
"""


def comfyui_card(config: "ExportConfig", strengths: Mapping[str, Mapping[str, float]]) -> str:
    """The README.md of an export for ComfyUI, as text. strengths: {number of steps: {file: strength}}"""
    names = list(next(iter(strengths.values())))
    rows = [[n, *(f"{of_steps[name]:g}" for name in names)] for n, of_steps in strengths.items()]
    return COMFYUI.format(
        pipeline=Path(config.pretrained_model_name_or_path).name,
        lora=Path(config.lora).resolve().name,
        files=", ".join(f"`{name}`" for name in names),
        but=", but for that of `step_0`, which holds the guidance" * any("step_0" in name for name in names),
        heads=" | ".join(f"strength of `{name}`" for name in names),
        rules="---|" * len(names),
        rows="\n".join(f"| {' | '.join(row)} |" for row in rows),
        shift=config.inference_shift,
        guidance=config.guidance_scale,
    )


def export_card(config: "ExportConfig", scale: float, gap: Mapping[str, float], pipeline_class: type) -> str:
    """The README.md of an export, as text.

    scale: of the step LoRA
    gap: what `scfm.inference.export.differences` says
    pipeline_class: a stock one is loaded by its common base, as diffusers finds it
    """
    outside = not pipeline_class.__module__.startswith("diffusers.")
    code = (MERGED if config.style_lora else FUSED).format(
        module=pipeline_class.__module__ if outside else "diffusers",
        kind=pipeline_class.__name__ if outside else "DiffusionPipeline",
        folder=Path(config.output_dir).name,
        shift=config.inference_shift,
        dtype=str(DTYPES[config.weight_dtype]).removeprefix("torch."),
    )
    style, title = "", "A pipeline with its step LoRA fused in"
    if config.style_lora:
        style = f" and `{Path(config.style_lora).name}` at {config.style_lora_scale:g}"
        title = "A step LoRA and a style LoRA in one file"
    return CARD.format(
        title=title,
        lora=Path(config.lora).resolve().name,
        pipeline=Path(config.pretrained_model_name_or_path).name,
        scale=scale,
        style=style,
        n=config.steps,
        s="s" * (config.steps > 1),
        code=code,
        arguments=call_arguments(config, config.steps),
        **grid_and_output(config, config.steps),
        checked=CHECKED.format(**gap),
    )
