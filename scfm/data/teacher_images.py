"""The teacher's image of each caption, in a folder that says how each came about."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from scfm.data.animation import frames_of, save_png
from scfm.data.caption_length import fewer_remarks
from scfm.data.images import BROKEN, Size, in_chunks, in_threads, not_finite
from scfm.data.prompts import json_lines
from scfm.files import atomic_write
from scfm.models.sampling import euler_endpoints, start_noise, stock_shift, together
from scfm.streams import Stream, keyed_generator
from scfm.types import Family

Row = dict[str, Any]  # a line of metadata.jsonl
MARK = "scfm"  # the text chunk in which an image says of which row it is


def generate_images(
    families: Family | Mapping[Size, Family],
    captions: Sequence[str],
    folder: str | Path,
    steps: int = 32,
    guidance: float = 3.5,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
    process: tuple[int, int] = (0, 1),
    pipeline: str = "",
) -> Path:
    """The teacher's image of each caption as `folder`/00000.png and so on, with `metadata.jsonl` beside them;
    or its videos, as animated PNG files.

    families: a family, or {(height, width): family} of which each image draws one.
    steps, guidance: obeyed as given; the shift is that of the stock pipeline.
    batch_size: images generated together, or videos, of which fewer are.
    process: (number, count) of the processes that share the work, which may run at once.
    pipeline: its fingerprint, which each row remembers.
    Resumes: whole images stay. Returns the folder. ValueError when it was begun with other captions, steps,
    guidance, seed or sizes.
    """
    folder = Path(folder)
    by_size: Mapping[Size, Family] = (
        families if isinstance(families, Mapping) else {(families.height, families.width): families}
    )
    rows = listing_rows(by_size, captions, steps, guidance, seed, pipeline)
    missing = begin_listing(folder, rows)
    alike = [
        [i for i, row in enumerate(rows) if (row["height"], row["width"]) == size] for size in sorted(by_size)
    ]
    batch_size = together(next(iter(by_size.values())), batch_size)
    chunks = [chunk for numbers in alike for chunk in in_chunks(numbers, batch_size)]
    mine = [chunk for chunk in chunks[process[0] :: process[1]] if missing & set(chunk)]
    total = sum(len(missing & set(chunk)) for chunk in mine)
    with fewer_remarks(), tqdm(total=total, desc="teacher's images", disable=not progress) as bar:
        for chunk in mine:
            for i, image in zip(chunk, generate(by_size, [rows[i] for i in chunk], chunk), strict=True):
                if i in missing:
                    write_image(folder / rows[i]["file_name"], image, rows[i])
                    bar.update(1)
    return folder


def drawn_size(sizes: Sequence[Size], number: int, seed: int) -> Size:
    """The size in which image `number` is generated: one of `sizes`, evenly."""
    generator = keyed_generator(seed, number, Stream.RESOLUTION)
    return sizes[int(torch.randint(len(sizes), (), generator=generator))]


def listing_rows(
    families: Mapping[Size, Family],
    captions: Sequence[str],
    steps: int,
    guidance: float,
    seed: int,
    pipeline: str = "",
) -> list[Row]:
    """The lines of metadata.jsonl: how each image comes about."""
    # in whatever order they were named
    rows, sizes = [], sorted(families)
    for i, caption in enumerate(captions):
        height, width = drawn_size(sizes, i, seed)
        family = families[height, width]
        rows.append(
            {
                "file_name": f"{i:05d}.png",
                "text": caption,
                "seed": seed,
                "steps": steps,
                "guidance": guidance,
                "shift": stock_shift(family),
                "height": height,
                "width": width,
            }
        )
        if pipeline:
            rows[-1]["pipeline"] = pipeline
        frames = getattr(family, "num_frames", 1)
        if frames > 1:
            rows[-1]["num_frames"] = frames
        negative_prompt = getattr(family, "negative_prompt", "")
        if negative_prompt:
            rows[-1]["negative_prompt"] = negative_prompt
    return rows


def begin_listing(folder: Path, rows: Sequence[Row]) -> set[int]:
    """The numbers of the images that are missing or damaged. The first process writes the list of all, or
    finds its own.

    An image counts only when it carries the mark of its row, which says its caption too: where the list is
    gone, those that carry theirs are listed again. ValueError when the list that is there is another one, or
    when a file of an image's name is not of this command.
    """
    listing, text = folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows)
    states = in_threads(lambda row: state_of(folder / row["file_name"], row), rows)
    if listing.is_file():
        if listing.read_text(encoding="utf-8") != text:
            raise ValueError(f"{folder} {difference(listing, rows)}")
    unknown = [
        row["file_name"] for row, state in zip(rows, states, strict=True) if state not in ("missing", "whole")
    ]
    if unknown and not listing.is_file():
        raise ValueError(
            f"{folder} holds {unknown[0]}, but no metadata.jsonl that says what it is: take another folder"
        )
    foreign = [row["file_name"] for row, state in zip(rows, states, strict=True) if state == "foreign"]
    if foreign:
        raise ValueError(
            f"{folder}/{foreign[0]} was not made by this command, and would be overwritten: take another "
            f"folder"
        )
    if not listing.is_file():
        atomic_write(listing, lambda new: new.write_text(text, encoding="utf-8"))
    return {i for i, state in enumerate(states) if state != "whole"}


def mark_of(row: Row) -> str:
    """What an image carries of its row."""
    return hashlib.sha256(json.dumps(row).encode()).hexdigest()[:24]


def state_of(path: Path, row: Row) -> str:
    """Of an image file: "missing", "whole" (of this row), "damaged" (a PNG cut short), or "foreign"."""
    if not path.is_file():
        return "missing"
    if path.stat().st_size == 0:
        return "damaged"
    try:
        with Image.open(path) as opened:
            mark = opened.info.get(MARK)
            opened.verify()
    except BROKEN:
        return "damaged"
    return "whole" if mark == mark_of(row) else "foreign"


def write_image(path: Path, image: torch.Tensor, row: Row) -> None:
    """A PNG file, of an image (3, H, W) or a video (F, 3, H, W) in [-1, 1], that says of which row it is."""
    info = PngImagePlugin.PngInfo()
    info.add_text(MARK, mark_of(row))
    atomic_write(path, lambda new: save_png(frames_of(image), new, pnginfo=info))


def difference(listing: Path, rows: Sequence[Row]) -> str:
    """In what a listing that is there differs, and the mend."""
    there = [row for _, row in json_lines(listing)]
    if len(there) < len(rows) and all(row in rows for row in there):  # taken out by hand, for a reason or not
        return (
            f"lists {len(there)} of the {len(rows)} images of this command: to have the others back, delete "
            f"{listing}, and run it again; to do without them, say --train_data_dir {listing.parent}, and no "
            "--prompts"
        )
    if len(there) != len(rows):
        what = f"{len(there)} images, not {len(rows)}"
    else:
        pairs = zip(there, rows, strict=True)
        what = ", ".join(sorted({name for old, new in pairs for name in new if old.get(name) != new[name]}))
    return f"was begun with other captions or settings ({what}): take another folder"


@torch.no_grad()
def generate(families: Mapping[Size, Family], rows: Sequence[Row], numbers: Sequence[int]) -> torch.Tensor:
    """The images (n, 3, H, W) in [-1, 1], or videos, of rows of metadata.jsonl that have one size."""
    first = rows[0]
    family = families[first["height"], first["width"]]

    def velocity(x: torch.Tensor, t: torch.Tensor, cond: Any = None) -> torch.Tensor:
        return family.velocity(family.pipe.transformer, x, t, cond)

    endpoints = euler_endpoints(
        family,
        velocity,
        [row["text"] for row in rows],
        start_noise(family, numbers, first["seed"]),
        first["steps"],
        first["shift"],
        first["guidance"],
        len(rows),
    )
    images = family.decode(endpoints.to(family.pipe.device)).cpu().float()
    for row, latents, image in zip(rows, endpoints, images, strict=True):
        if not (latents.isfinite().all() and image.isfinite().all()):
            part = "VAE" if latents.isfinite().all() else "transformer"
            raise not_finite(part, row["file_name"], family.pipe.dtype)
    return images
