"""A figure of images: a row for each sampler, a column for each caption."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch

from scfm.files import atomic_write


def draw_grid(
    rows: Sequence[tuple[str, torch.Tensor]],
    captions: Sequence[str],
    path: Path,
    dpi: int = 90,
    wrap: int = 16,
) -> None:
    """Writes a PNG file, whole or not at all.

    rows: (label, images (n, 3, H, W) in [-1, 1]), of which as many are shown as there are captions
    captions: of the columns
    wrap: letters of a line of a caption
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = len(captions) + 1.6, len(rows) + 0.9
    figure, axes = plt.subplots(len(rows), len(captions), figsize=size, squeeze=False)
    for line, (label, images) in zip(axes, rows, strict=True):
        for ax, image in zip(line, images[: len(captions)], strict=True):
            ax.imshow(
                (image.float().permute(1, 2, 0).cpu().numpy() + 1).clip(0, 2) / 2, interpolation="nearest"
            )
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    for ax, caption in zip(axes[0], captions, strict=True):
        ax.set_title("\n".join(textwrap.wrap(caption, wrap)), fontsize=6.5)
    figure.tight_layout(pad=0.3)
    atomic_write(path, lambda new: figure.savefig(str(new), dpi=dpi, format="png"))
    plt.close(figure)


def step_label(name: str, steps: int) -> str:
    """teacher, 1 step; teacher, 2 steps."""
    return f"{name}, {steps} step{'s' * (steps > 1)}"
