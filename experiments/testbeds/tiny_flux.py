"""The cells of bench/compare.py on the tiny Flux of toy/: every method that can be a plain LoRA, judged by toy/judge.py.

All at the guidance scale and the shift at which the pipeline is sampled. A LoRA's backward passes through frozen weights: it counts 1.
Data are drawings with their captions, as the teacher was trained on; the judge's captions name pairs that it never saw.
"""
import copy
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch

from compare_cells import STAGES
from few_shot_flux import weights
from plane_cells import changed, finite, moved_share, settings
from scfm.method.baselines import (
    distillation_loss, fit, multistep, network_evaluations, progressive_loss, reflow_loss,
    sample_renoised, updates_for)
from scfm.method.consistency import keyed_generator
from scfm.method.lora_scale import STEPS, choose_lora_scales, endpoint_curve
from scfm.method.distill import SCFMConfig, distill
from scfm.models.flux import Flux
from scfm.method.flow import EVALUATIONS, sample, time_grid
from scfm.models.lora import LoraModels, adapter_state, copy_adapter, load_adapter_state
from scfm.models.sampling import on_device, start_noise, teacher_endpoints
from toy.judge import STOCK, Judge
from toy.pipelines import GUIDANCE, TOKENS, load_flux
from toy.shapes import draw_captions, draw_images

NAME = "tiny Flux"
PAIR_STEPS, RANK, LR = 32, 16, 1e-3
SHIFT = (2.5, 4.5)                                           # the range in training, around the scheduler's own 3
DIAL_STEPS, SCALES = (1, 2, 3, 4, 8), (0., .25, .5, .75, 1., 1.25, 1.5, 2.)        # beyond 8 steps: the teacher, untouched
DATA, DIAL, PAIRS, RENOISE = range(20, 24)                   # streams of random numbers that nothing else uses


class FluxProtocol(NamedTuple):
    """drawings: that are trained on; judged: captions of a measurement."""
    updates: int = 0                                         # of `settings`, which every job replaces
    batch: int = 32
    drawings: int = 2048
    judged: int = 256
    dial_noises: int = 16


def dial_search(protocol):
    """Evaluations that finding a dial costs."""
    return protocol.dial_noises * (sum(DIAL_STEPS) * len(SCALES) + PAIR_STEPS)


def plan(protocol, method, budget):
    """(updates, pairs) that a budget of evaluations buys. Reflow spends half of it on pairs, SCFM a part on its dial's search."""
    if method == "reflow":
        pairs = budget // 2 // PAIR_STEPS
        return updates_for(method, budget, protocol.batch, pairs=pairs, pair_steps=PAIR_STEPS, lora=True), pairs
    return updates_for(method, budget - dial_search(protocol) * (method == "scfm"), protocol.batch, lora=True), 0


def spent(protocol, method, budget):
    """The evaluations that a run with this budget really takes."""
    updates, pairs = plan(protocol, method, budget)
    if method == "progressive":
        updates = len(STAGES) * (updates // len(STAGES))
    search = dial_search(protocol) * (method == "scfm")
    return network_evaluations(method, updates * protocol.batch, pairs, PAIR_STEPS, lora=True) + search


class Captioned:
    """DistillModels for the losses of scfm.method.baselines, which know no captions: the condition is that of the batch at hand, `cond`.

    teacher: who speaks as such; None for the base.
    """

    def __init__(self, models, teacher=None):
        self.models, self.cond, self.said_by = models, None, teacher or models.teacher
        self.parameters = models.parameters

    def student(self, x, t, step=None):
        return self.models.student(x, t, self.cond)

    def teacher(self, x, t, step=None):
        return self.said_by(x, t, self.cond)

    def ema_fast(self, x, t, step=None):
        return self.models.ema_fast(x, t, self.cond)


class World:
    """The pipeline, its family and `count` drawings as latents, with what their captions are encoded to."""

    def __init__(self, count):
        self.family = Flux(load_flux(), 32, 32, TOKENS)
        captions = draw_captions(count, keyed_generator(0, 0, DATA))
        images, _ = draw_images(captions, keyed_generator(0, 1, DATA))
        self.captions = captions.text
        self.latents = torch.cat([self.family.encode_images(part) for part in images.split(256)])
        parts = [self.family.encode_text(list(self.captions[i:i + 256])) for i in range(0, count, 256)]
        self.text = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def cond(self, rows):
        return {name: part[rows] for name, part in self.text.items()} | {"guidance": torch.full((len(rows),), GUIDANCE)}

    def models(self, seed):
        """`LoraModels` on a pipeline of their own."""
        torch.manual_seed(seed)                              # PEFT draws A from the global state
        return LoraModels(load_flux().transformer, self.family.velocity, self.family.lora_targets, RANK)


world = lru_cache(1)(World)


@lru_cache(1)
def judge(captions):
    """The judge, its goal set: where the teacher's own 32 steps end."""
    judge = Judge(Flux(load_flux(), 32, 32, TOKENS), captions, progress=False)
    judge.set_goal(partial(judge.family.velocity, judge.family.pipe.transformer))
    return judge


def trained(cache, protocol, job):
    """{name: LoRA}: the slow EMA of a method under "ema_slow" (SCFM's student and fast EMA beside it), or one for each stage; and the cell's spec."""
    updates, pairs = plan(protocol, job.family, job.budget)
    updates = updates // len(STAGES) if job.family == "progressive" else updates
    usual = {"updates": updates, "batch": protocol.batch, "lr": LR, "shift": SHIFT}
    asked, training, _ = settings(protocol, usual | job.change)
    config = SCFMConfig(seed=job.seed, **asked)
    moving = {name: training[name] for name in ("share_to",) if name in training}
    spec = {"pipeline": weights(), "method": job.family, "pairs": pairs, "rank": RANK, "drawings": protocol.drawings, "guidance": GUIDANCE, "shift": STOCK,
            "config": changed(config), **moving, **({"stages": STAGES} if job.family == "progressive" else {})}

    def make():
        place, models = world(protocol.drawings), world(protocol.drawings).models(job.seed)
        return {"progressive": in_stages, "reflow": partial(reflowed, count=pairs), "consistency": made_consistent,
                "scfm": partial(shortcut, **moving)}[job.family](place, models, config)
    return cache("flux", spec, make), spec


def lora_of(models, adapter="ema_slow"):
    return {name: tensor.clone() for name, tensor in adapter_state(models.transformer, adapter).items()}


def on_drawings(place, bound):
    """batch_of(generator, rows) for `fit`: latents of drawings and noise; tells the models the captions."""
    def batch_of(generator, rows):
        picked = torch.randint(len(place.latents), (rows,), generator=generator)
        bound.cond = place.cond(picked)
        return place.latents[picked], torch.randn(rows, *place.family.latent_shape, generator=generator)
    return batch_of


def shortcut(place, models, config, share_to=None):
    """SCFM, by the loop of scfm.method.distill; all three adapters. share_to: where k/N ends, if it moves."""
    def batch_of(generator, rows):
        picked = torch.randint(len(place.latents), (rows,), generator=generator)
        return place.latents[picked], place.cond(picked)
    distill(models, batch_of, config, moved_share(config, share_to), progress=False)
    return {name: lora_of(models, name) for name in ("student", "ema_fast", "ema_slow")}


def made_consistent(place, models, config):
    bound = Captioned(models)
    fit(bound, on_drawings(place, bound), config, partial(distillation_loss, shift=config.shift))
    return {"ema_slow": lora_of(models)}


def reflowed(place, models, config, count):
    """Reflow on so many pairs: a caption of the drawings and a noise each."""
    noise = torch.randn(count, *place.family.latent_shape, generator=keyed_generator(config.seed, 0, PAIRS))
    rows = torch.arange(count) % len(place.captions)
    ends = teacher_endpoints(place.family, models.teacher, [place.captions[i] for i in rows], noise, PAIR_STEPS, STOCK, GUIDANCE)
    bound = Captioned(models)

    def batch_of(generator, n):
        picked = torch.randint(count, (n,), generator=generator)
        bound.cond = place.cond(rows[picked])
        return ends[picked], noise[picked]
    fit(bound, batch_of, config, reflow_loss)
    return {"ema_slow": lora_of(models)}


def in_stages(place, models, config):
    """Progressive distillation on the stock grid; one LoRA goes through all stages, a copy of it teaches the next. config.updates: of each."""
    made, teacher = {}, models.teacher
    for stage, steps in enumerate(STAGES):
        bound = Captioned(models, teacher)
        fit(bound, on_drawings(place, bound), replace(config, seed=len(STAGES) * config.seed + stage), partial(progressive_loss, steps=steps, shift=STOCK))
        made[steps] = lora_of(models)
        copy_adapter(models.transformer, "ema_slow", "student")
        teacher = copy.deepcopy(models).field("ema_slow")
    return made


# Measuring


def walked(judge, field, steps, sampler):
    """Where a sampler takes the judge's noises (n, ...). sampler(field, noise, times) of a field without captions."""
    ends = []
    for rows in torch.arange(len(judge.noise)).split(64):
        cond = on_device(judge.family.encode_text([judge.captions.text[i] for i in rows]), "cpu") | {"guidance": torch.full((len(rows),), GUIDANCE)}
        ends.append(sampler(lambda x, t, *_: field(x, t, cond), judge.noise[rows], time_grid(steps, STOCK)))
    return torch.cat(ends)


def scored(judge, field_of, sampler_of=lambda n: sample, steps=STEPS, evaluations=1):
    """{"": {NFE: Frechet}, " accuracy": ..., " coupling": ...}. field_of(NFE) -> field; sampler_of(NFE) -> what `walked` takes."""
    found = {"": {}, " accuracy": {}, " coupling": {}}
    for n in steps:
        with torch.no_grad():
            ends = walked(judge, field_of(n), n // evaluations, sampler_of(n))
            row = judge.score(ends, torch.cat([judge.family.decode(part) for part in ends.split(256)]))
        for kind, column in zip(found, ("frechet", "prompt_accuracy", "endpoint")):
            found[kind][n] = row[column]
    return found


def named(curves):
    """{"raw": {"": ..., " accuracy": ...}} as {"raw": ..., "raw accuracy": ...}."""
    return {name + kind: values for name, found in curves.items() for kind, values in found.items()}


def measure_flux(cache, protocol, job):
    """Curves of a trained method: Frechet, and with " accuracy" and " coupling" behind the name the other two."""
    loras, spec = trained(cache, protocol, job)

    def make():
        models, scorer = world(protocol.drawings).models(job.seed), judge(protocol.judged)

        def field(name, scale=1.):
            if name is None:
                return models.teacher
            load_adapter_state(models.transformer, "ema_slow", loras[name])
            models.transformer.set_adapter("student")
            return models.field("ema_slow", scale)
        if job.family == "progressive":
            stage = {n: min((k for k in STAGES if k >= n), default=None) for n in STEPS}
            return named({"own stage": scored(scorer, lambda n: field(stage[n])), "last stage": scored(scorer, lambda n: field(1))})
        curves = {"raw": scored(scorer, lambda n: field("ema_slow"))}
        if job.family == "consistency":
            again = lambda n: partial(sample_renoised, generator=keyed_generator(job.seed, n, RENOISE))      # one for all parts of a walk
            curves["re-noised"] = scored(scorer, lambda n: field("ema_slow"), again)
        if job.family == "scfm":
            dial = found_dial(world(protocol.drawings), protocol.dial_noises, models.teacher, lambda scale: field("ema_slow", scale))
            strength = {n: dial.scale(n) if n <= max(DIAL_STEPS) else 0. for n in STEPS}
            curves["dialled"] = scored(scorer, lambda n: field("ema_slow", strength[n]))
            return named(curves) | {"scales": strength}
        return named(curves)
    return cache("flux_scores", {"of": spec, "judged": protocol.judged, "steps": STEPS, "dial": [DIAL_STEPS, SCALES, protocol.dial_noises]}, make)


def found_dial(place, count, teacher, field):
    """The dial by the endpoints of a few noises with captions of the drawings: no image, none of the judge's captions."""
    ends, goal = dialling(place, count, teacher)
    curve = endpoint_curve(lambda n, s: ends(field(s), n), goal, DIAL_STEPS, SCALES)
    return choose_lora_scales({pair: finite(distance) for pair, distance in curve.items()}, STOCK)


def dialling(place, count, teacher):
    """(ends, goal): ends(field, steps) walks `count` noises with captions of the drawings; goal is where the teacher's pair steps end."""
    captions = place.captions[:count]
    noise = start_noise(place.family, range(len(captions)), 1000)
    ends = lambda field, n: teacher_endpoints(place.family, field, captions, noise, n, STOCK, GUIDANCE)
    return ends, ends(teacher, PAIR_STEPS)


def measure_teacher(cache, protocol, job):
    """Curves of the untouched teacher by Euler, midpoint, Heun and DPM-Solver++(2M)."""
    def make():
        scorer = judge(protocol.judged)
        field = partial(scorer.family.velocity, scorer.family.pipe.transformer)
        curves = {}
        for solver, cost in EVALUATIONS.items():
            steps = [n for n in STEPS if n % cost == 0]
            curves[solver] = scored(scorer, lambda n: field, lambda n: partial(sample, solver=solver), steps, cost)
        curves["multistep"] = scored(scorer, lambda n: field, lambda n: multistep)
        return named(curves)
    return cache("flux_teacher", {"pipeline": weights(), "judged": protocol.judged, "steps": STEPS, "guidance": GUIDANCE, "shift": STOCK}, make)


def measure_floor(cache, protocol, job):
    """Frechet of as many fresh drawings as the judge has captions."""
    make = lambda: {"mean": judge(protocol.judged).floor(), "low": None, "high": None}
    return cache("flux_floor", {"pipeline": weights(), "judged": protocol.judged}, make)


MEASURES = {"teacher": measure_teacher, "floor": measure_floor} | dict.fromkeys(("reflow", "progressive", "consistency", "scfm"), measure_flux)
