"""`scfm dial` and `scfm sample`, on a copy of the LoRA that the repository carries, beside the stock pipeline."""
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.functional import pil_to_tensor

from scfm.cli import main
from scfm.dial import Dial, read_dial, write_dial
from scfm.lora import WEIGHT_NAME
from scfm.step_lora import StepLora, UseConfig, paint
from scfm.teacher_data import start_noise
from toy.pipelines import FLUX, TOKENS, WEIGHTS, load_flux

PROMPTS = ["a large red cross", "a small blue ring on the left"]


@pytest.fixture
def lora(tmp_path):
    folder = tmp_path / "lora"
    shutil.copytree(WEIGHTS / "lora", folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "pipeline": str(FLUX), "from_the_future": 1}))
    return folder


def stock_picture(lora, scale, steps):
    """By diffusers alone: load, set the weight, pass the sigmas."""
    pipe = load_flux()
    pipe.load_lora_weights(str(lora), adapter_name="a")
    pipe.set_adapters(["a"], [scale])
    noise = start_noise(paint_family(pipe), range(2), 5)
    return pipe(PROMPTS, height=32, width=32, num_inference_steps=steps, sigmas=[1 - i / steps for i in range(steps)],
                guidance_scale=2.5, latents=noise, max_sequence_length=TOKENS, output_type="pt").images * 2 - 1


def paint_family(pipe):
    from scfm.families.flux import Flux
    return Flux(pipe, 32, 32, TOKENS)


def test_sample_is_the_stock_pipeline_at_the_strength_of_the_dial(lora):
    write_dial(lora / WEIGHT_NAME, Dial((1, 4), (1., .5), 3.))
    tuned = StepLora(UseConfig(lora=str(lora), seed=5), "cpu")
    pictures, scale = paint(tuned, PROMPTS, 2)
    assert scale == .75                                     # half way from 1 to 4 in octaves
    assert torch.equal(pictures, stock_picture(lora, .75, 2))
    assert not torch.equal(pictures, paint(tuned, PROMPTS, 2, scale=1)[0])


def test_scale_zero_is_the_teacher(lora):
    tuned = StepLora(UseConfig(lora=str(lora), seed=5), "cpu")
    family = paint_family(load_flux())
    plain = family.stock_pictures(PROMPTS, start_noise(family, range(2), 5), 3, 2.5, 3.)
    torch.testing.assert_close(paint(tuned, PROMPTS, 3, scale=0)[0], plain, rtol=0, atol=1e-5)


def test_the_dial_command_keeps_the_tensors_and_a_stock_pipeline_still_loads_them(lora, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    before = load_file(lora / WEIGHT_NAME)
    words = ["dial", "--lora", lora, "--prompts", tmp_path / "prompts.txt", "--count", 3, "--steps", "2,1",
             "--scales", "1,.5", "--goal_steps", 4]
    assert main([str(w) for w in words]) == 0
    found, record = read_dial(lora / WEIGHT_NAME), json.loads((lora / "dial.json").read_text())
    assert found.steps == (1, 2) and found.scales[0] >= found.scales[1] and set(found.scales) <= {0., .5, 1.}
    assert record["captions"] == 3 and len(record["curve"]) == 2 * 3
    nearest = {n: min(r["distance"] for r in record["curve"] if r["steps"] == n) for n in (1, 2)}
    assert nearest[1] > nearest[2] > 0
    after = load_file(lora / WEIGHT_NAME)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert f"set_adapters([\"step\"], [{found.scale(2):g}])" in (lora / "README.md").read_text()
    assert stock_picture(lora, 1., 1).isfinite().all()


@pytest.mark.parametrize("scale", [1., .5])
def test_the_sample_command_writes_the_picture(lora, tmp_path, capsys, scale):
    write_dial(lora / WEIGHT_NAME, Dial((1,), (scale,), 3.))
    out = tmp_path / "new/star.png"
    words = ["sample", "--lora", lora, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--steps", 1, "--seed", 5, "--out", out]
    assert main([str(w) for w in words]) == 0
    assert f"2 pictures, 1 step, strength {scale:g}" in capsys.readouterr().out
    written = pil_to_tensor(Image.open(out)).float() / 127.5 - 1
    assert (written - torch.cat(list(stock_picture(lora, scale, 1)), 2)).abs().max() < .02


@pytest.mark.parametrize("command, change, message", [
    ("sample", {"--lora": "nowhere"}, "no LoRA at nowhere"),
    ("sample", {"--prompts": "x.txt"}, "either --prompt"),
    ("sample", {"--steps": "0"}, "--steps is 0"),
    ("sample", {"--pipeline": "nowhere"}, "no pipeline in nowhere"),
    ("sample", {"--precision": "fp8"}, "fp32, bf16"),
    ("sample", {"--shift": "-1"}, "shift"),
    ("dial", {"--lora": "nowhere"}, "no LoRA at nowhere"),
    ("dial", {"--prompts": "nowhere.txt"}, "no captions at nowhere.txt"),
    ("dial", {"--count": "0"}, "--count"),
])
def test_bad_input_is_one_line_and_code_2(lora, capsys, command, change, message):
    words = {"--lora": str(lora), **({"--prompt": "a red star"} if command == "sample" else {}), **change}
    assert main([command, *[w for pair in words.items() for w in pair]]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"scfm {command}: ") and message in said
