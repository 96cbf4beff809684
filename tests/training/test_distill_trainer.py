"""A run is the same run however it is cut: by kills, by processes, by micro-batches, by sizes. And it stops
before it spoils."""

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import forked
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

import scfm.method.distill
import scfm.training.distill_trainer
import scfm.training.trainer
from scfm.cli import main
from scfm.commands.signals import signals_noted
from scfm.method.distill import Batch, SCFMConfig, make_emas, make_optimizer, sample_batch, train_step
from scfm.models.flux import Flux
from scfm.models.lora import ADAPTERS, LoraModels, adapter_state
from scfm.models.scaled_lora import power_file
from scfm.training.checkpoint import all_checkpoints, latest
from scfm.training.config import DistillConfig, load_settings
from scfm.training.distill_trainer import DistillTrainer
from scfm.training.selection import endpoints
from toy.pipelines import FLUX, TOKENS, build_flux
from toy.shapes import draw_captions, draw_images

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten images, five of them wide, with captions: somebody's own folder."""
    folder = tmp_path_factory.mktemp("own")
    generator = torch.Generator().manual_seed(3)
    captions = draw_captions(10, generator)
    drawn, _ = draw_images(captions, generator)
    lines = []
    for i, (image, text) in enumerate(zip(drawn, captions.text, strict=False)):
        image = Image.fromarray(((image.permute(1, 2, 0) + 1) * 127.5).byte().numpy())
        (image if i < 5 else image.resize((48, 24))).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def settings(images, out, **more):
    return {
        "pretrained_model_name_or_path": str(FLUX),
        "train_data_dir": str(images),
        "output_dir": str(out),
        "height": 32,
        "width": 32,
        "more_sizes": ("24x48",),
        "max_sequence_length": TOKENS,
        "rank": 2,
        "algorithm": "dual",
        "learning_rate": 1e-3,
        "max_train_steps": 6,
        "global_batch_size": 4,
        "teacher_steps": 2,
        "teacher_guidance_scale": 2.5,
        "num_eval_prompts": 2,
        **({} if more.get("algorithm") == "step_scaled" else {"eval_lora_scales": (1.0,)}),
        "eval_num_steps": (2,),
        "validation_steps": 0,
        "checkpointing_steps": 2,
        "report_to": "none",
        **more,
    }


def trained(images, out, **more):
    run = DistillTrainer(DistillConfig(**settings(images, out, **more)), progress=False)
    run.resume()
    run.train()
    return run


def flags(told):
    def words(v):
        return ",".join(map(str, v)) if isinstance(v, tuple) else str(v)

    return [word for k, v in told.items() for word in ([f"--{k}"] if v is True else [f"--{k}", words(v)])]


@pytest.fixture(scope="module", params=["dual", "step_scaled"])
def algorithm(request):
    return request.param


@pytest.fixture(scope="module")
def whole(images, algorithm, tmp_path_factory):
    return trained(images, tmp_path_factory.mktemp("whole") / "run", algorithm=algorithm)


def gap(a, b):
    """Distance of two adapters' states, relative to how far the first has come: B, which starts at zero."""
    a, b = (torch.cat([state[k].flatten() for k in sorted(state) if "lora_B" in k]) for state in (a, b))
    return float((a - b).norm() / a.norm())


def student(run):
    return adapter_state(run.models.transformer, "student")


# However it is cut


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_gradient_accumulation_is_the_same_run(whole, images, algorithm, tmp_path, micro_batch_size):
    run = trained(images, tmp_path, algorithm=algorithm, micro_batch_size=micro_batch_size)
    assert gap(student(whole), student(run)) < 1e-3  # Adam enlarges rounding


def test_recomputing_activations_is_the_same_run(whole, images, algorithm, tmp_path):
    run = trained(images, tmp_path, algorithm=algorithm, gradient_checkpointing=True, checkpoint_blocks=4)
    assert run.pipe.transformer.is_gradient_checkpointing and gap(student(whole), student(run)) < 1e-3


def test_updates_of_two_sizes_occur_and_every_row_is_used_once(whole):
    mixed = 0
    for step in range(10):
        index = scfm.training.distill_trainer.batch_indices(step, 4, whole.dataset.size_of, 0)
        parts = whole.micro_batches(index)
        assert sorted(torch.cat(parts).tolist()) == [0, 1, 2, 3]
        assert all(len(whole.dataset.size_of[index[part]].unique()) == 1 for part in parts)
        mixed += len(parts) > 1
    assert mixed


@pytest.fixture(scope="module")
def of_two(whole, images, algorithm, tmp_path_factory):
    """The same run in two processes, once by torchrun."""
    out = tmp_path_factory.mktemp("two")
    told = flags(settings(images, out, algorithm=algorithm))
    if algorithm == "dual":
        by_torchrun(told)
    else:
        forked.run_two(["distill", *told], out.with_suffix(".log"))
    return out


def saved_adapters(run, folder):
    """{adapter: its file} of a run's models, as they are saved in a folder."""
    first = "pytorch_lora_weights.safetensors"
    return {
        name: folder / name.removesuffix("_2") / (power_file(first, 2) if name.endswith("_2") else first)
        for name in run.models.adapter_names
    }


def test_two_processes_are_one(whole, of_two):
    assert json.loads((of_two / "selection.json").read_text())["train_steps"] == 6
    for name, path in saved_adapters(whole, of_two).items():
        theirs = load_file(path)
        theirs = {k.removeprefix("transformer."): v for k, v in theirs.items()}
        ours = adapter_state(whole.models.transformer, name)
        assert ours.keys() == theirs.keys() and gap(ours, theirs) < 1e-3


def by_torchrun(told):
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*program, "-m", "scfm.cli", "distill", *told],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_two_processes_resume_bit_for_bit(whole, of_two, images, algorithm, tmp_path):
    shutil.copytree(
        of_two,
        tmp_path / "parts",
        ignore=lambda folder, names: [n for n in names if n in ("000006", "selection.json")],
    )
    told = flags(settings(images, tmp_path / "parts", algorithm=algorithm))
    forked.run_two(["distill", *told], tmp_path / "log")  # from update 4
    pairs = zip(*(saved_adapters(whole, run).values() for run in (of_two, tmp_path / "parts")), strict=True)
    for a, b in ((load_file(a), load_file(b)) for a, b in pairs):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_batch_that_cannot_be_dealt_is_refused(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scfm.training.trainer.Accelerator, "num_processes", 3)
    assert main(["distill", *flags(settings(images, tmp_path / "run"))]) == 2
    assert "global_batch_size 4 cannot be dealt evenly to 3 processes" in capsys.readouterr().err


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_speakers_speak_for_themselves_behind_a_wrapper(group):
    """DDP renames every parameter. The authors' swap goes by names taken before, finds none, and trains
    against itself."""

    def models(wrap):
        family = Flux(build_flux(), 32, 32, TOKENS)
        torch.manual_seed(0)
        four = LoraModels(family.pipe.transformer, family.velocity, family.lora_targets, 2)
        if wrap:
            four.model = DistributedDataParallel(family.pipe.transformer)
            assert all(name.startswith("module.") for name, _ in four.model.named_parameters())
        cond = {**family.encode_text(["a red star"] * 4), "guidance": torch.full((4,), 2.0)}
        return four, torch.randn(4, *family.latent_shape, generator=torch.Generator().manual_seed(1)), cond

    config = SCFMConfig(learning_rate=1e-2, global_batch_size=4, ema_decay_fast=0.5, ema_decay_slow=0.9)
    found = {}
    for wrap in (False, True):
        four, x, cond = models(wrap)
        optimizer, _ = make_optimizer(four, config)
        emas = make_emas(four, config)
        for update in range(3):
            train_step(
                four, emas, optimizer, [Batch(x, *sample_batch(config, update, 4, x.shape[1:]), cond)], config
            )
        said = {name: getattr(four, name)(x, torch.full((4,), 0.7), cond) for name in ("teacher", *ADAPTERS)}
        apart = [(said[a] - said[b]).abs().max() for a in said for b in said if a < b]
        assert min(apart) > 1e-5  # four voices, not one
        found[wrap] = said
    for name in found[True]:
        torch.testing.assert_close(found[True][name], found[False][name])


# What may go wrong


def test_a_loss_that_is_not_finite_stops_before_any_weight_is_changed(images, tmp_path, capsys, monkeypatch):
    told, real = settings(images, tmp_path / "run"), scfm.method.distill.scfm_loss
    calls = []

    def spoiled(*args, **more):
        calls.append(1)
        return real(*args, **more) * (float("nan") if len(calls) > 4 else 1)

    monkeypatch.setattr(scfm.method.distill, "scfm_loss", spoiled)
    assert main(["distill", *flags(told)]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    last = latest(tmp_path / "run")
    assert "is not finite" in said and str(last) in said and 2 <= int(last.name) < 5
    state = torch.load(last / "state.pt", weights_only=True)
    assert all(torch.isfinite(v).all() for adapter in state["adapters"].values() for v in adapter.values())


def test_a_full_disk_costs_no_good_checkpoint(images, tmp_path, capsys, monkeypatch):
    told, real = settings(images, tmp_path / "run", checkpoints_total_limit=1), torch.save

    def full(state, file):
        if state["step"] == 4:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        real(state, file)

    monkeypatch.setattr(torch, "save", full)
    assert main(["distill", *flags(told)]) == 1
    assert "step 4 could not be written" in capsys.readouterr().err
    assert [p.name for p in all_checkpoints(tmp_path / "run")] == ["000002"]
    monkeypatch.setattr(torch, "save", real)
    assert main(["distill", *flags(told)]) == 0  # room again: it goes on
    assert [p.name for p in all_checkpoints(tmp_path / "run")] == ["000006"]


def test_resume_can_be_refused_or_pointed_at_a_checkpoint(whole, images, algorithm, tmp_path, capsys):
    out = whole.output_dir

    def told(resume_from_checkpoint):
        return settings(images, out, algorithm=algorithm, resume_from_checkpoint=resume_from_checkpoint)

    assert main(["distill", *flags(told("never"))]) == 2
    assert "has checkpoints, up to 000006" in capsys.readouterr().err
    assert main(["distill", *flags(told(str(tmp_path)))]) == 2
    assert "no checkpoint at" in capsys.readouterr().err
    run = DistillTrainer(DistillConfig(**told(str(out / "checkpoints/000004"))), progress=False)
    assert run.resume() == 4
    run.train()
    assert gap(student(whole), student(run)) == 0


def test_a_run_that_is_through_is_left_alone(images, tmp_path, capsys):
    told = settings(images, tmp_path / "run", max_train_steps=2)
    assert main(["distill", *flags(told)]) == 0
    assert (
        main(
            [
                "dial",
                "--lora",
                str(tmp_path / "run"),
                "--num_prompts",
                "2",
                "--steps",
                "2",
                "--lora_scales",
                ".5,1",
                "--target_steps",
                "3",
            ]
        )
        == 0
    )
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["distill", *flags(told)]) == 0
    assert "nothing was done" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert (
        main(["distill", *flags({**told, "max_train_steps": 3})]) == 0
    )  # a longer run of the same kind: it goes on, and judges anew
    assert (
        "nothing was done" not in capsys.readouterr().out and not (tmp_path / "run/lora_scales.json").exists()
    )


def test_a_schedule_that_falls_cannot_go_on(images, tmp_path, capsys):
    told = settings(images, tmp_path / "run", max_train_steps=2, lr_scheduler="cosine")
    assert main(["distill", *flags(told)]) == 0
    assert main(["distill", *flags({**told, "max_train_steps": 3})]) == 2
    assert "of a run of 2 steps, over which its learning rate falls" in capsys.readouterr().err


def test_keep_says_how_many(images, tmp_path):
    run = trained(images, tmp_path, checkpoints_total_limit=2, checkpointing_steps=1)
    assert [p.name for p in all_checkpoints(run.output_dir)] == ["000005", "000006"]


def test_what_a_run_depends_on_is_written_beside_it(whole):
    told = json.loads((whole.output_dir / "run.json").read_text())
    assert told["torch"] == version("torch") and {"diffusers", "peft", "python"} <= set(told)


def test_nothing_but_the_transformer_stays_in_memory(whole):
    parts = {name for name, part in whole.pipe.components.items() if part is not None}
    assert parts == {"transformer", "scheduler"}


# Settings


def test_yaml_flags_and_unknown_keys(images, tmp_path, capsys):
    told = settings(images, tmp_path / "run", max_train_steps=1)
    lines = [f"{k}: {json.dumps(v)}" for k, v in told.items() if k != "rank"] + ["rank: 3"]
    (tmp_path / "mine.yaml").write_text("\n".join(lines) + "\n")
    assert main(["distill", "--config", str(tmp_path / "mine.yaml"), "--learning_rate", "2e-3"]) == 0
    kept = json.loads((tmp_path / "run/config.json").read_text())
    assert (kept["rank"], kept["learning_rate"], kept["more_sizes"]) == (3, 2e-3, ["24x48"])
    (tmp_path / "mine.yaml").write_text("rnak: 3\n")
    assert main(["distill", "--config", str(tmp_path / "mine.yaml")]) == 2
    assert "settings that do not exist: rnak" in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text("rank: [3\n")
    assert main(["distill", "--config", str(tmp_path / "mine.yaml")]) == 2
    assert "neither YAML nor JSON" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        (tmp_path / "mine.yaml").write_text("rank: big\n")
        main(["distill", "--config", str(tmp_path / "mine.yaml")])
    assert stop.value.code == 2 and "invalid int value: 'big'" in capsys.readouterr().err


PRESETS = [
    "emoji-step-scaled",
    "flux-dev-a100",
    "flux-dev-48gb",
    "flux-dev-24gb",
    "flux-dev-16gb",
    "flux-dev-12gb",
    "flux-dev-8gb",
    "flux-dev-step-scaled",
    "sd35-large-a100",
    "flux-authors",
    "sd35-authors",
    "qwen-image-step-scaled",
    "flux2-klein-base-4b-step-scaled",
    "flux2-dev-step-scaled",
    "z-image-step-scaled",
    "sana-1600m-step-scaled",
    "wan-2.1-1.3b-step-scaled",
    "wan-2.1-14b-step-scaled",
    "wan-2.2-ti2v-5b-step-scaled",
    "tiny",
    "tiny-step-scaled",
]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole(name):
    config = DistillConfig(
        pretrained_model_name_or_path="somewhere", prompts="some.txt", **load_settings(name)
    )
    config.check()
    text = (scfm.training.config.PRESETS / f"{name}.yaml").read_text()
    assert "TRIED" in text  # each says whether anybody has run it


@pytest.mark.parametrize("micro, most", [(0, 16), (2, 4)])
def test_the_comparison_at_the_end_takes_a_card_no_more_than_training_did(micro, most, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "scfm.training.selection.euler_endpoints", lambda *_, batch_size: seen.append(batch_size)
    )
    models = SimpleNamespace(field=lambda name, scale: None)
    trainer = SimpleNamespace(config=DistillConfig(micro_batch_size=micro), family=None, models=models)
    endpoints(trainer, "student", [], torch.zeros(0), 2)
    assert seen == [most]


def test_the_presets_are_these():
    assert sorted(p.stem for p in scfm.training.config.PRESETS.glob("*.yaml")) == sorted(PRESETS)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lora_layers": ("to_z",)}, "lora_layers: to_z is no linear layer"),
        ({"more_sizes": ("24by48",)}, "HEIGHTxWIDTH"),
        ({"more_sizes": ("30x48",)}, "multiples of 4"),
        ({"quantize": "int3"}, "int8 or nf4, or leave it out"),
        ({"blocks_to_swap": -1}, "blocks_to_swap=-1: a whole number of at least 0"),
        ({"blocks_to_swap": 7}, "blocks_to_swap is 7: FluxTransformer2DModel has 6 blocks"),
        ({"blocks_to_swap": 2, "compile_blocks": True}, "blocks_to_swap=2 with compile_blocks"),
        ({"blocks_to_swap": 2, "shard": 2}, "blocks_to_swap=2 with shard"),
        ({"report_to": "mlflow"}, "tensorboard, wandb or none"),
        ({"select_adapter": "teacher"}, "best, student, ema_fast or ema_slow"),
        ({"dynamic_shift_prob": 2.0}, "dynamic_shift_prob"),
        ({"micro_batch_size": -1}, "micro_batch_size"),
        ({"checkpoint_blocks": 2}, "0 without --gradient_checkpointing"),
        (
            {"checkpoint_blocks": 99, "gradient_checkpointing": True},
            "checkpoint_blocks is 99: FluxTransformer2DModel has 6 blocks",
        ),
        ({"checkpoints_total_limit": 0}, "checkpoints_total_limit"),
        ({"non_shortcut_ratio": 1.5}, "non_shortcut_ratio"),
        ({"non_shortcut_ratio": 0.5, "algorithm": "step_scaled"}, "non_shortcut_ratio"),
        ({"teacher_ratio": 0.2, "algorithm": "step_scaled"}, "teacher_ratio=0.2 means nothing to algorithm"),
        ({"ema_decay": 0.9}, "ema_decay=0.9 means nothing to algorithm dual"),
        ({"select_adapter": "ema_slow", "algorithm": "step_scaled"}, "with step_scaled best, student or ema"),
        ({"shift": (1.0, 2.0), "algorithm": "step_scaled"}, "leave --shift out"),
        (
            {"guidance_mode": "distilled", "algorithm": "step_scaled", "teacher_guidance_scale": 1.0},
            "no guidance to distil",
        ),
        ({"finest_steps": 32, "algorithm": "step_scaled"}, "no target comes from the teacher"),
        ({"step_weights": (1.0, 2.0), "algorithm": "step_scaled"}, "a number of at least 0 for each"),
        (
            {"step_counts": (1, 16), "step_weights": (1.0, 0.0), "algorithm": "step_scaled"},
            "no target comes from the teacher",
        ),
        ({"loss": "l1"}, "mse or huber or cosine"),
        ({"pretrained_model_name_or_path": "nobody/nothing-of-the-kind"}, "no pipeline"),
    ],
)
def test_bad_input_is_one_line_and_code_2(images, tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["distill", *flags(settings(images, tmp_path / "run", **change))]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("scfm distill: ") and message in said
    assert not (tmp_path / "run").exists()


def test_every_choice_trains(images, tmp_path):
    """Options whose mathematics is tested elsewhere reach the update: each changes what is learned."""
    base = {"max_train_steps": 2, "ema_decay_fast": 0.2, "ema_decay_slow": 0.6, "learning_rate": 1e-2}
    plain = trained(images, tmp_path / "plain", **base)
    for i, change in enumerate(
        (
            {"loss": "huber"},
            {"loss": "cosine"},
            {"non_shortcut_ratio": 0.5},
            {"algorithm": "one_ema"},
            {"algorithm": "dual_pure"},
            {"t_skip": 4},
            {"self_grids": (2,)},
            {"shift": (1.0, 1.0)},
            {"restart_every": 1},
            {"ema_target_scale": 0.5},
            {"teacher_grid": 8},
            {"teacher_ratio": 0.8},
            {"guidance_scale_range": (1.0, 1.0)},
            {"lora_layers": ("to_q",)},
        )
    ):
        other = student(trained(images, tmp_path / str(i), **{**base, **change}))
        assert other.keys() != student(plain).keys() or gap(student(plain), other) > 1e-3, change


def test_every_choice_of_step_scaled_trains(images, tmp_path):
    base = {"max_train_steps": 2, "ema_decay": 0.5, "learning_rate": 1e-2, "algorithm": "step_scaled"}
    plain = trained(images, tmp_path / "plain", **base)
    for i, change in enumerate(
        (
            {"scale_exponent": 0.5},
            {"scale_order": 1},
            {"step_counts": (1, 2, 16)},
            {"step_weights": (9.0, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)},
            {"finest_steps": 8},
            {"ema_decay": 0.0},
            {"inference_shift": 1.0},
        )
    ):
        other = student(trained(images, tmp_path / str(i), **{**base, **change}))
        assert gap(student(plain), other) > 1e-3, change


def test_tensorboard_gets_losses_and_previews(images, tmp_path):
    told = settings(images, tmp_path / "run", report_to="tensorboard", max_train_steps=2, validation_steps=2)
    assert main(["distill", *flags(told)]) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = next(
        path.parent for path in (tmp_path / "run/logs").rglob("events*") if path.stat().st_size > 1000
    )
    read = EventAccumulator(str(folder)).Reload()
    assert [e.step for e in read.Scalars("loss")] == [1, 2] and read.Images("validation")


def test_a_second_interrupt_interrupts():
    with signals_noted() as stopped, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        assert stopped == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
