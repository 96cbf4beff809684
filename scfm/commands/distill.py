"""`scfm distill`: from a pipeline's folder to a LoRA."""
import argparse
import json
import signal
from contextlib import contextmanager
from pathlib import Path

from scfm.commands import add_options, from_file
from scfm.inference.model_card import write_card
from scfm.training.checkpoint import latest
from scfm.training.config import DistillConfig, as_json, load_saved_config
from scfm.training.distill_trainer import begin, end

# Settings that change neither the weights nor what was compared.
HARMLESS = ("output_dir", "cache_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint",
            "validation_steps", "micro_batch_size", "report_to")


def main(argv):
    """`scfm distill`: a flag for every field of DistillConfig."""
    parser = argparse.ArgumentParser(
        prog="scfm distill", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Self-distil a pre-trained flow-matching pipeline into a 3 to 8 step one. The defaults are the "
                    "published recipe for FLUX.1-dev; the result, OUT/pytorch_lora_weights.safetensors, loads in a "
                    "stock pipeline with load_lora_weights. Run the same command again to resume after a kill. On several "
                    "GPUs: accelerate launch -m scfm.cli distill ... (see scripts/).")
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of the settings below, a preset's name (scfm/presets/), or "
                        "the config.json that every run writes; flags override it")
    add_options(parser, DistillConfig)
    settings = vars(from_file(parser, argv).parse_args(argv))
    config = DistillConfig(**{k: v for k, v in settings.items() if k != "config"})
    config.check()
    record = finished(config)
    if record:                                                       # judging again would undo what `scfm dial` has found since
        tell(record, config.output_dir)
        print("nothing was done: this run is through (delete its selection.json to have the adapters compared again)")
        return 0
    run = begin(config)
    with signals_noted() as stopped:
        run.train(keep_going=lambda: not stopped)
    if run.update < config.max_train_steps:
        if run.main:
            print(f"stopped after saving {latest(config.output_dir)}: the same command goes on from there")
        return 128 + (stopped or [signal.SIGTERM])[0]                # in another process, where this one has no signal
    if run.main:                                                     # this takes minutes on a large model, without a bar
        print(f"{run.update} updates made; now student, fast and slow are compared on {config.num_eval_prompts} captions", flush=True)
    record = end(run)
    if record:
        write_card(config.output_dir)
        tell(record, config.output_dir)
    return 0


def finished(config):
    """The record in config.out/selection.json when a run with these settings has been through; None otherwise."""
    old, path = load_saved_config(config.output_dir, DistillConfig), Path(config.output_dir) / "selection.json"
    if not old or not path.is_file():
        return None
    record, told = json.loads(path.read_text(encoding="utf-8")), as_json(config)
    same = all(told[name] == old[name] for name in told if name not in HARMLESS)
    return record if same and record["train_steps"] == config.max_train_steps else None


@contextmanager
def signals_noted():
    """A list that fills with the SIGTERM or SIGINT that came within the block; a second Ctrl-C interrupts as usual."""
    stopped = []

    def note(number, frame):
        stopped.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tell(record, out):
    print(f"distance to the teacher's {record['teacher_steps']}-step endpoints after {record['train_steps']} updates:")
    for name, distance in record["endpoint_distance"].items():
        strength = lambda n: f" (strength {record['lora_scales'][name][n]:g})" if name in record["lora_scales"] else ""
        print(f"  {name:8}" + "".join(f"  {n} steps {d:.4f}{strength(n)}" for n, d in distance.items()))
    own, teachers = (record["endpoint_distance"][name] for name in (record["selected"], "teacher"))
    late = [n for n in own if own[n] >= .99 * teachers[n]]
    if late:
        print(f"  no nearer than the teacher itself at {', '.join(late)} steps: it has hardly learned (more updates, a higher lr)")
    print(f"the {record['selected']} adapter is saved as {out}/pytorch_lora_weights.safetensors")
