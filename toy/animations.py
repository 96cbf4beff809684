"""Two images that move:  python -m toy.animations

docs/jump.gif    one jump against two half-steps, and the velocity that is learned from them
docs/scale.gif   one student at every number of steps, its scale set by the rule, beside its teacher

A minute on a CPU core; seeds fixed, under half a megabyte each.
"""

import io
from pathlib import Path

import matplotlib
import torch
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from scfm.method.distill import SCFMConfig, distill
from scfm.method.flow import sample, time_grid
from scfm.method.step_scale import ScaledNetwork
from toy import plots
from toy.plane import MLP, Mixture, moons, train_flow

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEACHER, STUDENT, TARGET = plots.TEACHER["color"], plots.STUDENT["color"], plots.EMA["color"]
COLORS = 48
THREE = Mixture(torch.tensor([[-1.5, 0.9], [1.5, 0.9], [0.0, -1.3]]), 0.12)
TIMES = (0.85, 0.4, 0.05)


def frame(figure: plt.Figure) -> Image.Image:
    """A figure as an image of few colours; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    plt.close(figure)
    return Image.open(buffer).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)


def save(frames: list[Image.Image], path: Path, milliseconds: list[int]) -> None:
    """Writes a GIF that runs for ever."""
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, optimize=True
    )
    print(f"{path}: {len(frames)} frames, {path.stat().st_size / 1e3:.0f} kB")


def two_halves(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(v1, the middle, v2, the end) of two Euler steps along the exact flow of three clusters. x: (1, 2)"""
    field, (first, second, last) = THREE.field, TIMES
    v1 = field(x, torch.tensor([first]))
    middle = x - (first - second) * v1
    v2 = field(middle, torch.tensor([second]))
    return v1, middle, v2, middle - (second - last) * v2


def arrow(axis: plt.Axes, start: torch.Tensor, end: torch.Tensor, color: str, style: str = "-") -> None:
    arrows = {"arrowstyle": "-|>", "color": color, "lw": 2.4, "linestyle": style, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", end[0].tolist(), start[0].tolist(), arrowprops=arrows)


def jump_frame(parts: tuple[torch.Tensor, ...], shown: int, turned: float, text: str) -> Image.Image:
    """shown: how many of the two half-steps; turned: how far the student has gone to the target, 0 to 1."""
    start, v1, middle, end = parts[0], parts[1], parts[2], parts[4]
    length = TIMES[0] - TIMES[2]
    figure, axis = plt.subplots(figsize=(5.2, 3.9))
    cloud = THREE.sample(900, torch.Generator().manual_seed(0))
    axis.plot(*cloud.T, ".", ms=2, color="#bbbbbb")
    axis.plot(*start[0], "o", color="k", ms=6)
    if shown > 0:
        arrow(axis, start, middle, TEACHER)
        axis.text(
            *((start + middle)[0] / 2 + torch.tensor([0.0, -0.3])).tolist(),
            "$v_1$",
            color=TEACHER,
            fontsize=12,
        )
    if shown > 1:
        arrow(axis, middle, end, TEACHER)
        axis.text(*((middle + end)[0] / 2 + 0.1).tolist(), "$v_2$", color=TEACHER, fontsize=12)
    if shown > 2:
        own = v1 + turned * ((start - end) / length - v1)
        arrow(axis, start, start - length * own, STUDENT)
        axis.plot(*end[0], "o", mfc="none", mec=TARGET, ms=13, mew=2)
    axis.set(xlim=(-3.0, 2.2), ylim=(-1.9, 1.9), xticks=[], yticks=[], aspect="equal")
    axis.set_title(text, fontsize=11)
    figure.tight_layout()
    return frame(figure)


def jump(path: Path) -> None:
    """One jump against two halves."""
    start = torch.tensor([[-2.45, -0.95]])
    parts = (start, *two_halves(start))
    frames = [
        jump_frame(parts, 0, 0, "A point on the way from noise to data"),
        jump_frame(parts, 1, 0, "Half a step, by the frozen model or an average"),
        jump_frame(parts, 2, 0, "and another half, from where the first one ends"),
        jump_frame(parts, 3, 0, "The student's one step follows its first velocity, and misses"),
    ]
    turns = [jump_frame(parts, 3, i / 8, "It learns the one velocity that lands there") for i in range(1, 9)]
    save(frames + turns, path, [1500, 1500, 1500, 2000, *[150] * 7, 2500])


def scale_frame(clouds: tuple[torch.Tensor, torch.Tensor], n: int, scale: float) -> Image.Image:
    figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.9))
    for axis, cloud, color, name in zip(
        axes, clouds, (TEACHER, STUDENT), ("teacher", f"student, scale {scale:.2f}"), strict=True
    ):
        axis.plot(*cloud.T, ".", ms=1.5, color=color)
        axis.set(xlim=(-2.6, 2.6), ylim=(-1.9, 1.9), xticks=[], yticks=[], aspect="equal")
        axis.set_title(f"{name}, {n} step{'s' * (n > 1)}", fontsize=12)
    figure.tight_layout()
    return frame(figure)


def scale(path: Path) -> None:
    """One student at many step counts beside its teacher, from the same noise."""
    torch.manual_seed(0)
    network = train_flow(MLP(128, 3), moons, 2500, 256, lr=4e-3)
    config = SCFMConfig(
        algorithm="step_scaled",
        max_train_steps=800,
        global_batch_size=256,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        shift=(0.9, 1.1),
        ema_decay=0.9,
    )
    models = distill(ScaledNetwork(network), lambda g, n: moons(n, g), config, progress=False)
    noise = torch.randn(2500, 2, generator=torch.Generator().manual_seed(1))
    frames = []
    for n in (1, 2, 3, 4, 5, 6, 8, 12, 16):
        size = config.step_scale.scale(n)
        fields = models.field("ema", 0.0), models.field("ema", size)
        teacher, student = (sample(field, noise, time_grid(n)) for field in fields)
        frames.append(scale_frame((teacher, student), n, size))
    save(frames, path, [1800, 1400, *[900] * 6, 2500])


if __name__ == "__main__":
    jump(DOCS / "jump.gif")
    scale(DOCS / "scale.gif")
