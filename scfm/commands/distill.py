"""`scfm distill`: from a pipeline's folder to a LoRA."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scfm.commands.options import make_parser, parse_config
from scfm.commands.signals import exit_code, signals_noted
from scfm.inference.model_card import write_card
from scfm.models.lora import WEIGHT_NAME
from scfm.models.scaled_lora import power_file
from scfm.training.checkpoint import latest
from scfm.training.config import PRESETS, DistillConfig, as_json
from scfm.training.distill_trainer import finalize, init_trainer
from scfm.training.output_dir import HARMLESS, load_saved_config


def main(argv: Sequence[str]) -> int:
    """`scfm distill`: a flag for every field of DistillConfig."""
    parser = make_parser(
        "scfm distill",
        "Self-distil a pre-trained flow-matching pipeline into a few-step one: a LoRA for any count of steps "
        "from 1 to 16, whose scale is the step size; by the paper's algorithms (--algorithm dual) one for "
        "some 2 to 8. What it writes, OUTPUT_DIR/pytorch_lora_weights.safetensors (and ..._2 beside it, and "
        "..._0 where guidance is distilled), loads in a stock pipeline with load_lora_weights; "
        "OUTPUT_DIR/README.md has the lines. Learning rate and batch default to the published ones for "
        "FLUX.1-dev; for a whole recipe take --config flux-dev-step-scaled. Run the same command again to "
        "resume after a kill. On several GPUs: "
        "accelerate launch -m scfm.cli distill ... (see scripts/).",
        "scfm distill --config flux-dev-step-scaled --pretrained_model_name_or_path PIPELINE \\\n"
        "    --prompts captions.txt --output_dir runs/mine",
    )
    config = parse_config(
        parser,
        argv,
        DistillConfig,
        "YAML or JSON file of the settings below, the config.json that every run writes, or the name of a "
        f"preset ({', '.join(path.stem for path in sorted(PRESETS.glob('*.yaml')))}); flags override it",
    )
    config.check()
    record = finished(config)
    # comparing again would undo what `scfm dial` has found since
    if record:
        print_summary(record, config.output_dir)
        print(
            "nothing was done: this run is through (delete its selection.json to have the adapters "
            "compared again)"
        )
        return 0
    trainer = init_trainer(config)
    with signals_noted() as stopped:
        trainer.train(should_stop=lambda: bool(stopped))
    if trainer.global_step < config.max_train_steps:
        if trainer.is_main:
            print(f"stopped after saving {latest(config.output_dir)}: the same command goes on from there")
        return exit_code(stopped)
    if trainer.is_main:  # this takes minutes on a large model, without a bar
        print(
            f"{trainer.global_step} steps made; now {', '.join(config.model_names)} are compared on "
            f"{config.num_eval_prompts} captions",
            flush=True,
        )
    record = finalize(trainer)
    if record:
        write_card(config.output_dir)
        print_summary(record, config.output_dir)
    return 0


def finished(config: DistillConfig) -> dict[str, Any] | None:
    """The record in selection.json when a run with these settings has been through; None otherwise."""
    old, path = (
        load_saved_config(config.output_dir, DistillConfig),
        Path(config.output_dir) / "selection.json",
    )
    if not old or not path.is_file():
        return None
    record, new = json.loads(path.read_text(encoding="utf-8")), as_json(config)
    same = all(new[name] == old[name] for name in new if name not in HARMLESS)
    return record if same and record["train_steps"] == config.max_train_steps else None


def print_summary(record: dict[str, Any], output_dir: str) -> None:
    """The distances of the selection, and which adapter was saved."""
    print(
        f"distance to the teacher's {record['teacher_steps']}-step endpoints after "
        f"{record['train_steps']} steps:"
    )
    for name, distances in record["endpoint_distance"].items():
        scales = record["lora_scales"].get(name, {})
        cells = [
            f"{n} steps {d:.4f}" + (f" (LoRA scale {scales[n]:.3g})" if n in scales else "")
            for n, d in distances.items()
        ]
        print(f"  {name:8}  " + "  ".join(cells))
    own, teachers = (record["endpoint_distance"][name] for name in (record["selected"], "teacher"))
    late = [n for n in own if own[n] >= 0.99 * teachers[n]]
    if late:
        print(
            f"  no nearer than the teacher itself at {', '.join(late)} steps: it has hardly learned "
            f"(more steps, a higher "
            "learning_rate)"
        )
    path = Path(output_dir) / WEIGHT_NAME
    beside = [power_file(path, power) for power in (2, 0)]
    more = "".join(f" and {file.name}" for file in beside if file.is_file())
    print(f"the model {record['selected']} is saved as {path}{more}")
