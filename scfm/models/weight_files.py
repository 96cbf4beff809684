"""Which weights lie in the folder of a pipeline's part, by the names and headers of files: none is loaded."""

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

# as diffusers and transformers write them: whole or in shards, of a variant such as fp16 or not
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[A-Za-z]\w*))?(?:-\d{5}-of-\d{5})?"
    r"(?:\.(?P<old>[A-Za-z]\w*))?\.(?:safetensors|bin)"
)
INDEX = re.compile(r".+\.(?:safetensors|bin)\.index(?:\.(?P<variant>\w+))?\.json")  # of shards
PREFERRED = ("bf16", "fp16")  # what the large models were trained in, before what was made from it


def variants_in(folder: Path) -> set[str]:
    """The variants of which a folder holds weights; "" are those without one."""
    return {variant for _, variant in weights_in(folder)}


def weights_in(folder: Path) -> list[tuple[Path, str]]:
    """[(file of weights, its variant)] of a folder, in order."""
    matches = [(path, WEIGHTS.fullmatch(path.name)) for path in sorted(folder.glob("*"))]
    return [(path, match["variant"] or match["old"] or "") for path, match in matches if match]


def common_variant(variants: dict[str, set[str]]) -> str:
    """The variant to load a pipeline in, "" for none, by what each part has.

    ValueError when parts that have no weights without a variant have none in common.
    """
    bound = {part: found for part, found in variants.items() if found and "" not in found}
    if not bound:
        return ""
    common = set.intersection(*bound.values())
    if not common:
        each = ", ".join(f"{part} in {' and '.join(sorted(found))}" for part, found in bound.items())
        raise ValueError(f"its parts have no variant of their weights in common ({each})")
    return next((name for name in PREFERRED if name in common), min(common))


def folder_error(folder: Path) -> str:
    """That a part has no folder, or an empty one, in a few words; else ""."""
    return "" if folder.is_dir() and any(folder.iterdir()) else f"has no {folder.name}"


def weights_error(folder: Path, variant: str) -> str:
    """What the folder of a model of diffusers or transformers lacks, in a few words, or "". Headers are read
    alone."""
    name, files = folder.name, [path for path, its in weights_in(folder) if its == variant]
    lost = missing_shards(folder, variant)
    if not (folder / "config.json").is_file():
        return f"has no config.json in {name}"
    if lost:
        return f"has no {name}/{lost[0]}, " + (f"nor {len(lost) - 1} more" * (len(lost) > 1) or "a shard")
    if not files:
        return f"has no weights in {name} (such as diffusion_pytorch_model.safetensors)"
    errors = ((path, header_error(path)) for path in files if path.suffix == ".safetensors")
    return next(
        (f"has a {name}/{path.name} that is not whole ({error})" for path, error in errors if error), ""
    )


def missing_shards(folder: Path, variant: str) -> list[str]:
    """The files that the index of sharded weights names, and that are not there."""
    matches = [(path, INDEX.fullmatch(path.name)) for path in folder.glob("*.json")]
    indices = [path for path, match in matches if match and (match["variant"] or "") == variant]
    named = {file for path in indices for file in json.loads(path.read_text())["weight_map"].values()}
    return sorted(file for file in named if not (folder / file).is_file())


def header_error(path: Path) -> str:
    """Why a safetensors file is not whole, or "": its header says how long it is."""
    try:
        with safe_open(str(path), framework="pt"):
            return ""
    except SafetensorError as error:  # also of a pointer that git left without its large files
        return str(error)
