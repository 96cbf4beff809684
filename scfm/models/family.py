"""Which class of pipeline belongs to which family.

A family from outside joins through `register`, or through the entry point group `scfm.families` of an installed package.
"""
from importlib.metadata import entry_points

import torch

from scfm.models.check import missing
from scfm.models.flux import Flux
from scfm.models.pixels import Pixels
from scfm.models.sd3 import SD3
from scfm.models.source import model_index

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
    others = {f"{known.__module__}:{known.__qualname__}" for known in [FAMILIES.get(name)] if known} | set(installed_families().get(name, ()))
    if others - {who}:
        raise ValueError(f"{name} has a family already, {min(others - {who})}: {who} cannot be a second one")
    FAMILIES[name] = family
    return family


def installed_families():
    """What installed packages offer: {name of the pipeline's class: {"module:Class": entry point}}. Nothing is imported."""
    found = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, {})[point.value.replace(" ", "")] = point
    return found


def find_family(name):
    """The family class for a pipeline class's name, None when there is none; one that a package offers is imported now.

    ValueError when two claim the name, or when a package's family cannot be imported or lacks a member.
    """
    known, offers = FAMILIES.get(name), installed_families().get(name, {})
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
    raise ValueError(f"{claims[0]} is installed_families for {name}, but is the family of {family.pipeline_class.__name__}")


def family_of(folder):
    """The family class of a saved pipeline folder, from its model_index.json.

    Raises FileNotFoundError when there is no pipeline, ValueError when no family is known for its class.
    """
    name = model_index(folder).get("_class_name")
    family = find_family(name)
    if family is None:
        raise ValueError(f"{folder} holds a {name}, which scfm does not know; it knows {', '.join({**FAMILIES, **installed_families()})}")
    return family


def velocities(family, guidance_mode):
    """(velocity of student and EMAs, velocity of the teacher): the same for "kept", for "distilled" the first unguided.

    ValueError for "distilled" with a family whose guidance is an input of the network.
    """
    if guidance_mode == "kept":
        return family.velocity, family.velocity
    if not family.uses_cfg:
        raise ValueError(f"guidance_mode {guidance_mode}: in {type(family).__name__} the guidance is an input of the network and "
                         "costs nothing: take --guidance_mode kept")
    return unguided(family.velocity), family.velocity


def unguided(velocity):
    """A family's velocity with guidance scale 1 in every row, whatever the condition says: one evaluation a row."""
    return lambda transformer, x, t, cond: velocity(transformer, x, t, {**cond, "guidance": torch.ones_like(cond["guidance"])})
