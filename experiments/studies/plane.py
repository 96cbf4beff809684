"""The evidence on the plane, about 34 CPU minutes:  python -m experiments.studies.plane --workers 2

Checkerboard, moons and 8 Gaussians; sliced-Wasserstein-2 (SW2) against fresh data at 1 to 32 network
evaluations:

    teacher   an MLP trained by flow matching, sampled by Euler, midpoint and Heun
    paper     its student by the paper's recipe (Algorithm 2): raw (scale 1), and dialled
    damped    the same with ema_target_scale .5: raw, and dialled; and this again with k/N .2
    ablations one thing changed at a time, on the checkerboard, seed 0, with fewer training steps

Dialled: the scale for each step count is chosen without data, by endpoints, on noises that the evaluation
never sees. Every cell (a training, a measurement) is a file under --cache, so a killed run goes on where it
was. Writes experiments/results/plane.json, plane.png and plane_ablations.png.

    --quick           computes one seed, no ablations; its cells serve a full run too
    --only ablations  computes one part; of the other it takes the cells that are there
    --report          computes nothing, writes what the cells that are there give
    --smoke --cache /tmp/cells --out /tmp/plane     seconds; the numbers mean nothing
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from experiments.runner import CellCache, Job, make_parser, run_info, run_jobs, write_record
from experiments.studies.plane_cells import measure_choosers, measure_teacher_shift
from experiments.studies.plane_report import gather, plot, plot_ablations, table, targets
from experiments.testbeds.plane import FEWER, SMOKE_SIZES, Plane, PlaneSizes
from experiments.testbeds.plane_measures import measure_floor, measure_student, measure_teacher
from toy.plane import DATA

RECIPES = {
    "damped": {"ema_target_scale": 0.5},
    "paper": {},
    "damped, k/N .2": {"ema_target_scale": 0.5, "teacher_ratio": 0.2},
}
ABLATED = "checkerboard"  # the set of the ablations
PARTS = ("main", "ablations")
METRIC = "sliced-Wasserstein-2; floor: data against data; spread: standard deviation over seeds"
NOTES = (
    "Kept small for a slow machine: 2000 training steps of a student, 14000 of the checkerboard's "
    "teacher, 5000 of the others.",
    "EMA decays: the paper's, shortened to the training (scfm.method.ema.shorten). Students are read out "
    "from the slow EMA.",
    "Ablations: one set, one seed, 1000 training steps unless the label says otherwise, up to 8 steps, "
    "one thing changed.",
    "The recipe with k/N .2 was added after k/N .4 had missed two aims, by the ablations (checkerboard, "
    "seed 0).",
    "A target is met at or below 1.05 times the rival, or below the upper end of the noise band of one "
    "pair of samples.",
    "All curves of one set and seed share noises and reference; Heun was measured up to 8 evaluations only.",
)


@dataclass(frozen=True)
class Sizes(PlaneSizes):
    """seeds: of each recipe; ablation_updates: training steps of an ablation; floor_pairs: of data against
    data.
    """

    seeds: int = 3
    ablation_updates: int = 1000
    floor_pairs: int = 60


SMOKE = Sizes(**vars(SMOKE_SIZES), seeds=1, ablation_updates=2, floor_pairs=4)


def jobs(sizes: Sizes) -> list[Job]:
    """In the order in which they matter: seed 0, further seeds, ablations, the paper's further seeds."""
    measured = [("teacher", "teacher"), *(("recipe", name) for name in RECIPES)]
    main = [
        Job("main", family, label, data, seed, RECIPES.get(label, {}))
        for seed in range(sizes.seeds)
        for data in DATA
        for family, label in measured
    ]
    main += [Job("main", "floor", "floor", data, 0) for data in DATA]
    late = [job for job in main if job.label == "paper" and job.seed > 0]
    return [job for job in main if job not in late] + ablation_jobs(sizes) + late


def ablation_jobs(sizes: Sizes) -> list[Job]:
    """One thing changed of the paper's recipe; ways to choose the scale; the teacher's own shift."""
    found = [
        Job("ablations", family, label, ABLATED, 0, {"max_train_steps": sizes.ablation_updates} | change)
        for family, changes in ablations(sizes.ablation_updates).items()
        for label, change in changes.items()
    ]
    found += [
        Job("ablations", "choosers", "damped", data, seed, RECIPES["damped"])
        for seed in range(sizes.seeds)
        for data in DATA
    ]
    return found + [Job("ablations", "teacher shift", "teacher", data, 0) for data in DATA]


def ablations(steps: int) -> dict[str, dict[str, dict]]:
    """family -> label -> what is changed of the paper's recipe. steps: of training."""
    damped, lengths = RECIPES["damped"], [max(1, int(steps * share)) for share in (0.25, 0.5, 1, 2)]
    restarted = {"restart_every": max(1, 3 * steps // 10)}  # none falls on the end, where the EMA is read
    return {
        "EMA scale": {f"{s:g}": {"ema_target_scale": s} for s in (0.15, 0.25, 0.5, 0.7, 1.0)},
        "k/N": {f"{k:g}": {"teacher_ratio": k} for k in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)},
        "self grids": {", ".join(map(str, g)): {"self_grids": g} for g in ((2,), (2, 4), (2, 4, 8, 16))},
        "EMA": {
            "one EMA": {"algorithm": "one_ema"},
            "dual": {},
            "dual + restart": restarted,
            "one EMA, damped": damped | {"algorithm": "one_ema"},
        },
        "loss": {"velocity": {}, "sample space": {"sample_space": True}},
        "read-out": {name: {"read_out": name} for name in ("student", "ema_fast", "ema_slow")},
        "data": {"1 point": {"few": 1}, "10 points": {"few": 10}, "all": {}},
        "shift": {
            "1": {"shift": (1.0, 1.0)},
            "1 to 2": {},
            "2.5 to 4.5": {"shift": (2.5, 4.5)},
            "2.5 to 4.5, sampled at 3": {"shift": (2.5, 4.5), "sampling_shift": 3.0},
        },
        "updates": {str(n): {"max_train_steps": n} for n in lengths},
        "updates, damped": {str(n): damped | {"max_train_steps": n} for n in lengths},
        "k/N, damped": {f"{k:g}": damped | {"teacher_ratio": k} for k in (0.0, 0.2, 0.4, 0.8)},
    }


def measure(cache: CellCache, job: Job, sizes: Sizes) -> dict:
    """The measurement of a job, by its family; all but those named here are students."""
    bed = Plane(cache, sizes)
    named = {
        "teacher": measure_teacher,
        "floor": partial(measure_floor, pairs=sizes.floor_pairs),
        "choosers": measure_choosers,
        "teacher shift": measure_teacher_shift,
    }
    student = partial(measure_student, steps=() if job.part == "main" else FEWER)
    return named.get(job.family, student)(bed, job)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, "plane", PARTS)
    parser.add_argument("--quick", action="store_true", help="one seed, no ablations")
    args = parser.parse_args(argv)
    sizes = SMOKE if args.smoke else Sizes()
    if args.quick:
        sizes, args.only = replace(sizes, seeds=1), ["main"]
    results = run_jobs(jobs(sizes), partial(measure, sizes=sizes), args)
    protocol = asdict(sizes) | {"ablated": ABLATED, "ablation_steps": FEWER, "ablation_seeds": [0]}
    record = {"notes": NOTES, "protocol": protocol, "metric": METRIC, **run_info(results), **gather(results)}
    record["targets"] = targets(record)
    write_record(record, args.out)
    if record["main"]:
        plot(record, f"{args.out}.png")
    if record["ablations"]:
        plot_ablations(record, f"{args.out}_ablations.png")
    print(table(record))


if __name__ == "__main__":
    main()
