"""What attention keeps for backward on a GPU, where it is counted on tensors without content."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def fused_attention(keep: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    """Within the block attention tells `keep` of what a GPU's kernels keep for backward: queries, keys,
    values and its result. Its weights (tokens, tokens), which they make again and which tensors without
    content would keep, are left out: of a video they would be far more than all the rest."""
    functional: Any = torch.nn.functional
    attention = functional.scaled_dot_product_attention

    def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **more: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            result = attention(query, key, value, *args, **more)
        for tensor in (query, key, value, result):
            keep(tensor)
        return result

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = attention
