"""The room that the method leaves:  python bench/variants.py --workers 2

SCFM with damped speakers (strength .5, k/N .2) on its dial, one thing changed at a time, on the plane's three sets and on the tiny Flux
of toy/, one seed, at the medium budget of bench/compare.py; in its folder of cells the base is found.

    training    self grids, k/N, the strength of the speakers, the shift range (where in t the rows are spent), the length of the jumps
                (t_skip), the loss, one EMA
    read-out    the student or the fast EMA instead of the slow one
    dial        `free`: a scale for each step count, each chosen alone; `two scales`: one for the first step, at t = 1, and one for the rest

Judged at 2, 3, 4 and 8 steps against the base: the quality (sliced-Wasserstein-2; Frechet on the tiny Flux) and the distance to the teacher's own
endpoints. A variant counts when that distance falls on the plane *and* on the tiny Flux, by a tenth or more of its geometric mean, and no quality rises by as much.
Every cell is a file under --cache, so a killed run goes on where it was. Writes bench/results/variants.json and variants.png.

    python bench/variants.py --only plane    or "tiny Flux": computes one part, and takes of the other what is there
    python bench/variants.py --report        computes nothing, writes what the cells that are there give
    python bench/variants.py --smoke --cache /tmp/cells --out /tmp/variants      seconds, one set; the numbers mean nothing
"""
from functools import partial

import compare
import compare_flux
from cells import about, parser_of, run_all, write
from compare_cells import plan
from plane_cells import do
from toy.plane import DATA
from variant_cells import JUDGED, measure_on_flux, measure_on_plane
from variant_report import gathered, plot, text

BASE, BUDGET = compare.SCFM["SCFM, damped"], "medium"
VARIANTS = {
    "base": {},
    "self grids 2, 4, 8": {"self_grids": (2, 4, 8)}, "self grids 4, 8, 16": {"self_grids": (4, 8, 16)},
    "k/N .1": {"teacher_share": .1}, "k/N .4": {"teacher_share": .4},
    "speakers at .25": {"speaker_scale": .25}, "speakers at .75": {"speaker_scale": .75},
    "shift a half less": "lower", "shift a half more": "higher",
    "jumps of 4": {"t_skip": 4, "self_grids": (4, 8, 16)}, "Huber": {"loss": "huber"}, "one EMA": {"algorithm": "one_ema"},
    "student read out": {"read_out": "student"}, "fast EMA read out": {"read_out": "fast"},
    "free": {"dial": "free"}, "two scales": {"dial": "two scales"}}
SHIFTS = {"lower": .5, "higher": 1.5}                        # times the usual range, which is another on the tiny Flux
NOTES = ("One seed, one budget; what a dial of two scales costs to find is not taken from its budget (the square of the scales that are tried).",
         "Jumps of 4: three evaluations more a row, so fewer updates of the same budget.")


def changes(usual, label):
    """What a variant changes of `settings`, the base's change included. usual: the shift range of the world."""
    told = VARIANTS[label]
    return BASE | ({"shift": tuple(SHIFTS[told] * end for end in usual)} if isinstance(told, str) else told)


def job_of(label, part, data, protocol, flux, budgets):
    """The job of a variant in a world. budgets: (evaluations on the plane, on the tiny Flux)."""
    on_plane = part == "plane"
    change = changes((1., 2.) if on_plane else compare_flux.SHIFT, label)
    budget = budgets[0 if on_plane else 1]
    updates = plan(protocol, "scfm", budget)[0] if on_plane else compare_flux.plan(flux, "scfm", budget)[0]
    row, more = 5 if on_plane else 4, change.get("t_skip", 2) - 2              # evaluations of a usual row, and what longer jumps add
    return compare.Job(part, "scfm", label, data, 0, {"updates": max(1, updates * row // (row + more)), **change}, budget)


def jobs(protocol, flux, budgets, sets, labels):
    return [job_of(label, part, data, protocol, flux, budgets) for label in labels
            for part, data in [*(("plane", data) for data in sets), (compare_flux.NAME, compare_flux.NAME)]]


def in_its_world(cache, protocol, job, flux):
    """The measurement of a job: on the plane, or on the tiny Flux with a protocol of its own."""
    return measure_on_plane(cache, protocol, job) if job.part == "plane" else measure_on_flux(cache, flux, job)


def main():
    args = parser_of(__doc__, "variants", list(compare.PARTS)).parse_args()
    protocol, flux = (compare.TINY, compare.TINY_FLUX) if args.smoke else (compare.FULL, compare_flux.FluxProtocol())
    budgets = compare.SMOKE_BUDGETS["small"] if args.smoke else compare.BUDGETS[BUDGET]
    sets, labels = (["moons"], ("base", "jumps of 4", "free")) if args.smoke else (list(DATA), list(VARIANTS))
    work = partial(do, folder=args.cache, protocol=protocol, parts=[] if args.report else args.only,
                   measures={"scfm": partial(in_its_world, flux=flux)})
    done = run_all(work, jobs(protocol, flux, budgets, sets, labels), args.workers)
    record = {"notes": NOTES, "base": BASE, "budget": {"plane": budgets[0], compare_flux.NAME: budgets[1]}, **about(done), **gathered(done)}
    write(record, args.out)
    if any(record["ratios"].values()):
        plot(record, f"{args.out}.png")
    print(text(record))


if __name__ == "__main__":
    main()
