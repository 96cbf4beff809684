"""Which class of pipeline belongs to which family, and how its parts are loaded.

A family from outside joins through `register`, or through the entry point group `scfm.families` of an installed package.
"""
import json
import re
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from transformers.utils import logging as transformers_logging

from scfm.families.contract import missing
from scfm.families.flux import Flux
from scfm.families.pixels import Pixels
from scfm.families.sd3 import SD3

FAMILIES = {"FluxPipeline": Flux, "StableDiffusion3Pipeline": SD3, "PixelPipeline": Pixels}
GROUP = "scfm.families"         # entry points: name = the pipeline's class, value = module:Class


def register(family):
    """Adds a family class under the name of its pipeline's class, for as long as Python runs; returns it (so it decorates).

    ValueError when a member of `scfm.families.contract.CONTRACT` is missing, or when the pipeline has another family already.
    """
    who, lacking = f"{family.__module__}:{family.__qualname__}", missing(family)
    if lacking:
        raise ValueError(f"{who} is no family yet: it lacks {', '.join(lacking)} (scfm.families.contract.CONTRACT says what they are)")
    name = family.pipeline_class.__name__
    others = {f"{known.__module__}:{known.__qualname__}" for known in [FAMILIES.get(name)] if known} | set(offered().get(name, ()))
    if others - {who}:
        raise ValueError(f"{name} has a family already, {min(others - {who})}: {who} cannot be a second one")
    FAMILIES[name] = family
    return family


def offered():
    """What installed packages offer: {name of the pipeline's class: {"module:Class": entry point}}. Nothing is imported."""
    found = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, {})[point.value.replace(" ", "")] = point
    return found


def family_called(name):
    """The family class for a pipeline class's name, None when there is none; one that a package offers is imported now.

    ValueError when two claim the name, or when a package's family cannot be imported or lacks a member.
    """
    known, offers = FAMILIES.get(name), offered().get(name, {})
    claims = sorted({f"{known.__module__}:{known.__qualname__}"} | set(offers)) if known else sorted(offers)
    if len(claims) > 1:
        raise ValueError(f"{name} has more than one family: {', '.join(claims)}; uninstall all packages but one")
    if known or not offers:
        return known
    try:
        family = offers[claims[0]].load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the family {claims[0]} for {name} cannot be imported: {error}") from None
    if missing(family) or family.pipeline_class.__name__ == name:
        return register(family)
    raise ValueError(f"{claims[0]} is offered for {name}, but is the family of {family.pipeline_class.__name__}")


def family_of(folder):
    """The family class of a saved pipeline folder, from its model_index.json.

    Raises FileNotFoundError when there is no pipeline, ValueError when no family is known for its class.
    """
    name = index_of(folder).get("_class_name")
    family = family_called(name)
    if family is None:
        raise ValueError(f"{folder} holds a {name}, which scfm does not know; it knows {', '.join({**FAMILIES, **offered()})}")
    return family


def index_of(folder):
    """What model_index.json says: the class of the pipeline, and of each of its parts."""
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"no pipeline in {folder}: expected {index.name} there "
                                "(a folder written by save_pretrained, or a downloaded snapshot)")
    return json.loads(index.read_text())


def local_folder(name):
    """The folder of a pipeline: `name` itself where it is one, else a snapshot of the hub's repository of that name.

    FileNotFoundError when it is neither, or when the hub cannot be reached and has no copy here.
    """
    folder = Path(name)
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or folder.parent.exists():
        return folder
    try:
        return Path(snapshot_download(str(name), allow_patterns=["model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]))
    except Exception as error:                 # the hub's client raises a dozen kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(f"no pipeline at {name}: there is no such folder, and the hub says: {reason}") from None


def load_pipeline(folder, dtype, device="cpu", parts="all", quantize=""):
    """The stock pipeline of a folder and its family class, in `dtype` on `device`, without progress bars.

    parts: "all"; "transformer", for training from a cache (no VAE, no text encoders); or "encoders" (all but the transformer).
    quantize: "nf4" holds the transformer in 4 bits, needs bitsandbytes (ValueError when it is not there). Parts that the
    folder was saved without (SD3's T5, say) stay away; diffusers wants to be told so. Assumed of every family: the parts
    are called transformer, vae, text_encoder*, tokenizer*, scheduler; their classes may come from any package that can be imported.
    """
    folder = local_folder(folder)
    family, index = family_of(folder), index_of(folder)
    text = [name for name in index if name.startswith(("text_encoder", "tokenizer", "image_encoder", "feature_extractor"))]
    without = {"all": [], "transformer": ["vae", *text], "encoders": ["transformer"]}[parts]
    absent = {name: None for name, part in index.items() if part == [None, None] or name in without}
    with no_loading_bars():
        if quantize:
            absent["transformer"] = in_four_bits(folder, dtype)
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


def without_weights(folder):
    """What a family asks of a pipeline when it is made, read from configuration files: enough to refuse a wrong size at once."""
    told = {part: json.loads((Path(folder) / part / "config.json").read_text()) for part in ("transformer", "vae")}
    blocks = told["vae"].get("block_out_channels") or told["vae"].get("encoder_block_out_channels")
    if not blocks:
        raise ValueError(f"{folder}: the VAE's configuration has no block_out_channels, so its scale cannot be told")
    return SimpleNamespace(transformer=SimpleNamespace(config=SimpleNamespace(**told["transformer"])),
                           vae_scale_factor=2 ** (len(blocks) - 1))


def part_class(folder, name):
    """The class of one part of a pipeline, from whatever package model_index.json names; ValueError when it is not there."""
    library, kind = index_of(folder)[name]
    try:
        return getattr(import_module(library), kind)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{folder}: its {name} is a {kind} of {library}, which cannot be imported here: {error}") from None


def empty_transformer(folder):
    """The transformer of a pipeline on the meta device: every layer and shape, no weight."""
    kind = part_class(folder, "transformer")
    with torch.device("meta"):
        return kind.from_config(kind.load_config(str(folder), subfolder="transformer"))


def in_four_bits(folder, dtype):
    """The transformer with its weights in NF4, products computed in `dtype`."""
    can_quantize()
    kind = part_class(folder, "transformer")
    four = diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return kind.from_pretrained(str(folder), subfolder="transformer", quantization_config=four, dtype=dtype)


def can_quantize(mend="leave --quantize out"):
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
    folder = local_folder(folder)
    with no_loading_bars():
        vae = part_class(folder, "vae").from_pretrained(str(folder), subfolder="vae", dtype=pipe.dtype)
    pipe.vae = vae.to(pipe.device)
    try:
        yield pipe
    finally:
        pipe.vae = None


def velocities(family, guidance_mode):
    """(velocity of student and EMAs, velocity of the teacher): the same for "kept", for "distilled" the first unguided.

    ValueError for "distilled" with a family whose guidance is an input of the network.
    """
    if guidance_mode == "kept":
        return family.velocity, family.velocity
    if not family.true_guidance:
        raise ValueError(f"guidance_mode {guidance_mode}: in {type(family).__name__} the guidance is an input of the network and "
                         "costs nothing: take --guidance_mode kept")
    return unguided(family.velocity), family.velocity


def unguided(velocity):
    """A family's velocity with guidance scale 1 in every row, whatever the condition says: one evaluation a row."""
    return lambda transformer, x, t, cond: velocity(transformer, x, t, {**cond, "guidance": torch.ones_like(cond["guidance"])})


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
