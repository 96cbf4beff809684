"""Images of a folder: what is listed, what opens, in which size bucket, read upright and cut to size."""

import hashlib
import io
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

from scfm.data.prompts import COLUMNS, caption_in, json_lines, table_rows, text_lines

Size = tuple[int, int]  # (height, width) in pixels
# how Pillow says that a file is no image
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif")
Item = TypeVar("Item")
Result = TypeVar("Result")


class UnknownRange(ValueError):
    """An image whose pixels cannot be brought to 8 bits, as nothing says what their white is."""


class ListedImage(NamedTuple):
    """An image of a folder as it was when it was read. digest: of its bytes; height, width: upright, in
    pixels."""

    path: Path
    caption: str
    digest: str
    height: int
    width: int


def open_image(source: str | Path | bytes) -> Image.Image:
    """An image file as a person sees it, `as_seen`. source: a path, or the bytes of a file.

    ValueError with the reason when it cannot be read.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            opened.load()  # a header may be whole where the pixels are not
            return as_seen(opened)
    except BROKEN as error:
        reason = (
            str(error)
            if isinstance(error, UnknownRange)
            else f"does not open as an image ({type(error).__name__})"
        )
        raise ValueError(reason) from None


def as_seen(image: Image.Image) -> Image.Image:
    """The image in RGB: upright, on white where it is transparent, 16 bits brought to 8. `UnknownRange` for
    other pixels."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnknownRange(
            f"has pixels of mode {image.mode}, whose range is unknown: save it with 8 or 16 bits a channel"
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def list_images(folder: str | Path) -> list[ListedImage]:
    """The images that a folder lists, each opened once. Errors as of `read_folder`; ValueError that names all
    broken ones."""
    pairs = read_folder(folder)
    facts = refuse_broken(in_threads(try_to_inspect, [path for path, _ in pairs]))
    return [ListedImage(path, caption, *f) for (path, caption), f in zip(pairs, facts, strict=True)]


def refuse_broken(inspected: Sequence[tuple[str, int, int] | str]) -> list[tuple[str, int, int]]:
    """What was found, or a ValueError that names all in whose place there is an error in words."""
    broken = [facts for facts in inspected if isinstance(facts, str)]
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise ValueError(f"{'; '.join(broken[:5])}{more}: mend them, or take them out of metadata.jsonl")
    return [facts for facts in inspected if not isinstance(facts, str)]


def inspect_image(path: Path) -> tuple[str, int, int]:
    """(hash of the bytes, height, width) of an image as it is seen upright. ValueError names one that cannot
    be read."""
    data = path.read_bytes()
    try:
        image = open_image(data)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    return hashlib.sha256(data).hexdigest(), image.height, image.width


def try_to_inspect(path: Path) -> tuple[str, int, int] | str:
    """What `inspect_image` gives, or its error in words."""
    try:
        return inspect_image(path)
    except ValueError as error:
        return str(error)


def read_image(path: str | Path, height: int, width: int) -> torch.Tensor:
    """(3, height, width) in [-1, 1]: as `open_image` has it, scaled to cover the size, then cut in the
    middle.

    ValueError names a broken file.
    """
    try:
        image = open_image(path)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    return cut_to_size(image, height, width)


def cut_to_size(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """(3, height, width) in [-1, 1]: an image scaled to cover the size, then cut in the middle."""
    scale = max(height / image.height, width / image.width)
    if scale != 1:
        size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return pil_to_tensor(image.crop((left, top, left + width, top + height))).float() / 127.5 - 1


def is_image(path: Path) -> bool:
    """Whether a path may be an image: a file with such a suffix."""
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def caption_file(path: Path) -> Path:
    """Where the caption of an image lies, or of a video that is a folder of frames: beside it."""
    return path.with_name(f"{path.name}.txt") if path.is_dir() else path.with_suffix(".txt")


def read_folder(folder: str | Path, counts: Callable[[Path], bool] = is_image) -> list[tuple[Path, str]]:
    """[(image path, caption)] of an `imagefolder`: metadata.jsonl or metadata.csv with file_name and text
    in each row, or a .txt file with the caption beside each image.

    counts: which paths have a caption beside them, where there is no list
    FileNotFoundError or ValueError that name the file, the line and what is missing.
    """
    folder = Path(folder)
    listing = folder / "metadata.jsonl"
    if listing.is_file():
        rows = json_lines(listing)
    elif (listing := folder / "metadata.csv").is_file():
        rows = table_rows(listing)
    else:
        return read_side_captions(folder, counts)
    pairs = []
    for number, row in rows:
        where = f"{listing}, line {number}"
        if not isinstance(row.get("file_name"), str) or not set(COLUMNS) & set(row):
            raise ValueError(
                f"{where}: needs file_name and text (it has {', '.join(map(str, row)) or 'nothing'})"
            )
        caption = caption_in(row, where)
        pairs.append((find_image(folder, row["file_name"], where, counts), caption))
    if not pairs:
        raise ValueError(f"{listing} lists no image")
    return pairs


def read_side_captions(folder: Path, counts: Callable[[Path], bool] = is_image) -> list[tuple[Path, str]]:
    """[(image path, caption)] of a folder with NAME.txt beside each image, in the order of names."""
    example = '{"file_name": "cat.png", "text": "a cat"}'
    images = sorted(filter(counts, folder.glob("*"))) if folder.is_dir() else []
    captioned = [path for path in images if caption_file(path).is_file()]
    if not captioned:
        below = next(iter(sorted(folder.glob("*/**/metadata.jsonl"))), None) if folder.is_dir() else None
        hint = f"; there is one in {below.parent}: name that folder" if below else ""
        raise FileNotFoundError(
            f"no metadata.jsonl in {folder}: write one line an image, {example}, or a cat.txt beside "
            f"cat.png{hint}"
        )
    without = [path for path in images if path not in set(captioned)]
    if without:
        raise ValueError(
            f"{folder}: no caption beside {', '.join(path.name for path in without[:5])}: "
            f"write {caption_file(without[0]).name}"
        )
    pairs = [(path, " ".join(line for _, line in text_lines(caption_file(path)))) for path in captioned]
    empty = [caption_file(path).name for path, caption in pairs if not caption]
    if empty:
        raise ValueError(f"{folder}: no words in {', '.join(empty[:5])}")
    return pairs


def find_image(folder: Path, name: str, where: str, counts: Callable[[Path], bool] = is_image) -> Path:
    """The file of this name, also where the disk spells its accents otherwise than the listing (NFC, NFD); or
    the folder, where that counts."""
    for form in (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
        place = folder / form
        if place.is_file() or (place.is_dir() and place != folder and counts(place)):
            return place
    raise FileNotFoundError(f"{where}: no image {name}")


def not_finite(part: str, what: str, dtype: torch.dtype) -> FloatingPointError:
    """That a part of the pipeline gives values that are not finite, and the mend, which is another in fp32.

    part, what: in words, such as "VAE", and the image
    """
    mend = (
        "take --weight_dtype fp32"
        if dtype != torch.float32
        else f"its weights are at fault: take another {part}"
    )
    return FloatingPointError(f"the {part} gives values that are not finite for {what} ({dtype}): {mend}")


def parse_sizes(words: Sequence[str]) -> list[Size]:
    """[(height, width)] of words such as ("512x512", "640x384"), which are HEIGHTxWIDTH. ValueError names the
    wrong one."""
    sizes: list[Size] = []
    for word in words:
        match = re.fullmatch(r"\s*([1-9][0-9]*)\s*x\s*([1-9][0-9]*)\s*", str(word))
        if not match:
            raise ValueError(f"size {word!r}: write HEIGHTxWIDTH in pixels, such as 512x512 or 640x384")
        sizes.append((int(match[1]), int(match[2])))
        if sizes.count(sizes[-1]) > 1:
            raise ValueError(f"size {word!r} is named twice")
    if not sizes:
        raise ValueError("no size: write at least one HEIGHTxWIDTH, such as 512x512")
    return sizes


def nearest_size(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """The one of `sizes` whose aspect ratio, and then whose area, is nearest to an image of height x width
    pixels."""

    def distance(size: Size) -> tuple[float, float]:
        ratio = math.log(height / width * size[1] / size[0])
        area = math.log(height * width / size[0] / size[1])
        return round(abs(ratio), 9), abs(area)

    return min(sizes, key=distance)


def in_chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """The items in their order, `size` at a time; the last chunk may be shorter."""
    return [items[k : k + size] for k in range(0, len(items), size)]


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """[function(item) ...]: reading and hashing leave Python's lock, so that threads help."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))
