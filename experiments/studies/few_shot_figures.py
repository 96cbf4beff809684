"""The figures of the study `few_shot`, from its record."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.figures import TEACHER, canvas, labelled_handles, level_axis, look, save
from experiments.studies.few_shot_report import ALL, DIALLED, METRICS, SCFM, TUNED, steps_of

# marks of a logarithmic axis
LEVELS = (0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2)
STYLES = {SCFM: look("SCFM raw"), DIALLED: look("SCFM, dialled"), TUNED: look("fine-tuning")}
SUMMARY = ("checkerboard", "moons", "8 gaussians", "tiny Flux, held-out pairs")


def plot(record: dict[str, Any], part: str, path: str | Path) -> None:
    """A row for each world and metric of a part, a column for each number of steps: means and 95 % intervals
    by size.
    """
    judged = [metric for metric, (sign, _) in METRICS[part].items() if sign]
    worlds = {
        name: world for name, world in record["worlds"].items() if world["part"] == part and world["methods"]
    }
    draw(worlds, [(name, metric) for name in worlds for metric in judged], path)


def plot_summary(record: dict[str, Any], path: str | Path) -> None:
    """The distance to the teacher's endpoints alone, on those of `SUMMARY` that were measured; nothing where
    none was.
    """
    worlds = {name: world for name, world in record["worlds"].items() if name in SUMMARY and world["methods"]}
    if worlds:
        draw(worlds, [(name, "endpoint") for name in worlds], path)


def draw(worlds: dict[str, dict], rows: Sequence[tuple[str, str]], path: str | Path) -> None:
    """A figure of panels. rows: [(world, metric)]."""
    steps, sizes, high = steps_of(worlds.values()), sizes_of(worlds.values()), 2.1 * len(rows) + 0.6
    figure, axes = canvas(len(rows), len(steps), (3.2 * len(steps), high))
    for line, (name, metric) in zip(axes, rows, strict=True):
        for ax, n in zip(line, steps, strict=True):
            panel(ax, worlds[name], sizes, n, metric)
            ax.set_title(f"{name}, {n} steps", fontsize=8)
        line[0].set_ylabel(metric, fontsize=8)
    handles = labelled_handles(axes.flat)
    figure.legend(handles.values(), handles, loc="lower center", ncol=5, fontsize=8)
    figure.tight_layout(rect=(0, 0.5 / high, 1, 1))
    save(figure, path)


def sizes_of(worlds: Iterable[dict]) -> list[str]:
    """The sizes that there are, `all` last."""
    there = {size for world in worlds for sizes in world["methods"].values() for size in sizes}
    return sorted(there - {ALL}, key=int) + [ALL] * (ALL in there)


def panel(ax: Any, world: dict[str, Any], sizes: Sequence[str], n: str, metric: str) -> None:
    """One metric at one number of steps against the number of images."""
    for method, style in STYLES.items():
        entry = {
            size: curve[n][metric] for size, curve in world["methods"].get(method, {}).items() if n in curve
        }
        there = [size for size in sizes if size in entry]
        means, halves = ([entry[size][name] or 0 for size in there] for name in ("mean", "half"))
        places = [sizes.index(size) for size in there]
        ax.errorbar(places, means, halves, **style, ms=3, lw=1, capsize=2, label=method)
    if n in world["teacher"]:
        ax.axhline(
            world["teacher"][n][metric], color=TEACHER["color"], lw=0.8, ls=":", label="teacher, untouched"
        )
    if metric in world["floor"]:
        ax.axhline(world["floor"][metric], color="k", lw=0.8, label="fresh data")
    ax.set_xticks(range(len(sizes)), sizes)
    ax.tick_params(labelsize=7)
    # fine-tuning is many times above the rest
    if metric in ("sw2", "endpoint") and ax.dataLim.intervaly.min() > 1e-6:
        ax.set_yscale("log")
        level_axis(ax, LEVELS)
