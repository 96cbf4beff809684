"""Images of a folder: what is listed, what opens, in which size bucket, read upright and cut to size."""
import math
import re
from pathlib import Path

from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

from scfm.data.prompts import COLUMNS, caption_in, rows_of

BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)   # how Pillow says that a file is no image


def parse_sizes(words):
    """[(height, width)] in pixels of words such as ("512x512", "640x384"), which are HEIGHTxWIDTH. ValueError names the wrong one."""
    sizes = []
    for word in words:
        found = re.fullmatch(r"\s*([1-9][0-9]*)\s*x\s*([1-9][0-9]*)\s*", str(word))
        if not found:
            raise ValueError(f"size {word!r}: write HEIGHTxWIDTH in pixels, such as 512x512 or 640x384")
        sizes.append((int(found[1]), int(found[2])))
        if sizes.count(sizes[-1]) > 1:
            raise ValueError(f"size {word!r} is named twice")
    if not sizes:
        raise ValueError("no size: write at least one HEIGHTxWIDTH, such as 512x512")
    return sizes


def nearest_size(height, width, sizes):
    """The one of `sizes` whose aspect ratio, and then whose area, is nearest to an image of height x width pixels."""
    def distance(size):
        ratio, area = math.log(height / width * size[1] / size[0]), math.log(height * width / size[0] / size[1])
        return round(abs(ratio), 9), abs(area)
    return min(sizes, key=distance)


def read_folder(folder):
    """[(image path, caption)] of an `imagefolder`: metadata.jsonl with file_name and text in each line.

    Raises FileNotFoundError or ValueError that name the file, the line and what is missing.
    """
    listing = Path(folder) / "metadata.jsonl"
    if not listing.is_file():
        raise FileNotFoundError(f"no {listing.name} in {folder}: write one line an image, "
                                '{"file_name": "cat.png", "text": "a cat"}')
    pairs = []
    for number, row in rows_of(listing):
        where = f"{listing}, line {number}"
        if not isinstance(row.get("file_name"), str) or not set(COLUMNS) & set(row):
            raise ValueError(f"{where}: needs file_name and text (it has {', '.join(row) or 'nothing'})")
        pairs.append((listing.parent / row["file_name"], caption_in(row, where)))
        if not pairs[-1][0].is_file():
            raise FileNotFoundError(f"{where}: no image {row['file_name']}")
    if not pairs:
        raise ValueError(f"{listing} lists no image")
    return pairs


def read_image(path, height, width):
    """(3, height, width) in [-1, 1]: upright, scaled to cover the size, then cut in the middle. ValueError names a broken file."""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except BROKEN as error:
        raise ValueError(f"{path} does not open as an image ({type(error).__name__})") from None
    scale = max(height / image.height, width / image.width)
    if scale != 1:
        image = image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))),
                                 Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return pil_to_tensor(image.crop((left, top, left + width, top + height))).float() / 127.5 - 1


def in_chunks(items, size):
    return [items[k:k + size] for k in range(0, len(items), size)]
