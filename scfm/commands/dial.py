"""`scfm dial`: the LoRA's strength for each number of steps."""

import argparse
from pathlib import Path

from scfm.commands.options import add_options, numbers
from scfm.data.images import read_folder
from scfm.data.prompts import read_prompts
from scfm.inference.model_card import save_lora_scales
from scfm.inference.step_lora import (
    InferenceConfig,
    StepLora,
    format_scales,
    search_lora_scales,
    search_schedules,
)
from scfm.training.config import load_settings


def main(argv):
    """`scfm dial`: a flag for every field of InferenceConfig, and how finely to look."""
    parser = argparse.ArgumentParser(
        prog="scfm dial",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Finds, for each number of steps, the strength of the LoRA whose endpoints lie nearest "
        "to the "
        "teacher's own. Stores the table in the LoRA's header, lora_scales.json and README.md "
        "beside it.",
    )
    add_options(parser, InferenceConfig)
    parser.add_argument("--prompts", default="", help="captions; empty: those of the run, or of its images")
    parser.add_argument("--count", type=int, default=64, help="captions to look at, one noise for each")
    parser.add_argument(
        "--steps", type=numbers(int), default=(1, 2, 3, 4, 8, 16), help="step counts of the table"
    )
    parser.add_argument(
        "--scales", type=numbers(float), default=tuple(i / 4 for i in range(9)), help="strengths to try"
    )
    parser.add_argument(
        "--each",
        type=numbers(int),
        default=(),
        help="step counts of --steps, such as "
        "2,3,4,8, that get a strength for "
        "each step "
        "of a walk as well: some 30 walks "
        "more for each count; a dial without "
        "it forgets older ones",
    )
    parser.add_argument("--goal_steps", type=int, default=64, help="steps of the teacher's own walks")
    args = vars(parser.parse_args(argv))
    path, count, steps, scales, each, goal_steps = (
        args.pop(k) for k in ("prompts", "count", "steps", "scales", "each", "goal_steps")
    )
    if min(count, goal_steps, *steps) < 1:
        raise ValueError("--count, --goal_steps and --steps: give 1 or more")
    if not set(each) <= set(steps):
        raise ValueError(
            f"--each {','.join(map(str, each))}: give step counts that --steps has too "
            f"({','.join(map(str, sorted(set(steps))))})"
        )
    config = InferenceConfig(**args)
    config.check()
    captions = read_prompts(path) if path else captions_of_run(config.lora)
    # fewer captions than asked: more noises for each
    captions = (captions * -(-count // len(captions)))[:count]
    step_lora = StepLora(config)
    scales = tuple(sorted({0.0, *scales}))  # 0 is the teacher: always a choice
    found, curve = search_lora_scales(
        step_lora, captions, tuple(sorted(set(steps))), scales, goal_steps, config.seed + 1
    )
    own = search_schedules(step_lora, captions, found, sorted(set(each)), goal_steps, config.seed + 1)
    found = found._replace(schedules=tuple(tuple(round(s, 3) for s in told.scales) for told in own.values()))
    save_lora_scales(step_lora, found, curve, captions, goal_steps)
    for n, scale in zip(found.steps, found.scales):
        print(
            f"{n:4} steps: strength {scale:<5g}  distance {curve[n, scale]:.4f}  (teacher "
            f"{curve[n, 0.0]:.4f})"
        )
    for n, told in own.items():
        print(f"{n:4} steps, each its own: {format_scales(told.scales)}  distance {told.distance:.4f}")
    print(f"stored in {step_lora.path}, lora_scales.json and README.md beside it")
    return 0


def captions_of_run(folder):
    """The captions that the run was made with: those of its prompts, or of its images. ValueError when it
    names neither."""
    told = load_settings(Path(folder) / "config.json") if (Path(folder) / "config.json").is_file() else {}
    if told.get("prompts"):
        return read_prompts(told["prompts"])
    if told.get("train_data_dir"):
        return [text for _, text in read_folder(told["train_data_dir"])]
    raise ValueError(f"{folder} does not name its captions: say --prompts FILE")
