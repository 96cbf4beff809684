"""The record, the tables and the figures of the study `compare`, from its results."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.curves import Curves, curve_table, gather_curves
from experiments.figures import (
    LEVELS,
    RIVAL,
    SCFM,
    STUDENT,
    TEACHER,
    canvas,
    labelled_handles,
    look,
    plot_curve,
    save,
    step_axes,
)
from experiments.runner import Result
from experiments.studies import compare_flux, compare_plane
from experiments.testbeds import plane, tiny_flux
from scfm.method.lora_scale import STEPS

FLUX = tiny_flux.NAME
SHOWN = (
    "teacher euler",
    "teacher midpoint",
    "teacher multistep",
    "Reflow raw",
    "progressive own stage",
    "consistency re-noised",
    "Shortcut raw",
    "MeanFlow raw",
    "SCFM, Algorithm 2 raw",
    "SCFM, tuned dialled",
    "SCFM, tuned stepwise",
)
ON_FLUX_ALONE, BOLD = "SCFM, tuned dialled", "SCFM, tuned stepwise"  # the plane has better, and many lines
FLUX_LEVELS = (30, 50, 70, 100, 150, 200, 300, 500, 1000)
BESIDE = ("coupling", "scales", "deviation", "accuracy")  # curves of something else than the quality
NEEDS = {
    "teacher euler": "nothing",
    "teacher midpoint": "nothing",
    "teacher heun": "nothing",
    "teacher multistep": "nothing",
    "Reflow raw": "stored pairs",
    "progressive own stage": "a network a stage",
    "consistency re-noised": "re-noising",
    "consistency raw": "nothing",
    "Shortcut raw": "a second input",
    "MeanFlow raw": "a second input, a JVP",
    "SCFM, Algorithm 2 raw": "nothing",
    "SCFM, Algorithm 2 dialled": "a dial",
    "SCFM, Algorithm 2 stepwise": "a dial for each step",
    "SCFM, Algorithm 1 stepwise": "a dial for each step",
    "SCFM, self grid 2 stepwise": "a dial for each step",
    "SCFM, damped dialled": "a dial",
    "SCFM, tuned dialled": "a dial",
    "SCFM, damped stepwise": "a dial for each step",
    "SCFM, tuned stepwise": "a dial for each step",
}


def gather(
    results: Sequence[Result], sizes: Any, flux_sizes: Any, budgets: dict[str, tuple[int, int]]
) -> dict[str, Any]:
    """floor; free: the teacher's curves; budgets: for each its evaluations, what each method makes of them,
    the curves.

    budgets: {name: (evaluations on the plane, on the tiny Flux)}.
    """
    done = [result for result in results if result.value is not None]
    free = [result for result in done if result.job.budget == 0]
    record = {
        "floor": {r.job.data: r.value for r in free if r.job.family == "floor"},
        "free": gather_curves(r for r in free if r.job.family != "floor"),
        "budgets": {},
    }
    for name, (on_plane, on_flux) in budgets.items():
        planar, captioned = at_budget(results, False, on_plane), at_budget(results, True, on_flux)
        record["budgets"][name] = {
            "evaluations": on_plane,
            "methods": costs(planar, plane.plan, compare_plane.spent, sizes),
            "flux_evaluations": on_flux,
            "flux_methods": costs(captioned, tiny_flux.plan, compare_flux.spent, flux_sizes),
            "main": gather_curves(r for r in (*planar, *captioned) if r.value is not None),
        }
    return record


def at_budget(results: Sequence[Result], on_flux: bool, budget: int) -> list[Result]:
    """What was trained on one testbed at a budget."""
    return [r for r in results if 0 < r.job.budget == budget and (r.job.data == FLUX) == on_flux]


def costs(
    results: Sequence[Result], plan: Callable, spent: Callable, sizes: Any
) -> dict[str, dict[str, int]]:
    """{method: its training steps, its pairs, the evaluations that it really takes}."""
    found = {}
    for method, budget in sorted({(result.job.family, result.job.budget) for result in results}):
        steps, pairs = plan(sizes, method, budget)
        found[method] = {"updates": steps, "pairs": pairs, "evaluations": spent(sizes, method, budget)}
    return found


def quality_axis(data: str) -> str:
    return "Frechet (toy reader, not FID)" if data == FLUX else "SW2 to the data"


def plot(record: dict[str, Any], path: str | Path) -> None:
    """A row for each budget, a column for each set."""
    sets = list(record["free"])
    figure, axes = canvas(len(record["budgets"]), len(sets), (4.4 * len(sets), 10))
    for row, (name, of_budget) in zip(axes, record["budgets"].items(), strict=True):
        for ax, data in zip(row, sets, strict=True):
            if data not in of_budget["main"]:
                ax.axis("off")
                continue
            evaluations = of_budget["flux_evaluations" if data == FLUX else "evaluations"]
            draw(ax, record, of_budget, data, f"{data}, {name} ({evaluations:,} evaluations)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncol=5, fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    save(figure, path)


def plot_summary(record: dict[str, Any], path: str | Path, budget: str = "medium") -> None:
    """One budget at a glance: the sets of the plane, the tiny Flux by two rulers, and the legend. The rivals
    are one thin colour; the scale trained in is from the record of `step_scale` beside the image, if there.
    """
    places = [(data, "") for data in sorted(record["free"], key=lambda data: data == FLUX)]
    places += [(FLUX, " coupling")] * (FLUX in record["free"])
    rows = -(-(len(places) + 1) // 3)
    figure, axes = canvas(rows, 3, (10.8, 3 * rows))
    cells, trained_in = list(axes.flat), scaled_curves(Path(path).parent, budget)
    for ax, (data, kind) in zip(cells, places, strict=False):
        curves = record["free"][data] | record["budgets"][budget]["main"].get(data, {})
        glance(ax, {label: curves.get(label + kind, {}) for label in SHOWN}, data)
        ours = trained_in.get(data, {}).get(f"two differences {kind_of_ours(data, kind)}", {})
        plot_curve(ax, ours, **STUDENT, ms=4, lw=2.2, elinewidth=0.8, label="the scale trained in")
        step_axes(ax, STEPS, data, FLUX_LEVELS if data == FLUX and not kind else LEVELS)
        ax.set_ylabel("distance to its endpoints" if kind else quality_axis(data))
    for ax in cells[len(places) :]:
        ax.axis("off")
    lines = labelled_handles(cells)
    cells[len(places)].legend(lines.values(), lines.keys(), loc="center left", fontsize=9, frameon=False)
    figure.suptitle(f"Few-step methods from one teacher, {budget} budget: lower is better", fontsize=11)
    figure.tight_layout()
    save(figure, path)


def scaled_curves(folder: Path, budget: str) -> dict[str, dict[str, dict[int, Any]]]:
    """{set: the curves of the scale trained in, by label and kind}, of the record in a folder."""
    path = folder / "step_scale.json"
    sets = json.loads(path.read_text(encoding="utf-8"))["budgets"][budget] if path.is_file() else {}
    return {
        data: {name: {int(n): e for n, e in curve.items()} for name, curve in curves.items()}
        for data, curves in sets.items()
    }


def kind_of_ours(data: str, kind: str) -> str:
    """A kind of curve, as the study `step_scale` calls it."""
    if kind:
        return "endpoint"
    return "frechet" if data == FLUX else "sw2"


def glance(ax: Any, curves: Curves, data: str) -> None:
    """The teacher, SCFM at the best scale for each count, and all rivals in one colour."""
    best = ON_FLUX_ALONE if data == FLUX else BOLD
    for label, curve in curves.items():
        curve = {n: e for n, e in curve.items() if e["mean"] > 0}  # no distance at the teacher's own 32
        if label == "teacher euler":
            plot_curve(ax, curve, **TEACHER, ms=4, lw=1.5, label="teacher")
        elif label == best:
            plot_curve(ax, curve, **SCFM, ms=4, lw=1.5, label="SCFM, a scale searched for each count")
        elif curve and not label.startswith(("SCFM", "teacher")):
            style = RIVAL | {"ms": 2.5, "lw": 0.8, "alpha": 0.5}
            plot_curve(ax, curve, **style, label="Reflow, progressive, consistency,\nShortcut, MeanFlow")


def draw(
    ax: Any, record: dict[str, Any], of_budget: dict[str, Any], data: str, title: str, kind: str = ""
) -> None:
    """Every curve of SHOWN that there is. kind: of the curve, such as " coupling"."""
    curves = record["free"][data] | of_budget["main"].get(data, {})
    for label in SHOWN:
        # the tiny Flux's goal is the teacher's own 32 steps: no distance there
        curve = {n: e for n, e in curves.get(label + kind, {}).items() if e["mean"] > 0}
        if curve and (label != ON_FLUX_ALONE or data == FLUX):
            size, width = (5, 2.2) if label == BOLD else (3, 1)
            plot_curve(ax, curve, **look(label), ms=size, lw=width, elinewidth=0.6, label=label)
    floor = record["floor"].get(data) if not kind else None
    if floor:  # one number on the tiny Flux, a band of 95 % on the plane
        low, high = floor["low"] or 0.99 * floor["mean"], floor["high"] or 1.01 * floor["mean"]
        ax.axhspan(low, high, color="k", alpha=0.1, lw=0, label="data against data")
    step_axes(ax, STEPS, title, FLUX_LEVELS if data == FLUX and not kind else LEVELS)
    ax.set_ylabel("distance to the teacher's endpoints" if kind else quality_axis(data))


def quality(curves: Curves) -> Curves:
    return {label: curve for label, curve in curves.items() if not label.endswith(BESIDE)}


def text(record: dict[str, Any]) -> str:
    """All curves of the quality as text, by budget."""
    free = {data: quality(curves) for data, curves in record["free"].items()}
    floors = {data: floor for data, floor in record["floor"].items() if data != FLUX}
    parts = [curve_table(free, floors), flux_floor_text(record)]
    for name, of_budget in record["budgets"].items():
        parts += [
            "\n" + budget_text(name, of_budget),
            curve_table({data: quality(curves) for data, curves in of_budget["main"].items()}, {}),
        ]
    return "\n".join(parts)


def budget_text(name: str, of_budget: dict[str, Any]) -> str:
    return (
        f"{name}: {of_budget['evaluations']:,} evaluations on the plane, "
        f"{of_budget['flux_evaluations']:,} on the tiny Flux"
    )


def flux_floor_text(record: dict[str, Any]) -> str:
    """What the Frechet distance on the tiny Flux cannot get below, as a sentence; empty where it was not
    measured.
    """
    if FLUX not in record["floor"]:
        return ""
    count, floor = record["protocol"]["flux"]["judged"], record["floor"][FLUX]["mean"]
    return f"tiny Flux: {count} images, of which fresh drawings score {floor:.0f}; one seed"


def over_sets(record: dict[str, Any], budget: str, label: str, steps: int) -> tuple[float, bool] | None:
    """Of a curve at a step count: the geometric mean over the plane's sets of its value over the best of all
    curves, and whether it lies on every set within what data score against data. None where it is missing.
    """
    ratios, in_noise = [], True
    for data in (data for data in record["free"] if data != FLUX):
        curves = summary_curves(record, budget, data)
        best = min((c[steps]["mean"] for c in curves.values() if steps in c), default=None)
        if best is None or steps not in curves.get(label, {}):
            return None
        value = curves[label][steps]["mean"]
        ratios.append(value / best)
        in_noise &= data in record["floor"] and value <= record["floor"][data]["high"]
    return (math.exp(sum(map(math.log, ratios)) / len(ratios)), in_noise) if ratios else None


def summary_curves(record: dict[str, Any], budget: str, data: str) -> Curves:
    """The curves that the summary shows, of one set at one budget."""
    curves = record["free"][data] | record["budgets"][budget]["main"].get(data, {})
    return {label: curves[label] for label in NEEDS if label in curves}


def summary(
    record: dict[str, Any], budget: str = "medium", steps: Sequence[int] = (1, 2, 3, 4, 8, 32)
) -> str:
    """One table for a screen: on the plane times the best of that column, on the tiny Flux the Frechet
    distance itself.
    """
    flux = summary_curves(record, budget, FLUX) if FLUX in record["free"] else {}
    width, counts = 7 * len(steps), "".join(f"{n:7}" for n in steps)
    lines = [
        budget_text(budget, record["budgets"][budget]),
        f"{'':26}{'plane: times the best there':^{width}}  {'tiny Flux: Frechet':^{width}}",
        f"{'':26}{counts}  {counts}  needs",
    ]
    for label, needs in NEEDS.items():
        ratios = "".join(ratio_text(over_sets(record, budget, label, n)) for n in steps)
        frechet = "".join(mean_text(flux.get(label, {}).get(n)) for n in steps)
        lines.append(f"{label:26}{ratios}  {frechet}  {needs}")
    note = "= on every set within what data score against data; means of the seeds"
    return "\n".join([*lines, note, flux_floor_text(record)])


def ratio_text(ratio: tuple[float, bool] | None) -> str:
    return f"{ratio[0]:6.2f}{'=' if ratio[1] else ' '}" if ratio else f"{'-':>6} "


def mean_text(entry: dict | None) -> str:
    return f"{entry['mean']:7.0f}" if entry else f"{'-':>7}"
