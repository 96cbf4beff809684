"""Classifier-free guidance, kept at run time or distilled into the weights:

    python -m experiments.studies.guidance --workers 2

The teacher is the plain flow on CIFAR-10 that the repository carries, at guidance scale 3: two evaluations a
step. Students learn from 256 of its own images, with as many LoRA parameters and network evaluations:

    guidance kept            the scale trained in as the step size, two LoRAs of rank 12: two evaluations
                             a step
    guidance in the weights  the same with a LoRA of power 0 before them, three of rank 8: one evaluation;
                             also with --finest_steps 8, where half of the targets are the teacher's and
                             not a quarter
    dual_pure                the paper's two EMAs, teacher examples by the teacher alone, guidance in the
                             weights, rank 24: one evaluation, at LoRA scales that are searched for each
                             step count on other noises

An example's forward counts 1 evaluation, its backward through frozen weights 1, both twice where it is
guided.
The judge is the distance to the endpoints that the guided teacher reaches in 32 steps from the same noises,
200 of them, by evaluations an image. Every training is a file under --cache, so a killed run goes on. Writes
experiments/results/guidance.json and guidance.png. No data set is read.

    --smoke --cache /tmp/cells --out /tmp/guidance      seconds; the numbers mean nothing
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments.curves import curve_table, gather_curves
from experiments.figures import OPEN, SCFM, STUDENT, TEACHER, canvas, level_axis, plot_curve, save
from experiments.recipes import short_decay
from experiments.runner import CellCache, Job, make_parser, non_defaults, run_info, run_jobs, write_record
from experiments.testbeds import Field
from scfm.data.fingerprint import file_fingerprint
from scfm.method.distill import STEP_SCALED, SCFMConfig, distill
from scfm.method.ema import shorten
from scfm.method.flow import sample, time_grid
from scfm.method.lora_scale import choose_lora_scales, endpoint_curve
from scfm.method.metrics import endpoint_distance
from scfm.models.family import unguided
from scfm.models.lora import LoraModels, adapter_state, load_adapter_state
from scfm.models.pixels import Pixels, pipeline_of
from scfm.models.scaled_lora import ScaledLoraModels
from scfm.models.unet import load_flow
from toy.pipelines import WEIGHTS

FLOW = WEIGHTS / "cifar" / "plain.safetensors"
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
OF_TEACHER, KEPT, INSIDE, COARSER, PAPERS = (
    "teacher",
    "guidance kept",
    "guidance in the weights",
    "guidance in the weights, finest 8",
    "dual_pure",
)
RANKS = {KEPT: 12, INSIDE: 8, COARSER: 8, PAPERS: 24}
SEARCHED = tuple(i / 4 for i in range(1, 9))
LOOKS = {
    OF_TEACHER: TEACHER,
    KEPT: STUDENT | OPEN,
    INSIDE: STUDENT,
    COARSER: STUDENT | {"ls": ":"},
    PAPERS: SCFM,
}
NOTES = (
    "Root mean squares in pixels from -1 to 1, to the guided teacher's 32-step endpoints from the same "
    "noises; Euler's steps, shift 1, guidance scale 3.",
    "Learning rate 1e-3 with a cosine, batch 32, as the LoRA of the study cifar; EMAs by the rules of the "
    "library. Nothing was searched but the LoRA scales of dual_pure, whose search is not counted.",
    "Before, once, by hand: 24,000 evaluations, seed 0, at 1, 2, 3, 4, 8 and 16 evaluations an image: "
    "guidance in the weights .128, .112, .103, .099, .098 and .107, with finest 8 .120, .101, .094, .088, "
    ".074 and .076.",
)


class Sizes(NamedTuple):
    """budget: network evaluations of a training; images: of the teacher; judged: noises; searched: noises of
    the search; counts: steps."""

    budget: int = 60_000
    batch: int = 32
    images: int = 256
    judged: int = 200
    searched: int = 64
    counts: tuple[int, ...] = (1, 2, 3, 4, 8, 16)
    goal: int = 32
    guidance: float = 3.0


SMOKE = Sizes(600, 4, 8, 8, 4, (1, 2), 4)


class Bed:
    """The teacher, its images, and noises with labels."""

    def __init__(self, cache: CellCache, sizes: Sizes) -> None:
        self.cache, self.sizes = cache, sizes
        self.pipe = pipeline_of(load_flow(FLOW), NAMES)
        self.family = Pixels(self.pipe, 32, 32)
        self.spec = {"flow": file_fingerprint(FLOW).hex(), **sizes._asdict()}

    def cond(self, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of classes (n,), at the guidance scale."""
        text = self.family.encode_text([NAMES[i] for i in labels.tolist()])
        return {**text, "guidance": torch.full((len(labels),), self.sizes.guidance)}

    def noise(self, count: int, seed: int) -> torch.Tensor:
        return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))

    def endpoints(self, field: Field, noise: torch.Tensor, steps: int) -> torch.Tensor:
        """Of a field that takes a condition; classes in turn."""
        parts = []
        for rows in torch.arange(len(noise)).split(100):
            parts.append(sample(field, noise[rows], time_grid(steps), self.cond(rows % 10)))
        return torch.cat(parts)

    def teacher(self, x: torch.Tensor, t: torch.Tensor, cond: Any = None) -> torch.Tensor:
        with torch.no_grad():
            return self.family.velocity(self.pipe.transformer, x, t, cond)

    def reached(self, count: int, seed: int) -> torch.Tensor:
        """The guided teacher's endpoints in many steps."""
        spec = {**self.spec, "count": count, "seed": seed}
        goal = self.sizes.goal
        return self.cache(
            "guidance_goal", spec, lambda: self.endpoints(self.teacher, self.noise(count, seed), goal)
        )


def evaluations(label: str, config: SCFMConfig) -> float:
    """Of one example: forward, backward, two halves."""
    if label == KEPT:
        return 2 * (1 + 1 + 2)
    guided = config.teacher_ratio if label == PAPERS else config.step_scale.by_teacher()
    return 1 + 1 + 2 * (1 + guided)


def config_of(label: str, seed: int, sizes: Sizes) -> SCFMConfig:
    """With as many training steps as the budget buys."""
    usual: dict[str, Any] = {"learning_rate": 1e-3, "lr_scheduler": "cosine", "seed": seed}

    def make(steps: int) -> SCFMConfig:
        if label == PAPERS:
            short = {"ema_decay_fast": shorten(0.99, steps), "ema_decay_slow": shorten(0.999, steps)}
            more = {"algorithm": "dual_pure", "shift": (1.0, 2.0), **short}
        else:
            more = {"algorithm": STEP_SCALED, "shift": (0.9, 1.1), "ema_decay": short_decay(steps)}
            more |= {"finest_steps": 8} if label == COARSER else {}
        return SCFMConfig(max_train_steps=steps, global_batch_size=sizes.batch, **usual, **more)

    return make(max(1, round(sizes.budget / sizes.batch / evaluations(label, make(1)))))


def make_models(label: str, seed: int) -> tuple[Pixels, Any]:
    """(family, models) on a pipeline of their own."""
    torch.manual_seed(seed)  # PEFT draws A from the global state
    family = Pixels(pipeline_of(load_flow(FLOW), NAMES), 32, 32)
    inside = {} if label == KEPT else {"teacher_velocity": family.velocity}
    velocity = family.velocity if label == KEPT else unguided(family.velocity)
    make: Any = LoraModels if label == PAPERS else ScaledLoraModels
    transformer = family.pipe.transformer
    rows = family.forward_rows
    return family, make(transformer, velocity, family.lora_targets, RANKS[label], forward_rows=rows, **inside)


def measure(cache: CellCache, job: Job, sizes: Sizes) -> dict[str, dict[int, float]]:
    """{"endpoint": {evaluations an image: distance}, "scale": {...}} of a training, or of the teacher."""
    bed = Bed(cache, sizes)
    noise, goal = bed.noise(sizes.judged, 1), bed.reached(sizes.judged, 1)
    if job.label == OF_TEACHER:
        found = {2 * n: endpoint_distance(bed.endpoints(bed.teacher, noise, n), goal) for n in sizes.counts}
        return {"endpoint": found}
    config = config_of(job.label, job.seed, sizes)
    _, models = make_models(job.label, job.seed)
    name = "ema_slow" if job.label == PAPERS else "ema"
    adapters = [name] if job.label == PAPERS else models.adapters[name]
    spec = {**bed.spec, "label": job.label, "rank": RANKS[job.label], "config": non_defaults(config)}

    def make() -> dict[str, dict[str, torch.Tensor]]:
        data = bed.reached(sizes.images, 2)

        def batch(generator: torch.Generator, n: int) -> tuple[torch.Tensor, Any]:
            rows = torch.randint(len(data), (n,), generator=generator)
            return data[rows], bed.cond(rows % 10)

        distill(models, batch, config, progress=False)
        return {a: {k: v.clone() for k, v in adapter_state(models.transformer, a).items()} for a in adapters}

    for adapter, state in cache("guidance_lora", spec, make).items():
        load_adapter_state(models.transformer, adapter, state)
    return cache("guidance_marks", spec, lambda: marks(bed, job.label, models, name, config))


def marks(bed: Bed, label: str, models: Any, name: str, config: SCFMConfig) -> dict[str, dict[int, float]]:
    """Distances at every step count."""
    sizes = bed.sizes

    def reach(noise: torch.Tensor) -> Callable[[int, float], torch.Tensor]:
        return lambda n, scale: bed.endpoints(models.field(name, scale), noise, n)

    if label == PAPERS:
        goal = bed.reached(sizes.searched, 3)
        curve = endpoint_curve(reach(bed.noise(sizes.searched, 3)), goal, sizes.counts, SEARCHED)
        scale_of = choose_lora_scales(curve).scale
    else:
        scale_of = config.step_scale.scale
    goal, endpoints = bed.reached(sizes.judged, 1), reach(bed.noise(sizes.judged, 1))
    each = 2 if label == KEPT else 1
    found = {n: endpoint_distance(endpoints(n, scale_of(n)), goal) for n in sizes.counts}
    return {
        "endpoint": {each * n: distance for n, distance in found.items()},
        "scale": {each * n: scale_of(n) for n in sizes.counts},
    }


def jobs(seeds: int, budget: int) -> list[Job]:
    """All trainings, and the teacher."""
    labels = [(label, seed) for seed in range(seeds) for label in RANKS]
    return [
        Job("guidance", "cifar", label, "CIFAR-10", seed, {}, budget)
        for label, seed in [(OF_TEACHER, 0), *labels]
    ]


def plot(record: dict[str, Any], path: str | Path) -> None:
    """Distance against evaluations an image."""
    figure, axes = canvas(1, 1, (5.5, 3.6))
    ax = axes[0, 0]
    curves = record["curves"]["CIFAR-10"]
    for label in LOOKS:
        plot_curve(ax, curves.get(f"{label} endpoint", {}), label=label, **LOOKS[label])
    ax.set(xscale="log", yscale="log", xlabel="network evaluations an image")
    ax.set_ylabel("distance to the guided endpoint")
    ax.set_xticks(marks := [1, 2, 4, 8, 16, 32], marks)
    level_axis(ax, (0.02, 0.05, 0.1, 0.2, 0.5, 1))
    ax.legend(fontsize=9)
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, "guidance", ("guidance",))
    args = parser.parse_args(argv)
    sizes = SMOKE if args.smoke else Sizes()
    results = run_jobs(jobs(1 if args.smoke else 2, sizes.budget), partial(measure, sizes=sizes), args)
    curves = gather_curves(result for result in results if result.value is not None)
    steps = {label: config_of(label, 0, sizes).max_train_steps for label in RANKS}
    trained = {"sizes": sizes._asdict(), "ranks": RANKS, "train_steps": steps}
    record = {"notes": NOTES, **run_info(results), **trained, "curves": curves}
    write_record(record, args.out)
    plot(record, f"{args.out}.png")
    print(curve_table(curves, {}))


if __name__ == "__main__":
    main()
