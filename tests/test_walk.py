"""The whole way by the command line, on the tiny Flux and the tiny SD3: captions to images to cache to LoRA
(killed on the way) to LoRA scales to report to a pipeline that stock diffusers loads."""

import json
import time

import forked
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from scfm.cli import main
from scfm.models.lora import WEIGHT_NAME
from scfm.models.lora_file import read_lora_scales
from scfm.training.checkpoint import latest
from toy.pipelines import FLUX, TOKENS, build_sd3

CAPTIONS = [
    "a large red cross",
    "a small blue ring on the left",
    "a yellow circle at the top",
    "a green star",
]
SIZE = {"height": 32, "width": 32, "max_sequence_length": TOKENS}


def words(command, **flags):
    return [command, *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


def run(command, **flags):
    assert main(words(command, **flags)) == 0, command


@pytest.fixture(params=["flux", "sd3"])
def pipeline(request, tmp_path):
    if request.param == "flux":
        return FLUX
    build_sd3().save_pretrained(tmp_path / "sd3")
    return tmp_path / "sd3"


@pytest.fixture
def algorithm(pipeline):
    """The default on the Flux, the paper's on the SD3."""
    return {} if pipeline == FLUX else {"algorithm": "dual", "eval_lora_scales": ".5,1"}


@pytest.mark.slow
def test_from_captions_to_a_pipeline(pipeline, algorithm, tmp_path):
    prompts, images, out = tmp_path / "prompts.jsonl", tmp_path / "images", tmp_path / "run"
    prompts.write_text("".join(json.dumps({"text": caption}) + "\n" for caption in CAPTIONS))

    run("plan", pretrained_model_name_or_path=pipeline, **SIZE)
    run(
        "data",
        pretrained_model_name_or_path=pipeline,
        prompts=prompts,
        output_dir=images,
        sizes="32x32,24x40",
        num_images=10,
        teacher_steps=3,
        teacher_guidance_scale=2.5,
        max_sequence_length=TOKENS,
    )
    assert len(list(images.glob("*.png"))) == 10 and list((images / "cache").glob("*.safetensors"))

    distil_and_resume(pipeline, images, out, algorithm)

    run("dial", lora=out, num_prompts=4, steps="2,3", lora_scales=".5,1", target_steps=4)
    assert read_lora_scales(out / WEIGHT_NAME).steps == (2, 3)
    assert "pipe.set_adapters" in (out / "README.md").read_text()

    report = {"output_dir": tmp_path / "report", "inception": "none", "clip": "none", "imagenet": "none"}
    few = {"num_images": 3, "steps": "2,3", "teacher_steps": 4, "latency_repeats": 1}
    run("evaluate", lora=out, prompts=prompts, **few, **report)
    assert (tmp_path / "report/report.html").stat().st_size > 1000

    run("sample", lora=out, prompt=CAPTIONS[0], steps=3, output=tmp_path / "star.png")
    assert Image.open(tmp_path / "star.png").size == (32, 32)

    run("export", lora=out, steps=3, output_dir=tmp_path / "fused")
    assert stock_image(tmp_path / "fused").size == (32, 32)


def distil_and_resume(pipeline, images, out, algorithm):
    """A run that is killed after a checkpoint; then the same command goes on."""
    settings = {
        "pretrained_model_name_or_path": pipeline,
        "train_data_dir": images,
        "more_sizes": "24x40",
        "output_dir": out,
        "rank": 4,
        "learning_rate": 1e-3,
        "max_train_steps": 40,
        "global_batch_size": 4,
        "guidance_scale_range": "1,4",
        "teacher_steps": 4,
        "teacher_guidance_scale": 2.5,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 1,
        "validation_steps": 20,
        "eval_num_steps": "2,3",
        "num_eval_prompts": 3,
        **algorithm,
        **SIZE,
    }
    kill(words("distill", **settings), out)
    step = int(latest(out).name)
    assert 2 <= step < 40 and not (out / "selection.json").exists()
    run("distill", **settings)
    assert json.loads((out / "selection.json").read_text())["train_steps"] == 40
    assert (out / "validation/000040.png").is_file()


def kill(arguments, out):
    """Starts the command, and kills it by SIGKILL once it has written a checkpoint."""
    process = forked.start(arguments, log := out.with_suffix(".log"))
    deadline = time.time() + 240
    while not latest(out) and process.is_alive() and time.time() < deadline:
        time.sleep(0.01)
    assert process.is_alive(), log.read_text()[-1000:]
    process.kill()
    process.join()


def stock_image(folder):
    """An image of an exported pipeline, as stock diffusers loads it, without any LoRA beside its weights."""
    pipe = DiffusionPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    assert not getattr(pipe.transformer, "peft_config", None)
    return pipe(
        CAPTIONS[0],
        num_inference_steps=3,
        sigmas=[1, 2 / 3, 1 / 3],
        guidance_scale=2.5,
        height=32,
        width=32,
        max_sequence_length=TOKENS,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
