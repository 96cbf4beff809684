"""The demo and the benches, at a size of seconds: the real scripts, a handful of captions."""
import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from scfm.cli import main
from toy.judge import COLUMNS, STEPS, at_stock, best_of
from toy.shapes import draw_captions

import torch


def test_the_demo_writes_image_table_and_results(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(draw_captions(4, torch.Generator().manual_seed(0)).text))
    out = tmp_path / "demo"
    for attempt in range(2):  # a second demo starts from nothing and must not stumble over the first
        assert main(["demo", "--out", str(out), "--updates", "2", "--captions", "4", "--prompts",
                     str(tmp_path / "prompts.txt")]) == 0
    said = capsys.readouterr().out
    assert "prompt acc." in said and "carried LoRA" in said and "EMA decays" in said
    record = json.loads((out / "results.json").read_text())
    assert Image.open(out / "comparison.png").width > 600
    assert record["captions"] == 4 and len(record["entries"]) == 4
    for name, rows in record["entries"].items():
        for steps in STEPS:
            assert {*COLUMNS, "seconds"} <= at_stock(rows, steps).keys()
    teacher = record["entries"]["teacher"]
    assert at_stock(teacher, 32)["endpoint"] == 0
    assert best_of(teacher, 3)["endpoint"] <= at_stock(teacher, 3)["endpoint"]


def test_the_demo_refuses_nonsense(capsys):
    assert main(["demo", "--captions", "0"]) == 2
    assert "--captions" in capsys.readouterr().err


def script(monkeypatch, path, *words):
    monkeypatch.setattr(sys, "argv", [path, *map(str, words)])
    runpy.run_path(path, run_name="__main__")


def test_update_cost_counts_and_times(tmp_path, monkeypatch):
    out = tmp_path / "cost"
    script(monkeypatch, "bench/update_cost.py", "--rounds", 1, "--batch", 4, "--rank", 4, "--out", out)
    ways = json.loads(out.with_suffix(".json").read_text())["ways"]
    assert ways["plain"]["flop_ratio"] == 1
    assert 1.6 < ways["scfm"]["flop_ratio"] < 2 and ways["scfm"]["gflops"] == pytest.approx(ways["swap"]["gflops"], rel=.02)
    assert all(w["median_seconds"] > 0 for w in ways.values()) and out.with_suffix(".png").is_file()


def test_the_evaluation_resumes(tmp_path, monkeypatch, capsys):
    out = tmp_path / "tiny.json"
    script(monkeypatch, "bench/tiny_flux.py", "--captions", 8, "--out", out)
    whole = json.loads(out.read_text())
    broken = json.loads(out.read_text())
    lost = broken["entries"]["teacher"].pop()
    out.write_text(json.dumps(broken))
    script(monkeypatch, "bench/tiny_flux.py", "--captions", 8, "--out", out)
    again = json.loads(out.read_text())["entries"]["teacher"][-1]
    assert {k: again[k] for k in COLUMNS} == {k: lost[k] for k in COLUMNS}
    assert set(whole["summary"]) == {"teacher_32", *(f"at_{n}_steps" for n in (1, 2, 3, 4, 8))}


@pytest.mark.parametrize("shape", ["flux", "sd35"])
def test_the_12b_bench_runs_in_small(tmp_path, monkeypatch, shape):
    out = tmp_path / "gpu.json"
    script(monkeypatch, "bench/gpu_flux.py", "--tiny", "--shape", shape, "--batches", "2", "--rank", 4, "--rounds", 1,
           "--out", out)
    record = json.loads(out.read_text())
    assert record["tiny"] and len(record["rows"]) == 2      # labelled as what it is; two ways of computing the LoRA
    for row in record["rows"]:
        assert 1.3 < row["ratio_operations"] < 2 and row["scfm"]["seconds"] > 0
        assert row["memory_gib"]["adapters"] == pytest.approx(3 * row["memory_gib"]["gradients"], abs=2e-4)


def test_the_readme_shows_the_committed_evaluation():
    bench = runpy.run_path("bench/tiny_flux.py")
    record = json.loads(Path("bench/results/tiny_flux.json").read_text())
    assert bench["readme_table"](record) in Path("README.md").read_text(encoding="utf-8")
    assert record["weights"]["lora"] == bench["digest"](bench["WEIGHTS"] / "lora")          # it is of these very weights
    assert record["weights"]["teacher"] == bench["digest"](bench["FLUX"] / "transformer")
