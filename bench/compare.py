"""Few-step methods from one teacher at equal cost:  python bench/compare.py --workers 2

Checkerboard, moons and 8 Gaussians, three seeds, the teachers of bench/plane.py; sliced-Wasserstein-2 (SW2) against fresh data at
1, 2, 3, 4, 8, 16 and 32 network evaluations, and the distance to the teacher's own endpoints from the same noises (coupling):

    free      the teacher by Euler, midpoint, Heun and DPM-Solver++(2M)
    trained   Reflow, progressive, consistency, Shortcut, MeanFlow (scfm/baselines.py), and SCFM: both algorithms, the self
              grid of 2 alone, damped speakers with k/N .2; each raw and on its dial

Each method gets the same budget of network evaluations for training, pairs and the dial's search included: small is what 40,000
pairs of 32 steps cost, medium 3 times that, large 10 times. Reflow spends half of any budget on pairs. One learning rate,
EMA decays shortened alike, read out from the slow EMA.

Every cell is a file under --cache, so a killed run goes on where it was; in the folder of bench/plane.py its teachers are found.
Writes bench/results/compare.json and compare.png.

    python bench/compare.py --quick         one seed; its cells serve a full run too
    python bench/compare.py --report        computes nothing, writes what the cells that are there give
    python bench/compare.py --smoke --cache /tmp/cells --out /tmp/compare      seconds, one set; the numbers mean nothing

Not here yet: the tiny Flux of toy/, where each method that can be one would be a LoRA (Reflow, progressive, consistency, SCFM;
not Shortcut and MeanFlow, which need a new input), at a backward of 1 instead of 2, judged by toy/judge.py. It would be one more
family of jobs with cells of its own.
"""
import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from compare_cells import ALL, PAIR_STEPS, plan, spent
from plane import SMOKE, Protocol, about, spread_out
from plane_cells import do
from plane_report import axes_of_steps, canvas, gather, table
from scfm.dial import SCALES, STEPS
from toy.plane import DATA

SMALL = 40_000 * PAIR_STEPS
BUDGETS = {"small": SMALL, "medium": 3 * SMALL, "large": 10 * SMALL}
SMOKE_BUDGETS = {"small": 500, "medium": 600, "large": 700}
FULL = Protocol(dial_noises=128, scales=SCALES[::2])         # the search counts, so it is kept small
TINY = SMOKE._replace(dial_noises=2)
BASELINES = {"Reflow": "reflow", "progressive": "progressive", "consistency": "consistency", "Shortcut": "shortcut",
             "MeanFlow": "meanflow"}
SCFM = {"SCFM, Algorithm 2": {}, "SCFM, Algorithm 1": {"algorithm": "one_ema"}, "SCFM, self grid 2": {"self_grids": (2,)},
        "SCFM, damped": {"speaker_scale": .5, "teacher_share": .2}}
NOTES = ("One learning rate and one schedule for all methods; EMA decays shortened to the updates; slow EMA read out.",
         "Chosen by trials on the checkerboard, 600,000 evaluations: three features of the step size; MeanFlow's weight.",
         "SCFM's raw curves stand at the budget that includes the search for the dial, which they do not need.",
         "Progressive: `own stage` walks n steps with the network of the smallest stage with at least n; the teacher beyond 16.")


class Job(NamedTuple):
    """One measurement. family: the method; budget: evaluations, 0 where nothing is trained; change: of SCFM's `settings`."""
    part: str
    family: str
    label: str
    data: str
    seed: int
    change: dict
    budget: int


def jobs(protocol, budgets, sets):
    """All measurements, in the order in which they matter: seed 0 at the small budget first."""
    found = [Job("main", "floor", "floor", data, 0, {}, 0) for data in sets]
    for seed in range(protocol.seeds):
        found += [Job("main", family, "teacher", data, seed, {}, 0) for data in sets for family in ("teacher", "multistep")]
        for budget in budgets.values():
            for data in sets:
                found += [Job("main", family, label, data, seed, {}, budget) for label, family in BASELINES.items()]
                updates = plan(protocol, "scfm", budget)[0]
                found += [Job("main", "scfm", label, data, seed, {"updates": updates, **change}, budget)
                          for label, change in SCFM.items()]
    return found


def gathered(done, protocol, budgets):
    """floor; free: the teacher's curves; budgets: for each its evaluations, what each method makes of them, and the curves."""
    free = gather([result for result in done if result[0].budget == 0])
    record = {"floor": free["floor"], "free": free["main"], "budgets": {}}
    for name, budget in budgets.items():
        costs = {}
        for method in (*BASELINES.values(), "scfm"):
            updates, pairs = plan(protocol, method, budget)
            costs[method] = {"updates": updates, "pairs": pairs, "evaluations": spent(protocol, method, budget)}
        main = gather([result for result in done if result[0].budget == budget])["main"]
        record["budgets"][name] = {"evaluations": budget, "methods": costs, "main": main}
    return record


STYLES = {"Reflow raw": "C0o-", "progressive own stage": "C1o-", "consistency re-noised": "C2o-", "Shortcut raw": "C4o-",
          "MeanFlow raw": "C5o-", "SCFM, Algorithm 2 raw": "C3.--", "SCFM, damped dialled": "C3o-"}
FREE_STYLES = {"teacher euler": "ko-", "teacher midpoint": "ks--", "teacher multistep": "k^:"}


def plot(record, path):
    """A row for each budget, a column for each set."""
    sets = list(record["free"])
    figure, axes = canvas(len(record["budgets"]), len(sets), (4.4 * len(sets), 10))
    for row, (name, found) in zip(axes, record["budgets"].items()):
        for ax, data in zip(row, sets):
            curves = record["free"][data] | found["main"].get(data, {})
            for label, style in {**FREE_STYLES, **STYLES}.items():
                curve = curves.get(label, {})
                ax.plot(list(curve), [entry["mean"] for entry in curve.values()], style, ms=3, lw=1, label=label)
            axes_of_steps(ax, STEPS, f"{data}, {name} ({found['evaluations']:,} evaluations)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncol=5, fontsize=8)
    figure.tight_layout(rect=(0, .06, 1, 1))
    figure.savefig(path, dpi=80)


def text(record):
    """All curves of SW2 as text, by budget."""
    parts = [table({"main": record["free"], "floor": record["floor"], "targets": {}})]
    for name, found in record["budgets"].items():
        curves = {data: {label: curve for label, curve in of.items() if not label.endswith(("coupling", "scales", "deviation"))}
                  for data, of in found["main"].items()}
        parts += [f"\n{name}: {found['evaluations']:,} evaluations", table({"main": curves, "floor": {}, "targets": {}})]
    return "\n".join(parts)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", default="runs/plane", help="folder of the cells (default runs/plane)")
    parser.add_argument("--out", default="bench/results/compare", help="path of the result without its ending")
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each (default 1)")
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--smoke", action="store_true", help="one set, a few updates, in a cache of its own")
    parser.add_argument("--report", action="store_true", help="compute nothing, only write the result")
    return parser.parse_args()


def main():
    args, start = parse(), time.perf_counter()
    protocol = TINY if args.smoke else FULL._replace(seeds=1) if args.quick else FULL
    budgets, sets = (SMOKE_BUDGETS, ["moons"]) if args.smoke else (BUDGETS, list(DATA))
    todo, done = jobs(protocol, budgets, sets), []
    work = partial(do, folder=args.cache, protocol=protocol, parts=[] if args.report else ["main"], measures=ALL)
    with tqdm(total=len(todo), desc="measurements") as bar:
        for result in spread_out(work, todo, args.workers):
            done.append(result)
            bar.set_postfix_str(" ".join(map(str, result[0][2:5])))
            bar.update()
    told = about(protocol, done, time.perf_counter() - start)
    missing = [" ".join(map(str, (*job[1:5], job.budget))) for job, value, _, _ in done if value is None]
    record = {"notes": NOTES, "protocol": protocol._asdict(), "missing": missing,
              **{key: told[key] for key in ("metric", "cost", "machine", "torch")}, **gathered(done, protocol, budgets)}
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    if record["free"]:
        plot(record, f"{out}.png")
    print(text(record))


if __name__ == "__main__":
    main()
