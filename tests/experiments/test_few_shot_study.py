"""The study `few_shot`: its intervals against scipy's, its subsets and trainings, and all of it at a size of
seconds.
"""

import dataclasses

import pytest
import torch
from PIL import Image
from scipy import stats

from experiments.runner import CellCache, Job
from experiments.studies import few_shot
from experiments.studies import few_shot_report as report
from experiments.testbeds.plane import Plane
from experiments.testbeds.taught_flux import TaughtFlux, spread, subset
from experiments.testbeds.tiny_flux import PROMPTS
from scfm.data.prompts import read_prompts
from scfm.method.distill import SCFMConfig, jumps_from_config
from scfm.streams import keyed_generator
from toy.judge import draw_unknown, named_in

pytestmark = pytest.mark.experiment
STUDY = "few_shot"
WORLDS = ["moons", "tiny Flux, seen pairs", "tiny Flux, held-out pairs"]


def test_a_small_run_writes_every_world_and_method(study):
    record, printed = study.first
    assert list(record["worlds"]) == WORLDS and not record["missing"]
    for name, world in record["worlds"].items():
        assert list(world["methods"]) == ["SCFM", "SCFM, dialled", "fine-tuning"], name
        for sizes in world["methods"].values():
            assert list(sizes) == ["all", "1"]
            for size, curve in sizes.items():
                assert curve.keys() == world["teacher"].keys()
                for marks in curve.values():
                    assert marks.keys() == report.METRICS[world["part"]].keys()
                    runs = 1 if size == "all" else 2
                    assert all(len(entry["values"]) == runs for entry in marks.values())
        assert world["ahead"]["1"] and world["verdicts"].keys() == world["methods"].keys() and world["floor"]
    seen, held_out = (record["worlds"][name]["teacher"] for name in WORLDS[1:])
    assert seen != held_out
    assert record["dials"].keys() == {"moons", "tiny Flux"}
    assert record["dials"]["tiny Flux"]["1"].keys() == {"0", "1"}
    assert "nothing lost from" in printed
    images = [Image.open(study.folder / f"few_shot_{part}.png") for part in ("plane", "flux", "summary")]
    assert all(image.width > 300 for image in images)


def test_a_lost_cell_alone_is_made_again(study):
    whole = study.run().record
    assert whole["cost"]["this_run"]["cells_made"] == 0
    study.lose("few_flux")
    less = study.run("--report", out="less").record
    assert len(less["missing"]) == 1 and less["cost"]["this_run"]["cells_made"] == 0
    assert study.run("--only", "plane", out="less").record["missing"] == less["missing"]
    again = study.run().record
    assert again["cost"]["this_run"]["cells_made"] == 1 and again["worlds"] == whole["worlds"]


def test_intervals_are_those_of_the_textbook():
    few, many = [0.31, 0.36, 0.29, 0.35, 0.33], [0.30, 0.27, 0.31]
    found = report.worse_by(few, many, 1)
    expected = stats.ttest_ind(few, many, equal_var=True).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=1e-5)
    assert found["p"] == pytest.approx(stats.ttest_ind(few, many, alternative="greater").pvalue)
    mean, expected = report.interval(few), stats.t.interval(0.95, 4, stats.tmean(few), stats.sem(few))
    assert (mean["mean"] - mean["half"], mean["mean"] + mean["half"]) == pytest.approx(expected, abs=2e-5)


def test_one_run_with_all_images_is_compared_by_a_prediction_interval():
    few = [0.31, 0.36, 0.29, 0.35, 0.33]
    found = report.worse_by(few, [0.30], -1)
    half = stats.t.ppf(0.975, 4) * stats.tstd(few) * (1 + 1 / 5) ** 0.5
    assert found["difference"] == pytest.approx(0.30 - stats.tmean(few), abs=1e-5)
    assert found["high"] - found["difference"] == pytest.approx(half, abs=2e-5)
    too_little = {"difference": 0.01, "low": None, "high": None, "p": None, "margin": 0}
    assert report.worse_by([0.31], [0.30], 1) == too_little


def test_nothing_lost_means_at_this_size_and_all_larger_ones():
    def at(low, p):
        return {"3": {"sw2": {"difference": 0.0, "low": low, "high": 1.0, "p": p, "margin": 0.1}}}

    found = report.verdicts(
        {
            "a": {"1": at(-1, 0.5), "3": at(0.1, 0.001), "10": at(-1, 0.5), "30": at(-1, 0.9)},
            "b": {"30": at(0.1, 0.02)},
            "c": {"1": at(None, None)},
        }
    )
    assert found["a"]["smallest"] == "10"
    assert [len(verdict["lost"]) for verdict in found["a"]["at"].values()] == [0, 1, 0, 0]
    assert found["b"]["smallest"] is None and found["c"]["smallest"] is None  # c has no test at all


def words(*tests):
    """The words of tests (p, high), in the order of p."""
    tests = [{"p": p, "high": high, "margin": 0.1} for p, high in tests]
    return [test["word"] for test in report.worded(tests)]


def test_the_words_of_a_size_are_holm_s_and_a_margin_s():
    assert words((0.02, 1.0)) == ["lost"]
    assert words((0.02, 1.0), (0.5, 1.0)) == ["cannot tell"] * 2  # .02 > .025 / 2
    assert words((0.012, 1.0), (0.024, 1.0)) == ["lost", "lost"]
    assert words((0.013, 1.0), (0.013, 1.0)) == ["cannot tell"] * 2
    assert words((0.0, 0.05), (0.5, 0.1)) == [
        "as good",
        "as good",
    ]  # a sure loss within the margin is as good
    sure = report.worse_by([0.99] * 5, [1.0], -1, (0.01, False))
    assert sure | {"p": 0.0} == {"difference": 0.01, "low": 0.01, "high": 0.01, "p": 0.0, "margin": 0.01}
    assert report.worse_by([0.2, 0.3], [0.5], 1, (0.05, True))["margin"] == 0.025


def test_images_more_varied_than_the_teacher_s_are_no_gain_and_no_loss():
    def curve(values):
        others = dict.fromkeys(("prompt_accuracy", "frechet", "endpoint"), {"values": {0: 1.0}})
        return {"3": {"spread": {"values": dict(enumerate(values))}, **others}}

    sizes = {"all": curve([1.3]), "1": curve([1.1, 1.05]), "3": curve([0.8, 0.81])}
    found = report.lost({"part": "flux", "methods": {"SCFM": sizes}})["SCFM"]
    alike = {"difference": 0, "low": 0, "high": 0, "p": 1.0, "margin": 0.05}
    assert found["1"]["3"]["spread"] == alike and found["3"]["3"]["spread"]["low"] > 0


def test_scfm_and_fine_tuning_are_paired_by_subset():
    def curve(values):
        others = dict.fromkeys(("coverage", "endpoint", "spread"), {"values": {}})
        return {"1": {"3": {"sw2": {"values": values}, **others}}}

    methods = {"SCFM": curve({"0": 0.1, "1": 0.2, "2": 0.3}), "fine-tuning": curve({"2": 0.7, "0": 0.3})}
    ahead = report.ahead({"part": "plane", "methods": methods})
    assert ahead["1"]["3"]["sw2"]["mean"] == pytest.approx(0.3)  # of .2 and .4


def test_a_judge_s_captions_are_none_of_those_known():
    def drawn(known, count=32):
        return draw_unknown(count, torch.Generator().manual_seed(1), False, known)

    free, known = drawn(()), frozenset(read_prompts(PROMPTS))
    assert known & set(free.text)  # it happens, unless they are left out
    unknown = drawn(known)
    assert not known & set(unknown.text) and len(unknown.text) == len(unknown.named) == 32
    assert unknown.named[0].tolist() == named_in(unknown.text[0])
    with pytest.raises(ValueError, match="ask for fewer"):
        drawn(frozenset(drawn((), 128).text))


def test_subsets_are_nested_and_differ():
    def images(size, seed):
        return subset(size, seed, 256).tolist()

    assert images(100, 2)[:10] == images(10, 2) and images(10, 2) != images(10, 3)
    assert sorted(images(0, 1)) == list(range(256)) and len(set(images(100, 0))) == 100


def test_fine_tuning_differs_in_the_targets_of_its_examples_alone():
    bed = TaughtFlux(CellCache("unused"), few_shot.Sizes().flux)
    scfm, tuned = (dataclasses.asdict(bed.config(change)) for change in few_shot.TRAININGS.values())
    assert {name for name in scfm if scfm[name] != tuned[name]} == {"non_shortcut_ratio"}

    def is_flow(settings):
        return jumps_from_config(SCFMConfig(**settings), 64, keyed_generator(0, 0)).is_flow

    assert is_flow(tuned).all() and not is_flow(scfm).any()


def test_every_size_and_subset_is_measured_of_both_trainings():
    sizes = few_shot.Sizes()
    students = [job for job in few_shot.jobs(sizes) if job.family != "teacher"]
    count = {part: len([job for job in students if job.part == part]) for part in few_shot.PARTS}
    assert count == {"plane": 2 * 3 * (5 * 5 + 3), "flux": 2 * (5 * 5 + sizes.wholes["flux"])}
    assert {job.change["few"] for job in students} == {0, 1, 3, 10, 30, 100}


def test_the_spread_of_images_of_one_caption():
    images = (
        torch.tensor([0.0, 2.0, 5.0, 5.0]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    )  # two captions, two noises each
    assert spread(images, 2) == pytest.approx(((2 + 0) / 2) ** 0.5)


def test_a_seed_of_training_leaves_the_plane_s_old_cells_valid(tmp_path):
    sizes = few_shot.PlaneSizes(teacher_updates={"moons": 1}, updates=1, batch=2)
    bed = Plane(CellCache(tmp_path), sizes)

    def spec(**change):
        return bed.student(Job("plane", "scfm", "", "moons", 0, change))[1]

    assert spec() == spec(seed=0) and bed.cache.made == 2  # the teacher and one student
    assert spec(seed=1)["config"]["seed"] == 1 and bed.cache.made == 3
