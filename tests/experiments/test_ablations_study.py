"""The study `ablations` at a size of seconds: it resumes from its cells, and what it writes is complete."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from experiments.runner import Job, Result
from experiments.scales import FAR
from experiments.studies.ablations_cells import OURS, RestartWhenStalled, run
from experiments.studies.ablations_report import most_sensitive
from experiments.testbeds.plane_measures import score_student
from scfm.method.distill import CopiedModels, SCFMConfig
from toy.plane import DATA, MLP, checkerboard

pytestmark = pytest.mark.experiment
STUDY = "ablations"
SETTINGS = {
    "k/N",
    "averages",
    "decay of one EMA",
    "EMA scale",
    "learning rate",
    "shift",
    "t_skip",
    "loss",
    "rank",
    "read-out",
    "seed",
}


def test_a_small_run_looks_at_every_setting_of_the_plane(study):
    record = study.first.record
    assert record["plane"].keys() == SETTINGS and not record["missing"]
    assert set(record["plane"]["k/N"]) == set(record["teacher"]) == set(record["floor"]) == set(DATA)
    for sets in record["plane"].values():
        for value in sets["checkerboard"].values():
            assert list(value["looks"]) == ["4", "8"] and value["numbers"] > 0
            for look in value["looks"].values():
                assert all(
                    list(look[kind]) == ["1", "2", "3", "4", "8"] for kind in ("raw", "dialled", "scales")
                )


def test_the_grids_are_of_the_decays_and_of_what_mattered_most(study):
    record = study.first.record
    (decays, of_decays), (pair, of_pair) = record["grids"].items()
    assert decays == "fast decay, slow decay" and sum(map(len, of_decays.values())) == 10
    assert pair == ", ".join(row["family"] for row in record["sensitivity"][:2])
    assert sum(map(len, of_pair.values())) >= 12


def test_a_small_run_looks_at_the_tiny_flux(study):
    record, printed = study.first
    assert set(record["flux"]) == {"k/N", "rank"} and {"0", "1"} == set(record["flux"]["k/N"])
    assert record["flux_teacher"]["3.0"]
    for who in ("student", "ema_slow"):
        first, last = (look[who] for look in record["flux"]["k/N"]["0"]["looks"].values())
        assert set(first) == {"raw"} and set(last) == {"raw", "dialled", "scales"}
    assert "tiny Flux, slow EMA" in printed
    images = [Image.open(study.folder / f"ablations{kind}.png") for kind in ("", "_grids", "_flux")]
    assert all(image.width > 700 for image in images)


def test_a_lost_cell_alone_is_made_again(study):
    lost, record = study.lose("ablation"), study.first.record
    less = study.run("--report", out="less").record
    assert less["missing"] and less["cost"]["this_run"]["cells_made"] == 0
    again = study.run("--only", "plane", "grids").record
    assert again["cost"]["this_run"]["cells_made"] == 1 and lost.is_file()
    assert all(again[part] == record[part] for part in ("plane", "grids", "flux", "sensitivity"))


def test_nothing_is_chosen_for_the_grid_before_all_is_measured():
    def results_of(family, *values):
        looks = [
            {kind: dict.fromkeys((2, 3, 4, 8), number) for kind, number in (("raw", v), ("dialled", v**0.5))}
            for v in values
        ]
        jobs = [Job("plane", family, str(i), "moons", 0) for i in range(len(values))]
        return [Result(job, {"looks": {5: look}}, {}, 0) for job, look in zip(jobs, looks, strict=True)]

    results = results_of("a", 0.1, 0.2, 0.4) + results_of("b", 0.1, 0.3, 9.0) + results_of("c", 0.1, 0.2)
    results += results_of("seed", 0.1, 0.15)
    candidates = {"a": ("0", "1", "2"), "b": ("0", "1"), "c": ("0", "1")}  # b's third is on no axis of a grid
    ranked, pair = most_sensitive(results, candidates, "moons")
    assert pair == ("a", "b") and [row["family"] for row in ranked] == ["a", "b", "c"]
    assert [row["beyond_chance"] for row in ranked] == [
        True,
        True,
        False,
    ]  # c: log 2, twice the seeds' log 1.5
    assert ranked[0]["raw"] == pytest.approx(math.log(4), abs=1e-4)
    assert ranked[0]["dialled"] == pytest.approx(math.log(2), abs=1e-4)
    lost = [result._replace(value=None) if i == 4 else result for i, result in enumerate(results)]
    assert most_sensitive(lost, candidates, "moons")[1] == ()
    assert most_sensitive(results[1:], candidates, "moons")[1] == ()


def test_the_rule_restarts_both_averages_when_the_student_has_stopped_leaving_the_slow_one():
    weights = {name: [torch.zeros(2), torch.zeros(1)] for name in ("student", "ema_fast", "ema_slow")}
    rule = RestartWhenStalled(SimpleNamespace(parameters=weights.get), every=2, patience=3)
    away = [1, 2, 3, 4, 5, 6, 6, 6, 6, 5, 5, 4, 9]  # looked at after 2, 4, ...: 2 4 6 6 5 4
    for steps, distance in enumerate(away, 1):
        weights["student"][0].copy_(torch.tensor([float(distance), 0.0]))
        rule(steps)
        assert rule.restarts == ([12] if steps >= 12 else [])
        if steps == 12:
            for name in ("ema_fast", "ema_slow"):
                pairs = zip(weights[name], weights["student"], strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)
    assert weights["ema_slow"][0][0] == 4 and rule.largest == 0  # and from there on it counts anew


def test_a_run_whose_weights_explode_is_a_result_and_no_crash():
    looks = []

    def batch_of(generator, count):
        return checkerboard(count, generator) * (math.inf if looks else 1.0)

    def look(steps):
        looks.append(steps)
        return steps

    config = SCFMConfig(max_train_steps=6, global_batch_size=4)
    found = run(CopiedModels(MLP(4, 1)), batch_of, config, OURS, (2, 6), look)
    assert found["done"] == 2 and found["looks"] == {2: 2, 6: 6} == {n: n for n in looks}


def test_a_student_that_has_run_away_is_far():
    def measure(field, steps, shift):
        return math.nan, math.inf

    def walk(field, steps, shift):
        return torch.full((2, 2), math.nan)

    gone = score_student(measure, (walk, torch.zeros(2, 2)), lambda scale: None, (1, 2), (0.0, 1.0))
    for kind in ("raw", "dialled", "deviation"):
        assert set(gone[kind].values()) == {FAR}
