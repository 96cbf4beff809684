"""bench/compare.py at a size of seconds: every method, within its budget; cells are kept; the record is whole."""
from pathlib import Path

from PIL import Image

from scfm.dial import STEPS

SCRIPT, BENCH = "compare", Path(__file__).parents[1] / "bench"
METHODS = ("reflow", "progressive", "consistency", "shortcut", "meanflow", "scfm")
CURVES = {"Reflow raw", "progressive own stage", "progressive last stage", "consistency raw", "consistency re-noised",
          "Shortcut raw", "MeanFlow raw", *(f"SCFM, {name} {kind}" for kind in ("raw", "dialled")
                            for name in ("Algorithm 1", "Algorithm 2", "self grid 2", "damped"))}


def test_a_small_run_writes_every_method_at_every_budget(bench, folder, capsys):
    record = bench()
    assert list(record["budgets"]) == ["small", "medium", "large"] and not record["missing"]
    tuned = record["budgets"]["small"]["main"]["tiny Flux"]
    for name in ("Reflow raw", "progressive own stage", "consistency re-noised", "SCFM, Algorithm 2 raw", "SCFM, damped dialled"):
        assert [int(n) for n in tuned[name]] == [int(n) for n in tuned[f"{name} accuracy"]] == list(STEPS), name
    assert tuned["SCFM, damped dialled"]["32"] == record["free"]["tiny Flux"]["teacher euler"]["32"]      # beyond the dial: the teacher
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
    updates, pairs = compare_cells.plan(compare.FULL, "reflow", 40_000 * 32)
    assert pairs == 20_000 and updates == 640_000 // (3 * 256)
