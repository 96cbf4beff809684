"""The model card: what the records say, code that runs, and nobody else's README."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from scfm.inference.config import InferenceConfig
from scfm.inference.model_card import MARKER, render_card, write_card
from scfm.inference.step_lora import StepLora, generate
from scfm.models.flux import Flux
from scfm.models.lora import WEIGHT_NAME
from scfm.models.lora_file import read_lora_scales, write_lora_scales
from scfm.models.sampling import start_noise
from toy.pipelines import TOKENS, WEIGHTS, load_flux

PROMPTS = ["a large red cross", "a small blue ring on the left"]


@pytest.fixture
def moving(lora, tmp_path):
    """The LoRA for a pipeline whose scheduler chooses its shift by the size, as FLUX.1-dev's does."""
    pipe = load_flux()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe.save_pretrained(tmp_path / "base")
    settings = json.loads((lora / "config.json").read_text())
    settings["pretrained_model_name_or_path"] = str(tmp_path / "base")
    (lora / "config.json").write_text(json.dumps(settings))
    return lora


@pytest.mark.parametrize("per_step", [False, True])
def test_the_code_of_the_card_generates_what_we_generate(moving, tmp_path, monkeypatch, per_step):
    """Run as it stands, on stock diffusers, in the folder above the LoRA's."""
    path = moving / WEIGHT_NAME
    if per_step:
        write_lora_scales(path, read_lora_scales(path)._replace(schedules=((0.5, 0.5, 1.25, 0.5),)))
    text = write_card(moving).read_text()
    code = text.split("```python")[1].split("```")[0]
    assert code.count("    prompt,\n") == 1
    code = code.replace("    prompt,\n", "    prompt,\n    latents=noise,\n    output_type='pt',\n")
    pipe = FluxPipeline.from_pretrained(str(tmp_path / "base"))
    noise = start_noise(Flux(pipe, 32, 32, TOKENS), range(2), 5)
    names = {"pipe": pipe, "prompt": PROMPTS, "noise": noise}
    monkeypatch.chdir(moving.parent)
    exec(code, names)
    step_lora = StepLora(InferenceConfig(lora=str(moving), seed=5), "cpu")
    images, scales = generate(step_lora, PROMPTS, 4)
    torch.testing.assert_close(names["images"] * 2 - 1, images, rtol=0, atol=1e-5)
    assert f"| 4 | {read_lora_scales(path).scale(4):g} |" in text and len(set(scales)) == 1 + per_step


def test_the_card_says_what_the_records_say_and_no_more(lora):
    settings = json.loads((lora / "config.json").read_text())
    (lora / "images").mkdir()
    (lora / "images/metadata.jsonl").write_text("{}\n" * 7)
    run = {"torch": "2.15.0", "device": "a GPU", "commit": "0123456789abcdef", "changed": ["x.py"]}
    (lora / "run.json").write_text(json.dumps(run))
    text = write_card(lora).read_text()
    for words in (
        "(7 of them), 32x32 pixels",
        "torch 2.15.0; on a GPU",
        "commit 0123456789ab, with changes",
        "600 training steps at batch size 32",
        "ema_fast is saved: its endpoints lie nearest",
        "in 32 steps at guidance scale 2.5",
        "guidance_scale=2.5",
        "is kept",
        "48 prompts",
        "64-step",
    ):
        assert words in text, words
    distilled = {**settings, "guidance_mode": "distilled", "negative_prompt": "a ring"}
    (lora / "config.json").write_text(json.dumps(distilled))
    text = write_card(lora).read_text()
    assert "guidance_scale=1," in text and "sample at guidance scale 1" in text
    # the negative prompt is in the weights too: at guidance scale 1 the call would not heed it
    assert "negative_prompt" not in text and "scale 2.5 away from 'a ring' is in the weights" in text
    kept = settings | {"guidance_mode": "kept", "negative_prompt": "a ring"}
    (lora / "config.json").write_text(json.dumps(kept))
    assert "negative_prompt='a ring'" in write_card(lora).read_text()
    names = ("pretrained_model_name_or_path", "height", "width", "max_sequence_length")
    few = {name: settings[name] for name in (*names, "teacher_guidance_scale")}
    (lora / "config.json").write_text(json.dumps(few))
    for name in ("run.json", "selection.json", "lora_scales.json"):
        (lora / name).unlink()
    text = write_card(lora).read_text()
    assert "saved" not in text and "training steps" not in text and "Algorithm" not in text
    assert "guidance_scale=2.5" in text and "set_adapters" in text


def test_the_carried_card_is_what_is_written_from_the_carried_records():
    assert (WEIGHTS / "lora/README.md").read_text(encoding="utf-8") == render_card(WEIGHTS / "lora")


def test_no_card_without_a_lora(tmp_path):
    with pytest.raises(FileNotFoundError, match="no LoRA at"):
        write_card(tmp_path)


def test_our_card_is_written_again_and_nobody_elses(lora):
    assert write_card(lora).name == "README.md"  # the carried one is ours
    assert MARKER in (lora / "README.md").read_text().splitlines()
    (lora / "README.md").write_text("# Mine\n")
    assert write_card(lora).name == "MODEL_CARD.md" and write_card(lora).name == "MODEL_CARD.md"
    ours = (lora / "MODEL_CARD.md").read_text()
    (lora / "MODEL_CARD.md").write_text(ours.replace(MARKER, "and a line of mine"))
    assert write_card(lora).name == "MODEL_CARD_2.md"
    assert (lora / "README.md").read_text() == "# Mine\n"
    assert "and a line of mine" in (lora / "MODEL_CARD.md").read_text()
    (lora / "README.md").write_bytes(b"\xff\xfe no text at all")
    assert write_card(lora).name == "MODEL_CARD_2.md"
