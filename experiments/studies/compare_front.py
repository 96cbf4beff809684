"""Who stands on the front in the study `compare`, where training cost, network evaluations and quality are
weighed; and what a win is worth.

A rival is a method of the summary of another name (all of SCFM's curves are one), the free solvers included.
It counts where its training cost no more and its sampling asks for no more evaluations. Two means are level
when they lie no further apart than their deviations over the seeds together (5 % of each where there is one
seed), or when both lie within what data score against data.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.curves import Entry, summary_of
from experiments.studies.compare_report import FLUX, NEEDS
from scfm.method.lora_scale import STEPS

OURS, ONE_SEED = "SCFM, tuned stepwise", 0.05
ON_FLUX = ("SCFM, Algorithm 2 raw", "SCFM, Algorithm 2 dialled", "SCFM, tuned dialled")
FIRST, LEVEL, BEHIND = WORDS = "first", "level", "behind"
COUNTED = tuple(n for n in STEPS if n >= 3)
# of curves, and where they are weighed: the tiny Flux's goal are 32 steps
KINDS = {"": COUNTED, " coupling": (3, 4, 8)}
WORTH_AT = (3, 4, 8)
Worth = dict[str, dict[str, dict[int, str | None]]]


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

    entry: Entry
    name: str
    budget: str
    steps: int


def method_of(name: str) -> str:
    return name.split()[0].rstrip(",") if not name.startswith("teacher") else name


def is_free(name: str) -> bool:
    return name.startswith("teacher")


def same(one: Entry, other: Entry, floor: dict | None) -> bool:
    """Are two entries level? floor: {"high": ...} of the set, or None."""
    width = sum(ONE_SEED * e["mean"] if e["spread"] is None else e["spread"] for e in (one, other))
    has_band = floor is not None and floor["high"] is not None
    in_noise = has_band and max(one["mean"], other["mean"]) <= floor["high"]
    return in_noise or abs(one["mean"] - other["mean"]) <= width


def points_within(record: dict[str, Any], data: str, budget: str, kind: str = "") -> list[Point]:
    """Every `Point` whose training cost at most `budget`. kind: of the curve, as in KINDS."""
    names = list(record["budgets"])
    affordable = names[: names.index(budget) + 1]
    curves_at = {"free": record["free"][data]}
    curves_at |= {name: record["budgets"][name]["main"].get(data, {}) for name in affordable}
    return [
        Point(entry, label, name, n)
        for name, curves in curves_at.items()
        for label in NEEDS
        for n, entry in curves.get(label + kind, {}).items()
    ]


def stands(record: dict[str, Any], mine: str, sets: Sequence[str], kind: str = "") -> list[Stand]:
    """[Stand] of the curve `mine` at every set, budget and step count from 3 at which it was measured."""
    places = [
        (data, budget, n)
        for data in sets
        for budget in record["budgets"]
        for n in KINDS[kind]
        if n in own_curve(record, data, budget, mine + kind)
    ]
    return [
        stand_at(record, data, budget, mine, n, kind)
        for data, budget, n in places
        if rivals_of(record, data, budget, mine, n, kind)
    ]


def own_curve(record: dict[str, Any], data: str, budget: str, mine: str) -> dict[int, Entry]:
    return record["free"][data].get(mine) or record["budgets"][budget]["main"].get(data, {}).get(mine, {})


def rivals_of(
    record: dict[str, Any], data: str, budget: str, mine: str, n: int, kind: str = ""
) -> list[Point]:
    return [
        p
        for p in points_within(record, data, budget, kind)
        if method_of(p.name) != method_of(mine) and p.steps <= n
    ]


def stand_at(record: dict[str, Any], data: str, budget: str, mine: str, n: int, kind: str = "") -> Stand:
    entry = own_curve(record, data, budget, mine + kind)[n]
    best = min(rivals_of(record, data, budget, mine, n, kind), key=lambda point: point.entry["mean"])
    ahead = FIRST if entry["mean"] < best.entry["mean"] else BEHIND
    floor = record["floor"].get(data) if not kind else None
    word = LEVEL if same(entry, best.entry, floor) else ahead
    ratio = entry["mean"] / best.entry["mean"]
    return Stand(data, budget, n, word, ratio, best.name, best.budget, best.steps)


def of_seeds(record: dict[str, Any], picked: Sequence[int]) -> dict[str, Any]:
    """A copy of the record in which curves of several seeds are those of `picked` (positions) alone."""
    found = copy.deepcopy(record)
    mains = [found["free"], *(of_budget["main"] for of_budget in found["budgets"].values())]
    entries = [
        entry
        for sets in mains
        for curves in sets.values()
        for curve in curves.values()
        for entry in curve.values()
    ]
    for entry in (entry for entry in entries if len(entry["seeds"]) > 1):
        entry["seeds"] = [entry["seeds"][i] for i in picked]
        entry |= summary_of(entry["seeds"])
    return found


def standings(record: dict[str, Any], sets: Sequence[str]) -> dict[str, dict[str, int]]:
    """{method: {word: how often}} for every method of the summary that was trained."""
    found = {}
    for label in (label for label in NEEDS if not is_free(label)):
        words = [stand.word for stand in stands(record, label, sets)]
        found[label] = {word: words.count(word) for word in WORDS}
    return {label: counts for label, counts in found.items() if any(counts.values())}


def worth(record: dict[str, Any], sets: Sequence[str], mine: str, steps: Sequence[int] = WORTH_AT) -> Worth:
    """{data: {rival: {steps: the smallest budget at which it is ahead of `mine` at the smallest budget, or
    level with it; None: at none}}}.
    """
    smallest = next(iter(record["budgets"]))
    rivals = [label for label in NEEDS if method_of(label) != method_of(mine) and not is_free(label)]
    found = {}
    for data in sets:
        curve = own_curve(record, data, smallest, mine)
        trained = record["budgets"][smallest]["main"].get(data, {})
        if set(steps) <= curve.keys():
            found[data] = {
                rival: {n: reached(record, data, rival, n, curve[n]) for n in steps}
                for rival in rivals
                if rival in trained
            }
    return {data: of_rivals for data, of_rivals in found.items() if of_rivals}


def reached(record: dict[str, Any], data: str, rival: str, n: int, entry: Entry) -> str | None:
    """The smallest budget at which a rival is ahead of an entry, or level with it, by at most n
    evaluations."""
    floor = record["floor"].get(data)
    for budget in record["budgets"]:
        values = [value for m, value in own_curve(record, data, budget, rival).items() if m <= n]
        if any(value["mean"] < entry["mean"] or same(value, entry, floor) for value in values):
            return budget
    return None


def weigh(record: dict[str, Any]) -> dict[str, Any]:
    """{"stands", "stands_on_flux", "standings", "worth"}, for the JSON."""
    plane, flux = sets_of(record)
    on_flux = {label + kind: stands(record, label, flux, kind) for label in ON_FLUX for kind in KINDS}
    return {
        "stands": as_dicts(stands(record, OURS, plane)),
        "stands_on_flux": {label: as_dicts(found) for label, found in on_flux.items()},
        "standings": standings(record, plane),
        "worth": worth(record, plane, OURS),
    }


def as_dicts(found: Sequence[Stand]) -> list[dict[str, Any]]:
    return [stand._asdict() for stand in found]


def sets_of(record: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(the sets of the plane, the tiny Flux if it is there)."""
    sets = list(record["free"])
    return [data for data in sets if data != FLUX], [data for data in sets if data == FLUX]


def text(record: dict[str, Any]) -> str:
    """What `weigh` gives, as text."""
    weighed = {"": record["stands"], **record["stands_on_flux"]}
    fronts = [
        front_text([Stand(**stand) for stand in found], label or OURS) for label, found in weighed.items()
    ]
    return "\n\n".join([*fronts, standings_text(record["standings"]), worth_text(record["worth"], OURS)])


def front_text(found: Sequence[Stand], mine: str) -> str:
    """The stands as a table: a row for each set and budget. mine: the name that stands above it."""
    lines = [
        f"{mine}, over the best of all others whose training cost no more and that ask for no more "
        "evaluations (last number)",
        f"{'':24}" + "".join(f"{n:>27}" for n in COUNTED),
    ]
    for data, budget in dict.fromkeys((s.data, s.budget) for s in found):
        at = {s.steps: stand_text(s) for s in found if (s.data, s.budget) == (data, budget)}
        lines.append(f"{f'{data}, {budget}':24}" + "".join(f"{at.get(n, '-'):>27}" for n in COUNTED))
    return "\n".join(lines)


def stand_text(stand: Stand) -> str:
    rival = stand.rival.removeprefix("teacher ").split()[0]
    return f"{stand.word} {stand.ratio:.2f} {rival} {stand.rival_steps}"


def standings_text(found: dict[str, dict[str, int]]) -> str:
    lines = [f"{'on sets, budgets and steps from 3':34}" + "".join(f"{word:>8}" for word in WORDS)]
    return "\n".join(
        lines
        + [f"{label:34}" + "".join(f"{counts[word]:8}" for word in WORDS) for label, counts in found.items()]
    )


def worth_text(found: Worth, mine: str, steps: Sequence[int] = WORTH_AT) -> str:
    lines = [
        f"the smallest budget at which a method is level with {mine} at the smallest, or ahead of it; "
        "-: at none of them",
        f"{'':24}" + "".join(f"{data:^{8 * len(steps)}}" for data in found),
        f"{'evaluations':24}" + "".join(f"{n:8}" for _ in found for n in steps),
    ]
    for rival in next(iter(found.values()), {}):
        lines.append(
            f"{rival.removesuffix(' raw'):24}"
            + "".join(f"{of_rivals[rival][n] or '-':>8}" for of_rivals in found.values() for n in steps)
        )
    return "\n".join(lines)
