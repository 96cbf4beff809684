"""Few-step methods from one teacher at equal cost:  python bench/compare.py --workers 2

Checkerboard, moons and 8 Gaussians, three seeds, the teachers of bench/plane.py; sliced-Wasserstein-2 (SW2) against fresh data at
1, 2, 3, 4, 8, 16 and 32 network evaluations, and the distance to the teacher's own endpoints from the same noises (coupling):

    free      the teacher by Euler, midpoint, Heun and DPM-Solver++(2M)
    trained   Reflow, progressive, consistency, Shortcut, MeanFlow (scfm/baselines.py), and SCFM: both algorithms, the self
              grid of 2 alone, damped models with k/N .2, and `step_lora`, what bench/variants.py found; each raw, on its dial, and with a strength for each step
              (`stepwise`, scfm.method.scale_schedule), whose search costs no more than the dial's

and the tiny Flux of toy/, one seed: the same by a LoRA of rank 16, judged by the Frechet distance on the features of toy/reader.py
(not FID), its accuracy in reading what the caption names, and the coupling. Shortcut and MeanFlow are missing there: they need a
new input, which no LoRA on the existing layers can be.

Each method gets the same budget of network evaluations for training, pairs and the dial's search included: on the plane small is
what 10,000 pairs of 32 steps cost, on the tiny Flux 750 pairs; medium is 3 times that, large 10 (tiny Flux: 6) times. Reflow spends half of
any budget on pairs. One learning rate, EMA decays shortened alike, read out from the slow EMA.

Every cell is a file under --cache, so a killed run goes on where it was; in the folder of bench/plane.py its teachers are found.
Writes bench/results/compare.json, compare.png and compare_summary.png.

    python bench/compare.py --only plane    or "tiny Flux": computes one part, and takes of the other what is there
    python bench/compare.py --quick         one seed; its cells serve a full run too
    python bench/compare.py --report        computes nothing, writes what the cells that are there give
    python bench/compare.py --smoke --cache /tmp/cells --out /tmp/compare      seconds, one set; the numbers mean nothing
"""
from functools import partial
from typing import NamedTuple

import compare_flux
from cells import about, parser_of, run_all, write
from compare_cells import ALL, PAIR_STEPS, plan
from compare_front import weighed
from compare_report import gathered, plot, plot_summary, summary, text
from plane import SMOKE, Protocol
from plane_cells import do
from scfm.method.lora_scale import SCALES
from toy.plane import DATA

SMALL, SMALL_FLUX = 10_000 * PAIR_STEPS, 750 * PAIR_STEPS
BUDGETS = {"small": (SMALL, SMALL_FLUX), "medium": (3 * SMALL, 3 * SMALL_FLUX), "large": (10 * SMALL, 6 * SMALL_FLUX)}   # plane, tiny Flux
SMOKE_BUDGETS = {"small": (500, 200), "medium": (600, 0), "large": (700, 0)}        # 0: nothing is trained on the tiny Flux
FULL = Protocol(dial_noises=128, scales=SCALES[::2])         # the search counts, so it is kept small
TINY = SMOKE._replace(dial_noises=2)
TINY_FLUX = compare_flux.FluxProtocol(batch=2, drawings=8, judged=2, dial_noises=1)
BASELINES = {"Reflow": "reflow", "progressive": "progressive", "consistency": "consistency", "Shortcut": "shortcut",
             "MeanFlow": "meanflow"}
SCFM = {"SCFM, Algorithm 2": {}, "SCFM, Algorithm 1": {"algorithm": "one_ema"}, "SCFM, self grid 2": {"self_grids": (2,)},
        "SCFM, damped": {"ema_target_scale": .5, "teacher_ratio": .2},
        "SCFM, tuned": {"ema_target_scale": .5, "teacher_ratio": .1, "self_grids": (4, 8, 16), "shift": (1., 3.)}}         # by bench/variants.py
ON_FLUX = {"SCFM, Algorithm 2": {}, "SCFM, damped": {}, "SCFM, tuned": {"shift": (2., 6.)}}              # what differs there: it samples at shift 3
NEED_A_STEP = ("shortcut", "meanflow")
METRIC = "plane: sliced-Wasserstein-2; floor: data against data; spread: standard deviation over seeds"
NOTES = ("One learning rate and one schedule for all methods; EMA decays shortened to the updates; slow EMA read out.",
         "Chosen by trials on the checkerboard, 600,000 evaluations: three features of the step size; MeanFlow's weight.",
         "In SCFM's favour: its damped recipe (models .5, k/N .2) was chosen by ablations on the checkerboard, seed 0, with the same samples "
         "that judge here; the learning rates are those of our SCFM runs (plane 3e-4, tiny Flux 1e-3), and the rivals' were not searched.",
         "SCFM alone is read on a dial, a strength for each step count, whose criterion is the coupling itself, on other noises.",
         "Tiny Flux: Frechet distances of few images are mostly their floor; one seed; accuracy and coupling stand in the record beside them.",
         "SCFM with a strength for each step (`stepwise`) was thought of after seed 0 had been seen and before seeds 1 and 2 had; its search takes 79,488 to "
         "85,344 evaluations (12 counted), the dial's 92,416, in whose place it stands. Up to 8 steps: pairs share one at 8. Beyond 8 steps it had at first the best of five strengths from 0 to 2, "
         "which was far off at 16; a parabola through the same five, one strength for the whole walk, took its place after all seeds had been seen.",
         "SCFM, tuned, puts together what bench/variants.py found on seed 0 at the medium budget, all three sets; seeds 1 and 2 had no say.",
         "SCFM's raw curves stand at the budget that includes the search for the dial, which they do not need.",
         "Progressive: `own stage` walks n steps with the network of the smallest stage with at least n; the teacher beyond 16.")


PARTS = {"plane": "main", compare_flux.NAME: compare_flux.NAME}           # as one says it: as plane_cells does


class Job(NamedTuple):
    """One measurement. part: of the bench; family: the method; budget: evaluations, 0 where nothing is trained; change: of SCFM's `settings`."""
    part: str
    family: str
    label: str
    data: str
    seed: int
    change: dict
    budget: int


def jobs(protocol, budgets, sets):
    """All measurements, in the order in which they matter: seed 0 at the small budget first."""
    found = [Job("main", "floor", "floor", data, 0, {}, 0) for data in sets] + [Job(compare_flux.NAME, "floor", "floor", compare_flux.NAME, 0, {}, 0)]
    found.append(Job(compare_flux.NAME, "teacher", "teacher", compare_flux.NAME, 0, {}, 0))
    for seed in range(protocol.seeds):
        found += [Job("main", family, "teacher", data, seed, {}, 0) for data in sets for family in ("teacher", "multistep")]
        for small, flux in budgets.values():
            for data in sets:
                found += [Job("main", family, label, data, seed, {}, small) for label, family in BASELINES.items()]
                updates = plan(protocol, "scfm", small)[0]
                found += [Job("main", "scfm", label, data, seed, {"updates": updates, **change}, small)
                          for label, change in SCFM.items()]
            if seed == 0 and flux:
                found += [Job(compare_flux.NAME, family, label, compare_flux.NAME, 0, change, flux)
                          for label, (family, change) in trained_on_flux().items()]
    return found


def trained_on_flux():
    """{label: (method, change)} of what can be a LoRA."""
    plain = {label: (family, {}) for label, family in BASELINES.items() if family not in NEED_A_STEP}
    return plain | {label: ("scfm", SCFM[label] | change) for label, change in ON_FLUX.items()}


def on_its_set(cache, protocol, job, flux):
    """The measurement of a job: on the plane, or on the tiny Flux with a protocol of its own."""
    if job.data == compare_flux.NAME:
        return compare_flux.MEASURES[job.family](cache, flux, job)
    return ALL[job.family](cache, protocol, job)


def main():
    parser = parser_of(__doc__, "compare", list(PARTS))
    parser.add_argument("--quick", action="store_true", help="one seed")
    args = parser.parse_args()
    protocol = TINY if args.smoke else FULL._replace(seeds=1) if args.quick else FULL
    budgets, sets = (SMOKE_BUDGETS, ["moons"]) if args.smoke else (BUDGETS, list(DATA))
    flux = TINY_FLUX if args.smoke else compare_flux.FluxProtocol()
    work = partial(do, folder=args.cache, protocol=protocol, parts=[] if args.report else [PARTS[name] for name in args.only],
                   measures=dict.fromkeys((*ALL, *compare_flux.MEASURES), partial(on_its_set, flux=flux)))
    done = run_all(work, jobs(protocol, budgets, sets), args.workers)
    record = {"notes": NOTES, "protocol": {**protocol._asdict(), "flux": flux._asdict()}, "metric": METRIC, **about(done),
              **gathered(done, protocol, flux, budgets)}
    stands, said = weighed(record)
    write(record | stands, args.out)
    if record["free"]:
        plot(record, f"{args.out}.png")
        plot_summary(record, f"{args.out}_summary.png")
    print(text(record))
    print(summary(record), said, sep="\n\n")


if __name__ == "__main__":
    main()
