"""The record, the verdicts and the figure of the study `variants`, from its results."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.figures import canvas, labelled_handles, save
from experiments.runner import Result

MARGIN, WORSE = 0.9, 0.01  # a gain is a tenth or more; so much accuracy may be lost
KINDS, TINY = ("endpoints", "quality"), 1e-9
MARKS = (0.7, 0.8, 0.9, 1, 1.2, 1.5, 2)  # of the axis


def gather(results: Sequence[Result]) -> dict[str, Any]:
    """worlds: {part: {variant: {set: what was measured}}}; ratios: {variant: {part: {kind: times the base,
    ...}}}; chance: {part: the smallest ratio of the base's other seeds}; wins: [variant].
    """
    worlds: dict[str, dict] = {}
    for job, value, *_ in results:
        if value is not None:
            worlds.setdefault(job.part, {}).setdefault(job.label, {})[job.data] = value
    labels = [label for label in dict.fromkeys(job.label for job, *_ in results) if label != "base"]
    ratios = {label: {part: against(world, label) for part, world in worlds.items()} for label in labels}
    ratios = {label: {part: found for part, found in of.items() if found} for label, of in ratios.items()}
    chance = {part: chance_of(part, ratios) for part in worlds}
    wins = [
        label
        for label, of in ratios.items()
        if not is_base(label)
        and len(of) > 1
        and all(gains(found, chance[part]) for part, found in of.items())
    ]
    return {"worlds": worlds, "ratios": ratios, "chance": chance, "wins": wins}


def is_base(label: str) -> bool:
    return label.startswith("base")


def chance_of(part: str, ratios: dict[str, dict]) -> float:
    """The smallest ratio of the base's other seeds; 1 where none is smaller."""
    seeds = [of[part]["endpoints"] for label, of in ratios.items() if is_base(label) and part in of]
    return min([1.0, *seeds])


def against(world: dict[str, dict], label: str) -> dict[str, Any]:
    """{kind: geometric mean over sets and step counts of the variant's distance over the base's;
    accuracy_lost: the largest fall of it; end_of_table: whether a chosen scale is the largest}; {} where a
    measurement is missing.
    """
    mine, base = world.get(label, {}), world.get("base", {})
    if not mine or mine.keys() != base.keys():
        return {}
    ratios = {
        kind: geometric_mean(
            max(mine[data][kind][n], TINY) / max(base[data][kind][n], TINY)
            for data in base
            for n in base[data][kind]
        )
        for kind in KINDS
    }
    falls = [
        base[data]["accuracy"][n] - mine[data]["accuracy"][n]
        for data in base
        for n in base[data].get("accuracy", {})
    ]
    return ratios | {
        "accuracy_lost": max(falls, default=None),
        "end_of_table": any(of_set["at_the_end"] for of_set in mine.values()),
    }


def geometric_mean(numbers: Iterable[float]) -> float:
    logs = [math.log(number) for number in numbers]
    return math.exp(sum(logs) / len(logs))


def gains(found: dict[str, Any], chance: float) -> bool:
    """Whether the endpoints come nearer by the margin and by more than chance does, and the quality holds:
    where accuracy was measured it decides.
    """
    lost = found["accuracy_lost"]
    holds = found["quality"] < 1 / MARGIN if lost is None else lost <= WORSE
    return found["endpoints"] <= MARGIN and found["endpoints"] < chance and holds


def text(record: dict[str, Any]) -> str:
    """All ratios as a table; below it those that win in both worlds."""
    columns = [(part, kind) for part in record["worlds"] for kind in KINDS]
    lines = [
        "times the base (damped models, k/N .2, on its dial), geometric mean over 2, 3, 4 and 8 steps; "
        "below 1 is better; > the dial stood at its end",
        f"{'':34}" + "".join(f"{f'{part}, {kind}':>22}" for part, kind in columns),
    ]
    for label, found in record["ratios"].items():
        cells = [ratio_text(found.get(part), kind) for part, kind in columns]
        lines.append(f"{label:34}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join([*lines, "wins on both: " + (", ".join(record["wins"]) or "none")])


def ratio_text(found: dict[str, Any] | None, kind: str) -> str:
    return f"{found[kind]:.3f}{'>' if found['end_of_table'] else ' '}" if found else "- "


def plot(record: dict[str, Any], path: str | Path) -> None:
    """A line for each variant: full marks the distance to the teacher's endpoints, hollow the quality; 1 is
    the base, grey what its seeds do.
    """
    ratios = dict(reversed(record["ratios"].items()))
    figure, ((ax,),) = canvas(1, 1, (7.5, 0.32 * len(ratios) + 1.4))
    for row, found in enumerate(ratios.values()):
        for i, part in enumerate(record["worlds"]):
            for kind in KINDS if part in found else ():
                style = {"color": f"C{i}", "mfc": f"C{i}" if kind == "endpoints" else "none", "ms": 6}
                ax.plot(found[part][kind], row, "os"[i], label=f"{part}, {kind}", **style)
    least = min(record["chance"].values(), default=1.0)
    ax.axvspan(least, 1 / least, color=".92", lw=0)
    ax.axvline(1, color="k", lw=0.8)
    ax.set(
        yticks=range(len(ratios)),
        yticklabels=list(ratios),
        xscale="log",
        xlabel="times the base, 2 to 8 steps (below 1 is better)",
    )
    ax.set_xticks(MARKS, MARKS)
    ax.minorticks_off()
    ax.grid(axis="y", alpha=0.3)
    handles = labelled_handles([ax])
    ax.legend(handles.values(), handles, fontsize=7, loc="best")
    figure.tight_layout()
    save(figure, path)
