"""The emoji pipeline and its few-step student from the same noise:  python -m toy.emoji.compare

The student is a pair of LoRAs whose scale is the step size (nbs/learn/06_step_scale), distilled by
`scfm distill --config emoji-step-scaled`. A row for each number of steps, a column for each caption.
"""

import argparse
from pathlib import Path
from typing import Any

from toy.emoji import sheet
from toy.emoji.data import CONFIG
from toy.grid import draw_grid, step_label

LORA = CONFIG.with_name("emoji_lora")
HELD_OUT = (
    "scientist, medium skin tone, fluent style",
    "camel, fluent style",
)  # combinations never trained on
CAPTIONS = (*sheet.CAPTIONS, *HELD_OUT)
TEACHER, STUDENT = (32, 1, 2, 4), (1, 2, 4, 8)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    captions = args.captions or CAPTIONS
    rows = sample_rows(load(args.lora, args.folder), captions)
    draw_grid(rows, captions, Path(args.output_file), dpi=args.dpi)
    print(args.output_file)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lora", default=str(LORA), help="folder of the pair of LoRAs")
    parser.add_argument("--folder", default=str(CONFIG), help="the pipeline")
    parser.add_argument("--captions", nargs="+", help="in place of the built-in ones")
    parser.add_argument("--output_file", default="emoji.png")
    parser.add_argument("--dpi", type=int, default=90)
    return parser.parse_args(argv)


def load(lora: str | Path = LORA, folder: str | Path = CONFIG) -> Any:
    """The pipeline with the pair of LoRAs, a `StepLora`."""
    from scfm.inference.step_lora import InferenceConfig, StepLora

    return StepLora(InferenceConfig(lora=str(lora), pretrained_model_name_or_path=str(folder)))


def sample_rows(step_lora: Any, captions: Any) -> list[tuple[str, Any]]:
    """[(label, images)] of the teacher (the LoRAs at scale 0) and of the student, from the same noises."""
    from scfm.inference.step_lora import generate

    rows = [(step_label("teacher", n), generate(step_lora, captions, n, 0.0)[0]) for n in TEACHER]
    return rows + [(step_label("student", n), generate(step_lora, captions, n)[0]) for n in STUDENT]


if __name__ == "__main__":
    raise SystemExit(main())
