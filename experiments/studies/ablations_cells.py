"""The cells of bench/ablations.py: one run each, looked at several times on its way, on the plane and on the tiny Flux.

A measurement takes (cache, protocol, job), see `PlaneProtocol`, `FluxProtocol` and `Job` in bench/ablations.py.
"""
from contextlib import suppress
from functools import lru_cache, partial

import torch

from plane_cells import changed, dialling, finite, judged, load, measured, ruler, settings, teacher
from scfm.method.lora_scale import choose_lora_scales, endpoint_curve
from scfm.method.distill import SCFMConfig, CopiedModels, distill
from scfm.method.metrics import endpoint_distance
from toy.plane import DATA, MLP

DEFAULT = {"schedule": "constant", "ema_decay_fast": .99, "ema_decay_slow": .999, "read_out": "student"}   # of the plane
OURS = {"rank": 0, "restart_when_stalled": False}            # what is no field of `SCFMConfig`
LAYERS = ("layers.0", "layers.1", "layers.2", "layers.3", "out")
READ = ("student", "ema_slow")                                   # who is measured on the tiny Flux


class RestartWhenStalled:
    """Sets both EMAs to the student when the student has stopped moving away from the slow one.

    Every `every` updates it looks at the distance |student - slow| of all weights together. A student that has done what its
    models ask for stays where it is, the slow EMA catches up, and the distance no longer grows: after `patience` looks
    without a new largest one nothing is to be learned from these models, and a restart makes new ones. restarts: when.
    """

    def __init__(self, models, every=20, patience=3):
        self.student, self.ema_fast, self.ema_slow = (models.parameters(name) for name in ("student", "ema_fast", "ema_slow"))
        self.every, self.patience, self.restarts = every, patience, []
        self.largest, self.idle = 0., 0

    @torch.no_grad()
    def __call__(self, updates):
        """To be called after each update with the number of updates done."""
        if updates % self.every:
            return
        distance = torch.stack([(a - b).square().sum() for a, b in zip(self.student, self.ema_slow)]).sum().sqrt().item()
        self.idle = 0 if distance > self.largest else self.idle + 1
        self.largest = max(self.largest, distance)
        if self.idle >= self.patience:
            torch._foreach_copy_(self.ema_fast, self.student)
            torch._foreach_copy_(self.ema_slow, self.student)
            self.restarts.append(updates)
            self.largest, self.idle = 0., 0


def run(models, batch_of, config, ours, looks, look):
    """`distill`, watched: {"looks": {updates: look(updates)}, "restarts": when the rule restarted, "numbers": trained, "done":
    updates}. A run whose gradient is no longer finite ends there; its student stands for the looks that were to come."""
    stalled, found, done = RestartWhenStalled(models), {}, 0

    def on_step(update, _):
        nonlocal done
        done = update + 1
        if ours["restart_when_stalled"]:
            stalled(done)
        if done in looks:
            found[done] = look(done)
    with suppress(FloatingPointError):
        distill(models, batch_of, config, on_step, progress=False)
    found |= {updates: look(updates) for updates in looks if updates not in found}
    numbers = sum(weight.numel() for weight in models.parameters("student"))
    return {"looks": found, "restarts": stalled.restarts, "numbers": numbers, "done": done}


def split(change):
    """A change as (what `SCFMConfig` or the measurement takes, ours)."""
    return {k: v for k, v in change.items() if k not in OURS}, {k: change.get(k, v) for k, v in OURS.items()}


# The plane


def lora_speakers(network, rank, seed):
    """`LoraModels` on a copy of an `MLP`: an adapter on each of its linear layers."""
    from diffusers.loaders import PeftAdapterMixin           # heavy, and most cells need none of it

    from scfm.models.lora import LoraModels

    class Adaptable(MLP, PeftAdapterMixin):
        """What diffusers' transformers have, for a small network."""
    torch.manual_seed(seed)                                  # PEFT draws A from the global state
    return LoraModels(load(Adaptable(), network.state_dict()), lambda network, x, t, cond: network(x, t), LAYERS, rank)


def measure_run(cache, protocol, job):
    """What `run` gives; at each look what `judged` of plane_cells does."""
    network, of = teacher(cache, protocol, job)
    change, ours = split(DEFAULT | job.change)
    asked, _, reading = settings(protocol, change)
    config = SCFMConfig(**{"seed": job.seed, **asked})

    def make():
        models = lora_speakers(network, ours["rank"], config.seed) if ours["rank"] else CopiedModels(network)
        measure, ways = ruler(protocol, job), dialling(protocol, job, models)
        field = partial(models.field, reading["read_out"])

        def look(_):
            return judged(measure, ways, field, protocol.steps, protocol.scales, reading["sampling_shift"])
        return run(models, lambda generator, rows: DATA[job.data](rows, generator), config, ours, protocol.looks, look)
    more = {"looks": protocol.looks, "noises": protocol.dial_noises, "goal": protocol.goal_steps, "scales": protocol.scales,
            "steps": protocol.steps}
    return cache("ablation", {"teacher": of, "config": changed(config), **ours, **reading, **measured(protocol, **more)}, make)


# The tiny Flux


@lru_cache(1)
def held_out(captions):
    """The judge of captions whose pairs no training image shows."""
    from few_shot_flux import family

    from toy.judge import Judge
    return Judge(family(), captions, progress=False)


def goals(cache, protocol):
    """Where the teacher's many steps take the judge's noises, and those on which the dial is found: two of (n, N, C)."""
    from few_shot_flux import teacher_field, weights
    spec = {"pipeline": weights(), "captions": protocol.captions, "dial": protocol.dial_captions, "steps": protocol.goal_steps}
    return cache("ablation_goals", spec, lambda: tuple(
        walk(teacher_field(), protocol.goal_steps) for walk in walks(protocol)))


def walks(protocol):
    """(for the judge, for the dial), each walk(field, steps) -> endpoints (n, N, C), at the stock shift and guidance scale."""
    from few_shot_flux import PROMPTS, family

    from scfm.data.prompts import read_prompts
    from scfm.models.sampling import start_noise, teacher_endpoints
    from toy.judge import STOCK
    from toy.pipelines import GUIDANCE
    captions = read_prompts(PROMPTS)[:protocol.dial_captions]
    noise = start_noise(family(), range(len(captions)), 1000)
    return (lambda field, steps: held_out(protocol.captions).endpoints(field, steps, STOCK),
            lambda field, steps: teacher_endpoints(family(), field, captions, noise, steps, STOCK, GUIDANCE))


def measure_flux(cache, protocol, job):
    """What `run` gives; at each look who -> {"raw": {steps: endpoint distance}}, at the last also "dialled" and "scales"."""
    from few_shot_flux import batches, generated, short_recipe, make_models
    change, ours = split(job.change)
    config, rank, guidance = short_recipe(protocol, {"schedule": "constant", **change})
    ours["rank"] = ours["rank"] or rank
    (latents, captions, images), (goal, near) = generated(cache, protocol), goals(cache, protocol)

    def make():
        models, batch_of = make_models(config.seed, ours["rank"]), batches(latents, captions, guidance)
        judge, dial = walks(protocol)

        def look(updates):
            return {who: file_fingerprint(partial(models.field, who), updates == max(protocol.looks)) for who in READ}

        def file_fingerprint(field, last):
            away = lambda n, scale: finite(endpoint_distance(judge(field(scale), n), goal))
            found = {"raw": {n: away(n, 1.) for n in protocol.steps}}
            if last:
                curve = endpoint_curve(lambda n, s: dial(field(s), n), near, protocol.steps, protocol.scales)
                found["scales"] = dict(zip(*choose_lora_scales({pair: finite(distance) for pair, distance in curve.items()})[:2]))
                found["dialled"] = {n: found["raw"][n] if s == 1 else away(n, s) for n, s in found["scales"].items()}
            return found
        return run(models, batch_of, config, ours, protocol.looks, look)
    spec = {"images": images, "guidance": guidance, "config": changed(config), **ours, "protocol": protocol._asdict()}
    return cache("ablation_flux", spec, make)


def measure_flux_teacher(cache, protocol, job):
    """{shift: {steps: endpoint distance}} of the untouched teacher. Makes all that the runs share."""
    from few_shot_flux import generated, teacher_field, weights

    from toy.judge import SHIFTS
    generated(cache, protocol)
    goal, _ = goals(cache, protocol)

    def make():
        judge = held_out(protocol.captions)
        return {shift: {n: endpoint_distance(judge.endpoints(teacher_field(), n, shift), goal) for n in protocol.steps}
                for shift in SHIFTS}
    return cache("ablation_flux_teacher", {"pipeline": weights(), "protocol": protocol._asdict()}, make)
