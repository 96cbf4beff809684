"""The CIFAR-10 bench at a size of seconds: equal budgets, cells that are computed once, the record. On noise, with an untrained judge."""
import io
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import carry_flows  # noqa: E402
import cifar_cells  # noqa: E402
import cifar_training  # noqa: E402
from cifar_cells import Judge, Painter, lora_painter, generate_all, precision_recall, sampler, score_all  # noqa: E402
from cifar_report import aims  # noqa: E402
from cifar_training import DISTILLED, LORA, METHODS, Plan, train_all, updates_for  # noqa: E402
from scfm.data.labelled_images import load_labelled_images  # noqa: E402
from scfm.inference.step_lora import StepLora, InferenceConfig  # noqa: E402
from scfm.models.unet import generate, header_of, load_flow  # noqa: E402
from toy.features import Features, look  # noqa: E402
from toy.train_features import PEAK, augment, rate, save  # noqa: E402
from toy.train_features import main as train_features  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, g = tmp_path_factory.mktemp("data"), torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        cells = []
        for pixels in torch.randint(256, (40, 32, 32, 3), dtype=torch.uint8, generator=g):
            Image.fromarray(pixels.numpy()).save(file := io.BytesIO(), "png")
            cells.append({"bytes": file.getvalue(), "path": None})
        pyarrow.parquet.write_table(pyarrow.table({"img": cells, "label": [i % 10 for i in range(40)]}), folder / f"{split}-0.parquet")
    return str(folder)


def test_the_same_budget_buys_the_same_evaluations():
    for told in (*METHODS.values(), {"non_shortcut_ratio": 0.}):
        updates = updates_for(960_000, {"batch": 64}, told)
        spent = updates * 64 * (3 + 2 * (1 - told["non_shortcut_ratio"]))
        assert 0 <= 960_000 - spent < 64 * 5
    with pytest.raises(ValueError, match="buy no update"):
        updates_for(100, {"batch": 64}, METHODS["plain"])


def test_training_keeps_the_teacher_and_computes_nothing_twice(data, tmp_path, monkeypatch):
    plan, images = Plan(data, tmp_path, "tiny", 240, 6, 0), load_labelled_images(data)
    assert train_all(plan, "plain", 0, images, lambda: False) is None                # the time is up after an update
    flow = train_all(plan, "plain", 0, images)
    kept = tmp_path / "plain-0" / "kept.safetensors"
    told = [json.loads(header_of(path)["notes"]) for path in (kept, flow)]
    assert told == [{"updates": 8, "evaluations": 192}, {"updates": 10, "evaluations": 240}]
    distilled = train_all(plan, DISTILLED, 0, images)
    assert json.loads(header_of(distilled)["notes"]) == {"updates": 1, "evaluations": 40}
    monkeypatch.setattr(cifar_training, "pretrain", None)                                 # would fail if it were called again
    assert train_all(plan, "plain", 0, images) == flow and train_all(plan, DISTILLED, 0, images) == distilled


def test_flows_are_carried_in_half_precision_with_their_notes_or_not_at_all(data, tmp_path, capsys):
    plan, images = Plan(data, tmp_path / "cells", "tiny", 240, 6, 0), load_labelled_images(data)
    flow = train_all(plan, "plain", 0, images)
    words = ["--cells", str(plan.cells), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        carry_flows.main(words)
    assert "scfm-1_4-0" in capsys.readouterr().err and not (tmp_path / "out").exists()
    for name in ("scfm 1/4", "shortcut"):
        train_all(plan, name, 0, images)
    carry_flows.main(words)
    carried = tmp_path / "out" / "plain.safetensors"
    assert header_of(carried)["notes"] == header_of(flow)["notes"]
    assert all(torch.equal(half, load_file(flow)[name].half()) for name, half in load_file(carried).items())


def test_the_lora_of_the_kept_flow_is_distilled_by_the_engine_and_generated_at_two_strengths(data, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar_cells, "NFE", (1, 2))
    plan, images = Plan(data, tmp_path, "tiny", 320, 6, 0), load_labelled_images(data)
    train_all(plan, "plain", 0, images)
    assert train_all(plan, LORA, 0, images, lambda: False) is None                   # the time is up after an update
    path = train_all(plan, LORA, 0, images)
    assert json.loads((path.parent / "config.json").read_text())["updates"] == 2       # a fifth of 320, 8 rows of 4
    monkeypatch.setattr(cifar_training, "begin", None)                                 # would fail if it were called again
    assert train_all(plan, LORA, 0, images) == path
    raw, turned, dial = lora_painter(plan, 0, images.names, "cpu", noises=2)
    noise, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    step = StepLora(InferenceConfig(lora=str(path.parent)), "cpu")
    for generate, scale in ((raw, 1.), (turned, dial.scale(2))):
        step.set_scale(scale)
        assert torch.equal(generate(labels, noise, 2, "euler"), generate(step.pipe.transformer, labels, noise, 2))
    step.set_scale(0.)                                                                 # and nothing but the kept flow lies below
    kept = sampler(load_flow(tmp_path / "plain-0" / "kept.safetensors"))
    assert torch.allclose(generate(step.pipe.transformer, labels, noise, 2), kept(labels, noise, 2, "euler"), atol=1e-5)


def test_images_are_generated_and_judged_once(data, tmp_path, monkeypatch):
    plan = Plan(data, tmp_path, "tiny", 48, 6, 0)
    torch.manual_seed(0)
    network = Features().eval()
    monkeypatch.setattr(cifar_cells, "load_features", lambda: network)
    plan = plan._replace(nfe=(1, 2))
    flow = load_flow(train_all(plan._replace(budget=60), "shortcut", 0, load_labelled_images(data)))
    files = generate_all(plan, "shortcut 0", sampler(flow), Painter(plan), ("euler", "midpoint"))
    assert list(files) == [("euler", 1), ("euler", 2), ("midpoint", 2)]
    pixels = load_file(files["euler", 2])["pixels"]
    assert pixels.shape == (6, 3, 32, 32) and pixels.dtype == torch.uint8
    judge = Judge(plan)
    score_all(plan, files, judge)
    rows = sorted((tmp_path / "measured").glob("shortcut-0-6-*.json"))
    row = json.loads(rows[1].read_text())
    assert (row["solver"], row["nfe"]) == ("euler", 2) and row["frechet_test"] > 0 and 0 <= row["label_accuracy"] <= 1
    before = [path.stat().st_mtime_ns for path in (*files.values(), *rows)]
    score_all(plan, generate_all(plan, "shortcut 0", None, None, ("euler", "midpoint")), judge)
    assert [path.stat().st_mtime_ns for path in (*files.values(), *rows)] == before


def test_precision_and_recall_of_what_is_known():
    real = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    assert precision_recall(real, real) == (1., 1.)
    assert precision_recall(real, real + 100) == (0., 0.)
    near, far = precision_recall(real, real[:1].repeat(200, 1) + 1e-4 * torch.randn(200, 4))   # one mode: true, and not all of it
    assert near == 1. and far < .1


def test_the_feature_network_comes_back_and_looks_the_same_at_bytes_and_floats(tmp_path):
    torch.manual_seed(0)
    network = Features().eval()
    pixels = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    seen = look(network, pixels, batch=2)
    assert torch.allclose(seen.features, network.features(pixels.float() / 127.5 - 1), atol=1e-5) and seen.logits.shape == (5, 10)
    save(network, tmp_path / "w.safetensors", {"test_accuracy": .5})
    from toy.features import load_features, recipe
    assert recipe(tmp_path / "w.safetensors") == {"test_accuracy": .5}
    assert torch.allclose(look(load_features(tmp_path / "w.safetensors"), pixels).features, seen.features, atol=1e-2)
    with pytest.raises(FileNotFoundError, match="toy.train_features"):
        load_features(tmp_path / "none")


def test_augmented_images_are_shifts_of_the_image_with_a_grey_hole():
    pixels = torch.full((50, 3, 32, 32), 255, dtype=torch.uint8)
    x = augment(pixels, torch.Generator().manual_seed(0))
    assert x.shape == (50, 3, 32, 32) and set(x.unique().tolist()) == {0., 1.}
    holes = (x == 0).sum((2, 3))[:, 0]
    assert holes.max() == 81 and holes.min() >= 25                  # 9 x 9 and less at the border
    ramp = torch.arange(32, dtype=torch.uint8).expand(1, 3, 32, 32)
    for seed in range(20):
        row = augment(ramp, torch.Generator().manual_seed(seed))[0, 0]
        middle = row[:, 8:24][(row[:, 8:24] != 0).all(1)][0]
        assert torch.allclose(middle.diff().abs(), torch.full((15,), 1 / 127.5), atol=1e-6)


def test_the_learning_rate_rises_and_falls_twice_the_second_time_half_as_high():
    rates = [rate(i / 10, (10, 5)) for i in range(151)]
    assert rates[0] == rates[100] == rates[150] == 0 and rates[20] == max(rates) == PEAK
    assert rates[110] == max(rates[100:]) == PEAK / 2


def test_the_aims_are_judged_seed_by_seed():
    row = lambda nfe, value: {"solver": "euler", "nfe": nfe, "frechet_test": value}
    samplers = {"plain": {"0": [row(4, 2.), row(64, 1.)], "1": [row(4, 4.), row(64, 1.)]},
                "scfm 1/4": {"1": [row(4, 1.), row(64, 1.04)]}, "shortcut": {"0": [row(4, 1.), row(64, 1.)], "1": [row(4, 3.), row(64, 2.)]}}
    told = aims({"samplers": samplers})
    assert told["scfm 1/4"] == {"at 4, times plain": {"1": .25}, "at most half": True, "at 64, times plain": {"1": 1.04}, "at most 1.05": True}
    assert told["shortcut"]["at 4, times plain"] == {"0": .5, "1": .75} and not told["shortcut"]["at most half"]


def test_a_second_cycle_is_trained_and_goes_on_from_its_checkpoint(data, tmp_path):
    words = [str(data), "--work", str(tmp_path), "--epochs", "1", "1", "--out"]
    assert train_features([*words, str(tmp_path / "a")]) == 0
    (tmp_path / "features-1-1-0.pt").rename(tmp_path / "whole.pt")
    assert train_features([str(data), "--work", str(tmp_path), "--epochs", "1", "0", "--out", str(tmp_path / "b")]) == 0
    (tmp_path / "features-1-0-0.pt").rename(tmp_path / "features-1-1-0.pt")
    assert train_features([*words, str(tmp_path / "c")]) == 0
    first, once, again = (load_file(tmp_path / name) for name in "bac")
    assert all(torch.equal(once[k], again[k]) for k in once) and any(not torch.equal(once[k], first[k]) for k in once)


def test_the_budget_that_fills_the_minutes_is_found_once(data, tmp_path, monkeypatch):
    import gpu_cifar
    monkeypatch.setattr(gpu_cifar, "seconds_per_evaluation", lambda plan, images: .001)
    plan = gpu_cifar.make_plan(Plan(data, tmp_path, "tiny", 0, 6), 10, None, tmp_path / "plan.json")
    assert plan.budget == int(10 * 60 * .85 / (5 - 2 * .8) / .001)      # three whole trainings and two fifths
    monkeypatch.setattr(gpu_cifar, "seconds_per_evaluation", None)
    assert gpu_cifar.make_plan(Plan(data, tmp_path, "tiny", 0, 6), 99, None, tmp_path / "plan.json") == plan
    with pytest.raises(ValueError, match="plan of a tiny network"):
        gpu_cifar.make_plan(Plan(data, tmp_path, "full", 0, 6), 10, None, tmp_path / "plan.json")


def test_updates_are_timed_by_what_they_cost(data, tmp_path):
    import gpu_cifar
    assert 0 < gpu_cifar.seconds_per_evaluation(Plan(data, tmp_path, "tiny", 0, 6), load_labelled_images(data), updates=2, warm=1) < 10
