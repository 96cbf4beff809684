"""Where a pipeline comes from: its folder, resolved and read once, then passed on. No weight is read here."""

import json
import re
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import snapshot_download

from scfm.models.family import find_family, known_families

INDEX = "model_index.json"
HUB_FILES = [INDEX, "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]


class PipelineSource:
    """A saved pipeline, known by its configuration files.

    name: its folder (as `save_pretrained` writes it), or the name of its repository on the hub.
    Attributes: `folder`, resolved; `index`, what model_index.json holds: the class of the pipeline and of
    each part.
    FileNotFoundError when there is no pipeline, or when the hub cannot be reached and has no copy here.
    """

    def __init__(self, name: "str | Path | PipelineSource") -> None:
        if isinstance(name, PipelineSource):
            self.folder, self.index = name.folder, name.index
            return
        self.folder = resolve_folder(name)
        index = self.folder / INDEX
        if not index.is_file():
            raise FileNotFoundError(
                f"no pipeline in {self.folder}: expected {INDEX} there "
                "(a folder written by save_pretrained, or a downloaded snapshot)"
            )
        self.index: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))

    @property
    def class_name(self) -> str:
        """The name of the pipeline's class."""
        return self.index.get("_class_name", "")

    @cached_property
    def family(self) -> type:
        """The family class for this pipeline. ValueError when none is known for its class."""
        family = find_family(self.class_name)
        if family is None:
            raise ValueError(
                f"{self.folder} holds a {self.class_name}, which scfm does not know; "
                f"it knows {', '.join(known_families())}"
            )
        return family

    @cached_property
    def skeleton(self) -> SimpleNamespace:
        """What a family asks of a pipeline when it is made, from configuration files: enough to refuse a
        wrong size at once."""
        config = {part: self.part_config(part) for part in ("transformer", "vae")}
        blocks = config["vae"].get("block_out_channels") or config["vae"].get("encoder_block_out_channels")
        if not blocks:
            raise ValueError(
                f"{self.folder}: the VAE's configuration has no block_out_channels, so its scale is unknown"
            )
        return SimpleNamespace(
            transformer=SimpleNamespace(config=SimpleNamespace(**config["transformer"])),
            vae_scale_factor=2 ** (len(blocks) - 1),
        )

    def part_config(self, part: str) -> dict[str, Any]:
        """The config.json of one part."""
        return json.loads((self.folder / part / "config.json").read_text(encoding="utf-8"))

    def part_class(self, part: str) -> type:
        """The class of one part, from whatever package model_index.json names. ValueError when it cannot be
        imported."""
        library, name = self.index[part]
        try:
            return getattr(import_module(library), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"{self.folder}: its {part} is a {name} of {library}, which cannot be imported here: {error}"
            ) from None

    def scheduler(self) -> Any:
        """A new scheduler as the folder describes it."""
        return FlowMatchEulerDiscreteScheduler.from_pretrained(str(self.folder), subfolder="scheduler")

    def empty_transformer(self) -> torch.nn.Module:
        """The transformer on the meta device: every layer and shape, no weight."""
        model_class: Any = self.part_class("transformer")
        with torch.device("meta"):
            return model_class.from_config(model_class.load_config(str(self.folder), subfolder="transformer"))


def resolve_folder(name: str | Path) -> Path:
    """The folder of a pipeline: `name` itself where it is one, else a snapshot of the hub's repository of
    that name.

    FileNotFoundError when it is neither, or when the hub cannot be reached and has no copy here.
    """
    folder = Path(name)
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or folder.parent.exists():
        return folder
    try:
        return Path(snapshot_download(str(name), allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's client raises a dozen kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"no pipeline at {name}: there is no such folder, and the hub says: {reason}"
        ) from None
