"""bench/plane.py at a size of seconds: it runs, it resumes from its cells, and what it writes is complete."""
import pytest
from PIL import Image

from scfm.method.lora_scale import STEPS
from toy.plane import DATA

SCRIPT = "plane"


def test_a_small_run_writes_everything(bench, folder, capsys):
    record = bench()
    for data in DATA:
        curves = record["main"][data]
        for name in ("damped", "damped, k/N .2", "paper"):
            for curve in ("raw", "dialled", "scales", "deviation"):
                assert list(curves[f"{name} {curve}"]) == [str(n) for n in STEPS]
        assert list(curves["teacher euler"]) == [str(n) for n in STEPS] and "1" not in curves["teacher midpoint"]
        assert set(curves["paper raw"]["3"]) == {"mean", "spread", "seeds"}
        assert 0 < record["floor"][data]["low"] <= record["floor"][data]["mean"] <= record["floor"][data]["high"]
        assert record["choosers"][data]["0"].keys() >= {"endpoints", "best", "best, free"} and record["teacher shift"][data]
    asked = {"speaker scale", "k/N", "self grids", "EMA", "updates", "shift", "data", "loss", "read-out"}
    assert asked <= record["ablations"].keys()
    found = record["targets"]["damped"]
    assert [t["evaluations"] for t in found["aims"]] == [3, 4, 8] and found["scales_chosen"] == len(DATA) * len(STEPS)
    assert len(found["against_teacher"]) == len(DATA) * 5 and not record["missing"]
    assert {"machine", "torch", "protocol", "cost"} <= record.keys() and record["protocol"]["samples"] == 64
    assert "targets missed" in capsys.readouterr().out
    assert all(Image.open(folder / name).width > 800 for name in ("plane.png", "plane_ablations.png"))


def test_a_second_run_takes_the_cells_and_a_lost_one_alone_is_made_again(bench, folder):
    whole = bench()
    assert whole["cost"]["this_run"]["cells_made"] == 0
    lost = sorted((folder / "cells").glob("student_sw2-*"))[0]
    lost.unlink()
    with pytest.raises(SystemExit, match="it stays as it is; name another --out"):
        bench("--report")                    # would write less over more
    told = bench("--report", out="less")
    assert told["missing"] and told["cost"]["this_run"]["cells_made"] == 0
    again = bench()
    assert again["cost"]["this_run"]["cells_made"] == 1 and lost.is_file()
    assert again["main"] == whole["main"] and again["ablations"] == whole["ablations"]


def test_a_part_alone_keeps_what_is_there_of_the_other(bench, folder):
    whole = bench()
    for path in (folder / "cells").glob("floor-*"):
        path.unlink()
    record = bench("--only", "ablations", out="part")
    assert record["ablations"] == whole["ablations"] and record["main"] == whole["main"]
    assert not record["floor"] and len(record["missing"]) == len(DATA)
