"""Several LoRA adapters of a network as one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer


def concatenate_adapters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The active adapters of a network as one of scale 1 whose alpha is its rank.

    returns: {LAYER.lora_A.weight and LAYER.lora_B.weight: tensor}

    The sum of the products B A is exact, since (s1 B1 | s2 B2) (A1 / A2) = s1 B1 A1 + s2 B2 A2: ranks are
    laid side by side. Each layer gets the full rank, zeros where an adapter has nothing for it, so that the
    file needs no alphas and no table of ranks. ValueError for adapters that are more than products (DoRA, a
    bias).
    """
    layers: dict[str, Any] = {
        name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)
    }
    adapters = next(iter(layers.values())).active_adapters
    rank = sum(max((layer.r.get(a, 0) for layer in layers.values()), default=0) for a in adapters)
    merged = {}
    for name, layer in layers.items():
        present = [adapter for adapter in adapters if adapter in layer.lora_A]
        if not is_plain(layer, present):
            raise ValueError(
                f"{name}: DoRA and LoRA with a bias are no plain products and cannot be put side by side"
            )
        if present:
            down, up = side_by_side(layer, present, rank)
            merged[f"{name}.lora_A.weight"], merged[f"{name}.lora_B.weight"] = down, up
    return merged


def is_plain(layer: Any, adapters: Sequence[str]) -> bool:
    """Whether what these adapters add to a layer is a product B A and nothing else."""
    biases: Mapping[str, bool] = layer.lora_bias
    return not any(a in layer.lora_magnitude_vector or biases.get(a) for a in adapters)


def side_by_side(layer: Any, adapters: Sequence[str], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) of a layer: its adapters' matrices side by side, B scaled, filled up with zeros to `rank`."""
    down = [layer.lora_A[a].weight.float() for a in adapters]
    up = [layer.scaling[a] * layer.lora_B[a].weight.float() for a in adapters]
    lacking = rank - sum(len(matrix) for matrix in down)
    down.append(down[0].new_zeros(lacking, *down[0].shape[1:]))
    up.append(up[0].new_zeros(len(up[0]), lacking, *up[0].shape[2:]))
    return torch.cat(down).detach().cpu().contiguous(), torch.cat(up, 1).detach().cpu().contiguous()
