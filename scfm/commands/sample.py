"""`scfm sample`: images from prompts."""

import argparse

from scfm.commands.options import add_options, numbers
from scfm.data.prompts import read_prompts
from scfm.inference.step_lora import InferenceConfig, StepLora, format_scales, generate, save_images


def main(argv):
    """`scfm sample`: a flag for every field of InferenceConfig, the prompts, the steps, and where the image
    goes."""
    parser = argparse.ArgumentParser(
        prog="scfm sample",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Generates prompts in a few steps, by the stock pipeline with the LoRA at the strength "
        "of its dial.",
    )
    add_options(parser, InferenceConfig)
    parser.add_argument("--prompt", action="append", default=[], help="a caption; may be given several times")
    parser.add_argument("--prompts", default="", help="text file of captions instead")
    parser.add_argument("--steps", type=int, default=4, help="Euler steps, one network evaluation each")
    parser.add_argument(
        "--scale",
        type=numbers(float),
        help="strength of the LoRA, or one for each step, "
        "such as .9,1.2,1.5 with --steps 3; what the "
        "dial says "
        "when not given, 0: the base without it",
    )
    parser.add_argument("--output", default="image.png", help="PNG file; several images become a grid")
    args = vars(parser.parse_args(argv))
    told, path, steps, scale, out = (args.pop(k) for k in ("prompt", "prompts", "steps", "scale", "output"))
    if bool(told) == bool(path):
        raise ValueError("say either --prompt TEXT (several times if you like) or --prompts FILE")
    if steps < 1:
        raise ValueError(f"--steps is {steps}: give 1 or more")
    if scale is not None and len(scale) not in (1, steps):
        raise ValueError(
            f"--scale gives {len(scale)} strengths for {steps} steps: give one, or one for each step"
        )
    config = InferenceConfig(**args)
    config.check()
    captions = told or read_prompts(path)
    step_lora = StepLora(config)
    whence = "as you said" if scale is not None else whence_of(step_lora.lora_scales, steps)
    images, scales = generate(
        step_lora, captions, steps, scale and (scale if len(scale) > 1 else scale * steps)
    )
    save_images(images, out)
    print(
        f"{out}: {len(captions)} image{'s' * (len(captions) > 1)}, {steps} step{'s' * (steps > 1)}, "
        f"strength {format_scales(scales)} ({whence})"
    )
    return 0


def whence_of(dial, steps):
    """Where the strength of so many steps comes from, in words."""
    if dial is None:
        return "the LoRA has no dial: scfm dial finds one"
    if any(len(scales) == steps for scales in dial.schedules):
        return "by its dial, a strength for each step"
    if steps in dial.steps:
        return "by its dial"
    below, above = (
        max((n for n in dial.steps if n < steps), default=None),
        min((n for n in dial.steps if n > steps), default=None),
    )
    if below and above:
        return f"between its dial's at {below} and {above} steps"
    return f"its dial's at {below or above} steps, the nearest that it has"
