"""The same care for all: learning rate and EMA memory of each method, searched:

    python -m experiments.studies.rates --workers 2

The study `compare` gives all methods one learning rate and one rule for their EMAs, which were chosen for
SCFM. Here each method of the plane, and the scale trained in as the step size, gets its own, at the medium
budget:

    search      seed 0: the learning rate a third and three times, the memory of the EMAs a quarter and four
                times, one changed at a time, three sets. A method's own is the setting with the lowest
                geometric mean of SW2 over the sets and step counts, or what it has.
    held out    seeds 1 and 2, which had no say: each method as it is in `compare`, and with its own

Every cell is a file under --cache. Writes experiments/results/rates.json and rates.png.

    --only search    or "held out", for which the search's cells are taken as they are there
    --report         computes nothing, writes what the cells that are there give
    --smoke --cache /tmp/cells --out /tmp/rates      seconds, one set; the numbers mean nothing
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from experiments.recipes import BUDGETS, SCFM, SMOKE_BUDGETS
from experiments.runner import CellCache, Job, Result, make_parser, run_info, run_jobs, write_record
from experiments.studies import compare_plane
from experiments.studies.compare import BASELINES, FULL, SMOKE
from experiments.studies.compare_plane import Sizes
from experiments.studies.rates_report import AS_IT_IS, best_settings, gather, places, plot, text
from experiments.studies.step_scale_cells import measure_on_plane
from experiments.testbeds import plane
from toy.plane import DATA

SEARCH, HELD_OUT = "search", "held out"
LEARNING_RATE, MEMORY = 3e-4, "ema_memory"
SETTINGS: dict[str, dict[str, Any]] = {
    AS_IT_IS: {},
    "learning rate / 3": {"learning_rate": LEARNING_RATE / 3},
    "learning rate x 3": {"learning_rate": LEARNING_RATE * 3},
    "EMA memory / 4": {MEMORY: 0.25},
    "EMA memory x 4": {MEMORY: 4},
}
TUNED, TRAINED_IN = "SCFM, tuned", "scale trained in"
METHODS = {**BASELINES, TUNED: "scfm", TRAINED_IN: "step_scaled"}
NOTES = (
    "Plane, medium budget of the study compare: 960,000 network evaluations; sliced-Wasserstein-2 to fresh "
    "data at 1, 2, 3, 4, 8, 16 and 32 steps.",
    "Progressive with the network of each stage; consistency re-noised; SCFM with a scale for each step.",
    "One setting at a time: a rate and a memory changed together were not tried.",
)


def job(part: str, label: str, setting: str, data: str, seed: int, budget: int, sizes: Sizes) -> Job:
    """A method with a setting, whose name stands behind its label."""
    change, family = dict(SETTINGS[setting]), METHODS[label]
    if family == "scfm":
        change = {**SCFM[label], "max_train_steps": plane.plan(sizes, "scfm", budget)[0], **change}
    return Job(part, family, f"{label}: {setting}", data, seed, change, budget)


def search_jobs(sizes: Sizes, sets: Sequence[str], budget: int) -> list[Job]:
    """Each method with each setting, seed 0."""
    of_setting = partial(job, SEARCH, seed=0, budget=budget, sizes=sizes)
    return [of_setting(label, setting, data) for setting in SETTINGS for label in METHODS for data in sets]


def held_out_jobs(sizes: Sizes, sets: Sequence[str], budget: int, own: dict[str, str]) -> list[Job]:
    """Each method as it is and with its own setting, seeds 1 and 2. own: {label: setting}."""
    of_seed = partial(job, HELD_OUT, budget=budget, sizes=sizes)
    return [
        of_seed(label, setting, data, seed)
        for seed in (1, 2)
        for label in METHODS
        for setting in dict.fromkeys((AS_IT_IS, own[label]))
        for data in sets
    ]


def measure(cache: CellCache, job: Job, sizes: Sizes) -> dict[str, dict[int, float]]:
    """{"sw2": {steps: number}} of the curve that stands for the method."""
    if job.family == "step_scaled":
        return {"sw2": measure_on_plane(cache, job, sizes)["sw2"]}
    curves = compare_plane.measure(cache, job, sizes)
    preferred = ("stepwise", "own stage", "re-noised", "raw")
    return {"sw2": curves[next(name for name in preferred if name in curves)]}


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser(__doc__, "rates", (SEARCH, HELD_OUT)).parse_args(argv)
    sizes, budget, sets = FULL, BUDGETS["medium"][0], tuple(DATA)
    if args.smoke:
        sizes, budget, sets = SMOKE, SMOKE_BUDGETS["medium"][0], ("moons",)
    work = partial(measure, sizes=sizes)
    searched: list[Result] = run_jobs(search_jobs(sizes, sets, budget), work, args)
    own = best_settings(searched, tuple(METHODS))
    results = searched + run_jobs(held_out_jobs(sizes, sets, budget, own), work, args)
    record = {"notes": NOTES, "own": own, **run_info(results), **gather(results, own)}
    record["places"] = places(record, TRAINED_IN)
    write_record(record, args.out)
    plot(record, f"{args.out}.png")
    print(text(record))


if __name__ == "__main__":
    main()
