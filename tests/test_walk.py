"""The whole way by the command line, on the tiny Flux and the tiny SD3: captions to pictures to cache to LoRA (killed on the way) to
dial to report to a pipeline that stock diffusers loads."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from scfm.training.checkpoint import latest
from scfm.cli import main
from scfm.method.lora_scale import read_dial
from scfm.models.lora import WEIGHT_NAME
from toy.pipelines import FLUX, TOKENS, build_sd3

CAPTIONS = ["a large red cross", "a small blue ring on the left", "a yellow circle at the top", "a green star"]
SIZE = {"height": 32, "width": 32, "max_tokens": TOKENS}


def words(command, **flags):
    return [command, *(word for k, v in flags.items() for word in (f"--{k}", str(v)))]


def run(command, **flags):
    assert main(words(command, **flags)) == 0, command


@pytest.fixture(params=["flux", "sd3"])
def pipeline(request, tmp_path):
    if request.param == "flux":
        return FLUX
    build_sd3().save_pretrained(tmp_path / "sd3")
    return tmp_path / "sd3"


def test_from_captions_to_a_pipeline(pipeline, tmp_path, capsys):
    prompts, pictures, out = tmp_path / "prompts.jsonl", tmp_path / "pictures", tmp_path / "run"
    prompts.write_text("".join(json.dumps({"text": caption}) + "\n" for caption in CAPTIONS))

    run("plan", pipeline=pipeline, **SIZE)
    run("data", pipeline=pipeline, prompts=prompts, out=pictures, sizes="32x32,24x40", count=10, steps=3, guidance=2.5, max_tokens=TOKENS)
    assert len(list(pictures.glob("*.png"))) == 10 and list((pictures / "cache").glob("*.safetensors"))

    settings = dict(pipeline=pipeline, pictures=pictures, more_sizes="24x40", out=out, rank=4, lr=1e-3, updates=40, batch=4, guidance="1,4",
                    teacher_steps=4, teacher_guidance=2.5, checkpoint_every=2, preview_every=20, student_steps="2,3", judge=3,
                    judge_scales=".5,1", keep=1, **SIZE)
    kill(words("distill", **settings), out)
    at = int(latest(out).name)
    assert 2 <= at < 40 and not (out / "choice.json").exists()
    run("distill", **settings)                                         # the same command goes on
    assert json.loads((out / "choice.json").read_text())["updates"] == 40 and (out / "previews/000040.png").is_file()

    run("dial", lora=out, count=4, steps="2,3", scales=".5,1", goal_steps=4)
    dial = read_dial(out / WEIGHT_NAME)
    assert dial.steps == (2, 3) and "pipe.set_adapters" in (out / "README.md").read_text()

    run("evaluate", lora=out, prompts=prompts, count=3, steps="2,3", teacher_steps=4, out=tmp_path / "report", repeats=1, inception="none",
        clip="none")
    assert (tmp_path / "report/report.html").stat().st_size > 1000

    run("sample", lora=out, prompt=CAPTIONS[0], steps=3, out=tmp_path / "star.png")
    assert Image.open(tmp_path / "star.png").size == (32, 32)

    run("export", lora=out, steps=3, out=tmp_path / "fused")
    fused = DiffusionPipeline.from_pretrained(str(tmp_path / "fused"))
    fused.set_progress_bar_config(disable=True)
    picture = fused(CAPTIONS[0], num_inference_steps=3, sigmas=[1, 2 / 3, 1 / 3], guidance_scale=2.5, height=32, width=32,
                    max_sequence_length=TOKENS, generator=torch.Generator().manual_seed(0)).images[0]
    assert picture.size == (32, 32) and not getattr(fused.transformer, "peft_config", None)


def kill(arguments, out):
    """Starts the command, and kills it by SIGKILL once it has written a checkpoint."""
    process = subprocess.Popen([sys.executable, "-m", "scfm.cli", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 240
    while not latest(out) and process.poll() is None and time.time() < deadline:
        time.sleep(.01)
    assert process.poll() is None, process.stderr.read()[-1000:]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
