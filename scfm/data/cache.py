"""Latents and text embeddings, encoded once: shards that are named by what they depend on, and read
lazily."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from scfm.data.caption_length import fewer_remarks, warn_of_long_captions
from scfm.data.fingerprint import fingerprint
from scfm.data.images import ListedImage, Size, in_chunks, in_threads, nearest_size, not_finite
from scfm.data.videos import digest_of, read_frames
from scfm.files import atomic_write
from scfm.models.sampling import together
from scfm.models.source import PipelineSource
from scfm.streams import Stream, keyed_generator
from scfm.types import Family

log = logging.getLogger(__name__)
# rows of a shard, rows encoded together; the format's number is part of every name
ROWS, TOGETHER, FORMAT = 64, 8, 1


class Shard(NamedTuple):
    """A file of the cache. kind: latents, text or common. name: its file's.

    rows: {image hash: path}, or captions. size: of the images of latents, (height, width).
    """

    kind: str
    name: str
    rows: Any
    size: Size | None = None


class CachePlan:
    """The latents and text embeddings that a run needs, and the shards in `cache_dir` that hold them.

    source: the pipeline whose VAE and text encoders encode. images: what the folder lists.
    sizes: [(height, width)] in pixels, the buckets. max_sequence_length: of the text, in tokens.
    dtype: what the encoders compute in. negative_prompt: where the family has one.
    captions: of images that are still to be made: their text alone is planned, with no images.
    num_frames: of videos, whose latents are planned; 1: images.
    """

    def __init__(
        self,
        source: PipelineSource,
        images: Sequence[ListedImage],
        cache_dir: str | Path,
        sizes: Sequence[Size],
        max_sequence_length: int,
        dtype: torch.dtype,
        negative_prompt: str = "",
        captions: Sequence[str] = (),
        num_frames: int = 1,
    ) -> None:
        self.folder, self.max_sequence_length = Path(cache_dir), max_sequence_length
        self.sizes: list[Size] = [(height, width) for height, width in sizes]
        self.captions = [*(image.caption for image in images), *captions]
        self.hashes = [image.digest for image in images]
        self.size_of = torch.tensor(
            [self.sizes.index(nearest_size(i.height, i.width, self.sizes)) for i in images]
        )
        self.examined: dict[str, tuple[tuple[int, int], bool]] = {}
        self.shards: list[Shard] = []
        vae = [fingerprint(source, "vae"), *([num_frames] if num_frames > 1 else [])]
        for number, size in enumerate(self.sizes):
            mine = {
                i.digest: i.path for i, s in zip(images, self.size_of.tolist(), strict=True) if s == number
            }
            for part in in_chunks(list(mine), ROWS):
                self.shards.append(
                    shard("latents", {d: mine[d] for d in part}, [*vae, size, str(dtype), part], size)
                )
        text = [
            fingerprint(source, "text_encoder", "tokenizer"),
            max_sequence_length,
            str(dtype),
            negative_prompt,
        ]
        for part in in_chunks(list(dict.fromkeys(self.captions)), ROWS):
            self.shards.append(shard("text", part, [*text, part]))
        self.shards.append(shard("common", [], text))

    def is_sound(self, shard: Shard) -> bool:
        """Whether the shard is there and what was written; it is read again only when the file has
        changed."""
        path = self.folder / shard.name
        if not path.is_file():
            return False
        stamp = path.stat().st_size, path.stat().st_mtime_ns
        if shard.name not in self.examined or self.examined[shard.name][0] != stamp:
            error = shard_error(path)
            self.examined[shard.name] = stamp, not error
            if error:
                log.warning("%s %s: it is not used, but made again", path, error)
        return self.examined[shard.name][1]

    def missing(self) -> list[Shard]:
        """The shards that are not there, or not what was written; [] when the cache is complete. Reads all
        that is there."""
        return [
            shard
            for shard, sound in zip(self.shards, in_threads(self.is_sound, self.shards), strict=True)
            if not sound
        ]

    def encode(
        self,
        families: Mapping[Size, Family],
        process: tuple[int, int] = (0, 1),
        progress: bool = True,
        warn: bool = True,
    ) -> None:
        """Makes what is missing of this process's share.

        families: with VAE and text encoders loaded
        warn: log how many captions are too long; False where the caller has done so
        """
        wrong = [
            size
            for size in self.sizes
            if size not in families or families[size].max_sequence_length != self.max_sequence_length
        ]
        if wrong:
            raise ValueError(f"families: none of {self.max_sequence_length} tokens for the sizes {wrong}")
        mine = [shard for shard in self.shards[process[0] :: process[1]] if not self.is_sound(shard)]
        if warn and process[0] == 0 and any(shard.kind == "text" for shard in mine):
            warn_of_long_captions(families[self.sizes[0]], self.captions)
        with fewer_remarks():
            for shard in tqdm(mine, desc="encoding", unit="shard", disable=not progress):
                family = families[shard.size or self.sizes[0]]
                write_shard(self.folder / shard.name, ENCODERS[shard.kind](family, shard))

    def open(self) -> "CachedDataset":
        """The `CachedDataset`. ValueError when something is missing."""
        self.require_whole()
        return CachedDataset(self)

    def open_text(self) -> "CachedText":
        """The captions' embeddings alone. ValueError when something is missing."""
        self.require_whole()
        return CachedText(self)

    def require_whole(self) -> None:
        """ValueError when something is missing."""
        missing = self.missing()
        if missing:
            raise ValueError(
                f"the cache in {self.folder} lacks {len(missing)} of {len(self.shards)} "
                f"shards: encode it first"
            )


def shard(kind: str, rows: Any, key: Sequence[Any], size: Size | None = None) -> Shard:
    """A `Shard` whose name is a hash of what its content depends on."""
    digest = hashlib.sha256(json.dumps([FORMAT, kind, *key]).encode()).hexdigest()
    return Shard(kind, f"{kind}-{digest[:24]}.safetensors", rows, size)


def checksum(shard: str, names: Iterable[str], tensor_of: Callable[[str], torch.Tensor]) -> str:
    """A hash of a shard's name and of the names, types, shapes and bytes of its tensors, which are read one
    at a time."""
    digest = hashlib.sha256(shard.encode())
    for name in sorted(names):
        tensor = tensor_of(name).contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Tensors into a safetensors file with their checksum in its header; whole or not at all."""
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    # one entry: the order of several is left to chance
    header = {"checksum": checksum(path.name, tensors, tensors.__getitem__)}
    atomic_write(path, lambda new: save_file(tensors, str(new), metadata=header))


def shard_error(path: Path) -> str:
    """What is wrong with a shard, in a few words, or "" when it is what was written."""
    try:
        with safe_open(path, framework="pt") as opened:
            expected = (opened.metadata() or {}).get("checksum")
            actual = checksum(path.name, opened.keys(), opened.get_tensor)
            return "" if expected == actual else "was altered, or is another's"
    except PermissionError as error:
        raise PermissionError(
            f"{path} may not be read ({error.strerror}): ask its owner to open it to you"
        ) from None
    except (SafetensorError, OSError) as error:
        return f"was cut short, or is no shard ({error})"


def encode_latents(family: Family, shard: Shard) -> dict[str, torch.Tensor]:
    """{"latents": (rows, *latent_shape)} of a shard's images. ValueError when one has changed since it was
    listed."""
    parts, frames = [], getattr(family, "num_frames", 1)
    for some in in_chunks(list(shard.rows.items()), together(family, TOGETHER)):
        images = torch.stack([read_frames(path, *(shard.size or (0, 0)), frames) for _, path in some])
        for digest, path in some:
            if digest_of(path) != digest:
                raise ValueError(f"{path} has changed since its listing was read: run the command again")
        parts.append(family.encode_images(images).cpu())
        for row, (_, path) in zip(parts[-1], some, strict=True):
            if not row.isfinite().all():
                raise not_finite("VAE", str(path), family.pipe.dtype)
    return {"latents": torch.cat(parts)}


def encode_text(family: Family, shard: Shard) -> dict[str, torch.Tensor]:
    """{name: (rows, ...)} of a shard's captions, without what is common to all captions."""
    parts = [family.encode_text(some) for some in in_chunks(shard.rows, TOGETHER)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0] if not is_common(name)}


def encode_common(family: Family, shard: Shard) -> dict[str, torch.Tensor]:
    """{name: (1, ...)}: what a family's encode_text gives for every caption alike. Nothing for Flux."""
    return {name: tensor[:1] for name, tensor in family.encode_text([""]).items() if is_common(name)}


def is_common(name: str) -> bool:
    """Whether a family gives this tensor for every caption alike."""
    return name.startswith("empty_")


ENCODERS = {"latents": encode_latents, "text": encode_text, "common": encode_common}


class CachedText:
    """Text embeddings by the caption."""

    def __init__(self, plan: CachePlan) -> None:
        self.place = {
            (shard.size, row): (plan.folder / shard.name, i)
            for shard in plan.shards
            for i, row in enumerate(shard.rows)
        }
        self.texts = {caption: self.place[None, caption] for caption in plan.captions}
        self.opened = lru_cache(128)(open_shard)
        common = self.opened(plan.folder / plan.shards[-1].name)
        self.common = {name: common.get_tensor(name) for name in common.keys()}

    def text_of(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """What the family's encode_text gives for captions that are in the cache: dict of (m, ...).
        ValueError names one that is not."""
        unknown = [caption for caption in captions if caption not in self.texts]
        if unknown:
            raise ValueError(f"the cache has no caption {unknown[0]!r}")
        common = {
            name: tensor.expand(len(captions), *tensor.shape[1:]) for name, tensor in self.common.items()
        }
        return {**self.read([self.texts[caption] for caption in captions]), **common}

    def read(self, places: Sequence[tuple[Path, int]]) -> dict[str, torch.Tensor]:
        """{name: (m, ...)} of m rows, each a (shard's path, row)."""
        names = self.opened(places[0][0]).keys()
        return {
            name: torch.cat([self.opened(path).get_slice(name)[i : i + 1] for path, i in places])
            for name in names
        }


class CachedDataset(CachedText):
    """Latents and text embeddings by the image's number, in the order of metadata.jsonl.

    captions: one per image. sizes: [(height, width)]; size_of: (n,) the number of each image's size among
    them.
    """

    def __init__(self, plan: CachePlan) -> None:
        super().__init__(plan)
        self.captions, self.sizes, self.size_of = plan.captions, plan.sizes, plan.size_of
        self.images = [
            self.place[plan.sizes[s], digest]
            for s, digest in zip(plan.size_of.tolist(), plan.hashes, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.captions)

    def latents(self, indices: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """(m, *latent_shape) float32 of the images with these numbers. ValueError when they are not all of
        one size."""
        indices = torch.as_tensor(indices)
        if len(self.size_of[indices].unique()) != 1:
            raise ValueError(
                f"images {indices.tolist()} are of several sizes, or none at all: ask for one size at a time"
            )
        return self.read([self.images[i] for i in indices.tolist()])["latents"].float()

    def text(self, indices: torch.Tensor | Sequence[int]) -> dict[str, torch.Tensor]:
        """What the family's encode_text gives for these images' captions: dict of (m, ...)."""
        return self.text_of([self.captions[i] for i in torch.as_tensor(indices).tolist()])


def open_shard(path: Path) -> Any:
    """A shard, opened for lazy reading."""
    return safe_open(path, framework="pt")


def batch_indices(step: int, batch_size: int, size_of: torch.Tensor, seed: int) -> torch.Tensor:
    """(batch_size,) numbers of the images of a training step: every image once an epoch, nearly all steps of
    one size.

    size_of: (n,) each image's size, a number. An epoch has at most (number of sizes) + 1 steps of several
    sizes.
    """
    n = len(size_of)
    place = torch.arange(step * batch_size, (step + 1) * batch_size)
    orders = {
        epoch: epoch_order(epoch, batch_size, size_of, seed) for epoch in (place // n).unique().tolist()
    }
    return torch.cat([order[place[place // n == epoch] % n] for epoch, order in orders.items()])


def epoch_order(epoch: int, batch_size: int, size_of: torch.Tensor, seed: int) -> torch.Tensor:
    """(n,) the images in the order of an epoch: chunks of one size and of `batch_size`, in line with the
    training steps."""
    generator, chunks, left = keyed_generator(seed, epoch, Stream.DATA), [], []
    for size in size_of.unique():
        rows = (size_of == size).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        full = len(rows) // batch_size * batch_size
        chunks.append(rows[:full].view(-1, batch_size))
        left.append(rows[full:])
    chunks = torch.cat(chunks)
    order = torch.cat([chunks[torch.randperm(len(chunks), generator=generator)].flatten(), *left])
    return order.roll(-epoch * len(size_of) % batch_size)  # the last rows to the front
