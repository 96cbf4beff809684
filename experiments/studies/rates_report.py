"""The record, the table and the figure of the study `rates`."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.curves import Curves, gather_curves
from experiments.figures import canvas, labelled_handles, look, plot_curve, save, step_axes
from experiments.runner import Result
from experiments.studies.step_scale_report import count_words, stand
from scfm.method.lora_scale import STEPS

AS_IT_IS = "as it is"


def geometric_mean(numbers: Sequence[float]) -> float:
    """nan where there are none."""
    return math.exp(statistics.mean(map(math.log, numbers))) if numbers else math.nan


def ratio(results: Sequence[Result], label: str, setting: str) -> float:
    """The geometric mean over sets, seeds and step counts of a method's SW2 with a setting over its SW2 as it
    is; nan where one of them is missing or has run away.
    """
    by_key = {(r.job.label, r.job.data, r.job.seed): r.value for r in results}
    ratios = []
    for (name, data, seed), value in by_key.items():
        if name != f"{label}: {setting}":
            continue
        plain = by_key.get((f"{label}: {AS_IT_IS}", data, seed))
        if value is None or plain is None:
            return math.nan
        ratios += [value["sw2"][n] / plain["sw2"][n] for n in value["sw2"]]
    mean = geometric_mean(ratios)
    return mean if math.isfinite(mean) else math.nan


def settings_of(results: Sequence[Result]) -> list[str]:
    """The settings that were tried, in their order."""
    return list(dict.fromkeys(r.job.label.split(": ")[1] for r in results))


def best_settings(results: Sequence[Result], labels: Sequence[str]) -> dict[str, str]:
    """{method: the setting with the lowest mean}; as it is, where nothing is lower."""
    found = {}
    for label in labels:
        means = {s: ratio(results, label, s) for s in settings_of(results) if s != AS_IT_IS}
        better = {s: mean for s, mean in means.items() if mean < 1}
        found[label] = min(better, key=lambda s: better[s]) if better else AS_IT_IS
    return found


def gather(results: Sequence[Result], own: dict[str, str]) -> dict[str, Any]:
    """search: {method: {setting: ratio}} of seed 0; gain: {method: ratio of its own setting} on the others;
    held out: curves.
    """
    searched = [r for r in results if r.job.part == "search"]
    others = [r for r in results if r.job.part != "search"]
    ratios = {
        label: {s: ratio(searched, label, s) for s in settings_of(searched) if s != AS_IT_IS} for label in own
    }
    return {
        "search": {label: {s: finite_or_none(m) for s, m in of.items()} for label, of in ratios.items()},
        "gain": {
            label: 1.0 if s == AS_IT_IS else finite_or_none(ratio(others, label, s))
            for label, s in own.items()
        },
        "held out": gather_curves(r for r in others if r.value is not None),
    }


def places(record: dict[str, Any], ours: str) -> dict[str, dict[int, dict[str, Any]]]:
    """{set: {steps: place of `ours` against the best of the others}}, all with their own settings, as of
    `step_scale_report.stand`; a curve of fewer seeds than the others' is left out.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for data in record["held out"]:
        curves = own_curves(record, data)
        most = max(len(e["seeds"]) for curve in curves.values() for e in curve.values())
        whole = {k: c for k, c in curves.items() if all(len(e["seeds"]) == most for e in c.values())}
        for n, entry in whole.pop(ours, {}).items():
            rivals = {label: curve[n] for label, curve in whole.items() if n in curve}
            if rivals:
                best = min(rivals, key=lambda label: rivals[label]["mean"])
                found.setdefault(data, {})[n] = stand(entry, rivals[best], best)
    return found


def finite_or_none(number: float) -> float | None:
    """Rounded for the record."""
    return round(number, 4) if math.isfinite(number) else None


def own_curves(record: dict[str, Any], data: str) -> Curves:
    """{method: its curve with its own setting} on a set."""
    curves = record["held out"].get(data, {})
    found = {label: curves.get(f"{label}: {setting} sw2") for label, setting in record["own"].items()}
    return {
        label: {int(n): e for n, e in curve.items() if math.isfinite(e["mean"])}
        for label, curve in found.items()
        if curve
    }


def plot(record: dict[str, Any], path: str | Path) -> None:
    """Each method with its own setting, a panel for each set, seeds 1 and 2."""
    sets = list(record["held out"])
    if not sets:
        return
    figure, axes = canvas(1, len(sets), (4.4 * len(sets), 4.2))
    for ax, data in zip(axes[0], sets, strict=True):
        draw(ax, record, data)
    lines = labelled_handles(axes.flat)
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncol=4, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    save(figure, path)


def draw(ax: Any, record: dict[str, Any], data: str) -> None:
    """The panel of a set."""
    for label, curve in own_curves(record, data).items():
        ours = label.startswith("scale")
        plot_curve(ax, curve, **look(label), ms=4, lw=2.5 if ours else 1, elinewidth=0.6, label=label)
    step_axes(ax, STEPS, f"{data}, each method with its own settings")


def text(record: dict[str, Any]) -> str:
    """What the search found, what it gains on the other seeds, and the curves there."""
    lines = ["SW2 over SW2 as it is, seed 0 (geometric mean over sets and step counts)"]
    for label, of_method in record["search"].items():
        shown = "  ".join(f"{s} {'-' if m is None else format(m, '.3f')}" for s, m in of_method.items())
        lines.append(f"{label:18} {shown}")
    lines += ["", "its own, on seeds 1 and 2"]
    lines += [f"{label:18} {setting:20} {record['gain'][label]}" for label, setting in record["own"].items()]
    for data in record["held out"]:
        lines += ["", f"{data:18}" + "".join(f"{n:8}" for n in STEPS)]
        for label, curve in own_curves(record, data).items():
            cells = (f"{curve[n]['mean']:8.3f}" if n in curve else "       -" for n in STEPS)
            lines.append(f"{label:18}" + "".join(cells))
    words = count_words({"medium": record["places"]}, on_flux=False)
    lines += ["", f"the scale trained in against the best of the others, each with its own: {words}"]
    return "\n".join(lines)
