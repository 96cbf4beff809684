"""`scfm demo`: distil the tiny Flux now, and set the result beside its teacher and beside the LoRA of a longer run.

Everything comes from the repository: the pipeline, its captions and the carried LoRA. The live run is the same code as
`scfm distill`, cut to what minutes allow.
"""
import argparse
import json
import os
import platform
import shutil
import time
from pathlib import Path

import torch

from scfm.training.config import read_settings
from scfm.models.lora_file import read_lora_scales
from scfm.method.ema import shorten
from toy.judge import STOCK, Entry, Judge, SHIFTS, table
from toy.pipelines import FLUX, GUIDANCE, WEIGHTS

PROMPTS = WEIGHTS / "prompts.txt"
CARRIED = WEIGHTS / "lora"
RECIPE = CARRIED / "config.json"


def main(argv=None):
    args = parse(argv)
    start, out = time.time(), Path(args.out)
    from diffusers.utils import logging  # heavy imports wait until the flags are known to be right
    from scfm.training.selection import finish
    from scfm.training.distill_trainer import DistillTrainer
    logging.set_verbosity_error()  # diffusers remarks that our LoRA has nothing for the text encoders
    live = out / "live"
    shutil.rmtree(live, ignore_errors=True)  # a demo starts from nothing
    out.mkdir(parents=True, exist_ok=True)

    print(f"1/3  live distillation of {FLUX.name}: at most {args.seconds} s, {args.updates} updates", flush=True)
    config = live_config(live, args.updates, args.prompts, min(32, args.captions))
    print(f"     (EMA decays {config.ema_decay_fast:.3f} and {config.ema_decay_slow:.3f}: scaled to the short run from "
          ".99 and .999)", flush=True)
    run = DistillTrainer(config)
    deadline = time.time() + args.seconds
    run.train(keep_going=lambda: time.time() < deadline)
    live_choice = finish(run)

    print(f"2/3  judging on {args.captions} captions of pairs that no training image showed", flush=True)
    record, judge, carried = compare(run, live_choice, args.captions)
    print("\n" + table(record["entries"]) + "\n\n" + explain(record), flush=True)

    print("3/3  writing", out / "comparison.png", "and", out / "results.json")
    draw_comparison(run, live_choice, carried, judge, out / "comparison.png")
    record["seconds_in_all"] = round(time.time() - start)
    write(out / "results.json", record)
    print(f"     done in {record['seconds_in_all']} s")
    return 0


def parse(argv):
    parser = argparse.ArgumentParser(prog="scfm demo", description=__doc__,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output_dir", default="runs/demo", help="folder of comparison.png and results.json")
    parser.add_argument("--max_train_steps", type=int, default=300, help="updates of the live run, at most")
    parser.add_argument("--seconds", type=int, default=85, help="seconds of the live run, at most")
    parser.add_argument("--prompts", default=str(PROMPTS), help="captions that the teacher generates for the live run")
    parser.add_argument("--captions", type=int, default=128, help="captions on which all are judged")
    args = parser.parse_args(argv)
    for name in ("updates", "seconds", "captions"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}: give 1 or more")
    return args


def live_config(out, updates, prompts=PROMPTS, judge=32):
    """The recipe of the carried LoRA, with the memories of the EMAs scaled to the number of updates."""
    from scfm.training.config import DistillConfig
    return DistillConfig(**{**read_settings(RECIPE), "pipeline": str(FLUX), "prompts": str(prompts), "out": str(out),
                        "updates": updates, "ema_decay_fast": shorten(.99, updates), "ema_decay_slow": shorten(.999, updates),
                        "validation_steps": 0, "tracker": "none", "judge": judge, "eval_num_steps": (1, 2, 3, 4, 8),
                        "eval_lora_scales": (.5, .75, 1., 1.25)})


def compare(run, live_choice, captions):
    """Judges the teacher, the live student and the carried LoRA by one protocol."""
    models, carried = run.models, carried_lora()
    judge = Judge(carried.family, captions)
    judge.set_goal(models.teacher)
    live = live_student(run, live_choice)
    entries = [Entry("teacher", lambda steps: models.teacher, SHIFTS),
               Entry(f"live student ({live_choice['updates']} updates), its dial", live, (STOCK,)),
               Entry("carried LoRA, strength 1", lambda steps: carried.at(1), (STOCK,)),
               Entry("carried LoRA, its dial", lambda steps: carried.at(carried.dial.scale(steps)), (STOCK,))]
    record = {"captions": captions, "seeds": 1, "guidance": GUIDANCE, "goal": "teacher, 32 steps, shift 3",
              "reference": "4000 drawings of held-out pairs", "frechet_floor": judge.floor(),
              "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}",
              "live": live_choice, "dial": dict(zip(carried.dial.steps, carried.dial.scales)),
              "entries": judge.record(entries)}
    return record, judge, carried


def live_student(run, choice):
    """steps -> the field of the adapter that won, at the strength of its dial."""
    dial = read_lora_scales(run.out / "pytorch_lora_weights.safetensors")
    return lambda steps: run.models.field(choice["ships"], dial.scale(steps))


def carried_lora():
    """The LoRA of the repository on a pipeline of its own, with its dial."""
    from scfm.inference.step_lora import StepLora, InferenceConfig
    return StepLora(InferenceConfig(lora=str(CARRIED), pretrained_model_name_or_path=str(FLUX)))


def explain(record):
    return ("prompt acc.: share of the attributes named by the caption that a classifier sees (higher is better)\n"
            f"Frechet: distance on that classifier's features to drawings, not FID; {record['captions']} fresh drawings "
            f"score {record['frechet_floor']:.3f} (lower is better)\n"
            "endpoint: root mean square distance, in latents, to the teacher's 32-step endpoint from the same noise\n"
            "its dial: the LoRA's strength by number of steps ("
            + ", ".join(f"{n}: {s:g}" for n, s in record["dial"].items()) + "), found without data by `scfm dial`\n"
            "best shift per column: each column at whichever of the shifts "
            f"{', '.join(f'{s:g}' for s in SHIFTS)} is best for it")


def draw_comparison(run, live_choice, carried, judge, path, columns=12):
    """Rows of samplers, columns of captions; the noise of a column is the same in every row."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    models = run.models
    student = live_student(run, live_choice)
    turned = lambda steps: carried.at(carried.dial.scale(steps))
    rows = [("teacher, 32 steps", models.teacher, 32), ("teacher, 3 steps", models.teacher, 3),
            ("teacher, 4 steps", models.teacher, 4), ("live student, 3 steps", student(3), 3),
            ("live student, 4 steps", student(4), 4), ("carried LoRA, 3 steps", turned(3), 3),
            ("carried LoRA, 4 steps", turned(4), 4)]
    figure, axes = plt.subplots(len(rows), columns, figsize=(columns + 1.6, len(rows) + .9))
    for line, (name, field, steps) in zip(axes, rows):
        images = judge.family.decode(judge.endpoints(field, steps, STOCK, columns))
        for ax, image in zip(line, images):
            ax.imshow((image.permute(1, 2, 0).numpy() + 1) / 2, interpolation="nearest")
            ax.set_xticks([]), ax.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for ax, caption in zip(axes[0], judge.captions.text):
        ax.set_title(fold(caption), fontsize=6.5)
    figure.tight_layout(pad=.3)
    figure.savefig(str(path) + ".new", dpi=90, format="png")
    plt.close(figure)
    os.replace(str(path) + ".new", path)


def fold(caption, width=16):
    import textwrap
    return "\n".join(textwrap.wrap(caption, width))


def write(path, record):
    new = path.with_suffix(".new")
    new.write_text(json.dumps(record, indent=1))
    os.replace(new, path)


if __name__ == "__main__":
    raise SystemExit(main())
