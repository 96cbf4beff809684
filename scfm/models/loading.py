"""A pipeline's parts in memory: all of them, the transformer alone, or the encoders alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from scfm.models.quantize import load_quantized
from scfm.models.source import PipelineSource

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEXT_PARTS = ("text_encoder", "tokenizer", "image_encoder", "feature_extractor")
Parts = Literal["all", "transformer", "encoders", "images"]


def load_pipeline(
    source: str | Path | PipelineSource,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    parts: Parts = "all",
    quantize: str = "",
) -> tuple[Any, Any]:
    """The stock pipeline of a source and its family class, in `dtype` on `device`, without progress bars.

    parts: "all"; "transformer", for training from a cache (no VAE, no text encoders); "encoders", all but the
    transformer; "images", all but the text encoders, to generate from a cache.
    quantize: "int8" or "nf4" holds the transformer in fewer bits, see `load_quantized`.
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
        if quantize:
            absent["transformer"] = load_quantized(source, quantize, dtype, device)
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
        quantized = quantize and name == "transformer"  # it stays where it was loaded
        if isinstance(part, torch.nn.Module) and not quantized:
            part.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, source.family


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
