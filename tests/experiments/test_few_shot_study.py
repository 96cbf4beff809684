"""bench/few_shot.py: its intervals against scipy's, its subsets and trainings, and all of it at a size of seconds."""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from scipy import stats

from scfm.method.consistency import keyed_generator
from scfm.method.distill import SCFMConfig, jumps_from_config
from toy.judge import draw_unknown, named_in

SCRIPT, BENCH = "few_shot", Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))
import cells
import few_shot
import few_shot_flux
import few_shot_report as report
import plane_cells
from few_shot_plane import PlaneProtocol

sys.path.remove(str(BENCH))


def test_a_small_run_writes_every_world_and_method(bench, folder, capsys):
    record = bench()
    assert list(record["worlds"]) == ["moons", "tiny Flux, seen pairs", "tiny Flux, held-out pairs"] and not record["missing"]
    for name, world in record["worlds"].items():
        assert list(world["methods"]) == ["SCFM", "SCFM, dialled", "fine-tuning"], name
        for sizes in world["methods"].values():
            assert list(sizes) == ["all", "1"]
            for size, curve in sizes.items():
                assert curve.keys() == world["teacher"].keys()
                for marks in curve.values():
                    assert marks.keys() == report.METRICS[world["part"]].keys()
                    assert all(len(entry["values"]) == (1 if size == "all" else 2) for entry in marks.values())
        assert world["ahead"]["1"] and world["verdicts"].keys() == world["methods"].keys() and world["floor"]
    assert record["worlds"]["tiny Flux, seen pairs"]["teacher"] != record["worlds"]["tiny Flux, held-out pairs"]["teacher"]
    assert record["dials"].keys() == {"moons", "tiny Flux"} and record["dials"]["tiny Flux"]["1"].keys() == {"0", "1"}
    assert "nothing lost from" in capsys.readouterr().out
    assert all(Image.open(folder / f"few_shot_{part}.png").width > 300 for part in ("plane", "flux", "summary"))


def test_a_lost_cell_alone_is_made_again(bench, folder):
    bench()                                  # fills the cache, where another process ran the test before
    whole = bench()
    assert whole["cost"]["this_run"]["cells_made"] == 0
    lost = sorted((folder / "cells").glob("few_flux-*"))[0]
    lost.unlink()
    told = bench("--report", out="less")
    assert len(told["missing"]) == 1 and told["cost"]["this_run"]["cells_made"] == 0
    assert bench("--only", "plane", out="less")["missing"] == told["missing"]
    again = bench()
    assert again["cost"]["this_run"]["cells_made"] == 1 and again["worlds"] == whole["worlds"]


def test_intervals_are_those_of_the_textbook():
    few, many = [.31, .36, .29, .35, .33], [.30, .27, .31]
    told, expected = report.worse_by(few, many, 1), stats.ttest_ind(few, many, equal_var=True).confidence_interval(.95)
    assert (told["low"], told["high"]) == pytest.approx((expected.low, expected.high), abs=1e-5)
    assert told["p"] == pytest.approx(stats.ttest_ind(few, many, alternative="greater").pvalue)
    mean, expected = report.interval(few), stats.t.interval(.95, 4, stats.tmean(few), stats.sem(few))
    assert (mean["mean"] - mean["half"], mean["mean"] + mean["half"]) == pytest.approx(expected, abs=2e-5)


def test_one_run_with_all_images_is_compared_by_a_prediction_interval():
    few = [.31, .36, .29, .35, .33]
    told = report.worse_by(few, [.30], -1)
    half = stats.t.ppf(.975, 4) * stats.tstd(few) * (1 + 1 / 5) ** .5
    assert told["difference"] == pytest.approx(.30 - stats.tmean(few), abs=1e-5)
    assert told["high"] - told["difference"] == pytest.approx(half, abs=2e-5)
    assert report.worse_by([.31], [.30], 1) == {"difference": .01, "low": None, "high": None, "p": None, "margin": 0}      # too little to say


def test_nothing_lost_means_at_this_size_and_all_larger_ones():
    row = lambda low, p: {"3": {"sw2": {"difference": 0., "low": low, "high": 1., "p": p, "margin": .1}}}
    found = report.verdicts({"a": {"1": row(-1, .5), "3": row(.1, .001), "10": row(-1, .5), "30": row(-1, .9)}, "b": {"30": row(.1, .02)},
                             "c": {"1": row(None, None)}})
    assert found["a"]["smallest"] == "10" and [len(at["lost"]) for at in found["a"]["at"].values()] == [0, 1, 0, 0]
    assert found["b"]["smallest"] is None and found["c"]["smallest"] is None        # nothing was said of c at all


def test_the_words_of_a_size_are_holm_s_and_a_margin_s():
    test = lambda p, high=1.: {"p": p, "high": high, "margin": .1}
    words = lambda *tests: [told["word"] for told in report.worded(tests)]               # in the order of p
    assert words(test(.02)) == ["lost"] and words(test(.02), test(.5)) == ["cannot tell"] * 2       # .02 > .025 / 2
    assert words(test(.012), test(.024)) == ["lost", "lost"] and words(test(.013), test(.013)) == ["cannot tell"] * 2
    assert words(test(0., .05), test(.5, .1)) == ["as good", "as good"]                  # a sure loss within the margin is as good
    assert report.worse_by([.99] * 5, [1.], -1, (.01, False)) | {"p": 0.} == {"difference": .01, "low": .01, "high": .01, "p": 0., "margin": .01}
    assert report.worse_by([.2, .3], [.5], 1, (.05, True))["margin"] == .025


def test_images_more_varied_than_the_teacher_s_are_no_gain_and_no_loss():
    curve = lambda values: {"3": {"spread": {"values": dict(enumerate(values))}}}
    sizes = {"all": curve([1.3]), "1": curve([1.1, 1.05]), "3": curve([.8, .81])}
    for steps in sizes.values():
        for metric in ("prompt_accuracy", "frechet", "endpoint"):
            steps["3"][metric] = {"values": {0: 1.}}
    found = report.lost({"part": "flux", "methods": {"SCFM": sizes}})["SCFM"]
    assert found["1"]["3"]["spread"] == {"difference": 0, "low": 0, "high": 0, "p": 1., "margin": .05} and found["3"]["3"]["spread"]["low"] > 0


def test_the_record_is_written_short_and_whole():
    record = {"a": {"b": {"0": .5, "1": [1, 2]}}, "c": [{"d": "x  y"}]}
    text = cells.short(json.dumps(record, indent=1))
    assert json.loads(text) == record and len(text.splitlines()) < len(json.dumps(record, indent=1).splitlines()) / 2


def test_scfm_and_fine_tuning_are_paired_by_subset():
    curve = lambda values: {"1": {"3": {"sw2": {"values": values}}}}
    world = {"part": "plane", "methods": {"SCFM": curve({"0": .1, "1": .2, "2": .3}), "fine-tuning": curve({"2": .7, "0": .3})}}
    for part in world["methods"].values():
        for metric in ("coverage", "endpoint", "spread"):
            part["1"]["3"][metric] = {"values": {}}
    assert report.ahead(world)["1"]["3"]["sw2"]["mean"] == pytest.approx(.3)        # of .2 and .4


def test_a_judge_s_captions_are_none_of_those_known():
    drawn = lambda known, count=32: draw_unknown(count, torch.Generator().manual_seed(1), False, known)
    free, known = drawn(()), frozenset(few_shot_flux.read_prompts(few_shot_flux.PROMPTS))
    assert known & set(free.text)                                       # it happens, unless they are left out
    asked = drawn(known)
    assert not known & set(asked.text) and len(asked.text) == len(asked.named) == 32
    assert asked.named[0].tolist() == named_in(asked.text[0])
    with pytest.raises(ValueError, match="ask for fewer"):
        drawn(frozenset(drawn((), 128).text))


def test_subsets_are_nested_and_differ(monkeypatch):
    rows = lambda size, subset: few_shot_flux.rows_of(SimpleNamespace(size=size, subset=subset), 256).tolist()
    assert rows(100, 2)[:10] == rows(10, 2) and rows(10, 2) != rows(10, 3)
    assert sorted(rows(0, 1)) == list(range(256)) and len(set(rows(100, 0))) == 100


def test_fine_tuning_differs_in_what_its_rows_ask_alone():
    job = lambda change: SimpleNamespace(subset=1, change=change)
    told = {name: few_shot_flux.flux_config(few_shot.Protocol().flux, job(change)) for name, change in few_shot.TRAININGS.items()}
    scfm, step_lora = (vars(told[name][0]) for name in ("scfm", "tuned"))
    assert {name for name in scfm if scfm[name] != step_lora[name]} == {"non_shortcut_ratio"} and told["scfm"][1:] == told["tuned"][1:]
    is_flow = lambda fields: jumps_from_config(SCFMConfig(**fields), 64, keyed_generator(0, 0)).is_flow
    assert is_flow(step_lora).all() and not is_flow(scfm).any()


def test_every_size_and_subset_is_asked_of_both_trainings():
    protocol = few_shot.Protocol()
    todo = [job for job in few_shot.jobs(protocol) if job.family != "teacher"]
    count = {part: len([job for job in todo if job.part == part]) for part in ("plane", "flux")}
    assert count == {"plane": 2 * 3 * (5 * 5 + 3), "flux": 2 * (5 * 5 + protocol.wholes["flux"])}
    assert {job.size for job in todo} == {0, 1, 3, 10, 30, 100}


def test_the_spread_of_images_of_one_caption():
    images = torch.tensor([0., 2., 5., 5.]).view(4, 1, 1, 1).expand(4, 3, 2, 2)       # two captions, two noises each
    assert few_shot_flux.spread(images, 2) == pytest.approx(((2 + 0) / 2) ** .5)


def test_a_seed_of_training_leaves_the_plane_s_old_cells_valid(tmp_path):
    protocol, cache = PlaneProtocol(teacher_updates={"moons": 1}, updates=1, batch=2), plane_cells.Cache(tmp_path)
    student = lambda **change: plane_cells.student(cache, protocol, SimpleNamespace(data="moons", seed=0, change=change))[1]
    assert student() == student(seed=0) and cache.made == 2                          # the teacher and one student
    assert student(seed=1)["config"]["seed"] == 1 and cache.made == 3
