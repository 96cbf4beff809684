"""`scfm sample`: images from prompts."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import fields
from os.path import expanduser
from pathlib import Path

from scfm.commands.options import add_options, caption_word, make_parser, numbers
from scfm.data.animation import gif_beside
from scfm.data.caption_length import fewer_remarks, warn_of_long_captions
from scfm.data.prompts import read_prompts
from scfm.files import check_writable
from scfm.inference.config import InferenceConfig
from scfm.inference.step_lora import StepLora, describe_origin, format_scales, generate, save_images

MOST_STEPS = 1000  # more is a slip of the finger


def main(argv: Sequence[str]) -> int:
    """`scfm sample`: a flag for every field of InferenceConfig, the prompts, the steps, and where the image
    goes."""
    args = sample_parser().parse_args(argv)
    check_sample(args)
    config = InferenceConfig(**{f.name: getattr(args, f.name) for f in fields(InferenceConfig)}).resolved()
    config.check()
    check_output(Path(args.output))
    prompts, steps, scales = args.prompt or read_prompts(args.prompts), args.steps, args.lora_scale
    step_lora = StepLora(config)
    if scales is None:
        origin = describe_origin(step_lora.lora_scales, steps)
    else:
        origin, scales = "as given", scales * steps if len(scales) == 1 else scales
    warn_of_long_captions(step_lora.family, prompts)
    with fewer_remarks():
        images, scales = generate(step_lora, prompts, steps, scales, args.batch_size)
    save_images(images, args.output)
    of_videos = images.ndim == 5
    print(
        f"{args.output}{f' and {gif_beside(args.output).name}' if of_videos else ''}: {len(prompts)} "
        f"{'video' if of_videos else 'image'}{'s' * (len(prompts) > 1)}, {steps} step{'s' * (steps > 1)}, "
        f"LoRA scale {format_scales(scales)} ({origin})"
    )
    return 0


def sample_parser() -> ArgumentParser:
    """The flags of `scfm sample`."""
    parser = make_parser(
        "scfm sample",
        "Generates images of prompts in a few steps, by the stock pipeline with the LoRA at the scale that "
        "its file says.",
        'scfm sample --lora runs/mine --prompt "a red star" --steps 4 --output star.png',
    )
    add_options(parser, InferenceConfig)
    parser.add_argument(
        "--prompt",
        type=caption_word,
        action="append",
        default=[],
        help="a caption; may be given several times",
    )
    parser.add_argument("--prompts", type=expanduser, default="", help="text file of captions instead")
    parser.add_argument(
        "--steps",
        type=int,
        default=4,
        help="Euler steps, one network evaluation each; the LoRA's card says for how many it was made",
    )
    parser.add_argument(
        "--lora_scale",
        type=numbers(float),
        help="scale of the LoRA, or one for each step, such as .9,1.2,1.5 with --steps 3; what the LoRA's "
        "file says when not given, 0: the base without it",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="images generated together")
    parser.add_argument(
        "--output",
        type=expanduser,
        default="image.png",
        help="PNG file; several images become a grid, videos a strip of frames each and a GIF beside it",
    )
    return parser


def check_sample(args: Namespace) -> None:
    """ValueError for flags that do not go together."""
    if bool(args.prompt) == bool(args.prompts):
        raise ValueError("say either --prompt TEXT (several times if you like) or --prompts FILE")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size is {args.batch_size}: give 1 or more")
    if not 1 <= args.steps <= MOST_STEPS:
        raise ValueError(f"--steps is {args.steps}: give 1 to {MOST_STEPS}, a network evaluation each")
    if args.lora_scale is not None and len(args.lora_scale) not in (1, args.steps):
        raise ValueError(
            f"--lora_scale gives {len(args.lora_scale)} scales for {args.steps} steps: give one, or one for "
            "each step"
        )


def check_output(path: Path) -> None:
    """ValueError when the image cannot be written there."""
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder: name a file in it, such as {path / 'image.png'}")
    check_writable(path.parent, "take another --output")
