"""A pipeline's parts in memory: all of them, the transformer alone, or the encoders alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from scfm.models.blocks import first_blocks
from scfm.models.quantize import quantize_linears, require_quantizer
from scfm.models.source import PipelineSource
from scfm.models.swap import swap_blocks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEXT_PARTS = ("text_encoder", "tokenizer", "image_encoder", "feature_extractor")
Parts = Literal["all", "transformer", "encoders", "images"]


def load_pipeline(
    source: str | Path | PipelineSource,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    parts: Parts = "all",
    quantize: str = "",
    blocks_to_swap: int = 0,
) -> tuple[Any, Any]:
    """The stock pipeline of a source and its family class, in `dtype` on `device`, without progress bars.

    parts: "all"; "transformer", for training from a cache (no VAE, no text encoders); "encoders", all but the
    transformer; "images", all but the text encoders, to generate from a cache.
    quantize: "int8" or "nf4" holds the transformer in fewer bits, see `quantize_linears`.
    blocks_to_swap: so many of the transformer's blocks keep their weights on the host, see `swap_blocks`.
    Weights of a variant (fp16) are taken where there are no others. Parts that the folder was saved without
    (SD3's T5, say) are passed to diffusers as None. FileNotFoundError or ValueError as of
    `PipelineSource.check_files`, before anything is loaded.
    Assumed of every family: the parts are called transformer, vae, text_encoder*, tokenizer*, scheduler;
    their classes may come from any package that can be imported.
    """
    source = PipelineSource(source)
    text = [name for name in source.index if name.startswith(TEXT_PARTS)]
    without = {"all": [], "transformer": ["vae", *text], "encoders": ["transformer"], "images": text}[parts]
    absent: dict[str, Any] = {
        name: None for name, part in source.index.items() if part == [None, None] or name in without
    }
    source.check_files(without=absent)
    with no_loading_bars():
        if quantize or blocks_to_swap:
            absent["transformer"] = load_small(source, quantize, dtype, device, blocks_to_swap)
        pipe = source.family.pipeline_class.from_pretrained(
            str(source.folder), dtype=dtype, variant=source.variant or None, **absent
        )
    if getattr(pipe, "vae", None) is None or not hasattr(pipe, "vae_scale_factor"):
        for name, value in vars(source.skeleton).items():  # without a VAE it has a guess
            if name.startswith("vae_scale_factor"):
                setattr(pipe, name, value)
    if parts == "encoders":  # a family reads the transformer's configuration
        pipe.transformer = source.skeleton.transformer
    for name, part in pipe.components.items():
        stays = (quantize or blocks_to_swap) and name == "transformer"  # where it was loaded
        if isinstance(part, torch.nn.Module) and not stays:
            part.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, source.family


def load_small(
    source: PipelineSource, kind: str, dtype: torch.dtype, device: str | torch.device, blocks_to_swap: int = 0
) -> torch.nn.Module:
    """The transformer of a source in less of the device's memory: its linear layers in fewer bits ("" for as
    they are), some of its blocks on the host.

    dtype: of everything else, and of the products
    """
    require_quantizer(kind)
    model_class: Any = source.part_class("transformer")
    model = model_class.from_pretrained(
        str(source.folder), subfolder="transformer", variant=source.variant_of("transformer"), dtype=dtype
    )
    swapped = first_blocks(model, blocks_to_swap, "blocks_to_swap") if blocks_to_swap else []
    if kind:
        quantize_linears(model, kind, device, swapped)
    if swapped:
        swap_blocks(model, blocks_to_swap, device)
    return model


@contextmanager
def with_vae(pipe: Any, source: PipelineSource) -> Iterator[Any]:
    """Lends a pipeline that was loaded without its VAE one for the block, read anew from the source."""
    if pipe.vae is not None:
        yield pipe
        return
    vae_class: Any = source.part_class("vae")
    with no_loading_bars():
        vae = vae_class.from_pretrained(
            str(source.folder), subfolder="vae", variant=source.variant_of("vae"), dtype=pipe.dtype
        )
    pipe.vae = vae.to(pipe.device)
    try:
        yield pipe
    finally:
        pipe.vae = None


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """Half a dozen bars that last a tenth of a second each hide what matters."""
    both = diffusers_logging, transformers_logging
    for library in both:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in both:
            library.enable_progress_bar()
