"""`scfm export` beside the stock pipeline: the LoRA in the weights, and step and style LoRA in one file."""
import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

import scfm.inference.export
from scfm.cli import main
from scfm.method.lora_scale import LoraScales
from scfm.models.lora_file import write_lora_scales
from scfm.inference.export import concatenated
from scfm.models.lora import WEIGHT_NAME, save_lora
from scfm.models.sampling import stock_latents
from scfm.inference.step_lora import fixed_shift
from scfm.models.sampling import start_noise
from toy.pipelines import FLUX, TOKENS, WEIGHTS, build_flux, build_sd3

CAPTIONS = ["a large red cross", "a small blue ring on the left"]


def add_random(pipe, name, rank, alpha, targets, seed):
    torch.manual_seed(seed)
    pipe.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=False,
                                            use_dora=name == "dora"), name)
    for module in pipe.transformer.modules():           # PEFT's random LoRAs would drown the images
        if isinstance(module, LoraLayer) and name in module.lora_B:
            module.lora_B[name].weight.data *= .3


def run_folder(folder, pipe, pipeline, rank=4, **told):
    """A folder as `scfm distill` leaves it, with a random LoRA."""
    add_random(pipe, "step", rank, rank, ("to_q", "to_v", "proj_out", "linear"), 1)
    write_lora_scales(save_lora(type(pipe), pipe.transformer, folder, "step"), LoraScales((2, 8), (.75, .25), 3.))
    (folder / "config.json").write_text(json.dumps({"pretrained_model_name_or_path": str(pipeline), "height": 32, "width": 32, "max_sequence_length": TOKENS,
                                                    "teacher_guidance_scale": 2.5, **told}))
    return folder


def style_file(folder, pipe, name="style"):
    add_random(pipe, name, 3, 7, ("to_q", "to_out.0", "context_embedder"), 2)
    return save_lora(type(pipe), pipe.transformer, folder, name)


@pytest.fixture(scope="module", params=["flux", "sd3"])
def place(request, tmp_path_factory):
    """A run, a style LoRA and their pipeline, of each family; Flux with a scheduler that chooses its own shift, as FLUX.1-dev's."""
    folder = tmp_path_factory.mktemp(request.param)
    build = {"flux": build_flux, "sd3": build_sd3}[request.param]
    pipe = build()
    if request.param == "flux":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3., use_dynamic_shifting=True)
    pipe.save_pretrained(folder / "base")
    run_folder(folder / "run", build(), folder / "base", negative_prompt="" if request.param == "flux" else "a ring")
    style_file(folder / "style", build())
    return folder


def stock(folder, adapters=None, shift=3., steps=2, negative_prompt=""):
    """Images (2, 3, 32, 32) in [0, 1] by stock diffusers; adapters: [(file's folder, strength)]."""
    pipe = DiffusionPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    if shift:
        pipe.scheduler = fixed_shift(pipe.scheduler, shift)
    for k, (path, _) in enumerate(adapters or ()):
        pipe.load_lora_weights(str(path), adapter_name=f"a{k}")
    if adapters:
        pipe.set_adapters([f"a{k}" for k in range(len(adapters))], [scale for _, scale in adapters])
    shape = (256 // 4, 16) if "Flux" in type(pipe).__name__ else (4, 16, 16)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(4))
    extra = {"negative_prompt": [negative_prompt] * 2} if negative_prompt else {}
    return pipe(CAPTIONS, height=32, width=32, num_inference_steps=steps, sigmas=[1 - i / steps for i in range(steps)], guidance_scale=2.5,
                latents=noise, max_sequence_length=TOKENS, output_type="pt", **extra).images


def export(place, out, *more):
    return main([str(word) for word in ("export", "--lora", place / "run", "--output_dir", out, *more)])


@pytest.mark.parametrize("words, scale", [(["--steps", 2], .75), (["--steps", 2, "--lora_scale", "1.5"], 1.5)])
def test_a_fused_pipeline_is_the_lora_at_its_strength_with_the_shift_of_training(place, tmp_path, capsys, words, scale):
    assert export(place, tmp_path / "fused", *words) == 0
    assert f"strength {scale:g}" in capsys.readouterr().out
    mine = stock(tmp_path / "fused", shift=None)                # its own scheduler is left alone
    theirs = stock(place / "base", [(place / "run", scale)])
    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-4)
    assert (mine - stock(place / "base")).abs().mean() > 1e-3   # and the LoRA does something
    told = json.loads((tmp_path / "fused/scheduler/scheduler_config.json").read_text())
    assert told["shift"] == 3 and not told["use_dynamic_shifting"]
    card = (tmp_path / "fused/README.md").read_text()
    assert f"strength {scale:g}, for 2 steps" in card and "sigmas=[1 - i / 2 for i in range(2)]" in card
    assert ("negative_prompt='a ring'" in card) == (place.name.startswith("sd3"))
    assert not list(tmp_path.glob("*.new"))


def test_a_merged_lora_is_both_at_their_strengths(place, tmp_path):
    """Ranks 4 and 3, alphas 4 and 7, targets that overlap in part."""
    assert export(place, tmp_path / "merged", "--steps", 2, "--style_lora", place / "style", "--style_lora_scale", .6) == 0
    both = stock(place / "base", [(place / "run", .75), (place / "style", .6)])
    torch.testing.assert_close(stock(place / "base", [(tmp_path / "merged", 1.)]), both, rtol=0, atol=2e-5)
    for one in ([(place / "run", .75)], [(place / "style", .6)]):
        assert (stock(place / "base", one) - both).abs().mean() > 3e-4
    merged = load_file(tmp_path / "merged" / WEIGHT_NAME)
    assert {v.shape[0] for k, v in merged.items() if "lora_A" in k} == {7}
    step, style = (load_file(place / name / WEIGHT_NAME) for name in ("run", "style"))
    assert merged.keys() == step.keys() | style.keys()
    for key in (k for k in merged if "lora_A" in k):            # the sum of the products, layer by layer
        product = lambda file: file[key.replace("lora_A", "lora_B")] @ file[key] if key in file else 0.
        torch.testing.assert_close(product(merged), .75 * product(step) + .6 * 7 / 3 * product(style), rtol=0, atol=1e-6)
    assert "load_lora_weights(\"merged\")" in (tmp_path / "merged/README.md").read_text()


def test_dora_is_no_sum_of_products():
    pipe = build_flux()
    add_random(pipe, "dora", 2, 2, ("to_q",), 0)
    with pytest.raises(ValueError, match="DoRA"):
        concatenated(pipe.transformer)


def test_nothing_is_written_that_generates_something_else(place, tmp_path, capsys, monkeypatch):
    real = scfm.inference.export.reloaded

    def broken(step_lora, folder):
        family = real(step_lora, folder)
        family.pipe.transformer.proj_out.weight.data *= 1.5
        return family
    monkeypatch.setattr(scfm.inference.export, "reloaded", broken)
    assert export(place, tmp_path / "fused", "--steps", 2) == 1
    assert "generates other images" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_bf16_is_checked_with_a_wider_tolerance(place, tmp_path):
    assert export(place, tmp_path / "fused", "--steps", 2, "--weight_dtype", "bf16") == 0
    gap = json.loads((tmp_path / "fused/export.json").read_text())["differences"]
    assert 0 < gap["mean"] < .03


# Mistakes


@pytest.fixture
def lora(tmp_path):
    folder = tmp_path / "lora"
    shutil.copytree(WEIGHTS / "lora", folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "pretrained_model_name_or_path": str(FLUX)}))
    return folder


@pytest.mark.parametrize("change, message", [
    ({"--lora": "nowhere"}, "no LoRA at nowhere"),
    ({"--output_dir": ""}, "no place to write"),
    ({"--output_dir": str(FLUX)}, "not empty"),
    ({"--output_dir": str(FLUX / "model_index.json")}, "not empty"),
    ({"--steps": "0"}, "--steps is 0"),
    ({"--pretrained_model_name_or_path": "nowhere"}, "no pipeline in nowhere"),
    ({"--style_lora": "nowhere"}, "no LoRA and no pipeline at nowhere"),
    ({"--style_lora": str(FLUX / "vae")}, "holds no LoRA"),
    ({"--style_lora": str(FLUX / "model_index.json")}, "no safetensors file"),
    ({"--inference_shift": "-1"}, "inference_shift is -1"),
    ({"--weight_dtype": "fp8"}, "fp32, bf16"),
])
def test_bad_input_is_one_line_and_code_2(lora, tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("weights were loaded"))
    words = {"--lora": str(lora), "--output_dir": str(tmp_path / "out"), **change}
    assert main(["export", *[w for pair in words.items() for w in pair]]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("scfm export: ") and message in said and not (tmp_path / "out").exists()


def test_a_style_that_fits_nothing_leaves_nothing(lora, tmp_path, capsys):
    save_file({"transformer.elsewhere.lora_A.weight": torch.zeros(2, 4), "transformer.elsewhere.lora_B.weight": torch.zeros(4, 2)},
              tmp_path / "x.safetensors")
    assert main(["export", "--lora", str(lora), "--output_dir", str(tmp_path / "out"), "--style_lora", str(tmp_path / "x.safetensors")]) == 2
    assert "x.safetensors" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.new"))


def test_a_style_that_speaks_to_a_text_encoder_is_refused(place, tmp_path, capsys):
    if place.name.startswith("sd3"):
        pytest.skip("one family is enough")
    pipe = build_flux()
    torch.manual_seed(0)
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "style")
    add_random(pipe, "style", 2, 2, ("to_q",), 0)
    text = {k.replace(".style.", "."): v for k, v in pipe.text_encoder.named_parameters() if "lora" in k}
    save_file({**load_file(style_file_of(pipe, tmp_path)), **{f"text_encoder.{k}": v.detach().contiguous() for k, v in text.items()}},
              tmp_path / "both.safetensors")
    assert export(place, tmp_path / "out", "--style_lora", tmp_path / "both.safetensors") == 2
    assert "also changes text_encoder" in capsys.readouterr().err.strip().splitlines()[-1]


def style_file_of(pipe, folder):
    return save_lora(type(pipe), pipe.transformer, folder / "plain", "style")
