"""Every notebook says how long it takes and what comes next, and its links lead somewhere."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*/*.ipynb"))
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import chapter_links
    finally:
        sys.path.pop(0)
    return chapter_links


def test_the_lines_under_the_titles_are_up_to_date(script):
    stale = [p.name for p, text in script.all_updated().items() if p.read_text(encoding="utf-8") != text]
    assert not stale, "run python scripts/chapter_links.py"


def test_every_notebook_is_in_a_book(script):
    assert sorted(path for paths in script.chapters().values() for path in paths) == NOTEBOOKS


def test_names_become_links_outside_of_code(script):
    known = {"02_ema": ROOT / "nbs/learn/02_ema.ipynb", "22_data": ROOT / "nbs/guides/22_data.ipynb"}
    text = "see `02_ema` and `22_data`, [`02_ema`](x)\n```\n`02_ema`\n```\n`99_none`"
    assert script.with_links(text, known["02_ema"], known) == (
        "see `02_ema` and [22_data](../guides/22_data.ipynb), [`02_ema`](x)\n```\n`02_ema`\n```\n`99_none`"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            text = re.sub(r"```.*?```", "", "".join(cell["source"]), flags=re.DOTALL)
            for target in LINK.findall(text):
                assert target.startswith("http") or (path.parent / target).exists(), target
