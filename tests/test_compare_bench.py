"""bench/compare.py at a size of seconds: every method, within its budget; cells are kept; the record is whole."""
from pathlib import Path

import pytest
from PIL import Image

from scfm.method.lora_scale import STEPS

SCRIPT, BENCH = "compare", Path(__file__).parents[1] / "bench"
METHODS = ("reflow", "progressive", "consistency", "shortcut", "meanflow", "scfm")
CURVES = {"Reflow raw", "progressive own stage", "progressive last stage", "consistency raw", "consistency re-noised",
          "Shortcut raw", "MeanFlow raw", *(f"SCFM, {name} {kind}" for kind in ("raw", "dialled", "stepwise")
                            for name in ("Algorithm 1", "Algorithm 2", "self grid 2", "damped", "tuned"))}


def test_a_small_run_writes_every_method_at_every_budget(bench, folder, capsys):
    record = bench()
    assert list(record["budgets"]) == ["small", "medium", "large"] and not record["missing"]
    step_lora = record["budgets"]["small"]["main"]["tiny Flux"]
    for name in ("Reflow raw", "progressive own stage", "consistency re-noised", "SCFM, Algorithm 2 raw", "SCFM, damped dialled"):
        assert [int(n) for n in step_lora[name]] == [int(n) for n in step_lora[f"{name} accuracy"]] == list(STEPS), name
    assert step_lora["SCFM, damped dialled"]["32"] == record["free"]["tiny Flux"]["teacher euler"]["32"]      # beyond the dial: the teacher
    assert all(0 < cost["evaluations"] <= 200 for cost in record["budgets"]["small"]["flux_methods"].values())
    for budget in record["budgets"].values():
        curves = budget["main"]["moons"]
        for name in CURVES:
            assert [int(n) for n in curves[name]] == [int(n) for n in curves[f"{name} coupling"]] == list(STEPS), name
        assert all(0 < cost["evaluations"] <= budget["evaluations"] for cost in budget["methods"].values())
        assert set(budget["methods"]) == set(METHODS)
    assert [int(n) for n in record["free"]["moons"]["teacher multistep"]] == list(STEPS)
    assert {"teacher euler", "teacher midpoint", "teacher heun"} <= record["free"]["moons"].keys()
    assert Image.open(folder / "compare_summary.png").width > 400
    assert "large: 700 evaluations on the plane" in capsys.readouterr().out and Image.open(folder / "compare.png").height > 500


def test_a_lost_cell_alone_is_made_again(bench, folder):
    bench()                                  # fills the cache, where another process ran the test before
    whole = bench()
    assert whole["cost"]["this_run"]["cells_made"] == 0
    lost = sorted((folder / "cells").glob("few_step_sw2-*"))[0]
    lost.unlink()
    told = bench("--report", out="less")
    assert len(told["missing"]) == 1 and told["cost"]["this_run"]["cells_made"] == 0
    again = bench()
    assert again["cost"]["this_run"]["cells_made"] == 1 and again["budgets"] == whole["budgets"]


def test_every_method_spends_its_budget_and_no_more_and_reflow_half_of_it_on_pairs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import compare
    import compare_cells
    import compare_flux
    flux = compare_flux.FluxProtocol()
    for budget, small in compare.BUDGETS.values():
        for method in METHODS:
            used = compare_cells.spent(compare.FULL, method, budget)
            assert budget - 5 * 5 * compare.FULL.batch < used <= budget, method
        for method, _ in compare.trained_on_flux().values():
            used = compare_flux.spent(flux, method, small)
            assert small - 5 * 4 * flux.batch < used <= small, method
    assert compare_cells.step_search(compare.FULL)[2] <= compare_cells.dial_search(compare.FULL)      # `stepwise` pays with what the dial would
    updates, pairs = compare_cells.plan(compare.FULL, "reflow", 40_000 * 32)
    assert pairs == 20_000 and updates == 640_000 // (3 * 256)


def entry(mean, spread=.01):
    return {"mean": mean, "spread": spread, "seeds": [mean]}


@pytest.fixture
def front(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import compare_front
    return compare_front


def record_of(small, large, floor=.05):
    """A record of one set with two budgets; the teacher's midpoint has .3 at 4 evaluations."""
    return {"floor": {"moons": {"high": floor}}, "free": {"moons": {"teacher midpoint": {4: entry(.3)}}},
            "budgets": {"small": {"main": {"moons": small}}, "large": {"main": {"moons": large}}}}


def test_who_is_first_is_weighed_by_cost_evaluations_and_quality(front):
    ours = front.OURS
    record = record_of({ours: {3: entry(.2), 4: entry(.2)}, "Reflow raw": {2: entry(.25), 4: entry(.1)}},
                       {ours: {3: entry(.12), 4: entry(.12)}, "Reflow raw": {4: entry(.4)}, "Shortcut raw": {3: entry(.06)}})
    words = {(s.budget, s.steps): (s.word, s.rival, s.rival_budget, s.rival_steps) for s in front.stands(record, ours, ["moons"])}
    assert words == {("small", 3): ("first", "Reflow raw", "small", 2),          # fewer evaluations count against us, more do not
                     ("small", 4): ("behind", "Reflow raw", "small", 4),
                     ("large", 3): ("behind", "Shortcut raw", "large", 3),
                     ("large", 4): ("behind", "Shortcut raw", "large", 3)}       # not Reflow's worse large budget; its small one is .1
    assert front.standings(record, ["moons"])[ours] == {"first": 1, "level": 0, "behind": 3}
    price = front.worth(record, ["moons"], ours, steps=(4,))
    assert price == {"moons": {"Reflow raw": {4: "small"}}}


def test_the_tiny_flux_is_weighed_by_two_rulers(front):
    mine = front.ON_FLUX[0]
    record = record_of({mine: {3: entry(.2)}, f"{mine} coupling": {3: entry(.1), 32: entry(0.)}, "Reflow raw": {3: entry(.1)}, "Reflow raw coupling": {3: entry(.2)}}, {})
    assert [s.word for s in front.stands(record, mine, ["moons"])] == ["behind"]
    assert [(s.word, s.steps) for s in front.stands(record, mine, ["moons"], " coupling")] == [("first", 3)]      # 32 steps are the goal itself


@pytest.mark.parametrize("one, other, floor, level", [
    (entry(.2), entry(.219), None, True), (entry(.2), entry(.221), None, False),                      # the deviations together
    (entry(.2, None), entry(.219, None), None, True), (entry(.2, None), entry(.222, None), None, False),      # one seed: 5 % of each
    (entry(.02, 0.), entry(.05, 0.), {"high": .05}, True), (entry(.02, 0.), entry(.051, 0.), {"high": .05}, False),
    (entry(.02, 0.), entry(.05, 0.), {"high": None}, False)])
def test_what_counts_as_level(front, one, other, floor, level):
    assert front.same(one, other, floor) == front.same(other, one, floor) == level


def test_what_a_win_is_worth_is_the_budget_at_which_a_rival_arrives(front):
    ours = front.OURS
    at = lambda value: {3: entry(value), 4: entry(value), 8: entry(value)}
    record = record_of({ours: at(.2), "SCFM, Algorithm 2 raw": at(.1), "Reflow raw": at(.4), "Shortcut raw": at(.3)}, {"Reflow raw": at(.21), "Shortcut raw": at(.3)})
    assert front.worth(record, ["moons"], ours) == {"moons": {"Reflow raw": dict.fromkeys((3, 4, 8), "large"), "Shortcut raw": dict.fromkeys((3, 4, 8))}}
    assert "Reflow" in front.worth_text(front.worth(record, ["moons"], ours), ours)
