"""Latents and text embeddings, encoded once: shards that are named by what they depend on, and read lazily."""
import hashlib
import io
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from scfm.data.images import BROKEN, in_chunks, nearest_size, read_folder, read_image
from scfm.files import atomic_write
from scfm.method.consistency import keyed_generator
from scfm.models.source import model_index, resolve_folder

LOOK, PLACES, SMALL = 4096, 64, 2 ** 20     # bytes read at a place, evenly spread places, bytes of a file that is read whole


def fingerprint(folder, *parts):
    """A hash of the files of a pipeline's parts whose names begin so ("vae", "text_encoder"): no weight is loaded."""
    folder = Path(folder)
    told = {name: kind for name, kind in model_index(folder).items() if name.startswith(parts) or name == "_class_name"}
    revision = folder.name if folder.parent.name == "snapshots" else ""     # where the hub's downloads lie
    digest = hashlib.sha256(json.dumps([told, revision], sort_keys=True).encode())
    for path in sorted(path for name in told for path in (folder / name).rglob("*")):
        if path.is_file() and path.suffix != ".md" and not path.name.startswith("."):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
            digest.update(file_fingerprint(path))
    return digest.hexdigest()


def file_fingerprint(path):
    """A hash of a file: all of it when small, else its size, its header, each tensor's beginning and evenly spread places."""
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
            places |= {start + row["data_offsets"][0] for name, row in json.loads(header).items() if name != "__metadata__"}
        for place in sorted(places):
            file.seek(place)
            digest.update(file.read(LOOK))
    return digest.digest()


log = logging.getLogger(__name__)


def hash_of(*what):
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def checksum(shard, names, tensor_of):
    """A hash of a shard's name and of the names, types, shapes and bytes of its tensors, which are read one at a time."""
    digest = hashlib.sha256(shard.encode())
    for name in sorted(names):
        tensor = tensor_of(name).contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_shard(path, tensors):
    """Tensors into a safetensors file with their checksum in its header; whole or not at all."""
    tensors = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    header = {"checksum": checksum(path.name, tensors, tensors.get)}      # one entry: the order of several is left to chance
    atomic_write(path, lambda new: save_file(tensors, str(new), metadata=header))


def shard_error(path):
    """What is wrong with a shard, in a few words, or "" when it is what was written."""
    try:
        with safe_open(path, framework="pt") as opened:
            told = (opened.metadata() or {}).get("checksum")
            return "" if told == checksum(path.name, opened.keys(), opened.get_tensor) else "was altered, or is another's"
    except (SafetensorError, OSError) as error:
        return f"was cut short, or is no shard ({error})"


ROWS, TOGETHER, FORMAT = 64, 8, 1       # rows of a shard, rows encoded together; the format's number is part of every name


class Shard(NamedTuple):
    """kind: latents, text or common. name: its file's. rows: {image hash: path}, or captions. size: of latents, (height, width)."""
    kind: str
    name: str
    rows: object
    size: tuple = None


def inspect_image(path):
    """(hash of the bytes, height, width) of an image as it is seen upright. ValueError names one that does not open."""
    data = path.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as opened:
            turn = opened.getexif().get(0x0112, 1) if "exif" in opened.info else 1      # how the camera was held
            size = opened.size if turn < 5 else opened.size[::-1]
            opened.verify()
    except BROKEN as error:
        raise ValueError(f"{path} does not open as an image ({type(error).__name__}): mend it, or take it out of metadata.jsonl") from None
    return hashlib.sha256(data).hexdigest(), size[1], size[0]


def in_threads(function, items):
    """[function(item) ...]: reading and hashing leave Python's lock, so that threads help."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


class CachePlan:
    """The latents and text embeddings that a run needs, and the shards in `cache_folder` that hold them.

    sizes: [(height, width)] in pixels, the buckets. dtype: what the encoders compute in. negative: the negative prompt, where the
    family has one. Raises FileNotFoundError or ValueError that name the listing's line, or the image that does not open.
    """

    def __init__(self, pipeline_folder, images_folder, cache_folder, sizes, max_sequence_length, dtype, negative_prompt=""):
        self.folder, self.sizes, self.max_sequence_length = Path(cache_folder), [tuple(size) for size in sizes], max_sequence_length
        pipeline_folder, pairs = resolve_folder(pipeline_folder), read_folder(images_folder)
        found = in_threads(inspect_image, [path for path, _ in pairs])
        self.captions = [caption for _, caption in pairs]
        self.hashes = [digest for digest, _, _ in found]
        self.size_of = torch.tensor([self.sizes.index(nearest_size(*shape, self.sizes)) for _, *shape in found])
        self.examined, self.shards = {}, []
        vae = fingerprint(pipeline_folder, "vae")
        for number, size in enumerate(self.sizes):
            mine = {digest: path for digest, (path, _), s in zip(self.hashes, pairs, self.size_of.tolist()) if s == number}
            for part in in_chunks(list(mine), ROWS):
                self.shards.append(self.shard("latents", {d: mine[d] for d in part}, [vae, size, str(dtype), part], size))
        text = [fingerprint(pipeline_folder, "text_encoder", "tokenizer"), max_sequence_length, str(dtype), negative_prompt]
        for part in in_chunks(list(dict.fromkeys(self.captions)), ROWS):
            self.shards.append(self.shard("text", part, [*text, part]))
        self.shards.append(self.shard("common", [], text))

    def shard(self, kind, rows, key, size=None):
        return Shard(kind, f"{kind}-{hash_of(FORMAT, kind, *key)[:24]}.safetensors", rows, size)

    def is_sound(self, shard):
        """Whether the shard is there and what was written; it is read again only when the file has changed."""
        path = self.folder / shard.name
        if not path.is_file():
            return False
        stamp = path.stat().st_size, path.stat().st_mtime_ns
        if self.examined.get(shard.name, (None,))[0] != stamp:
            fault = shard_error(path)
            self.examined[shard.name] = stamp, not fault
            if fault:
                log.warning("%s %s: it is not used, but made again", path, fault)
        return self.examined[shard.name][1]

    def missing(self):
        """The shards that are not there, or not what was written; [] when the cache is complete. Reads all that is there."""
        return [shard for shard, sound in zip(self.shards, in_threads(self.is_sound, self.shards)) if not sound]

    def encode(self, families, process=(0, 1), progress=True):
        """Makes what is missing of this process's share. families: {(height, width): family}, with VAE and text encoders loaded."""
        wrong = [size for size in self.sizes if size not in families or families[size].max_sequence_length != self.max_sequence_length]
        if wrong:
            raise ValueError(f"families: none of {self.max_sequence_length} tokens for the sizes {wrong}")
        mine = [shard for shard in self.shards[process[0]::process[1]] if not self.is_sound(shard)]
        for shard in tqdm(mine, desc="encoding", unit="shard", disable=not progress):
            family = families[shard.size or self.sizes[0]]
            write_shard(self.folder / shard.name, ENCODERS[shard.kind](family, shard))

    def open(self):
        """The `CachedDataset`. ValueError when something is missing."""
        missing = self.missing()
        if missing:
            raise ValueError(f"the cache in {self.folder} lacks {len(missing)} of {len(self.shards)} shards: encode it first")
        return CachedDataset(self)


def encode_latents(family, shard):
    """{"latents": (rows, *latent_shape)} of a shard's images."""
    parts = []
    for some in in_chunks(list(shard.rows.items()), TOGETHER):
        images = torch.stack([read_image(path, *shard.size) for _, path in some])
        for digest, path in some:
            if inspect_image(path)[0] != digest:
                raise ValueError(f"{path} has changed since its listing was read: run the command again")
        parts.append(family.encode_images(images).cpu())
    return {"latents": torch.cat(parts)}


def encode_text(family, shard):
    """{name: (rows, ...)} of a shard's captions, without what is common to all captions."""
    parts = [family.encode_text(some) for some in in_chunks(shard.rows, TOGETHER)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0] if not is_common(name)}


def encode_common(family, shard):
    """{name: (1, ...)}: what a family's encode_text says of every caption alike. Nothing for Flux."""
    return {name: tensor[:1] for name, tensor in family.encode_text([""]).items() if is_common(name)}


def is_common(name):
    return name.startswith("empty_")


ENCODERS = {"latents": encode_latents, "text": encode_text, "common": encode_common}


class CachedDataset:
    """Latents and text embeddings by the image's number, in the order of metadata.jsonl.

    captions: one per image. sizes: [(height, width)]; size_of: (n,) the number of each image's size among them.
    """

    def __init__(self, plan):
        self.captions, self.sizes, self.size_of = plan.captions, plan.sizes, plan.size_of
        place = {(shard.size, row): (plan.folder / shard.name, i) for shard in plan.shards for i, row in enumerate(shard.rows)}
        self.images = [place[plan.sizes[s], digest] for s, digest in zip(plan.size_of.tolist(), plan.hashes)]
        self.texts = {caption: place[None, caption] for caption in plan.captions}
        self.opened = lru_cache(128)(lambda path: safe_open(path, framework="pt"))
        common = self.opened(plan.folder / plan.shards[-1].name)
        self.common = {name: common.get_tensor(name) for name in common.keys()}

    def __len__(self):
        return len(self.captions)

    def latents(self, indices):
        """(m, *latent_shape) float32 of the images with these numbers. ValueError when they are not all of one size."""
        indices = torch.as_tensor(indices)
        if len(self.size_of[indices].unique()) != 1:
            raise ValueError(f"images {indices.tolist()} are of several sizes, or none at all: ask for one size at a time")
        return self.read([self.images[i] for i in indices.tolist()])["latents"].float()

    def text(self, indices):
        """What the family's encode_text says of these images' captions: dict of (m, ...)."""
        return self.text_of([self.captions[i] for i in torch.as_tensor(indices).tolist()])

    def text_of(self, captions):
        """The same of captions that are in the cache. ValueError names one that is not."""
        unknown = [caption for caption in captions if caption not in self.texts]
        if unknown:
            raise ValueError(f"the cache has no caption {unknown[0]!r}")
        common = {name: tensor.expand(len(captions), *tensor.shape[1:]) for name, tensor in self.common.items()}
        return {**self.read([self.texts[caption] for caption in captions]), **common}

    def read(self, places):
        """{name: (m, ...)} of m rows, each a (shard's path, row)."""
        names = self.opened(places[0][0]).keys()
        row = lambda name, path, i: self.opened(path).get_slice(name)[i:i + 1]
        return {name: torch.cat([row(name, path, i) for path, i in places]) for name in names}


def batch_indices(update, batch, size_of, seed):
    """(batch,) numbers of the images of an update: every image once an epoch, nearly all updates of one size.

    size_of: (n,) each image's size, a number. An epoch has at most (number of sizes) + 1 updates of several sizes.
    """
    n = len(size_of)
    place = torch.arange(update * batch, (update + 1) * batch)
    orders = {epoch: epoch_order(epoch, batch, size_of, seed) for epoch in (place // n).unique().tolist()}
    return torch.cat([order[place[place // n == epoch] % n] for epoch, order in orders.items()])


def epoch_order(epoch, batch, size_of, seed):
    """(n,) the images in the order of an epoch: chunks of one size and of `batch` rows, in line with the updates."""
    generator, chunks, left = keyed_generator(seed, epoch, stream=1), [], []
    for size in size_of.unique():
        rows = (size_of == size).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        whole = len(rows) // batch * batch
        chunks.append(rows[:whole].view(-1, batch))
        left.append(rows[whole:])
    chunks = torch.cat(chunks)
    order = torch.cat([chunks[torch.randperm(len(chunks), generator=generator)].flatten(), *left])
    return order.roll(-epoch * len(size_of) % batch)        # the last rows to the front
