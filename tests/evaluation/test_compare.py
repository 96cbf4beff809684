"""What `scfm app` computes: the same images as `scfm sample`, timed and counted."""

import math

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from scfm.cli import main
from scfm.evaluation.compare import Choice, Comparer, pixel_distance
from scfm.inference.config import InferenceConfig
from scfm.inference.step_lora import StepLora, fixed_shift
from scfm.method.lora_scale import LoraScales
from scfm.models.flux import Flux
from scfm.models.lora import WEIGHT_NAME
from scfm.models.lora_file import write_lora_scales
from scfm.models.sampling import start_noise
from toy.pipelines import TOKENS, load_flux

PROMPT = "a large red cross"


@pytest.fixture
def comparer(lora):
    write_lora_scales(lora / WEIGHT_NAME, LoraScales((1, 2), (1.0, 0.5), 3.0, ((0.9, 0.7),)))
    return Comparer(StepLora(InferenceConfig(lora=str(lora)), "cpu"), teacher_steps=3)


def pixels(image):
    return pil_to_tensor(to_pil_image(image / 2 + 0.5))


@pytest.mark.parametrize(
    "choice, flags",
    [
        (Choice(PROMPT, 1, None, 3.0, 5), []),
        (Choice(PROMPT, 2, None, 3.0, 5), []),
        (Choice(PROMPT, 3, 0.25, 1.5, 6), ["--lora_scale", ".25"]),
        (Choice(PROMPT, 2, 0.0, 3.0, 5), ["--lora_scale", "0"]),
    ],
    ids=["rule", "schedule", "free", "teacher"],
)
def test_the_students_image_is_that_of_scfm_sample(comparer, lora, tmp_path, choice, flags):
    words = ["--prompt", PROMPT, "--steps", choice.steps, "--seed", choice.seed]
    words += ["--inference_shift", choice.shift, "--output", tmp_path / "a.png", *flags]
    assert main([str(word) for word in ["sample", "--lora", lora, *words]]) == 0
    sampled = comparer.student(choice)
    assert torch.equal(pixels(sampled.image), pil_to_tensor(Image.open(tmp_path / "a.png")))
    assert sampled.evaluations == choice.steps == len(sampled.scales) and sampled.seconds > 0


def test_scale_0_is_the_teacher_which_is_the_stock_pipeline_without_a_lora(comparer):
    choice = Choice(PROMPT, 2, 0.0, 2.0, 7)
    student, teacher, target = comparer.compare(choice)
    assert torch.equal(student.image, teacher.image) and teacher.scales == (0.0, 0.0)
    assert (teacher.evaluations, target.evaluations) == (2, 3)
    pipe = load_flux()
    pipe.scheduler = fixed_shift(2.0)
    flux = Flux(pipe, 32, 32, TOKENS)
    guidance = comparer.step_lora.config.teacher_guidance_scale
    stock = [flux.sample_stock([PROMPT], start_noise(flux, [0], 7), n, guidance)[0] for n in (2, 3)]
    assert torch.allclose(stock[0], teacher.image, atol=1e-4)
    assert torch.allclose(stock[1], target.image, atol=1e-4)
    assert not torch.equal(comparer.student(choice._replace(scale=1.0)).image, teacher.image)


def test_the_teacher_has_its_own_guidance_scale(comparer):
    choice = Choice(PROMPT, 2, 1e-6, 3.0)  # as good as no LoRA
    comparer.step_lora.config.teacher_guidance_scale = 1.0
    student, teacher, _ = comparer.compare(choice)
    assert (student.image - teacher.image).abs().max() > 1e-3
    assert torch.equal(comparer.student(choice._replace(scale=0.0)).image, teacher.image)  # 0 is the teacher
    comparer.step_lora.config.guidance_scale = 1.0
    torch.testing.assert_close(comparer.student(choice).image, teacher.image, rtol=0, atol=1e-4)


def test_the_teachers_images_are_made_once_for_all_lora_scales(comparer):
    config, scheduler = comparer.step_lora.config, comparer.step_lora.pipe.scheduler
    before = vars(config).copy()
    calls = []
    comparer.step_lora.pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    choice = Choice(PROMPT, 2, 0.5, 3.0)
    first = comparer.compare(choice)
    assert len(calls) == 2 + 2 + 3
    second = comparer.compare(choice._replace(scale=0.75))
    assert len(calls) == 7 + 2 and second.target is first.target and second.teacher is first.teacher
    comparer.compare(choice._replace(steps=3))  # as many as the target has
    assert len(calls) == 9 + 3
    for other in (choice._replace(seed=1), choice._replace(shift=2.0), choice._replace(prompt="a ring")):
        assert not torch.equal(comparer.target(other).image, first.target.image)
    assert comparer.step_lora.config is config and vars(config) == before
    assert comparer.step_lora.pipe.scheduler is scheduler


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"steps": 0}, "steps is 0: give 1 to 32"),
        ({"steps": 33}, "steps is 33"),
        ({"scale": math.nan}, "the LoRA scale is nan"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**31}, "whole number"),
    ],
)
def test_what_cannot_be_sampled_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Choice(PROMPT)._replace(**change).check()


def test_the_distance_of_pixels():
    black, white = torch.full((3, 2, 2), -1.0), torch.ones(3, 2, 2)
    assert pixel_distance(black, white) == 1 and pixel_distance(white, white) == 0
    half = black.clone()
    half[:, 0] = 1.0
    assert pixel_distance(black, half) == pytest.approx(math.sqrt(0.5))
