"""A base in int8: how far off it is, that training leaves it alone, and that it is used where it was."""

import json

import pytest
import torch

from scfm.cli import main
from scfm.models import quantize
from scfm.models.flux import Flux
from scfm.models.lora import ADAPTERS, LoraModels
from scfm.models.quantize import require_quantizer, to_int8
from scfm.training.checkpoint import latest, load_checkpoint
from toy.pipelines import FLUX, TOKENS, load_flux


def models_of(dtype: torch.dtype, int8: bool) -> tuple[LoraModels, tuple]:
    """Models with random adapters, and inputs."""
    pipe = load_flux(dtype=dtype)
    family = Flux(pipe, 32, 32, TOKENS)
    cond = {**family.encode_text(["a red star", "a small blue ring"]), "guidance": torch.full((2,), 2.5)}
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, *family.latent_shape, generator=generator)
    if int8:
        to_int8(pipe.transformer)
    torch.manual_seed(0)
    models = LoraModels(pipe.transformer, family.velocity, family.lora_targets, 8)
    for name in ADAPTERS:
        for p in models.parameters(name):
            p.data.add_(0.02 * torch.randn(p.shape, generator=generator))
    return models, (x, torch.tensor([0.9, 0.4]), cond)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def velocity_and_gradient(dtype: torch.dtype, int8: bool) -> tuple[torch.Tensor, torch.Tensor]:
    models, inputs = models_of(dtype, int8)
    v = models.student(*inputs)
    v.square().mean().backward()
    return v.detach(), torch.cat([p.grad.flatten() for p in models.parameters("student")])


def test_velocity_and_gradient_on_an_int8_base_are_as_near_as_on_one_in_bf16():
    exact, gradient = velocity_and_gradient(torch.float32, False)
    v, g = velocity_and_gradient(torch.float32, True)
    in_bf16, _ = velocity_and_gradient(torch.bfloat16, False)
    assert 0 < error(v, exact) < 0.02 and error(v, exact) < 2 * error(in_bf16, exact)
    assert error(g, gradient) < 0.03


def test_the_linear_layers_are_in_int8_and_nothing_else_is():
    plain, small = load_flux().transformer, to_int8(load_flux().transformer)
    for (name, layer), other in zip(small.named_modules(), plain.modules(), strict=True):
        if isinstance(layer, torch.nn.Linear):
            held = layer.weight.float() * layer.scale[:, None]
            step = other.weight.abs().amax(1, keepdim=True) / 127  # the nearest of 255 levels a row
            assert layer.weight.dtype == torch.int8 and not torch.equal(held, other.weight)
            assert ((held - other.weight).abs() <= 0.501 * step).all()
        for key, p in layer.named_parameters(recurse=False):
            if not isinstance(layer, torch.nn.Linear) or key == "bias":
                assert p.dtype == torch.float32, name


@pytest.fixture
def words(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red star\na small blue ring\na green cross\n")
    settings = {
        "pretrained_model_name_or_path": FLUX,
        "prompts": tmp_path / "prompts.txt",
        "height": 32,
        "width": 32,
        "max_sequence_length": TOKENS,
        "teacher_steps": 1,
        "global_batch_size": 2,
        "rank": 2,
        "learning_rate": 1e-2,
        "num_eval_prompts": 2,
        "eval_num_steps": "2",
        "eval_lora_scales": "1",
        "validation_steps": 0,
        "quantize": "int8",
        "report_to": "none",
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


@pytest.mark.slow
def test_a_run_on_an_int8_base_trains_the_lora_resumes_to_the_bit_and_samples_on_it(words, tmp_path, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(["distill", *words, "--output_dir", str(whole), "--max_train_steps", "3"]) == 0
    for steps in ("1", "3"):
        more = ["--output_dir", str(broken), "--max_train_steps", steps]
        assert main(["distill", *words, *more]) == 0
    states = [load_checkpoint(latest(folder))["adapters"] for folder in (whole, broken)]
    for name in ADAPTERS:
        assert all(torch.equal(states[0][name][key], states[1][name][key]) for key in states[0][name])
    assert any(part.abs().max() > 0 for key, part in states[0]["student"].items() if "lora_B" in key)
    assert json.loads((whole / "config.json").read_text())["quantize"] == "int8"
    images = [tmp_path / "int8.png", tmp_path / "whole.png"]
    for image, more in zip(images, ([], ["--quantize", "none"]), strict=True):
        shot = [
            "sample",
            "--lora",
            str(whole),
            "--prompt",
            "a red star",
            "--steps",
            "2",
            "--output",
            str(image),
        ]
        assert main(shot + more) == 0
    capsys.readouterr()
    fused = ["export", "--lora", str(whole), "--steps", "2", "--output_dir", str(tmp_path / "fused")]
    assert main(fused) == 2 and "say --quantize none" in capsys.readouterr().err
    assert not (tmp_path / "fused").exists() and main([*fused, "--quantize", "none"]) == 0
    assert images[0].read_bytes() != images[1].read_bytes()  # it was sampled on the base that it was made on


def test_what_cannot_be_had_is_said_with_the_mend(monkeypatch):
    require_quantizer("")
    with pytest.raises(ValueError, match="quantize is 'int3': take int8 or nf4"):
        require_quantizer("int3")
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    require_quantizer("int8")
    with pytest.raises(ValueError, match=r"nf4 needs bitsandbytes: pip install 'scfm\[nf4\]'"):
        require_quantizer("nf4")
    monkeypatch.setattr(quantize, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a CUDA GPU.*--quantize none, or --quantize int8"):
        require_quantizer("nf4", "--quantize none")
