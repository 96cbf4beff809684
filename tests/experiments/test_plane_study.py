"""The study `plane` at a size of seconds: it resumes from its cells, and what it writes is complete."""

import pytest
from PIL import Image

from experiments.studies import plane
from scfm.method.lora_scale import STEPS
from toy.plane import DATA

pytestmark = pytest.mark.experiment
STUDY = "plane"


def test_a_small_run_writes_everything(study):
    record, printed = study.first
    for data in DATA:
        curves = record["main"][data]
        for name in ("damped", "damped, k/N .2", "paper"):
            for curve in ("raw", "dialled", "scales", "deviation"):
                assert list(curves[f"{name} {curve}"]) == [str(n) for n in STEPS]
        assert (
            list(curves["teacher euler"]) == [str(n) for n in STEPS] and "1" not in curves["teacher midpoint"]
        )
        assert set(curves["paper raw"]["3"]) == {"mean", "spread", "seeds"}
        floor = record["floor"][data]
        assert 0 < floor["low"] <= floor["mean"] <= floor["high"]
        assert record["choosers"][data]["0"].keys() >= {"endpoints", "best", "best, free"}
        assert record["teacher shift"][data]
    families = {"EMA scale", "k/N", "self grids", "EMA", "updates", "shift", "data", "loss", "read-out"}
    assert families <= record["ablations"].keys()
    targets = record["targets"]["damped"]
    assert [aim["evaluations"] for aim in targets["aims"]] == [3, 4, 8]
    assert targets["scales_chosen"] == len(DATA) * len(STEPS)
    assert len(targets["against_teacher"]) == len(DATA) * 5 and not record["missing"]
    assert {"machine", "torch", "protocol", "cost"} <= record.keys() and record["protocol"]["samples"] == 64
    assert "targets missed" in printed
    assert all(Image.open(study.folder / name).width > 800 for name in ("plane.png", "plane_ablations.png"))


def test_a_second_run_takes_the_cells_and_a_lost_one_alone_is_made_again(study):
    whole = study.run().record
    assert whole["cost"]["this_run"]["cells_made"] == 0
    lost = study.lose("student_sw2")
    with pytest.raises(SystemExit, match="it stays as it is; name another --out"):
        study.run("--report")  # would write less over more
    less = study.run("--report", out="less").record
    assert less["missing"] and less["cost"]["this_run"]["cells_made"] == 0
    again = study.run().record
    assert again["cost"]["this_run"]["cells_made"] == 1 and lost.is_file()
    assert again["main"] == whole["main"] and again["ablations"] == whole["ablations"]


def test_a_part_alone_keeps_what_is_there_of_the_other(study):
    whole = study.first.record
    for path in study.cells.glob("floor-*"):
        path.unlink()
    record = study.run("--only", "ablations", out="part").record
    assert record["ablations"] == whole["ablations"] and record["main"] == whole["main"]
    assert not record["floor"] and len(record["missing"]) == len(DATA)


def test_other_processes_find_the_cells_and_make_the_lost_one(study):
    study.run()
    study.lose("student_sw2")
    again = study.run("--workers", "2").record
    assert again["cost"]["this_run"]["cells_made"] == 1 and again["main"] == study.first.record["main"]


def test_the_paper_s_further_seeds_come_last():
    labels = [(job.label, job.seed) for job in plane.jobs(plane.Sizes()) if job.family == "recipe"]
    assert labels[-6:] == [("paper", seed) for seed in (1, 2) for _ in DATA]
