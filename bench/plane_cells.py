"""The cells of bench/plane.py: trainings and measurements on the plane, each kept in a file by what determines it.

A measurement takes (cache, protocol, job), see `Protocol` and `Job` in bench/plane.py, and returns plain numbers.
"""
import hashlib
import json
import os
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch

from scfm.method.consistency import keyed_generator, scfm_loss
from scfm.method.lora_scale import STEPS, choose, endpoint_curve
from scfm.method.distill import DistillConfig, FullSpeakers, distill, draw_update, make_emas, make_optimizer
from scfm.method.ema import shorten
from scfm.method.flow import EVALUATIONS, sample, time_grid
from scfm.method.metrics import endpoint_distance, sliced_wasserstein
from toy.plane import DATA, MLP, train_flow

REFERENCE, NOISE, DIAL_NOISE, FEW, FLOOR = range(10, 15)     # streams of random numbers that nothing else uses
COUPLED = 512                                                # noises on which a distance to the teacher's endpoints is measured
FEWER = (1, 2, 3, 4, 8)                                      # step counts of the ablations


def changed(config):
    """The fields of a config that are not at their defaults: what it is known by in a cell's name, so that a field that is added
    later, with a default that changes nothing, leaves the cells valid."""
    return {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}


class Missing(LookupError):
    """A cell that is not there, where nothing is to be computed."""


class Cache:
    """Values by what determines them, a file each, written whole or not at all. `frozen`: computes nothing."""

    def __init__(self, folder, frozen=False):
        self.folder, self.frozen, self.used, self.made = Path(folder), frozen, {}, 0

    def __call__(self, kind, spec, make):
        text = json.dumps(spec, sort_keys=True)
        path = self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.pt"
        if not path.is_file():
            if self.frozen:
                raise Missing(path)
            clock, cpu = time.perf_counter(), time.process_time()
            cell = {"spec": text, "value": make()}
            cell |= {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu}
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(cell, path.with_suffix(f".{os.getpid()}"))
            os.replace(path.with_suffix(f".{os.getpid()}"), path)
            self.made += 1
        cell = torch.load(path)
        self.used[path.name] = (cell["seconds"], cell["cpu_seconds"])
        return cell["value"]


def load(network, weights):
    network.load_state_dict(weights)
    return network


def teacher(cache, protocol, job):
    """The trained teacher of a set and a seed, and the spec of its cell."""
    spec = {"data": job.data, "seed": job.seed, "updates": protocol.teacher_updates[job.data], "batch": protocol.batch}

    def make():
        torch.manual_seed(job.seed)
        return train_flow(MLP(), DATA[job.data], spec["updates"], spec["batch"], seed=job.seed).state_dict()
    return load(MLP(), cache("teacher", spec, make)), spec


def settings(protocol, change):
    """What a change asks for: (fields of DistillConfig, what the training needs besides, what the measurement needs)."""
    updates = change.get("updates", protocol.updates)
    asked = {"updates": updates, "batch": protocol.batch, "lr": 3e-4, "schedule": "cosine", "shift": (1., 2.),
              "fast_decay": shorten(.99, updates), "slow_decay": shorten(.999, updates)}
    training, reading = {"few": 0, "sample_space": False}, {"read_out": "slow", "sampling_shift": 1.}
    for name, value in change.items():
        next((part for part in (training, reading) if name in part), training if name == "share_to" else asked)[name] = value
    return asked, training, reading


def moved_share(config, last):
    """on_update for `distill`: k/N goes evenly from what config says to `last`, where it ends; None where it stays."""
    def on_update(update, _):
        config.teacher_share = first + (last - first) * (update + 1) / config.updates
    first = config.teacher_share
    return None if last is None else on_update


def student(cache, protocol, job):
    """`FullSpeakers` after distillation, and the spec of their cell."""
    network, spec = teacher(cache, protocol, job)
    asked, training, _ = settings(protocol, job.change)
    config = DistillConfig(**{"seed": job.seed, **asked})
    spec = {"teacher": spec, "config": changed(config), **training}
    speakers, draw = FullSpeakers(network), DATA[job.data]
    points = draw(training["few"], keyed_generator(config.seed, 0, FEW))

    def batch_of(generator, rows):
        if len(points) == 0:
            return draw(rows, generator)
        return points[torch.randint(len(points), (rows,), generator=generator)]

    def make():
        moving = moved_share(config, training.get("share_to"))
        (in_sample_space if training["sample_space"] else partial(distill, on_update=moving, progress=False))(speakers, batch_of, config)
        return {name: speakers.networks[name].state_dict() for name in ("student", "fast", "slow")}
    for name, weights in cache("student", spec, make).items():
        load(speakers.networks[name], weights)
    return speakers, spec


def in_sample_space(speakers, batch_of, config):
    """`distill` with the same condition asked of the point reached at t3: rows weighted by (t1 - t3)^2."""
    (optimizer, scheduler), emas = make_optimizer(speakers, config), make_emas(speakers, config)
    for update in range(config.updates):
        data = batch_of(keyed_generator(config.seed, update, stream=1), config.batch)
        noise, jumps = draw_update(config, update, len(data), data.shape[1:])
        weight = (jumps.times[:, 0] - jumps.times[:, -1]).square()                       # (B,)
        (weight * scfm_loss(data, noise, jumps, speakers, algorithm=config.algorithm)).mean().backward()
        torch.nn.utils.clip_grad_norm_(speakers.parameters("student"), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        emas.update()


def ends(field, noise, steps, shift=1., solver="euler"):
    """Where `noise` (n, 2) arrives, in pieces that stay in the cache of the processor: (n, 2)."""
    return torch.cat([sample(field, part, time_grid(steps, shift), solver=solver) for part in noise.split(1000)])


def references(protocol, job):
    """Fresh data and the noises that samples start from, both (samples, 2): the same for all curves of one set and seed."""
    return (DATA[job.data](protocol.samples, keyed_generator(job.seed, 0, REFERENCE)),
            torch.randn(protocol.samples, 2, generator=keyed_generator(job.seed, 0, NOISE)))


def ruler(protocol, job):
    """A function (field, steps, ...) -> (SW2 against fresh data, deviation over the data's), from noises of its own.

    walk: what takes the noises to samples, called as `ends` is."""
    data, noise = references(protocol, job)

    def measure(field, steps, shift=1., solver="euler", walk=ends):
        points = walk(field, noise, steps, shift, solver)
        return sliced_wasserstein(points, data, protocol.directions), (points.std(0) / data.std(0)).mean().item()
    return measure


def dialling(protocol, job, speakers):
    """Noises that the ruler never sees (n, 2), and where the teacher takes them in many steps (n, 2)."""
    noise = torch.randn(protocol.dial_noises, 2, generator=keyed_generator(job.seed, 0, DIAL_NOISE))
    return noise, ends(speakers.field("teacher"), noise, protocol.goal_steps)


def goal_of(cache, protocol, job):
    """Where the teacher's many steps take the first of the ruler's noises: (COUPLED, 2). No dial was chosen on these."""
    network, spec = teacher(cache, protocol, job)

    def make():
        _, noise = references(protocol, job)
        return ends(FullSpeakers(network).field("teacher"), noise[:COUPLED], protocol.goal_steps)
    return cache("goal", {"of": spec, **measured(protocol, goal=protocol.goal_steps, coupled=COUPLED)}, make)


def measured(protocol, **more):
    return {"samples": protocol.samples, "directions": protocol.directions, **more}


def measure_teacher(cache, protocol, job):
    """{solver: {evaluations: SW2}}."""
    network, spec = teacher(cache, protocol, job)

    def make():
        measure, field = ruler(protocol, job), FullSpeakers(network).field("teacher")
        most = {"heun": 8}                                   # the worse of the two of second order: no more of it
        return {solver: {n: measure(field, n // cost, solver=solver)[0] for n in STEPS
                         if n % cost == 0 and n <= most.get(solver, n)} for solver, cost in EVALUATIONS.items()}
    return cache("teacher_sw2", {"of": spec, **measured(protocol)}, make)


def measure_teacher_shift(cache, protocol, job):
    """{shift: {evaluations: SW2}}, Euler: what the teacher does at its own best sampling shift."""
    network, spec = teacher(cache, protocol, job)

    def make():
        measure, field = ruler(protocol, job), FullSpeakers(network).field("teacher")
        return {shift: {n: measure(field, n, shift)[0] for n in (2, 3, 4, 8)} for shift in (.5, .75, 1., 1.5, 2., 3.)}
    return cache("teacher_shift", {"of": spec, **measured(protocol)}, make)


def measure_student(cache, protocol, job):
    """raw, dialled: {steps: SW2}; scales: {steps: chosen}; deviation: {steps: that of the raw samples over the data's}."""
    speakers, spec = student(cache, protocol, job)
    reading, steps = settings(protocol, job.change)[2], STEPS if job.part == "main" else FEWER
    field, shift = partial(speakers.field, reading["read_out"]), reading["sampling_shift"]

    def make():
        return judged(ruler(protocol, job), dialling(protocol, job, speakers), field, steps, protocol.scales, shift)
    more = {"noises": protocol.dial_noises, "goal": protocol.goal_steps, "scales": protocol.scales, "steps": steps}
    return cache("student_sw2", {"of": spec, **reading, **measured(protocol, **more)}, make)


FAR = 1e6                                                    # stands for a distance that is no finite number


def finite(distance):
    """The distance; FAR for one of a student that has run away, which is inf, nan or close to it."""
    return distance if distance < FAR else FAR


def judged(measure, dialling, field, steps, scales, shift=1.):
    """What `measure_student` gives, of a student whose field at a scale is field(scale). dialling: (noise, goal)."""
    noise, goal = dialling
    curve = endpoint_curve(lambda n, s: ends(field(s), noise, n, shift), goal, steps, scales)
    dial = choose({pair: finite(distance) for pair, distance in curve.items()}, shift)
    raw = {n: measure(field(1.), n, shift) for n in steps}
    dialled = {n: finite(measure(field(s), n, shift)[0]) for n, s in zip(dial.steps, dial.scales)}
    return {"raw": {n: finite(sw2) for n, (sw2, _) in raw.items()}, "deviation": {n: finite(wide) for n, (_, wide) in raw.items()},
            "dialled": dialled, "scales": dict(zip(dial.steps, dial.scales))}


CRITERIA = {                                                 # data-free: ends of the student and of the teacher, (n, 2)
    "endpoints": endpoint_distance,
    "median endpoint": lambda a, b: (a - b).norm(dim=1).median().item(),
    "cloud": sliced_wasserstein,
    "spread": lambda a, b: (a.std(0) / b.std(0) - 1).abs().mean().item(),
}


def measure_choosers(cache, protocol, job):
    """{criterion: {steps: (scale that it chooses, SW2 there)}}; `best` looks at the data and is the limit for all.

    Each as `scfm.method.lora_scale.choose` does it, with scales that never increase, and `free`: the smallest at each step count."""
    speakers, spec = student(cache, protocol, job)
    field, steps = partial(speakers.field, "slow"), (3, 4, 8)

    def make():
        measure, (noise, goal) = ruler(protocol, job), dialling(protocol, job, speakers)
        reached = {(n, s): ends(field(s), noise, n) for n in steps for s in protocol.scales}
        truth = {(n, s): measure(field(s), n)[0] for n, s in reached}
        curves = {name: {pair: rule(points, goal) for pair, points in reached.items()} for name, rule in CRITERIA.items()}
        found = {}
        for name, curve in {**curves, "best": truth}.items():
            dial, free = choose(curve), {n: min(protocol.scales, key=lambda s: curve[n, s]) for n in steps}
            found[name] = {n: (s, truth[n, s]) for n, s in zip(dial.steps, dial.scales)}
            found[f"{name}, free"] = {n: (s, truth[n, s]) for n, s in free.items()}
        return found
    more = {"noises": protocol.dial_noises, "goal": protocol.goal_steps, "free": True}
    return cache("choosers", {"of": spec, "scales": protocol.scales, **measured(protocol, **more)}, make)


def measure_floor(cache, protocol, job):
    """SW2 of data against other data: mean, and the band that holds 95 % of the pairs."""
    def draw(i):
        return DATA[job.data](protocol.samples, keyed_generator(0, i, FLOOR))

    def make():
        found = torch.tensor([sliced_wasserstein(draw(2 * i), draw(2 * i + 1), protocol.directions)
                              for i in range(protocol.floor_pairs)])
        return {"mean": found.mean().item(), "low": found.quantile(.025).item(), "high": found.quantile(.975).item()}
    return cache("floor", {"data": job.data, **measured(protocol, pairs=protocol.floor_pairs)}, make)


MEASURES = {"teacher": measure_teacher, "recipe": measure_student, "floor": measure_floor, "choosers": measure_choosers,
            "teacher shift": measure_teacher_shift}


def do(job, folder, protocol, parts, measures=MEASURES):
    """(job, its value or None, {cell: (seconds, CPU seconds)} of what it rests on, number of cells made).

    measures: by the family of a job; the others are students of SCFM. Jobs of other parts than `parts` compute nothing: None where one of their cells is missing,
    and where a training ran away or its samples are no numbers."""
    torch.set_num_threads(1)                                 # the networks are small: processes, not threads
    cache = Cache(folder, frozen=job.part not in parts)
    try:
        value = measures.get(job.family, measure_student)(cache, protocol, job)
    except (Missing, FloatingPointError, torch.linalg.LinAlgError):
        value = None
    return job, value, cache.used, cache.made
