"""The cells of bench/few_shot.py on the tiny Flux: LoRAs of few images, judged on captions that they never saw.

A measurement takes (cache, protocol, job), see `Job` in bench/few_shot.py, and returns
{curve: {kind: {steps: {metric: number}}}}.
"""
from functools import lru_cache, partial
from typing import NamedTuple

import torch

from plane_cells import changed, finite
from scfm.data.cache import fingerprint
from scfm.method.consistency import keyed_generator
from scfm.method.lora_scale import choose_lora_scales, endpoint_curve
from scfm.method.distill import SCFMConfig, distill
from scfm.method.ema import shorten
from scfm.models.flux import Flux
from scfm.models.lora import LoraModels, adapter_state, load_adapter_state, set_scale
from scfm.data.prompts import read_prompts
from scfm.models.sampling import start_noise, teacher_endpoints
from toy.demo import PROMPTS
from toy.judge import STOCK, Judge
from toy.pipelines import FLUX, GUIDANCE, TOKENS, load_flux

SUBSET = 31                                                  # a stream of random numbers that nothing else uses
RECIPE = {"lr": 1e-3, "schedule": "cosine", "weight_decay": 1e-4, "clip": 10., "shift": (2.5, 4.5)}       # the rest: the defaults
RANK, GUIDANCES = 48, (1., 4.)
KINDS = {"seen pairs": False, "held-out pairs": True}        # of captions: their colour-shape pairs, in the teacher's training


class FluxProtocol(NamedTuple):
    """images: that there are in all; captions: judged, of each kind, each with `noises` noises; goal_steps: the teacher's.

    scales, dial_noises: of the search for the dial."""
    steps: tuple = (3, 4, 8, 32)
    updates: int = 100
    batch: int = 16
    images: int = 256
    captions: int = 32
    noises: int = 2
    goal_steps: int = 32
    scales: tuple = (.125, .25, .375, .5, .625, .75, .875, 1., 1.25)
    dial_noises: int = 16


@lru_cache(1)
def family():
    return Flux(load_flux(), 32, 32, TOKENS)


@lru_cache(1)
def judges(captions, noises):
    """{kind: `Judge`} whose goals are not set yet. Their captions are none of those that the students are trained on."""
    return {kind: Judge(family(), captions, progress=False, held_out=held_out, noises=noises, known=frozenset(read_prompts(PROMPTS)))
            for kind, held_out in KINDS.items()}


@lru_cache(1)
def weights():
    """What tells the carried pipeline from another."""
    return fingerprint(FLUX, *(part.name for part in FLUX.iterdir() if part.is_dir()))


def teacher_field():
    return partial(family().velocity, family().pipe.transformer)


def generated(cache, protocol):
    """The teacher's images of the carried captions as latents (n, N, C), decoded and encoded again; the captions; the spec."""
    captions = read_prompts(PROMPTS)[:protocol.images]
    spec = {"pipeline": weights(), "captions": captions, "steps": protocol.goal_steps, "guidance": GUIDANCE, "shift": STOCK}

    def make():
        noise = start_noise(family(), range(len(captions)), 0)
        reached = teacher_endpoints(family(), teacher_field(), captions, noise, protocol.goal_steps, STOCK, GUIDANCE)
        return torch.cat([family().encode_images(family().decode(part)) for part in reached.split(64)])
    return cache("few_images", spec, make), captions, spec


def make_models(seed, rank):
    """`LoraModels` on a pipeline of their own."""
    torch.manual_seed(seed)                                  # PEFT draws A from the global state
    return LoraModels(load_flux().transformer, family().velocity, family().lora_targets, rank)


def rows_of(job, count):
    """Numbers of the images of a subset: the first ones of its own shuffle, so that the larger sizes hold the smaller."""
    return torch.randperm(count, generator=keyed_generator(job.subset, 0, SUBSET))[:job.size or None]


def short_recipe(protocol, change):
    """(`SCFMConfig`, rank, range of the guidance scale): one recipe for all, EMAs as short as the run."""
    shortened = {"ema_decay_fast": shorten(.99, protocol.updates), "ema_decay_slow": shorten(.999, protocol.updates)}
    return SCFMConfig(**RECIPE | shortened | {"updates": protocol.updates, "batch": protocol.batch, **change}), RANK, GUIDANCES


def flux_config(protocol, job):
    return short_recipe(protocol, {"seed": job.subset, **job.change})


def batches(latents, captions, guidance):
    """batch_of(generator, rows) for `distill`: latents (n, N, C) with their captions, guidance scales drawn from a range."""
    text = family().encode_text(captions)

    def batch_of(generator, count):
        picked = torch.randint(len(captions), (count,), generator=generator)
        scale = guidance[0] + (guidance[1] - guidance[0]) * torch.rand(count, generator=generator)
        return latents[picked], {name: part[picked] for name, part in text.items()} | {"guidance": scale}
    return batch_of


def flux_student(cache, protocol, job):
    """The slow EMA's LoRA after training on the images of a subset, as `adapter_state` gives it, and the spec of its cell."""
    (config, rank, guidance), (latents, captions, of) = flux_config(protocol, job), generated(cache, protocol)
    spec = {"images": of, "size": job.size, "subset": job.subset, "rank": rank, "guidance": guidance, "config": changed(config)}

    def make():
        rows = rows_of(job, len(captions))
        batch_of = batches(latents[rows], [captions[i] for i in rows], guidance)
        models = distill(make_models(config.seed, rank), batch_of, config, progress=False)
        return {name: tensor.clone() for name, tensor in adapter_state(models.transformer, "ema_slow").items()}
    return cache("few_lora", spec, make), rank, spec


def spread(images, noises):
    """Root mean square deviation of the pixels of a caption's images, which stand together: a number."""
    return images.unflatten(0, (-1, noises)).var(1).mean().sqrt().item()


def flux_curves(cache, protocol, field_for):
    """{kind: {steps: {metric: number}}} of field_for(steps); spread: over that of the teacher's images from the same noises."""
    found = {}
    for kind, judge in judges(protocol.captions, protocol.noises).items():
        judge.goal = goal_images(cache, protocol, kind)
        wide = spread(judge.family.decode(judge.goal), protocol.noises)
        found[kind] = {}
        for n in protocol.steps:
            reached = judge.endpoints(field_for(n), n, STOCK)
            images = judge.family.decode(reached)
            marks = judge.score(reached, images)
            found[kind][n] = {name: marks[name] for name in ("prompt_accuracy", "frechet", "endpoint")}
            found[kind][n]["spread"] = spread(images, protocol.noises) / wide
    return found


def goal_images(cache, protocol, kind):
    """Latents that the teacher reaches in all its steps for a judge's captions."""
    asked = protocol.captions, protocol.noises
    spec = {"pipeline": weights(), "kind": kind, "asked": asked, "known": "left out", "steps": protocol.goal_steps}
    return cache("few_flux_goal", spec, lambda: judges(*asked)[kind].endpoints(teacher_field(), protocol.goal_steps, STOCK))


def flux_spec(protocol, of):
    return {"of": of, "asked": (protocol.captions, protocol.noises), "known": "left out", "steps": protocol.steps, "goal": protocol.goal_steps}


def at_strength(rank, lora):
    """strength -> the field of a LoRA, fused into the weights: a third faster than beside them."""
    transformer = make_models(0, rank).transformer
    load_adapter_state(transformer, "ema_slow", lora)
    transformer.set_adapter("ema_slow")
    transformer.fuse_lora(adapter_names=["ema_slow"])

    def field(strength):
        transformer.unfuse_lora()
        set_scale(transformer, "ema_slow", strength)             # fuse_lora's own argument would multiply, time after time
        transformer.fuse_lora(adapter_names=["ema_slow"])
        return partial(family().velocity, transformer)
    return field


def dial_of(cache, protocol, job):
    """{steps: strength} of a student, by the endpoints of a few noises: no image is looked at, and no caption of a judge."""
    lora, rank, of = flux_student(cache, protocol, job)
    spec = {"of": of, "steps": protocol.steps, "scales": protocol.scales, "noises": protocol.dial_noises}

    def make():
        captions = read_prompts(PROMPTS)[:protocol.dial_noises]
        noise = start_noise(family(), range(len(captions)), 2)

        def ends(field, n):
            return teacher_endpoints(family(), field, captions, noise, n, STOCK, GUIDANCE)
        goal, field = ends(teacher_field(), protocol.goal_steps), at_strength(rank, lora)
        curve = endpoint_curve(lambda n, s: ends(field(s), n), goal, protocol.steps, protocol.scales)
        return dict(zip(*choose_lora_scales({pair: finite(distance) for pair, distance in curve.items()}, STOCK)[:2]))
    return cache("few_dial", spec, make)


def measure_teacher(cache, protocol, job):
    """Curve "raw", and "floor": {kind: {metric: what as many fresh drawings score}}. Makes all images first."""
    generated(cache, protocol)

    def make():
        floors = {kind: {"frechet": judge.floor()} for kind, judge in judges(protocol.captions, protocol.noises).items()}
        return {"raw": flux_curves(cache, protocol, lambda n: teacher_field()), "floor": floors}
    return cache("few_flux_teacher", flux_spec(protocol, weights()), make)


def measure_student(cache, protocol, job):
    """Curves "raw" (strength 1) and, where it is SCFM, "dialled"; "scales": {steps: the dial's}."""
    lora, rank, spec = flux_student(cache, protocol, job)
    scales = dial_of(cache, protocol, job) if job.family == "scfm" else {}

    def make():
        field = at_strength(rank, lora)
        found = {"raw": flux_curves(cache, protocol, lambda n: field(1.))}
        if scales:
            found |= {"dialled": flux_curves(cache, protocol, lambda n: field(scales[n])), "scales": scales}
        return found
    return cache("few_flux", flux_spec(protocol, spec) | {"scales": scales}, make)


MEASURES = {"teacher": measure_teacher, "scfm": measure_student, "tuned": measure_student}
