"""`scfm dial` and `scfm sample`, on a copy of the LoRA that the repository carries, beside the stock pipeline."""
import json
import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.functional import pil_to_tensor

import scfm.inference.step_lora
from scfm.data import prepare
from scfm.models import loading
from scfm.inference.model_card import write_card
from scfm.cli import main
from scfm.commands.sample import whence_of
from scfm.method.lora_scale import LoraScales
from scfm.models.lora_file import read_lora_scales, write_lora_scales
from scfm.models.lora import WEIGHT_NAME
from scfm.inference.step_lora import StepLora, InferenceConfig, generate
from scfm.models.sampling import start_noise
from toy.pipelines import FLUX, TOKENS, WEIGHTS, load_flux

PROMPTS = ["a large red cross", "a small blue ring on the left"]


@pytest.fixture
def lora(tmp_path):
    folder = tmp_path / "lora"
    shutil.copytree(WEIGHTS / "lora", folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "pretrained_model_name_or_path": str(FLUX), "from_the_future": 1}))
    return folder


def stock_image(lora, scale, steps):
    """By diffusers alone: load, set the weight, pass the sigmas."""
    pipe = load_flux()
    pipe.load_lora_weights(str(lora), adapter_name="a")
    pipe.set_adapters(["a"], [scale])
    noise = start_noise(generate_family(pipe), range(2), 5)
    return pipe(PROMPTS, height=32, width=32, num_inference_steps=steps, sigmas=[1 - i / steps for i in range(steps)],
                guidance_scale=2.5, latents=noise, max_sequence_length=TOKENS, output_type="pt").images * 2 - 1


def generate_family(pipe):
    from scfm.models.flux import Flux
    return Flux(pipe, 32, 32, TOKENS)


def test_sample_is_the_stock_pipeline_at_the_strength_of_the_dial(lora):
    write_lora_scales(lora / WEIGHT_NAME, LoraScales((1, 4), (1., .5), 3.))
    step_lora = StepLora(InferenceConfig(lora=str(lora), seed=5), "cpu")
    images, scales = generate(step_lora, PROMPTS, 2)
    assert scales == (.75, .75)                                     # half way from 1 to 4 in octaves
    assert torch.equal(images, stock_image(lora, .75, 2))
    assert not torch.equal(images, generate(step_lora, PROMPTS, 2, scale=1)[0])


def test_scale_zero_is_the_teacher(lora):
    step_lora = StepLora(InferenceConfig(lora=str(lora), seed=5), "cpu")
    family = generate_family(load_flux())
    plain = family.sample_stock(PROMPTS, start_noise(family, range(2), 5), 3, 2.5, 3.)
    torch.testing.assert_close(generate(step_lora, PROMPTS, 3, scale=0)[0], plain, rtol=0, atol=1e-5)


def test_the_dial_command_keeps_the_tensors_and_a_stock_pipeline_still_loads_them(lora, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    before = load_file(lora / WEIGHT_NAME)
    words = ["dial", "--lora", lora, "--prompts", tmp_path / "prompts.txt", "--count", 3, "--steps", "2,1",
             "--scales", "1,.5", "--goal_steps", 4]
    assert main([str(w) for w in words]) == 0
    found, record = read_lora_scales(lora / WEIGHT_NAME), json.loads((lora / "lora_scales.json").read_text())
    assert found.steps == (1, 2) and found.scales[0] >= found.scales[1] and set(found.scales) <= {0., .5, 1.}
    assert record["captions"] == 3 and len(record["curve"]) == 2 * 3
    nearest = {n: min(r["distance"] for r in record["curve"] if r["steps"] == n) for n in (1, 2)}
    assert nearest[1] > nearest[2] > 0
    after = load_file(lora / WEIGHT_NAME)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert f"set_adapters([\"step\"], [{found.scale(2):g}])" in (lora / "README.md").read_text()
    assert stock_image(lora, 1., 1).isfinite().all()


@pytest.mark.parametrize("scale", [1., .5])
def test_the_sample_command_writes_the_image(lora, tmp_path, capsys, scale):
    write_lora_scales(lora / WEIGHT_NAME, LoraScales((1,), (scale,), 3.))
    out = tmp_path / "new/star.png"
    words = ["sample", "--lora", lora, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--steps", 1, "--seed", 5, "--output", out]
    assert main([str(w) for w in words]) == 0
    assert f"2 images, 1 step, strength {scale:g}" in capsys.readouterr().out
    written = pil_to_tensor(Image.open(out)).float() / 127.5 - 1
    assert (written - torch.cat(list(stock_image(lora, scale, 1)), 2)).abs().max() < .02


def by_callback(lora, scales):
    """A strength for each step by diffusers alone, from the callback that it offers."""
    pipe = load_flux()
    pipe.load_lora_weights(str(lora), adapter_name="a")
    pipe.set_adapters(["a"], [scales[0]])

    def turn(pipe, step, timestep, tensors):
        pipe.set_adapters(["a"], [scales[(step + 1) % len(scales)]])
        return tensors
    n, noise = len(scales), start_noise(generate_family(pipe), range(2), 5)
    return pipe(PROMPTS, height=32, width=32, num_inference_steps=n, sigmas=[1 - i / n for i in range(n)], guidance_scale=2.5, latents=noise,
                max_sequence_length=TOKENS, output_type="pt", callback_on_step_end=turn).images * 2 - 1


def test_a_strength_for_each_step_is_that_of_the_callback(lora):
    scales = (.25, 1., .5)
    write_lora_scales(lora / WEIGHT_NAME, LoraScales((1, 4), (1., .5), 3., (scales, (.1, .2))))
    step_lora = StepLora(InferenceConfig(lora=str(lora), seed=5), "cpu")
    images, used = generate(step_lora, PROMPTS, 3)
    assert used == scales and torch.equal(images, by_callback(lora, scales))
    assert torch.equal(generate(step_lora, PROMPTS, 3, (.75, .75, .75))[0], stock_image(lora, .75, 3))
    assert not torch.equal(images, by_callback(lora, scales[::-1]))
    assert generate(step_lora, PROMPTS, 1)[1] == (1.,)             # no schedule of this length: the dial's one
    noise = start_noise(step_lora.family, range(2), 5)          # and our own walk ends where the pipeline's does
    ends = step_lora.family.decode(step_lora.endpoints(PROMPTS, noise, 3, scales))
    torch.testing.assert_close(ends, images, rtol=0, atol=2e-4)


def test_the_scheduler_is_itself_again_even_after_an_error(lora):
    step_lora = StepLora(InferenceConfig(lora=str(lora)), "cpu")
    own = type(step_lora.pipe.scheduler).step
    with pytest.raises(KeyError), step_lora.scale_schedule((.5, 1.)):
        assert "step" in vars(step_lora.pipe.scheduler)
        raise KeyError
    assert step_lora.pipe.scheduler.step.__func__ is own and "step" not in vars(step_lora.pipe.scheduler)


def test_the_dial_command_finds_a_strength_for_each_step_and_sample_uses_it(lora, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ["dial", "--lora", lora, "--prompts", tmp_path / "prompts.txt", "--count", 3, "--steps", "2,4", "--scales", "1,.5", "--goal_steps", 4, "--each", "2"]
    assert main([str(w) for w in words]) == 0
    said, found = capsys.readouterr().out, read_lora_scales(lora / WEIGHT_NAME)
    (scales,) = found.schedules
    assert len(scales) == 2 and json.loads((lora / "lora_scales.json").read_text())["schedules"] == [list(scales)]
    one, each = (float(line.split("distance")[1].split()[0]) for line in said.splitlines() if line.startswith("   2 steps"))
    assert each <= one
    assert main(["sample", "--lora", str(lora), "--prompt", PROMPTS[0], "--steps", "2", "--output", str(tmp_path / "a.png")]) == 0
    assert "strength " + ", ".join(f"{s:.3g}" for s in scales) + " (by its dial, a strength for each step)" in capsys.readouterr().out
    assert main(["sample", "--lora", str(lora), "--prompt", PROMPTS[0], "--steps", "2", "--scale", ",".join(map(str, scales)), "--output", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "A weight for each step" in (lora / "README.md").read_text()


@pytest.fixture
def moving(lora, tmp_path):
    """The same LoRA for a pipeline whose scheduler chooses its shift by the size, as FLUX.1-dev's does; set_shift is lost on it."""
    pipe = load_flux()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3., use_dynamic_shifting=True)
    pipe.save_pretrained(tmp_path / "base")
    settings = json.loads((lora / "config.json").read_text())
    (lora / "config.json").write_text(json.dumps({**settings, "pretrained_model_name_or_path": str(tmp_path / "base")}))
    return lora


def test_the_shift_of_training_holds_where_the_scheduler_would_choose_its_own(moving):
    images, _ = generate(StepLora(InferenceConfig(lora=str(moving), seed=5), "cpu"), PROMPTS, 2, scale=.75)
    torch.testing.assert_close(images, stock_image(moving, .75, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("each", [False, True])
def test_the_code_of_the_card_generates_what_we_generate(moving, tmp_path, monkeypatch, each):
    """Run as it stands, on stock diffusers, in the folder above the LoRA's; with a strength for each step by a callback."""
    if each:
        write_lora_scales(moving / WEIGHT_NAME, read_lora_scales(moving / WEIGHT_NAME)._replace(schedules=((.5, .5, 1.25, .5),)))
    text = write_card(moving).read_text()
    lines = text.split("```python")[1].split("```")[0].replace("pipe(prompt,", "images = pipe(prompt, latents=noise, output_type='pt',")
    pipe = FluxPipeline.from_pretrained(str(tmp_path / "base"))
    told = {"pipe": pipe, "prompt": PROMPTS, "noise": start_noise(generate_family(pipe), range(2), 5)}
    monkeypatch.chdir(moving.parent)
    exec(lines, told)
    images, scales = generate(StepLora(InferenceConfig(lora=str(moving), seed=5), "cpu"), PROMPTS, 4)
    torch.testing.assert_close(told["images"].images * 2 - 1, images, rtol=0, atol=1e-5)
    assert f"| 4 | {read_lora_scales(moving / WEIGHT_NAME).scale(4):g} |" in text and len(set(scales)) == 1 + each


def test_the_card_says_what_the_records_say_and_no_more(lora):
    settings = json.loads((lora / "config.json").read_text())
    (lora / "images").mkdir()
    (lora / "images/metadata.jsonl").write_text("{}\n" * 7)
    (lora / "run.json").write_text(json.dumps({"torch": "2.15.0", "device": "a GPU", "commit": "0123456789abcdef", "changed": ["x.py"]}))
    text = write_card(lora).read_text()
    for words in ("(7 of them), 32x32 pixels", "torch 2.15.0; on a GPU", "commit 0123456789ab, with changes", "600 training steps at batch size 32",
                  "ema_fast is the one saved", "in 32 steps at guidance scale 2.5", "guidance_scale=2.5", "is kept"):
        assert words in text, words
    (lora / "config.json").write_text(json.dumps({**settings, "guidance_mode": "distilled", "negative_prompt": "a ring"}))
    text = write_card(lora).read_text()
    assert "guidance_scale=1," in text and "sample at guidance scale 1" in text and "negative_prompt='a ring'" in text
    kept = {k: settings[k] for k in ("pretrained_model_name_or_path", "height", "width", "max_sequence_length", "teacher_guidance_scale")}
    (lora / "config.json").write_text(json.dumps(kept))
    for name in ("run.json", "selection.json", "lora_scales.json"):
        (lora / name).unlink()
    text = write_card(lora).read_text()
    assert "selected" not in text and "updates" not in text and "guidance_scale=2.5" in text and "set_adapters" in text


@pytest.mark.parametrize("command, change, message", [
    ("sample", {"--lora": "nowhere"}, "no LoRA at nowhere"),
    ("sample", {"--prompts": "x.txt"}, "either --prompt"),
    ("sample", {"--steps": "0"}, "--steps is 0"),
    ("sample", {"--pretrained_model_name_or_path": "nowhere"}, "no pipeline in nowhere"),
    ("sample", {"--weight_dtype": "fp8"}, "fp32, bf16"),
    ("sample", {"--inference_shift": "-1"}, "shift"),
    ("sample", {"--negative_prompt": "ugly"}, "a negative prompt means nothing to Flux"),
    ("sample", {"--scale": "1,2"}, "--scale gives 2 strengths for 4 steps"),
    ("dial", {"--lora": "nowhere"}, "no LoRA at nowhere"),
    ("dial", {"--each": "5"}, "--each 5: give step counts that --steps has too"),
    ("dial", {"--prompts": "nowhere.txt"}, "no captions at nowhere.txt"),
    ("dial", {"--count": "0"}, "--count"),
])
def test_bad_input_is_one_line_and_code_2(lora, capsys, command, change, message):
    words = {"--lora": str(lora), **({"--prompt": "a red star"} if command == "sample" else {}), **change}
    assert main([command, *[w for pair in words.items() for w in pair]]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"scfm {command}: ") and message in said


def test_a_lora_of_a_4_bit_run_is_used_on_a_4_bit_base_unless_one_says_otherwise(lora, monkeypatch):
    settings = json.loads((lora / "config.json").read_text())
    (lora / "config.json").write_text(json.dumps({**settings, "quantize": "nf4"}))
    with pytest.raises(ValueError, match="nf4 needs .*"):
        InferenceConfig(lora=str(lora)).check()                   # neither bitsandbytes nor a GPU here
    with pytest.raises(ValueError, match="quantize is 'int3'"):
        InferenceConfig(lora=str(lora), quantize="int3").check()
    asked = []
    monkeypatch.setattr(scfm.inference.step_lora, "require_bitsandbytes", lambda mend: None)
    monkeypatch.setattr(loading, "load_nf4", lambda folder, dtype: asked.append(dtype) or load_flux().transformer)
    step_lora = StepLora(InferenceConfig(lora=str(lora)), "cpu")
    assert asked == [torch.float32] and generate(step_lora, PROMPTS[:1], 1)[0].shape == (1, 3, 32, 32)
    StepLora(InferenceConfig(lora=str(lora), quantize="none"), "cpu")
    assert len(asked) == 1


def test_the_painter_is_quantized_and_the_encoder_alone_is_not(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(prepare, "require_bitsandbytes", lambda: None)
    monkeypatch.setattr(loading, "load_nf4", lambda folder, dtype: asked.append(dtype) or load_flux().transformer)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ["data", "--pretrained_model_name_or_path", FLUX, "--output_dir", tmp_path / "made", "--sizes", "32x32", "--max_sequence_length", TOKENS, "--teacher_steps", 1, "--quantize", "nf4"]
    assert main([str(w) for w in (*words, "--prompts", tmp_path / "prompts.txt")]) == 0
    assert len(asked) == 1
    shutil.rmtree(tmp_path / "made" / "cache")
    assert main([str(w) for w in (*words, "--prompts", tmp_path / "prompts.txt")]) == 0       # the images are there: only encoders are loaded
    assert len(asked) == 1


def test_sample_says_where_the_strength_comes_from():
    dial = LoraScales((2, 4), (1., .5), 3.)
    assert [whence_of(dial, n) for n in (1, 2, 3, 8)] == [
        "its dial's at 2 steps, the nearest that it has", "by its dial", "between its dial's at 2 and 4 steps",
        "its dial's at 4 steps, the nearest that it has"]
    assert whence_of(dial._replace(schedules=((1., 2.),)), 2) == "by its dial, a strength for each step"
    assert "scfm dial finds one" in whence_of(None, 2)
