"""`StepLora` on a copy of the LoRA that the repository carries, beside the stock pipeline."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

import scfm.inference.step_lora
from scfm.cli import main
from scfm.inference.config import InferenceConfig, load_captions
from scfm.inference.step_lora import StepLora, generate
from scfm.method.lora_scale import LoraScales
from scfm.models import loading, source
from scfm.models.flux import Flux
from scfm.models.lora import WEIGHT_NAME
from scfm.models.lora_file import write_lora_scales
from scfm.models.quantize import NF4Linear
from scfm.models.sampling import start_noise
from toy.pipelines import FLUX, TOKENS, build_flux, load_flux

PROMPTS = ["a large red cross", "a small blue ring on the left"]


def stock_call(pipe, steps, **more):
    """Images (2, 3, 32, 32) in [-1, 1] of a stock pipeline, given plain sigmas, from the noise of seed 5."""
    images = pipe(
        PROMPTS,
        height=32,
        width=32,
        num_inference_steps=steps,
        sigmas=[1 - i / steps for i in range(steps)],
        guidance_scale=2.5,
        latents=start_noise(Flux(pipe, 32, 32, TOKENS), range(2), 5),
        max_sequence_length=TOKENS,
        output_type="pt",
        **more,
    ).images
    return images * 2 - 1


def stock_image(lora, scale, steps):
    """By diffusers alone: load, set the scale, pass the sigmas."""
    pipe = load_flux()
    pipe.load_lora_weights(str(lora), adapter_name="a")
    pipe.set_adapters(["a"], [scale])
    return stock_call(pipe, steps)


def step_lora_of(lora, **settings):
    return StepLora(InferenceConfig(lora=str(lora), seed=5, **settings), "cpu")


def test_images_are_those_of_the_stock_pipeline_at_the_scale_of_the_file(lora):
    write_lora_scales(lora / WEIGHT_NAME, LoraScales((1, 4), (1.0, 0.5), 3.0))
    step_lora = step_lora_of(lora)
    images, scales = generate(step_lora, PROMPTS, 2)
    assert scales == (0.75, 0.75)  # half way from 1 to 4 in octaves
    assert torch.equal(images, stock_image(lora, 0.75, 2))
    assert not torch.equal(images, generate(step_lora, PROMPTS, 2, scale=1)[0])


def test_scale_zero_is_the_teacher(lora):
    family = Flux(load_flux(), 32, 32, TOKENS)
    plain = family.sample_stock(PROMPTS, start_noise(family, range(2), 5), 3, 2.5, 3.0)
    images, _ = generate(step_lora_of(lora), PROMPTS, 3, scale=0)
    torch.testing.assert_close(images, plain, rtol=0, atol=1e-5)


def by_callback(lora, scales):
    """A LoRA scale for each step by diffusers alone, from the callback that it offers."""
    pipe = load_flux()
    pipe.load_lora_weights(str(lora), adapter_name="a")
    pipe.set_adapters(["a"], [scales[0]])

    def set_scale(pipe, step, timestep, tensors):
        pipe.set_adapters(["a"], [scales[(step + 1) % len(scales)]])
        return tensors

    return stock_call(pipe, len(scales), callback_on_step_end=set_scale)


@pytest.mark.slow
def test_a_scale_for_each_step_is_that_of_the_callback(lora):
    scales = (0.25, 1.0, 0.5)
    write_lora_scales(lora / WEIGHT_NAME, LoraScales((1, 4), (1.0, 0.5), 3.0, (scales, (0.1, 0.2))))
    step_lora = step_lora_of(lora)
    images, used = generate(step_lora, PROMPTS, 3)
    assert used == scales and torch.equal(images, by_callback(lora, scales))
    same, _ = generate(step_lora, PROMPTS, 3, (0.75, 0.75, 0.75))
    assert torch.equal(same, stock_image(lora, 0.75, 3))
    assert not torch.equal(images, by_callback(lora, scales[::-1]))
    assert generate(step_lora, PROMPTS, 1)[1] == (1.0,)  # no schedule of this length: the one scale
    noise = start_noise(step_lora.family, range(2), 5)  # and our own path leads where the pipeline's does
    endpoints = step_lora.endpoints(PROMPTS, noise, 3, scales)
    torch.testing.assert_close(step_lora.family.decode(endpoints), images, rtol=0, atol=2e-4)


def test_the_scheduler_is_itself_again_even_after_an_error(lora):
    scheduler = (step_lora := step_lora_of(lora)).pipe.scheduler
    step = type(scheduler).step
    with pytest.raises(KeyError), step_lora.scale_schedule((0.5, 1.0)):
        assert "step" in vars(scheduler)
        raise KeyError
    assert scheduler.step.__func__ is step and "step" not in vars(scheduler)


@pytest.mark.parametrize("scales", [(), (1.0,), (1.0, 1.0, 1.0)])
def test_another_number_of_scales_is_refused(lora, scales):
    with pytest.raises(ValueError, match=f"{len(scales)} LoRA scales for 2 steps"):
        generate(step_lora_of(lora), PROMPTS, 2, scales)


def test_the_shift_of_training_holds_where_the_scheduler_would_choose_its_own(lora, tmp_path):
    """As FLUX.1-dev's does, by the size; set_shift is lost on it."""
    pipe = load_flux()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe.save_pretrained(tmp_path / "base")
    step_lora = step_lora_of(lora, pretrained_model_name_or_path=str(tmp_path / "base"))
    images, _ = generate(step_lora, PROMPTS, 2, scale=0.75)
    torch.testing.assert_close(images, stock_image(lora, 0.75, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"height": 30}, "multiples of 4"),
        ({"negative_prompt": "ugly"}, "a negative prompt means nothing to Flux"),
        ({"pretrained_model_name_or_path": "nowhere"}, "no pipeline in nowhere"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(lora, monkeypatch, settings, message):
    monkeypatch.setattr("scfm.inference.step_lora.load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        step_lora_of(lora, **settings)


def test_the_name_of_a_pipeline_is_looked_up_once(lora, monkeypatch):
    names, resolve = [], source.resolve_folder
    monkeypatch.setattr(source, "resolve_folder", lambda name, *a: names.append(name) or resolve(name, *a))
    step_lora = step_lora_of(lora)
    assert names == [str(FLUX)] and step_lora.source.folder == FLUX
    StepLora(step_lora.config, "cpu", step_lora.source)
    assert len(names) == 1


# The settings


def edit_settings(lora, **settings):
    old = json.loads((lora / "config.json").read_text())
    (lora / "config.json").write_text(json.dumps({**old, **settings}))


def test_what_is_left_open_is_read_from_the_run_and_the_rest_stays(lora):
    edit_settings(lora, weight_dtype="bf16", negative_prompt="a ring")
    config = InferenceConfig(lora=str(lora), width=48, guidance_scale=1.5)
    new = config.resolved()
    assert config == InferenceConfig(lora=str(lora), width=48, guidance_scale=1.5)
    assert (new.height, new.width, new.max_sequence_length) == (32, 48, TOKENS)
    assert (new.inference_shift, new.weight_dtype, new.negative_prompt) == (3.0, "bf16", "a ring")
    assert (new.guidance_scale, new.teacher_guidance_scale) == (1.5, 1.5)
    assert new.pretrained_model_name_or_path == str(FLUX) and new.resolved() == new
    (lora / "config.json").unlink()
    assert InferenceConfig(lora=str(lora)).resolved().height == 512  # as a run has it where nothing is said


def test_a_student_that_learned_to_do_without_guidance_is_compared_with_a_guided_teacher(lora):
    edit_settings(lora, guidance_mode="distilled")
    new = InferenceConfig(lora=str(lora)).resolved()
    assert (new.guidance_scale, new.teacher_guidance_scale) == (1.0, 2.5)
    new = InferenceConfig(lora=str(lora), guidance_scale=2.0, teacher_guidance_scale=3.0).resolved()
    assert (new.guidance_scale, new.teacher_guidance_scale) == (2.0, 3.0)


def test_a_lora_of_a_4_bit_run_is_used_on_a_4_bit_base_unless_one_says_otherwise(lora):
    edit_settings(lora, quantize="nf4")
    with pytest.raises(ValueError, match="quantize is 'int3'"):
        InferenceConfig(lora=str(lora), quantize="int3").check()
    plain = InferenceConfig(lora=str(lora), quantize="none").resolved()
    for _ in range(2):  # the second time it has been resolved
        plain.check()
        assert plain.quantize == "" and plain.resolved().quantize == ""
    images = []
    for config, count in ((InferenceConfig(lora=str(lora)), True), (plain, False)):
        step_lora = StepLora(config, "cpu")
        layers = [m for m in step_lora.pipe.transformer.modules() if isinstance(m, NF4Linear)]
        assert bool(layers) == count
        images.append(generate(step_lora, PROMPTS[:1], 1)[0])
    assert images[0].shape == images[1].shape == (1, 3, 32, 32) and not torch.equal(*images)


@pytest.mark.slow
def test_generating_is_quantized_and_encoding_alone_is_not(tmp_path, monkeypatch):
    dtypes = []
    monkeypatch.setattr(
        loading,
        "load_small",
        lambda source, kind, dtype, *_: dtypes.append(dtype) or load_flux().transformer,
    )
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ["data", "--pretrained_model_name_or_path", FLUX, "--output_dir", tmp_path / "made"]
    words += ["--sizes", "32x32", "--max_sequence_length", TOKENS, "--teacher_steps", 1]
    words += ["--quantize", "nf4", "--prompts", tmp_path / "prompts.txt"]
    assert main([str(word) for word in words]) == 0
    assert len(dtypes) == 1
    shutil.rmtree(tmp_path / "made" / "cache")
    assert main([str(word) for word in words]) == 0  # the images are there: only encoders are loaded
    assert len(dtypes) == 1


def test_captions_go_round_and_come_from_the_run_where_no_file_is_given(lora, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    assert load_captions(str(tmp_path / "prompts.txt"), str(lora), 3) == [*PROMPTS, PROMPTS[0]]
    edit_settings(lora, prompts=str(tmp_path / "prompts.txt"))
    assert load_captions("", str(lora), 1) == PROMPTS[:1]
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").touch()
    (images / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a star"}))
    edit_settings(lora, prompts="", train_data_dir=str(images))
    assert load_captions("", str(lora), 2) == ["a star"] * 2
    edit_settings(lora, prompts="", train_data_dir="")
    with pytest.raises(ValueError, match="does not name its captions: say --prompts FILE"):
        load_captions("", str(lora), 2)


def test_a_damaged_file_is_named(lora):
    (lora / WEIGHT_NAME).write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is no safetensors file"):
        InferenceConfig(lora=str(lora)).check()


@pytest.mark.parametrize(
    "odd",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"shift_terminal": 0.1},
        {"stochastic_sampling": True},
        {"invert_sigmas": True},
        {"use_dynamic_shifting": True},
        {"shift": 7.0},
    ],
)
def test_the_grid_is_the_plain_one_whatever_the_pipeline_came_with(lora, tmp_path, odd):
    """The images of the stock pipeline are those of the endpoints that the scales were chosen by."""
    folder = shutil.copytree(FLUX, tmp_path / "flux")
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **odd}))
    step_lora = StepLora(InferenceConfig(lora=str(lora), pretrained_model_name_or_path=str(folder)), "cpu")
    noise = start_noise(step_lora.family, range(2), 0)
    ours = step_lora.family.decode(step_lora.endpoints(PROMPTS, noise, 3, 0.75))
    with step_lora.scale_schedule((0.75,) * 3):
        stock = step_lora.family.sample_stock(PROMPTS, noise, 3, step_lora.config.guidance_scale)
    torch.testing.assert_close(ours, stock, rtol=0, atol=2e-5)


def test_an_image_is_the_same_whatever_its_company(lora):
    step_lora = StepLora(InferenceConfig(lora=str(lora), pretrained_model_name_or_path=str(FLUX)), "cpu")
    prompts = [PROMPTS[i % 2] for i in range(5)]
    together, alone = (generate(step_lora, prompts, 2, batch_size=n)[0] for n in (8, 2))
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)


def test_a_lora_of_another_pipeline_is_refused_before_weights_are_read(lora, tmp_path, monkeypatch):
    """By the shapes in the file's header, for a whole pipeline of other widths."""
    pipe = build_flux()
    pipe.transformer = FluxTransformer2DModel.from_config(
        {**pipe.transformer.config, "joint_attention_dim": 96}
    )
    pipe.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(scfm.inference.step_lora, "load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    config = InferenceConfig(lora=str(lora), pretrained_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="is for another pipeline than .*other: its .* has 64 inputs, there"):
        StepLora(config, "cpu")


def test_the_pipeline_of_a_run_is_found_from_its_lora_upwards(lora, tmp_path, monkeypatch):
    """A run from another working folder: its config.json names the pipeline relative to that one."""
    monkeypatch.chdir(tmp_path)
    build_flux().save_pretrained(tmp_path / "project" / "pipeline")
    run = tmp_path / "project" / "runs" / "mine"
    shutil.copytree(lora, run)
    edit_settings(run, pretrained_model_name_or_path="pipeline")
    found = InferenceConfig(lora=str(run)).resolved().pretrained_model_name_or_path
    assert Path(found) == tmp_path / "project" / "pipeline"
    for name in ("black-forest-labs/FLUX.1-dev", str(tmp_path / "nowhere")):  # a name on the hub; an own word
        edit_settings(run, pretrained_model_name_or_path=name)
        assert InferenceConfig(lora=str(run)).resolved().pretrained_model_name_or_path == name
