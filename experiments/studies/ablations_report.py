"""The record, the tables and the figures of the study `ablations`, from its results; its chapter draws with
them too.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.figures import heat_map, level_axis, save, stacked_canvas
from experiments.runner import Result

SCORED = (2, 3, 4, 8)  # the step counts of a score
KINDS = ("raw", "dialled")
READ = ("student", "ema_slow")  # who is measured on the tiny Flux
LEVELS = (0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1)  # marks of the axis of the score
GRID_COLUMNS = (("raw", 3), ("raw", 8), ("dialled", 3), ("dialled", 8))
Values = dict[str, dict]  # label -> what a run gave


def gather(results: Sequence[Result]) -> dict[str, Any]:
    """floor, teacher: set -> ...; plane: family -> set -> label -> what a run gave; grids: "first, second" ->
    first -> second -> ...; flux: family -> label -> ...; flux_teacher. Step counts are text, as in a JSON
    file.
    """
    parts = ("floor", "teacher", "plane", "grids", "flux", "flux_teacher")
    record: dict[str, Any] = {part: {} for part in parts}
    for job, value, *_ in results:
        if value is None:
            continue
        value = rounded(value)
        if job.family == "teacher" and job.part == "flux":
            record["flux_teacher"] = value
        elif job.family in ("teacher", "floor"):
            record[job.family][job.data] = value
        elif job.part == "grids":
            first, second = job.label.split("|")
            record["grids"].setdefault(job.family, {}).setdefault(first, {})[second] = value
        elif job.part == "flux":
            record["flux"].setdefault(job.family, {})[job.label] = value
        else:
            record["plane"].setdefault(job.family, {}).setdefault(job.data, {})[job.label] = value
    return record


def rounded(value: Any) -> Any:
    """Numbers to five digits, keys as text, all the way down."""
    if isinstance(value, dict):
        return {str(key): rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part) for part in value]
    return round(value, 5) if isinstance(value, float) else value


def last(value: dict[str, Any]) -> dict[str, Any]:
    """What the last look at a run gave."""
    return value["looks"][max(value["looks"], key=int)]


def score(curve: dict[str, float]) -> float:
    """The geometric mean of a curve {steps: SW2} at `SCORED`."""
    return math.exp(statistics.mean(math.log(curve[str(n)]) for n in SCORED))


def most_sensitive(
    results: Sequence[Result], candidates: dict[str, Any], data: str, small: bool = False
) -> tuple[list[dict], tuple[str, ...]]:
    """([{"family", "raw", "dialled", "beyond_chance"}, ...] from the largest dialled span down, the first two
    or ()).

    candidates: family -> the labels that count. The span of a family is the mean over `SCORED` of log(worst /
    best) over these after the last training step; beyond chance: twice that of the family `seed` or more. A
    family that is not whole is left out, and then nothing is chosen. small: fewer labels will do, as in a
    smoke run.
    """
    whole = whole_families(results, candidates, data, small)
    chance = span(whole.pop("seed"), "dialled") if "seed" in whole else 0.0
    spans = {family: {kind: span(looks, kind) for kind in KINDS} for family, looks in whole.items()}
    ranked = [
        {"family": family, **of_kinds, "beyond_chance": of_kinds["dialled"] >= 2 * chance}
        for family, of_kinds in sorted(spans.items(), key=lambda pair: -pair[1]["dialled"])
    ]
    return ranked, tuple(row["family"] for row in ranked[:2]) if set(whole) == set(candidates) else ()


def whole_families(
    results: Sequence[Result], candidates: dict[str, Any], data: str, small: bool
) -> dict[str, dict]:
    """family -> label -> the last look, of those families whose labels that count have all been measured."""
    found: dict[str, dict] = {}
    for job, value, *_ in results:
        counted = {**candidates, "seed": (job.label,)}.get(job.family, ())
        if job.part == "plane" and job.data == data and job.label in counted:
            found.setdefault(job.family, {})[job.label] = value and last(rounded(value))
    return {
        family: looks
        for family, looks in found.items()
        if all(looks.values()) and (small or len(looks) >= len(candidates.get(family, looks)))
    }


def span(looks: dict[str, dict], kind: str) -> float:
    columns = [[look[kind][str(n)] for look in looks.values()] for n in SCORED]
    return round(statistics.mean(math.log(max(column) / min(column)) for column in columns), 4)


# As text


def text(record: dict[str, Any]) -> str:
    """Every family's last look: raw, dialled."""
    lines = []
    for family, sets in record["plane"].items():
        for data, values in sets.items():
            lines += ["", f"{family}, {data}", *table(values)]
    for grid, rows in record["grids"].items():
        lines += ["", f"{grid}: score raw, dialled", *grid_table(rows)]
    for family, values in record["flux"].items():
        lines += ["", f"{family}, tiny Flux, slow EMA", *table(of_all("ema_slow", values))]
    lines += ["", "span of log SW2 over the values tried", *map(sensitivity_text, record["sensitivity"])]
    return "\n".join(lines)


def sensitivity_text(row: dict[str, Any]) -> str:
    note = "" if row["beyond_chance"] else "   (not told from three seeds)"
    return f"  {row['family']:20} raw {row['raw']:.2f}, dialled {row['dialled']:.2f}{note}"


def grid_table(rows: dict[str, Values]) -> list[str]:
    return [
        f"  {a:>12} {b:>12}" + "".join(f"{score(last(value)[kind]):8.3f}" for kind in KINDS)
        for a, row in rows.items()
        for b, value in row.items()
    ]


def table(values: Values) -> list[str]:
    """A line for each value: raw and dialled at each step count, after the last training step."""
    steps = list(last(next(iter(values.values())))["raw"])
    counts = "".join(f"{n:>8}" for n in steps)
    lines = [f"{'':24}{counts}   dialled{counts}"]
    for label, value in values.items():
        raw, dialled = ("".join(f"{last(value)[kind][n]:8.3f}" for n in steps) for kind in KINDS)
        lines.append(f"{label:24}{raw}          {dialled}")
    return lines


def of(who: str, value: dict[str, Any]) -> dict[str, Any]:
    """A run of the tiny Flux as one of the plane: who is read out."""
    return {**value, "looks": {steps: look[who] for steps, look in value["looks"].items()}}


def of_all(who: str, values: Values) -> Values:
    return {label: of(who, value) for label, value in values.items()}


# As figures. Each `show_` draws into axes that it is given.


def show_last(ax: Any, values: Values, title: str) -> None:
    """A heat map of a family after the last training step: raw on the left, dialled (*) on the right."""
    looks = {label: last(value) for label, value in values.items()}
    steps, marks = list(next(iter(looks.values()))["raw"]), dict(zip(KINDS, ("", "*"), strict=True))
    columns = [f"{n}{mark}" for mark in marks.values() for n in steps]
    numbers = {
        (label, n + mark): look[kind][n]
        for label, look in looks.items()
        for kind, mark in marks.items()
        for n in steps
    }
    heat_map(ax, list(looks), columns, numbers, title)
    ax.axvline(len(steps) - 0.5, color="w", lw=3)


def scores_of(values: Values, kind: str) -> dict[str, list[float]]:
    """{label: the score at each look}."""
    return {label: [score(look[kind]) for look in value["looks"].values()] for label, value in values.items()}


def named(values: Values) -> list[str]:
    """The values whose lines have colours: all of up to four, else the first, and in the end, dialled, the
    best and the worst.
    """
    lines = scores_of(values, KINDS[-1])
    ends = sorted(lines, key=lambda label: lines[label][-1])
    return list(lines) if len(lines) <= 4 else list(dict.fromkeys([next(iter(lines)), ends[0], ends[-1]]))


def show_iterations(ax: Any, values: Values, kind: str, title: str) -> None:
    """The score against the training steps done, a line for each value; grey where it is not `named`."""
    colors = {label: f"C{i}" for i, label in enumerate(named(values))}
    looks = next(iter(values.values()))["looks"]
    for label, scores in scores_of(values, kind).items():
        style = {"color": colors.get(label, "#cccccc"), "zorder": 1 + (label in colors)}
        ax.plot([int(n) for n in looks], scores, "o-", ms=3, lw=1, **style)
    for label, color in colors.items():
        ax.plot([], [], "o-", ms=3, color=color, label=label)
    ax.set(xscale="log", yscale="log")
    ax.set_xticks([int(n) for n in looks], looks, fontsize=8)
    ax.set_title(title, fontsize=9)


def show_family(axes: Sequence[Any], values: Values, title: str) -> None:
    """Three axes: the last look, and the score by iterations, raw and dialled, on one scale."""
    show_last(axes[0], values, title)
    axes[2].sharey(axes[1])
    for ax, kind in zip(axes[1:], KINDS, strict=True):
        show_iterations(ax, values, kind, f"{kind}, by steps done")
    level_axis(axes[1], LEVELS, fontsize=8)  # of both, as they share it
    axes[2].minorticks_off()
    axes[2].tick_params(labelleft=False)
    axes[2].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def show_grid(axes: Sequence[Any], name: str, rows: dict[str, Values]) -> None:
    """Four axes: SW2 raw and dialled at 3 and 8 steps, of two settings against each other."""
    first, second = name.split(", ")
    columns = list(dict.fromkeys(b for row in rows.values() for b in row))
    for ax, (kind, n) in zip(axes, GRID_COLUMNS, strict=True):
        values = {(a, b): last(value)[kind][str(n)] for a, row in rows.items() for b, value in row.items()}
        heat_map(ax, list(rows), columns, values, f"{kind}, {n} steps", by_column=False)
        ax.set_xlabel(second, fontsize=8)
    axes[0].set_ylabel(first, fontsize=8)


def show_flux(axes: Sequence[Any], values: Values, title: str) -> None:
    """Two axes: student and slow EMA after the last training step."""
    for ax, who in zip(axes, READ, strict=True):
        show_last(ax, of_all(who, values), f"{title}, {who}")


def height(values: Values) -> float:
    """Inches of a row with so many labels."""
    return max(0.9, 0.19 * len(values))


def plot_families(record: dict[str, Any], path: str | Path) -> None:
    """A row for each family and set."""
    shown = [
        (f"{family}, {data}: SW2 by steps (*: dialled)", values)
        for family, sets in record["plane"].items()
        for data, values in sets.items()
    ]
    heights = [height(values) for _, values in shown]
    plot_rows(show_family, shown, heights, path, 3, width_ratios=(2, 1, 1))


def plot_grids(record: dict[str, Any], path: str | Path) -> None:
    """A row for each pair of settings."""
    grids = list(record["grids"].items())

    def show(axes: Sequence[Any], rows: dict[str, Values], name: str) -> None:
        show_grid(axes, name, rows)

    plot_rows(show, grids, [1.4] * len(grids), path, len(GRID_COLUMNS))


def plot_flux(record: dict[str, Any], path: str | Path) -> None:
    """A row for each family of the tiny Flux."""
    shown = [
        (f"{family}: endpoint distance (*: dialled)", values) for family, values in record["flux"].items()
    ]
    plot_rows(show_flux, shown, [height(values) for _, values in shown], path, 2)


def plot_rows(
    show: Callable,
    shown: Sequence[tuple[str, dict]],
    heights: Sequence[float],
    path: str | Path,
    columns: int,
    **grid: Any,
) -> None:
    """A figure with a row for each (title, values), drawn by show(axes, values, title); none where nothing is
    shown.
    """
    if shown:
        figure, axes = stacked_canvas(heights, columns, **grid)
        for row, (title, values) in zip(axes, shown, strict=True):
            show(row, values, title)
        save(figure, path)
