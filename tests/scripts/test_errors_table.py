"""docs/errors.md says what wrong commands really answer: one line, exit code 2, nothing written."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_table_of_errors_is_what_the_commands_say(tmp_path):
    words = [sys.executable, "scripts/errors_table.py", "--out", str(tmp_path / "errors.md")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = (tmp_path / "errors.md").read_text()
    assert made == (ROOT / "docs/errors.md").read_text() and made.count("| `") >= 25
