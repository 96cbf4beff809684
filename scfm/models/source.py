"""The folder of a pipeline: where it lies, which classes it names, what its configuration files say. No weight is read."""
import json
import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub import snapshot_download


def model_index(folder):
    """What model_index.json says: the class of the pipeline, and of each of its parts."""
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"no pipeline in {folder}: expected {index.name} there "
                                "(a folder written by save_pretrained, or a downloaded snapshot)")
    return json.loads(index.read_text())


def resolve_folder(name):
    """The folder of a pipeline: `name` itself where it is one, else a snapshot of the hub's repository of that name.

    FileNotFoundError when it is neither, or when the hub cannot be reached and has no copy here.
    """
    folder = Path(name)
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or folder.parent.exists():
        return folder
    try:
        return Path(snapshot_download(str(name), allow_patterns=["model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]))
    except Exception as error:                 # the hub's client raises a dozen kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(f"no pipeline at {name}: there is no such folder, and the hub says: {reason}") from None


def without_weights(folder):
    """What a family asks of a pipeline when it is made, read from configuration files: enough to refuse a wrong size at once."""
    told = {part: json.loads((Path(folder) / part / "config.json").read_text()) for part in ("transformer", "vae")}
    blocks = told["vae"].get("block_out_channels") or told["vae"].get("encoder_block_out_channels")
    if not blocks:
        raise ValueError(f"{folder}: the VAE's configuration has no block_out_channels, so its scale cannot be told")
    return SimpleNamespace(transformer=SimpleNamespace(config=SimpleNamespace(**told["transformer"])),
                           vae_scale_factor=2 ** (len(blocks) - 1))


def part_class(folder, name):
    """The class of one part of a pipeline, from whatever package model_index.json names; ValueError when it is not there."""
    library, kind = model_index(folder)[name]
    try:
        return getattr(import_module(library), kind)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{folder}: its {name} is a {kind} of {library}, which cannot be imported here: {error}") from None


def empty_transformer(folder):
    """The transformer of a pipeline on the meta device: every layer and shape, no weight."""
    kind = part_class(folder, "transformer")
    with torch.device("meta"):
        return kind.from_config(kind.load_config(str(folder), subfolder="transformer"))
