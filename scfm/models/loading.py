"""A pipeline's parts in memory: all of them, the transformer alone, the encoders alone, or in 4 bits."""
from contextlib import contextmanager
from importlib.util import find_spec

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from scfm.models.family import family_of
from scfm.models.source import model_index, resolve_folder, part_class, without_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

def load_pipeline(folder, dtype, device="cpu", parts="all", quantize=""):
    """The stock pipeline of a folder and its family class, in `dtype` on `device`, without progress bars.

    parts: "all"; "transformer", for training from a cache (no VAE, no text encoders); or "encoders" (all but the transformer).
    quantize: "nf4" holds the transformer in 4 bits, needs bitsandbytes (ValueError when it is not there). Parts that the
    folder was saved without (SD3's T5, say) stay away; diffusers wants to be told so. Assumed of every family: the parts
    are called transformer, vae, text_encoder*, tokenizer*, scheduler; their classes may come from any package that can be imported.
    """
    folder = resolve_folder(folder)
    family, index = family_of(folder), model_index(folder)
    text = [name for name in index if name.startswith(("text_encoder", "tokenizer", "image_encoder", "feature_extractor"))]
    without = {"all": [], "transformer": ["vae", *text], "encoders": ["transformer"]}[parts]
    absent = {name: None for name, part in index.items() if part == [None, None] or name in without}
    with no_loading_bars():
        if quantize:
            absent["transformer"] = load_nf4(folder, dtype)
        pipe = family.pipeline_class.from_pretrained(str(folder), dtype=dtype, **absent)
    known = without_weights(folder)
    pipe.vae_scale_factor = known.vae_scale_factor
    if parts == "encoders":                    # a family asks for the transformer's configuration
        pipe.transformer = known.transformer
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and not (quantize and name == "transformer"):      # that one is where it was loaded
            part.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, family


def load_nf4(folder, dtype):
    """The transformer with its weights in NF4, products computed in `dtype`."""
    require_bitsandbytes()
    kind = part_class(folder, "transformer")
    four = diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return kind.from_pretrained(str(folder), subfolder="transformer", quantization_config=four, dtype=dtype)


def require_bitsandbytes(mend="leave --quantize out"):
    """ValueError with the mend when 4-bit weights cannot be had here."""
    if find_spec("bitsandbytes") is None:
        raise ValueError("quantize nf4 needs bitsandbytes: pip install 'scfm[nf4]'")
    if not torch.cuda.is_available():
        raise ValueError(f"quantize nf4 needs a CUDA GPU, and there is none here: {mend}")


@contextmanager
def with_vae(pipe, folder):
    """Lends a pipeline that was loaded without its VAE one for the block, read anew from the folder."""
    if pipe.vae is not None:
        yield pipe
        return
    folder = resolve_folder(folder)
    with no_loading_bars():
        vae = part_class(folder, "vae").from_pretrained(str(folder), subfolder="vae", dtype=pipe.dtype)
    pipe.vae = vae.to(pipe.device)
    try:
        yield pipe
    finally:
        pipe.vae = None


@contextmanager
def no_loading_bars():
    """Half a dozen bars that last a tenth of a second each hide what matters."""
    both = diffusers_logging, transformers_logging
    for library in both:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in both:
            library.enable_progress_bar()
