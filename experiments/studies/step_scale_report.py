"""The record, the tables and the figure of the study `step_scale`, beside the rivals of `compare`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.curves import Curves, gather_curves
from experiments.figures import (
    LEVELS,
    OPEN,
    STUDENT,
    canvas,
    labelled_handles,
    look,
    plot_curve,
    save,
    step_axes,
)
from experiments.runner import RESULTS, Job, Result
from experiments.testbeds.tiny_flux import NAME as FLUX
from scfm.method.lora_scale import STEPS

OURS = {"one difference": STUDENT | OPEN, "two differences": STUDENT}
SHOWN = (
    "teacher euler",
    "progressive own stage",
    "Shortcut raw",
    "SCFM, Algorithm 2 raw",
    "SCFM, tuned stepwise",
    "SCFM, damped stepwise",
    "SCFM, tuned dialled",
)
ON_FLUX_ALONE = "SCFM, tuned dialled"  # on the plane a scale for each step was searched
NO_METHOD = ("coupling", "scales", "deviation", "accuracy", "last stage")
FLUX_STEPS = (1, 2, 3, 4, 8)


def gather(results: Sequence[Result], budgets: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """budgets: {name: {set: curves}}; scratch, choices: the same; against: how they stand to the rivals."""
    done = [result for result in results if result.value is not None]
    record: dict[str, Any] = {"budgets": {}}
    for name, amounts in budgets.items():
        of_budget = [r for r in done if r.job.part in ("plane", FLUX) and r.job.budget in amounts]
        record["budgets"][name] = gather_curves(of_budget)
    for part in ("scratch", "choices"):
        record[part] = gather_curves(r for r in done if r.job.part == part)
    record["against"] = {
        label: {name: stands(record["budgets"][name], label, name) for name in budgets} for label in OURS
    }
    return record


def curves_of(record: dict[str, Any], job: Job, budgets: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """The curves of a record in which a job's are, by label and kind."""
    if job.part in ("scratch", "choices"):
        return record[job.part].get(job.data, {})
    name = next(name for name, amounts in budgets.items() if job.budget in amounts)
    return record["budgets"][name].get(job.data, {})


def rivals_of(data: str, budget: str, kind: str) -> Curves:
    """The curves of the study `compare` on a set at a budget, the untrained teacher's included."""
    record = json.loads((RESULTS / "compare.json").read_text(encoding="utf-8"))
    curves = {**record["free"].get(data, {}), **record["budgets"][budget]["main"].get(data, {})}
    ending = " coupling" if kind == "endpoint" else ""
    found = {}
    for label, curve in curves.items():
        plain = label.removesuffix(ending)
        if label == plain + ending and not plain.endswith(NO_METHOD):
            found[plain] = {int(n): entry for n, entry in curve.items()}
    return found


def kind_of(data: str) -> str:
    """What decides on a testbed."""
    return "endpoint" if data == FLUX else "sw2"


def stands(sets: dict[str, Curves], label: str, budget: str) -> dict[str, dict[int, dict[str, Any]]]:
    """{set: {steps: {"ours", "rival", "name", "word"}}}: against the best rival at that step count.

    first: lower mean; level: within the two deviations over the seeds together (5 % of each where there is
    one seed); else behind.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for data, curves in sets.items():
        rivals = rivals_of(data, budget, kind_of(data))
        curve = curves.get(f"{label} {kind_of(data)}", {})
        for n in [n for n in curve if data != FLUX or n in FLUX_STEPS]:
            at_n = {name: rival[n] for name, rival in rivals.items() if n in rival}
            if at_n:
                name = min(at_n, key=lambda name: at_n[name]["mean"])
                found.setdefault(data, {})[n] = stand(curve[n], at_n[name], name)
    return found


def stand(ours: dict, rival: dict, name: str) -> dict[str, Any]:
    """One place, in numbers and a word."""
    width = sum(0.05 * e["mean"] if e["spread"] is None else e["spread"] for e in (ours, rival))
    apart = ours["mean"] - rival["mean"]
    word = "level" if abs(apart) <= width else "first" if apart < 0 else "behind"
    return {"ours": ours["mean"], "rival": rival["mean"], "name": name, "word": word}


def count_words(against: dict[str, dict[str, dict]], on_flux: bool) -> dict[str, int]:
    """{word: how often} over budgets and sets of one testbed; `lowest`: how often the mean is the lowest."""
    places = [
        place
        for sets in against.values()
        for data, of_set in sets.items()
        if (data == FLUX) == on_flux
        for place in of_set.values()
    ]
    counts = {word: sum(p["word"] == word for p in places) for word in ("first", "level", "behind")}
    return counts | {"lowest": sum(p["ours"] < p["rival"] for p in places)}


def plot(record: dict[str, Any], path: str | Path) -> None:
    """A row for each budget, a column for each set: the quality, on the tiny Flux the endpoints."""
    sets = sorted({data for of_budget in record["budgets"].values() for data in of_budget}, key=str.lower)
    figure, axes = canvas(len(record["budgets"]), len(sets), (4.3 * len(sets), 3.3 * len(record["budgets"])))
    for row, (name, of_budget) in zip(axes, record["budgets"].items(), strict=True):
        for ax, data in zip(row, sets, strict=True):
            if data not in of_budget:
                ax.axis("off")
                continue
            draw(ax, of_budget[data], data, name)
    lines = labelled_handles(axes.flat)
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncol=4, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    save(figure, path)


def draw(ax: Any, ours: Curves, data: str, budget: str) -> None:
    kind = kind_of(data)
    rivals = rivals_of(data, budget, kind)
    steps = FLUX_STEPS if data == FLUX else STEPS
    for label in SHOWN:
        if label in rivals and (label != ON_FLUX_ALONE or data == FLUX):
            curve = {n: e for n, e in rivals[label].items() if n in steps and e["mean"] > 0}
            plot_curve(ax, curve, **look(label), ms=3, lw=1, elinewidth=0.6, label=label)
    for label, style in OURS.items():
        curve = {n: e for n, e in ours.get(f"{label} {kind}", {}).items() if n in steps}
        plot_curve(ax, curve, **style, ms=4, lw=2, elinewidth=0.8, label=f"scale trained in, {label}")
    step_axes(ax, steps, f"{data}, {budget} budget", LEVELS)
    ax.set_ylabel("distance to the teacher's endpoints" if data == FLUX else "SW2 to the data")


def text(record: dict[str, Any]) -> str:
    """All curves by budget, the choices, and the words counted."""
    parts = []
    for name, of_budget in record["budgets"].items():
        parts += [f"{name} budget", table(of_budget)]
    parts += ["from scratch", table(record["scratch"]), "choices", table(record["choices"])]
    for label, against in record["against"].items():
        for on_flux in (False, True):
            where = FLUX if on_flux else "plane"
            parts.append(f"{label}, {where}: {count_words(against, on_flux)}")
    return "\n".join(parts)


def table(sets: dict[str, Curves]) -> str:
    """A block for each set, a line for each curve."""
    lines = []
    for data, curves in sets.items():
        lines += ["", f"{data:40}" + "".join(f"{n:8}" for n in STEPS)]
        for label, curve in curves.items():
            means = [f"{curve[n]['mean']:8.3f}" if n in curve else f"{'-':>8}" for n in STEPS]
            lines.append(f"{label:40}" + "".join(means))
    return "\n".join(lines)
