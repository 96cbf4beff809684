"""bench/variants.py at a size of seconds, and its verdict on numbers that are known."""
from collections import namedtuple
from pathlib import Path

import pytest
from PIL import Image

SCRIPT, BENCH = "variants", Path(__file__).parents[1] / "bench"
Job = namedtuple("Job", "part label data")


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import variant_cells
    import variant_report
    return variant_cells, variant_report


def test_a_small_run_measures_both_worlds_and_keeps_what_it_made(bench, folder, capsys):
    record = bench()
    assert not record["missing"] and set(record["worlds"]) == {"plane", "tiny Flux"}
    for world in record["worlds"].values():
        assert set(world) == {"base", "base, seed 1", "k/N .1", "each step"}
        for of_set in world.values():
            for found in of_set.values():
                assert set(found["quality"]) == set(found["endpoints"]) == {"2", "3", "4", "8"}
    assert all(set(found) == {"plane", "tiny Flux"} for found in record["ratios"].values())
    assert Image.open(folder / "variants.png").width > 400 and "times the base" in capsys.readouterr().out
    again = bench("--workers", "2")
    assert again["cost"]["this_run"]["cells_made"] == 0 and again["ratios"] == record["ratios"]


def test_each_rule_chooses_the_smallest_distance_that_it_may(parts):
    best = {2: (.6, .9), 3: (1.1, .5, .3), 4: (.7, .2, .2, .4), 8: (.3,) * 8}
    distance = lambda scales: (.1 + sum((a - b) ** 2 for a, b in zip(scales, best[len(scales)]))) ** .5
    made = {rule: parts[0].chosen(rule, lambda scales: distance(scales) + 3 * (len(scales) == 2) * scales[0], (0., .5, 1.)) for rule in ("dial", "free")}
    assert made["free"][2] == (0., 0.) and made["free"][3] == (.5,) * 3     # the scale may rise again after 2 steps
    assert made["dial"][2][0] >= made["dial"][3][0] >= made["dial"][4][0] >= made["dial"][8][0]
    rules = {rule: parts[0].chosen(rule, distance, (0., .5, 1.)) for rule in ("dial", "smooth", "each step")}
    for n in (2, 3, 4, 8):
        assert distance(rules["dial"][n]) >= distance(rules["smooth"][n]) >= distance(rules["each step"][n])
        assert len(set(rules["dial"][n])) == len(set(rules["smooth"][n])) == 1
        assert rules["each step"][n] == pytest.approx(best[n], abs=.02)


def value(endpoints, quality=1., accuracy=None, at_the_end=False):
    many = lambda number: dict.fromkeys((2, 4), number)
    return {"endpoints": many(endpoints), "quality": many(quality), "at_the_end": at_the_end} | ({} if accuracy is None else {"accuracy": many(accuracy)})


def test_a_variant_wins_only_where_it_gains_more_than_chance_in_both_worlds_and_the_quality_holds(parts):
    plane = {"base": (1.,), "base, seed 1": (.85,), "better": (.8, 1.), "worse cloud": (.8, 1.2), "worse reading": (.8, 1.), "chance": (.86, 1.), "level": (.95, .9)}
    flux = {"base": (1., 1., .99), "base, seed 1": (1.1, 1., .99), "better": (.8, 9., .985), "worse cloud": (.8, 1., .99), "worse reading": (.8, 1., .97),
            "chance": (.8, 1., .99), "level": (.8, 1., .99)}
    done = [(Job(part, label, part), value(*numbers), {}, 0) for part, told in (("plane", plane), ("tiny Flux", flux)) for label, numbers in told.items()]
    done += [(Job("plane", "plane alone", "plane"), value(.5), {}, 0), (Job("tiny Flux", "plane alone", "tiny Flux"), None, {}, 0)]
    record = parts[1].gathered(done)
    assert record["wins"] == ["better"] and record["chance"] == pytest.approx({"plane": .85, "tiny Flux": 1.})
    assert record["ratios"]["worse reading"]["tiny Flux"] == pytest.approx({"endpoints": .8, "quality": 1., "accuracy_lost": .02, "end_of_table": False})
    assert set(record["ratios"]["plane alone"]) == {"plane"}


def test_the_end_of_the_table_is_marked(parts):
    scales = parts[0].SCALES
    assert parts[0].told({2: (1., max(scales))})["at_the_end"] and not parts[0].told({2: (1., 1.)})["at_the_end"]
    done = [(Job("plane", label, "plane"), value(.5, at_the_end=label != "base"), {}, 0) for label in ("base", "weak")]
    assert "1.000>" in parts[1].text(parts[1].gathered(done))


def test_a_share_that_moves_gives_each_update_its_number_of_teacher_rows(parts):
    import torch
    from plane_cells import moved_share
    from scfm.method.distill import SCFMConfig, CopiedModels, distill
    from toy.plane import MLP
    config, seen = SCFMConfig(max_train_steps=5, global_batch_size=8, teacher_ratio=0., ema_decay_fast=.5, ema_decay_slow=.9), []
    move = moved_share(config, 1.25)                         # a quarter more an update; the last value is never drawn with

    def on_step(update, result):
        seen.append(int(result.jumps.is_teacher.sum()))
        move(update, result)
    distill(CopiedModels(MLP(8, 1)), lambda generator, rows: torch.randn(rows, 2, generator=generator), config, on_step, progress=False)
    assert seen == [0, 2, 4, 6, 8] and config.teacher_ratio == 1.25
    assert moved_share(config, None) is None
