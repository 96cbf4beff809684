"""Which class of pipeline belongs to which family. A new family: one file beside flux.py, one line in `FAMILIES`."""
import json
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from scfm.families.flux import Flux
from scfm.families.sd3 import SD3

FAMILIES = {"FluxPipeline": Flux, "StableDiffusion3Pipeline": SD3}


def family_of(folder):
    """The family class of a saved pipeline folder, from its model_index.json.

    Raises FileNotFoundError when there is no pipeline, ValueError when its class is none of `FAMILIES`.
    """
    name = index_of(folder).get("_class_name")
    if name not in FAMILIES:
        raise ValueError(f"{folder} holds a {name}, which scfm does not know; it knows {', '.join(FAMILIES)}")
    return FAMILIES[name]


def index_of(folder):
    """What model_index.json says: the class of the pipeline, and of each of its parts."""
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"no pipeline in {folder}: expected {index.name} there "
                                "(a folder written by save_pretrained, or a downloaded snapshot)")
    return json.loads(index.read_text())


def load_pipeline(folder, dtype, device="cpu"):
    """The stock pipeline of a folder and its family class, in `dtype` on `device`, without progress bars.

    Parts that the folder was saved without (SD3's T5, say) stay away; diffusers wants to be told so.
    """
    family = family_of(folder)
    absent = {name: None for name, part in index_of(folder).items() if part == [None, None]}
    with no_loading_bars():
        pipe = family.pipeline_class.from_pretrained(str(folder), dtype=dtype, **absent).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, family


def velocities(family, guidance_mode):
    """(velocity of student and EMAs, velocity of the teacher): the same for "kept", for "distilled" the first unguided.

    ValueError for "distilled" with a family whose guidance is an input of the network.
    """
    if guidance_mode == "kept":
        return family.velocity, family.velocity
    if not getattr(family, "true_guidance", False):
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
