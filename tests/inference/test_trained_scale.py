"""The carried pair of LoRAs whose scale is the step size: stock diffusers by its card, dial, export."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from scfm.cli import main
from scfm.evaluation.external_models import parse_external_model
from scfm.inference.export import ExportConfig
from scfm.inference.model_card import render_card
from scfm.inference.step_lora import InferenceConfig, StepLora, generate
from scfm.models.lora import WEIGHT_NAME
from scfm.models.lora_file import read_lora_scales
from scfm.models.sampling import start_noise
from scfm.models.scaled_lora import power_file
from toy.pipelines import FLUX, WEIGHTS

PROMPTS = ["a large red cross", "a small blue ring on the left"]
COUNTS = (1, 2, 3, 5, 8)


@pytest.fixture
def pair(tmp_path):
    """A copy of the carried pair, which knows its pipeline by its full path."""
    folder = shutil.copytree(WEIGHTS / "step_lora", tmp_path / "step_lora")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"pretrained_model_name_or_path": str(FLUX)}))
    return folder


def step_lora_of(folder):
    return StepLora(InferenceConfig(lora=str(folder), seed=5), "cpu")


STOCK = """
import sys
import torch
from diffusers import FluxPipeline
folder, noise = sys.argv[1], torch.load(sys.argv[2])
pipe = FluxPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
prompt, found = {prompts!r}, dict()
{code}
found[4] = images
{others}
torch.save(found, sys.argv[2] + ".images")
assert not [name for name in sys.modules if name.split(".")[0] in ("scfm", "toy")]
"""
CALL = """
{line}
found[{n}] = pipe(prompt, latents=noise, output_type="pt", num_inference_steps={n},
                  sigmas=[1 - i / {n} for i in range({n})], guidance_scale=2.5, height=32, width=32,
                  max_sequence_length=16).images
"""


@pytest.mark.slow
def test_stock_diffusers_samples_every_step_count_with_the_lines_of_the_card(pair):
    """In a process of its own, without scfm, in the folder above the LoRA's."""
    card = render_card(pair)
    code = card.split("```python")[1].split("```")[0]
    code = code.replace("    prompt,\n", "    prompt,\n    latents=noise,\n    output_type='pt',\n")
    lines = dict(re.findall(r"^\| (\d+) \| `(pipe\.set_adapters.*?)` \|", card, re.MULTILINE))
    others = "".join(CALL.format(n=n, line=lines[str(n)]) for n in COUNTS)
    ours = step_lora_of(pair)
    torch.save(start_noise(ours.family, range(2), 5), pair.parent / "noise")
    program = STOCK.format(prompts=PROMPTS, code=code, others=others)
    words = [sys.executable, "-c", program, str(FLUX), "noise"]
    subprocess.run(words, check=True, cwd=pair.parent)
    theirs = torch.load(pair.parent / "noise.images")
    for n in (*COUNTS, 4):
        images, scales = generate(ours, PROMPTS, n)
        assert scales == (n**-0.85,) * n
        # the card has four digits of a scale
        torch.testing.assert_close(theirs[n] * 2 - 1, images, rtol=0, atol=5e-3)


def test_scale_0_is_the_teacher_and_the_second_has_the_square(pair):
    ours = step_lora_of(pair)
    assert ours.adapter_scales(0.5) == {"step": 0.5, "step_2": 0.25}
    noise = start_noise(ours.family, range(2), 5)
    plain = StepLora(InferenceConfig(lora=str(WEIGHTS / "lora"), pretrained_model_name_or_path=str(FLUX)))
    assert torch.equal(ours.endpoints(PROMPTS, noise, 2, 0), plain.endpoints(PROMPTS, noise, 2, 0))


def test_half_a_pair_is_refused(pair, capsys):
    power_file(pair / WEIGHT_NAME, 2).unlink()
    assert main(["sample", "--lora", str(pair), "--prompt", PROMPTS[0], "--output", str(pair / "x.png")]) == 2
    assert (
        "is one LoRA of 2 that belong together, and pytorch_lora_weights_2.safetensors is not"
        in capsys.readouterr().err
    )


def test_one_of_a_pair_is_no_style_and_no_rival(pair, tmp_path):
    own = {"lora": str(pair), "output_dir": str(tmp_path / "new")}
    with pytest.raises(ValueError, match="one LoRA of 2 that belong together"):
        ExportConfig(**own, style_lora=str(pair)).check()
    with pytest.raises(ValueError, match="one LoRA of 2 that belong together"):
        parse_external_model(f"other={pair}")


def test_sample_says_where_the_scale_comes_from(pair, capsys):
    words = [
        "sample",
        "--lora",
        str(pair),
        "--prompt",
        PROMPTS[0],
        "--output",
        str(pair / "x.png"),
        "--steps",
    ]
    assert main([*words, "5"]) == 0
    assert "5 ** -0.85, the rule in the LoRA's file)" in capsys.readouterr().out
    assert main([*words, "20"]) == 0
    assert "trained for 1 to 16 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_a_dial_keeps_the_pair_a_pair(pair):
    words = "--num_prompts 2 --steps 1,4 --lora_scales .25,.5,1 --target_steps 4".split()
    assert main(["dial", "--lora", str(pair), *words]) == 0
    scales = read_lora_scales(pair / WEIGHT_NAME)
    assert scales.order == 2 and not scales.exponent and scales.steps == (1, 4)
    assert "step_2" in (pair / "README.md").read_text()
    assert list(step_lora_of(pair).files) == ["step", "step_2"]


@pytest.mark.slow
def test_an_export_holds_both(pair, tmp_path, capsys):
    """Fused into the pipeline; the command itself compares with both LoRAs beside the weights."""
    words = ["export", "--lora", str(pair), "--steps", "2", "--output_dir", str(tmp_path / "fused")]
    assert main(words) == 0
    record = json.loads((tmp_path / "fused/export.json").read_text())
    assert record["lora_scale"] == pytest.approx(2**-0.85) and record["differences"]["mean"] < 1e-3
    style = [*words[:-1], str(tmp_path / "merged"), "--style_lora", str(WEIGHTS / "lora")]
    assert main([*style, "--style_lora_scale", "0.3"]) == 0
    record = json.loads((tmp_path / "merged/export.json").read_text())
    assert record["differences"]["mean"] < 1e-3 < record["differences"]["two_captions"]


@pytest.mark.parametrize("name", ["step_lora", "emoji_lora"])
def test_the_carried_card_is_what_is_written_from_the_carried_records(name):
    folder = WEIGHTS / name
    assert (folder / "README.md").read_text(encoding="utf-8") == render_card(folder)
