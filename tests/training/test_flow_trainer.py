"""Pre-training and its network: the loss by hand, costs by counting, kill and resume bit by bit, the command.
All on noise."""

import copy
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import forked
import pyarrow
import pyarrow.parquet
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_processor import Attention
from PIL import Image
from safetensors.torch import load_file, save_file

import scfm.method.distill
from scfm.commands.pretrain import main
from scfm.data.labelled_images import LabelledImages
from scfm.method.consistency import Jumps
from scfm.method.distill import sample_batch
from scfm.method.flow import interpolate, sample, time_grid
from scfm.models.unet import (
    SIZES,
    UNetFlow,
    drop_labels,
    field_of,
    generate,
    guided,
    header_of,
    load_flow,
    save_flow,
)
from scfm.training.flow_config import SHORTCUT, FlowConfig
from scfm.training.flow_models import FlowModels, ScaledFlowModels
from scfm.training.flow_trainer import (
    FlowTrainer,
    evaluations,
    load_pixels,
    pretrain,
    sample_images,
    with_level,
)

QUICK = {
    "size": "tiny",
    "max_train_steps": 4,
    "global_batch_size": 8,
    "checkpointing_steps": 2,
    "validation_steps": 0,
    "lr_warmup_steps": 3,
    "train_data_dir": "noise",
}


@pytest.fixture(scope="module")
def images():
    g = torch.Generator().manual_seed(0)
    return LabelledImages(
        torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8, generator=g),
        torch.arange(40) % 10,
        tuple("abcdefghij"),
    )


@pytest.fixture
def run(tmp_path, images):
    """Makes a run in a folder of its own; settings as keywords."""
    return lambda out="run", **told: FlowTrainer(
        FlowConfig(**{**QUICK, **told}, output_dir=str(tmp_path / out)), False, images
    )


def weights(run):
    if isinstance(run.models, ScaledFlowModels):
        parts = {n: run.models.parameters(n) for n in ("student", "ema")}
        return {f"{n} {i}": w.detach().clone() for n, part in parts.items() for i, w in enumerate(part)}
    return {
        f"{n} {k}": v.clone() for n, net in run.models.networks.items() for k, v in net.state_dict().items()
    }


def write(folder, images):
    """The images as a parquet file."""
    cells = []
    for pixels in images.pixels:
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file := io.BytesIO(), "png")
        cells.append({"bytes": file.getvalue(), "path": None})
    pyarrow.parquet.write_table(
        pyarrow.table({"img": cells, "label": images.labels.tolist()}), folder / "train-0.parquet"
    )


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# The network


def test_sampling_is_that_of_the_stock_scheduler():
    network, noise, labels = UNetFlow("tiny").eval(), torch.randn(3, 3, 32, 32), torch.tensor([0, 4, 10])
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 5, 5).tolist())
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, (t / 1000).expand(3), labels), t, x).prev_sample
    assert torch.allclose(generate(network, labels, noise, 5, batch_size=2), x, atol=1e-5)


@pytest.mark.parametrize("size", list(SIZES))
def test_every_attention_has_its_norm(size):
    """Without one the middle's logits run away; diffusers leaves it out with scale and shift unless it is
    asked for by name."""
    found = [m for m in UNetFlow(size).modules() if isinstance(m, Attention)]
    assert found and all(m.group_norm is not None for m in found)


def test_guidance_asks_without_the_label_too():
    network, x, t, labels = (
        UNetFlow("tiny").eval(),
        torch.randn(2, 3, 32, 32),
        torch.rand(2),
        torch.tensor([1, 2]),
    )
    with torch.no_grad():
        yes, no = network(x, t, labels), network(x, t)
        assert torch.allclose(guided(network, 3.0)(x, t, labels), no + 3 * (yes - no), atol=1e-5)
        assert not torch.equal(yes, no)


def test_labels_are_dropped_at_their_share():
    labels = torch.arange(10).repeat(1000)
    dropped = drop_labels(labels, 0.25, 10, torch.Generator().manual_seed(0))
    kept = dropped != 10
    assert torch.equal(dropped[kept], labels[kept]) and abs(kept.float().mean().item() - 0.75) < 0.02
    assert torch.equal(drop_labels(labels, 0.0, 10), labels)


def test_a_told_network_hears_the_level_of_the_walk():
    network, heard = UNetFlow("tiny", levels=8).eval(), []
    network.register_forward_pre_hook(lambda module, args: heard.append(args[2][:, 1].tolist()))
    for steps in (1, 4, 64, 1000):
        field_of(network, steps)(torch.randn(2, 3, 32, 32), torch.rand(2), torch.tensor([1, 2]))
    assert heard == [[0, 0], [2, 2], [6, 6], [7, 7]]


def test_a_file_comes_back_and_others_are_refused(tmp_path):
    network = UNetFlow("tiny", classes=3, levels=4, resolution=16)
    save_flow(network, tmp_path / "flow.safetensors", notes={"max_train_steps": 5})
    again = load_flow(tmp_path / "flow.safetensors")
    assert same(network.state_dict(), again.state_dict()) and again.init_kwargs == network.init_kwargs
    assert json.loads(header_of(tmp_path / "flow.safetensors")["notes"]) == {"max_train_steps": 5}
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no flow on images"):
        load_flow(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="flow.safetensors of a run"):
        load_flow(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="size='huge': one of tiny, nano"):
        UNetFlow("huge")


# The rows


def drawn(config, step, images):
    """(data, labels) of a step."""
    numbers, mirrored, labels = sample_images(config, step, images)
    return load_pixels(images, numbers, mirrored), labels


def test_two_processes_have_the_examples_of_one(run):
    trainer = run()

    def parts(count, step=3):
        for i in range(count):
            trainer.accelerator = SimpleNamespace(
                num_processes=count, process_index=i, device=torch.device("cpu")
            )
            yield trainer.plan_step(step)

    (one,), two = parts(1), list(parts(2))
    assert torch.equal(one.places, torch.cat([plan.places for plan in two])) and one.places.tolist() == list(
        range(8)
    )
    for name in ("data", "noise", "cond"):
        whole = getattr(one.batches[0], name)
        assert torch.equal(whole, torch.cat([getattr(plan.batches[0], name) for plan in two]))
    assert not torch.equal(one.batches[0].data, next(parts(1, 4)).batches[0].data)


def test_every_row_is_a_image_or_its_mirror_with_its_label(images):
    config = FlowConfig(**{**QUICK, "global_batch_size": 64})
    known = images.pixels.float() / 127.5 - 1
    mirrored = 0
    for row, label in zip(*drawn(config, 0, images), strict=False):
        straight, turned = (known == row).flatten(1).all(1), (known == row.flip(-1)).flatten(1).all(1)
        mirrored += bool(turned.any())
        assert label in (10, *images.labels[straight | turned])
    assert 16 < mirrored < 48
    plain, _ = drawn(replace(config, random_flip=False), 0, images)
    assert all((known == row).flatten(1).all(1).any() for row in plain)


# The loss


def test_plain_flow_matching_is_plain_flow_matching(run):
    """One update with non_shortcut_ratio 1 against the loss, AdamW and clipping written out."""
    ours, by_hand = run("ours", non_shortcut_ratio=1.0), run("hand", non_shortcut_ratio=1.0)
    config, network = by_hand.config, by_hand.models.networks["student"]
    data, labels = drawn(config, 0, by_hand.images)
    noise, jumps = sample_batch(config, 0, 8, (3, 32, 32))
    assert jumps.is_flow.all()
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=config.learning_rate / config.lr_warmup_steps,
        weight_decay=config.adam_weight_decay,
    )
    error = network(interpolate(data, noise, jumps.t1), jumps.t1, labels) - (noise - data)
    error.square().mean().backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), config.max_grad_norm)
    optimizer.step()
    ours.train_step(0)
    for a, b in zip(ours.models.parameters("student"), network.parameters(), strict=False):
        assert torch.allclose(a, b, atol=1e-6)
    assert ours.evaluations == 3 * 8


def test_a_shortcut_model_is_told_its_jump_and_its_target_half_of_it():
    """Level and target of a bootstrap row as in arXiv 2410.12557: s(x, t, 2d) = (s(x, t, d) + s(x', t - d,
    d)) / 2."""
    heard = []

    class Told(torch.nn.Module):
        levels = 8

        def forward(self, x, t, cond):
            heard.append(cond.tolist())
            return x * t[:, None] * (1 + cond[:, 1:])

    from scfm.method.consistency import scfm_loss

    jumps = Jumps(
        torch.tensor([[1.0, 0.75, 0.5], [0.4, 0.4, 0.4]]),
        torch.zeros(2, dtype=torch.bool),
        torch.tensor([4, 0]),
    )
    cond = with_level(torch.tensor([3, 5]), jumps)
    assert cond.tolist() == [[3, 1], [5, 7]]  # half of the road; a flow row: the smallest step
    data, noise = torch.randn(2, 6), torch.randn(2, 6)
    losses = scfm_loss(data, noise, jumps, FlowModels(Told()), cond, "one_ema")
    assert heard == [[[3, 2]], [[3, 2]], [[3, 1], [5, 7]]]  # the speaker twice at a quarter, then the student
    x = interpolate(data, noise, jumps.t1)
    v1 = x[0] * 1.0 * 3
    v2 = (x[0] - 0.25 * v1) * 0.75 * 3
    assert torch.allclose(losses[0], (x[0] * 1.0 * 2 - (v1 + v2) / 2).square().mean())
    assert torch.allclose(losses[1], (x[1] * 0.4 * 8 - (noise[1] - data[1])).square().mean())


@pytest.mark.parametrize(
    "told, share",
    [({"non_shortcut_ratio": 1.0}, 0), ({}, 0.25), ({"non_shortcut_ratio": 0.5}, 0.5), (SHORTCUT, 0.25)],
)
def test_the_cost_is_what_the_networks_were_asked(run, told, share):
    r, asked = run(**told), []
    for name, network in r.models.networks.items():
        network.register_forward_pre_hook(
            lambda module, args, name=name: asked.append((3 if name == "student" else 1) * len(args[0]))
        )
    r.train_step(0)
    assert r.evaluations == sum(asked) == 8 * 3 + 2 * 8 * share


def test_flow_rows_cost_three_and_self_rows_five():
    steps = torch.tensor([0, 4, 0, 16])
    assert evaluations(Jumps(torch.zeros(4, 3), torch.zeros(4, dtype=torch.bool), steps)) == 2 * 3 + 2 * 5


def test_the_average_ships_and_follows_its_decay(run):
    r = run(ema_decay_slow=0.5)
    before = r.models.parameters("ema_slow")[0].clone()
    assert torch.equal(before, r.models.parameters("student")[0])
    r.train_step(0)
    student, slow = (r.models.parameters(name)[0] for name in ("student", "ema_slow"))
    assert torch.allclose(slow, (before + student) / 2, atol=1e-7) and not torch.equal(slow, student)
    r.save()
    assert same(
        load_file(r.output_dir / "flow.safetensors"), dict(r.models.networks["ema_slow"].state_dict())
    )


# The run


STEP_SCALED = {"algorithm": "step_scaled", "non_shortcut_ratio": 0.5}
WAYS = {"scfm": {}, "shortcut": SHORTCUT, "bf16": {"weight_dtype": "bf16"}, "step_scaled": STEP_SCALED}


@pytest.mark.parametrize("told", WAYS.values(), ids=WAYS)
def test_kill_and_resume_is_bitwise_the_unbroken_run(run, told):
    whole, broken = run("whole", **told), run("broken", **told)
    whole.train()
    stops = iter((False, False, True))
    broken.train(should_stop=lambda: next(stops))
    assert broken.global_step == 3
    again = run("broken", **told)
    assert again.resume() == 3
    again.train()
    assert same(weights(whole), weights(again)) and whole.evaluations == again.evaluations
    assert torch.equal(whole.bins.total, again.bins.total)


def test_a_finished_flow_is_distilled_and_the_run_resumes(run, tmp_path):
    first = run("first")
    first.train()
    told = {
        "teacher": str(tmp_path / "first" / "flow.safetensors"),
        "non_shortcut_ratio": 0.0,
        "teacher_ratio": 0.4,
        "algorithm": "dual",
    }
    whole, broken = run("whole", **told), run("broken", **told)
    teacher = weights(whole)
    whole.train()
    stops = iter((False, True))
    broken.train(should_stop=lambda: next(stops))
    again = run("broken", **told)
    again.resume()
    again.train()
    assert same(weights(whole), weights(again)) and again.emas.updates == 4
    for name, tensor in load_file(told["teacher"]).items():
        assert torch.equal(whole.models.networks["teacher"].state_dict()[name], tensor)
        assert torch.equal(teacher[f"student {name}"], tensor)  # the student starts as the teacher
    assert whole.evaluations == 4 * 8 * 5


def test_few_steps_are_taught_beside_the_plain_flow(run):
    """Scale 0 is plain flow matching: its steps are those of a run that has nothing else, on its examples."""
    r = run(**STEP_SCALED, ema_decay_slow=0.5, ema_decay_fast=0.5, max_grad_norm=math.inf)
    reference, average = copy.deepcopy(r.models.network), copy.deepcopy(r.models.network)
    optimizer = torch.optim.AdamW(reference.parameters(), weight_decay=r.config.adam_weight_decay)
    seen = 0
    for step in range(3):
        plan = r.plan_step(step)
        (batch,) = plan.batches
        flow = batch.jumps.is_flow
        x, t = interpolate(batch.data, batch.noise, batch.jumps.t1)[flow], batch.jumps.t1[flow]
        error = reference(x, t, batch.cond[flow]) - (batch.noise - batch.data)[flow]
        (error.square().flatten(1).mean(1).sum() / len(flow)).backward()
        optimizer.param_groups[0]["lr"] = r.config.learning_rate * (step + 1) / r.config.lr_warmup_steps
        r.train_step(step)
        optimizer.step()
        optimizer.zero_grad()
        seen += int(flow.sum())
        with torch.no_grad():
            for a, w in zip(average.parameters(), reference.parameters(), strict=True):
                a.lerp_(w, 0.5)
    assert 0 < seen < 24 and any(w.any() for w in r.models.differences["ema"])
    for mine, w in zip(r.models.sampled(0).parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(mine, w, rtol=1e-4, atol=1e-6)


def test_what_ships_gives_the_network_of_each_step_count(run):
    r = run(**STEP_SCALED)
    r.train()
    path, noise, labels = r.output_dir / "flow.safetensors", torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    for steps in (None, 1, 4, 5):
        network, scale = load_flow(path, steps), steps**-0.85 if steps else 0.0
        told = generate(network, labels, noise, steps or 8)
        field = r.models.field("ema", scale)
        torch.testing.assert_close(
            told, sample(field, noise, time_grid(steps or 8), labels), atol=1e-5, rtol=1e-4
        )
    assert same(dict(load_flow(path).state_dict()), dict(r.models.sampled(0).state_dict()))
    moved = load_flow(path, 1)(noise, torch.ones(2), labels) - load_flow(path)(noise, torch.ones(2), labels)
    assert moved.detach().abs().max() > 0


def test_differences_from_a_finished_flow_leave_it_as_it_is(run, tmp_path):
    run("first").train()
    told = {**STEP_SCALED, "non_shortcut_ratio": 0.0, "teacher": str(tmp_path / "first" / "flow.safetensors")}
    whole, broken = run("whole", **told), run("broken", **told)
    whole.train()
    stops = iter((False, True))
    broken.train(should_stop=lambda: next(stops))
    again = run("broken", **told)
    again.resume()
    again.train()
    assert same(weights(whole), weights(again)) and again.emas.updates == 4
    assert same(dict(load_flow(told["teacher"]).state_dict()), dict(whole.models.sampled(0).state_dict()))


@pytest.mark.parametrize(
    "told, differences",
    [({}, 1e-3 / 4), ({"difference_lr": 3e-4}, 3e-4), ({"teacher": True}, None)],
    ids=["from scratch", "as set", "distilled"],
)
def test_the_differences_have_a_rate_of_their_own_through_the_warm_up(run, tmp_path, told, differences):
    """From scratch they had the base's, whatever the groups of the optimizer said."""
    told = {**STEP_SCALED, "learning_rate": 1e-3, "lr_warmup_steps": 4, **told}
    if told.pop("teacher", False):
        run(tmp_path / "first", max_train_steps=1).train()
        told |= {"teacher": str(tmp_path / "first" / "flow.safetensors"), "non_shortcut_ratio": 0.0}
    r = run(tmp_path / "second", **told)
    differences = differences or 1e-3 / r.config.step_scale.mean()
    base = [] if r.config.teacher else [1e-3]
    seen = []
    r.optimizer.register_step_pre_hook(lambda opt, *_: seen.append([g["lr"] for g in opt.param_groups]))
    for step in range(5):
        r.train_step(step)
    for rates, share in zip(seen, (0.25, 0.5, 0.75, 1.0, 1.0), strict=True):
        assert rates == pytest.approx([share * rate for rate in [*base, differences, differences]])


def test_a_difference_that_no_example_trains_has_a_gradient_of_zero(run):
    """Or several processes would wait for each other's gradients."""
    r = run(algorithm="step_scaled", non_shortcut_ratio=1.0)
    r.train_step(0)
    assert not any(w.any() for w in r.models.differences["student"])


def test_previews_show_every_step_count_and_say_how_far_they_are(run):
    r = run(validation_steps=2, eval_num_steps=(1, 2, 4))
    r.train()
    assert sorted(p.name for p in (r.output_dir / "validation").iterdir()) == [
        "000002.png",
        "000004.png",
        "quality.jsonl",
    ]
    assert Image.open(r.output_dir / "validation" / "000004.png").size == (10 * 33 + 1, 3 * 33 + 1)
    lines = [
        json.loads(line) for line in (r.output_dir / "validation" / "quality.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [2, 4] and lines[1]["distance"].keys() == {"1", "2"}


def test_a_gradient_that_is_no_number_stops_and_names_the_last_good_state(run, monkeypatch):
    r, real, calls = run(), scfm.method.distill.scfm_loss, []

    def spoiled(*args, **more):
        calls.append(1)
        return real(*args, **more) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(scfm.method.distill, "scfm_loss", spoiled)
    with pytest.raises(FloatingPointError, match="no weight was changed.*000002"):
        r.train()
    assert r.global_step == 3 and all(w.isfinite().all() for w in weights(r).values())


def test_the_folder_of_another_run_is_refused(run, tmp_path, images):
    run().train()
    with pytest.raises(ValueError, match="run with another non_shortcut_ratio"):
        run(non_shortcut_ratio=1.0)
    with pytest.raises(ValueError, match="at 4 already"):
        pretrain(
            FlowConfig(**{**QUICK, "max_train_steps": 2}, output_dir=str(tmp_path / "run")),
            progress=False,
            images=images,
        )
    assert (
        pretrain(
            FlowConfig(**{**QUICK, "max_train_steps": 6}, output_dir=str(tmp_path / "run")),
            progress=False,
            images=images,
        ).global_step
        == 6
    )


@pytest.mark.parametrize(
    "told, message",
    [
        ({"train_data_dir": ""}, "say --train_data_dir FOLDER"),
        ({"size": "big"}, "one of tiny, nano, mini, small, full"),
        ({"method": "reflow"}, "scfm or shortcut"),
        ({"method": "shortcut"}, "needs --shift 1,1"),
        ({"teacher_ratio": 0.4}, "there is no teacher"),
        ({"algorithm": "dual"}, "take one_ema"),
        ({"non_shortcut_ratio": 0.5, "teacher": "x", "algorithm": "step_scaled"}, "no example can train it"),
        ({"shift": (2.0, 3.0), "algorithm": "step_scaled"}, "leave --shift out"),
        ({"method": "shortcut", **SHORTCUT, "algorithm": "step_scaled"}, "not --algorithm step_scaled"),
        ({"label_dropout": 1.0}, "in .0, 1"),
        ({"lr_warmup_steps": -1}, "0 for none"),
        ({"weight_dtype": "fp16"}, "fp32 or bf16"),
        ({"eval_num_steps": (0, 4)}, "as 1,4,64"),
        ({"non_shortcut_ratio": 1.5}, "a share of the examples"),
    ],
)
def test_a_mistake_is_named_with_its_mend(told, message):
    with pytest.raises(ValueError, match=f"{next(iter(told))}=.*{message}"):
        FlowConfig(**{**QUICK, **told}).check()


@pytest.mark.slow
def test_the_command_is_killed_and_goes_on(tmp_path, images):
    """The real command: SIGTERM saves and leaves with 143, and the same command ends where an unbroken run
    ends."""
    write(tmp_path, images)
    told = {**QUICK, "train_data_dir": str(tmp_path), "checkpointing_steps": 1}

    def argv(out, updates):
        return [
            word
            for k, v in {**told, "max_train_steps": updates, "output_dir": tmp_path / out}.items()
            for word in (f"--{k}", str(v))
        ]

    process = subprocess.Popen(
        [sys.executable, "-m", "scfm.cli", "pretrain", *argv("killed", 100_000)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    began = time.monotonic()
    while not (tmp_path / "killed" / "flow.safetensors").is_file() and time.monotonic() - began < 120:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "the same command goes on from there" in said
    done = json.loads(header_of(tmp_path / "killed" / "flow.safetensors")["notes"])["train_steps"]
    assert main(argv("killed", done + 2)) == 0 and main(argv("unbroken", done + 2)) == 0
    killed, unbroken = (tmp_path / out / "flow.safetensors" for out in ("killed", "unbroken"))
    assert same(load_file(killed), load_file(unbroken)) and header_of(killed) == header_of(unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["scfm", "step_scaled"])
def test_two_processes_are_one(way, tmp_path, images):
    """The same updates, evaluations counted over both, weights equal up to rounding."""
    write(tmp_path, images)
    told = {**QUICK, **WAYS[way], "train_data_dir": str(tmp_path), "max_train_steps": 3}

    def words(out):
        pairs = {**told, "output_dir": tmp_path / out}.items()
        return [word for name, value in pairs for word in (f"--{name}", str(value))]

    assert main(words("1")) == 0
    forked.run_two(["pretrain", *words("2")], tmp_path / "log")
    one, two = (tmp_path / name / "flow.safetensors" for name in "12")
    assert header_of(one)["notes"] == header_of(two)["notes"]
    a, b = load_file(one), load_file(two)
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
