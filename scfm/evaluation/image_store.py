"""Folders of generated images that remember what they depend on, so that an evaluation resumes."""

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import pil_to_tensor

from scfm.data.animation import frames_of, middle_frame, save_png
from scfm.data.images import in_chunks, read_image
from scfm.evaluation.samplers import Sampler
from scfm.files import atomic_write
from scfm.models.sampling import start_noise, together
from scfm.types import Family

SETTINGS = "settings.json"
DISTANCE = "squared_distance"  # of an image's latents to the teacher's, as text in the PNG file


def init_store(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes a folder of images with settings.json, or sees that it has been made with the same settings.

    ValueError when it was made with others, or by somebody else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, new = folder / SETTINGS, json.loads(json.dumps(settings))
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        old = old if isinstance(old, dict) else {}
        changed = sorted(name for name in {*new, *old} if new.get(name) != old.get(name))
        if changed:
            raise ValueError(
                f"{folder} holds images of another {', '.join(changed)}: take another --output_dir, or "
                "delete it"
            )
    elif any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty, and has no {SETTINGS} of an evaluation: take another --output_dir"
        )
    write_json(path, new)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record, whole or not at all."""
    text = json.dumps(record, indent=1)
    atomic_write(path, lambda new: new.write_text(text, encoding="utf-8"))


def image_path(folder: Path, number: int) -> Path:
    """The file of the image of this number: 00000.png and so on."""
    return folder / f"{number:05d}.png"


def missing_images(folder: Path, count: int) -> list[int]:
    """The numbers of those of the first `count` images that are not there."""
    return [number for number in range(count) if not image_path(folder, number).is_file()]


def generate_set(
    sampler: Sampler,
    family: Family,
    captions: Sequence[str],
    folder: Path,
    seed: int,
    batch_size: int = 8,
    teacher: Path | None = None,
    done: Callable[[int], object] | None = None,
) -> Path:
    """Generates what is missing of a sampler's images, one for each caption; returns their folder.

    seed: with an image's number the key of its noise, so that any part can be made again
    teacher: folder of the teacher's images; None: these are the teacher's, and their latents stay beside them
    done: called with the number of images made so far

    An image carries the mean squared distance of its latents to the teacher's.
    """
    init_store(folder, sampler.settings)
    for numbers in in_chunks(missing_images(folder, len(captions)), together(family, batch_size)):
        latents, images = generate_images(sampler, family, captions, numbers, seed)
        for k, number in enumerate(numbers):
            text, path = {}, image_path(folder, number)
            if latents is not None and teacher is None:
                save_latents(latents[k], path.with_suffix(".safetensors"))
            elif latents is not None and teacher is not None:
                target = load_file(image_path(teacher, number).with_suffix(".safetensors"))["latents"]
                distance = (latents[k].float().cpu() - target).double().square().mean().item()
                text = {DISTANCE: repr(distance)}
            save_image(images[k], path, text)
        if done:
            done(len(numbers))
    return folder


@torch.no_grad()
def generate_images(
    sampler: Sampler, family: Family, captions: Sequence[str], numbers: Sequence[int], seed: int
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(latents (n, ...) or None, images (n, 3, H, W) in [-1, 1]) of the captions of these numbers."""
    texts = [captions[number] for number in numbers]
    if sampler.latents is not None:
        latents = sampler.latents(texts, start_noise(family, numbers, seed))
        return latents, family.decode(latents)
    if sampler.images is None:
        raise TypeError(f"{sampler.name} has neither latents nor images")
    return None, sampler.images(texts, numbers)


def save_latents(latents: torch.Tensor, path: Path) -> None:
    """Writes the latents of one image, whole or not at all."""
    tensors = {"latents": latents.float().cpu().contiguous()}
    atomic_write(path, lambda new: save_file(tensors, str(new)))


def save_image(image: torch.Tensor, path: Path, text: Mapping[str, str]) -> None:
    """Writes an image (3, H, W) in [-1, 1], or a video (F, 3, H, W), as a PNG file, whole or not at all, with
    named texts in it."""
    info = PngImagePlugin.PngInfo()
    for name, value in text.items():
        info.add_text(name, value)
    atomic_write(path, lambda new: save_png(frames_of(image), new, pnginfo=info))


def image_batches(
    paths: Sequence[Path],
    captions: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 32,
) -> Iterator[tuple[torch.Tensor, Sequence[str] | None]]:
    """(images (b, 3, H, W) uint8, captions or None) of image files.

    size: (H, W), to which they are scaled and cut; None: as they are
    """
    for numbers in in_chunks(range(len(paths)), batch_size):
        images = torch.stack([read_bytes(paths[number], size) for number in numbers])
        yield images, captions[numbers[0] : numbers[-1] + 1] if captions else None


def read_bytes(path: Path, size: tuple[int, int] | None) -> torch.Tensor:
    """(3, H, W) uint8 of an image file, or of the frame in the middle of a video."""
    if size:
        return ((read_image(path, *size) + 1) * 127.5).round().byte()
    with Image.open(path) as image:
        return pil_to_tensor(middle_frame(image).convert("RGB"))


def stored_distance(folder: Path, count: int) -> float | None:
    """Root mean square, over all images, of the distances that they carry; None where one carries none."""
    squares = []
    for number in range(count):
        with Image.open(image_path(folder, number)) as image:
            squares.append(image.info.get(DISTANCE))
    return None if None in squares else math.sqrt(statistics.fmean(map(float, squares)))
