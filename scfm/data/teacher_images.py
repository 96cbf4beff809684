"""The teacher's image of each caption, in a folder that says how each came about."""
import json
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from scfm.data.images import in_chunks
from scfm.data.prompts import rows_of
from scfm.files import atomic_write
from scfm.method.consistency import keyed_generator
from scfm.models.sampling import start_noise, stock_shift, teacher_endpoints


def drawn_size(sizes, number, seed):
    """The size (height, width) in which image `number` is generated: one of `sizes`, evenly."""
    return sizes[int(torch.randint(len(sizes), (), generator=keyed_generator(seed, number, stream=8)))]


def generate_images(families, captions, folder, steps=32, guidance=3.5, seed=0, batch=16, progress=True, process=(0, 1)):
    """The teacher's image of each caption as `folder`/00000.png and so on, with `metadata.jsonl` beside them.

    families: a family, or {(height, width): family} of which each image draws one. steps, guidance: obeyed as given; the
    shift is that of the stock pipeline. batch: images generated together. process: (number, count) of the processes that
    share the work, which may run at once. Resumes: whole images are kept. Returns the folder. Raises ValueError when it
    was begun with other captions, steps, guidance, seed or sizes.
    """
    folder = Path(folder)
    families = families if isinstance(families, dict) else {(families.height, families.width): families}
    rows = listing_rows(families, captions, steps, guidance, seed)
    missing = begin(folder, rows, process[0] == 0)
    chunks = [chunk for size in sorted(families) for chunk in in_chunks([i for i, row in enumerate(rows)
                                                                         if (row["height"], row["width"]) == size], batch)]
    mine = [chunk for chunk in chunks[process[0]::process[1]] if missing & set(chunk)]
    with tqdm(total=sum(len(missing & set(chunk)) for chunk in mine), desc="teacher's images", disable=not progress) as bar:
        for chunk in mine:
            for i, image in zip(chunk, generate(families, [rows[i] for i in chunk], chunk)):
                if i in missing:
                    atomic_write(folder / rows[i]["file_name"], lambda new: image.save(new, format="png"))
                    bar.update(1)
    return folder


def listing_rows(families, captions, steps, guidance, seed):
    """The lines of metadata.jsonl: how each image comes about."""
    rows, sizes = [], sorted(families)                                          # in whatever order they were named
    for i, caption in enumerate(captions):
        height, width = drawn_size(sizes, i, seed)
        rows.append({"file_name": f"{i:05d}.png", "text": caption, "seed": seed, "steps": steps, "guidance": guidance,
                     "shift": stock_shift(families[height, width]), "height": height, "width": width})
        if getattr(families[height, width], "negative_prompt", ""):
            rows[-1]["negative_prompt"] = families[height, width].negative_prompt
    return rows


@torch.no_grad()
def generate(families, rows, numbers):
    """The images, as PIL images, of rows of metadata.jsonl that have one size."""
    row = rows[0]
    family = families[row["height"], row["width"]]
    velocity = lambda x, t, cond: family.velocity(family.pipe.transformer, x, t, cond)
    ends = teacher_endpoints(family, velocity, [r["text"] for r in rows], start_noise(family, numbers, row["seed"]),
                             row["steps"], row["shift"], row["guidance"], len(rows))
    return [to_pil_image((image + 1) / 2) for image in family.decode(ends.to(family.pipe.device)).cpu().float()]


def difference(listing, rows):
    """What a listing that is there says otherwise: its number of images, or the names of the columns that differ."""
    there = [row for _, row in rows_of(listing)]
    if len(there) != len(rows):
        return f"{len(there)} images, not {len(rows)}"
    return ", ".join(sorted({name for old, new in zip(there, rows) for name in new if old.get(name) != new[name]}))


def begin(folder, rows, first=True):
    """The numbers of the images that are missing. The first process writes the list of all; it must be the one that is there."""
    listing, text = Path(folder) / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows)
    if listing.is_file():
        if listing.read_text(encoding="utf-8") != text:
            raise ValueError(f"{folder} was begun with other captions or settings ({difference(listing, rows)}): take another folder")
    elif first:
        atomic_write(listing, lambda new: new.write_text(text, encoding="utf-8"))
    return {i for i, row in enumerate(rows) if not (Path(folder) / row["file_name"]).is_file()}
