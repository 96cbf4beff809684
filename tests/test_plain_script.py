"""examples/plain_scfm.py is plain_scfm.ipynb as a script; `python tests/test_plain_script.py` writes it.

The rule, cell by cell, with an empty line between cells:
- markdown becomes comments, wrapped at 110 columns, links their names; the line about time and neighbours is
  left out;
- code stays as it is, without lines that begin with `%` or `#|`;
- a cell that is one expression, which a notebook would display, is printed.
"""

import ast
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = next((ROOT / "nbs").rglob("plain_scfm.ipynb"))
SCRIPT = ROOT / "examples" / "plain_scfm.py"
WIDTH = 110


def script_of(notebook):
    """The text of the script."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    convert = {"markdown": comment, "code": code}
    cells = [cell for cell in cells if cell["id"] != "nav"]
    return "\n\n".join(convert[cell["cell_type"]]("".join(cell["source"])) for cell in cells) + "\n"


def comment(text):
    text = re.sub(r"\[([^]]+)\]\([^)]*\.ipynb\)", r"`\1`", text)
    wrapper = textwrap.TextWrapper(WIDTH - 2, break_long_words=False, break_on_hyphens=False)
    lines = [line for paragraph in text.splitlines() for line in wrapper.wrap(paragraph) or [""]]
    return "\n".join(f"# {line}".rstrip() for line in lines)


def code(text):
    text = "\n".join(line for line in text.splitlines() if not line.startswith(("%", "#|")))
    body = ast.parse(text).body
    return f"print({text})" if len(body) == 1 and isinstance(body[0], ast.Expr) else text


def test_the_script_is_the_notebook():
    assert SCRIPT.read_text(encoding="utf-8") == script_of(NOTEBOOK), f"python {Path(__file__)} writes it"


@pytest.mark.slow
def test_it_runs_with_small_numbers(tmp_path):
    """Steps and samples, all numbers of four digits, become 40; test_notebooks.py runs it with its own."""
    short, count = re.subn(r"(?<=[ (])[1-9]\d{3}(?=[,)])", "40", script_of(NOTEBOOK))
    assert count >= 4
    (tmp_path / "short.py").write_text(short, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "short.py"],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "teacher  student" in done.stdout


if __name__ == "__main__":
    SCRIPT.write_text(script_of(NOTEBOOK), encoding="utf-8")
