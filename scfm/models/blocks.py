"""The repeated blocks of a transformer: compiled one by one, and some of them recomputed in backward."""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def blocks_of(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks that a transformer runs through, in order: the members of its lists of modules."""
    lists = [child for child in transformer.children() if isinstance(child, torch.nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


def first_blocks(
    transformer: torch.nn.Module, count: int, setting: str = "checkpoint_blocks"
) -> list[torch.nn.Module]:
    """The first `count` blocks, all for 0. ValueError for more than there are, with the setting's name."""
    blocks = blocks_of(transformer)
    if not 0 <= count <= len(blocks):
        raise ValueError(
            f"{setting} is {count}: {type(transformer).__name__} has {len(blocks)} blocks"
            f"{'; 0 means all' * (setting == 'checkpoint_blocks')}"
        )
    return blocks[: count or None]


def recompute_blocks(transformer: Any, count: int = 0) -> None:
    """Gradient checkpointing of the first `count` blocks, of all for 0; the others keep their activations.

    ValueError for more blocks than there are.
    """
    chosen = {id(block) for block in first_blocks(transformer, count)}

    def run(block: torch.nn.Module, *inputs: Any) -> Any:
        if id(block) in chosen:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    transformer.enable_gradient_checkpointing(run)
    transformer.train()


def compile_blocks(transformer: torch.nn.Module, **options: Any) -> None:
    """Compiles each block by itself: blocks that are alike share their code, and only the first of a kind
    takes minutes.

    options: of torch.compile
    """
    for block in blocks_of(transformer):
        block.compile(**options)
