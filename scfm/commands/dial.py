"""`scfm dial`: the best LoRA scale for each number of steps."""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import fields
from os.path import expanduser

from scfm.commands.options import add_options, make_parser, numbers
from scfm.data.caption_length import fewer_remarks, warn_of_long_captions
from scfm.files import check_writable
from scfm.inference.adapters import require_whole_fit
from scfm.inference.config import InferenceConfig, load_captions
from scfm.inference.model_card import save_lora_scales
from scfm.inference.search import SCALES, STEPS, Curve, search_lora_scales, search_schedules
from scfm.inference.step_lora import StepLora, format_scales
from scfm.method.lora_scale import LoraScales
from scfm.method.scale_schedule import ScaleSchedule


def main(argv: Sequence[str]) -> int:
    """`scfm dial`: a flag for every field of InferenceConfig, and how finely to search."""
    args = dial_parser().parse_args(argv)
    check_search(args)
    config = InferenceConfig(**{f.name: getattr(args, f.name) for f in fields(InferenceConfig)}).resolved()
    config.check()
    mend = "the scales go into the LoRA's file, which is written anew: copy its folder to where that can be"
    check_writable(config.lora, mend, config.weights.stat().st_size)
    captions = load_captions(args.prompts, config.lora, args.num_prompts)
    step_lora, seed = StepLora(config), config.seed + 1
    require_whole_fit(step_lora.pipe)
    steps, per_step = sorted(set(args.steps)), sorted(set(args.per_step))
    scales = sorted({0.0, *args.lora_scales})  # 0 is the teacher: always shown
    warn_of_long_captions(step_lora.family, captions)
    with fewer_remarks():
        lora_scales, curve = search_lora_scales(step_lora, captions, steps, scales, args.target_steps, seed)
        schedules = search_schedules(step_lora, captions, lora_scales, per_step, args.target_steps, seed)
    rounded = tuple(tuple(round(scale, 3) for scale in schedule.scales) for schedule in schedules.values())
    lora_scales = lora_scales._replace(schedules=rounded)
    card = save_lora_scales(step_lora, lora_scales, curve, captions, args.target_steps)
    print_search(lora_scales, curve, schedules)
    print(f"stored in {step_lora.path}, lora_scales.json and {card.name} beside it")
    return 0


def dial_parser() -> ArgumentParser:
    """The flags of `scfm dial`."""
    parser = make_parser(
        "scfm dial",
        "Finds, for each number of steps, the LoRA scale at which the LoRA's endpoints lie nearest to the "
        "teacher's own. Stores the table in the LoRA's header, lora_scales.json and the model card beside "
        "it.",
        "scfm dial --lora runs/mine",
    )
    add_options(parser, InferenceConfig)
    parser.add_argument(
        "--prompts", type=expanduser, default="", help="captions; empty: those of the run, or of its images"
    )
    parser.add_argument("--num_prompts", type=int, default=64, help="captions compared, one noise for each")
    parser.add_argument("--steps", type=numbers(int), default=STEPS, help="step counts of the table")
    parser.add_argument("--lora_scales", type=numbers(float), default=SCALES, help="LoRA scales to try")
    parser.add_argument(
        "--per_step",
        type=numbers(int),
        default=(),
        help="step counts of --steps, such as 2,3,4,8, that get a LoRA scale for each step as well: some 30 "
        "paths more for each count; without it, older ones are forgotten",
    )
    parser.add_argument("--target_steps", type=int, default=64, help="steps of the teacher's own path")
    return parser


def check_search(args: Namespace) -> None:
    """ValueError for a search that cannot be made."""
    if min(args.num_prompts, args.target_steps, *args.steps, len(args.steps)) < 1:
        raise ValueError("--num_prompts, --target_steps and --steps: give 1 or more")
    if min((*args.lora_scales, 0)) < 0:
        raise ValueError(f"--lora_scales has {min(args.lora_scales):g}: give scales of 0 or more")
    if not set(args.per_step) <= set(args.steps):
        raise ValueError(
            f"--per_step {','.join(map(str, args.per_step))}: give step counts that --steps has too "
            f"({','.join(map(str, sorted(set(args.steps))))})"
        )


def print_search(lora_scales: LoraScales, curve: Curve, schedules: Mapping[int, ScaleSchedule]) -> None:
    """The LoRA scale of each step count, and its distance beside the teacher's."""
    for n, scale in zip(lora_scales.steps, lora_scales.scales, strict=True):
        print(
            f"{n:4} steps: LoRA scale {scale:<5g}  distance {curve[n, scale]:.4f}  (teacher "
            f"{curve[n, 0.0]:.4f})"
        )
    for n, schedule in schedules.items():
        scales = format_scales(schedule.scales)
        print(f"{n:4} steps, one scale for each: {scales}  distance {schedule.distance:.4f}")
