"""Captions from a text file, a JSON-lines file, or a data set."""

import codecs
import csv
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from scfm.files import short_path
from scfm.models.hub import hub_reachable, unreachable

log = logging.getLogger(__name__)
COLUMNS = ("text", "prompt", "caption")  # where a caption may stand


def read_prompts(path: str | Path) -> list[str]:
    """The captions of a text file, one a line, of a .jsonl, .csv or .tsv file, or of
    `datasets:NAME[:SPLIT[:COLUMN]]`.

    FileNotFoundError, or ValueError that names the file and the line, also when there is no caption in it.
    """
    if str(path).startswith("datasets:"):
        return dataset_column(*str(path).split(":")[1:])
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no captions at {path}: give a text file with one caption a line, a "
            f".jsonl file, or "
            "datasets:NAME"
        )
    suffix = path.suffix.lower()
    if suffix in (".json", ".jsonl"):
        captions = [caption_in(row, f"{path}, line {number}") for number, row in json_lines(path)]
    elif suffix in (".csv", ".tsv"):
        captions = [caption_in(row, f"{path}, line {number}") for number, row in table_rows(path)]
    elif suffix in ("", ".txt", ".text", ".caption", ".prompts", ".md"):
        captions = comments_left_out(path)
    else:
        raise ValueError(
            f"{path}: a {suffix} file is no list of captions: give .txt (one a line), .jsonl, .csv or .tsv"
        )
    if not captions:
        raise ValueError(f"{path} holds no caption: write one a line")
    return captions


def comments_left_out(path: Path) -> list[str]:
    """The lines of a text file but those that begin with #; says how many those were."""
    lines = [line for _, line in text_lines(path)]
    captions = [line for line in lines if not line.startswith("#")]
    if len(captions) < len(lines):
        count = len(lines) - len(captions)
        words = "line that begins with # is left out as a comment"
        if count > 1:
            words = "lines that begin with # are left out as comments"
        log.warning("%s: %d %s", short_path(path), count, words)
    return captions


def table_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row by column) of a .csv file, or of a .tsv one, whose first line names the columns."""
    delimiter = "\t" if Path(path).suffix.lower() == ".tsv" else ","
    try:
        text = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}): save the file as UTF-8") from None
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    for row in reader:
        yield reader.line_num, row


def text_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines of a UTF-8 file that are not blank."""
    for number, line in enumerate(Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        try:
            if b"\0" in line:
                raise ValueError(
                    f"{path}, line {number}: holds NUL bytes, as UTF-16 does: save the file as UTF-8"
                )
            if line.strip():
                yield number, line.decode().strip()
        except UnicodeDecodeError as error:
            where = f"{path}, line {number}"
            raise ValueError(f"{where}: not UTF-8 ({error.reason}): save the file as UTF-8") from None


def json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of the lines of a JSON-lines file."""
    for number, line in text_lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            where = f"{path}, line {number}"
            raise ValueError(f"{where}: not JSON ({error.msg}): write one object a line") from None
        if not isinstance(row, dict):
            raise ValueError(f'{path}, line {number}: write an object such as {{"text": "a cat"}}')
        yield number, row


def caption_in(row: dict[str, Any], where: str) -> str:
    """What stands in a row's text, prompt or caption; ValueError when that is no caption."""
    captions = [row[name] for name in COLUMNS if name in row]
    if not captions or not isinstance(captions[0], str) or not captions[0].strip():
        raise ValueError(
            f"{where}: no caption: needs words as its {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}"
        )
    if not is_text(captions[0]):
        raise ValueError(f"{where}: {captions[0]!r} holds half a character: save the file as UTF-8")
    return captions[0].strip()


def is_text(words: str) -> bool:
    """Whether words are whole characters: an escape in JSON, or a foreign byte on the command line, may be
    half of one, which no tokenizer reads."""
    return not re.search("[\ud800-\udfff]", words)


def dataset_column(name: str, split: str = "train", column: str = "") -> list[str]:
    """The captions in a column of a data set, through the `datasets` library."""
    where = f"datasets:{name}:{split}"
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"{where} needs the datasets library: pip install 'scfm[data]'") from None
    if not Path(name).exists() and not constants.HF_HUB_OFFLINE and not hub_reachable():
        raise ValueError(
            f"{where} cannot be read ({unreachable()}; HF_HUB_OFFLINE=1 takes a copy that is here)"
        )
    try:
        data: Any = load_dataset(name, split=split)
    except (ValueError, OSError) as error:  # unknown name or split, no network: the library says which
        raise ValueError(f"{where} cannot be read ({str(error).splitlines()[0]})") from None
    column = column or next((c for c in COLUMNS if c in data.column_names), "")
    if column not in data.column_names:
        raise ValueError(
            f"{where} has no column {column or ' or '.join(COLUMNS)}: say "
            f"datasets:{name}:{split}:COLUMN, one of {', '.join(data.column_names)}"
        )
    return [caption_in({"text": text}, f"{where}, row {number}") for number, text in enumerate(data[column])]
