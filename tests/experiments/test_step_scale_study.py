"""The study `step_scale` at a size of seconds, and its words on numbers that are known."""

from functools import partial

import pytest
from PIL import Image

from experiments.curves import recall
from experiments.runner import Job, Result, words_of
from experiments.studies import step_scale_report
from experiments.studies.step_scale_cells import short_decay

pytestmark = pytest.mark.experiment
STUDY = "step_scale"


def test_a_small_run_measures_every_part(study):
    record, printed = study.first
    assert not record["missing"] and set(record["budgets"]) == {"small", "medium", "large"}
    curves = record["budgets"]["small"]["tiny Flux"]
    for label in ("one difference", "two differences", "two differences, rank 8"):
        for kind in ("frechet", "prompt_accuracy", "endpoint"):
            assert set(curves[f"{label} {kind}"]) == {"1", "3", "4"}
    assert {"two differences sw2", "two differences endpoint"} <= record["budgets"]["large"]["moons"].keys()
    assert record["scratch"]["moons"].keys() >= {"plain sw2", "scale trained in, a quarter base"}
    assert "p = .5 sw2" in record["choices"]["moons"]
    assert Image.open(study.folder / "step_scale.png").width > 400 and "lowest" in printed
    places = record["against"]["two differences"]["small"]
    assert set(places["moons"]["3"]) == {"ours", "rival", "name", "word"}


def test_a_lost_cell_alone_is_made_again(study):
    study.lose("step_scale_marks")
    again = study.run().record
    assert again["cost"]["this_run"]["cells_made"] == 1
    assert again["budgets"] == study.first.record["budgets"]


def test_what_the_cells_lack_stays_as_it_is_recorded(study):
    study.lose("step_scale_scratch_sw2")
    again = study.run("--report", "--keep").record
    assert not again["missing"] and again["kept"]["cells"] == study.first.record["cost"]["cells"]
    assert study.run("--report", "--keep").record["kept"] == again["kept"] != again["cost"]
    for part in ("budgets", "scratch", "choices", "against"):
        assert again[part] == study.first.record[part]


def test_a_seed_that_is_new_stands_beside_those_that_are_recorded():
    jobs = [Job("scratch", "f", "plain", "moons", seed) for seed in range(3)]
    entries = {"plain sw2": {"1": {"seeds": [0.5, 0.7]}}}  # of the seeds 0 and 2
    record = {"missing": [words_of(jobs[1])], "scratch": {"moons": entries}}
    values = [None, {"sw2": {1: 0.6}}, None]
    results = [Result(job, value, {}, 0) for job, value in zip(jobs, values, strict=True)]
    kept = recall(results, record, partial(step_scale_report.curves_of, budgets={}))
    assert [result.value for result in kept] == [{"sw2": {1: number}} for number in (0.5, 0.6, 0.7)]


@pytest.mark.parametrize(
    "ours, rival, word",
    [
        ((0.9, 0.01), (1.0, 0.01), "first"),
        ((0.9, 0.06), (1.0, 0.06), "level"),
        ((1.1, 0.01), (1.0, 0.01), "behind"),
        ((0.92, None), (1.0, None), "level"),  # 5 % of each
        ((0.85, None), (1.0, None), "first"),
    ],
)
def test_a_place_is_a_word(ours, rival, word):
    one, other = ({"mean": mean, "spread": spread} for mean, spread in (ours, rival))
    assert step_scale_report.stand(one, other, "somebody")["word"] == word


def test_the_memory_of_the_ema_grows_with_the_root_of_the_training():
    assert [round(1 / (1 - short_decay(steps)), 1) for steps in (2, 200, 800)] == [1.0, 5.1, 10.2]
