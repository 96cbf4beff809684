"""What the figures of several studies share. matplotlib is imported where something is drawn."""

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from scfm.files import atomic_write
from toy.palette import few_colours

LEVELS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1)  # marks of the axis of SW2

# One colour and one marker for each, as in toy/plots.py. SCFM without the trained scale is a paler student;
# the rivals share the marker and differ in colour.
TEACHER = {"color": "#777777", "marker": "s"}
STUDENT = {"color": "#c62828", "marker": "o"}
EMA = {"color": "#1f5a96", "marker": "^"}
RIVAL = {"color": "#2e7d32", "marker": "D"}
SCFM = {"color": "#e57373", "marker": "o"}
SHADES = {"1/8": "#f4a6a6", "1/2": "#ad5f5f", "distilled": "#c2627f", "lora": "#d99ab0"}  # of SCFM, by a word
RIVALS = {
    "reflow": "#5d4037",
    "progressive": RIVAL["color"],
    "consistency": "#00838f",
    "shortcut": "#8d6e00",
    "meanflow": "#7b1fa2",
    "fine-tuning": RIVAL["color"],
}
OPEN = {"mfc": "none", "ls": "--"}
LOOKS = {"euler": {}, "midpoint": OPEN, "heun": {"mfc": "none", "ls": ":"}, "multistep": {"ls": "-."}}


def look(label: str) -> dict[str, Any]:
    """Colour, marker and line of a curve by its name, such as "teacher midpoint" or "SCFM, tuned dialled".

    ValueError for a name of which nothing is known.
    """
    words = label.lower().replace(",", " ").split()
    if words[0] == "scale" or "step_scaled" in words:  # the scale trained in; from scratch: open
        return STUDENT | (OPEN if words[0] == "step_scaled" else {})
    shade = next(({"color": SHADES[word]} for word in words if word in SHADES), {})
    if words[0] == "scfm" or {"distilled", "lora"} & set(words):
        raw = words[-1] in ("raw", "distilled", "lora")
        return SCFM | shade | (OPEN if raw else {"ls": ":"} if "damped" in words else {})
    if words[0] in ("teacher", "plain"):
        return TEACHER | next((LOOKS[word] for word in words if word in LOOKS), {})
    if words[0] in RIVALS:
        return RIVAL | {"color": RIVALS[words[0]]}
    raise ValueError(f"no look for {label!r}: teacher, SCFM or one of {', '.join(RIVALS)} comes first")


def headless_pyplot() -> Any:
    """pyplot for writing files, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def canvas(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """(figure, axes (rows, columns)) of a size in inches."""
    return headless_pyplot().subplots(rows, columns, figsize=size, squeeze=False)


def stacked_canvas(heights: Iterable[float], columns: int, **grid: Any) -> tuple[Any, Any]:
    """(figure, axes) 13 inches wide, of rows so many inches high. grid: for matplotlib's gridspec."""
    gap, heights = 0.55, list(heights)
    total = sum(heights) + gap * (len(heights) + 1)
    margins = {
        "left": 0.12,
        "right": 0.89,
        "bottom": gap / total,
        "top": 1 - gap / total,
        "wspace": 0.13,
        "hspace": gap * len(heights) / sum(heights),
        "height_ratios": heights,
    }
    return headless_pyplot().subplots(
        len(heights), columns, figsize=(13, total), squeeze=False, gridspec_kw=margins | grid
    )


def save(figure: Any, path: str | Path) -> None:
    """A PNG file, whole or not at all, at 120 dots an inch."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    atomic_write(Path(path), lambda new: few_colours(Image.open(buffer)).save(new, "png", optimize=True))


def level_axis(ax: Any, levels: Sequence[float], **style: Any) -> None:
    """Marks of a logarithmic y axis as plain numbers, its limits as they were."""
    limits = ax.get_ylim()
    ax.set_yticks(levels, [f"{level:g}" for level in levels], **style)
    ax.minorticks_off()
    ax.set_ylim(limits)


def step_axes(ax: Any, steps: Sequence[int], title: str, levels: Sequence[float] = LEVELS) -> None:
    """A quality, SW2 unless the caller says otherwise, against network evaluations, both logarithmic."""
    ax.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="SW2 to the data")
    ax.set_xticks(steps, steps)
    level_axis(ax, levels)
    ax.set_title(title, fontsize=9)


def plot_curve(ax: Any, curve: dict[int, dict], **style: Any) -> None:
    """Means over the steps, and spreads as bars."""
    entries = curve.values()
    ax.errorbar(list(curve), [e["mean"] for e in entries], [e["spread"] or 0 for e in entries], **style)


def labelled_handles(axes: Iterable[Any]) -> dict[str, Any]:
    """{label: line} of all axes, each label once."""
    pairs = [pair for ax in axes for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
    return {label: line for line, label in pairs}


def heat_map(
    ax: Any, rows: Sequence, columns: Sequence, values: dict, title: str, by_column: bool = True
) -> None:
    """The numbers themselves, the darker the further from the best: of the column, or of all.

    values: {(row, column): number}. "far": a student that has run away."""
    best = {
        c: min((v for (_, at), v in values.items() if at == c or not by_column), default=1.0) for c in columns
    }
    shade = [
        [math.log2(values[r, c] / best[c]) if (r, c) in values else math.nan for c in columns] for r in rows
    ]
    ax.imshow(shade, cmap="Oranges", vmin=0, vmax=3, aspect="auto")  # at 8 times the best it is darkest
    for (r, c), value in values.items():
        y, x = rows.index(r), columns.index(c)
        text = f"{value:.3f}".lstrip("0") if value < 10 else "far"
        ax.text(x, y, text, ha="center", va="center", fontsize=8, color="w" if shade[y][x] > 2 else "k")
    ax.set_xticks(range(len(columns)), columns, fontsize=8)
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
    ax.tick_params(length=0)
    ax.set_title(title, fontsize=9)
