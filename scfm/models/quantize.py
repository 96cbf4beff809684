"""The frozen transformer in fewer bits: int8 by torchao, NF4 by bitsandbytes."""

import warnings
from importlib.util import find_spec
from typing import Any

import diffusers
import torch

from scfm.models.source import PipelineSource

BYTES = {"int8": 1.0, "nf4": 0.5625}  # of a weight, scales included where they are not negligible
KINDS = "int8 or nf4"
HELP = (
    "int8 (half of bf16's memory, an error near bf16's own; needs pip install 'scfm[int8]') or nf4 (a "
    "quarter, for 24 GB cards; needs a GPU and pip install 'scfm[nf4]')"
)


def is_known(kind: str) -> bool:
    """Whether it is a kind of quantization, or "" for none."""
    return kind == "" or kind in BYTES


def require_quantizer(kind: str, mend: str = "leave --quantize out") -> None:
    """ValueError with the mend when a kind is unknown, or cannot be had here; nothing for ""."""
    if not is_known(kind):
        raise ValueError(f"quantize is {kind!r}: take {KINDS}, or {mend}")
    library = {"int8": "torchao", "nf4": "bitsandbytes"}.get(kind)
    if library and find_spec(library) is None:
        raise ValueError(f"quantize {kind} needs {library}: pip install 'scfm[{kind}]'")
    if kind == "nf4" and not torch.cuda.is_available():
        raise ValueError(f"quantize nf4 needs a CUDA GPU, and there is none here: {mend}, or --quantize int8")


def load_quantized(
    source: PipelineSource, kind: str, dtype: torch.dtype, device: str | torch.device
) -> torch.nn.Module:
    """The transformer of a source with the weights of its linear layers in fewer bits, on the device.

    kind: "int8": one scale for each row of a weight, products in `dtype`; layer by layer, so that the device
        never holds the whole in `dtype`. "nf4": by diffusers' own loader.
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


def to_int8(model: torch.nn.Module, device: str | torch.device = "cpu") -> torch.nn.Module:
    """The model with the weights of all linear layers in int8, changed in place, on the device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's import warns of torch's own names
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig(), device=torch.device(device))
    return model.to(device)
