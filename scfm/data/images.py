"""Images of a folder: what is listed, what opens, in which size bucket, read upright and cut to size."""

import hashlib
import io
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

from scfm.data.prompts import COLUMNS, caption_in, json_lines

Size = tuple[int, int]  # (height, width) in pixels
# how Pillow says that a file is no image
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
ORIENTATION = 0x0112  # EXIF: how the camera was held
Item = TypeVar("Item")
Result = TypeVar("Result")


class ListedImage(NamedTuple):
    """An image of a folder as it was when it was read. digest: of its bytes; height, width: upright, in
    pixels."""

    path: Path
    caption: str
    digest: str
    height: int
    width: int


def list_images(folder: str | Path) -> list[ListedImage]:
    """The images that a folder's metadata.jsonl lists, each opened once. Errors as of `read_folder` and
    `inspect_image`."""
    pairs = read_folder(folder)
    inspected = in_threads(inspect_image, [path for path, _ in pairs])
    return [
        ListedImage(path, caption, *facts) for (path, caption), facts in zip(pairs, inspected, strict=True)
    ]


def read_folder(folder: str | Path) -> list[tuple[Path, str]]:
    """[(image path, caption)] of an `imagefolder`: metadata.jsonl with file_name and text in each line.

    FileNotFoundError or ValueError that name the file, the line and what is missing.
    """
    listing = Path(folder) / "metadata.jsonl"
    if not listing.is_file():
        raise FileNotFoundError(
            f"no {listing.name} in {folder}: write one line an image, "
            '{"file_name": "cat.png", "text": "a cat"}'
        )
    pairs = []
    for number, row in json_lines(listing):
        where = f"{listing}, line {number}"
        if not isinstance(row.get("file_name"), str) or not set(COLUMNS) & set(row):
            raise ValueError(f"{where}: needs file_name and text (it has {', '.join(row) or 'nothing'})")
        pairs.append((listing.parent / row["file_name"], caption_in(row, where)))
        if not pairs[-1][0].is_file():
            raise FileNotFoundError(f"{where}: no image {row['file_name']}")
    if not pairs:
        raise ValueError(f"{listing} lists no image")
    return pairs


def inspect_image(path: Path) -> tuple[str, int, int]:
    """(hash of the bytes, height, width) of an image as it is seen upright. ValueError names one that does
    not open."""
    data = path.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as opened:
            turn = opened.getexif().get(ORIENTATION, 1) if "exif" in opened.info else 1
            size = opened.size if turn < 5 else opened.size[::-1]
            opened.verify()
    except BROKEN as error:
        raise ValueError(
            f"{path} does not open as an image ({type(error).__name__}): mend it, or take it "
            f"out of "
            "metadata.jsonl"
        ) from None
    return hashlib.sha256(data).hexdigest(), size[1], size[0]


def read_image(path: str | Path, height: int, width: int) -> torch.Tensor:
    """(3, height, width) in [-1, 1]: upright, scaled to cover the size, then cut in the middle.

    ValueError names a broken file.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except BROKEN as error:
        raise ValueError(f"{path} does not open as an image ({type(error).__name__})") from None
    scale = max(height / image.height, width / image.width)
    if scale != 1:
        size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return pil_to_tensor(image.crop((left, top, left + width, top + height))).float() / 127.5 - 1


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
