"""What matters:  python -m experiments.studies.ablations --workers 2

One setting changed at a time, around one default, then two at a time. Every run is looked at several times on
its way. About an hour of CPU for plane and grids, 40 minutes for the tiny Flux.

    plane   checkerboard; the share of teacher examples and the EMAs on moons and 8 Gaussians too. The default
            is the paper's recipe: Algorithm 2, decays .99 and .999, k/N .4, a constant learning rate, the
            student itself read out. Sliced-Wasserstein-2 (SW2) against fresh data at 1, 2, 3, 4 and 8 steps,
            raw (scale 1) and dialled
    grids   the decays of both EMAs, and the two settings that mattered most on the plane (by what was just
            measured)
    flux    the tiny Flux of toy/, a LoRA, the carried recipe cut to minutes: the distance to the teacher's
            endpoints, on captions of pairs that no training image shows, at 3, 4 and 8 steps

One seed for each change; the default has three. Every cell is a file under --cache, so a killed run goes on
where it was; in the folder of the study `plane` its teachers are found. Writes
experiments/results/ablations.json, ablations.png, ablations_grids.png and ablations_flux.png.

    --only flux     computes one part, and takes of the others what is there
    --report        computes nothing, writes what the cells that are there give
    --smoke --cache /tmp/cells --out /tmp/ablations      seconds; the numbers mean nothing
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations_with_replacement, product

from experiments.runner import CellCache, Job, make_parser, run_info, run_jobs, write_record
from experiments.studies.ablations_cells import measure_flux_run, measure_flux_teacher, measure_plane_run
from experiments.studies.ablations_report import (
    gather,
    most_sensitive,
    plot_families,
    plot_flux,
    plot_grids,
    text,
)
from experiments.studies.ablations_settings import COARSE, DECAYS, families, flux_families
from experiments.testbeds import plane, tiny_flux
from experiments.testbeds.plane import FEWER
from experiments.testbeds.plane_measures import measure_floor, measure_teacher
from experiments.testbeds.taught_flux import TaughtFlux
from scfm.method.lora_scale import SCALES
from toy.plane import DATA

ABLATED, PARTS = "checkerboard", ("plane", "grids", "flux")


@dataclass(frozen=True)
class PlaneSizes(plane.PlaneSizes):
    """looks: the numbers of training steps after which a run is measured."""

    scales: tuple = (*SCALES[::2], 2.5, 3.0, 4.0)  # students of weak EMAs want more than 2
    floor_pairs: int = 60
    steps: tuple = FEWER
    looks: tuple = (250, 500, 1000, 2000)


@dataclass(frozen=True)
class FluxSizes:
    """captions: judged; dial_captions: on which scales are found; goal_steps: the teacher's; images: that it
    generates.
    """

    steps: tuple = (3, 4, 8)
    looks: tuple = (100, 200)
    updates: int = 200
    batch: int = 16
    images: int = 256
    captions: int = 96
    dial_captions: int = 24
    goal_steps: int = 32
    scales: tuple = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)


Sizes = dict[str, PlaneSizes | FluxSizes]
FULL: Sizes = {"plane": PlaneSizes(), "flux": FluxSizes()}
SMOKE: Sizes = {
    "plane": PlaneSizes(dict.fromkeys(DATA, 2), 8, 8, 32, 4, 4, 4, (0.0, 1.0), floor_pairs=2, looks=(4, 8)),
    "flux": FluxSizes((1, 2), (1, 2), 2, 2, 4, 2, 2, 4, (0.0, 1.0)),
}
METRIC = "sliced-Wasserstein-2; floor: data against data"
NOTES = (
    "Plane: constant learning rate 3e-4, batches of 256, shift 1 to 2, decays not shortened, raw student "
    "read out, unless it says otherwise.",
    "A LoRA has the learning rate 1e-3. t_skip: at equal evaluations, so 4 and 8 have 5/7 and 5/11 of the "
    "training steps; self grids below it are left out.",
    "When stalled: both EMAs are set to the student once its distance to the slow EMA has not grown for "
    "60 training steps.",
    "Most sensitive: the mean over 2, 3, 4 and 8 steps of log(worst / best), dialled, over the values of "
    "the coarse grids; three seeds of the default say what chance does, and a setting below twice that is "
    "not told from it.",
    "Tiny Flux: decays shortened to the training, unless it says otherwise; student and slow EMA are both "
    "measured.",
)


def on_every_set(family: str, label: str) -> bool:
    """Whether a value is tried on all sets of the plane, and not on one alone."""
    return family == "k/N" or (family == "averages" and (label in ("dual", "one EMA") or "stalled" in label))


def first_and_last(changes: dict[str, dict], family: str = "") -> dict[str, dict]:
    """Of a family in a smoke run: the first value and the last that a grid could show."""
    shown = [label for label in changes if label in COARSE.get(family, changes)]
    return {label: changes[label] for label in shown[:: max(1, len(shown) - 1)]}


def jobs(sizes: Sizes, smoke: bool) -> list[Job]:
    """All measurements but those of the grid of two settings, in the order in which they matter."""
    found = [Job("plane", "teacher", "teacher", data, 0) for data in DATA]
    for family, changes in families(sizes["plane"].updates).items():
        values = first_and_last(changes, family) if smoke else changes
        found += [
            Job("plane", family, label, data, 0, change)
            for data in DATA
            for label, change in values.items()
            if data == ABLATED or on_every_set(family, label)
        ]
    found += [Job("plane", "floor", "floor", data, 0) for data in DATA]
    found += [
        Job(
            "grids",
            "fast decay, slow decay",
            f"{fast:g}|{slow:g}",
            ABLATED,
            0,
            {"ema_decay_fast": fast, "ema_decay_slow": slow},
        )
        for fast, slow in combinations_with_replacement(DECAYS, 2)
    ]
    return found + flux_jobs(sizes["flux"].updates, smoke)


def flux_jobs(steps: int, smoke: bool) -> list[Job]:
    found = [Job("flux", "teacher", "teacher", tiny_flux.NAME, 0)]
    for family, changes in flux_families(steps).items():
        if not smoke or family in ("k/N", "rank"):
            values = first_and_last(changes) if smoke else changes
            found += [
                Job("flux", family, label, tiny_flux.NAME, 0, change) for label, change in values.items()
            ]
    return found


def grid_of(pair: Sequence[str]) -> list[Job]:
    """The measurements of two settings together. pair: names of `COARSE`, or () for none."""
    axes = [COARSE[name].items() for name in pair]
    return [
        Job("grids", ", ".join(pair), f"{a}|{b}", ABLATED, 0, first | second)
        for (a, first), (b, second) in (product(*axes) if axes else ())
    ]


def measure(cache: CellCache, job: Job, sizes: Sizes) -> dict:
    """The measurement of a job, on its testbed; all but teachers and floors are runs."""
    if job.part == "flux":
        bed = TaughtFlux(cache, sizes["flux"])
        return measure_flux_teacher(bed, job) if job.family == "teacher" else measure_flux_run(bed, job)
    bed = plane.Plane(cache, sizes["plane"])
    if job.family == "floor":
        return measure_floor(bed, job, bed.sizes.floor_pairs)
    return measure_teacher(bed, job) if job.family == "teacher" else measure_plane_run(bed, job)


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser(__doc__, "ablations", PARTS).parse_args(argv)
    sizes = SMOKE if args.smoke else FULL
    work = partial(measure, sizes=sizes)
    results = run_jobs(jobs(sizes, args.smoke), work, args)
    ranked, pair = most_sensitive(results, COARSE, ABLATED, small=args.smoke)
    results += run_jobs(grid_of(pair), work, args)
    record = {
        "notes": NOTES,
        "protocol": {part: asdict(of_part) for part, of_part in sizes.items()},
        "ablated": ABLATED,
        "sensitivity": ranked,
        "metric": METRIC,
        **run_info(results),
        **gather(results),
    }
    write_record(record, args.out)
    for kind, plot in (("", plot_families), ("_grids", plot_grids), ("_flux", plot_flux)):
        plot(record, f"{args.out}{kind}.png")
    print(text(record))


if __name__ == "__main__":
    main()
