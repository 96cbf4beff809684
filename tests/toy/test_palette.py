"""Figures in a palette look as they did."""

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageChops

from toy.palette import few_colours

matplotlib.use("Agg")


def drawn(tmp_path):
    figure = Figure(figsize=(4, 3), dpi=144)
    ax = figure.subplots()
    for i in range(6):
        ax.plot(np.sin(np.arange(50) / (i + 3)), label=f"line {i}")
    ax.imshow(np.linspace(0, 1, 400).reshape(20, 20), extent=(30, 50, -1, 0), aspect="auto")
    ax.plot([5], [0.9], "o", color="#ffd400", ms=3)  # small, and of a colour of its own
    ax.legend()
    figure.savefig(tmp_path / "figure.png")
    return Image.open(tmp_path / "figure.png").convert("RGB")


def test_no_colour_of_a_drawing_is_lost(tmp_path):
    image = drawn(tmp_path)
    small = few_colours(image)
    assert small.mode == "P" and len(image.getcolors(1 << 24)) > 256
    largest = max(high for _, high in ImageChops.difference(image, small.convert("RGB")).getextrema())
    assert largest <= 24


@pytest.mark.parametrize("side", [8, 200])
def test_a_photograph_keeps_its_colours(side):
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    kept = few_colours(Image.fromarray(noise))
    assert (np.asarray(kept.convert("RGB")) == noise).all()  # 64 colours fit a palette
