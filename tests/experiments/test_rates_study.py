"""The study `rates` at a size of seconds, and what it calls a method's own on numbers that are known."""

import math

import pytest
from PIL import Image

from experiments.runner import Job, Result
from experiments.studies.rates_report import best_settings, places, ratio
from experiments.testbeds.plane import SMOKE_SIZES, longer, make_recipe

pytestmark = pytest.mark.experiment
STUDY = "rates"
METHODS = {"Reflow", "progressive", "consistency", "Shortcut", "MeanFlow", "SCFM, tuned", "scale trained in"}


def test_a_small_run_searches_for_all_and_measures_on_other_seeds(study):
    record, printed = study.first
    assert not record["missing"] and set(record["own"]) == set(record["search"]) == METHODS
    assert all(len(of_method) == 4 for of_method in record["search"].values())
    for label, setting in record["own"].items():
        entry = record["held out"]["moons"][f"{label}: {setting} sw2"]["3"]
        assert len(entry["seeds"]) == 2 and f"{label}: as it is sw2" in record["held out"]["moons"]
    assert Image.open(study.folder / "rates.png").width > 400 and "its own, on seeds 1 and 2" in printed
    assert set(record["places"]["moons"]) == {"1", "3", "4", "8", "16"}


def test_each_setting_trains_another_student(study):
    of_search = study.first.record["search"]
    for label, of_method in of_search.items():  # a change that does not arrive has a ratio of 1 exactly
        assert of_method["learning rate x 3"] != 1, label
    assert of_search["progressive"]["EMA memory x 4"] != 1


def results(**settings):
    return [
        Result(Job("search", "m", f"m: {setting}", "moons", 0), value and {"sw2": value}, {}, 0)
        for setting, value in settings.items()
    ]


def test_the_own_setting_is_the_lowest_mean_or_what_it_has():
    found = results(**{"as it is": {1: 1.0, 2: 4.0}, "a": {1: 0.5, 2: 4.0}, "b": {1: 1.0, 2: 1.0}})
    assert ratio(found, "m", "a") == pytest.approx(0.5**0.5) and best_settings(found, ["m"]) == {"m": "b"}
    found = results(**{"as it is": {1: 1.0}, "worse": {1: 1.5}, "ran away": None, "no number": {1: math.nan}})
    assert best_settings(found, ["m"]) == {"m": "as it is"}


def test_each_place_is_held_against_the_best_rival_with_its_own_settings():
    def curve(*by_steps):
        return {n: {"seeds": [v, v], "mean": v, "spread": 0.0} for n, v in zip((1, 4), by_steps, strict=True)}

    held_out = {"us: a sw2": curve(1.0, 2.0), "b: as it is sw2": curve(1.5, 1.0), "c: a sw2": curve(1.2, 3.0)}
    held_out["b: a sw2"] = curve(0.1, 0.1)  # not its own
    record = {"own": {"us": "a", "b": "as it is", "c": "a"}, "held out": {"moons": held_out}}
    found = places(record, "us")["moons"]
    assert (found[1]["word"], found[1]["name"]) == ("first", "c")
    assert (found[4]["word"], found[4]["name"]) == ("behind", "b")


def test_the_memory_is_so_many_times_as_long():
    plain = make_recipe(SMOKE_SIZES, {"max_train_steps": 4000}).config
    long = make_recipe(SMOKE_SIZES, {"max_train_steps": 4000, "ema_memory": 4}).config
    for name in ("ema_decay_fast", "ema_decay_slow"):
        assert 1 / (1 - long[name]) == pytest.approx(4 / (1 - plain[name]))
    assert longer(0.5, 0.25) == 0 and longer(0.9, 1) == 0.9
