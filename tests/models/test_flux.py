"""The tiny pipeline is genuine, the real command turns it into a few-step one that stock diffusers loads."""

import json
import os
import signal
import subprocess
import sys
import time

import forked
import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scfm.cli import main
from scfm.models.check import check_images
from scfm.models.flux import Flux
from scfm.models.loading import load_pipeline
from scfm.models.source import PipelineSource
from scfm.training.checkpoint import latest
from scfm.training.config import DistillConfig
from scfm.training.distill_trainer import DistillTrainer
from toy.pipelines import FLUX, GUIDANCE, TOKENS, load_flux

CAPTIONS = [
    "a large red cross",
    "a small blue ring on the left",
    "a yellow circle at the top",
    "a green star",
]


@pytest.fixture(scope="module")
def prompts(folder):
    path = folder / "prompts.txt"
    path.write_text("# four captions\n\n" + "\n".join(CAPTIONS) + "\n")
    return path


def flags(prompts, out, **more):
    settings = {
        "pretrained_model_name_or_path": FLUX,
        "prompts": prompts,
        "output_dir": out,
        "height": 32,
        "width": 32,
        "max_sequence_length": TOKENS,
        "rank": 2,
        "algorithm": "dual",
        "learning_rate": 1e-3,
        "max_train_steps": 2,
        "global_batch_size": 2,
        "teacher_steps": 2,
        "num_eval_prompts": 2,
        "eval_num_steps": 2,
        "eval_lora_scales": 1.0,
        "report_to": "none",
        **more,
    }
    return [word for k, v in settings.items() for word in (f"--{k}", str(v))]


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_our_sampler_is_the_stock_pipeline(flux, steps, shift):
    assert check_images(flux, CAPTIONS, [steps], [GUIDANCE], shift)


@pytest.mark.slow
def test_the_carried_pipeline_loads_without_us():
    """Plain diffusers in a process that never imports scfm or toy."""
    code = (
        "import sys, torch; from diffusers import FluxPipeline\n"
        f"pipe = FluxPipeline.from_pretrained({str(FLUX)!r}); pipe.set_progress_bar_config(disable=True)\n"
        "image = pipe('a red cross', height=32, width=32, num_inference_steps=2, sigmas=[1, .5],"
        "max_sequence_length=16).images[0]\n"
        "assert image.size == (32, 32) and not {'scfm', 'toy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


@pytest.mark.slow
def test_the_command_runs_and_a_stock_pipeline_makes_the_same_images(flux, prompts, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["distill", *flags(prompts, out)]) == 0
    assert "saved as" in capsys.readouterr().out
    choice = json.loads((out / "selection.json").read_text())
    shipped = load_file(out / "pytorch_lora_weights.safetensors")
    own = load_file(out / choice["selected"] / "pytorch_lora_weights.safetensors")
    assert shipped.keys() == own.keys() and all(torch.equal(shipped[k], own[k]) for k in own)
    assert (out / "validation" / "000002.png").is_file()

    run = DistillTrainer(DistillConfig(**{**vars_of(out), "output_dir": str(out)}), progress=False)
    assert run.resume() == 2
    noise = torch.randn(4, *flux.latent_shape, generator=torch.Generator().manual_seed(0))
    for name in ("student", "ema_slow"):
        stock = load_flux()
        stock.load_lora_weights(str(out / name))
        theirs = Flux(stock, 32, 32, TOKENS).sample_stock(CAPTIONS, noise, 3, GUIDANCE)
        stock = load_flux()
        stock.transformer = run.pipe.transformer  # the run holds no encoder and no VAE
        with run.models.using(name):
            ours = Flux(stock, 32, 32, TOKENS).sample_stock(CAPTIONS, noise, 3, GUIDANCE)
        assert torch.equal(ours, theirs)


def vars_of(out):
    saved = json.loads((out / "config.json").read_text())
    return {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}


@pytest.mark.slow
def test_every_loader_finds_the_same_scale(prompts, tmp_path):
    """alpha is in the tensors: what reads the header and what does not load one LoRA."""
    out, bare = tmp_path / "run", tmp_path / "bare"
    main(["distill", *flags(prompts, out, lora_alpha=6, validation_steps=0)])
    with safe_open(out / "pytorch_lora_weights.safetensors", "pt") as opened:
        saved = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (saved["transformer.r"], saved["transformer.lora_alpha"]) == (2, 2)
    bare.mkdir()
    save_file(load_file(out / "pytorch_lora_weights.safetensors"), bare / "pytorch_lora_weights.safetensors")
    for folder in (out, bare):
        pipe = load_flux()
        pipe.load_lora_weights(folder)
        assert set(pipe.transformer.transformer_blocks[0].attn.to_q.scaling.values()) == {1.0}


LONG = dict(max_train_steps=30, checkpointing_steps=2, validation_steps=0)


@pytest.fixture(scope="module")
def unbroken(prompts, folder):
    """A run that nothing disturbs."""
    assert main(["distill", *flags(prompts, folder / "unbroken", **LONG)]) == 0
    return folder / "unbroken"


def end_by(sent, prompts, out):
    """Starts the command, sends it a signal after the first checkpoint, returns its exit code."""
    process = forked.start(["distill", *flags(prompts, out, **LONG)], out.with_suffix(".log"))
    deadline = time.time() + 240
    while not latest(out) and process.is_alive() and time.time() < deadline:
        time.sleep(0.02)
    assert process.is_alive(), "it ended before the signal"
    os.kill(process.pid, sent)
    process.join()
    return process.exitcode


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_ended_by_a_signal_resumes_bit_for_bit(unbroken, prompts, tmp_path, sent):
    broken = tmp_path / "broken"
    code = end_by(sent, prompts, broken)
    assert code == (143 if sent == signal.SIGTERM else -sent)  # 143: it saved, and left by itself
    assert 2 <= int(latest(broken).name) < 30
    assert not (broken / "selection.json").exists()
    assert main(["distill", *flags(prompts, broken, **LONG)]) == 0
    for name in ("student", "ema_fast", "ema_slow"):
        a, b = (load_file(run / name / "pytorch_lora_weights.safetensors") for run in (unbroken, broken))
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pretrained_model_name_or_path": "nowhere"}, "no pipeline in nowhere"),
        ({"pretrained_model_name_or_path": ""}, "--pretrained_model_name_or_path"),
        ({"prompts": "nowhere.txt"}, "no captions at nowhere.txt"),
        ({"prompts": ""}, "--prompts"),
        ({"train_data_dir": "x"}, "either --prompts"),
        ({"height": 30}, "multiples of 4"),
        ({"rank": 0}, "rank"),
        ({"max_train_steps": 0}, "max_train_steps"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"weight_dtype": "fp8"}, "fp32 or bf16"),
        ({"algorithm": "triple"}, "dual"),
        ({"teacher_ratio": 1.5}, "teacher_ratio"),
        ({"guidance_scale_range": "7,0"}, "guidance"),
        ({"eval_num_steps": "0,3"}, "eval_num_steps"),
    ],
)
def test_bad_input_is_one_line_and_code_2(prompts, tmp_path, capsys, change, message):
    assert main(["distill", *flags(**{"prompts": prompts, "out": tmp_path / "run", **change})]) == 2
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert shown.startswith("scfm distill: ") and message in shown
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_folder_of_another_run_is_refused(prompts, tmp_path, capsys):
    main(["distill", *flags(prompts, tmp_path / "run", validation_steps=0)])
    assert main(["distill", *flags(prompts, tmp_path / "run", rank=3)]) == 2
    assert "another rank" in capsys.readouterr().err


def test_unknown_pipelines_are_refused_by_name(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="StableDiffusionPipeline"):
        _ = PipelineSource(tmp_path).family
    assert load_pipeline(FLUX, torch.float32)[1] is Flux and issubclass(Flux.pipeline_class, FluxPipeline)


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["distill", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name, f in DistillConfig.__dataclass_fields__.items():
        assert f"--{name}" in text and f.metadata["help"], name
