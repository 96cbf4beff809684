"""Which class of pipeline belongs to which family.

A family from outside joins through `register`, or through the entry point group `scfm.families` of an
installed package.
"""

from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

import torch

from scfm.models.check import missing
from scfm.models.flux import Flux
from scfm.models.flux2 import Flux2Dev, Flux2Klein
from scfm.models.pixels import Pixels
from scfm.models.qwen_image import QwenImage
from scfm.models.sana import Sana
from scfm.models.sd3 import SD3
from scfm.models.wan import Wan
from scfm.models.z_image import ZImage
from scfm.types import Condition, Family, FamilyVelocity

FAMILIES: dict[str, Any] = {
    "FluxPipeline": Flux,
    "StableDiffusion3Pipeline": SD3,
    "PixelPipeline": Pixels,
    "QwenImagePipeline": QwenImage,
    "Flux2KleinPipeline": Flux2Klein,
    "Flux2Pipeline": Flux2Dev,
    "ZImagePipeline": ZImage,
    "SanaPipeline": Sana,
    "WanPipeline": Wan,
}
GROUP = "scfm.families"  # entry points: name = the pipeline's class, value = module:Class
FamilyClass = TypeVar("FamilyClass", bound=type)


def register(family: FamilyClass) -> FamilyClass:
    """Adds a family class under the name of its pipeline's class, for as long as Python runs; returns it (so
    it decorates).

    ValueError when a member of `scfm.models.check.CONTRACT` is missing, or when the pipeline has another
    family already.
    """
    who, lacking = full_name(family), missing(family)
    if lacking:
        raise ValueError(
            f"{who} is no family yet: it lacks {', '.join(lacking)} "
            "(scfm.models.check.CONTRACT says what they are)"
        )
    name = family.pipeline_class.__name__
    others = {full_name(known) for known in [FAMILIES.get(name)] if known} | set(
        installed_families().get(name, ())
    )
    if others - {who}:
        raise ValueError(f"{name} has a family already, {min(others - {who})}: {who} cannot be a second one")
    FAMILIES[name] = family
    return family


def full_name(family: type) -> str:
    """module:Class, as entry points write it."""
    return f"{family.__module__}:{family.__qualname__}"


def installed_families() -> dict[str, dict[str, EntryPoint]]:
    """Families of installed packages: {name of the pipeline's class: {"module:Class": entry point}}. Nothing
    is imported."""
    families: dict[str, dict[str, EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        families.setdefault(point.name, {})[point.value.replace(" ", "")] = point
    return families


def known_families() -> list[str]:
    """The names of all pipeline classes that have a family here."""
    return list({**FAMILIES, **installed_families()})


def find_family(name: str) -> Any | None:
    """The family class for a pipeline class's name, None when there is none; one of an installed package is
    imported now.

    ValueError when two claim the name, or when a package's family cannot be imported or lacks a member.
    """
    known, offers = FAMILIES.get(name), installed_families().get(name, {})
    claims = sorted({full_name(known)} | set(offers)) if known else sorted(offers)
    if len(claims) > 1:
        raise ValueError(
            f"{name} has more than one family: {', '.join(claims)}; uninstall all packages but one"
        )
    if known or not offers:
        return known
    try:
        family = offers[claims[0]].load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the family {claims[0]} for {name} cannot be imported: {error}") from None
    if missing(family) or family.pipeline_class.__name__ == name:
        return register(family)
    raise ValueError(
        f"{claims[0]} is offered for {name}, but is the family of {family.pipeline_class.__name__}"
    )


def velocities(family: Family, guidance_mode: str) -> tuple[FamilyVelocity, FamilyVelocity]:
    """(velocity of student and EMAs, velocity of the teacher): the same for "kept", for "distilled" the first
    unguided.

    ValueError for "distilled" with a family whose guidance is an input of the network.
    """
    if guidance_mode == "kept":
        return family.velocity, family.velocity
    if not family.uses_cfg:
        raise ValueError(
            f"guidance_mode {guidance_mode}: in {type(family).__name__} the guidance is an "
            f"input of the "
            "network and costs nothing: take --guidance_mode kept"
        )
    return unguided(family.velocity), family.velocity


def unguided(velocity: FamilyVelocity) -> FamilyVelocity:
    """A family's velocity with guidance scale 1 for every example, whatever the condition holds: one
    evaluation each."""

    def at_scale_1(
        transformer: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, cond: Condition
    ) -> torch.Tensor:
        return velocity(transformer, x, t, without_guidance(cond))

    return at_scale_1


def without_guidance(cond: Any) -> Any:
    """A family's condition with guidance scale 1 for every example."""
    return {**cond, "guidance": torch.ones_like(cond["guidance"])}
