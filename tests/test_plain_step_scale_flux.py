"""examples/plain_step_scale_flux.py computes what the library does; diffusers samples with its two files."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from scfm.method.consistency import Jumps
from scfm.method.distill import Batch, SCFMConfig, make_emas, make_optimizer, train_step
from scfm.models.flux import Flux
from scfm.models.scaled_lora import ScaledLoraModels
from toy.pipelines import FLUX, TOKENS, load_flux

SCRIPT = Path(__file__).parents[1] / "examples" / "plain_step_scale_flux.py"
B = 16


@pytest.fixture(scope="module")
def example():
    """The file as a module; what it imports lies beside it."""
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("plain_step_scale_flux", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))
    del sys.modules["plain_scfm_flux"]


def batch(example, dtype, step):
    torch.manual_seed(step)
    data, noise = torch.randn(2, B, 64, 16)
    times, steps = example.sample_jumps(B, dtype)
    cond = torch.randn(B, TOKENS, 64), torch.randn(B, 64), torch.empty(B).uniform_(1, 4)
    return data, noise, times, steps, tuple(c.to(dtype) for c in cond)


def both(example, dtype, checkpointing):
    """The file's models and the library's, of equal weights."""
    flux = Flux(load_flux(dtype=dtype), 32, 32, TOKENS)
    library = ScaledLoraModels(flux.pipe.transformer, flux.velocity, Flux.lora_targets, rank=4)
    transformer = load_flux(dtype=dtype).transformer
    ids = FluxPipeline._prepare_latent_image_ids(1, 8, 8, "cpu", dtype)
    ours = example.LoraModels(transformer, 4, ids)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    torch.manual_seed(0)
    for name in example.ADAPTERS:
        for p, q in zip(ours.parameters(name), library.parameters(name), strict=True):
            assert p.dtype == q.dtype == torch.float32 and p.shape == q.shape
            p.data += 0.05 * torch.randn_like(p)
            q.data.copy_(p.data)
    return ours, library


@pytest.mark.parametrize(
    "dtype, checkpointing", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
def test_three_steps_are_the_librarys(example, dtype, checkpointing):
    ours, library = both(example, dtype, checkpointing)
    config = SCFMConfig(algorithm="step_scaled", global_batch_size=B, learning_rate=1e-3, ema_decay=0.9)
    start = {name: [p.detach().clone() for p in ours.parameters(name)] for name in example.ADAPTERS}
    (optimizer, _), emas = make_optimizer(library, config), make_emas(library, config)
    for p, value in zip(library.parameters("ema"), start["ema"], strict=True):  # make_emas restarts them
        p.data.copy_(value)
    rate = 1e-3 / config.step_scale.mean()
    other = torch.optim.AdamW(ours.parameters("student"), lr=rate, weight_decay=config.adam_weight_decay)
    for step in range(3):
        data, noise, times, steps, cond = batch(example, dtype, step)
        words = dict(zip(("tokens", "pooled", "guidance"), cond, strict=True))
        jumps = Jumps(times, steps > 16, steps)
        result = train_step(library, emas, optimizer, [Batch(data, noise, jumps, words)], config)
        loss = example.train_step(ours, other, data, noise, times, steps, cond, (0.9, 0.97))
        exact = dtype == torch.float32  # in bfloat16 the library's adapters multiply in the base's dtype
        assert loss == pytest.approx(result.losses.mean().item(), rel=1e-6 if exact else 0.03)
        for name in example.ADAPTERS:
            moved = [
                torch.cat(
                    [(p.detach() - q).flatten() for p, q in zip(m.parameters(name), start[name], strict=True)]
                )
                for m in (library, ours)
            ]
            assert (moved[0] - moved[1]).norm() < (1e-3 if exact else 0.3) * moved[1].norm()
    for name in example.ADAPTERS:  # and something has happened
        assert not any(map(torch.equal, start[name], ours.parameters(name)))


def test_the_times_are_those_of_the_grids(example):
    times, steps = example.sample_jumps(4000, torch.float32)
    assert {int(n) for n in steps} == {2 * n for n in example.STEP_COUNTS}
    shares = torch.stack([(steps == 2 * n).float().mean() for n in example.STEP_COUNTS])
    assert (shares - 1 / 8).abs().max() < 0.03
    plain_times = times / (3 - 2 * times)  # a shift of 3 undone; training strays from it by a tenth
    middle = plain_times[steps == 2, 1]
    assert ((middle - 0.5).abs() < 0.03).all() and (times[:, 0] > times[:, 1]).all()


@pytest.mark.slow
def test_a_folder_of_images_becomes_two_files_that_stock_diffusers_samples_with(example, tmp_path, capsys):
    from PIL import Image

    for name in ("red", "blue"):
        Image.new("RGB", (32, 32), name).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"a {name} square")
    out = tmp_path / "out"
    words = {"pretrained_model_name_or_path": FLUX, "train_data_dir": tmp_path, "output_dir": out}
    words |= {"resolution": 32, "max_sequence_length": TOKENS, "rank": 2, "train_batch_size": 4}
    words |= {"max_train_steps": 2, "weight_dtype": "fp32", "learning_rate": 0.05, "ema_decay_fast": 0.5}
    argv = [str(word) for name, value in words.items() for word in (f"--{name}", value)]
    example.plain.main([*argv, "--guidance_scale_range", "1", "4"], example)
    pipe = load_flux()

    def sample(steps):
        return pipe(
            "a red square",
            height=32,
            width=32,
            num_inference_steps=steps,
            max_sequence_length=TOKENS,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images

    exec(capsys.readouterr().out, {"pipe": pipe})
    four = sample(4)
    pipe.set_adapters(["step", "step_2"], [0.0, 0.0])
    assert (four - sample(4)).abs().max() > 0.01
