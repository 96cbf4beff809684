"""The model card of a step LoRA, for people who use it in stock diffusers."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scfm.files import atomic_write
from scfm.inference.card_code import adapter_list, loading_code, set_adapters, strengths
from scfm.inference.config import InferenceConfig
from scfm.inference.search import Curve
from scfm.inference.step_lora import StepLora, format_scales
from scfm.method.distill import STEP_SCALED
from scfm.method.lora_scale import LoraScales
from scfm.models.base import PipelineFamily, takes_sigmas
from scfm.models.lora_file import read_lora_scales, write_lora_scales
from scfm.models.source import PipelineSource

MARKER = "<!-- written by scfm, which will write it again; take this line out to keep what you change -->"

CARD = """# A step LoRA for {pipeline}

Made by self-distillation with scfm, {method}.
{table}
With stock diffusers, for {n} step{s}:

```python
from diffusers import FlowMatchEulerDiscreteScheduler

pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift={shift:g})
{grid}{load}
{set_scale}
{output} = pipe(
    prompt,
    {arguments},
).{output}
```

The scheduler must follow this grid: left alone it may choose another one, by the image's size or its own
shift.

## How it was made

{history}

## Limits

{limits}

{marker}
"""

TABLE = """The best LoRA scale depends on the number of steps:

| steps | LoRA scale | distance to the teacher's endpoint | the teacher's own, in as many steps |
|---|---|---|---|
{rows}

The scales were chosen on {captions} prompts, one noise each, as those whose endpoints lie nearest (root mean
square, in latents) to the teacher's {target_steps}-step endpoints from the same noise, never growing with the
steps.
"""

PAPER = "[arXiv 2510.17858](https://arxiv.org/abs/2510.17858)"
RULE = """The LoRA scale is the step size: n steps are taken at n ** -{exponent:g}, whatever n is{pair}.

| steps | in diffusers | distance to the teacher's endpoint | the teacher's own, in as many steps |
|---|---|---|---|
{rows}

Distances are root mean squares in latents from the teacher's {target_steps}-step endpoints, from the same
noise, on {captions} prompts. Training drew {first} to {last} steps.
"""

# for a pipeline whose call takes no sigmas
GRID = """pipe.scheduler.sigma_min = 1 / {n}  # evenly from 1 to here, then shifted: the grid of {n} step{s}
"""
SCALE_PER_STEP = """scales = {scales}  # for each step


def set_scale(pipe, step, timestep, tensors):
    pipe.set_adapters({names}, scales[(step + 1) % {n}])
    return tensors


pipe.set_adapters({names}, scales[0])"""


def render_card(folder: str | Path, location: str = "") -> str:
    """The model card of the LoRA in a run's folder: what the files there say, and no more. FileNotFoundError
    without a LoRA.

    location: where its code loads the LoRA from; empty: the folder's name
    """
    folder = Path(folder)
    config = InferenceConfig(lora=str(folder)).resolved()
    if not config.weights.is_file():
        raise FileNotFoundError(f"no LoRA at {config.weights}")
    lora_scales = read_lora_scales(config.weights)
    run = read_record(folder / "config.json")
    history = [
        *data_lines(config, run),
        *training_lines(run, read_record(folder / "selection.json")),
        *environment_lines(read_record(folder / "run.json")),
    ]
    return CARD.format(
        pipeline=Path(config.pretrained_model_name_or_path).name,
        method=method_name(lora_scales, run),
        table=scale_table(lora_scales, folder),
        shift=config.inference_shift,
        load=loading_code(lora_scales, location or folder.resolve().name),
        history="\n".join(f"- {line}" for line in history),
        limits="\n".join(f"- {line}" for line in limit_lines(config, lora_scales)),
        marker=MARKER,
        **example(config, lora_scales),
    )


def method_name(lora_scales: LoraScales | None, run: Mapping[str, Any]) -> str:
    """Whose algorithm made the LoRA."""
    by_rule = lora_scales is not None and bool(lora_scales.exponent)
    if by_rule or run.get("algorithm") == STEP_SCALED:
        return f"its own algorithm step_scaled, after the method of {PAPER}"
    return f"the method of {PAPER}"


def example(config: InferenceConfig, lora_scales: LoraScales | None) -> dict[str, Any]:
    """What the card's code depends on: 4 steps, or the searched number that is nearest, at their LoRA
    scale."""
    n = min(lora_scales.steps, key=lambda steps: abs(steps - 4)) if lora_scales else 4
    scales = lora_scales.per_step(n) if lora_scales else (1.0,)
    if len(set(scales)) == 1:
        code, more = set_adapters(scales[0], lora_scales), []
    else:
        each = [[round(strength, 6) for strength in strengths(scale, lora_scales)] for scale in scales]
        code = SCALE_PER_STEP.format(scales=each, n=n, names=adapter_list(lora_scales))
        more = ["callback_on_step_end=set_scale"]
    return {
        "n": n,
        "s": "s" * (n > 1),
        "set_scale": code,
        "arguments": call_arguments(config, n, more),
        **grid_and_output(config, n),
    }


def grid_and_output(config: InferenceConfig, steps: int) -> dict[str, str]:
    """{"grid": the line that sets it in the scheduler, where the call does not say it; "output": what the
    call's result has the images under}."""
    family = family_of(config)
    line = "" if is_told(family) else GRID.format(n=steps, s="s" * (steps > 1))
    return {"grid": line, "output": family.output}


def is_told(family: type[PipelineFamily]) -> bool:
    """Whether a family's pipeline is called with its grid; so are most, and those that are not here."""
    return not hasattr(family, "pipeline_class") or takes_sigmas(family.pipeline_class)


def call_arguments(config: InferenceConfig, steps: int, more: Sequence[str] = ()) -> str:
    """What a stock pipeline's call is given after the prompt, one argument a line."""
    family = family_of(config)
    negative = "" if config.guidance_inside else config.negative_prompt
    guidance = family.guidance_arguments(config.guidance_scale, negative)
    arguments = [
        *(f"{name}={value!r}" for name, value in guidance.items() if name == "negative_prompt"),
        f"num_inference_steps={steps}",
        *([f"sigmas=[1 - i / {steps} for i in range({steps})]"] if is_told(family) else []),
        *(f"{name}={value:g}" for name, value in guidance.items() if name != "negative_prompt"),
        f"height={config.height}",
        f"width={config.width}",
        *([f"num_frames={config.num_frames}"] if getattr(family, "makes_videos", False) else []),
        f"max_sequence_length={config.max_sequence_length}",
        *(f"{name}={value!r}" for name, value in family.call_settings.items()),
        *more,
    ]
    return ",\n    ".join(arguments)


def family_of(config: InferenceConfig) -> type[PipelineFamily]:
    """Says how the stock pipeline is called: its family, or the base of most where that is not here, or says
    nothing of it."""
    try:
        family = PipelineSource(config.pretrained_model_name_or_path, configs_only=True).family
    except (FileNotFoundError, ValueError):
        return PipelineFamily
    return family if issubclass(family, PipelineFamily) else PipelineFamily


def scale_table(lora_scales: LoraScales | None, folder: Path) -> str:
    """The card's table of LoRA scales; a sentence where there are none."""
    if lora_scales is None:
        return (
            "No LoRA scale was searched: training aimed at 1; fewer steps may want more, more steps less.\n"
        )
    if lora_scales.exponent:
        return rule_table(lora_scales, read_record(folder / "selection.json"))
    return searched_table(lora_scales, read_record(folder / "lora_scales.json"))


def rule_table(lora_scales: LoraScales, selection: Mapping[str, Any]) -> str:
    """The scales by the rule that was trained in, with the distances that the selection measured."""
    distances = selection.get("endpoint_distance", {})
    ours, teachers = distances.get(selection.get("selected"), {}), distances.get("teacher", {})
    rows = [
        f"| {n} | `{set_adapters(lora_scales.scale(n), lora_scales)}` | {distance_text(ours, n)} | "
        f"{distance_text(teachers, n)} |"
        for n in sorted({*lora_scales.steps, 5})
    ]
    return RULE.format(
        exponent=lora_scales.exponent,
        pair=", the second LoRA at its square" * (lora_scales.order == 2)
        + ", that of the guidance at 1" * (lora_scales.lowest == 0),
        rows="\n".join(rows),
        target_steps=selection.get("teacher_steps", "many"),
        captions=selection.get("captions", "the run's"),
        first=lora_scales.steps[0],
        last=lora_scales.steps[-1],
    )


def distance_text(distances: Mapping[str, float], steps: int) -> str:
    """A distance for so many steps, a dash where none was measured."""
    return f"{distances[str(steps)]:.4f}" if str(steps) in distances else "-"


def searched_table(lora_scales: LoraScales, search: Mapping[str, Any]) -> str:
    """The scales that were searched, with their distances."""
    distances = {(row["steps"], row["scale"]): f"{row['distance']:.4f}" for row in search.get("curve", ())}
    pairs = zip(lora_scales.steps, lora_scales.scales, strict=True)
    several = lora_scales.powers != (1,)
    rows = [
        f"| {n} | {s:g}{f': `{set_adapters(s, lora_scales)}`' * several} | {distances.get((n, s), '-')} | "
        f"{distances.get((n, 0), '-')} |"
        for n, s in pairs
    ]
    text = TABLE.format(
        rows="\n".join(rows),
        captions=search.get("captions", "the run's"),
        target_steps=search.get("target_steps", "many"),
    )
    schedules = "; ".join(f"{len(scales)} steps: {format_scales(scales)}" for scales in lora_scales.schedules)
    if schedules:
        text += f"\nA scale for each step came as near or nearer on the same prompts. {schedules}.\n"
    return text


def data_lines(config: InferenceConfig, run: Mapping[str, Any]) -> list[str]:
    """What the run was made from, a sentence each, as far as its config.json says so."""
    lines = []
    if has(run, "prompts", "train_data_dir"):
        data = "the teacher's own images" if run["prompts"] else "a folder of images with captions"
        listing = Path(run["train_data_dir"] or Path(config.lora) / "images") / "metadata.jsonl"
        images = listing.read_text(encoding="utf-8").split("\n") if listing.is_file() else []
        count = f" ({sum(bool(line.strip()) for line in images)} of them)" if images else ""
        sizes = " and ".join([f"{config.height}x{config.width}", *run.get("more_sizes", ())])
        pipeline = Path(config.pretrained_model_name_or_path).name
        lines.append(f"Base: {pipeline}. Data: {data}{count}, {sizes} pixels.")
    if run.get("prompts") and has(run, "teacher_steps", "teacher_guidance_scale"):
        lines.append(
            f"The teacher generated them in {run['teacher_steps']} steps at guidance scale "
            f"{run['teacher_guidance_scale']:g}."
        )
    return lines


def training_lines(run: Mapping[str, Any], selection: Mapping[str, Any]) -> list[str]:
    """How the run was trained, a sentence each, as far as its config.json and selection.json say so."""
    lines = []
    if has(run, "max_train_steps", "global_batch_size", "learning_rate", "seed", "rank", "lora_alpha"):
        lines.append(
            f"{selection.get('train_steps', run['max_train_steps'])} training steps at batch size "
            f"{run['global_batch_size']}, learning rate {run['learning_rate']:g}, seed {run['seed']}; "
            f"LoRA rank {run['rank']}, alpha {run['lora_alpha'] or run['rank']}."
        )
    shift = " to ".join(f"{value:g}" for value in run.get("shift", ()))
    if run.get("algorithm") == STEP_SCALED:
        lines.append(
            f"Algorithm step_scaled: step counts {', '.join(map(str, run['step_counts']))}, EMA decay "
            f"{run['ema_decay']:g}, time shift {shift or 'within a tenth of the sampling shift'}."
        )
    elif has(run, "algorithm", "teacher_ratio", "ema_target_scale", "shift"):
        lines.append(
            f"Algorithm {run['algorithm']}, teacher ratio {run['teacher_ratio']:g}, EMAs at LoRA scale "
            f"{run['ema_target_scale']:g}, time shift {shift or '2.5 to 4.5'}."
        )
    if has(run, "guidance_mode", "teacher_guidance_scale"):
        away = f" away from {run['negative_prompt']!r}" if run.get("negative_prompt") else ""
        inside = (
            f"scale {run['teacher_guidance_scale']:g}{away} is in the weights: sample at guidance scale 1"
        )
        how = {"kept": "is kept: sample with it", "distilled": inside}
        lines.append(f"Guidance {how[run['guidance_mode']]}.")
    if has(selection, "selected"):
        judged = run.get("select_adapter", "best") == "best"
        nearest = ": its endpoints lie nearest to the teacher's" if judged else ""
        models = [name for name in selection.get("endpoint_distance", {}) if name != "teacher"]
        among = f"Of {', '.join(models[:-1])} and {models[-1]} the model " if models else ""
        lines.append(f"{among}{selection['selected']} is saved{nearest}.")
    return lines


def environment_lines(environment: Mapping[str, Any]) -> list[str]:
    """The code and the libraries that the run used, a sentence each, as far as its run.json says so."""
    lines = []
    if environment.get("commit"):
        changed = ", with changes of its own" if environment.get("changed") else ""
        lines.append(f"Code: commit {environment['commit'][:12]}{changed}.")
    names = ("scfm", "torch", "diffusers", "transformers", "peft")
    libraries = [f"{name} {environment[name]}" for name in names if name in environment]
    if libraries:
        device = environment.get("device", "a device that is not recorded")
        lines.append(f"Versions: {', '.join(libraries)}; on {device}.")
    return lines


def limit_lines(config: InferenceConfig, lora_scales: LoraScales | None) -> list[str]:
    """What the LoRA was not made for, a sentence each."""
    lines = [
        f"Made for {config.height} x {config.width} pixels and shift {config.inference_shift:g}; others were "
        "not tried."
    ]
    if lora_scales:
        how = "trained" if lora_scales.exponent else "searched"
        lines.append(
            f"LoRA scales were {how} for {lora_scales.steps[0]} to {lora_scales.steps[-1]} Euler steps. "
            "Second-order solvers do not suit it."
        )
    lines.append(
        "It has its teacher's faults; at a LoRA scale too high for the steps, its images spread further than "
        "the teacher's."
    )
    return lines


def has(record: Mapping[str, Any], *names: str) -> bool:
    """Whether a record has all these entries."""
    return all(name in record for name in names)


def read_record(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def card_path(folder: str | Path) -> Path:
    """Where the card of a folder goes: README.md, or the first of MODEL_CARD.md, MODEL_CARD_2.md, ... where
    somebody else's stand before it."""
    later = (f"MODEL_CARD_{k}.md" for k in itertools.count(2))
    paths = (Path(folder) / name for name in itertools.chain(("README.md", "MODEL_CARD.md"), later))
    return next(path for path in paths if not path.exists() or is_ours(path))


def is_ours(path: Path) -> bool:
    """Whether scfm wrote this card: a line of it says so."""
    return path.is_file() and MARKER in path.read_text(encoding="utf-8", errors="replace").splitlines()


def write_card(folder: str | Path) -> Path:
    """Writes the model card into a run's folder, over none but our own; returns its path."""
    text, path = render_card(folder), card_path(folder)
    atomic_write(path, lambda new: new.write_text(text, encoding="utf-8"))
    return path


def save_lora_scales(
    step_lora: StepLora, lora_scales: LoraScales, curve: Curve, captions: Sequence[str], target_steps: int
) -> Path:
    """Writes the LoRA scales into the LoRA's header, the whole curve into lora_scales.json, and the model
    card beside it; returns the path of the card."""
    record = {
        "captions": len(captions),
        "target_steps": target_steps,
        "shift": lora_scales.shift,
        "seed": step_lora.config.seed,
        "guidance": step_lora.config.guidance_scale,
        "lora_scales": dict(zip(lora_scales.steps, lora_scales.scales, strict=True)),
        "schedules": lora_scales.schedules,
        "curve": [
            {"steps": n, "scale": scale, "distance": round(distance, 6)}
            for (n, scale), distance in sorted(curve.items())
        ],
    }
    text = json.dumps(record, indent=1)
    write_lora_scales(step_lora.path, lora_scales)
    path = step_lora.path.with_name("lora_scales.json")
    atomic_write(path, lambda new: new.write_text(text, encoding="utf-8"))
    return write_card(path.parent)
