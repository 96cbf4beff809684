"""The evaluation of the carried LoRA: it resumes, and the committed one is of the carried weights and in the
docs.
"""

import json
from pathlib import Path

import pytest

from experiments.runner import RESULTS
from experiments.studies import tiny_flux
from toy.judge import COLUMNS
from toy.pipelines import FLUX, WEIGHTS

ROOT = Path(__file__).parents[2]


@pytest.mark.experiment
def test_the_evaluation_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_flux, "STEPS", (1, 2, 3, 4, 8, 32))
    monkeypatch.setattr(tiny_flux, "SHIFTS", (1.0, 3.0))
    out = tmp_path / "tiny.json"
    words = ["--captions", "4", "--out", str(out)]
    tiny_flux.main(words)
    whole = json.loads(out.read_text())
    assert set(whole["summary"]) == {"teacher_32", *(f"at_{n}_steps" for n in (1, 2, 3, 4, 8))}
    lost = whole["entries"]["teacher"].pop()
    out.write_text(json.dumps(whole))
    tiny_flux.main(words)
    again = json.loads(out.read_text())["entries"]["teacher"][-1]
    assert {column: again[column] for column in COLUMNS} == {column: lost[column] for column in COLUMNS}


def test_the_committed_evaluation_is_of_the_carried_weights():
    record = json.loads((RESULTS / "tiny_flux.json").read_text())
    assert record["weights"]["lora"] == tiny_flux.digest(WEIGHTS / "lora")
    assert record["weights"]["teacher"] == tiny_flux.digest(FLUX / "transformer")
    assert record["summary"] == tiny_flux.summary(record["entries"])


def test_the_table_of_the_committed_evaluation_is_shown():
    record = json.loads((RESULTS / "tiny_flux.json").read_text())
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert any(tiny_flux.readme_table(record) in page.read_text(encoding="utf-8") for page in pages)
