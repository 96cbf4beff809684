"""`scfm export` beside the stock pipeline: the LoRA in the weights, and step and style LoRA in one file."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import scfm.inference.export
from scfm.cli import main
from scfm.inference.adapters import changed_text_encoders
from scfm.inference.export import new_folder
from scfm.inference.merge import concatenate_adapters
from scfm.inference.step_lora import fixed_shift
from scfm.method.lora_scale import LoraScales
from scfm.models.lora import WEIGHT_NAME, save_lora
from scfm.models.lora_file import write_lora_scales
from toy.pipelines import FLUX, TOKENS, build_flux, build_sd3

CAPTIONS = ["a large red cross", "a small blue ring on the left"]


def add_random(pipe, name, rank, alpha, targets, seed):
    """Gives the transformer an adapter; PEFT's random ones would drown the images."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets),
        init_lora_weights=False,
        use_dora=name == "dora",
    )
    pipe.transformer.add_adapter(config, name)
    for module in pipe.transformer.modules():
        if isinstance(module, LoraLayer) and name in module.lora_B:
            module.lora_B[name].weight.data *= 0.3


def run_folder(folder, pipe, pipeline, rank=4, **more):
    """A folder as `scfm distill` leaves it, with a random LoRA."""
    add_random(pipe, "step", rank, rank, ("to_q", "to_v", "proj_out", "linear"), 1)
    path = save_lora(type(pipe), pipe.transformer, folder, "step")
    write_lora_scales(path, LoraScales((2, 8), (0.75, 0.25), 3.0))
    settings = {
        "pretrained_model_name_or_path": str(pipeline),
        "height": 32,
        "width": 32,
        "max_sequence_length": TOKENS,
        "teacher_guidance_scale": 2.5,
        **more,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def style_file(folder, pipe, name="style"):
    """As a stock trainer writes it: alpha stands in the header, and is not in the weights."""
    add_random(pipe, name, 3, 7, ("to_q", "to_out.0", "context_embedder"), 2)
    type(pipe).save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer, adapter_name=name),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config[name].to_dict(),
    )
    return folder / WEIGHT_NAME


@pytest.fixture(scope="module", params=["flux", "sd3"])
def place(request, tmp_path_factory):
    """A run, a style LoRA and their pipeline, of each family; Flux with a scheduler that chooses its own
    shift, as FLUX.1-dev's."""
    folder = tmp_path_factory.mktemp(request.param)
    build = {"flux": build_flux, "sd3": build_sd3}[request.param]
    pipe = build()
    if request.param == "flux":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe.save_pretrained(folder / "base")
    negative_prompt = "" if request.param == "flux" else "a ring"
    run_folder(folder / "run", build(), folder / "base", negative_prompt=negative_prompt)
    style_file(folder / "style", build())
    return folder


def stock(folder, adapters=None, shift=3.0, steps=2):
    """Images (2, 3, 32, 32) in [0, 1] by stock diffusers; adapters: [(file's folder, scale)]."""
    pipe = DiffusionPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    if shift:
        pipe.scheduler = fixed_shift(shift)
    for k, (path, _) in enumerate(adapters or ()):
        pipe.load_lora_weights(str(path), adapter_name=f"a{k}")
    if adapters:
        pipe.set_adapters([f"a{k}" for k in range(len(adapters))], [scale for _, scale in adapters])
    shape = (256 // 4, 16) if "Flux" in type(pipe).__name__ else (4, 16, 16)
    return pipe(
        CAPTIONS,
        height=32,
        width=32,
        num_inference_steps=steps,
        sigmas=[1 - i / steps for i in range(steps)],
        guidance_scale=2.5,
        latents=torch.randn(2, *shape, generator=torch.Generator().manual_seed(4)),
        max_sequence_length=TOKENS,
        output_type="pt",
    ).images


def export(place, out, *more):
    return main([str(word) for word in ("export", "--lora", place / "run", "--output_dir", out, *more)])


@pytest.mark.parametrize(
    "words, scale", [(["--steps", 2], 0.75), (["--steps", 2, "--lora_scale", "1.5"], 1.5)]
)
def test_a_fused_pipeline_is_the_lora_at_its_scale_with_the_shift_of_training(
    place, tmp_path, capsys, words, scale
):
    assert export(place, tmp_path / "fused", *words) == 0
    assert f"LoRA scale {scale:g}" in capsys.readouterr().out
    ours = stock(tmp_path / "fused", shift=None)  # its own scheduler is left alone
    theirs = stock(place / "base", [(place / "run", scale)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    assert (ours - stock(place / "base")).abs().mean() > 1e-3  # and the LoRA does something
    scheduler = json.loads((tmp_path / "fused/scheduler/scheduler_config.json").read_text())
    assert scheduler["shift"] == 3 and not scheduler["use_dynamic_shifting"]
    card = (tmp_path / "fused/README.md").read_text()
    assert f"step LoRA at scale {scale:g}, for 2" in card and "sigmas=[1 - i / 2 for i in range(2)]" in card
    assert ("negative_prompt='a ring'" in card) == (place.name.startswith("sd3"))
    record = json.loads((tmp_path / "fused/export.json").read_text())
    assert record["lora_scale"] == scale and record["style_lora_scale"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["fused"]


@pytest.mark.slow
def test_a_merged_lora_is_both_at_their_scales(place, tmp_path):
    """Ranks 4 and 3, alphas 4 and 7, targets that overlap in part."""
    words = ["--style_lora", place / "style", "--style_lora_scale", 0.6]
    assert export(place, tmp_path / "merged", "--steps", 2, *words) == 0
    both = stock(place / "base", [(place / "run", 0.75), (place / "style", 0.6)])
    merged = stock(place / "base", [(tmp_path / "merged", 1.0)])
    torch.testing.assert_close(merged, both, rtol=0, atol=2e-5)
    for one in ([(place / "run", 0.75)], [(place / "style", 0.6)]):
        assert (stock(place / "base", one) - both).abs().mean() > 3e-4
    assert 'load_lora_weights("merged")' in (tmp_path / "merged/README.md").read_text()

    merged = load_file(tmp_path / "merged" / WEIGHT_NAME)
    assert {v.shape[0] for k, v in merged.items() if "lora_A" in k} == {7}
    step, style = (load_file(place / name / WEIGHT_NAME) for name in ("run", "style"))
    assert merged.keys() == step.keys() | style.keys()
    for key in (k for k in merged if "lora_A" in k):  # the sum of the products, layer by layer
        want = 0.75 * product(step, key) + 0.6 * 7 / 3 * product(style, key)
        torch.testing.assert_close(product(merged, key), want, rtol=0, atol=1e-6)


def product(tensors, key):
    """B A of a layer of a LoRA file, 0 where it has nothing for it."""
    return tensors[key.replace("lora_A", "lora_B")] @ tensors[key] if key in tensors else 0.0


def test_dora_is_no_sum_of_products():
    pipe = build_flux()
    add_random(pipe, "dora", 2, 2, ("to_q",), 0)
    with pytest.raises(ValueError, match="DoRA"):
        concatenate_adapters(pipe.transformer)


def test_nothing_is_written_that_generates_something_else(place, tmp_path, capsys, monkeypatch):
    reload_pipeline = scfm.inference.export.reload_pipeline

    def broken(*args):
        family = reload_pipeline(*args)
        family.pipe.transformer.proj_out.weight.data *= 1.5
        return family

    monkeypatch.setattr(scfm.inference.export, "reload_pipeline", broken)
    assert export(place, tmp_path / "fused", "--steps", 2) == 1
    assert "generates other images" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_bf16_is_checked_with_a_wider_tolerance(place, tmp_path):
    assert export(place, tmp_path / "fused", "--steps", 2, "--weight_dtype", "bf16") == 0
    gap = json.loads((tmp_path / "fused/export.json").read_text())["differences"]
    assert 0 < gap["mean"] < 0.03


def test_what_lies_beside_the_export_stays(place, tmp_path):
    """Whatever it is called; and an empty folder is taken, also through a link."""
    for name in ("fused.new", ".fused.new", "real"):
        (tmp_path / name).mkdir()
    (tmp_path / "fused.new/mine.txt").write_text("mine")
    (tmp_path / ".fused.new/mine.txt").write_text("mine")
    (tmp_path / "fused").symlink_to(tmp_path / "real")
    assert export(place, tmp_path / "fused", "--steps", 2) == 0
    assert (tmp_path / "fused.new/mine.txt").read_text() == "mine"
    assert (tmp_path / ".fused.new/mine.txt").read_text() == "mine"
    assert (tmp_path / "fused").is_symlink() and (tmp_path / "real/model_index.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".fused.new", "fused", "fused.new", "real"]


def test_what_came_meanwhile_stays(tmp_path):
    with pytest.raises(OSError), new_folder(tmp_path / "out") as work:
        (work / "ours.txt").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out/theirs.txt").touch()
    assert [path.name for path in tmp_path.rglob("*.*")] == ["theirs.txt"]


# Mistakes


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--lora": "nowhere"}, "no LoRA at nowhere"),
        ({"--output_dir": ""}, "no place to write"),
        ({"--output_dir": str(FLUX)}, "not empty"),
        ({"--output_dir": str(FLUX / "model_index.json")}, "not empty"),
        (
            {"--output_dir": str(FLUX / "model_index.json/out")},
            "cannot be written to (Not a directory): take",
        ),
        ({"--steps": "0"}, "--steps is 0"),
        ({"--tolerance": "-1"}, "--tolerance is -1"),
        ({"--pretrained_model_name_or_path": "nowhere"}, "no pipeline in nowhere"),
        ({"--style_lora": "nowhere"}, "no LoRA and no pipeline at nowhere"),
        ({"--style_lora": str(FLUX / "vae")}, "holds no LoRA"),
        ({"--style_lora": str(FLUX / "model_index.json")}, "no safetensors file"),
        ({"--inference_shift": "-1"}, "inference_shift is -1"),
        ({"--weight_dtype": "fp8"}, "fp32, bf16"),
    ],
)
def test_bad_input_is_one_line_and_code_2(lora, tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("loaded"))
    words = {"--lora": str(lora), "--output_dir": str(tmp_path / "out"), **change}
    assert main(["export", *[word for pair in words.items() for word in pair]]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("scfm export: ") and message in line and not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_that_names_the_place(lora, tmp_path, capsys, monkeypatch):
    """diffusers writes the pipeline, and the error of safetensors is no OSError."""

    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("diffusers.FluxPipeline.save_pretrained", full)
    assert main(["export", "--lora", str(lora), "--output_dir", str(tmp_path / "out")]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == f"scfm export: {tmp_path / 'out'} could not be written (No space left on device)"
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_a_style_that_fits_nothing_leaves_nothing(lora, tmp_path, capsys):
    layer, path = "transformer.elsewhere", tmp_path / "x.safetensors"
    tensors = {f"{layer}.lora_A.weight": torch.zeros(2, 4), f"{layer}.lora_B.weight": torch.zeros(4, 2)}
    save_file(tensors, path)
    words = ["export", "--lora", lora, "--output_dir", tmp_path / "out", "--style_lora", path]
    assert main([str(word) for word in words]) == 2
    assert "x.safetensors" in capsys.readouterr().err.strip().splitlines()[-1]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["lora", "x.safetensors"]


@pytest.mark.parametrize(
    "layer, part",
    [
        ("text_encoder.encoder.layers.0.self_attn.q_proj.lora_{}.weight", "text_encoder"),
        ("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_{}.weight", "text_encoder_2"),
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_{}.weight", "text_encoder"),
        ("lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_{}.weight", "text_encoder_2"),
    ],
)
def test_a_style_that_changes_a_text_encoder_is_refused_before_anything_is_loaded(
    lora, tmp_path, capsys, monkeypatch, layer, part
):
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("loaded"))
    style = style_file(tmp_path / "style", build_flux())
    assert changed_text_encoders(style) == []
    text = {layer.format("A"): torch.zeros(2, 64), layer.format("B"): torch.zeros(64, 2)}
    save_file({**load_file(style), **text}, tmp_path / "both.safetensors")
    words = ["--output_dir", tmp_path / "out", "--style_lora", tmp_path / "both.safetensors"]
    assert main([str(word) for word in ("export", "--lora", lora, *words)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"also changes {part}, which a merged file would lose" in line
    assert not (tmp_path / "out").exists()
