"""bench/variants.py at a size of seconds, and its verdict on numbers that are known."""
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from PIL import Image

from scfm.flow import sample, time_grid

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
        assert set(world) == {"base", "base, seed 1", "jumps of 4", "free"}
        for of_set in world.values():
            for found in of_set.values():
                assert set(found["quality"]) == set(found["endpoints"]) == {"2", "3", "4", "8"}
    assert all(set(found) == {"plane", "tiny Flux"} for found in record["ratios"].values())
    assert Image.open(folder / "variants.png").width > 400 and "times the base" in capsys.readouterr().out
    again = bench("--workers", "2")
    assert again["cost"]["this_run"]["cells_made"] == 0 and again["ratios"] == record["ratios"]


def test_the_first_scale_rules_the_first_step_alone(parts):
    first, rest = (lambda x, t, cond=None: torch.full_like(x, 1.)), (lambda x, t, cond=None: torch.full_like(x, 10.))
    for steps, shift in ((2, 1.), (4, 1.), (4, 3.)):
        grid = time_grid(steps, shift)
        moved = -sample(parts[0].switching(first, rest), torch.zeros(5, 2), grid)
        assert torch.allclose(moved, torch.full((5, 2), (1 - grid[1] + 10 * grid[1]).item()))


def test_each_rule_chooses_the_smallest_distance_that_it_may(parts):
    best = {2: (.5, 1.), 3: (1., .5), 4: (1., 0.), 8: (0., 0.)}
    distance = lambda n, pair: .1 + sum((a - b) ** 2 for a, b in zip(pair, best[n]))
    assert parts[0].chosen("two scales", distance, (0., .5, 1.)) == best
    alone = parts[0].chosen("free", lambda n, pair: distance(n, pair) + (n == 2) * pair[0], (0., .5, 1.))
    assert alone[2] == (.5, .5) and alone[3] == (.5, .5)                    # free: the scale may rise again after 2 steps
    dial = parts[0].chosen("dial", distance, (0., .5, 1.))
    scales = [dial[n][0] for n in (2, 3, 4, 8)]
    assert all(a == b for a, b in dial.values()) and scales == sorted(scales, reverse=True)


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
