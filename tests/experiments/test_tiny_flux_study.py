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
    kinds = {f"{kind}at_{n}_steps" for kind in ("", "trained_") for n in (1, 2, 3, 4, 8)}
    assert set(whole["summary"]) == {"teacher_32", *kinds}
    lost = whole["entries"]["teacher"].pop()
    out.write_text(json.dumps(whole))
    tiny_flux.main(words)
    again = json.loads(out.read_text())["entries"]["teacher"][-1]
    assert {column: again[column] for column in COLUMNS} == {column: lost[column] for column in COLUMNS}


def test_another_lora_leaves_the_others_rows():
    was = {
        "captions": 1,
        "seed": 0,
        "guidance": 2,
        "dial": {},
        "weights": {"teacher": 1, "lora": 2, "step_lora": 3},
    }
    now = {**was, "weights": {"teacher": 1, "lora": 2, "step_lora": 4}}
    kept = [
        name
        for name in (tiny_flux.TEACHER, tiny_flux.DIALLED, tiny_flux.TRAINED)
        if tiny_flux.still(name, was, now)
    ]
    assert kept == [tiny_flux.TEACHER, tiny_flux.DIALLED]
    assert not tiny_flux.still(tiny_flux.DIALLED, was, {**now, "dial": {"1": 2.0}})
    assert not tiny_flux.still(tiny_flux.TEACHER, was, {**now, "captions": 2})


def test_the_committed_evaluation_is_of_the_carried_weights():
    record = json.loads((RESULTS / "tiny_flux.json").read_text())
    for name in ("lora", "step_lora"):
        assert record["weights"][name] == tiny_flux.digest(WEIGHTS / name)
    assert record["weights"]["teacher"] == tiny_flux.digest(FLUX / "transformer")
    assert record["summary"] == tiny_flux.summary(record["entries"])


def test_the_table_of_the_committed_evaluation_is_shown():
    record = json.loads((RESULTS / "tiny_flux.json").read_text())
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert any(tiny_flux.readme_table(record) in page.read_text(encoding="utf-8") for page in pages)
