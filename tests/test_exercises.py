"""Every exercise's solution passes its check, and its stub is told what is wrong."""

import json
import re
from pathlib import Path

import pytest

from toy import exercises
from toy.exercises import CHECKS, check

CHAPTERS = Path(__file__).parents[1] / "nbs" / "learn"
BLOCK = re.compile(r"\*\*(\d\d\.\d).*?```python\n(.*?)```.*?<details>.*?```python\n(.*?)```", re.DOTALL)


def found_exercises() -> dict[str, tuple[str, str]]:
    """{number: (stub, solution)} of all chapters."""
    found = {}
    for path in sorted(CHAPTERS.glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell.get("id") == "exercises":
                for number, stub, solution in BLOCK.findall("".join(cell["source"])):
                    assert path.name.startswith(number[:2])
                    found[number] = stub, solution
    return found


EXERCISES = found_exercises()


def test_every_check_has_its_exercise():
    assert set(EXERCISES) == set(CHECKS) and len(CHECKS) == 24


@pytest.mark.parametrize("number", sorted(EXERCISES))
def test_the_solution_passes_and_the_stub_is_told_what_is_wrong(number):
    stub, solution = EXERCISES[number]
    exec(solution, {"check": check})
    with pytest.raises(AssertionError) as wrong:
        exec(stub, {"check": check})
    assert len(str(wrong.value)) > 15  # words, not a bare assert


def test_an_unknown_number_is_named():
    with pytest.raises(ValueError, match="there is no exercise '99.1'"):
        exercises.check("99.1", None)
