"""The benchmarks at a size of seconds: the real scripts, a handful of examples."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from experiments.testbeds.cifar import Plan
from scfm.data.labelled_images import load_labelled_images
from scfm.training.config import DistillConfig, load_settings
from scfm.training.measured import find_measured

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


def test_a_step_with_scales_is_held_against_a_plain_one(script, tmp_path):
    out = tmp_path / "scaled"
    script("scaled_forward.py", "--rounds", 1, "--out", out)
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["evaluations_ratio"] == pytest.approx(7 / 6, abs=1e-3) and len(record["networks"]) == 4
    for ways in record["networks"].values():
        assert ways["plain"]["time_ratio"] == 1 and all(way["median_seconds"] > 0 for way in ways.values())
    assert out.with_suffix(".png").is_file()


def test_a_cached_step_is_held_against_one_that_encodes_anew(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import embedding_cache

    monkeypatch.setattr(embedding_cache, "IMAGES", 4)
    found = embedding_cache.measure(batch=2, rounds=1)
    assert all(found[name]["median_cpu_seconds"] > 0 for name in ("anew", "cached"))
    assert found["speedup"] > 0 and found["encoding_everything_once_seconds"] > 0


@pytest.mark.parametrize(
    "how, least, copies, held",
    [
        (["--config", "flux-dev-a100"], 1.5, 3, 0.99),
        (["--config", "flux-dev-a100", "--rows", "apart", "--checkpoint_blocks", 1], 1.5, 3, 0.99),
        (["--config", "flux-dev-a100", "--no-gradient_checkpointing"], 1.8, 3, 0.99),
        (["--config", "flux-dev-24gb"], 1.5, 2, 0.52),  # in int8
        (["--config", "flux-dev-24gb", "--blocks_to_swap", 2], 1.5, 2, 0.43),
        (["--config", "flux-dev-24gb", "--quantize", "nf4"], 1.5, 2, 0.35),
        (
            ["--shape", "sd35-large", "--config", "sd35-large-a100"],
            1.5,
            3,
            None,
        ),  # its table of places is large
    ],
    ids=lambda how: " ".join(map(str, how)) if isinstance(how, list) else None,
)
def test_the_12b_benchmark_runs_in_small(script, tmp_path, how, least, copies, held):
    out = tmp_path / "gpu_tiny.json"
    script("gpu_flux.py", "--tiny", "--batches", 2, "--rank", 4, "--rounds", 1, "--out", out, *how)
    record = json.loads(out.read_text())
    assert record["tiny"] and len(record["rows"]) == 1  # labelled as what it is
    (row,) = record["rows"]
    assert least < row["ratio_operations"] < 2.1
    assert 0 < row["scfm"]["host_seconds"] < row["scfm"]["seconds"]
    memory = row["memory_gib"]
    assert memory["adapters"] == pytest.approx(copies * memory["gradients"], rel=0.1)
    in_bf16 = 2 * record["parameters_billion"] * 1e9 / 2**30
    assert held is None or memory["base"] == pytest.approx(held * in_bf16, rel=0.05)
    config = DistillConfig(**{**load_settings(how[how.index("--config") + 1]), "rank": 4})
    assert find_measured(record["shape"], config, 2, tmp_path) == []  # a toy is no measurement


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
