"""The cells of bench/compare.py: each few-step method from the teachers of bench/plane.py, judged by its ruler."""
from functools import partial

import torch

from plane_cells import (COUPLED, MEASURES, changed, dialling, ends, finite, goal_of, load, measure_student, measured, references, ruler, settings,
                         student, teacher)
from scfm.method.baselines import (
    SHORTCUT_GRIDS, distillation_loss, fit, make_pairs, meanflow_loss, multistep, network_evaluations,
    progressive, reflow_loss, sample_renoised, sample_with_step_size, shortcut_loss, updates_for)
from scfm.method.consistency import keyed_generator
from scfm.method.lora_scale import STEPS, choose_lora_scales
from scfm.method.distill import SCFMConfig, CopiedModels
from scfm.method.flow import time_grid
from scfm.method.metrics import endpoint_distance
from scfm.method.scale_schedule import search_per_step, per_step_field, parabola_min
from toy.plane import DATA, MLP, with_step

PAIRS, RENOISE = range(15, 17)                               # streams of random numbers that nothing else uses
STAGES, PAIR_STEPS = (16, 8, 4, 2, 1), 32
LOSSES = {"consistency": distillation_loss, "shortcut": shortcut_loss, "meanflow": meanflow_loss}
COARSE, BY_STEP = 5, (1, 2, 3, 4, 8)                         # scales of the table that `search_per_step` starts from; the step counts that it serves
TOLD = ("shortcut", "meanflow")                              # whose networks have the step size as second input


def dial_search(protocol):
    """Evaluations that finding a dial costs."""
    return protocol.dial_noises * (sum(STEPS) * len(protocol.scales) + protocol.goal_steps)


def step_search(protocol):
    """(noises, scales, evaluations) of finding a scale for each step, which may cost what the dial's search does: a coarser table, fewer noises."""
    noises, scales = protocol.dial_noises * 3 // 4, tuple(torch.linspace(min(protocol.scales), max(protocol.scales), COARSE).tolist())
    walks = {n: 1 + 3 * (1 + 2 * min(n, 4)) if n > 1 else 4 for n in BY_STEP}            # where no strength comes near 0
    return noises, scales, noises * (sum(STEPS) * COARSE + sum(n * w for n, w in walks.items()) + protocol.goal_steps)


def plan(protocol, method, budget):
    """(updates, pairs) that a budget of evaluations buys. Reflow spends half of it on pairs, SCFM a part on its dial's search."""
    if method == "reflow":
        pairs = budget // 2 // PAIR_STEPS
        return updates_for(method, budget, protocol.batch, pairs=pairs, pair_steps=PAIR_STEPS), pairs
    if method == "scfm":
        return updates_for(method, budget - dial_search(protocol), protocol.batch), 0
    return updates_for(method, budget, protocol.batch), 0


def spent(protocol, method, budget):
    """The evaluations that a run with this budget really takes."""
    updates, pairs = plan(protocol, method, budget)
    if method == "progressive":
        updates = len(STAGES) * (updates // len(STAGES))
    search = dial_search(protocol) if method == "scfm" else 0
    return network_evaluations(method, updates * protocol.batch, pairs, PAIR_STEPS) + search


def baseline(cache, protocol, job):
    """{name: network} of a method: its slow EMA under "ema_slow", or one for each stage; the teacher's network; the cell's spec."""
    network, of = teacher(cache, protocol, job)
    updates, pairs = plan(protocol, job.family, job.budget)
    stages = job.family == "progressive"
    config = SCFMConfig(seed=job.seed, **settings(protocol, {"updates": updates // len(STAGES) if stages else updates})[0])
    spec = {"teacher": of, "method": job.family, "pairs": pairs, "config": changed(config), **({"stages": STAGES} if stages else {}),
            **({"grids": SHORTCUT_GRIDS} if job.family == "shortcut" else {})}
    start = with_step(network) if job.family in TOLD else network
    draw = DATA[job.data]

    def batch_of(generator, rows):
        return draw(rows, generator), torch.randn(rows, 2, generator=generator)

    def make():
        if stages:
            made = progressive(start, batch_of, config, STAGES)
        elif job.family == "reflow":
            made = {"ema_slow": reflowed(start, config, pairs)}
        else:
            made = {"ema_slow": fit(CopiedModels(start), batch_of, config, LOSSES[job.family]).networks["ema_slow"]}
        return {name: trained.state_dict() for name, trained in made.items()}
    kept = cache("few_step", spec, make)
    return {name: load(MLP(told_step=job.family in TOLD), weights) for name, weights in kept.items()}, network, spec


def reflowed(network, config, count):
    """The slow EMA of Reflow on so many pairs, drawn once."""
    models, noise = CopiedModels(network), torch.randn(count, 2, generator=keyed_generator(config.seed, 0, PAIRS))
    points, starts = make_pairs(models.teacher, noise, PAIR_STEPS)

    def batch_of(generator, rows):
        drawn = torch.randint(count, (rows,), generator=generator)
        return points[drawn], starts[drawn]
    return fit(models, batch_of, config, reflow_loss).networks["ema_slow"]


def walks(method, networks, base, seed):
    """{curve: walk(noise, steps)}: how the networks of a method are sampled. base: the teacher's, for more steps than stages."""
    fields = {name: CopiedModels(network).field("teacher") for name, network in {**networks, "base": base}.items()}
    if method == "progressive":
        stage = {n: min((k for k in STAGES if k >= n), default="base") for n in STEPS}
        return {"own stage": lambda noise, n: ends(fields[stage[n]], noise, n),
                "last stage": lambda noise, n: ends(fields[1], noise, n)}
    if method in TOLD:
        finest = 1 / max(SHORTCUT_GRIDS) if method == "shortcut" else 0.
        return {"raw": lambda noise, n: sample_with_step_size(fields["ema_slow"], noise, time_grid(n), finest)}
    euler = {"raw": lambda noise, n: ends(fields["ema_slow"], noise, n)}
    if method == "consistency":
        fresh = partial(keyed_generator, seed, stream=RENOISE)
        euler["re-noised"] = lambda noise, n: sample_renoised(fields["ema_slow"], noise, time_grid(n), fresh(n))
    return euler


def measure_baseline(cache, protocol, job):
    """curve: {steps: SW2}; `curve coupling`: {steps: distance to the teacher's own endpoints from the same noises}."""
    (networks, base, spec), goal = baseline(cache, protocol, job), goal_of(cache, protocol, job)

    def make():
        measure, noise, found = ruler(protocol, job), references(protocol, job)[1][:COUPLED], {}
        for curve, walk in walks(job.family, networks, base, job.seed).items():
            found[curve] = {n: measure(None, n, walk=lambda _, noise, n, *__: walk(noise, n))[0] for n in STEPS}
            found[f"{curve} coupling"] = {n: endpoint_distance(walk(noise, n), goal) for n in STEPS}
        return found
    return cache("few_step_sw2", {"of": spec, **measured(protocol, steps=STEPS, coupled=COUPLED, goal=protocol.goal_steps)}, make)


def measure_scfm(cache, protocol, job):
    """What `measure_student` of the plane gives, and the coupling beside it, on noises that did not choose the dial."""
    value = measure_student(cache, protocol, job)
    (models, spec), goal = student(cache, protocol, job), goal_of(cache, protocol, job)

    def make():
        noise = references(protocol, job)[1][:COUPLED]

        def coupling(scales):
            return {n: endpoint_distance(ends(models.field("ema_slow", scales[n]), noise, n), goal) for n in STEPS}
        return {"raw coupling": coupling(dict.fromkeys(STEPS, 1.)), "dialled coupling": coupling(value["scales"])}
    more = measured(protocol, coupled=COUPLED, goal=protocol.goal_steps, scales=value["scales"])
    return value | cache("coupling", {"of": spec, **more}, make) | measure_by_step(cache, protocol, job, models, spec)


def measure_by_step(cache, protocol, job, models, spec):
    """{"stepwise": {steps: SW2}, "stepwise coupling": ...}: a scale for each step of a walk; beyond 8 steps one, by a parabola through the table."""
    goal, (count, scales, _) = goal_of(cache, protocol, job), step_search(protocol)

    def make():
        noise, far = (rows[:count] for rows in dialling(protocol, job, models))
        field = lambda scales: per_step_field(partial(models.field, "ema_slow"), time_grid(len(scales)), scales)
        distance = lambda scales: finite(endpoint_distance(ends(field(scales), noise, len(scales)), far))
        curve = {(n, s): distance((s,) * n) for n in STEPS for s in scales}
        dial = choose_lora_scales(curve)
        found = {n: search_per_step(distance, n, s).scales if n in BY_STEP else (between(curve, n, s),) * n for n, s in zip(dial.steps, dial.scales)}
        measure, mine = ruler(protocol, job), references(protocol, job)[1][:COUPLED]
        return {"stepwise": {n: finite(measure(field(scales), n)[0]) for n, scales in found.items()},
                "stepwise coupling": {n: endpoint_distance(ends(field(scales), mine, n), goal) for n, scales in found.items()}}
    more = measured(protocol, steps=STEPS, coupled=COUPLED, goal=protocol.goal_steps, noises=count, scales=scales, served=BY_STEP, beyond="parabola")
    return cache("stepwise", {"of": spec, **more}, make)


def between(curve, n, scale):
    """Where the parabola through the squared distances at `scale` and its two neighbours in the table is lowest: no further walk."""
    scales = sorted({s for _, s in curve})
    i = min(max(scales.index(scale), 1), len(scales) - 2)
    return parabola_min([(s, curve[n, s] ** 2) for s in scales[i - 1:i + 2]])


def measure_multistep(cache, protocol, job):
    """{"multistep": {evaluations: SW2}} of the teacher."""
    network, spec = teacher(cache, protocol, job)

    def make():
        measure, field = ruler(protocol, job), CopiedModels(network).field("teacher")
        def walk(field, noise, n, *_):
            return multistep(field, noise, time_grid(n))
        return {"multistep": {n: measure(field, n, walk=walk)[0] for n in STEPS}}
    return cache("multistep_sw2", {"of": spec, **measured(protocol, steps=STEPS)}, make)


ALL = MEASURES | {"multistep": measure_multistep, "scfm": measure_scfm} | dict.fromkeys(
    ("reflow", "progressive", "consistency", "shortcut", "meanflow"), measure_baseline)
