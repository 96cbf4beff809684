"""Labelled images, such as CIFAR-10, from parquet files in the Hugging Face layout."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torchvision.transforms import v2

from scfm.data.images import as_seen, open_image


class LabelledImages(NamedTuple):
    """A data set in memory. pixels: (N, 3, H, W) uint8; labels: (N,) int64; names: of the classes, one for
    each label."""

    pixels: torch.Tensor
    labels: torch.Tensor
    names: tuple[str, ...]


def load_labelled_images(
    data: str | Path, split: str = "train", size: int = 32, columns: tuple[str, str] = ("img", "label")
) -> LabelledImages:
    """A folder of parquet files in the layout of the Hugging Face hub, or hub:OWNER/NAME. Needs scfm[data].

    columns: of the image and of its label. FileNotFoundError: no such folder, no file of the split.
    ValueError: other
    columns, a file that is no parquet, an image that cannot be read or a label that is none; file and row are
    named.
    """
    if str(data).startswith("hub:"):
        parts = [(str(data)[4:], *read_hub(str(data)[4:], split, columns))]
    else:
        parts = [(path, *read_parquet(path, columns)) for path in parquet_files(data, split)]
    transform, pixels, labels, names = to_pixels(size), [], [], ()
    for place, cells, column, names in parts:  # noqa: B007 - the last part's names are those of all
        for row, (cell, label) in enumerate(zip(cells, column, strict=True)):
            if not isinstance(label, int) or label < 0:
                raise ValueError(f"{place}, row {row}: the label {label!r} is no whole number of at least 0")
            pixels.append(transform(decode(cell, f"{place}, row {row}")))
            labels.append(label)
    if not pixels:
        raise ValueError(f"{data} holds no row of the split {split}")
    count = max(labels) + 1
    known = names if len(names) >= count else tuple(map(str, range(count)))
    return LabelledImages(torch.stack(pixels), torch.tensor(labels), known)


def decode(cell: Any, place: str) -> Image.Image:
    """An image in RGB of one cell of the column: {"bytes": ...} or an image of PIL. ValueError that names
    `place`."""
    try:
        return as_seen(cell) if isinstance(cell, Image.Image) else open_image(bytes(cell["bytes"]))
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"is no image ({type(error).__name__})"
        raise ValueError(f"{place} {reason}: mend it, or leave that row out") from None


def to_pixels(size: int) -> Any:
    """The transform of one image: (3, size, size) uint8, the shorter side brought to `size`, the middle of
    the longer one."""
    return v2.Compose([v2.PILToTensor(), v2.Resize(size, antialias=True), v2.CenterCrop(size)])


def parquet_files(folder: str | Path, split: str) -> list[Path]:
    """The files {split}-*.parquet in `folder` or below. FileNotFoundError when there is no folder, or no such
    file in it."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder: name one with {split}-*.parquet files, or hub:OWNER/NAME"
        )
    files = sorted(Path(folder).rglob(f"{split}-*.parquet"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no {split}-*.parquet: the layout of the Hugging Face hub is needed"
        )
    return files


def need_columns(names: Sequence[str], columns: Sequence[str], place: str | Path) -> None:
    """ValueError when a column is missing."""
    missing = [name for name in columns if name not in names]
    if missing:
        raise ValueError(
            f"{place} has no column {' and no '.join(missing)}: its columns are {', '.join(names)}"
        )


def read_parquet(path: Path, columns: tuple[str, str]) -> tuple[list[Any], list[Any], tuple[str, ...]]:
    """(cells, labels, names) of a file; names from the hub's note in it, () without one. ValueError: no
    parquet, other columns."""
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
    except pyarrow.ArrowInvalid:
        raise ValueError(f"{path} is no parquet file, or a broken one: fetch it again") from None
    need_columns(schema.names, columns, path)
    table = pyarrow.parquet.read_table(path, columns=list(columns))
    note = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = note.get("info", {}).get("features", {}).get(columns[1], {}).get("names", ())
    return table[columns[0]].to_pylist(), table[columns[1]].to_pylist(), tuple(names)


def read_hub(name: str, split: str, columns: tuple[str, str]) -> tuple[Any, Any, tuple[str, ...]]:
    """The same of a data set on the Hugging Face hub, through the library `datasets`."""
    from datasets import load_dataset

    rows: Any = load_dataset(name, split=split)
    need_columns(rows.column_names, columns, name)
    return rows[columns[0]], rows[columns[1]], tuple(getattr(rows.features[columns[1]], "names", ()))
