"""A pipeline with the step LoRA fused in, or one LoRA file of step and style."""
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer

from scfm.files import atomic_write
from scfm.inference.step_lora import InferenceConfig, StepLora, load_adapter, lora_file
from scfm.method.distill import setting
from scfm.models.loading import DTYPES, no_loading_bars
from scfm.models.lora import WEIGHT_NAME
from scfm.models.sampling import start_noise, stock_latents


@dataclass
class ExportConfig(InferenceConfig):
    """What `scfm export` needs to know, beside what every use of a LoRA needs."""
    output_dir: str = setting("", "folder to write; it must be new or empty")
    steps: int = setting(4, "number of steps that the export is for: the dial says the strength")
    lora_scale: float = setting(-1.0, "strength of the step LoRA instead; below 0: that of the dial, or 1 where there is none")
    style_lora: str = setting("", "file or folder of a style LoRA: the result is one LoRA file of both; empty: a pipeline with the "
                       "step LoRA fused in")
    style_lora_scale: float = setting(1.0, "strength of the style LoRA")
    tolerance: float = setting(0.0, "largest mean difference of pixels (0 to 1) from the unfused pipeline; 0: 1e-3, in bf16 0.03")

    def check(self):
        """As `InferenceConfig.check`, and what can be known of a mistake before anything is loaded."""
        super().check()
        if not self.output_dir:
            raise ValueError("no place to write: say --output_dir FOLDER")
        if Path(self.output_dir).exists() and (not Path(self.output_dir).is_dir() or any(Path(self.output_dir).iterdir())):
            raise ValueError(f"{self.output_dir} is there already and not empty: take another --output_dir")
        if self.steps < 1:
            raise ValueError(f"--steps is {self.steps}: give 1 or more")
        if self.style_lora:
            lora_file(self.style_lora)
        self.tolerance = self.tolerance or {"fp32": 1e-3, "bf16": .03}[self.weight_dtype]


CAPTIONS = ("a photo of a cat", "a red star at the top")         # what both sides generate; any words will do, where any are known


def captions_for(family):
    """Two captions that the family can read."""
    return getattr(family, "captions", CAPTIONS)


@torch.no_grad()
def check_images(family, config, adapters=None):
    """(2, 3, H, W) in [0, 1]: what the family's stock pipeline generates under its present scheduler, on the CPU.

    adapters: {name: strength} that it shall speak with; None leaves them as they are.
    """
    if adapters:
        family.pipe.set_adapters(list(adapters), list(adapters.values()))
    captions = captions_for(family)
    noise = start_noise(family, range(len(captions)), config.seed)
    latents = stock_latents(family, captions, noise, config.steps, config.guidance_scale, family.pipe.scheduler)
    return family.decode(latents).float().cpu() / 2 + .5


def differences(mine, theirs):
    """{mean, largest} difference of pixels, and how far two captions' images lie apart, to hold them against."""
    apart = (theirs[0] - theirs[1]).abs().mean().item()
    gap = (mine - theirs).abs()
    return {"mean": gap.mean().item(), "largest": gap.max().item(), "two_captions": apart}


def fused_pipeline(step_lora, folder, scale):
    """Writes the pipeline of a `StepLora` with the LoRA at `scale` in its weights and the shift in its scheduler.

    Returns the images that it generated before, with the LoRA beside its weights. `step_lora` is used up.
    """
    before = check_images(step_lora.family, step_lora.config, {"step": scale})
    step_lora.pipe.fuse_lora(adapter_names=["step"])
    step_lora.pipe.unload_lora_weights()
    with no_loading_bars():
        step_lora.pipe.save_pretrained(folder)
    return before


def reloaded(step_lora, folder):
    """The family of the pipeline in `folder`, loaded by stock diffusers, bound to the same size."""
    config, pipe = step_lora.config, step_lora.pipe
    absent = {name: None for name, part in pipe.components.items() if part is None}
    with no_loading_bars():
        fresh = type(pipe).from_pretrained(str(folder), dtype=DTYPES[config.weight_dtype], **absent).to(pipe.device)
    fresh.set_progress_bar_config(disable=True)
    family = type(step_lora.family)(fresh, config.height, config.width, config.max_sequence_length)
    if hasattr(step_lora.family, "negative_prompt"):
        family.negative_prompt = step_lora.family.negative_prompt
    return family


def concatenated(module):
    """{LAYER.lora_A.weight and LAYER.lora_B.weight: tensor}: the active adapters of a network as one, strength 1, alpha = rank.

    The sum of the products B A is exact, since (s1 B1 | s2 B2) (A1 / A2) = s1 B1 A1 + s2 B2 A2: ranks are laid side by side.
    Each layer gets the full rank, zeros where an adapter has nothing for it, so that the file needs no alphas and no table of
    ranks. ValueError for adapters that are no plain sums of products (DoRA, a bias).
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}
    names = next(iter(layers.values())).active_adapters
    ranks = {a: max((layer.r[a] for layer in layers.values() if a in layer.r), default=0) for a in names}
    merged = {}
    for where, layer in layers.items():
        mine = [a for a in names if a in layer.lora_A]
        if any(a in layer.lora_magnitude_vector for a in mine) or any(layer.lora_bias.get(a) for a in mine):
            raise ValueError(f"{where}: DoRA and LoRA with a bias are no plain products and cannot be put side by side")
        if mine:
            down = [layer.lora_A[a].weight.float() for a in mine]
            up = [layer.scaling[a] * layer.lora_B[a].weight.float() for a in mine]
            pad = sum(ranks.values()) - sum(len(d) for d in down)
            down.append(down[0].new_zeros(pad, *down[0].shape[1:]))
            up.append(up[0].new_zeros(len(up[0]), pad, *up[0].shape[2:]))
            merged[f"{where}.lora_A.weight"] = torch.cat(down).detach().cpu().contiguous()
            merged[f"{where}.lora_B.weight"] = torch.cat(up, 1).detach().cpu().contiguous()
    return merged


def merged_lora(step_lora, folder, scale):
    """Writes one LoRA file of step and style LoRA at the given strengths; returns what both generated as two adapters.

    ValueError when the style LoRA speaks to a text encoder: that part would be lost.
    """
    config, pipe = step_lora.config, step_lora.pipe
    load_adapter(pipe, lora_file(config.style_lora), "style")
    spoken_to = [part for part, names in pipe.get_list_adapters().items() if "style" in names and part != "transformer"]
    if spoken_to:
        raise ValueError(f"{config.style_lora} also changes {', '.join(spoken_to)}, which a merged file would lose: "
                         "use both LoRAs with set_adapters")
    before = check_images(step_lora.family, config, {"step": scale, "style": config.style_lora_scale})
    type(pipe).save_lora_weights(folder, transformer_lora_layers=concatenated(pipe.transformer), weight_name=WEIGHT_NAME)
    return before


CARD = """# {title}

Exported by scfm from the step LoRA `{lora}` for {pipeline}: step LoRA at strength {scale:g}{style}, for {n} step{s}.

```python
{code}
pipe(prompt, {negative_prompt}num_inference_steps={n}, sigmas=[1 - i / {n} for i in range({n})], guidance_scale={guidance:g},
     height={height}, width={width}, max_sequence_length={max_sequence_length})
```

The strength is right for {n} step{s} and cannot be turned any more; another number of steps wants another export. {checked}
"""
FUSED = """import torch
from {module} import {kind}

pipe = {kind}.from_pretrained("{folder}", torch_dtype=torch.{dtype})     # its scheduler has the shift {shift:g}"""
MERGED = """from diffusers import FlowMatchEulerDiscreteScheduler

pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift={shift:g}, use_dynamic_shifting=False)
pipe.load_lora_weights("{folder}")"""


def export_card(config, scale, gap, kind=DiffusionPipeline):
    """The README.md of an export, as text. kind: the pipeline's class."""
    outside = not kind.__module__.startswith("diffusers.")            # stock classes are found by their common base
    words = {"module": kind.__module__ if outside else "diffusers", "kind": kind.__name__ if outside else "DiffusionPipeline", "folder": Path(config.output_dir).name, "shift": config.inference_shift, "dtype": str(DTYPES[config.weight_dtype]).split(".")[1]}
    checked = (f"Checked when it was written: pixels (0 to 1) differ from those of the separate parts by "
               f"{gap['mean']:.1e} in the mean and {gap['largest']:.1e} at most, where two captions' "
               f"images differ by {gap['two_captions']:.1e}.")
    return CARD.format(
        title="A step LoRA and a style LoRA in one file" if config.style_lora else "A pipeline with its step LoRA fused in",
        lora=Path(config.lora).resolve().name, pipeline=Path(config.pretrained_model_name_or_path).name, scale=scale, n=config.steps,
        s="s" * (config.steps > 1),
        style=f" and `{Path(config.style_lora).name}` at {config.style_lora_scale:g}" if config.style_lora else "",
        code=(MERGED if config.style_lora else FUSED).format(**words), guidance=config.guidance_scale, height=config.height,
        negative_prompt=f"negative_prompt={config.negative_prompt!r}, " * bool(config.negative_prompt), width=config.width,
        max_sequence_length=config.max_sequence_length, checked=checked)


def export(config, device=None):
    """Writes config.out, after its images were checked against those of the unfused parts; returns the record.

    Raises RuntimeError when they differ by more than config.tolerance in the mean; then nothing is left at config.out.
    """
    config.check()
    step_lora = StepLora(config, device)
    scale = config.lora_scale if config.lora_scale >= 0 else step_lora.lora_scales.scale(config.steps) if step_lora.lora_scales else 1.
    new = Path(str(config.output_dir).rstrip("/") + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        if config.style_lora:
            before = merged_lora(step_lora, new, scale)
            step_lora.pipe.unload_lora_weights()
            load_adapter(step_lora.pipe, new / WEIGHT_NAME, "merged")
            family = step_lora.family
        else:
            before = fused_pipeline(step_lora, new, scale)
            step_lora.pipe.to("cpu")
            family = reloaded(step_lora, new)
        gap = differences(check_images(family, config), before)
        if not gap["mean"] <= config.tolerance:
            raise RuntimeError(f"the export generates other images: they differ by {gap['mean']:.2g} in the mean, "
                               f"more than {config.tolerance:g}; nothing was written (rounding alone may do this in bf16: "
                               "try --weight_dtype fp32)")
        card = export_card(config, scale, gap, type(family.pipe))
        atomic_write(new / "README.md", lambda path: path.write_text(card, encoding="utf-8"))
        record = {"scale": scale, "steps": config.steps, "shift": config.inference_shift, "guidance": config.guidance_scale,
                  "style": Path(config.style_lora).name, "style_scale": config.style_lora_scale if config.style_lora else None,
                  "differences": gap}
        atomic_write(new / "export.json", lambda path: path.write_text(json.dumps(record, indent=1), encoding="utf-8"))
        if Path(config.output_dir).is_dir():
            Path(config.output_dir).rmdir()                # empty, as check() saw
        new.rename(config.output_dir)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return record
