"""Captions of the emoji:  python -m toy.emoji.captions --data FILE --output_file prompts.txt

Draws of the captions of training images, each once, a line each: what `scfm distill --prompts` asks the
teacher for, so that distilling the carried pipeline needs no data set. With --held_out one caption of each
combination that was never trained on, which says all that it is: what a student is judged on. With --images
the images lie beside, as an image folder that `scfm evaluate --reference_dir` compares with.
"""

import argparse
import json
import os
import random
from pathlib import Path

import torch
from PIL import Image

from scfm.files import atomic_write
from toy.emoji.data import CONFIG, Emojis, draw_caption, draw_weights, load_emoji, split


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    train, held_out = split(load_emoji(args.data), args.folder)
    captions = [row.name for row in held_out.rows] if args.held_out else draw_captions(train, args.count)
    text = "\n".join(captions) + "\n"
    Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(Path(args.output_file), lambda new: new.write_text(text, encoding="utf-8"))
    print(f"{args.output_file}: {len(captions)} captions")
    if args.images:
        save_images(held_out if args.held_out else train, Path(args.images))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    file = os.environ.get("EMOJI_DATA")
    parser.add_argument("--data", default=file, required=not file, help="the parquet file (or $EMOJI_DATA)")
    parser.add_argument("--folder", default=str(CONFIG), help="the pipeline, whose held_out.json is read")
    parser.add_argument("--output_file", default="prompts.txt")
    parser.add_argument("--count", type=int, default=1024, help="captions of training images")
    parser.add_argument("--held_out", action="store_true", help="the held-out combinations instead")
    parser.add_argument("--images", help="folder that the images of this part are written to")
    return parser.parse_args(argv)


def draw_captions(data: Emojis, count: int, seed: int = 0) -> list[str]:
    """`count` different captions, drawn as training draws them. ValueError when there are not so many."""
    generator, words = torch.Generator().manual_seed(seed), random.Random(seed)
    found: dict[str, None] = {}
    for row in torch.multinomial(draw_weights(data.rows), 100 * count, True, generator=generator).tolist():
        found[draw_caption(data.rows[row], words).text] = None
        if len(found) == count:
            return list(found)
    raise ValueError(
        f"--count {count}: in {100 * count} draws there were {len(found)} captions: ask for fewer"
    )


def save_images(data: Emojis, folder: Path) -> None:
    """The images as PNG files, with metadata.jsonl that names what each shows."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (pixels, row) in enumerate(zip(data.pixels, data.rows, strict=True)):
        name = f"{number:05d}.png"
        Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": row.name}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{folder}: {len(lines)} images")


if __name__ == "__main__":
    raise SystemExit(main())
