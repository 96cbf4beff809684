"""A step LoRA under the names that ComfyUI gives the layers: `scfm export --format comfyui`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.normalization import AdaLayerNormContinuous
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scfm.files import atomic_write
from scfm.models.comfyui_names import ComfyNames

PREFIX = "diffusion_model."  # which its loader puts before the names of the network's layers
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # the first is a block's
TENSOR = re.compile(r"transformer\.(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")


class Place(NamedTuple):
    """Where the output rows of a layer are in ComfyUI's model.

    layer: the name there
    start, rows: the rows of that layer's weight that are this one's, of `total`
    swapped: its two halves stand the other way round there
    """

    layer: str
    start: int
    rows: int
    total: int
    swapped: bool


def find_places(transformer: torch.nn.Module, names: ComfyNames) -> dict[str, Place]:
    """{name of a linear layer: its place}, of those that have one. transformer: may be without weights."""
    modules = dict(transformer.named_modules())
    linears = {name: m.out_features for name, m in modules.items() if isinstance(m, torch.nn.Linear)}
    fused: dict[str, dict[int, tuple[str, int]]] = {}  # {their layer: {order: (name, rows)}}
    for name, rows in linears.items():
        found = name_there(name, names.layers)
        if found:
            order, layer = found
            fused.setdefault(layer, {})[order] = name, rows
    places = {}
    for layer, parts in fused.items():
        start, total = 0, sum(rows for _, rows in parts.values())
        for _, (name, rows) in sorted(parts.items()):
            parent = modules[name.rpartition(".")[0]]
            swapped = names.swaps_norms and isinstance(parent, AdaLayerNormContinuous)
            places[name] = Place(layer, start, rows, total, swapped)
            start += rows
    return places


def name_there(name: str, layers: Mapping[str, str]) -> tuple[int, str] | None:
    """(the number of the rule, the name in ComfyUI) of a layer; None where no rule knows it."""
    match = NUMBER.search(name)
    number = match[0] if match else ""
    template = NUMBER.sub("{}", name, count=1)
    rules = list(layers)
    if template in layers:
        return rules.index(template), layers[template].replace("{}", number)
    return (rules.index("*"), name) if "*" in layers else None


def read_layers(path: str | Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{layer: (A (r, inputs), B (outputs, r))} of a LoRA file, alpha / rank multiplied into B: ComfyUI does
    not read the header in which diffusers has it.

    ValueError for what is no plain LoRA of linear layers of the transformer.
    """
    with safe_open(str(path), framework="pt") as opened:
        factor = header_factor(path, opened.metadata() or {})
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(str(path)).items():
        match = TENSOR.fullmatch(key)
        if not match or tensor.ndim != 2:
            raise ValueError(
                f"{path}: {key} {tuple(tensor.shape)} has no place in ComfyUI: it takes the LoRA of linear "
                "layers of the transformer alone"
            )
        parts.setdefault(match["layer"], {})[match["part"]] = tensor
    return {layer: (part["A"], part["B"] * factor) for layer, part in parts.items()}


def header_factor(path: str | Path, header: Mapping[str, str]) -> float:
    """alpha / rank, by what diffusers wrote into the header; 1 where it wrote nothing. ValueError for more
    than one of them, and for other kinds of adapters.
    """
    metadata = json.loads(header.get("lora_adapter_metadata", "{}"))
    settings = {key.removeprefix("transformer."): value for key, value in metadata.items()}
    strange = [
        key for key in ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern") if settings.get(key)
    ]
    if strange:
        raise ValueError(
            f"{path} has {strange[0]}: only LoRAs as scfm writes them can be written for ComfyUI"
        )
    return settings.get("lora_alpha", 1) / settings.get("r", settings.get("lora_alpha", 1))


def comfyui_tensors(
    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]], places: Mapping[str, Place]
) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA file for ComfyUI: of layers that are fused there, A one below the other and B in
    blocks, the rows of what no LoRA changes 0.

    ValueError for a layer without a place, by its name.
    """
    strangers = [layer for layer in layers if layer not in places]
    if strangers:
        raise ValueError(
            f"{len(strangers)} layers of the LoRA have no name in ComfyUI, as {strangers[0]}: distil with "
            "--lora_layers that leave them out"
        )
    grouped: dict[str, list[str]] = {}
    for layer in sorted(layers, key=lambda layer: places[layer].start):
        grouped.setdefault(places[layer].layer, []).append(layer)
    tensors = {}
    for theirs, group in grouped.items():
        down = torch.cat([layers[layer][0] for layer in group])
        up = torch.zeros(places[group[0]].total, len(down), dtype=down.dtype)
        column = 0
        for layer in group:
            place, b = places[layer], layers[layer][1]
            block = torch.cat(b.chunk(2)[::-1]) if place.swapped else b
            up[place.start : place.start + place.rows, column : column + b.shape[1]] = block
            column += b.shape[1]
        tensors[f"{PREFIX}{theirs}.lora_A.weight"] = down.contiguous()
        tensors[f"{PREFIX}{theirs}.lora_B.weight"] = up
    return tensors


def require_names(family: Any) -> ComfyNames:
    """A family's names in ComfyUI. ValueError where they are not known."""
    if family.comfyui_names is None:
        raise ValueError(
            f"scfm does not know what ComfyUI calls the layers of {family.__name__}: leave --format out and "
            "use the LoRA with diffusers"
        )
    return family.comfyui_names


def save_for_comfyui(
    files: Mapping[str, Path], transformer: torch.nn.Module, names: ComfyNames, folder: Path
) -> list[Path]:
    """Writes each of a step LoRA's files under ComfyUI's names, each under its adapter's.

    files: {adapter: file}
    transformer: that they are for; may be without weights
    """
    places, written = find_places(transformer, names), []
    for adapter, path in files.items():
        tensors = comfyui_tensors(read_layers(path), places)
        written.append(folder / f"{adapter}.safetensors")
        atomic_write(
            written[-1],
            lambda new, tensors=tensors: save_file(tensors, str(new), metadata={"format": "pt"}),
        )
    return written
