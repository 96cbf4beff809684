"""The figures of the records are drawn from the records alone, in the colours of the notebooks."""

import pytest
from PIL import Image

from experiments import figures
from experiments.redraw import FIGURES, numbered, redraw
from toy import plots


@pytest.mark.parametrize("name", ["TEACHER", "STUDENT", "EMA", "RIVAL"])
def test_a_notebook_and_a_study_show_the_same_colour_and_marker(name):
    assert getattr(plots, name) == getattr(figures, name)


def test_a_name_has_its_look():
    colours = {"teacher midpoint": figures.TEACHER, "SCFM, tuned dialled": figures.SCFM}
    for label, of in colours.items():
        assert figures.look(label)["color"] == of["color"]
    assert figures.look("teacher midpoint")["ls"] != figures.look("teacher euler").get("ls", "-")
    assert figures.look("progressive own stage")["color"] != figures.look("Shortcut raw")["color"]
    trained_in = ("scale trained in", "plain, step_scaled", "step_scaled 1/4")
    assert {figures.look(label)["color"] for label in trained_in} == {figures.STUDENT["color"]}
    assert figures.look("plain, midpoint") == figures.look("teacher midpoint")
    with pytest.raises(ValueError, match="no look for 'best guess'"):
        figures.look("best guess")


def test_step_counts_are_numbers_again():
    assert numbered({"moons": {"8": [{"4": 1.0}], "mean": "8"}}) == {"moons": {8: [{4: 1.0}], "mean": "8"}}


@pytest.mark.parametrize("study", ["step_scale", "tiny_flux", "cifar", "guidance"])
def test_a_record_is_drawn_again(study, tmp_path):
    paths = redraw(study, tmp_path)
    assert [path.stem for path in paths] == [study + ending for ending in FIGURES[study]]
    for path in paths:
        with Image.open(path) as image:
            colours = [colour for _, colour in image.convert("RGB").getcolors(1 << 24)]
        for wanted in ((0xC6, 0x28, 0x28), (0x77, 0x77, 0x77)):  # as near as a palette has them
            assert min(max(abs(a - b) for a, b in zip(wanted, c, strict=True)) for c in colours) <= 8
