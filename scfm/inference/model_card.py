"""The README of a step LoRA, for people who use it in stock diffusers."""
import json
from pathlib import Path

from scfm.files import atomic_write
from scfm.inference.step_lora import InferenceConfig, format_scales
from scfm.models.lora import WEIGHT_NAME
from scfm.models.lora_file import read_lora_scales, write_lora_scales

CARD = """# A step LoRA for {pipeline}

Made by self-distillation with scfm, the method of [arXiv 2510.17858](https://arxiv.org/abs/2510.17858). {table}
With stock diffusers, for {n} step{s}:

```python
from diffusers import FlowMatchEulerDiscreteScheduler

pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift={shift:g}, use_dynamic_shifting=False)
pipe.load_lora_weights("{folder}", adapter_name="step")
{turn}
pipe(prompt, {negative_prompt}num_inference_steps={n}, sigmas=[1 - i / {n} for i in range({n})], guidance_scale={guidance:g},
     height={height}, width={width}, max_sequence_length={max_sequence_length}{callback})
```

The scheduler must walk this grid: left alone it may choose another one, by the image's size or its own shift.

## How it was made

{made}

## Limits

{limits}
"""

TABLE = """The strength depends on the number of steps:

| steps | weight | distance to the teacher's endpoint | the teacher's own, in as many steps |
|---|---|---|---|
{rows}

The weights were chosen on {captions} prompts, one noise each, as those whose endpoints lie nearest (root mean square, in
latents) to the teacher's {goal_steps}-step endpoints from the same noise, never growing with the steps.
"""

ONE = 'pipe.set_adapters(["step"], [{scale:g}])'
EACH = """scales = {scales}                 # a strength for each step

def turn(pipe, step, timestep, tensors):
    pipe.set_adapters(["step"], [scales[(step + 1) % {n}]])
    return tensors

pipe.set_adapters(["step"], [scales[0]])"""


def card(folder):
    """The model card, as text, of the LoRA in a run's folder; says what the files there say. FileNotFoundError without a LoRA."""
    folder = Path(folder)
    config = InferenceConfig(lora=str(folder))
    config.check()
    run, choice, told, begun = (read_record(folder / name) for name in ("config.json", "selection.json", "lora_scales.json", "run.json"))
    dial = read_lora_scales(folder / WEIGHT_NAME)
    n = min(dial.steps, key=lambda s: abs(s - 4)) if dial else 4
    scales = dial.per_step(n) if dial else (1.,) * n
    each = len(set(scales)) > 1
    return CARD.format(
        pipeline=Path(config.pretrained_model_name_or_path).name, table=table_of(dial, told), n=n, s="s" * (n > 1), shift=config.inference_shift,
        folder=folder.resolve().name, turn=EACH.format(scales=list(scales), n=n) if each else ONE.format(scale=scales[0]),
        callback=",\n     callback_on_step_end=turn" * each, guidance=config.guidance_scale, height=config.height,
        width=config.width, max_sequence_length=config.max_sequence_length,
        negative_prompt=f"negative_prompt={config.negative_prompt!r}, " * bool(config.negative_prompt),
        made="\n".join(f"- {line}" for line in history(config, run, choice, begun)),
        limits="\n".join(f"- {line}" for line in limits(config, run, dial)))


def table_of(dial, told):
    """The card's table; a sentence when no dial was found yet."""
    if dial is None:
        return "No strength was tuned: 1 is what training aimed at; fewer steps may want more, more steps less.\n"
    curve = {(row["steps"], row["scale"]): f"{row['distance']:.4f}" for row in told.get("curve", ())}
    rows = [f"| {n} | {s:g} | {curve.get((n, s), '-')} | {curve.get((n, 0), '-')} |" for n, s in zip(dial.steps, dial.scales)]
    text = TABLE.format(rows="\n".join(rows), captions=told.get("captions", "the run's"),
                        goal_steps=told.get("goal_steps", "many"))
    own = "; ".join(f"{len(scales)} steps: {format_scales(scales)}" for scales in dial.schedules)
    return text + f"\nA weight for each step, from the noise on, came as near or nearer on the same prompts. {own}.\n" * bool(own)


def history(config, run, choice, begun):
    """What the records say about the making, a sentence each."""
    knows = lambda *names: all(name in run for name in names)
    if knows("prompts", "train_data_dir"):
        data = "the teacher's own images" if run["prompts"] else "a folder of images with captions"
        listing = Path(run["train_data_dir"] or Path(config.lora) / "images") / "metadata.jsonl"
        count = f" ({sum(map(bool, map(str.strip, listing.read_text(encoding='utf-8').splitlines())))} of them)" if listing.is_file() else ""
        sizes = [f"{config.height}x{config.width}", *run.get("more_sizes", ())]
        yield f"Base: {Path(config.pretrained_model_name_or_path).name}. Data: {data}{count}, {' and '.join(sizes)} pixels."
    if run.get("prompts") and knows("teacher_steps", "teacher_guidance_scale"):
        yield f"The teacher generated them in {run['teacher_steps']} steps at guidance scale {run['teacher_guidance_scale']:g}."
    if knows("max_train_steps", "global_batch_size", "learning_rate", "seed", "rank", "lora_alpha"):
        yield (f"{choice.get('train_steps', run['max_train_steps'])} training steps at batch size {run['global_batch_size']}, learning rate {run['learning_rate']:g}, "
               f"seed {run['seed']}; LoRA rank {run['rank']}, alpha {run['lora_alpha'] or run['rank']}.")
    if knows("algorithm", "teacher_ratio", "ema_target_scale", "shift"):
        yield (f"Algorithm {run['algorithm']}, {run['teacher_ratio']:g} of the rows spoken by the teacher, EMAs at scale "
               f"{run['ema_target_scale']:g}, time shift {run['shift'][0]:g} to {run['shift'][1]:g}.")
    if knows("guidance_mode"):
        mode = {"kept": "is kept: sample with it", "distilled": "is in the weights: sample at guidance scale 1"}
        yield f"Guidance {mode[run['guidance_mode']]}."
    if "selected" in choice:
        yield f"Of student, fast and slow EMA {choice['selected']} is the one saved: its endpoints lie nearest to the teacher's."
    if begun.get("commit"):
        yield f"Code: commit {begun['commit'][:12]}{', with changes of its own' if begun.get('changed') else ''}."
    libraries = [f"{name} {begun[name]}" for name in ("scfm", "torch", "diffusers", "transformers", "peft") if name in begun]
    if libraries:
        yield f"Versions: {', '.join(libraries)}; on {begun.get('device', 'a device that is not recorded')}."


def limits(config, run, dial):
    """What the LoRA was not made for."""
    yield f"Made and tuned at {config.height} x {config.width} pixels and shift {config.inference_shift:g}; others were not tried."
    if dial:
        yield f"Tuned for {dial.steps[0]} to {dial.steps[-1]} Euler steps. Second-order solvers do not suit it."
    yield "It has its teacher's faults; at a strength too high for the steps, its images spread further than the teacher's."


def read_record(path):
    """A JSON object, or an empty one where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_card(folder):
    """Writes `card(folder)` as README.md of the run's folder; returns the path."""
    path = Path(folder) / "README.md"
    text = card(folder)
    atomic_write(path, lambda new: new.write_text(text, encoding="utf-8"))
    return path


def save_lora_scales(step_lora, dial, curve, captions, goal_steps):
    """Writes the dial into the LoRA's header, the whole curve into lora_scales.json and the card into README.md beside it."""
    folder = step_lora.path.parent
    record = {"captions": len(captions), "goal_steps": goal_steps, "shift": dial.shift, "seed": step_lora.config.seed,
              "guidance": step_lora.config.guidance_scale, "lora_scales": dict(zip(dial.steps, dial.scales)),
              "schedules": dial.schedules, "curve": [{"steps": n, "scale": s, "distance": round(d, 6)} for (n, s), d in sorted(curve.items())]}
    write_lora_scales(step_lora.path, dial)
    atomic_write(folder / "lora_scales.json", lambda new: new.write_text(json.dumps(record, indent=1), encoding="utf-8"))
    write_card(folder)
