"""LoRA files of any origin: where they lie, what they change, how they join a pipeline."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from scfm.models.lora import WEIGHT_NAME

# how the name of a text encoder's tensor begins: as diffusers writes it, or as kohya's trainer does
TEXT_ENCODER = re.compile(r"text_encoder(?:_(?P<diffusers>\d))?\.|lora_te(?P<kohya>\d)?_")
# they remark on text encoders that a step LoRA leaves alone
REMARKING = [logging.getLogger(f"diffusers.loaders.{part}") for part in ("lora_base", "peft")]


def lora_file(path: str | Path) -> Path:
    """The safetensors file of a LoRA, by file or folder.

    FileNotFoundError when there is none; ValueError for other formats, which may hold code, and for other
    tensors.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        path = files[0] if len(files) == 1 else path / WEIGHT_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"no LoRA and no pipeline at {path}: give a .safetensors file, or a folder with one"
        )
    names = tensor_names(path)
    if not any("lora" in name.lower() for name in names):
        raise ValueError(f"{path} holds no LoRA: none of its {len(names)} tensors is named so")
    return path


def tensor_names(path: str | Path) -> list[str]:
    """The names of the tensors in a safetensors file; none is read. ValueError for another format."""
    try:
        with safe_open(str(path), framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}); pickles are not opened") from None


def changed_text_encoders(path: str | Path) -> list[str]:
    """The text encoders that a LoRA file changes, by their names in the pipeline."""
    matches = [TEXT_ENCODER.match(name) for name in tensor_names(path)]
    numbers = {match["diffusers"] or match["kohya"] or "1" for match in matches if match}
    return ["text_encoder" if number == "1" else f"text_encoder_{number}" for number in sorted(numbers)]


def load_adapter(pipe: Any, path: str | Path, name: str) -> None:
    """Loads a LoRA file into a pipeline as adapter `name`.

    ValueError when nothing in it fits the transformer.
    """
    path, kind = Path(path), type(pipe).__name__
    try:
        with silenced(REMARKING):
            pipe.load_lora_weights(
                str(path.parent), weight_name=path.name, adapter_name=name, use_safetensors=True
            )
    except (ValueError, TypeError, KeyError, RuntimeError, IndexError) as error:  # whatever does not fit
        raise ValueError(f"{path} does not fit this {kind} ({' '.join(str(error).split())[:200]})") from None
    if name not in pipe.get_list_adapters().get("transformer", []):
        raise ValueError(f"{path} has nothing for the transformer of this {kind}")


@contextmanager
def silenced(loggers: Sequence[logging.Logger]) -> Iterator[None]:
    """Loggers that say nothing within the block."""
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
