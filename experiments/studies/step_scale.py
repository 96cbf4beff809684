"""The scale trained in as the step size:  python -m experiments.studies.step_scale --workers 2

One student for 1 to 32 steps (chapter 06_step_scale), with one difference and with two, by the protocol of
the study `compare`: its teachers, budgets, data, noises, reference and judges, so that its rivals' numbers,
which are read from experiments/results/compare.json, stand beside these. No scale is searched: all of the
budget is training.

    plane       three sets, three seeds, three budgets
    tiny Flux   a LoRA of rank 16, two of 16, two of 8 (as many parameters as one of 16), two seeds, three
                budgets
    scratch     pre-training on the three sets, two seeds: plain flow matching, and the same for three
                quarters or seven eighths of the examples while the others train the differences, at equal
                evaluations
    choices     one thing changed at a time, two differences, at the medium budget: checkerboard and moons,
                seed 0, and what matters there on the tiny Flux at the small one

Every cell is a file under --cache, so a killed run goes on where it was; in the folder of the study `compare`
its teachers are found. Writes experiments/results/step_scale.json and step_scale.png.

    --only plane    or "tiny Flux", or choices: computes one part, and takes of the others what is there
    --report        computes nothing, writes what the cells that are there give
    --keep          what the cells lack stays as the record that is there has it
    --smoke --cache /tmp/cells --out /tmp/step_scale      seconds, one set; the numbers mean nothing
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments.curves import recall
from experiments.recipes import BUDGETS, SMOKE_BUDGETS
from experiments.runner import CellCache, Job, make_parser, run_info, run_jobs, write_record
from experiments.studies.step_scale_cells import (
    FromScratch,
    measure_from_scratch,
    measure_on_flux,
    measure_on_plane,
)
from experiments.studies.step_scale_report import curves_of, gather, plot, text
from experiments.testbeds import plane, tiny_flux
from toy.plane import DATA

FLUX, CHOICES, SCRATCH = tiny_flux.NAME, "choices", "scratch"
PARTS = ("plane", FLUX, SCRATCH, CHOICES)
ONE, TWO = "one difference", "two differences"
ORDERS = {TWO: {"scale_order": 2}, ONE: {"scale_order": 1}}
LORAS = {**ORDERS, f"{TWO}, rank 8": {"scale_order": 2, "rank": 8}}
FLOWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale trained in, a quarter": {"share": 0.25},
    "scale trained in, an eighth": {"share": 0.125},
}
SCRATCH_BUDGET = 7_000_000
FEW_OFTEN = (1.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0)  # more of 2 to 4 steps
VARIANTS: dict[str, dict[str, Any]] = {
    "p = .5": {"scale_exponent": 0.5},
    "p = .7": {"scale_exponent": 0.7},
    "p = 1": {"scale_exponent": 1.0},
    "powers of two": {"step_counts": (1, 2, 4, 8, 16)},
    "finest 8": {"finest_steps": 8},
    "finest 32": {"finest_steps": 32, "step_counts": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)},
    "2 to 4 twice as often": {"step_weights": FEW_OFTEN},
    "EMA .5": {"ema_decay": 0.5},
    "EMA .8": {"ema_decay": 0.8},
    "EMA .95": {"ema_decay": 0.95},
    "EMA .98": {"ema_decay": 0.98},
    "one shift": {"shift_width": 0.0},
    "shifts to a quarter off": {"shift_width": 0.25},
    "shifts to twice": {"shift_width": 1.0},
    "learning rate x 3": {"learning_rate": 1e-3},
    "targets damped to .75": {"damping": 0.75},  # the EMA makes the half-steps at so much of their scale
    "targets damped to .5": {"damping": 0.5},
}
ON_FLUX_ALONE: dict[str, dict[str, Any]] = {  # there the differences' own rate is 2.8e-3 without it
    "learning rate x .36": {"learning_rate": 3.6e-4},
    "10 images": {"drawings": 10},
    "1 image": {"drawings": 1},
}
ON_FLUX = ("p = .5", "p = 1", "2 to 4 twice as often", "EMA .5", "EMA .95", "finest 32", "one shift")
NOTES = (
    "Plane: sliced-Wasserstein-2 to fresh data, and the distance to the teacher's own endpoints from the "
    "same noises; tiny Flux: Frechet distance on the features of toy/reader.py (not FID), its accuracy in "
    "reading what captions name, and the distance to the endpoints; 256 captions.",
    "Learning rate, schedule, batch and data are those of every method of the study compare; EMA: memory "
    ".36 times the root of the training steps.",
    "Two differences have twice the parameters of one.",
    "The choices are changes of two differences at the medium budget on the plane and at the small one on "
    "the tiny Flux; one seed.",
    "From scratch the differences learn at a quarter of the base's rate. At 2.8 times that rate, which was "
    "the rule before, SW2 at one step on the seeds 0 and 1 was .052 and .211 (checkerboard, a quarter), .063 "
    "and .077 (an eighth), .032 and .032, .033 and .295 (moons), .053 and .044, .078 and .299 (8 Gaussians): "
    "three of twelve had lost their noise at scale 1.",
)


def jobs(
    budgets: dict[str, tuple[int, int]],
    sets: Sequence[str],
    seeds: int,
    flux_seeds: int,
    scratch: int,
    small: bool = False,
) -> list[Job]:
    """All measurements, in the order in which they matter.

    scratch: evaluations of a pre-training; small: for a look at whether everything runs
    """
    found = [
        Job("plane", "step_scaled", label, data, seed, change, on_plane)
        for label, change in ORDERS.items()
        for seed in range(seeds)
        for on_plane, _ in budgets.values()
        for data in sets
    ]
    found += [
        Job(FLUX, "step_scaled", label, FLUX, seed, change, on_flux)
        for seed in range(flux_seeds)
        for _, on_flux in budgets.values()
        for label, change in LORAS.items()
        if on_flux
    ]
    for seed in range(flux_seeds):
        found += [
            Job(SCRATCH, "from scratch", label, data, seed, change, scratch)
            for data in sets
            for label, change in FLOWS.items()
        ]
    on_plane, on_flux = budgets["medium"][0], budgets["small"][1]
    chosen = {label: {"scale_order": 2} | VARIANTS[label] for label in list(VARIANTS)[: 2 if small else None]}
    for label, change in chosen.items():
        found += [Job(CHOICES, "step_scaled", label, data, 0, change, on_plane) for data in sets[:2]]
    on_both = {label: change for label, change in chosen.items() if label in ON_FLUX and not small}
    if not small:
        on_both |= {label: {"scale_order": 2} | change for label, change in ON_FLUX_ALONE.items()}
    found += [
        Job(CHOICES, "step_scaled", label, FLUX, 0, change, on_flux) for label, change in on_both.items()
    ]
    return found


def measure(
    cache: CellCache,
    job: Job,
    sizes: plane.PlaneSizes,
    flux_sizes: tiny_flux.FluxSizes,
    scratch_sizes: FromScratch,
) -> dict[str, dict[int, float]]:
    """The curves of a job, on its testbed."""
    if job.part == SCRATCH:
        return measure_from_scratch(cache, job, scratch_sizes)
    if job.data == FLUX:
        return measure_on_flux(cache, job, flux_sizes)
    return measure_on_plane(cache, job, sizes)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, "step_scale", PARTS)
    parser.add_argument("--keep", action="store_true", help="what the cells lack stays as it is recorded")
    args = parser.parse_args(argv)
    sizes, flux_sizes, scratch_sizes = plane.BUDGETED_SIZES, tiny_flux.FluxSizes(), FromScratch()
    budgets, wanted = BUDGETS, jobs(BUDGETS, tuple(DATA), 3, 2, SCRATCH_BUDGET)
    if args.smoke:
        sizes, flux_sizes, budgets = plane.BUDGETED_SMOKE_SIZES, tiny_flux.SMOKE_SIZES, SMOKE_BUDGETS
        scratch_sizes = FromScratch(8, (1, 4))
        wanted = jobs(budgets, ("moons",), 1, 1, 100, small=True)
    work = partial(measure, sizes=sizes, flux_sizes=flux_sizes, scratch_sizes=scratch_sizes)
    results = run_jobs(wanted, work, args)
    cost = {}
    if args.keep:
        before = json.loads(Path(f"{args.out}.json").read_text(encoding="utf-8"))
        cost = {"kept": before.get("kept", before["cost"])}  # of the first: a second report adds nothing
        results = recall(results, before, partial(curves_of, budgets=budgets))
    record = {"notes": NOTES, **run_info(results), **cost, **gather(results, budgets)}
    write_record(record, args.out)
    plot(record, f"{args.out}.png")
    print(text(record))


if __name__ == "__main__":
    main()
