"""Hashes by which it is known what a file, or a part of a pipeline, was."""

import hashlib
import json
from pathlib import Path

from scfm.models.source import PipelineSource

PARTS = (
    "transformer",
    "vae",
    "text_encoder",
    "tokenizer",
    "scheduler",
)  # all that a generated image depends on
SMALL = 2**20  # bytes of a file that is read whole
LOOK, PLACES = 4096, 64  # of a larger one: bytes read at a place, evenly spread places


def fingerprint(source: PipelineSource, *parts: str) -> str:
    """A hash of the files of a pipeline's parts whose names begin so ("vae", "text_encoder"): no weight is
    loaded."""
    named = {
        name: value for name, value in source.index.items() if name.startswith(parts) or name == "_class_name"
    }
    folder = source.folder
    revision = folder.name if folder.parent.name == "snapshots" else ""  # where the hub's downloads lie
    digest = hashlib.sha256(json.dumps([named, revision], sort_keys=True).encode())
    for path in sorted(path for name in named for path in (folder / name).rglob("*")):
        if path.is_file() and path.suffix != ".md" and not path.name.startswith("."):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
            digest.update(file_fingerprint(path))
    return digest.hexdigest()


def file_fingerprint(path: Path) -> bytes:
    """A hash of a file: all of it when small, else its size, its header, each tensor's beginning and evenly
    spread places."""
    size = path.stat().st_size
    if size <= SMALL:
        return hashlib.sha256(path.read_bytes()).digest()
    places = {size * k // PLACES for k in range(PLACES)}
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            header = file.read(int.from_bytes(file.read(8), "little"))
            digest.update(header)
            start = file.tell()
            entries = json.loads(header).items()
            places |= {start + entry["data_offsets"][0] for name, entry in entries if name != "__metadata__"}
        for place in sorted(places):
            file.seek(place)
            digest.update(file.read(LOOK))
    return digest.digest()
