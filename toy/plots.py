"""How the figures of the notebooks look:  from toy.plots import STUDENT, TEACHER, setup;  setup()

One colour and one marker for each of teacher, student, EMA and rival, here and in the figures of
`experiments` (`experiments/figures.py` has the same four; a test holds the two together).
"""

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from IPython import get_ipython
from IPython.display import HTML
from PIL import Image

from toy.palette import few_colours

TEACHER = {"color": "#777777", "marker": "s"}
STUDENT = {"color": "#c62828", "marker": "o"}
EMA = {"color": "#1f5a96", "marker": "^"}
RIVAL = {"color": "#2e7d32", "marker": "D"}
DATA = {"color": "black", "lw": 0.8, "ls": ":"}  # what would be right
POINTS = "#444444"  # a cloud that belongs to none of them


PAGE, FILE = 96, 144  # dots an inch of a page, by which a point is a point, and of what is stored


def setup() -> None:
    """Small figures without frames."""
    style = {"figure.dpi": PAGE, "figure.figsize": (6.4, 2.8), "font.size": 9, "axes.titlesize": 10}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    style |= {"lines.markersize": 4, "legend.fontsize": 8, "image.interpolation": "nearest"}
    plt.rcParams.update(style)
    if shell := get_ipython():
        import matplotlib_inline.backend_inline  # noqa: F401  its own way of drawing would come later

        shell.display_formatter.formatters["image/png"].for_type(plt.Figure, stored)


def stored(figure: plt.Figure) -> tuple[str, dict[str, int]]:
    """A figure as a notebook keeps it: (PNG in base64, its width and height on a page).

    It is sharp when enlarged and on a fine screen, and type has the size that the code says.
    """
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, dpi=FILE, bbox_inches="tight")
    image = few_colours(Image.open(buffer))
    width, height = (round(side * PAGE / FILE) for side in image.size)
    image.save(small, "png", optimize=True)
    return base64.b64encode(small.getvalue()).decode(), {"width": width, "height": height}


def cloud(
    axis: plt.Axes, points: torch.Tensor, title: str = "", color: str = POINTS, lim: float = 2.6
) -> None:
    """At most 1500 of some points (B, 2), in a square without marks."""
    axis.scatter(*points[:1500].T, s=1, color=color, lw=0)
    axis.set(xlim=(-lim, lim), ylim=(-lim, lim), xticks=[], yticks=[], title=title, aspect="equal")
    axis.spines[:].set(visible=True, color="#bbbbbb")


def clouds(
    points: Sequence[torch.Tensor],
    titles: Sequence[str],
    heading: str,
    color: str = POINTS,
    size: float = 1.9,
) -> None:
    """Some clouds side by side under one heading."""
    figure, axes = plt.subplots(1, len(points), figsize=(size * len(points), size + 0.5))
    for axis, x, title in zip(axes, points, titles, strict=True):
        cloud(axis, x, title, color)
    figure.suptitle(heading, y=1.02, fontsize=11)
    plt.show()


def step_axis(axis: plt.Axes, steps: Sequence[int], log_y: bool = True, **labels: Any) -> None:
    """Step counts as a logarithmic axis with their own numbers as marks."""
    axis.set(xscale="log", yscale="log" if log_y else "linear", xlabel="steps")
    axis.set(**labels)
    axis.set_xticks(steps, steps)
    axis.xaxis.minorticks_off()


def slider(draw: Callable[[Any], None], values: Sequence[Any], name: str) -> HTML:
    """One image for each value, and a slider that turns through them, with a kernel and without.

    draw: called as draw(value), draws one figure
    """
    images = []
    for value in values:
        draw(value)
        images.append(stored(plt.gcf()))
        plt.close()
    shown = "".join(
        f'<img src="data:image/png;base64,{image}" alt="{name} {value}" width="{size["width"]}" '
        f'style="display:{"block" if i == 0 else "none"};margin:0">'
        for i, ((image, size), value) in enumerate(zip(images, values, strict=True))
    )
    turn = (
        "const all = this.parentNode.parentNode.querySelectorAll('img');"
        "all.forEach((image, i) => image.style.display = i == this.value ? 'block' : 'none')"
    )
    control = (
        f'<input type="range" min="0" max="{len(images) - 1}" value="0" style="width:20em" oninput="{turn}">'
    )
    return HTML(f'<div class="slider"><label>{name}: {control}</label>{shown}</div>')
