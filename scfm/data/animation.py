"""Images and videos as files: a video is a PNG file of all its frames, which loses nothing; to be looked at,
a strip of some of them and a GIF."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from scfm.files import atomic_write

FPS = 16  # frames a second of what is shown, as Wan 2.1 has them
SHOWN = 6  # frames of a strip
LARGEST = 480  # pixels: the longer side of a GIF's videos


def frames_of(image: torch.Tensor) -> list[Image.Image]:
    """The frames of a video (F, 3, H, W) in [-1, 1]; of an image (3, H, W), itself alone."""
    frames = image.float().cpu() / 2 + 0.5
    return [to_pil_image(frame) for frame in (frames if frames.ndim == 4 else frames[None])]


def save_png(frames: Sequence[Image.Image], file: Any, **info: Any) -> None:
    """Writes an image, or a video as an animated PNG, which a browser plays.

    Pillow joins neighbouring frames that are the same, unless they are drawn in different ways: so every
    other one is drawn over the last, which for frames without transparency is the same.
    """
    first, *more = frames
    if more:
        info |= {
            "save_all": True,
            "append_images": more,
            "duration": 1000 / FPS,
            "blend": [i % 2 for i in range(len(frames))],
            "loop": 0,
        }
    first.save(file, format="png", **info)


def middle_frame(image: Image.Image) -> Image.Image:
    """An opened file of an image, or of a video at the frame in its middle."""
    image.seek(getattr(image, "n_frames", 1) // 2)
    return image


def motion_of(path: Path) -> float:
    """Mean absolute change of a pixel from one frame of a video to the next, of a range of 1."""
    with Image.open(path) as opened:
        frames = []
        for i in range(getattr(opened, "n_frames", 1)):
            opened.seek(i)
            frames.append(pil_to_tensor(opened.convert("RGB")).float() / 255)
    video = torch.stack(frames)
    return (video[1:] - video[:-1]).abs().mean().item()


def strip_of(images: torch.Tensor, columns: int, padding: int = 0) -> torch.Tensor:
    """(3, H, W) in [0, 1]: images (n, 3, h, w) in [-1, 1] as a grid; of videos (n, F, 3, h, w) each a row, of
    frames at even distances, the first and the last among them."""
    images = images.cpu().float() / 2 + 0.5
    if images.ndim == 5:
        columns = min(SHOWN, images.shape[1])
        shown = torch.linspace(0, images.shape[1] - 1, columns).round().long()
        images = images[:, shown].flatten(0, 1)
    return make_grid(images, nrow=columns, padding=padding)


def save_pictures(images: torch.Tensor, path: str | Path, columns: int = 0, padding: int = 0) -> torch.Tensor:
    """Writes images (n, 3, h, w) in [-1, 1], or videos (n, F, 3, h, w), as `strip_of` has them, to a PNG
    file, and videos also to a GIF beside it; returns the strip.

    columns: of the grid; 0: about as many as rows
    """
    path, columns = Path(path), columns or math.ceil(math.sqrt(len(images)))
    strip = strip_of(images, columns, padding)
    atomic_write(path, lambda new: to_pil_image(strip).save(new, format="png"))
    if images.ndim == 5:
        moving = gif_bytes(images, columns)
        atomic_write(gif_beside(path), lambda new: new.write_bytes(moving))
    return strip


def gif_beside(path: str | Path) -> Path:
    """Where the GIF of a PNG file lies."""
    return Path(path).with_suffix(".gif")


def gif_bytes(videos: torch.Tensor, columns: int) -> bytes:
    """Videos (n, F, 3, h, w) in [-1, 1], side by side in a GIF, scaled down where they are large."""
    shrink = LARGEST / max(videos.shape[-2:])
    frames = []
    for images in videos.transpose(0, 1):
        frame = to_pil_image(make_grid(images.cpu().float() / 2 + 0.5, nrow=columns, padding=0))
        if shrink < 1:
            size = round(frame.width * shrink), round(frame.height * shrink)
            frame = frame.resize(size, Image.Resampling.LANCZOS)
        frames.append(frame)
    first, *more = frames
    settings: dict[str, Any] = {"save_all": True, "append_images": more, "loop": 0}
    first.save(file := io.BytesIO(), format="gif", duration=1000 // FPS, **settings)
    return file.getvalue()
