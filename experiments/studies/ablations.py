"""What matters:  python bench/ablations.py --workers 2      (about an hour of CPU for plane and grids, 40 minutes for the tiny Flux)

One setting changed at a time, around one default, then two at a time. Every run is looked at several times on its way.

    plane   checkerboard; the share of teacher rows and the EMAs on moons and 8 Gaussians too. The default is the paper's
            recipe: Algorithm 2, decays .99 and .999, k/N .4, a constant learning rate, the student itself read out.
            Sliced-Wasserstein-2 (SW2) against fresh data at 1, 2, 3, 4 and 8 steps, raw (scale 1) and dialled
    grids   fast against slow decay, and the two settings that mattered most on the plane (by what was just measured)
    flux    the tiny Flux of toy/, a LoRA, the carried recipe cut to minutes: the distance to the teacher's endpoints, on
            captions of pairs that no training image shows, at 3, 4 and 8 steps

One seed for each change; the default has three. Every cell is a file under --cache, so a killed run goes on where it was; in the
folder of bench/plane.py its teachers are found. Writes bench/results/ablations.json, ablations.png, ablations_grids.png
and ablations_flux.png.

    python bench/ablations.py --only flux   computes one part, and takes of the others what is there
    python bench/ablations.py --report      computes nothing, writes what the cells that are there give
    python bench/ablations.py --smoke --cache /tmp/cells --out /tmp/ablations      seconds; the numbers mean nothing
"""
from functools import partial
from itertools import combinations_with_replacement, product
from typing import NamedTuple

import plane
from ablation_cells import measure_flux, measure_flux_teacher, measure_run
from ablation_report import gathered, most_sensitive, plot_families, plot_flux, plot_grids, text
from cells import about, parser_of, run_all, write
from plane_cells import FEWER, MEASURES, do
from scfm.method.lora_scale import SCALES
from scfm.method.ema import shorten
from toy.plane import DATA

ABLATED, PARTS = "checkerboard", ("plane", "grids", "flux")
DECAYS = (.95, .99, .999, .9995)


class PlaneProtocol(NamedTuple):
    """Sizes, by the names of `Protocol` in bench/plane.py; looks: the numbers of updates after which a run is measured."""
    steps: tuple = FEWER
    looks: tuple = (250, 500, 1000, 2000)
    updates: int = 2000
    teacher_updates: dict = plane.Protocol().teacher_updates
    batch: int = 256
    samples: int = 10_000
    directions: int = 64
    floor_pairs: int = 60
    dial_noises: int = 512
    goal_steps: int = 128
    scales: tuple = (*SCALES[::2], 2.5, 3., 4.)              # students of weak models want more than 2


class FluxProtocol(NamedTuple):
    """captions: judged; dial_captions: on which the dial is found; goal_steps: the teacher's; images: that it generates."""
    steps: tuple = (3, 4, 8)
    looks: tuple = (100, 200)
    updates: int = 200
    batch: int = 16
    images: int = 256
    captions: int = 96
    dial_captions: int = 24
    goal_steps: int = 32
    scales: tuple = (0., .25, .5, .75, 1., 1.5, 2., 3.)


FULL = {"plane": PlaneProtocol(), "flux": FluxProtocol()}
TINY = {"plane": PlaneProtocol(looks=(4, 8), updates=8, teacher_updates=dict.fromkeys(DATA, 2), batch=8, samples=32, directions=4,
                               floor_pairs=2, dial_noises=4, goal_steps=4, scales=(0., 1.)),
        "flux": FluxProtocol((1, 2), (1, 2), 2, 2, 4, 2, 2, 4, (0., 1.))}
NOTES = ("Plane: constant learning rate 3e-4, batch 256, shift 1 to 2, decays not shortened, raw student read out, unless it says otherwise.",
         "A LoRA has the learning rate 1e-3. t_skip: at equal evaluations, so 4 and 8 have 5/7 and 5/11 of the updates; self grids below it are left out.",
         "When stalled: both EMAs are set to the student once its distance to the slow EMA has not grown for 60 updates.",
         "Most sensitive: the mean over 2, 3, 4 and 8 steps of log(worst / best), dialled, over the values of the coarse grids; three seeds of the default "
         "say what chance does, and a setting below twice that is not told from it.",
         "Tiny Flux: decays shortened to the updates, unless it says otherwise; student and slow EMA are both measured.")


class Job(NamedTuple):
    """One measurement. `change`: of the default; label: how the value is called, in a grid `first|second`."""
    part: str
    family: str
    label: str
    data: str
    seed: int
    change: dict


def jumps(updates):
    """label -> change: rows that jump more steps of their grid cost a forward for each, so they get fewer updates."""
    return {f"{n}": {"t_skip": n, **({"updates": max(1, updates * 5 // (3 + n))} if n > 2 else {})} for n in (2, 4, 8)}


def families(updates):
    """family -> label -> change of the default, for the plane."""
    parts = [updates // 8, updates // 4, updates // 2]
    one, stalled = {"algorithm": "one_ema"}, {"restart_when_stalled": True}
    averages = {"dual": {}, **{f"dual, restart {n}": {"restart_every": n} for n in parts}, "dual, when stalled": stalled,
                "one EMA": one, **{f"one EMA, restart {n}": one | {"restart_every": n} for n in parts},
                "one EMA, when stalled": one | stalled, "dual pure": {"algorithm": "dual_pure"},
                "dual, shortened": {"ema_decay_fast": shorten(.99, updates), "ema_decay_slow": shorten(.999, updates)}}
    return {"k/N": {f"{k:g}": {"teacher_ratio": k} for k in (0., .1, .2, .4, .6, .8, 1.)},
            "averages": averages,
            "decay of one EMA": {f"{d:g}": one | {"ema_decay_slow": d} for d in DECAYS},
            "speaker scale": {f"{s:g}": {"ema_target_scale": s} for s in (0., .25, .5, .75, 1., 1.25)},
            "learning rate": {f"{lr:g}": {"lr": lr} for lr in (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)},
            "shift": {f"{a:g} to {b:g}": {"shift": (a, b)} for a, b in ((.5, 1.), (1., 1.), (1., 2.), (1., 3.), (2.5, 4.5))},
            "t_skip": jumps(updates),
            "loss": {name: {"loss": name} for name in ("mse", "huber", "cosine")},
            "rank": {f"{r}": {"rank": r, "lr": 1e-3} for r in (1, 4, 16, 64)} | {"all weights": {}, "all weights, 1e-3": {"lr": 1e-3}},
            "read-out": {name: {"read_out": name} for name in ("student", "ema_fast", "ema_slow")},
            "seed": {f"{seed}": {"seed": seed} for seed in range(3)}}


EVERYWHERE = {"k/N": lambda label: True, "averages": lambda label: label in ("dual", "one EMA") or "stalled" in label}
# what may stand on an axis of the grid of two settings: family -> label -> change
COARSE = {"k/N": {f"{k:g}": {"teacher_ratio": k} for k in (.1, .2, .4, .8)},
          "speaker scale": {f"{s:g}": {"ema_target_scale": s} for s in (.25, .5, .75, 1.)},
          "learning rate": {f"{lr:g}": {"lr": lr} for lr in (1e-4, 3e-4, 1e-3, 3e-3)},
          "shift": {f"{a:g} to {b:g}": {"shift": (a, b)} for a, b in ((1., 1.), (1., 2.), (1., 3.), (2.5, 4.5))},
          "t_skip": jumps(PlaneProtocol().updates),
          "decay of one EMA": {f"{d:g}": {"algorithm": "one_ema", "ema_decay_slow": d} for d in DECAYS}}


def flux_families(updates):
    one = {"algorithm": "one_ema"}
    return {"k/N": {f"{k:g}": {"teacher_ratio": k} for k in (0., .2, .4, .6, .8, 1.)},
            "averages": {"dual": {}, f"dual, restart {3 * updates // 10}": {"restart_every": max(1, 3 * updates // 10)}, "one EMA": one,
                         "dual, not shortened": {"ema_decay_fast": .99, "ema_decay_slow": .999}},
            "rank": {f"{r}": {"rank": r} for r in (4, 16, 48)},
            "learning rate": {f"{lr:g}": {"lr": lr} for lr in (3e-4, 1e-3, 3e-3)},
            "speaker scale": {f"{s:g}": {"ema_target_scale": s} for s in (.5, 1.)}}


def jobs(protocols, smoke):
    """All measurements but those of the grid of two settings, in the order in which they matter."""
    def some(changes, family=""):                            # of a family in a smoke run: the first value and the last that a grid could show
        shown = [(label, change) for label, change in changes.items() if label in COARSE.get(family, changes)]
        return shown[::max(1, len(shown) - 1)] if smoke else changes.items()
    found = [Job("plane", "teacher", "teacher", data, 0, {}) for data in DATA]
    found += [Job("plane", family, label, data, 0, change)
              for family, changes in families(protocols["plane"].updates).items() for data in DATA for label, change in some(changes, family)
              if data == ABLATED or (family in EVERYWHERE and EVERYWHERE[family](label))]
    found += [Job("plane", "floor", "floor", data, 0, {}) for data in DATA]
    found += [Job("grids", "fast decay, slow decay", f"{fast:g}|{slow:g}", ABLATED, 0, {"ema_decay_fast": fast, "ema_decay_slow": slow})
              for fast, slow in combinations_with_replacement(DECAYS, 2)]
    found += [Job("flux", "teacher", "teacher", "tiny Flux", 0, {})]
    return found + [Job("flux", family, label, "tiny Flux", 0, change)
                    for family, changes in flux_families(protocols["flux"].updates).items() for label, change in some(changes)
                    if not smoke or family in ("k/N", "rank")]


def grid_of(pair):
    """The measurements of two settings together. pair: names of `COARSE`, or () for none."""
    return [Job("grids", ", ".join(pair), f"{a}|{b}", ABLATED, 0, first | second)
            for (a, first), (b, second) in (product(*(COARSE[name].items() for name in pair)) if pair else ())]


def one_of(job, folder, protocols, parts):
    """`do` with what the part of a job asks for."""
    if job.part == "flux":
        return do(job, folder, protocols["flux"], parts, {job.family: measure_flux} | {"teacher": measure_flux_teacher})
    return do(job, folder, protocols["plane"], parts, {job.family: measure_run} | MEASURES)


def main():
    args = parser_of(__doc__, "ablations", PARTS).parse_args()
    protocols = TINY if args.smoke else FULL
    work = partial(one_of, folder=args.cache, protocols=protocols, parts=[] if args.report else args.only)
    done = run_all(work, jobs(protocols, args.smoke), args.workers)
    ranked, pair = most_sensitive(done, COARSE, ABLATED, small=args.smoke)
    done += run_all(work, grid_of(pair), args.workers)
    record = {"notes": NOTES, "protocol": {part: p._asdict() for part, p in protocols.items()}, "ablated": ABLATED,
              "sensitivity": ranked, "metric": "sliced-Wasserstein-2; floor: data against data", **about(done), **gathered(done)}
    write(record, args.out)
    for kind, plot in (("", plot_families), ("_grids", plot_grids), ("_flux", plot_flux)):
        plot(record, f"{args.out}{kind}.png")
    print(text(record))


if __name__ == "__main__":
    main()
