"""AdamW with its moments in 8 bits, by bitsandbytes."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

BYTES = 2 * (1 + 4 / 256)  # of a weight's two moments: a byte each, and a scale in float32 for 256 of them


def in_8_bits(optimizer: torch.optim.AdamW, scheduler: LambdaLR) -> tuple[Any, LambdaLR]:
    """bitsandbytes' AdamW8bit and its scheduler, with the settings of an AdamW that has made no step.

    Moments of tensors with fewer than 4096 numbers stay in float32. The state is part of `state_dict`, and a
    resumed run goes on to the last bit.
    """
    groups = [
        {name: group[name] for name in ("params", "lr", "betas", "eps", "weight_decay")}
        for group in optimizer.param_groups
    ]
    small = import_module("bitsandbytes").optim.AdamW8bit(groups)
    rates: Any = scheduler.lr_lambdas
    return small, LambdaLR(small, rates)


def require_8bit_adam(device: str | torch.device) -> None:
    """ValueError with the mend when AdamW in 8 bits cannot be had on this device: it takes a step to see."""
    mend = "leave --use_8bit_adam out"
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"use_8bit_adam needs bitsandbytes: pip install 'scfm[adam8bit]', or {mend}")
    weight = torch.nn.Parameter(torch.zeros(4096, device=device))
    weight.grad = torch.ones_like(weight)
    library = import_module("bitsandbytes")
    try:
        library.optim.AdamW8bit([weight]).step()
    except Exception as error:  # its versions raise half a dozen kinds where a kernel is missing
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"use_8bit_adam: bitsandbytes {library.__version__} makes no step on a "
            f"{torch.device(device).type} here ({reason}): upgrade it, or {mend}"
        ) from None
