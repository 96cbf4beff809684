"""The record, the verdicts and the figures of the study `plane`, from its results."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.curves import curve_table, gather_curves
from experiments.figures import OPEN, STUDENT, canvas, look, plot_curve, save, step_axes
from experiments.runner import Result
from scfm.method.lora_scale import STEPS

AIMS = {"checkerboard": {3: 0.045, 4: 0.040, 8: 0.033}}  # SW2 that the dialled student should reach
RECOMMENDED = "damped, k/N .2"
RIVALS, MARGIN = ("teacher euler", "teacher midpoint"), 1.05
CHOOSERS = ("endpoints", "median endpoint", "cloud")


def gather(results: Sequence[Result]) -> dict[str, Any]:
    """The numbers of all measurements: `main` has curve -> step count -> mean, spread over seeds,
    every seed."""
    record: dict[str, Any] = {"floor": {}, "main": {}, "ablations": {}, "choosers": {}, "teacher shift": {}}
    done = [result for result in results if result.value is not None]
    for job, value, *_ in done:
        if job.family == "choosers":
            record["choosers"].setdefault(job.data, {})[job.seed] = value
        elif job.family in record:  # floor, teacher shift: one value for a set
            record[job.family][job.data] = value
        elif job.part == "ablations":
            record["ablations"].setdefault(job.family, {})[job.label] = value
    curves = [result for result in done if result.job.part == "main" and result.job.family != "floor"]
    return record | {"main": gather_curves(curves)}


def targets(record: dict[str, Any]) -> dict[str, dict]:
    """{recipe: the aims beside what its dialled students reached}, and how often the dial stood on the
    teacher.
    """
    recipes = dict.fromkeys(
        name.removesuffix(" dialled")
        for curves in record["main"].values()
        for name in curves
        if name.endswith(" dialled")
    )
    return {recipe: targets_of(recipe, record) for recipe in recipes}


def targets_of(recipe: str, record: dict[str, Any]) -> dict[str, Any]:
    against, aims, chosen = [], [], []
    for data, curves in record["main"].items():
        if not {f"{recipe} dialled", *RIVALS} <= curves.keys() or data not in record["floor"]:
            continue
        dialled, band = curves[f"{recipe} dialled"], record["floor"][data]["high"]
        against += [against_rival(data, n, dialled[n], curves, band) for n in STEPS if n >= 3]
        for n, aim in AIMS.get(data, {}).items():
            ours = dialled[n]["mean"]
            aims.append({"data": data, "evaluations": n, "dialled": ours, "aim": aim, "met": ours <= aim})
        chosen += [s for entry in curves[f"{recipe} scales"].values() for s in entry["seeds"]]
    return {
        "against_teacher": against,
        "aims": aims,
        "scale_0_chosen": chosen.count(0),
        "scales_chosen": len(chosen),
    }


def against_rival(data: str, n: int, dialled: dict, curves: dict, band: float) -> dict[str, Any]:
    """The rival is the best that the teacher does in at most n evaluations, on as many seeds as the recipe
    has.
    """
    ours, seeds = dialled["mean"], len(dialled["seeds"])
    rival, name = min(
        (statistics.mean(entry["seeds"][:seeds]), f"{name} {m}")
        for name in RIVALS
        for m, entry in curves[name].items()
        if m <= n
    )
    return {
        "data": data,
        "evaluations": n,
        "dialled": ours,
        "rival": name,
        "teacher": rival,
        "seeds": seeds,
        "ratio": ours / rival,
        "band": band,
        "met": ours <= max(MARGIN * rival, band),
        "met_without_the_band": ours <= MARGIN * rival,
    }


def table(record: dict[str, Any]) -> str:
    """The main numbers and the verdicts as text."""
    lines = [curve_table(record["main"], record["floor"])]
    for recipe, found in record["targets"].items():
        both = found["against_teacher"] + found["aims"]
        missed = [target for target in both if not target["met"]]
        lines += [
            "",
            f"{recipe}: {len(missed)} of {len(both)} targets missed; scale 0 chosen "
            f"{found['scale_0_chosen']} times of {found['scales_chosen']}",
        ]
        lines += [
            f"  {t['data']}, {t['evaluations']} evaluations: {t['dialled']:.4f}, "
            + (f"aim {t['aim']}" if "aim" in t else f"{t['rival']} {t['teacher']:.4f}")
            for t in missed
        ]
    return "\n".join(lines)


STYLES = {
    "teacher euler": {**look("teacher euler"), "label": "teacher, Euler"},
    "teacher midpoint": {**look("teacher midpoint"), "label": "teacher, midpoint"},
    "teacher heun": {**look("teacher heun"), "label": "teacher, Heun"},
    "paper raw": {**look("SCFM raw"), "label": "student by the paper, raw"},
    "paper dialled": {**look("SCFM, dialled"), "label": "student by the paper, dialled"},
    "damped dialled": {**look("SCFM, damped"), "label": "damped models, dialled"},
    "damped, k/N .2 raw": {**STUDENT, **OPEN, "label": "damped models, k/N .2, raw"},
    "damped, k/N .2 dialled": {
        **STUDENT,
        "lw": 2,
        "label": "damped models, k/N .2, dialled",
    },
}


def plot(record: dict[str, Any], path: str | Path) -> None:
    """SW2 against evaluations, a panel for each set: mean, and spread over seeds as bars."""
    figure, axes = canvas(1, len(record["main"]), (13, 4.8))
    for ax, (data, curves) in zip(axes[0], record["main"].items(), strict=True):
        for name, style in STYLES.items():
            plot_curve(ax, curves.get(name, {}), capsize=2, **{"ms": 4, "lw": 1, **style})
        if data in record["floor"]:
            floor = record["floor"][data]
            ax.axhspan(
                floor["low"], floor["high"], color="k", alpha=0.1, lw=0, label="data against data, 95 %"
            )
        step_axes(ax, STEPS, data)
    against = record["targets"].get(RECOMMENDED, {}).get("against_teacher", [])
    met = sum(target["met"] for target in against)
    figure.suptitle(
        f"From 3 evaluations on the dialled student ({RECOMMENDED}) is within {MARGIN} times its "
        f"teacher's best, or in the noise, in {met} cases of {len(against)}",
        fontsize=10,
    )
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncol=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    save(figure, path)


def plot_ablations(record: dict[str, Any], path: str | Path) -> None:
    """A panel for each family: dialled as lines, raw as dashes."""
    figure, axes = canvas(3, 4, (14, 9))
    for ax, (family, curves) in zip(axes.flat, record["ablations"].items(), strict=False):
        for i, (label, value) in enumerate(curves.items()):
            steps = list(value["dialled"])
            ax.plot(steps, list(value["dialled"].values()), f"C{i}o-", ms=3, label=label)
            ax.plot(steps, list(value["raw"].values()), f"C{i}--", lw=0.8)
        step_axes(ax, steps, family)
        ax.legend(fontsize=7)
    plot_choosers(record, axes[-1][-1])
    protocol = record["protocol"]
    figure.suptitle(
        f"One thing changed of the paper's recipe: {protocol['ablated']}, seed 0, "
        f"{protocol['ablation_updates']} training steps; lines: dialled, dashes: raw",
        fontsize=10,
    )
    figure.tight_layout()
    save(figure, path)


def plot_choosers(record: dict[str, Any], ax: Any) -> None:
    """What each way of choosing costs: the mean over sets and seeds of its SW2 over that of the best
    scale."""
    cells = [cell for seeds in record["choosers"].values() for cell in seeds.values()]
    for i, name in enumerate(CHOOSERS):
        for style, kind in (("o--", name), ("o-", f"{name}, free")):
            steps = list(cells[0][kind]) if cells else []
            lost = [statistics.mean(c[kind][n][1] / c["best, free"][n][1] for c in cells) for n in steps]
            ax.plot(range(len(steps)), lost, f"C{i}{style}", ms=3, label=kind)
            ax.set_xticks(range(len(steps)), steps)
    ax.set(xlabel="network evaluations", ylabel="SW2 over that of the best scale")
    ax.set_title("ways to choose the scale, damped", fontsize=9)
    ax.set_ylim(0.98, 1.25)
    ax.legend(fontsize=7, ncol=2, loc="upper center")
