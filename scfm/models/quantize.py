"""The frozen transformer in fewer bits: int8, or NF4 by bitsandbytes."""

from importlib.util import find_spec
from typing import Any

import diffusers
import torch
from torch.nn import functional as F

from scfm.models.source import PipelineSource

BYTES = {"int8": 1.0, "nf4": 0.5625}  # of a weight, scales included where they are not negligible
KINDS = "int8 or nf4"
HELP = (
    "int8 (half of bf16's memory, an error near bf16's own) or nf4 (a quarter, for 24 GB cards; needs a GPU "
    "and pip install 'scfm[nf4]')"
)


def is_known(kind: str) -> bool:
    """Whether it is a kind of quantization, or "" for none."""
    return kind == "" or kind in BYTES


def require_quantizer(kind: str, mend: str = "leave --quantize out") -> None:
    """ValueError with the mend when a kind is unknown, or cannot be had here; nothing for ""."""
    if not is_known(kind):
        raise ValueError(f"quantize is {kind!r}: take {KINDS}, or {mend}")
    if kind == "nf4" and find_spec("bitsandbytes") is None:
        raise ValueError("quantize nf4 needs bitsandbytes: pip install 'scfm[nf4]', or --quantize int8")
    if kind == "nf4" and not torch.cuda.is_available():
        raise ValueError(f"quantize nf4 needs a CUDA GPU, and there is none here: {mend}, or --quantize int8")


def load_quantized(
    source: PipelineSource, kind: str, dtype: torch.dtype, device: str | torch.device
) -> torch.nn.Module:
    """The transformer of a source with the weights of its linear layers in fewer bits, on the device.

    kind: "int8", see `Int8Linear`; "nf4", by diffusers' own loader
    dtype: of everything else, and of the products
    """
    require_quantizer(kind)
    model_class: Any = source.part_class("transformer")
    more: dict[str, Any] = {}
    if kind == "nf4":
        more["quantization_config"] = diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    model = model_class.from_pretrained(
        str(source.folder),
        subfolder="transformer",
        variant=source.variant_of("transformer"),
        dtype=dtype,
        **more,
    )
    return to_int8(model, device) if kind == "int8" else model


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
        product = F.linear(input, self.weight.to(input.dtype)) * self.scale.to(input.dtype)
        return product if self.bias is None else product + self.bias


def to_int8(model: torch.nn.Module, device: str | torch.device = "cpu") -> torch.nn.Module:
    """The model with all linear layers as `Int8Linear`, changed in place, on the device: layer by layer, so
    that the device never holds the whole in its old dtype."""
    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, Int8Linear(layer).to(device))
    return model.to(device)
