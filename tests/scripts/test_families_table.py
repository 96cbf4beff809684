"""docs/families.md says what the families do on their tiny pipelines."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_table_of_families_is_what_they_do(tmp_path):
    words = [sys.executable, "scripts/families_table.py", "--out", str(tmp_path / "families.md")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = (tmp_path / "families.md").read_text()
    assert made == (ROOT / "docs/families.md").read_text() and made.count("\n| `") == 8
