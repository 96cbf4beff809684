"""The benchmarks at a size of seconds: the real scripts, a handful of examples."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from experiments.testbeds.cifar import Plan
from scfm.data.labelled_images import load_labelled_images

pytestmark = pytest.mark.experiment
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Runs a script of benchmarks/ with words."""

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")

    return run


@pytest.fixture
def gpu_cifar(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_cifar

    return gpu_cifar


def test_update_cost_counts_and_times(script, tmp_path):
    out = tmp_path / "cost"
    script("update_cost.py", "--rounds", 1, "--batch", 4, "--rank", 4, "--out", out)
    ways = json.loads(out.with_suffix(".json").read_text())["ways"]
    assert ways["plain"]["flop_ratio"] == 1 and 1.6 < ways["scfm"]["flop_ratio"] < 2
    assert all(ways["scfm"]["gflops"] == pytest.approx(ways[w]["gflops"], rel=0.05) for w in ("peft", "swap"))
    assert all(way["median_seconds"] > 0 for way in ways.values()) and out.with_suffix(".png").is_file()


def test_a_cached_step_is_held_against_one_that_encodes_anew(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import embedding_cache

    monkeypatch.setattr(embedding_cache, "IMAGES", 4)
    found = embedding_cache.measure(batch=2, rounds=1)
    assert all(found[name]["median_cpu_seconds"] > 0 for name in ("anew", "cached"))
    assert found["speedup"] > 0 and found["encoding_everything_once_seconds"] > 0


@pytest.mark.parametrize("shape", ["flux", "sd35"])
def test_the_12b_benchmark_runs_in_small(script, tmp_path, shape):
    out = tmp_path / "gpu.json"
    words = ["--tiny", "--shape", shape, "--batches", 2, "--rank", 4, "--rounds", 1, "--out", out]
    script("gpu_flux.py", *words)
    record = json.loads(out.read_text())
    assert (
        record["tiny"] and len(record["rows"]) == 2
    )  # labelled as what it is; two ways of computing the LoRA
    for row in record["rows"]:
        assert 1.3 < row["ratio_operations"] < 2 and row["scfm"]["seconds"] > 0
        adapters, gradients = (row["memory_gib"][part] for part in ("adapters", "gradients"))
        assert adapters == pytest.approx(3 * gradients, abs=2e-4)


def test_the_budget_that_fills_the_minutes_is_found_once(gpu_cifar, tmp_path, monkeypatch):
    plan, path = Plan("data", tmp_path, "tiny", 0, 6), tmp_path / "plan.json"
    monkeypatch.setattr(gpu_cifar, "seconds_per_evaluation", lambda plan, images: 0.001)
    filled = gpu_cifar.make_plan(plan, 10, None, path)
    assert filled.budget == int(10 * 60 * 0.85 / (5 - 2 * 0.8) / 0.001)  # three trainings and two fifths
    monkeypatch.setattr(gpu_cifar, "seconds_per_evaluation", None)
    assert gpu_cifar.make_plan(plan, 99, None, path) == filled
    with pytest.raises(ValueError, match="plan of a tiny network"):
        gpu_cifar.make_plan(plan._replace(size="full"), 10, None, path)


def test_steps_are_timed_by_what_they_cost(gpu_cifar, noise_images, tmp_path):
    plan, images = Plan(noise_images, tmp_path, "tiny", 0, 6), load_labelled_images(noise_images)
    assert 0 < gpu_cifar.seconds_per_evaluation(plan, images, steps=2, warm_up=1) < 10
