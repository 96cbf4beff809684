"""Who stands on the front in bench/compare.py, where training cost, network evaluations and quality are weighed; and what a win is worth.

A rival is a method of the summary of another name (all of SCFM's curves are one), the free solvers included. It counts where its training
cost no more and its sampling asks for no more evaluations. Two means are level when they lie no further apart than their deviations over
the seeds together (5 % of each where there is one seed), or when both lie within what data score against data.
"""
import copy
import statistics
from typing import NamedTuple

from compare_report import FLUX, NEEDS
from scfm.method.lora_scale import STEPS

OURS, ON_FLUX, ONE_SEED = "SCFM, tuned stepwise", ("SCFM, Algorithm 2 raw", "SCFM, Algorithm 2 dialled", "SCFM, tuned dialled"), .05
FIRST, LEVEL, BEHIND = WORDS = "first", "level", "behind"
COUNTED = tuple(n for n in STEPS if n >= 3)
KINDS = {"": COUNTED, " coupling": (3, 4, 8)}                # of curves, and where they are weighed: the tiny Flux's goal are 32 steps


class Stand(NamedTuple):
    """A curve at one set, budget and step count, beside its best rival. ratio: its mean over the rival's."""
    data: str
    budget: str
    steps: int
    word: str
    ratio: float
    rival: str
    rival_budget: str
    rival_steps: int


class Point(NamedTuple):
    """A place on somebody's curve; entry: {"mean", "spread", ...}."""
    entry: dict
    name: str
    budget: str
    steps: int


def family(name):
    return name.split()[0].rstrip(",") if not name.startswith("teacher") else name


def same(one, other, floor):
    """Are two entries level? floor: {"high": ...} of the set, or None."""
    width = sum(ONE_SEED * e["mean"] if e["spread"] is None else e["spread"] for e in (one, other))
    in_noise = floor and floor["high"] is not None and max(one["mean"], other["mean"]) <= floor["high"]
    return bool(in_noise) or abs(one["mean"] - other["mean"]) <= width


def points_within(record, data, budget, kind=""):
    """Every `Point` whose training cost at most `budget`. kind: of the curve, as in KINDS."""
    names = list(record["budgets"])
    worlds = [("free", record["free"][data])] + [(b, record["budgets"][b]["main"].get(data, {})) for b in names[:names.index(budget) + 1]]
    return [Point(entry, label, b, n) for b, curves in worlds for label in NEEDS for n, entry in curves.get(label + kind, {}).items()]


def stands(record, mine, sets, kind=""):
    """[Stand] of the curve `mine` at every set, budget and step count from 3 at which it was measured."""
    return [stand_of(record, data, budget, mine, n, kind) for data in sets for budget in record["budgets"] for n in KINDS[kind]
            if n in own_curve(record, data, budget, mine + kind) and rivals_of(record, data, budget, mine, n, kind)]


def own_curve(record, data, budget, mine):
    return record["free"][data].get(mine) or record["budgets"][budget]["main"].get(data, {}).get(mine, {})


def rivals_of(record, data, budget, mine, n, kind=""):
    return [p for p in points_within(record, data, budget, kind) if family(p.name) != family(mine) and p.steps <= n]


def stand_of(record, data, budget, mine, n, kind=""):
    entry = own_curve(record, data, budget, mine + kind)[n]
    best = min(rivals_of(record, data, budget, mine, n, kind), key=lambda point: point.entry["mean"])
    ahead = entry["mean"] < best.entry["mean"]
    floor = record["floor"].get(data) if not kind else None
    word = LEVEL if same(entry, best.entry, floor) else FIRST if ahead else BEHIND
    return Stand(data, budget, n, word, entry["mean"] / best.entry["mean"], best.name, best.budget, best.steps)


def of_seeds(record, picked):
    """A copy of the record in which curves of several seeds are those of `picked` (positions) alone."""
    found = copy.deepcopy(record)
    worlds = [*found["free"].values(), *(curves for of in found["budgets"].values() for curves in of["main"].values())]
    for entry in (entry for curves in worlds for curve in curves.values() for entry in curve.values() if len(entry["seeds"]) > 1):
        entry["seeds"] = [entry["seeds"][i] for i in picked]
        entry["mean"], entry["spread"] = statistics.mean(entry["seeds"]), statistics.stdev(entry["seeds"]) if len(picked) > 1 else None
    return found


def standings(record, sets):
    """{method: {word: how often}} for every method of the summary that was trained."""
    found = {}
    for label in NEEDS:
        words = [s.word for s in stands(record, label, sets)] if not label.startswith("teacher") else []
        found[label] = {word: words.count(word) for word in WORDS}
    return {label: counts for label, counts in found.items() if any(counts.values())}


def front_text(found, mine):
    """The stands as a table: a row for each set and budget. mine: the name that stands above it."""
    lines = [f"{mine}, over the best of all others whose training cost no more and that ask for no more evaluations (last number)", f"{'':24}" + "".join(f"{n:>27}" for n in COUNTED)]
    for data, budget in dict.fromkeys((s.data, s.budget) for s in found):
        at = {s.steps: s for s in found if (s.data, s.budget) == (data, budget)}
        lines.append(f"{f'{data}, {budget}':24}" + "".join(f"{told(at[n]) if n in at else '-':>27}" for n in COUNTED))
    return "\n".join(lines)


def told(stand):
    return f"{stand.word} {stand.ratio:.2f} {stand.rival.removeprefix('teacher ').split()[0]} {stand.rival_steps}"


def standings_text(found):
    lines = [f"{'on sets, budgets and steps from 3':34}" + "".join(f"{word:>8}" for word in WORDS)]
    return "\n".join(lines + [f"{label:34}" + "".join(f"{counts[word]:8}" for word in WORDS) for label, counts in found.items()])


def worth(record, sets, mine, steps=(3, 4, 8)):
    """{data: {rival: {steps: the smallest budget at which it is ahead of `mine` at the smallest budget, or level with it; None: at none}}}"""
    smallest = next(iter(record["budgets"]))
    rivals = [label for label in NEEDS if family(label) != family(mine) and not label.startswith("teacher")]
    found = {data: {rival: {n: reached(record, data, rival, n, own_curve(record, data, smallest, mine)[n]) for n in steps} for rival in rivals
                    if rival in record["budgets"][smallest]["main"].get(data, {})}
             for data in sets if set(steps) <= own_curve(record, data, smallest, mine).keys()}
    return {data: of for data, of in found.items() if of}


def reached(record, data, rival, n, entry):
    """By at most n evaluations."""
    for budget in record["budgets"]:
        values = [value for m, value in own_curve(record, data, budget, rival).items() if m <= n]
        if any(value["mean"] < entry["mean"] or same(value, entry, record["floor"].get(data)) for value in values):
            return budget
    return None


def worth_text(found, mine, steps=(3, 4, 8)):
    lines = [f"the smallest budget at which a method is level with {mine} at the smallest, or ahead of it; -: at none of them",
             f"{'':24}" + "".join(f"{data:^{8 * len(steps)}}" for data in found), f"{'evaluations':24}" + "".join(f"{n:8}" for _ in found for n in steps)]
    for rival in next(iter(found.values()), {}):
        lines.append(f"{rival.removesuffix(' raw'):24}" + "".join(f"{of[rival][n] or '-':>8}" for of in found.values() for n in steps))
    return "\n".join(lines)


def weighed(record):
    """{"stands", "stands_on_flux", "standings", "worth"} for the JSON, and all of it as text."""
    plane, tiny = [data for data in record["free"] if data != FLUX], [data for data in record["free"] if data == FLUX]
    mine, counts, price = stands(record, OURS, plane), standings(record, plane), worth(record, plane, OURS)
    on_flux = {label + kind: stands(record, label, tiny, kind) for label in ON_FLUX for kind in KINDS}
    text = [front_text(mine, OURS), *(front_text(found, label) for label, found in on_flux.items()), standings_text(counts), worth_text(price, OURS)]
    told = {"stands": [s._asdict() for s in mine], "stands_on_flux": {label: [s._asdict() for s in found] for label, found in on_flux.items()}}
    return told | {"standings": counts, "worth": price}, "\n\n".join(text)
