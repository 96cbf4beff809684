"""What the emoji pipeline makes:  python -m toy.emoji.sheet --folder toy/weights/emoji

A row per caption, a column per step count, all of a row from the same noise. With --lora, the student's
columns follow, by stock diffusers with the scales of its card. With --data, two columns more: the training
image nearest to the teacher's sample of the most steps, and for a held-out combination (marked with a star)
the image that was never trained on.
"""

import argparse
import os
import textwrap
from pathlib import Path

import torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw
from torch.nn import functional as F

from scfm.models.loading import no_loading_bars
from scfm.models.lora import WEIGHT_NAME
from scfm.models.lora_file import read_lora_scales
from scfm.models.scaled_lora import power_file
from toy.emoji.data import CONFIG, SIDE, TOKENS, Emojis, load_emoji, split

STEPS = (1, 2, 3, 4, 8, 32)
CAPTIONS = (
    "a red apple",
    "a cat with tears of joy, fluent style",
    "waving hand, dark skin tone",
    "pizza, noto style",
    "grinning face with big eyes",
    "woman astronaut, medium skin tone, fluent style",
    "a dog face",
    "red heart",
    "bicycle",
    "man cook, light skin tone, noto style",
)
EDGE, MARGIN, LINE = 4, 300, 22  # pixels between images, for the captions, for the head


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    captions, held = list(args.captions or CAPTIONS), []
    if args.data:
        train, out = split(load_emoji(args.data), args.folder)
        held = pick(out, args.held_out)
        captions += [out.rows[i].name for i in held]
    pipe = load(args.folder)
    columns = [sample(pipe, captions, args, steps) for steps in args.steps]
    heads, most = [f"{s} step" + "s" * (s > 1) for s in args.steps], columns[-1]
    if args.lora:
        columns += [sample(pipe, captions, args, steps, scale) for steps, scale in student(pipe, args)]
        heads += [f"student {steps}" for steps in args.student_counts]
    stars = [False] * (len(captions) - len(held)) + [True] * len(held)
    if args.data:
        columns.append(nearest(most, train))
        blank = torch.full((len(captions) - len(held), 3, SIDE, SIDE), 255, dtype=torch.uint8)
        columns.append(torch.cat([blank, out.pixels[held]]))
        heads += ["nearest", "held out"]
    draw_sheet(columns, captions, heads, stars).save(args.output_file)
    print(args.output_file)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default=str(CONFIG), help="the pipeline")
    parser.add_argument("--data", default=os.environ.get("EMOJI_DATA"), help="the parquet file, if at hand")
    parser.add_argument("--output_file", default="sheet.png")
    parser.add_argument("--captions", nargs="*", help="in place of the built-in ones")
    parser.add_argument("--held_out", type=int, default=6, help="rows of held-out combinations")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="step counts")
    parser.add_argument("--lora", help="folder of the student, a pair of LoRAs")
    parser.add_argument("--student_counts", type=int, nargs="+", default=[1, 2, 4], help="of the student")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale")
    parser.add_argument(
        "--cfg", action="store_true", help="guide by a second, empty caption: before the stage `guide`"
    )
    parser.add_argument("--shift", type=float, help="time shift (default: the scheduler's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(argv)


def load(folder: str | Path) -> FluxPipeline:
    with no_loading_bars():
        pipe = FluxPipeline.from_pretrained(str(folder), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def pick(out: Emojis, count: int) -> list[int]:
    """Held-out rows, spread evenly over the list."""
    count = min(count, len(out.rows))
    return [i * len(out.rows) // count for i in range(count)] if count else []


def student(pipe: FluxPipeline, args: argparse.Namespace) -> list[tuple[int, float]]:
    """[(steps, LoRA scale)] of the student, whose two LoRAs join the pipeline."""
    for name, file in (("step", WEIGHT_NAME), ("step_2", power_file(WEIGHT_NAME, 2).name)):
        pipe.load_lora_weights(args.lora, weight_name=file, adapter_name=name)
    scales = read_lora_scales(Path(args.lora) / WEIGHT_NAME)
    assert scales is not None and scales.order == 2
    return [(steps, scales.scale(steps)) for steps in args.student_counts]


@torch.no_grad()
def sample(
    pipe: FluxPipeline, captions: list[str], args: argparse.Namespace, steps: int, scale: float | None = None
) -> torch.Tensor:
    """Images (n, 3, 64, 64) uint8, from the same noise whatever the steps. scale: of the student's LoRAs."""
    channels = pipe.transformer.config.in_channels
    tokens = (SIDE // pipe.vae_scale_factor // 2) ** 2
    noise = torch.randn(len(captions), tokens, channels, generator=torch.Generator().manual_seed(args.seed))
    if args.shift:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=args.shift)
    if scale is not None:
        pipe.set_adapters(["step", "step_2"], [scale, scale**2])
    guide = {"guidance_scale": args.guidance}
    if args.cfg:
        guide = {
            "guidance_scale": 1.0,
            "true_cfg_scale": args.guidance,
            "negative_prompt": [""] * len(captions),
        }
    images = pipe(
        captions,
        height=SIDE,
        width=SIDE,
        num_inference_steps=steps,
        latents=noise.to(pipe.device),
        max_sequence_length=TOKENS,
        output_type="pt",
        **guide,
    ).images
    return (images.cpu() * 255).round().to(torch.uint8)


def nearest(images: torch.Tensor, train: Emojis) -> torch.Tensor:
    """The training image at the smallest distance in pixels, averaged over squares of four."""
    ours, theirs = (F.avg_pool2d(p.float(), 4).flatten(1) for p in (images, train.pixels))
    return train.pixels[torch.cdist(ours, theirs).argmin(1)]


def draw_sheet(
    columns: list[torch.Tensor], captions: list[str], heads: list[str], stars: list[bool]
) -> Image.Image:
    cell = SIDE + EDGE
    sheet = Image.new("RGB", (MARGIN + cell * len(columns), LINE + cell * len(captions)), "white")
    pen = ImageDraw.Draw(sheet)
    for j, (head, column) in enumerate(zip(heads, columns, strict=True)):
        pen.text((MARGIN + j * cell + 4, 4), head, fill="black")
        for i, pixels in enumerate(column):
            image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
            sheet.paste(image, (MARGIN + j * cell, LINE + i * cell))
    for i, (caption, star) in enumerate(zip(captions, stars, strict=True)):
        words = textwrap.fill(("* " if star else "") + caption, 44)
        pen.text((6, LINE + i * cell + 20), words, fill="black")
    return sheet


if __name__ == "__main__":
    raise SystemExit(main())
