"""The study `compare` at a size of seconds: every method, within its budget; cells are stored; the record is
whole.
"""

import pytest
from PIL import Image

from experiments.recipes import BUDGETS, SMOKE_BUDGETS
from experiments.studies import compare, compare_flux, compare_front, compare_plane
from experiments.testbeds import tiny_flux
from scfm.method.lora_scale import STEPS

pytestmark = pytest.mark.experiment
STUDY = "compare"
METHODS = ("reflow", "progressive", "consistency", "shortcut", "meanflow", "scfm")
CURVES = {
    "Reflow raw",
    "progressive own stage",
    "progressive last stage",
    "consistency raw",
    "consistency re-noised",
    "Shortcut raw",
    "MeanFlow raw",
    *(
        f"SCFM, {name} {kind}"
        for kind in ("raw", "dialled", "stepwise")
        for name in ("Algorithm 1", "Algorithm 2", "self grid 2", "damped", "tuned")
    ),
}
ON_FLUX = (
    "Reflow raw",
    "progressive own stage",
    "consistency re-noised",
    "SCFM, Algorithm 2 raw",
    "SCFM, damped dialled",
)


def steps_of(curve):
    return tuple(map(int, curve))


def test_a_small_run_writes_every_method_at_every_budget(study):
    record, printed = study.first
    assert list(record["budgets"]) == ["small", "medium", "large"] and not record["missing"]
    for budget in record["budgets"].values():
        curves = budget["main"]["moons"]
        for name in CURVES:
            assert steps_of(curves[name]) == steps_of(curves[f"{name} coupling"]) == compare.SMOKE.steps, name
        assert all(0 < cost["evaluations"] <= budget["evaluations"] for cost in budget["methods"].values())
        assert set(budget["methods"]) == set(METHODS)
    free = record["free"]["moons"]
    assert steps_of(free["teacher multistep"]) == compare.SMOKE.steps
    assert {"teacher euler", "teacher midpoint", "teacher heun"} <= free.keys()
    assert steps_of(free["teacher euler"]) == STEPS
    assert Image.open(study.folder / "compare_summary.png").width > 400
    assert "large: 700 evaluations on the plane" in printed
    assert Image.open(study.folder / "compare.png").height > 500


def test_what_can_be_a_lora_is_measured_on_the_tiny_flux(study):
    record, steps = study.first.record, tiny_flux.SMOKE_SIZES.steps
    curves = record["budgets"]["small"]["main"]["tiny Flux"]
    for name in ON_FLUX:
        assert steps_of(curves[name]) == steps_of(curves[f"{name} accuracy"]) == steps, name
    beyond = str(max(steps))  # the search for scales ends before: there stands the teacher
    assert curves["SCFM, damped dialled"][beyond] == record["free"]["tiny Flux"]["teacher euler"][beyond]
    assert curves["SCFM, damped raw"][beyond] != curves["SCFM, damped dialled"][beyond]
    costs = record["budgets"]["small"]["flux_methods"].values()
    assert all(0 < cost["evaluations"] <= SMOKE_BUDGETS["small"][1] for cost in costs)


def test_a_lost_cell_alone_is_made_again(study):
    whole = study.run().record
    assert whole["cost"]["this_run"]["cells_made"] == 0
    study.lose("few_step_sw2")
    less = study.run("--report", out="less").record
    assert len(less["missing"]) == 1 and less["cost"]["this_run"]["cells_made"] == 0
    again = study.run().record
    assert again["cost"]["this_run"]["cells_made"] == 1 and again["budgets"] == whole["budgets"]


def test_every_method_spends_its_budget_and_no_more():
    flux = tiny_flux.FluxSizes()
    for budget, small in BUDGETS.values():
        for method in METHODS:
            used = compare_plane.spent(compare.FULL, method, budget)
            assert budget - 5 * 5 * compare.FULL.batch < used <= budget, method
        for method, _ in compare.trained_on_flux().values():
            used = compare_flux.spent(flux, method, small)
            assert small - 5 * 4 * flux.batch < used <= small, method


def test_a_scale_for_each_step_costs_no_more_to_find_than_one_for_all():
    *_, evaluations = compare_plane.schedule_search(compare.FULL)
    assert evaluations <= compare_plane.search_cost(compare.FULL)


def test_reflow_spends_half_of_its_budget_on_pairs():
    steps, pairs = compare_plane.plan(compare.FULL, "reflow", 40_000 * 32)
    assert pairs == 20_000 and steps == 640_000 // (3 * 256)


def entry(mean, spread=0.01):
    return {"mean": mean, "spread": spread, "seeds": [mean]}


def record_of(small, large, floor=0.05):
    """A record of one set with two budgets; the teacher's midpoint has .3 at 4 evaluations."""
    return {
        "floor": {"moons": {"high": floor}},
        "free": {"moons": {"teacher midpoint": {4: entry(0.3)}}},
        "budgets": {"small": {"main": {"moons": small}}, "large": {"main": {"moons": large}}},
    }


def test_who_is_first_is_weighed_by_cost_evaluations_and_quality():
    ours = compare_front.OURS
    record = record_of(
        {ours: {3: entry(0.2), 4: entry(0.2)}, "Reflow raw": {2: entry(0.25), 4: entry(0.1)}},
        {
            ours: {3: entry(0.12), 4: entry(0.12)},
            "Reflow raw": {4: entry(0.4)},
            "Shortcut raw": {3: entry(0.06)},
        },
    )
    stands = compare_front.stands(record, ours, ["moons"])
    assert {(s.budget, s.steps): (s.word, s.rival, s.rival_budget, s.rival_steps) for s in stands} == {
        ("small", 3): ("first", "Reflow raw", "small", 2),  # fewer evaluations count against us, more do not
        ("small", 4): ("behind", "Reflow raw", "small", 4),
        ("large", 3): ("behind", "Shortcut raw", "large", 3),
        ("large", 4): ("behind", "Shortcut raw", "large", 3),  # not Reflow's worse large budget
    }
    assert compare_front.standings(record, ["moons"])[ours] == {"first": 1, "level": 0, "behind": 3}
    price = compare_front.worth(record, ["moons"], ours, steps=(4,))
    assert price == {"moons": {"Reflow raw": {4: "small"}}}


def test_the_tiny_flux_is_weighed_by_two_rulers():
    mine = compare_front.ON_FLUX[0]
    curves = {
        mine: {3: entry(0.2)},
        f"{mine} coupling": {3: entry(0.1), 32: entry(0.0)},
        "Reflow raw": {3: entry(0.1)},
        "Reflow raw coupling": {3: entry(0.2)},
    }
    record = record_of(curves, {})
    assert [stand.word for stand in compare_front.stands(record, mine, ["moons"])] == ["behind"]
    by_coupling = compare_front.stands(record, mine, ["moons"], " coupling")
    assert [(stand.word, stand.steps) for stand in by_coupling] == [
        ("first", 3)
    ]  # 32 steps are the goal itself


@pytest.mark.parametrize(
    "one, other, floor, level",
    [
        (entry(0.2), entry(0.219), None, True),  # the deviations together
        (entry(0.2), entry(0.221), None, False),
        (entry(0.2, None), entry(0.219, None), None, True),  # one seed: 5 % of each
        (entry(0.2, None), entry(0.222, None), None, False),
        (entry(0.02, 0.0), entry(0.05, 0.0), {"high": 0.05}, True),
        (entry(0.02, 0.0), entry(0.051, 0.0), {"high": 0.05}, False),
        (entry(0.02, 0.0), entry(0.05, 0.0), {"high": None}, False),
    ],
)
def test_what_counts_as_level(one, other, floor, level):
    assert compare_front.same(one, other, floor) == compare_front.same(other, one, floor) == level


def test_what_a_win_is_worth_is_the_budget_at_which_a_rival_arrives():
    def at(value):
        return {3: entry(value), 4: entry(value), 8: entry(value)}

    ours = compare_front.OURS
    record = record_of(
        {
            ours: at(0.2),
            "SCFM, Algorithm 2 raw": at(0.1),
            "Reflow raw": at(0.4),
            "Shortcut raw": at(0.3),
        },
        {"Reflow raw": at(0.21), "Shortcut raw": at(0.3)},
    )
    price = compare_front.worth(record, ["moons"], ours)
    reached, never = dict.fromkeys((3, 4, 8), "large"), dict.fromkeys((3, 4, 8))
    assert price == {"moons": {"Reflow raw": reached, "Shortcut raw": never}}
    assert "Reflow" in compare_front.worth_text(price, ours)
