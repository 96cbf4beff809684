"""Videos of a folder: each a folder of frames, an animation (GIF, PNG, WebP), or a film (MP4 and others)."""

import hashlib
import itertools
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image, ImageSequence

from scfm.data.images import (
    BROKEN,
    SUFFIXES,
    ListedImage,
    as_seen,
    cut_to_size,
    in_threads,
    open_image,
    read_folder,
    read_image,
    refuse_broken,
)

ANIMATIONS = (".gif", ".png", ".webp", ".avif")
FILMS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")


def is_video(path: Path) -> bool:
    """Whether a path may be a video: a folder of images, or a file of a kind that holds one."""
    return bool(frame_files(path)) if path.is_dir() else path.suffix.lower() in (*ANIMATIONS, *FILMS)


def frame_files(folder: Path) -> list[Path]:
    """The images of a folder, in the order of their names."""
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)


def list_videos(folder: str | Path, num_frames: int) -> list[ListedImage]:
    """The videos that a folder lists, `num_frames` frames of each opened once; what they are known by is a
    digest of all their bytes.

    Errors as of `read_folder`; ValueError that names all that are broken, or too short.
    """
    pairs = read_folder(folder, is_video)
    require_reader([path for path, _ in pairs])

    def inspect(path: Path) -> tuple[str, int, int] | str:
        try:
            sizes = [frame.size for frame in first_frames(path, num_frames)]  # no more than one in memory
        except ValueError as error:
            return f"{path} {error}"
        width, height = sizes[0]
        return digest_of(path), height, width

    facts = refuse_broken(in_threads(inspect, [path for path, _ in pairs]))
    return [ListedImage(path, caption, *f) for (path, caption), f in zip(pairs, facts, strict=True)]


def require_reader(paths: list[Path]) -> None:
    """ValueError where there are films and nothing installed that reads them."""
    films = [path.name for path in paths if path.suffix.lower() in FILMS and not path.is_dir()]
    if films and find_spec("av") is None:
        raise ValueError(
            f"{films[0]} is read by PyAV, which is not installed: pip install 'scfm[video]', or save each "
            "video as a GIF, or as a folder of its frames"
        )


def digest_of(path: Path) -> str:
    """A hash of a video's bytes: of its file, or of its frames with their names."""
    digest = hashlib.sha256()
    for file in frame_files(path) if path.is_dir() else [path]:
        digest.update(file.name.encode() if path.is_dir() else b"")
        digest.update(file.read_bytes())
    return digest.hexdigest()


def read_frames(path: str | Path, height: int, width: int, num_frames: int) -> torch.Tensor:
    """(F, 3, height, width) in [-1, 1]: a video's first frames, scaled and cut as `read_image` does it; with
    num_frames 1 (3, height, width), an image.

    Frames are taken as they lie in the file, whatever its frame rate. ValueError names a broken or a short
    one.
    """
    if num_frames == 1:
        return read_image(path, height, width)
    try:
        frames = [cut_to_size(frame, height, width) for frame in first_frames(Path(path), num_frames)]
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    return torch.stack(frames)


def first_frames(path: Path, count: int) -> Iterator[Image.Image]:
    """The first frames of a video, one after the other, in RGB. ValueError with the reason when there are not
    as many, or when their sizes differ."""
    found, size = 0, None
    try:
        for frame in itertools.islice(frames_in(path), count):
            found, size = found + 1, size or frame.size
            if frame.size != size:
                raise ValueError("has frames of several sizes")
            yield frame
    except BROKEN as error:
        kind = type(error).__name__
        reason = str(error) if kind == "ValueError" else f"does not open as a video ({kind})"
        raise ValueError(reason) from None
    if found < count:
        raise ValueError(f"has {found} frame{'s' * (found > 1)}, not {count}")


def frames_in(path: Path) -> Iterator[Image.Image]:
    """The frames of a video, one after the other, upright and in RGB."""
    if path.is_dir():
        for file in frame_files(path):
            yield open_image(file)
    elif path.suffix.lower() in FILMS:
        yield from frames_of_film(path)
    else:
        with Image.open(path) as opened:
            for frame in ImageSequence.Iterator(opened):
                yield as_seen(frame.copy())


def frames_of_film(path: Path) -> Iterator[Image.Image]:
    """The frames of a film, turned as its file says. ValueError when it cannot be read."""
    import av
    from av.error import FFmpegError

    try:
        with av.open(str(path)) as film:
            if not film.streams.video:
                raise ValueError("holds no video")
            for frame in film.decode(video=0):
                image = frame.to_image()
                yield image.rotate(frame.rotation, expand=True) if frame.rotation else image
    except FFmpegError as error:
        raise ValueError(f"does not open as a video ({type(error).__name__})") from None
