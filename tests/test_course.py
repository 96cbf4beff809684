"""The eight chapters of the course are short: a question first, an image soon, a summary, three exercises,
and what is not the idea at the end."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import chapter_links  # noqa: E402

sys.path.pop(0)

CHAPTERS = chapter_links.chapters()["the course"][:-1]  # without the page that sums it up
MOST_WORDS, FIRST_IMAGE = 1500, 10
NO_PROSE = re.compile(  # code, formulas, tables, links, and what is folded
    r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|<details>.*?</details>|^\|[^\n]*$|\]\([^)]*\)",
    flags=re.S | re.M,
)
REST, FURTHER = "## The rest of the module", "## Further"

each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def course_of(cells):
    """The cells before the exercises, the deeper parts and the rest of the module."""
    for i, cell in enumerate(cells):
        if cell["id"] == "exercises" or source(cell).startswith((REST, FURTHER)):
            return cells[:i]
    return cells


def shows(cell):
    return "![" in source(cell) or any("image/png" in o.get("data", {}) for o in cell.get("outputs", []))


def test_there_are_eight():
    assert len(CHAPTERS) == 8


@each_chapter
def test_it_is_short(path):
    prose = [NO_PROSE.sub(" ", source(c)) for c in course_of(cells_of(path)) if c["cell_type"] == "markdown"]
    assert len(re.findall(r"[A-Za-z][\w'-]*", " ".join(prose))) <= MOST_WORDS


@each_chapter
def test_it_begins_with_its_question_and_ends_with_a_summary(path):
    cells = cells_of(path)
    assert "**The question.**" in source(cells[0])
    summary = [cell for cell in course_of(cells) if cell["id"] == "summary"]
    assert len(summary) == 1 and source(summary[0]).startswith("> **In short.**")


@each_chapter
def test_an_image_comes_soon(path):
    assert any(shows(cell) for cell in cells_of(path)[:FIRST_IMAGE])


@each_chapter
def test_one_quantity_can_be_turned(path):
    outputs = [o for cell in course_of(cells_of(path)) for o in cell.get("outputs", [])]
    pages = ["".join(o.get("data", {}).get("text/html", "")) for o in outputs]
    (slider,) = (page for page in pages if 'class="slider"' in page)
    assert 5 <= slider.count("<img") <= 10 and f'max="{slider.count("<img") - 1}"' in slider


@each_chapter
def test_the_module_is_written_at_the_end(path):
    cells = cells_of(path)
    exported = [cell for cell in course_of(cells) if source(cell).startswith("#| export")]
    assert not exported, f"cell {exported[0]['id']} is exported: it belongs under {REST!r}"


@each_chapter
def test_it_has_three_exercises(path):
    (cell,) = (cell for cell in cells_of(path) if cell["id"] == "exercises")
    kinds = re.findall(r"\*\*\d\d\.\d ([^.*]+)\.\*\*", source(cell))
    assert kinds == ["Derive", "Predict, then run", "Break it"]
