"""A pipeline with the step LoRA fused in, or one LoRA file of step and style, checked against its parts."""

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scfm.inference.adapters import (
    changed_text_encoders,
    load_adapter,
    lora_file,
    require_fit,
    require_whole_fit,
)
from scfm.inference.comfyui import require_names, save_for_comfyui
from scfm.inference.config import InferenceConfig
from scfm.inference.export_card import comfyui_card, export_card
from scfm.inference.merge import concatenate_adapters
from scfm.inference.step_lora import StepLora, bind_family, lora_files
from scfm.method.distill import setting
from scfm.method.lora_scale import LoraScales
from scfm.models.loading import DTYPES, no_loading_bars
from scfm.models.lora import WEIGHT_NAME
from scfm.models.lora_file import read_lora_scales, require_alone
from scfm.models.sampling import start_noise, stock_latents
from scfm.models.source import PipelineSource
from scfm.types import Family

# what both sides generate; any words will do, where the family knows any
CAPTIONS = ("a photo of a cat", "a red star at the top")
DIFFUSERS, COMFYUI = FORMATS = ("diffusers", "comfyui")
TOLERANCES = {"fp32": 1e-3, "bf16": 0.03}


@dataclass
class ExportConfig(InferenceConfig):
    """What `scfm export` needs to know, beside what every use of a LoRA needs."""

    output_dir: str = setting("", "folder to write; it must be new or empty")
    steps: int = setting(4, "number of steps that the export is for, which says the LoRA scale")
    lora_scale: float = setting(
        -1.0, "LoRA scale instead; below 0: the one searched for these steps, or 1 where none was"
    )
    style_lora: str = setting(
        "",
        "file or folder of a style LoRA: the result is one LoRA file of both; empty: a pipeline with the "
        "step LoRA fused in",
    )
    style_lora_scale: float = setting(1.0, "scale of the style LoRA")
    format: str = setting(
        "diffusers",
        "diffusers, or comfyui: the step LoRA alone under the names that ComfyUI gives the layers, for every "
        "number of steps; nothing is generated",
    )
    tolerance: float = setting(
        0.0, "largest mean difference of pixels (0 to 1) from the unfused pipeline; 0: 1e-3, in bf16 0.03"
    )

    def fill_in(self) -> None:
        """As of `InferenceConfig`, and the tolerance."""
        super().fill_in()
        self.tolerance = self.tolerance or TOLERANCES.get(self.weight_dtype, 0.0)

    def check(self) -> None:
        """As of `InferenceConfig`, and what can be known of a mistake before anything is loaded."""
        super().check()
        config, out = self.resolved(), Path(self.output_dir)
        if not self.output_dir:
            raise ValueError("no place to write: say --output_dir FOLDER")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} is there already and not empty: take another --output_dir")
        if config.steps < 1:
            raise ValueError(f"--steps is {config.steps}: give 1 or more")
        if config.quantize and not config.style_lora:
            raise ValueError(
                f"a LoRA cannot be added to weights in {config.quantize}: say --quantize none, and the "
                "exported pipeline has the whole ones"
            )
        if config.format not in FORMATS:
            raise ValueError(f"--format is {config.format!r}: {' or '.join(FORMATS)}")
        if config.format == COMFYUI:
            config.refuse_for_comfyui()
        if not config.tolerance > 0:
            raise ValueError(f"--tolerance is {config.tolerance}: give a number above 0, or 0 for the usual")
        if config.style_lora:
            style = lora_file(config.style_lora)
            require_alone(style)
            refuse_text_encoders(config.style_lora, changed_text_encoders(style))

    def refuse_for_comfyui(self) -> None:
        """ValueError for settings that would change nothing there."""
        if self.style_lora:
            raise ValueError(
                "ComfyUI loads a style LoRA as a file of its own, beside this one: leave --style_lora out"
            )
        for name in ("steps", "lora_scale", "style_lora_scale", "tolerance"):
            filled_in = TOLERANCES.get(self.weight_dtype) if name == "tolerance" else None
            if getattr(self, name) not in (getattr(ExportConfig, name), filled_in):
                raise ValueError(
                    f"--{name} means nothing with --format {COMFYUI}, whose files are for every number of "
                    "steps and are sampled by nobody here: leave it out"
                )


def refuse_text_encoders(style_lora: str, parts: Sequence[str]) -> None:
    """ValueError where a style LoRA changes more than the transformer: that part would be lost."""
    if parts:
        raise ValueError(
            f"{style_lora} also changes {', '.join(parts)}, which a merged file would lose: "
            "use both LoRAs with set_adapters"
        )


def export(config: ExportConfig, device: str | torch.device | None = None) -> dict[str, Any]:
    """Writes config.output_dir, once its images have been compared with those of the separate parts.

    returns: the record that lies there as export.json

    RuntimeError when they differ by more than config.tolerance in the mean; then nothing is left there.
    """
    config = config.resolved()
    config.check()
    if config.format == COMFYUI:
        return export_for_comfyui(config)
    step_lora = StepLora(config, device)
    require_whole_fit(step_lora.pipe)
    scale = config.lora_scale
    if scale < 0:
        scale = step_lora.lora_scales.scale(config.steps) if step_lora.lora_scales else 1.0
    with new_folder(Path(config.output_dir)) as folder:
        if config.style_lora:
            before, family = save_merged_lora(step_lora, config, folder, scale)
        else:
            before, family = save_fused_pipeline(step_lora, config, folder, scale)
        gap = differences(check_images(family, config), before)
        if not gap["mean"] <= config.tolerance:
            raise RuntimeError(
                f"the export generates other images: they differ by {gap['mean']:.2g} in the mean, more than "
                f"{config.tolerance:g}; nothing was written (rounding alone may do this in bf16: try "
                "--weight_dtype fp32)"
            )
        card = export_card(config, scale, gap, type(step_lora.pipe))
        record = export_record(config, scale, gap)
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / "export.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    return record


def export_for_comfyui(config: ExportConfig) -> dict[str, Any]:
    """Writes config.output_dir with the step LoRA under ComfyUI's names, and the strengths of each number of
    steps. Of the pipeline nothing but its configuration is read.

    returns: the record that lies there as export.json

    ValueError for a family or a layer whose name there is not known.
    """
    source = PipelineSource(config.pretrained_model_name_or_path)
    names, transformer = require_names(source.family), source.empty_transformer()
    lora_scales = read_lora_scales(config.weights)
    files = lora_files(config.weights, lora_scales)
    for path in files.values():
        require_fit(path, transformer, config.pretrained_model_name_or_path)
    with new_folder(Path(config.output_dir)) as folder:
        written = save_for_comfyui(files, transformer, names, folder)
        strengths = strengths_of(lora_scales, [path.name for path in written])
        record = {"format": COMFYUI, "shift": config.inference_shift, "strengths": strengths}
        (folder / "README.md").write_text(comfyui_card(config, strengths), encoding="utf-8")
        (folder / "export.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    return record


def strengths_of(lora_scales: LoraScales | None, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """{number of steps: {file: strength}}: of a pair the second has the square of the scale, and what holds
    the guidance 1.

    lora_scales: None: nothing was searched, and the strength is 1 for 4 steps
    """
    strengths: dict[int, tuple[float, ...]] = {4: (1.0,)}
    if lora_scales:
        strengths = {n: lora_scales.strengths(lora_scales.scale(n)) for n in lora_scales.steps}
    return {
        str(n): {name: round(strength, 4) for name, strength in zip(names, each, strict=True)}
        for n, each in strengths.items()
    }


def export_record(config: ExportConfig, scale: float, gap: dict[str, float]) -> dict[str, Any]:
    """What export.json says of an export."""
    return {
        "lora_scale": scale,
        "steps": config.steps,
        "shift": config.inference_shift,
        "guidance": config.guidance_scale,
        "style_lora": Path(config.style_lora).name,
        "style_lora_scale": config.style_lora_scale if config.style_lora else None,
        "differences": gap,
    }


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that takes its name at the end of the block, whole; after an error it is gone.

    path: new or an empty folder, else OSError at the end, and what is there stays
    """
    path = path.resolve()
    work = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
    work.mkdir(parents=True)
    try:
        yield work
        if path.is_dir():
            path.rmdir()  # raises where it is not empty
        work.rename(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@torch.no_grad()
def check_images(
    family: Family, config: ExportConfig, scales: Mapping[str, float] | None = None
) -> torch.Tensor:
    """(2, 3, H, W) in [0, 1]: what the family's stock pipeline generates as it is, on the CPU.

    scales: of the adapters that are to be active; None leaves them as they are
    """
    if scales:
        family.pipe.set_adapters(list(scales), list(scales.values()))
    captions = getattr(family, "captions", CAPTIONS)
    noise = start_noise(family, range(len(captions)), config.seed)
    latents = stock_latents(
        family, captions, noise, config.steps, config.guidance_scale, family.pipe.scheduler
    )
    return family.decode(latents).float().cpu() / 2 + 0.5


def differences(images: torch.Tensor, others: torch.Tensor) -> dict[str, float]:
    """{mean, largest} difference of pixels, and {two_captions}: that of two captions, to compare with."""
    gap, apart = (images - others).abs(), (others[0] - others[1]).abs()
    return {"mean": gap.mean().item(), "largest": gap.max().item(), "two_captions": apart.mean().item()}


def save_fused_pipeline(
    step_lora: StepLora, config: ExportConfig, folder: Path, scale: float
) -> tuple[torch.Tensor, Family]:
    """Writes the pipeline with the LoRA at `scale` in its weights and the shift in its scheduler.

    returns: (what it generated before, with the LoRA beside its weights; the family of what was written)

    `step_lora` is used up.
    """
    pipe = step_lora.pipe
    before = check_images(step_lora.family, config, step_lora.adapter_scales(scale))
    pipe.fuse_lora(adapter_names=list(step_lora.files))
    pipe.unload_lora_weights()
    with no_loading_bars():
        pipe.save_pretrained(folder)
    device = pipe.device
    pipe.to("cpu")
    return before, reload_pipeline(step_lora, folder, device)


def reload_pipeline(step_lora: StepLora, folder: Path, device: torch.device) -> Family:
    """The family of the pipeline in a folder, loaded by stock diffusers, at the size of `step_lora`."""
    config, pipe = step_lora.config, step_lora.pipe
    absent = {name: None for name, part in pipe.components.items() if part is None}
    with no_loading_bars():
        fresh = type(pipe).from_pretrained(str(folder), dtype=DTYPES[config.weight_dtype], **absent)
    fresh = fresh.to(device)
    fresh.set_progress_bar_config(disable=True)
    return bind_family(step_lora.source, config, fresh)


def save_merged_lora(
    step_lora: StepLora, config: ExportConfig, folder: Path, scale: float
) -> tuple[torch.Tensor, Family]:
    """Writes one LoRA file of step and style LoRA, each at its scale.

    returns: (what both generated as two adapters; the family, with the file as its only adapter)

    ValueError when the style LoRA changes a text encoder.
    """
    pipe = step_lora.pipe
    load_adapter(pipe, lora_file(config.style_lora), "style")
    require_whole_fit(pipe)
    changed = [part for part, names in pipe.get_list_adapters().items() if "style" in names]
    refuse_text_encoders(config.style_lora, [part for part in changed if part != "transformer"])
    scales = step_lora.adapter_scales(scale) | {"style": config.style_lora_scale}
    before = check_images(step_lora.family, config, scales)
    layers = concatenate_adapters(pipe.transformer)
    type(pipe).save_lora_weights(folder, transformer_lora_layers=layers, weight_name=WEIGHT_NAME)
    pipe.unload_lora_weights()
    load_adapter(pipe, folder / WEIGHT_NAME, "merged")
    return before, step_lora.family
