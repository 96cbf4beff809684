"""The bytes of a run's memory, counted from tensors without content."""

from typing import Any, NamedTuple

import torch

from scfm.models.blocks import blocks_of, first_blocks
from scfm.models.check import LAYERS
from scfm.models.loading import DTYPES
from scfm.models.quantize import BYTES
from scfm.training.config import DistillConfig
from scfm.training.optimizer import BYTES as BYTES_IN_8_BITS

PASSES = 4  # that need the base in a forward's step: two for the target, the student's, and its backward


class Base(NamedTuple):
    """Bytes of the frozen base. held: on the device, by part; whole: of all of it; on_host: of the blocks
    that live there."""

    held: dict[str, float]
    whole: float
    on_host: float


def count_base(config: DistillConfig, transformer: torch.nn.Module) -> Base:
    """`Base` of a transformer without adapters, as a config wants it held, in each of config.shard processes.

    ValueError for more blocks to swap than there are.
    """
    dtype = DTYPES[config.weight_dtype].itemsize
    each = BYTES.get(config.quantize, dtype)
    blocks = [numbers(block) for block in blocks_of(transformer)]
    swapped = []
    if config.blocks_to_swap:
        swapped = [numbers(b) for b in first_blocks(transformer, config.blocks_to_swap, "blocks_to_swap")]
    held = {"base": (numbers(transformer) - sum(swapped)) * each / (config.shard or 1)}
    if config.shard:  # whole for as long as it computes, and the next one, which is on its way
        held["blocks in use"] = 2 * max(blocks, default=0) * dtype
    if swapped:
        held["swapped block in use"] = max(swapped) * each
    if config.quantize:  # one layer at a time as it was, for NF4 beside the places of its values
        layers = [m.weight.numel() for m in transformer.modules() if isinstance(m, LAYERS)]
        held["layer in use"] = max(layers) * (dtype + 2 * (config.quantize == "nf4"))
    return Base(held, numbers(transformer) * each, sum(swapped) * each)


def count_training(config: DistillConfig, trained: int, adapters: int) -> dict[str, float]:
    """Bytes of what is trained. trained: its parameters; adapters: those of all adapters."""
    return {
        "adapters": 4 * adapters,
        "Adam": (BYTES_IN_8_BITS if config.use_8bit_adam else 2 * 4) * trained,
        "gradients": 4 * trained,
    }


def numbers(module: Any) -> int:
    """Parameters of a module."""
    return sum(p.numel() for p in module.parameters())
