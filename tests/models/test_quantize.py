"""A base in int8 or NF4: how far off it is, that training leaves it alone, that it is used where it was."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from scfm.cli import main
from scfm.method.consistency import index_cond
from scfm.method.distill import Batch, SCFMConfig, make_emas, make_optimizer, sample_batch, train_step
from scfm.models.blocks import compile_blocks
from scfm.models.flux import Flux
from scfm.models.lora import ADAPTERS, LoraModels, adapter_state, load_adapter_state
from scfm.models.quantize import NF4, Int8Linear, NF4Linear, quantize_linears, require_quantizer
from scfm.models.scaled_lora import ScaledLoraModels
from scfm.training.checkpoint import latest, load_checkpoint
from toy.pipelines import FLUX, TOKENS, load_flux

KINDS = {"int8": Int8Linear, "nf4": NF4Linear}
ROOT = Path(__file__).parents[2]


def models_of(dtype: torch.dtype, kind: str, make=LoraModels) -> tuple:
    """Models with random adapters, and inputs."""
    pipe = load_flux(dtype=dtype)
    family = Flux(pipe, 32, 32, TOKENS)
    cond = {**family.encode_text(["a red star", "a small blue ring"]), "guidance": torch.full((2,), 2.5)}
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, *family.latent_shape, generator=generator)
    if kind:
        quantize_linears(pipe.transformer, kind)
    torch.manual_seed(0)
    models = make(pipe.transformer, family.velocity, family.lora_targets, 8)
    for name in ADAPTERS if make is LoraModels else ("student", "ema"):
        for p in models.parameters(name):
            p.data.add_(0.02 * torch.randn(p.shape, generator=generator))
    return models, (x, torch.tensor([0.9, 0.4]), cond)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def velocity_and_gradient(dtype: torch.dtype, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    models, inputs = models_of(dtype, kind)
    v = models.student(*inputs)
    v.square().mean().backward()
    return v.detach(), torch.cat([p.grad.flatten() for p in models.parameters("student")])


def test_velocity_and_gradient_are_off_by_what_the_page_on_scale_says():
    exact, gradient = velocity_and_gradient(torch.float32, "")
    in_bf16, _ = velocity_and_gradient(torch.bfloat16, "")
    off = {kind: error(velocity_and_gradient(torch.float32, kind)[0], exact) for kind in ("int8", "nf4")}
    assert error(in_bf16, exact) == pytest.approx(0.015, abs=0.002)
    assert off["int8"] == pytest.approx(0.007, abs=0.001)
    assert off["nf4"] == pytest.approx(0.11, abs=0.01)
    for kind, most in (("int8", 0.03), ("nf4", 0.15)):
        assert 0 < error(velocity_and_gradient(torch.float32, kind)[1], gradient) < most
    said = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert "| bf16 | 0.015 |" in said and "| int8 | 0.007 |" in said and "| nf4 | 0.11 |" in said


@pytest.mark.parametrize("kind", KINDS)
def test_a_products_gradient_is_that_of_the_dense_weight_which_is_not_kept(kind):
    torch.manual_seed(0)
    layer = KINDS[kind](torch.nn.Linear(80, 48))
    x, kept = torch.randn(3, 5, 80, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    (gradient,) = torch.autograd.grad(y.sin().sum(), x)
    dense = layer(torch.eye(80)).detach().t() - layer.bias[:, None]  # W by asking for each column
    wanted = torch.autograd.grad(F.linear(x, dense, layer.bias).sin().sum(), x)[0]
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
    assert (
        max(t.numel() * t.element_size() for t in kept if t is not y) <= 80 * 48
    )  # a byte a weight, or less


@pytest.mark.parametrize("kind", KINDS)
def test_the_linear_layers_are_in_fewer_bits_and_nothing_else_is(kind):
    plain, small = load_flux().transformer, quantize_linears(load_flux().transformer, kind)
    for (name, layer), other in zip(small.named_modules(), plain.modules(), strict=True):
        if isinstance(layer, torch.nn.Linear):
            assert type(layer) is KINDS[kind]
            held, exact = layer(torch.eye(layer.in_features)) - layer.bias, other.weight.t()
            if kind == "int8":  # the nearest of 255 levels a row
                step = other.weight.abs().amax(1) / 127
                assert ((held - exact).abs() <= 0.501 * step).all() and not torch.equal(held, exact)
            else:
                assert layer.weight.dtype == torch.uint8 and 0.05 < error(held, exact) < 0.12
        for key, p in layer.named_parameters(recurse=False):
            if not isinstance(layer, torch.nn.Linear) or key == "bias":
                assert p.dtype == torch.float32, name


def test_nf4_is_the_nearest_of_its_values_in_each_block_of_64():
    weight = torch.randn(7, 100, generator=torch.Generator().manual_seed(0))
    layer = torch.nn.Linear(100, 7, bias=False)
    layer.weight.data.copy_(weight)
    held = NF4Linear(layer)(torch.eye(100)).t().flatten()
    for i in range(0, 700, 64):  # by a loop, the last block shorter
        block = weight.flatten()[i : i + 64]
        levels = block.abs().max() * torch.tensor(NF4)
        nearest = levels[(block[:, None] - levels).abs().argmin(1)]
        torch.testing.assert_close(held[i : i + 64], nearest)


def test_nf4_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    for shape in ((96, 128), (7, 9), (100, 60)):
        layer = torch.nn.Linear(*shape[::-1], bias=False)
        ours = NF4Linear(layer)
        packed, state = functional.quantize_4bit(layer.weight.detach(), quant_type="nf4")
        assert torch.equal(ours.weight.flatten()[: packed.numel()], packed.flatten())
        assert torch.equal(ours.absmax, state.absmax)
        theirs = functional.dequantize_4bit(packed, state)
        assert torch.equal(ours.dense(torch.float32, ours.weight, ours.absmax), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_move_every_lora_tensor_and_no_other_and_come_back_from_their_state(kind):
    models, (x, _, cond) = models_of(torch.float32, kind)
    transformer = models.transformer
    config = SCFMConfig(global_batch_size=2, learning_rate=1e-2, ema_decay_fast=0.5, ema_decay_slow=0.9)
    emas, (optimizer, _) = make_emas(models, config), make_optimizer(models, config)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    for step in range(3):
        batch = Batch(x, *sample_batch(config, step, 2, x.shape[1:]), cond)
        train_step(models, emas, optimizer, [batch], config)
    for name, tensor in transformer.state_dict().items():
        assert torch.equal(tensor, before[name]) != ("lora_" in name), name
    other, inputs = models_of(torch.float32, kind)
    for name in ADAPTERS:
        load_adapter_state(other.transformer, name, adapter_state(transformer, name))
    for name in ADAPTERS:
        assert torch.equal(other.field(name)(*inputs), models.field(name)(*inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_one_forward_of_several_scales_is_one_forward_for_each(kind):
    models, (x, t, cond) = models_of(torch.float32, kind, ScaledLoraModels)
    together = models.scaled_velocity("ema", torch.tensor([0.3, 1.0]), x, t, cond)
    apart = [
        models.field("ema", scale)(x[i : i + 1], t[i : i + 1], index_cond(cond, torch.tensor([i])))
        for i, scale in enumerate((0.3, 1.0))
    ]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-5)
    models, (x, t, cond) = models_of(torch.float32, kind)
    mixed = models.mixed("ema_slow", torch.tensor([True, False]), x, t, cond)
    apart = [field(x, t, cond)[i] for i, field in enumerate((models.teacher, models.ema_slow))]
    torch.testing.assert_close(mixed, torch.stack(apart), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_compute_the_same_on_fewer_bits(kind):
    torch._dynamo.reset()
    outcomes = []
    for compiled in (False, True):
        models, inputs = models_of(torch.float32, kind)
        if compiled:
            compile_blocks(models.transformer, backend="aot_eager", fullgraph=True)
        v = models.student(*inputs)
        v.square().mean().backward()
        outcomes.append([v.detach(), *(p.grad for p in models.parameters("student"))])
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


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
        "algorithm": "dual",
        "learning_rate": 1e-2,
        "num_eval_prompts": 2,
        "eval_num_steps": "2",
        "eval_lora_scales": "1",
        "validation_steps": 0,
        "report_to": "none",
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_it_trains_the_lora_resumes_to_the_bit_and_samples_on_it(kind, words, tmp_path, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    words = [*words, "--quantize", kind]
    assert main(["distill", *words, "--output_dir", str(whole), "--max_train_steps", "3"]) == 0
    for steps in ("1", "3"):
        more = ["--output_dir", str(broken), "--max_train_steps", steps]
        assert main(["distill", *words, *more]) == 0
    states = [load_checkpoint(latest(folder))["adapters"] for folder in (whole, broken)]
    for name in ADAPTERS:
        assert all(torch.equal(states[0][name][key], states[1][name][key]) for key in states[0][name])
    assert any(part.abs().max() > 0 for key, part in states[0]["student"].items() if "lora_B" in key)
    assert json.loads((whole / "config.json").read_text())["quantize"] == kind
    images = [tmp_path / "small.png", tmp_path / "whole.png"]
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


def test_what_cannot_be_had_is_said_with_the_mend():
    for kind in ("", *KINDS):
        require_quantizer(kind)
    with pytest.raises(ValueError, match="quantize is 'int3': take int8 or nf4, or --quantize none"):
        require_quantizer("int3", "--quantize none")
