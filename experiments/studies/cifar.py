"""CIFAR-10 from scratch and shortcut afterwards, at equal network evaluations:

    python -m experiments.studies.cifar FOLDER

FOLDER holds the parquet files (default: the environment variable SCFM_CIFAR10). Ways to spend one budget:

    plain            plain flow matching
    scfm 1/8 1/4 1/2 flow matching and that share of self-consistency examples (the method in pre-training)
    shortcut         a Shortcut Model (arXiv 2410.12557): the step size is an input, a quarter of the examples
                     are bootstrapped
    plain, distilled plain flow matching for four fifths of the budget, then SCFM with a teacher for the rest;
                     raw and dialled
    plain, LoRA      the same by `scfm distill`: a LoRA of rank 16 on the frozen flow, a thousand images; raw
                     and dialled
    plain, step_scaled    the same with the scale trained in as the step size (chapter 06_step_scale), all
                     weights
    step_scaled 1/4  that in pre-training: three quarters of the examples are plain flow matching at scale 0,
                     the others train the differences

An example's forward counts 1 evaluation, its backward 2. Every sampler gets the same noises and labels. The
Frechet distance is taken on the features of `toy/features.py` and is not FID; with --inception FILE the same
rows get the true FID in a column of its own. Trainings and measurements are files under --cells, so a killed
run goes on; several may run at once with --only. Writes experiments/results/cifar.json, cifar.png and
cifar_images.png.

    --only plain shortcut     trains and measures these
    --train                   trains, measures nothing
    --report                  computes nothing, writes what the cells that are there give
    --keep                    what the cells lack stays as the record that is there has it, if it is of the
                              same size, budget, count and judge
    --smoke --cells /tmp/c --out /tmp/cifar     seconds; the numbers mean nothing
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from experiments.runner import RESULTS, Job
from experiments.scales import find_scales
from experiments.studies.cifar_report import report
from experiments.testbeds.cifar import (
    DISTILLED,
    LORA,
    METHODS,
    NFE,
    RECIPES,
    SCALED,
    SEARCH_NOISES,
    SEARCH_SCALES,
    Cifar10,
    Plan,
    job_of,
    saved_settings,
)
from experiments.testbeds.cifar_judge import Sampler
from scfm.inference.search import search_lora_scales
from scfm.inference.step_lora import InferenceConfig, StepLora
from scfm.method.distill import STEP_SCALED, CopiedModels
from scfm.method.flow import EVALUATIONS, sample, time_grid
from scfm.method.lora_scale import LoraScales
from scfm.models.unet import UNetFlow, generate, load_flow

ALL = ("plain", "scfm 1/4", "shortcut", DISTILLED, LORA, SCALED, "step_scaled 1/4", "scfm 1/8", "scfm 1/2")
BY_MIDPOINT = ("plain", "scfm 1/4")
MOST_FEW = 16  # beyond it a dial stands near 0, and midpoint has arrived


def flow_sampler(network: UNetFlow) -> Sampler:
    network.bf16 = network.init_kwargs["size"] != "tiny"
    return partial(generate, network)


def scaled_sampler(bed: Cifar10, job: Job) -> Sampler:
    """The network at the scale of each number of steps, which was trained in."""

    def sampler(labels: torch.Tensor, noise: torch.Tensor, steps: int, solver: str) -> torch.Tensor:
        return flow_sampler(load_flow(bed.flow_file(job), steps).to(bed.device))(labels, noise, steps, solver)

    return sampler


def distilled_sampler(bed: Cifar10, job: Job) -> tuple[Sampler, LoraScales]:
    """The distilled network at the scale for each number of steps, and the scales."""
    teacher, _ = bed.teacher(job)
    models = CopiedModels(teacher)
    models.networks["student"].load_state_dict(load_flow(bed.flow_file(job)).state_dict())
    for network in models.networks.values():
        network.eval().bf16 = bed.plan.size != "tiny"
    field_at = partial(models.field, "student")
    search = bed.search(job, models.field("teacher"))
    scales = find_scales(*search, field_at, bed.plan.searched, SEARCH_SCALES)

    def sampler(labels: torch.Tensor, noise: torch.Tensor, steps: int, solver: str) -> torch.Tensor:
        field, times = field_at(scales.scale(steps)), time_grid(steps)
        parts = zip(noise.split(500), labels.split(500), strict=True)
        return torch.cat([sample(field, z, times, y, solver) for z, y in parts])

    return sampler, scales


def lora_samplers(bed: Cifar10, job: Job, noises: int = SEARCH_NOISES) -> tuple[Sampler, Sampler, LoraScales]:
    """The LoRA at scale 1, the same at its scale for each number of steps, and the scales."""
    step_lora = StepLora(InferenceConfig(lora=str(bed.folder(job)), seed=1000 + job.seed), bed.device)
    network, names = step_lora.pipe.transformer, bed.images.names
    network.bf16 = bed.plan.size != "tiny"
    captions = [f"a {names[i % len(names)]}" for i in range(noises)]
    scales, _ = search_lora_scales(
        step_lora, captions, bed.plan.searched, SEARCH_SCALES, seed=1000 + job.seed, progress=False
    )

    def at_scale(scale_of: Callable[[int], float]) -> Sampler:
        def sampler(labels: torch.Tensor, noise: torch.Tensor, steps: int, solver: str) -> torch.Tensor:
            step_lora.set_scale(scale_of(steps))
            return generate(network, labels, noise, steps, solver)

        return sampler

    return at_scale(lambda steps: 1.0), at_scale(scales.scale), scales


def measure(bed: Cifar10, job: Job) -> None:
    """The rows of one training, by Euler; of plain flow matching and SCFM by midpoint too, of the distilled
    dialled too.
    """
    if job.family == LORA:
        raw, turned, scales = lora_samplers(bed, job)
    elif saved_settings(bed.folder(job))["algorithm"] == STEP_SCALED:
        raw, turned = scaled_sampler(bed, job), None
    else:
        raw = flow_sampler(load_flow(bed.flow_file(job)).to(bed.device))
        turned, scales = distilled_sampler(bed, job) if job.family == DISTILLED else (None, None)
    measure_all(bed, job, raw)
    if job.family in BY_MIDPOINT:
        measure_all(bed, job, raw, "midpoint", MOST_FEW)
    if turned:
        dialled = job._replace(label=f"{job.family}, dialled")
        measure_all(bed, dialled, turned, most=MOST_FEW, about={"dial": scales._asdict()})


def measure_all(
    bed: Cifar10,
    job: Job,
    sampler: Sampler | None,
    solver: str = "euler",
    most: int = max(NFE),
    about: dict | None = None,
) -> list[dict]:
    """A row for each number of evaluations that the solver can spend, up to `most`."""
    judge = bed.judge(job)
    return [
        judge(sampler, n, solver, about) for n in bed.plan.nfe if n <= most and n % EVALUATIONS[solver] == 0
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "data", nargs="?", default=os.environ.get("SCFM_CIFAR10"), help="folder of parquet files"
    )
    parser.add_argument("--cells", type=Path, default=Path("runs/cifar/cells"))
    parser.add_argument("--out", type=Path, default=RESULTS / "cifar", help="path without suffix")
    parser.add_argument("--size", default="nano", choices=list(RECIPES))
    parser.add_argument(
        "--evaluations", type=int, default=600_000, help="network evaluations of one training"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--count", type=int, default=2000, help="images of one measurement")
    parser.add_argument(
        "--nfe", type=int, nargs="+", default=NFE, help="network evaluations of an image at which to measure"
    )
    parser.add_argument("--only", nargs="+", default=ALL, choices=[*METHODS, DISTILLED, LORA, SCALED])
    parser.add_argument(
        "--copy", default="JPEG quality 75 copy", help="what is special about this copy of CIFAR-10"
    )
    parser.add_argument("--note", nargs="*", default=(), help="what else a reader of the record must know")
    parser.add_argument("--inception", default="", help="weights of Inception, for the true FID")
    parser.add_argument("--train", action="store_true", help="train only")
    parser.add_argument("--report", action="store_true", help="compute nothing")
    parser.add_argument("--keep", action="store_true", help="rows without cells stay as they are recorded")
    parser.add_argument("--smoke", action="store_true", help="tiny everything")
    args = parser.parse_args(argv)
    if not args.data:
        parser.error("name the folder of the parquet files, or set SCFM_CIFAR10")
    return args


def main(argv: Sequence[str] | None = None, should_stop: Callable[[], bool] = lambda: False) -> int:
    args = parse(argv)
    plan = Plan(
        args.data,
        args.cells,
        args.size,
        args.evaluations,
        args.count,
        inception=args.inception,
        nfe=tuple(args.nfe),
    )
    if args.smoke:
        plan = plan._replace(size="tiny", budget=400, count=40, previews=0, searched=(1, 4))
    bed, jobs = Cifar10(plan, should_stop), [job_of(name, seed) for seed in args.seeds for name in args.only]
    if not args.report and any(bed.train(job) is None for job in jobs):
        return 143
    if not (args.train or args.report):
        bed.eyes.floor()
        for job in jobs:
            measure(bed, job)
    if not args.train:
        report(plan, args.seeds, args.out, args.copy, args.note, args.keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
