"""How few images are enough:  python bench/few_shot.py --workers 2

Students of 1, 3, 10, 30, 100 and all images, five random subsets of each size, by two trainings with as many updates:

    SCFM         the method; the images only say where the network is asked
    fine-tuning  plain flow matching on the same images (target noise - data): same weights or LoRA, optimizer, averages

plane   checkerboard, moons and 8 Gaussians, all weights, from the teachers of bench/plane.py (seed 0); SCFM raw (scale 1)
        and dialled; `all` is fresh data without end
flux    the tiny Flux of toy/, a LoRA by the carried one's recipe; SCFM raw (strength 1) and dialled; `all` are the 256 captions of toy/weights/prompts.txt as the teacher generates them; judged on captions drawn
        on their own, of colour-shape pairs that the teacher was trained on, and of pairs that it never saw

Judged at 3, 4, 8 and 32 steps; the metrics stand in few_shot_report.METRICS, each in one line. Intervals are 95 %, over
subsets; a subset brings its own seed of training. Every cell is a file under --cache, so a killed run goes on where it was;
in the folder of bench/plane.py the plane's teachers are found. Writes bench/results/few_shot.json, few_shot_plane.png,
few_shot_flux.png and few_shot_summary.png.

    python bench/few_shot.py --only flux     computes one part; of the other it takes the cells that are there
    python bench/few_shot.py --report        computes nothing, writes what the cells that are there give
    python bench/few_shot.py --smoke --cache /tmp/cells --out /tmp/few_shot      seconds; the numbers mean nothing
"""
from functools import partial
from typing import NamedTuple

import few_shot_flux
import few_shot_plane
from cells import about, parser_of, run_all, write
from few_shot_flux import FluxProtocol
from few_shot_plane import PlaneProtocol
from few_shot_report import METRICS, gather, judged, plot, plot_summary, table
from plane_cells import do
from toy.plane import DATA

TUNING = {"non_shortcut_ratio": 1.}                                  # every row's target is noise - data: fine-tuning
TRAININGS = {"scfm": {}, "tuned": TUNING}
NOTES = ("Pooled t intervals of few against all: the runs with all images are taken to vary as those with few do.",
         "Subsets are drawn apart and may share images; at 100 of 256 they do, and their intervals are a little too narrow.",
         "All are judged on the same captions, noises or data: the intervals do not cover another choice of these.",
         "Read out: the slow EMA. Times of fine-tuning: drawn evenly and shifted as in SCFM's rows.",
         "Three words. As good: the whole interval lies below a margin that was fixed before the runs (5 % of what all give for sw2 and endpoint, .05 of "
         "coverage and spread, .01 of accuracy). Lost: Holm's procedure over the tests of a size, 2.5 % for all together. Otherwise: cannot tell.",
         "Each student has a dial of its own, found without images.",
         "Both: fewer updates than bench/plane.py and the carried LoRA have.")


class Protocol(NamedTuple):
    """sizes: below all; subsets: of each; wholes: runs with all images, by part; sets: of the plane."""
    sizes: tuple = (1, 3, 10, 30, 100)
    subsets: int = 5
    wholes: dict = {"plane": 3, "flux": 3}
    sets: tuple = tuple(DATA)
    plane: PlaneProtocol = PlaneProtocol()
    flux: FluxProtocol = FluxProtocol()


SMOKE = Protocol((1,), 2, {"plane": 1, "flux": 1}, ("moons",),
                 PlaneProtocol((3, 8), dict.fromkeys(DATA, 2), 2, 8, 64, 8, 8, 4, (0., 1.)),
                 FluxProtocol((3, 4), 1, 2, 5, 2, 2, 2, (.5, 1.), 2))


class Job(NamedTuple):
    """One measurement. size: 0 for all; subset: its number, also the seed of training; seed: of the plane's teacher."""
    part: str
    family: str
    data: str
    size: int
    subset: int
    seed: int
    change: dict


def jobs(protocol):
    """All measurements; of a part the teacher first, then all images, then subset by subset."""
    found = []
    for part, sets in (("plane", protocol.sets), ("flux", ("tiny Flux",))):
        cases = [(0, subset) for subset in range(protocol.wholes[part])]
        cases += [(size, subset) for subset in range(protocol.subsets) for size in protocol.sizes]
        found += [Job(part, "teacher", data, 0, 0, 0, {}) for data in sets]
        found += [Job(part, family, data, size, subset, 0, change | ({"few": size, "seed": subset} if part == "plane" else {}))
                  for size, subset in cases for data in sets for family, change in TRAININGS.items()]
    return found


def measure(cache, protocol, job):
    """The measurement of a job, by its part's cells and protocol."""
    cells = {"plane": few_shot_plane, "flux": few_shot_flux}[job.part]
    return cells.MEASURES[job.family](cache, getattr(protocol, job.part), job)


def main():
    args = parser_of(__doc__, "few_shot", ["plane", "flux"]).parse_args()
    protocol = SMOKE if args.smoke else Protocol()
    work = partial(do, folder=args.cache, protocol=protocol, parts=[] if args.report else args.only,
                   measures=dict.fromkeys(("teacher", *TRAININGS), measure))
    done = run_all(work, jobs(protocol), args.workers)
    parts = {part: getattr(protocol, part)._asdict() for part in ("plane", "flux")}
    metrics = {part: {name: line for name, (_, line) in found.items()} for part, found in METRICS.items()}
    record = {"notes": NOTES, "protocol": protocol._asdict() | parts, "metrics": metrics, **about(done), **judged(gather(done))}
    write(record, args.out)
    for part in ("plane", "flux"):
        if any(world["part"] == part and world["methods"] for world in record["worlds"].values()):
            plot(record, part, f"{args.out}_{part}.png")
    plot_summary(record, f"{args.out}_summary.png")
    print(table(record))


if __name__ == "__main__":
    main()
