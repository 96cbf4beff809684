"""The cells of bench/few_shot.py on the plane: students of few points, and what is measured of them.

A measurement takes (cache, protocol, job), see `Job` in bench/few_shot.py, and returns {curve: {steps: {metric: number}}}.
"""
from functools import partial
from typing import NamedTuple

import torch

from plane import Protocol
from plane_cells import COUPLED, dialling, ends, finite, goal_of, measured, references, student, teacher
from scfm.method.consistency import keyed_generator
from scfm.method.lora_scale import SCALES, choose_lora_scales, endpoint_curve
from scfm.method.distill import CopiedModels
from scfm.method.metrics import endpoint_distance, sliced_wasserstein
from toy.plane import DATA

OTHERS = 30                                                  # a stream of random numbers that nothing else uses
QUERIES = 2000                                               # points for the coverage
COVERED = .95                                                # what other fresh data cover, by the choice of the radius


class PlaneProtocol(NamedTuple):
    """Sizes, by the names of the plane's own `Protocol`. The teachers are its teachers, so its cache has them."""
    steps: tuple = (3, 4, 8, 32)
    teacher_updates: dict = Protocol().teacher_updates
    updates: int = 1000
    batch: int = 256
    samples: int = 5000
    directions: int = 64
    dial_noises: int = 256
    goal_steps: int = 128
    scales: tuple = SCALES[::2]


def nearest(points, others):
    """Distance from each of the points (n, 2) to the nearest of the others (m, 2): (n,)."""
    return torch.cat([torch.cdist(part, others).amin(1) for part in points.split(500)])


def plane_ruler(protocol, job, goal):
    """A function (points (samples, 2) reached from the noises) -> {metric: number}, and what other fresh data would score.

    sw2: sliced Wasserstein to fresh data; coverage: share of fresh data with a sample within a radius (the one within which 95 %
    have other fresh data); endpoint: distance to the teacher's own endpoints; spread: deviation over the data's."""
    data, _ = references(protocol, job)
    others = DATA[job.data](protocol.samples, keyed_generator(job.seed, 0, OTHERS))
    radius = nearest(data[:QUERIES], others).quantile(COVERED)

    def cloud(points):
        return {"sw2": sliced_wasserstein(points, data, protocol.directions),
                "coverage": (nearest(data[:QUERIES], points) <= radius).float().mean().item(),
                "spread": (points.std(0) / data.std(0)).mean().item()}

    def look(points):
        return cloud(points) | {"endpoint": endpoint_distance(points[:COUPLED], goal)}
    return look, cloud(others)


def plane_spec(protocol, spec):
    return {"of": spec, **measured(protocol, queries=QUERIES, coupled=COUPLED, steps=protocol.steps, noises=protocol.dial_noises,
                                   goal=protocol.goal_steps, scales=protocol.scales)}


def measure_teacher(cache, protocol, job):
    """Curve "raw", and "floor": {metric: what other fresh data score}."""
    (network, spec), goal = teacher(cache, protocol, job), goal_of(cache, protocol, job)

    def make():
        (look, floor), (_, noise) = plane_ruler(protocol, job, goal), references(protocol, job)
        field = CopiedModels(network).field("teacher")
        return {"raw": {n: look(ends(field, noise, n)) for n in protocol.steps}, "floor": floor}
    return cache("few_teacher", plane_spec(protocol, spec), make)


def measure_student(cache, protocol, job):
    """Curves "raw" (scale 1) and, where it is SCFM, "dialled"; "scales": {steps: the dial's}."""
    goal, (models, spec) = goal_of(cache, protocol, job), student(cache, protocol, job)
    field = partial(models.field, "ema_slow")

    def make():
        (look, _), (_, noise) = plane_ruler(protocol, job, goal), references(protocol, job)
        found = {"raw": {n: look(ends(field(), noise, n)) for n in protocol.steps}}
        if job.family == "scfm":
            few, far = dialling(protocol, job, models)
            curve = endpoint_curve(lambda n, s: ends(field(s), few, n), far, protocol.steps, protocol.scales)
            found["scales"] = dict(zip(*choose_lora_scales({pair: finite(distance) for pair, distance in curve.items()})[:2]))
            found["dialled"] = {n: look(ends(field(s), noise, n)) for n, s in found["scales"].items()}
        return found
    return cache("few_sw2", plane_spec(protocol, spec), make)


MEASURES = {"teacher": measure_teacher, "scfm": measure_student, "tuned": measure_student}
