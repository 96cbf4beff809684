"""Where a pipeline comes from: its folder, resolved and read once, then passed on. No weight is read here."""

import json
import re
from collections.abc import Collection
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import snapshot_download

from scfm.models.base import PipelineFamily
from scfm.models.family import find_family, known_families
from scfm.models.hub import hub_reachable, unreachable
from scfm.models.weight_files import common_variant, folder_error, variants_in, weights_error

INDEX = "model_index.json"
MODELS = ("transformer", "vae", "text_encoder", "image_encoder", "unet")  # how their names begin
LIBRARIES = ("diffusers", "transformers")  # whose files of weights have names that we know
BELOW = (f"snapshots/*/{INDEX}", f"*/{INDEX}")  # where a pipeline lies in the hub's cache, or in a download
CONFIG_FILES = [INDEX, "*/config.json", "*/scheduler_config.json"]
HUB_FILES = [INDEX, "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja", "*/*.safetensors"]


class PipelineSource:
    """A saved pipeline, known by its configuration files.

    name: its folder (as `save_pretrained` writes it), or the name of its repository on the hub.
    configs_only: of a repository on the hub nothing but configuration files is downloaded
    Attributes: `folder`, resolved; `index`, what model_index.json holds: the class of the pipeline and of
    each part.
    FileNotFoundError when there is no pipeline, or when the hub cannot be reached and has no copy here.
    ValueError when model_index.json is damaged.
    """

    def __init__(self, name: "str | Path | PipelineSource", configs_only: bool = False) -> None:
        if isinstance(name, PipelineSource):
            self.folder, self.index = name.folder, name.index
            return
        self.folder = resolve_folder(name, configs_only)
        index = self.folder / INDEX
        if not index.is_file():
            raise FileNotFoundError(f"no pipeline in {self.folder}: {what_is_there(self.folder)}")
        try:
            self.index: dict[str, Any] = dict(json.loads(index.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{index} is not as save_pretrained writes it ({type(error).__name__}: {error}): download or "
                "save the pipeline again"
            ) from None

    @property
    def class_name(self) -> str:
        """The name of the pipeline's class."""
        return self.index.get("_class_name", "pipeline of no class")

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
        try:
            factor = getattr(find_family(self.class_name), "vae_factor", PipelineFamily.vae_factor)(
                config["vae"]
            )
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from None
        name = "scale_factor_temporal"  # of videos; a pipeline without its VAE has a guess
        return SimpleNamespace(
            transformer=SimpleNamespace(config=SimpleNamespace(**config["transformer"])),
            vae_scale_factor=factor,
            config=self.index,
            **({f"vae_{name}": config["vae"][name]} if name in config["vae"] else {}),
        )

    @property
    def parts(self) -> dict[str, str]:
        """{part: the library of its class}, without those that the folder was saved without."""
        pairs = {name: value for name, value in self.index.items() if isinstance(value, list)}
        return {name: value[0] for name, value in pairs.items() if value and isinstance(value[0], str)}

    def check_files(self, without: Collection[str] = ()) -> None:
        """FileNotFoundError when a part has no folder or no weights, or weights that are not whole. None is
        loaded.

        without: parts that nobody will load. Configuration files alone are enough for everything else here.
        """
        for name in (part for part in self.parts if part not in without):
            error = folder_error(self.folder / name)
            if name in self.variants and not error:
                error = weights_error(self.folder / name, self.variant_of(name) or "")
            if error:
                raise FileNotFoundError(
                    f"the pipeline in {self.folder} {error}: download or save the whole pipeline again"
                )

    @cached_property
    def variant(self) -> str:
        """The variant of the weights to load, such as fp16, where there are none without; else "".

        ValueError when the parts have none in common.
        """
        try:
            return common_variant(self.variants)
        except ValueError as error:
            raise ValueError(f"the pipeline in {self.folder} cannot be loaded: {error}") from None

    @cached_property
    def variants(self) -> dict[str, set[str]]:
        """{part: the variants of which it has weights}, of the models whose files are named as we know it."""
        models = [
            name for name, library in self.parts.items() if library in LIBRARIES and name.startswith(MODELS)
        ]
        return {name: variants_in(self.folder / name) for name in models}

    def variant_of(self, part: str) -> str | None:
        """The variant of one part's weights, as `from_pretrained` takes it."""
        return self.variant if self.variant in self.variants.get(part, ()) and self.variant else None

    def part_config(self, part: str) -> dict[str, Any]:
        """The config.json of one part. FileNotFoundError names the part that lacks it."""
        path = self.folder / part / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"the pipeline in {self.folder} has no {part}/config.json: download or save it again"
            )
        return json.loads(path.read_text(encoding="utf-8"))

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
        """A new scheduler for Euler steps with the shift that the folder describes, whatever its class
        there."""
        config: Any = FlowMatchEulerDiscreteScheduler.load_config(str(self.folder), subfolder="scheduler")
        if "flow_shift" in config:  # as UniPC and DPM-Solver call it
            return FlowMatchEulerDiscreteScheduler(shift=config["flow_shift"])
        return FlowMatchEulerDiscreteScheduler.from_config(config)

    def empty_transformer(self) -> torch.nn.Module:
        """The transformer on the meta device: every layer and shape, no weight."""
        model_class: Any = self.part_class("transformer")
        with torch.device("meta"):
            return model_class.from_config(model_class.load_config(str(self.folder), subfolder="transformer"))


def what_is_there(path: Path) -> str:
    """What lies where a pipeline was expected, and the mend."""
    if path.is_file():
        return (
            "it is a single file, and a pipeline is a folder: read it with from_single_file of the "
            "pipeline's class in diffusers, write it with save_pretrained, and name that folder"
        )
    below = next((found.parent for pattern in BELOW for found in sorted(path.glob(pattern))), None)
    if below:
        return f"there is one in {below}: name that folder"
    if (path / "config.json").is_file():
        return f"it is a part alone; {INDEX} and the other parts lie one folder above it in a whole pipeline"
    return f"expected {INDEX} there (a folder written by save_pretrained, or a downloaded snapshot)"


def resolve_folder(name: str | Path, configs_only: bool = False) -> Path:
    """The folder of a pipeline: `name` itself where it is one, else a snapshot of the hub's repository of
    that name.

    configs_only: without weights and tokenizers

    FileNotFoundError when it is neither, or when the hub cannot be reached and has no copy here.
    """
    folder = Path(name)
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or folder.parent.exists():
        return folder
    online, files = hub_reachable(), CONFIG_FILES if configs_only else HUB_FILES
    try:
        return Path(snapshot_download(str(name), allow_patterns=files, local_files_only=not online))
    except Exception as error:  # the hub's client raises a dozen kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        why = f"the hub says: {reason}" if online else f"no copy from the hub is here ({unreachable()})"
        raise FileNotFoundError(f"no pipeline at {name}: there is no such folder, and {why}") from None
