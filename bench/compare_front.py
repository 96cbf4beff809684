"""Where SCFM on its dial stands in bench/compare.py: the Pareto front of training cost, evaluations and quality, and what a win is worth.

The rules were written when only seed 0 was measured. A rival is any other method of the page, the free solvers included. It counts
where it cost at most the same budget and asks for at most as many network evaluations. Two means differ when they are further apart
than their deviations over the seeds together; where there is one seed, by more than 5 %.
"""
from typing import NamedTuple

from compare_report import BESIDE, FLUX, NEEDS
from scfm.dial import STEPS

OURS, FAMILY, ONE_SEED = "SCFM, damped dialled", "SCFM", .05
FIRST, LEVEL, BEHIND = "first", "level", "behind"


class Stand(NamedTuple):
    """Our curve at one set, budget and step count, beside the best rival. ratio: ours over the rival's."""
    data: str
    budget: str
    steps: int
    word: str
    ratio: float
    rival: str
    rival_budget: str
    rival_steps: int


def width(entry):
    return ONE_SEED * entry["mean"] if entry["spread"] is None else entry["spread"]


def apart(one, other):
    """Do two entries ({"mean", "spread", ...}) differ?"""
    return abs(one["mean"] - other["mean"]) > width(one) + width(other)


def curves_within(record, data, budget):
    """(budget, name, curve) of every curve of the quality that cost at most `budget`, the free ones first."""
    names = list(record["budgets"])
    found = [("free", name, curve) for name, curve in record["free"][data].items()]
    for name in names[:names.index(budget) + 1]:
        found += [(name, label, curve) for label, curve in record["budgets"][name]["main"].get(data, {}).items()]
    return [(b, label, curve) for b, label, curve in found if not label.endswith(BESIDE)]


def stands(record, ours=OURS, steps=tuple(n for n in STEPS if n >= 3)):
    """[Stand]: every set, budget and step count at which our curve was measured."""
    found = []
    for data in record["free"]:
        for budget, of in record["budgets"].items():
            curve = of["main"].get(data, {}).get(ours, {})
            rivals = [c for c in curves_within(record, data, budget) if not c[1].startswith(FAMILY)]
            found += [stand_of(data, budget, n, curve[n], rivals) for n in steps if n in curve]
    return found


def stand_of(data, budget, n, entry, rivals):
    best, rival_budget, name, m = min(((value["mean"], b, label, m) for b, label, curve in rivals for m, value in curve.items() if m <= n),
                                      key=lambda found: found[0])
    value = next(curve[m] for b, label, curve in rivals if (b, label) == (rival_budget, name))
    ahead = entry["mean"] < best
    word = LEVEL if not apart(entry, value) else FIRST if ahead else BEHIND
    return Stand(data, budget, n, word, entry["mean"] / best, name, rival_budget, m)


def front_text(found):
    """The stands as a table: a row for each set and budget; behind: by how much, and whom."""
    steps = sorted({s.steps for s in found})
    lines = ["SCFM, damped, on its dial, against the best of all others at the same or a smaller cost and with as many evaluations or fewer",
             f"{'':24}" + "".join(f"{n:>26}" for n in steps)]
    for data, budget in dict.fromkeys((s.data, s.budget) for s in found):
        at = {s.steps: s for s in found if (s.data, s.budget) == (data, budget)}
        lines.append(f"{f'{data}, {budget}':24}" + "".join(f"{told(at[n]) if n in at else '-':>26}" for n in steps))
    counts = ", ".join(f"{word} {sum(s.word == word for s in found)}" for word in (FIRST, LEVEL, BEHIND))
    return "\n".join([*lines, f"of {len(found)}: {counts}"])


def told(stand):
    return f"{stand.word} {stand.ratio:.2f}" + (f" {stand.rival.split()[0]}" if stand.word == FIRST else f" {stand.rival.removesuffix(' raw')}")[:19]


def worth(record, steps=(3, 4, 8), ours=OURS):
    """{data: {rival: {steps: the smallest budget at which it is not clearly behind ours at the smallest, or None}}}; trained rivals alone."""
    smallest, found = next(iter(record["budgets"])), {}
    for data in record["free"]:
        curve = record["budgets"][smallest]["main"].get(data, {}).get(ours, {})
        rivals = [label for label in NEEDS if not label.startswith((FAMILY, "teacher"))]
        found[data] = {rival: {n: reached(record, data, rival, n, curve[n]) for n in steps if n in curve} for rival in rivals}
    return {data: of for data, of in found.items() if any(of.values())}


def reached(record, data, rival, n, entry):
    for budget, of in record["budgets"].items():
        value = of["main"].get(data, {}).get(rival, {}).get(n)
        if value and (value["mean"] <= entry["mean"] or not apart(value, entry)):
            return budget
    return None


def worth_text(found, steps=(3, 4, 8)):
    lines = ["the smallest budget at which a method is not clearly behind what SCFM has at the smallest; '-': at none of them",
             f"{'':24}" + "".join(f"{data:^{10 * len(steps)}}" for data in found),
             f"{'evaluations':24}" + "".join(f"{n:>9} " for _ in found for n in steps)]
    for rival in next(iter(found.values()), {}):
        lines.append(f"{rival.removesuffix(' raw'):24}" + "".join(f"{(of[rival].get(n) or '-') if of[rival] else '':>9} " for of in found.values() for n in steps))
    return "\n".join(lines)


def of_record(record):
    """What the JSON keeps of it, and what the bench prints."""
    found = stands(record)
    return {"stands": [s._asdict() for s in found], "worth": worth(record)}, "\n\n".join((front_text(found), worth_text(worth(record))))
