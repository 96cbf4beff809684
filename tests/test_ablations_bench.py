"""bench/ablations.py at a size of seconds: it runs, it resumes from its cells, and what it writes is complete."""
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

SCRIPT, BENCH = "ablations", Path(__file__).parents[1] / "bench"
SETTINGS = {"k/N", "averages", "decay of one EMA", "speaker scale", "learning rate", "shift", "t_skip", "loss", "rank", "read-out", "seed"}


def test_a_small_run_writes_everything_and_a_lost_cell_alone_is_made_again(bench, folder, capsys):
    record = bench()
    assert record["plane"].keys() == SETTINGS and not record["missing"]
    assert set(record["plane"]["k/N"]) == set(record["teacher"]) == set(record["floor"]) == {"checkerboard", "moons", "8 gaussians"}
    for sets in record["plane"].values():
        for value in sets["checkerboard"].values():
            assert list(value["looks"]) == ["4", "8"] and value["numbers"] > 0
            assert all(list(look[kind]) == ["1", "2", "3", "4", "8"] for look in value["looks"].values() for kind in ("raw", "dialled", "scales"))
    decays, two = record["grids"].items()
    assert decays[0] == "fast decay, slow decay" and sum(map(len, decays[1].values())) == 10
    assert two[0] == ", ".join(row["family"] for row in record["sensitivity"][:2]) and sum(map(len, two[1].values())) >= 12
    assert set(record["flux"]) == {"k/N", "rank"} and {"0", "1"} == set(record["flux"]["k/N"]) and record["flux_teacher"]["3.0"]
    for who in ("student", "ema_slow"):
        first, last = (look[who] for look in record["flux"]["k/N"]["0"]["looks"].values())
        assert set(first) == {"raw"} and set(last) == {"raw", "dialled", "scales"}
    assert "tiny Flux, slow EMA" in capsys.readouterr().out
    assert all(Image.open(folder / f"ablations{kind}.png").width > 700 for kind in ("", "_grids", "_flux"))

    lost = sorted((folder / "cells").glob("ablation-*"))[0]
    lost.unlink()
    told = bench("--report", out="less")
    assert told["missing"] and told["cost"]["this_run"]["cells_made"] == 0
    again = bench("--only", "plane", "grids")
    assert again["cost"]["this_run"]["cells_made"] == 1 and lost.is_file()
    assert all(again[part] == record[part] for part in ("plane", "grids", "flux", "sensitivity"))


def test_nothing_is_chosen_for_the_grid_before_all_is_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    from ablation_report import most_sensitive

    def done(family, *values):
        look = [{"looks": {5: {"raw": dict.fromkeys((2, 3, 4, 8), v), "dialled": dict.fromkeys((2, 3, 4, 8), v ** .5)}}} for v in values]
        return [(SimpleNamespace(part="plane", family=family, data="moons", label=str(i)), value, {}, 0) for i, value in enumerate(look)]
    results = done("a", .1, .2, .4) + done("b", .1, .3, 9.) + done("c", .1, .2) + done("seed", .1, .15)
    asked = {"a": ("0", "1", "2"), "b": ("0", "1"), "c": ("0", "1")}                      # b's third value stands on no axis of a grid
    ranked, pair = most_sensitive(results, asked, "moons")
    assert pair == ("a", "b") and [row["family"] for row in ranked] == ["a", "b", "c"]
    assert [row["beyond_chance"] for row in ranked] == [True, True, False]                # log 2 of c, twice log 1.5 by seeds
    assert ranked[0]["raw"] == pytest.approx(math.log(4), abs=1e-4) and ranked[0]["dialled"] == pytest.approx(math.log(2), abs=1e-4)
    lost = [(job, None, {}, 0) if i == 4 else (job, value, {}, 0) for i, (job, value, *_) in enumerate(results)]
    assert most_sensitive(lost, asked, "moons")[1] == () and most_sensitive(results[1:], asked, "moons")[1] == ()


def test_the_rule_restarts_both_averages_when_the_student_has_stopped_leaving_the_slow_one(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    from ablation_cells import RestartWhenStalled
    weights = {name: [torch.zeros(2), torch.zeros(1)] for name in ("student", "ema_fast", "ema_slow")}
    rule = RestartWhenStalled(SimpleNamespace(parameters=weights.get), every=2, patience=3)
    away = [1, 2, 3, 4, 5, 6, 6, 6, 6, 5, 5, 4, 9]                       # looked at after 2, 4, ...: 2 4 6 6 5 4
    for updates, distance in enumerate(away, 1):
        weights["student"][0].copy_(torch.tensor([float(distance), 0.]))
        rule(updates)
        assert rule.restarts == ([12] if updates >= 12 else [])
        if updates == 12:
            assert all(torch.equal(a, b) for name in ("ema_fast", "ema_slow") for a, b in zip(weights[name], weights["student"]))
    assert weights["ema_slow"][0][0] == 4 and rule.largest == 0              # and from there on it counts anew


def test_a_run_that_loses_its_head_is_a_result_and_no_crash(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    from ablation_cells import OURS, run
    from plane_cells import FAR, judged

    from scfm.method.distill import SCFMConfig, CopiedModels
    from toy.plane import MLP, checkerboard
    models = CopiedModels(MLP(4, 1))

    def batch_of(generator, rows):
        return checkerboard(rows, generator) * (math.inf if len(looked) else 1.)
    looked = []
    found = run(models, batch_of, SCFMConfig(max_train_steps=6, global_batch_size=4), OURS, (2, 6), lambda updates: looked.append(updates) or updates)
    assert found["done"] == 2 and found["looks"] == {2: 2, 6: 6} == {n: n for n in looked}

    def measure(field, steps, shift):
        return math.nan, math.inf
    gone = judged(measure, (torch.zeros(2, 2), torch.zeros(2, 2)), lambda scale: lambda x, t, cond=None: x * scale / 0, (1, 2), (0., 1.))
    assert set(gone["raw"].values()) == set(gone["dialled"].values()) == set(gone["deviation"].values()) == {FAR}
