"""Two-dimensional sets and a small network: trainings and measurements, each a cell that is known by what
determines it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from experiments import budgets
from experiments.runner import CellCache, Job, non_defaults
from experiments.scales import finite
from experiments.streams import Stream
from experiments.testbeds import BatchOf, Field, Walk
from scfm.method.consistency import scfm_loss
from scfm.method.distill import (
    CopiedModels,
    SCFMConfig,
    distill,
    make_emas,
    make_optimizer,
    sample_batch,
)
from scfm.method.ema import shorten
from scfm.method.flow import sample, time_grid
from scfm.method.lora_scale import SCALES, STEPS
from scfm.method.metrics import endpoint_distance, sliced_wasserstein
from scfm.streams import keyed_generator
from toy.plane import DATA, MLP, train_flow

COUPLED = 512  # noises on which a distance to the teacher's endpoints is measured
FEWER = (1, 2, 3, 4, 8)  # step counts of the ablations
MODELS = ("student", "ema_fast", "ema_slow")
TEACHER_UPDATES = {"checkerboard": 14_000, "moons": 5000, "8 gaussians": 5000}


@dataclass(frozen=True)
class PlaneSizes:
    """teacher_updates, updates: training steps of the teachers, by set, and of a student; batch: examples of
    a step; samples, directions: of SW2; dial_noises, goal_steps, scales: of the search for scales; steps:
    that are measured.
    """

    teacher_updates: dict = field(default_factory=lambda: dict(TEACHER_UPDATES))
    updates: int = 2000
    batch: int = 256
    samples: int = 10_000
    directions: int = 64
    dial_noises: int = 512
    goal_steps: int = 128
    scales: tuple = SCALES
    steps: tuple = STEPS


# where the search for scales is paid for from a budget
BUDGETED_SIZES = PlaneSizes(dial_noises=128, scales=SCALES[::2])
SMOKE_SIZES = PlaneSizes(dict.fromkeys(DATA, 2), 2, 8, 64, 8, 8, 4, (0.0, 1.0))
BUDGETED_SMOKE_SIZES = replace(SMOKE_SIZES, dial_noises=2, steps=(1, 3, 4, 8, 16))


def search_cost(sizes: PlaneSizes) -> int:
    """Evaluations that finding a scale for each number of steps takes."""
    return budgets.search_cost(sizes.dial_noises, sizes.steps, sizes.scales, sizes.goal_steps)


def plan(sizes: PlaneSizes, method: str, budget: int) -> tuple[int, int]:
    """(training steps, pairs) that a budget of evaluations buys."""
    return budgets.plan(method, budget, sizes.batch, search_cost(sizes))


class Recipe(NamedTuple):
    """What a change asks for. config: fields of `SCFMConfig`; training: what the training needs beside them
    (few: points that it sees, 0 for fresh data; sample_space; teacher_ratio_end: where a moving k/N ends);
    reading: what the measurement needs (read_out: the network that is sampled; sampling_shift).
    """

    config: dict[str, Any]
    training: dict[str, Any]
    reading: dict[str, Any]


def longer(decay: float, memory: float) -> float:
    """The decay of an EMA whose memory, 1 / (1 - decay) steps, is so many times as long; at least a step."""
    return decay if memory == 1 else max(0.0, 1 - (1 - decay) / memory)


def make_recipe(sizes: Any, change: dict[str, Any]) -> Recipe:
    """The recipe of all students, the paper's with EMAs as short as the run, with a change, in which
    `ema_memory` multiplies their memory. sizes: updates, batch.
    """
    change = dict(change)
    steps, memory = change.get("max_train_steps", sizes.updates), change.pop("ema_memory", 1)
    config = {
        "max_train_steps": steps,
        "global_batch_size": sizes.batch,
        "shift": (1.0, 2.0),
        "learning_rate": 3e-4,
        "lr_scheduler": "cosine",
        "ema_decay_fast": longer(shorten(0.99, steps), memory),
        "ema_decay_slow": longer(shorten(0.999, steps), memory),
    }
    training, reading = {"few": 0, "sample_space": False}, {"read_out": "ema_slow", "sampling_shift": 1.0}
    recipe = Recipe(config, training, reading)
    for name, value in change.items():
        if name in recipe.reading:
            recipe.reading[name] = value
        elif name in recipe.training or name == "teacher_ratio_end":
            recipe.training[name] = value
        else:
            recipe.config[name] = value
    return recipe


def ramp_teacher_ratio(config: SCFMConfig, last: float | None) -> Callable | None:
    """on_step for `distill`: k/N goes evenly from config's to `last`, which it ends at; None: it stays."""
    first = config.teacher_ratio

    def on_step(step: int, _: Any) -> None:
        config.teacher_ratio = first + (last - first) * (step + 1) / config.max_train_steps

    return None if last is None else on_step


def load_weights(network: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    network.load_state_dict(weights)
    return network


def distill_in_sample_space(models: CopiedModels, batch_of: BatchOf, config: SCFMConfig) -> None:
    """`distill` with the loss on the point reached at t3: an example's weight is (t1 - t3)^2."""
    (optimizer, scheduler), emas = make_optimizer(models, config), make_emas(models, config)
    for step in range(config.max_train_steps):
        data = batch_of(keyed_generator(config.seed, step, stream=1), config.global_batch_size)
        noise, jumps = sample_batch(config, step, len(data), data.shape[1:])
        weight = (jumps.times[:, 0] - jumps.times[:, -1]).square()  # (B,)
        (weight * scfm_loss(data, noise, jumps, models, algorithm=config.algorithm)).mean().backward()
        torch.nn.utils.clip_grad_norm_(models.parameters("student"), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        emas.update()


def endpoints(
    velocity: Field, noise: torch.Tensor, steps: int, shift: float = 1.0, solver: str = "euler"
) -> torch.Tensor:
    """Where `noise` (n, 2) arrives, in pieces that stay in the cache of the processor: (n, 2)."""
    parts = [sample(velocity, part, time_grid(steps, shift), solver=solver) for part in noise.split(1000)]
    return torch.cat(parts)


class References(NamedTuple):
    """Fresh data, and the noises that samples start from, both (samples, 2)."""

    data: torch.Tensor
    noise: torch.Tensor


class Plane:
    """The `Testbed` of the plane. A job's data names the set, its seed the teacher, the reference and the
    noises.
    """

    shift = 1.0

    def __init__(self, cache: CellCache, sizes: PlaneSizes):
        self.cache, self.sizes = cache, sizes

    def teacher(self, job: Job) -> tuple[MLP, dict]:
        """The trained teacher of a set and a seed, and the spec of its cell."""
        steps, batch = self.sizes.teacher_updates[job.data], self.sizes.batch
        spec = {"data": job.data, "seed": job.seed, "max_train_steps": steps, "global_batch_size": batch}

        def make() -> dict:
            torch.manual_seed(job.seed)
            return train_flow(MLP(), DATA[job.data], steps, batch, seed=job.seed).state_dict()

        return load_weights(MLP(), self.cache("teacher", spec, make)), spec

    def batches(self, job: Job) -> BatchOf:
        """Fresh data of the set; points of a fixed few where the job's change says so."""
        draw, few = DATA[job.data], make_recipe(self.sizes, job.change).training["few"]
        if not few:
            return lambda generator, count: draw(count, generator)
        points = draw(few, keyed_generator(self.config(job).seed, 0, Stream.FEW))
        return lambda generator, count: points[torch.randint(few, (count,), generator=generator)]

    def config(self, job: Job) -> SCFMConfig:
        """Of the job's student."""
        return SCFMConfig(**{"seed": job.seed, **make_recipe(self.sizes, job.change).config})

    def student(self, job: Job) -> tuple[CopiedModels, dict]:
        """The models after distillation, and the spec of their cell."""
        network, of_teacher = self.teacher(job)
        models, config = CopiedModels(network), self.config(job)
        training = make_recipe(self.sizes, job.change).training
        spec = {"teacher": of_teacher, "config": non_defaults(config), **training}

        def make() -> dict:
            ramp = ramp_teacher_ratio(config, training.get("teacher_ratio_end"))
            train = partial(distill, on_step=ramp, progress=False)
            train = distill_in_sample_space if training["sample_space"] else train
            train(models, self.batches(job), config)
            return {name: models.networks[name].state_dict() for name in MODELS}

        for name, weights in self.cache("student", spec, make).items():
            load_weights(models.networks[name], weights)
        return models, spec

    def references(self, job: Job) -> References:
        """The same for all methods of one set and seed."""
        data, noise = (keyed_generator(job.seed, 0, stream) for stream in (Stream.REFERENCE, Stream.NOISE))
        return References(
            DATA[job.data](self.sizes.samples, data), torch.randn(self.sizes.samples, 2, generator=noise)
        )

    def search(self, job: Job, teacher: Field, count: int | None = None) -> tuple[Walk, torch.Tensor]:
        """walk(field, steps, shift=1.) from noises that no judge sees, and where the teacher's many steps
        take them; of the first `count` alone, if it is given.
        """
        generator = keyed_generator(job.seed, 0, Stream.SEARCH_NOISE)
        noise = torch.randn(self.sizes.dial_noises, 2, generator=generator)
        goal = endpoints(teacher, noise, self.sizes.goal_steps)[:count]

        def walk(velocity: Field, steps: int, shift: float = 1.0) -> torch.Tensor:
            return endpoints(velocity, noise[:count], steps, shift)

        return walk, goal

    def goal(self, job: Job) -> torch.Tensor:
        """Where the teacher's many steps take the first of the judge's noises: (COUPLED, 2). No scale was
        chosen on these.
        """
        network, spec = self.teacher(job)

        def make() -> torch.Tensor:
            noise = self.references(job).noise[:COUPLED]
            return endpoints(CopiedModels(network).field("teacher"), noise, self.sizes.goal_steps)

        more = {"goal": self.sizes.goal_steps, "coupled": COUPLED}
        return self.cache("goal", {"of": spec, **self.judged_by(**more)}, make)

    def judged_by(self, **more: Any) -> dict[str, Any]:
        """What determines a judgement, as part of a cell's spec."""
        return {"samples": self.sizes.samples, "directions": self.sizes.directions, **more}

    def cloud(self, job: Job) -> Callable[[torch.Tensor], tuple[float, float]]:
        """score(points (samples, 2)) -> (SW2 against fresh data, deviation over the data's)."""
        data = self.references(job).data

        def score(points: torch.Tensor) -> tuple[float, float]:
            deviation = (points.std(0) / data.std(0)).mean().item()
            return sliced_wasserstein(points, data, self.sizes.directions), deviation

        return score

    def ruler(self, job: Job) -> Callable[..., tuple[float, float]]:
        """measure(field, steps, shift, solver): the `cloud` score of where the judge's noises arrive."""
        score, noise = self.cloud(job), self.references(job).noise

        def measure(
            velocity: Field, steps: int, shift: float = 1.0, solver: str = "euler"
        ) -> tuple[float, float]:
            return score(endpoints(velocity, noise, steps, shift, solver))

        return measure

    def distance(self, job: Job) -> Callable[[Field, int], float]:
        """distance(field, steps): to the teacher's endpoints, of the first of the judge's noises."""
        noise, goal = self.references(job).noise[:COUPLED], self.goal(job)
        return lambda velocity, steps: finite(endpoint_distance(endpoints(velocity, noise, steps), goal))

    def judge_walks(self, job: Job) -> Callable[..., dict[str, float]]:
        """measure(walk, steps) -> {"sw2", "endpoint"} of any sampler, walk(noise, steps) -> points."""
        score, noise, goal = self.cloud(job), self.references(job).noise, self.goal(job)

        def measure(walk: Callable, steps: int) -> dict[str, float]:
            return {
                "sw2": finite(score(walk(noise, steps))[0]),
                "endpoint": finite(endpoint_distance(walk(noise[:COUPLED], steps), goal)),
            }

        return measure

    def judge(self, job: Job) -> Callable[..., dict[str, float]]:
        """measure(field, steps) -> {"sw2": against fresh data, "endpoint": distance to the teacher's}, by
        Euler.
        """
        measure = self.judge_walks(job)
        return lambda velocity, steps: measure(partial(endpoints, velocity), steps)
