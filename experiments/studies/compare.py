"""Few-step methods from one teacher at equal cost:  python -m experiments.studies.compare --workers 2

Checkerboard, moons and 8 Gaussians, three seeds, the teachers of the study `plane`; sliced-Wasserstein-2
(SW2) against fresh data at 1, 2, 3, 4, 8, 16 and 32 network evaluations, and the distance to the teacher's
own endpoints from the same noises (coupling):

    free      the teacher by Euler, midpoint, Heun and DPM-Solver++(2M)
    trained   Reflow, progressive, consistency, Shortcut, MeanFlow (scfm.method.baselines), and SCFM: both
              algorithms, the self grid of 2 alone, damped models with k/N .2, and `tuned`, what the study
              `variants` found; each raw, on its dial, and with a scale for each step (`stepwise`,
              scfm.method.scale_schedule), whose search costs no more than the dial's

and the tiny Flux of toy/, one seed: the same by a LoRA of rank 16, judged by the Frechet distance on the
features of toy/reader.py (not FID), its accuracy in reading what the caption names, and the coupling.
Shortcut and MeanFlow are missing there: they need a new input, which no LoRA on the existing layers can be.

Each method gets the same budget of network evaluations for training, pairs and the dial's search included: on
the plane small is what 10,000 pairs of 32 steps cost, on the tiny Flux 750 pairs; medium is 3 times that,
large 10 (tiny Flux: 6) times. Reflow spends half of any budget on pairs. One learning rate, EMA decays
shortened alike, read out from the slow EMA.

Every cell is a file under --cache, so a killed run goes on where it was; in the folder of the study `plane`
its teachers are found. Writes experiments/results/compare.json, compare.png and compare_summary.png.

    --only plane    or "tiny Flux": computes one part, and takes of the other what is there
    --quick         one seed; its cells serve a full run too
    --report        computes nothing, writes what the cells that are there give
    --smoke --cache /tmp/cells --out /tmp/compare      seconds, one set; the numbers mean nothing
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial

from experiments.recipes import BUDGETS, SCFM, SCFM_ON_FLUX, SMOKE_BUDGETS
from experiments.runner import CellCache, Job, make_parser, run_info, run_jobs, write_record
from experiments.studies import compare_flux, compare_plane
from experiments.studies.compare_front import text as front_text
from experiments.studies.compare_front import weigh
from experiments.studies.compare_plane import Sizes
from experiments.studies.compare_report import gather, plot, plot_summary, summary, text
from experiments.testbeds import plane, tiny_flux
from experiments.testbeds.tiny_flux import FluxSizes
from toy.plane import DATA

FLUX = tiny_flux.NAME
PARTS = ("plane", FLUX)
FULL = Sizes(**vars(plane.BUDGETED_SIZES))
SMOKE = Sizes(**vars(plane.BUDGETED_SMOKE_SIZES), seeds=1, floor_pairs=4)
BASELINES = {
    "Reflow": "reflow",
    "progressive": "progressive",
    "consistency": "consistency",
    "Shortcut": "shortcut",
    "MeanFlow": "meanflow",
}
NEED_A_STEP = ("shortcut", "meanflow")
METRIC = "plane: sliced-Wasserstein-2; floor: data against data; spread: standard deviation over seeds"
NOTES = (
    "One learning rate and one schedule for all methods; EMA decays shortened to the training; slow EMA "
    "read out.",
    "Chosen by trials on the checkerboard, 600,000 evaluations: three features of the step size; "
    "MeanFlow's weight.",
    "In SCFM's favour: its damped recipe (models .5, k/N .2) was chosen by ablations on the checkerboard, "
    "seed 0, with the same samples that judge here; the learning rates are those of our SCFM runs (plane "
    "3e-4, tiny Flux 1e-3), and the rivals' were not searched.",
    "SCFM alone is read on a dial, a scale for each step count, whose criterion is the coupling itself, "
    "on other noises.",
    "Tiny Flux: Frechet distances of few images are mostly their floor; one seed; accuracy and coupling "
    "stand in the record beside them.",
    "SCFM with a scale for each step (`stepwise`) was thought of after seed 0 had been seen and before "
    "seeds 1 and 2 had; its search takes 79,488 to 85,344 evaluations (12 counted), the dial's 92,416, in "
    "whose place it stands. Up to 8 steps: pairs share one at 8. Beyond 8 steps it had at first the best "
    "of five scales from 0 to 2, which was far off at 16; a parabola through the same five, one scale for "
    "the whole walk, took its place after all seeds had been seen.",
    "SCFM, tuned, puts together what the study `variants` found on seed 0 at the medium budget, all three "
    "sets; seeds 1 and 2 had no say.",
    "SCFM's raw curves stand at the budget that includes the search for the dial, which they do not need.",
    "Progressive: `own stage` takes n steps with the network of the smallest stage with at least n; the "
    "teacher beyond 16.",
)


def jobs(sizes: Sizes, budgets: dict[str, tuple[int, int]], sets: Sequence[str]) -> list[Job]:
    """All measurements, in the order in which they matter: seed 0 at the small budget first."""
    found = [Job("plane", "floor", "floor", data, 0) for data in sets]
    found += [Job(FLUX, family, family, FLUX, 0) for family in ("floor", "teacher")]
    for seed in range(sizes.seeds):
        found += [
            Job("plane", family, "teacher", data, seed)
            for data in sets
            for family in ("teacher", "multistep")
        ]
        for on_plane, on_flux in budgets.values():
            found += [job for data in sets for job in trained_on_plane(sizes, data, seed, on_plane)]
            if seed == 0 and on_flux:
                found += [
                    Job(FLUX, family, label, FLUX, 0, change, on_flux)
                    for label, (family, change) in trained_on_flux().items()
                ]
    return found


def trained_on_plane(sizes: Sizes, data: str, seed: int, budget: int) -> list[Job]:
    steps = plane.plan(sizes, "scfm", budget)[0]
    return [
        *(Job("plane", family, label, data, seed, {}, budget) for label, family in BASELINES.items()),
        *(
            Job("plane", "scfm", label, data, seed, {"max_train_steps": steps, **change}, budget)
            for label, change in SCFM.items()
        ),
    ]


def trained_on_flux() -> dict[str, tuple[str, dict]]:
    """{label: (method, change)} of what can be a LoRA."""
    plain = {label: (family, {}) for label, family in BASELINES.items() if family not in NEED_A_STEP}
    return plain | {label: ("scfm", SCFM[label] | change) for label, change in SCFM_ON_FLUX.items()}


def measure(cache: CellCache, job: Job, sizes: Sizes, flux_sizes: FluxSizes) -> dict:
    """The measurement of a job, on its testbed."""
    if job.part == FLUX:
        return compare_flux.measure(cache, job, flux_sizes)
    return compare_plane.measure(cache, job, sizes)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, "compare", PARTS)
    parser.add_argument("--quick", action="store_true", help="one seed")
    args = parser.parse_args(argv)
    sizes, flux_sizes, budgets, sets = FULL, FluxSizes(), BUDGETS, tuple(DATA)
    if args.smoke:
        sizes, flux_sizes, budgets, sets = SMOKE, tiny_flux.SMOKE_SIZES, SMOKE_BUDGETS, ("moons",)
    if args.quick:
        sizes = replace(sizes, seeds=1)
    work = partial(measure, sizes=sizes, flux_sizes=flux_sizes)
    results = run_jobs(jobs(sizes, budgets, sets), work, args)
    record = {
        "notes": NOTES,
        "protocol": {**asdict(sizes), "flux": asdict(flux_sizes)},
        "metric": METRIC,
        **run_info(results),
        **gather(results, sizes, flux_sizes, budgets),
    }
    record |= weigh(record)
    write_record(record, args.out)
    if record["free"]:
        plot(record, f"{args.out}.png")
        plot_summary(record, f"{args.out}_summary.png")
    print(text(record), summary(record), front_text(record), sep="\n\n")


if __name__ == "__main__":
    main()
