"""The study `variants` at a size of seconds, and its verdict on numbers that are known."""

import pytest
import torch
from PIL import Image

from experiments.runner import Job, Result
from experiments.studies import variants_report
from experiments.studies.variants_cells import Table, choice_info, choose
from experiments.testbeds.plane import ramp_teacher_ratio
from scfm.method.distill import CopiedModels, SCFMConfig, distill
from toy.plane import MLP

pytestmark = pytest.mark.experiment
STUDY = "variants"
TABLE = Table(scales=(0.0, 0.5, 1.0))


def test_a_small_run_measures_both_worlds_and_stores_what_it_made(study):
    record, printed = study.first
    assert not record["missing"] and set(record["worlds"]) == {"plane", "tiny Flux"}
    for world in record["worlds"].values():
        assert set(world) == {"base", "base, seed 1", "k/N .1", "each step"}
        for of_set in world.values():
            for found in of_set.values():
                assert set(found["quality"]) == set(found["endpoints"]) == {"2", "3"}
    assert all(set(found) == {"plane", "tiny Flux"} for found in record["ratios"].values())
    assert Image.open(study.folder / "variants.png").width > 400 and "times the base" in printed


BEST = {2: (0.6, 0.9), 3: (1.1, 0.5, 0.3), 4: (0.7, 0.2, 0.2, 0.4), 8: (0.3,) * 8}


def distance(scales):
    return (0.1 + sum((a - b) ** 2 for a, b in zip(scales, BEST[len(scales)], strict=True))) ** 0.5


def test_the_dial_never_rises_and_the_free_choice_may():
    def tilted(scales):
        return distance(scales) + 3 * (len(scales) == 2) * scales[0]

    dial, free = (choose(rule, tilted, TABLE) for rule in ("dial", "free"))
    assert free[2] == (0.0, 0.0) and free[3] == (0.5,) * 3  # the scale may rise again after 2 steps
    assert dial[2][0] >= dial[3][0] >= dial[4][0] >= dial[8][0]


def test_each_rule_chooses_the_smallest_distance_that_it_may():
    rules = {rule: choose(rule, distance, TABLE) for rule in ("dial", "smooth", "each step")}
    for n in (2, 3, 4, 8):
        by_rule = [distance(rules[rule][n]) for rule in ("dial", "smooth", "each step")]
        assert by_rule == sorted(by_rule, reverse=True)
        assert len(set(rules["dial"][n])) == len(set(rules["smooth"][n])) == 1
        assert rules["each step"][n] == pytest.approx(BEST[n], abs=0.02)


def value(endpoints, quality=1.0, accuracy=None, at_the_end=False):
    found = {"endpoints": endpoints, "quality": quality}
    if accuracy is not None:
        found["accuracy"] = accuracy
    return {kind: dict.fromkeys((2, 4), number) for kind, number in found.items()} | {
        "at_the_end": at_the_end
    }


def result(part, label, value):
    return Result(Job(part, "scfm", label, part, 0), value, {}, 0)


def test_a_variant_wins_only_where_it_gains_more_than_chance_in_both_worlds_and_the_quality_holds():
    plane = {
        "base": (1.0,),
        "base, seed 1": (0.85,),
        "better": (0.8, 1.0),
        "worse cloud": (0.8, 1.2),
        "worse reading": (0.8, 1.0),
        "chance": (0.86, 1.0),
        "level": (0.95, 0.9),
    }
    flux = {
        "base": (1.0, 1.0, 0.99),
        "base, seed 1": (1.1, 1.0, 0.99),
        "better": (0.8, 9.0, 0.985),
        "worse cloud": (0.8, 1.0, 0.99),
        "worse reading": (0.8, 1.0, 0.97),
        "chance": (0.8, 1.0, 0.99),
        "level": (0.8, 1.0, 0.99),
    }
    results = [
        result(part, label, value(*numbers))
        for part, of_part in (("plane", plane), ("tiny Flux", flux))
        for label, numbers in of_part.items()
    ]
    results += [result("plane", "plane alone", value(0.5)), result("tiny Flux", "plane alone", None)]
    record = variants_report.gather(results)
    assert record["wins"] == ["better"]
    assert record["chance"] == pytest.approx({"plane": 0.85, "tiny Flux": 1.0})
    worse = {"endpoints": 0.8, "quality": 1.0, "accuracy_lost": 0.02, "end_of_table": False}
    assert record["ratios"]["worse reading"]["tiny Flux"] == pytest.approx(worse)
    assert set(record["ratios"]["plane alone"]) == {"plane"}


def test_the_end_of_the_table_is_marked():
    table = Table()
    assert choice_info({2: (1.0, max(table.scales))}, table)["at_the_end"]
    assert not choice_info({2: (1.0, 1.0)}, table)["at_the_end"]
    results = [result("plane", label, value(0.5, at_the_end=label != "base")) for label in ("base", "weak")]
    assert "1.000>" in variants_report.text(variants_report.gather(results))


def test_a_share_that_moves_gives_each_step_its_number_of_teacher_examples():
    config = SCFMConfig(
        max_train_steps=5, global_batch_size=8, teacher_ratio=0.0, ema_decay_fast=0.5, ema_decay_slow=0.9
    )
    ramp, seen = ramp_teacher_ratio(config, 1.25), []  # a quarter more a step; the last is never drawn with

    def on_step(step, output):
        seen.append(int(output.jumps.is_teacher.sum()))
        ramp(step, output)

    def batch_of(generator, count):
        return torch.randn(count, 2, generator=generator)

    distill(CopiedModels(MLP(8, 1)), batch_of, config, on_step, progress=False)
    assert seen == [0, 2, 4, 6, 8] and config.teacher_ratio == 1.25
    assert ramp_teacher_ratio(config, None) is None
