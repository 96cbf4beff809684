"""The frozen transformer in fewer bits, int8 or NF4: its linear layers are replaced in place."""

from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

BYTES = {"int8": 1.0, "nf4": 0.5625}  # of a weight, scales included where they are not negligible
KINDS = "int8 or nf4"
HELP = (
    "int8 (half of bf16's memory, an error near bf16's own) or nf4 (a quarter, an error some 15 times as "
    "large)"
)


def is_known(kind: str) -> bool:
    """Whether it is a kind of quantization, or "" for none."""
    return kind == "" or kind in BYTES


def require_quantizer(kind: str, mend: str = "leave --quantize out") -> None:
    """ValueError with the mend when a kind is unknown; nothing for ""."""
    if not is_known(kind):
        raise ValueError(f"quantize is {kind!r}: take {KINDS}, or {mend}")


def quantize_linears(
    model: torch.nn.Module,
    kind: str,
    device: str | torch.device = "cpu",
    on_host: Collection[torch.nn.Module] = (),
) -> torch.nn.Module:
    """The model with its linear layers in fewer bits, changed in place, on the device: layer by layer, so
    that the device never holds the whole in its old dtype. ValueError for an unknown kind.

    Layers that the model's class wants in float32 (`_keep_in_fp32_modules`) stay as they are: Wan casts the
    sines of the time to the dtype of its time embedding's weights, where there are numbers of NF4 in pairs.

    on_host: parts of the model whose weights stay on the host, as `swap_blocks` wants them
    """
    require_quantizer(kind)
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    stays = {id(module) for part in on_host for module in part.modules()}
    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and not kept & set(name.split(".")):
            small = LAYERS[kind](layer.to(device))  # where it is computed faster
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, small.to("cpu") if id(layer) in stays else small)
    return model if on_host else model.to(device)


class FrozenProduct(torch.autograd.Function):
    """x W^T with a frozen W (out, in) that is made of `parts` when it is needed.

    W is made again in backward. Saved for it, as plain autograd does, the weights of all layers would wait
    there in the dtype of x, and nothing would be won.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dense: Callable[..., torch.Tensor], *parts: torch.Tensor
    ) -> torch.Tensor:
        ctx.dense = dense
        ctx.save_for_backward(*parts)
        return F.linear(x, dense(x.dtype, *parts))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        parts = ctx.saved_tensors
        return gradient @ ctx.dense(gradient.dtype, *parts), *[None] * (1 + len(parts))


class Int8Linear(torch.nn.Linear):
    """A frozen linear layer whose weight is int8 with one scale for each row: y = s * (Q x) + bias.

    Products are computed in the dtype of x, so the gradient flows through it as through the layer that it
    stands for. Our own, as torchao's comes in with every `import diffusers` and writes to the screen.
    """

    scale: torch.Tensor

    def __init__(self, layer: torch.nn.Linear) -> None:
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127  # (out, 1)
        self.weight = torch.nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale[:, 0].to(layer.weight.dtype))
        self.bias = layer.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        product: Any = FrozenProduct.apply(input, int8_weight, self.weight)
        product = product * self.scale.to(input.dtype)
        return product if self.bias is None else product + self.bias


def int8_weight(dtype: torch.dtype, weight: torch.Tensor) -> torch.Tensor:
    """The whole numbers in a dtype that products are computed in."""
    return weight.to(dtype)


# The 16 values: quantiles of the normal distribution, with an exact 0 (QLoRA, arXiv 2305.14314, appendix E)
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
NF4_BLOCK = 64  # weights, row by row, that share a scale


class Params4bit(torch.nn.Parameter):
    """Packed weights. diffusers' loader of LoRAs knows by this name, bitsandbytes', that the shape of the
    layer stands in `quant_state`."""

    quant_state: SimpleNamespace


class NF4Linear(torch.nn.Linear):
    """A frozen linear layer in NF4: four bits a weight, and for each 64 of them their largest magnitude.

    The same numbers as bitsandbytes' Linear4bit without double quantization, computed by torch alone, so it
    needs neither that library nor a GPU. Products are computed in the dtype of the input.
    """

    absmax: torch.Tensor
    pairs: torch.Tensor

    def __init__(self, layer: torch.nn.Linear) -> None:
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        packed, absmax = to_nf4(layer.weight.detach())
        self.weight = Params4bit(packed, requires_grad=False)
        self.weight.quant_state = SimpleNamespace(shape=layer.weight.shape)
        self.register_buffer("absmax", absmax)
        values = torch.tensor(NF4, device=packed.device)
        # what a byte stands for: the first weight is in its upper half
        self.register_buffer("pairs", torch.cartesian_prod(values, values).to(layer.weight.dtype))
        self.bias = layer.bias

    def dense(self, dtype: torch.dtype, packed: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        """The weight (out, in)."""
        values = F.embedding(packed.int(), self.pairs.to(dtype)).view(-1, NF4_BLOCK)
        values.mul_(absmax[:, None])  # one pass, computed in float32
        shape = self.out_features, self.in_features
        return values.flatten()[: shape[0] * shape[1]].view(shape)  # without what filled the last block

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        product: Any = FrozenProduct.apply(input, self.dense, self.weight, self.absmax)
        return product if self.bias is None else product + self.bias


def to_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(bytes (blocks, 32), the largest magnitudes (blocks,)) of a weight: the nearest of the 16 values for
    each number of a block of 64, two to a byte. The last block is filled with zeros."""
    flat = F.pad(weight.float().flatten(), (0, -weight.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    absmax = flat.abs().amax(1)
    values = torch.tensor(NF4, device=weight.device)
    relative = flat / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    index = torch.bucketize(relative, (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8)
    return index[:, ::2] << 4 | index[:, 1::2], absmax


LAYERS: dict[str, type[Int8Linear] | type[NF4Linear]] = {"int8": Int8Linear, "nf4": NF4Linear}
