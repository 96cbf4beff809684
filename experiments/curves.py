"""Curves over step counts, of one or several seeds: how they are gathered from results, and shown as text."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from experiments.runner import Job, Result, words_of
from scfm.method.lora_scale import STEPS

Entry = dict[str, Any]  # {"seeds": [number], "mean", "spread": None for a single seed}
Curves = dict[str, dict[int, Entry]]  # label and kind -> steps -> entry


def gather_curves(results: Iterable[Result]) -> dict[str, Curves]:
    """{set: `Curves`} of results whose values are {kind: {steps: number}}: mean, spread over seeds, every
    seed.
    """
    found: dict[str, Curves] = {}
    for result in results:
        for kind, numbers in result.value.items():
            curve = found.setdefault(result.job.data, {}).setdefault(f"{result.job.label} {kind}", {})
            for steps, number in numbers.items():
                curve.setdefault(steps, {"seeds": []})["seeds"].append(number)
    for curves in found.values():
        for curve in curves.values():
            for entry in curve.values():
                entry |= summary_of(entry["seeds"])
    return found


def recall(
    results: Sequence[Result], record: dict[str, Any], curves_of: Callable[[dict, Job], dict[str, Any]]
) -> list[Result]:
    """The results, those without a value with the one that an earlier record has of them, if it has.

    curves_of: called as curves_of(record, job), the curves {label and kind: {steps: entry}} of its part,
        budget and set
    """
    missing = set(record["missing"])
    seeds: dict[str, list[Job]] = {}  # the jobs of one entry, in the order of the numbers in it
    for result in results:
        if words_of(result.job) not in missing:
            seeds.setdefault(str(result.job._replace(seed=0)), []).append(result.job)
    found = []
    for result in results:
        jobs = seeds.get(str(result.job._replace(seed=0)), [])
        if result.value is None and result.job in jobs:
            curves, place = curves_of(record, result.job), jobs.index(result.job)
            value = {
                kind: {int(steps): entry["seeds"][place] for steps, entry in curve.items()}
                for (label, _, kind), curve in ((name.rpartition(" "), c) for name, c in curves.items())
                if label == result.job.label
            }
            result = result._replace(value=value or None)
        found.append(result)
    return found


def summary_of(numbers: list[float]) -> Entry:
    """{"mean", "spread": the standard deviation, None for a single number}."""
    return {
        "mean": statistics.mean(numbers),
        "spread": statistics.stdev(numbers) if len(numbers) > 1 else None,
    }


def curve_table(sets: dict[str, Curves], floors: dict[str, Entry]) -> str:
    """A block for each set, a line for each curve, a column for each step count."""
    lines = []
    for data, curves in sets.items():
        floor = floors.get(data)
        band = "   floor {mean:.3f}, band {low:.3f} to {high:.3f}".format(**floor) if floor else ""
        lines += ["", data + band, " " * 26 + "".join(f"{n:>15}" for n in STEPS)]
        lines += [
            f"{name:26}" + "".join(f"{entry_text(curve.get(n)):>15}" for n in STEPS)
            for name, curve in curves.items()
        ]
    return "\n".join(lines)


def entry_text(entry: Entry | None) -> str:
    """A mean, with its spread where there are several seeds."""
    if entry is None:
        return "-"
    return f"{entry['mean']:.3f}" + (f" +-{entry['spread']:.3f}" if entry["spread"] is not None else "")
