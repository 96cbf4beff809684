"""docs/errors.md says what wrong commands really answer: one line, exit code 2, nothing written."""
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_table_of_errors_is_what_the_commands_say(tmp_path):
    words = [sys.executable, "bench/bad_inputs.py", "--output_dir", str(tmp_path / "errors.md")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "errors.md").read_text() == (ROOT / "docs/errors.md").read_text()
    assert (tmp_path / "errors.md").read_text().count("| `") >= 25
