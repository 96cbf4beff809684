"""`scfm export --format comfyui` against the converters by which diffusers reads the checkpoints that ComfyUI
loads: every layer of the published models, and the weights of the tiny ones.
"""

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders import single_file_utils as converters
from safetensors.torch import load_file, save_file

from scfm.cli import main
from scfm.inference.comfyui import comfyui_tensors, find_places, read_layers
from scfm.method.lora_scale import LoraScales
from scfm.models.family import FAMILIES, find_family
from scfm.models.lora import save_lora
from scfm.models.lora_file import write_lora_scales
from toy.pipelines import BUILD, build_flux
from toy.pipelines import FLUX as TINY

CONVERTERS = {
    "FluxPipeline": converters.convert_flux_transformer_checkpoint_to_diffusers,
    "Flux2Pipeline": converters.convert_flux2_transformer_checkpoint_to_diffusers,
    "StableDiffusion3Pipeline": converters.convert_sd3_transformer_checkpoint_to_diffusers,
    "WanPipeline": converters.convert_wan_transformer_to_diffusers,
    "ZImagePipeline": converters.convert_z_image_transformer_checkpoint_to_diffusers,
    "QwenImagePipeline": dict,
}


class Checkpoint(dict):
    """The authors' checkpoint, of which a converter may ask what no LoRA changes."""

    def pop(self, key, *default):
        return super().pop(key, *default) if key in self or default else torch.zeros(2)


def published_transformer(name):
    """The largest published transformer of a family, without weights; of SD3 one with a second attention."""
    if name == "FluxPipeline":
        model_class, settings = FluxTransformer2DModel, {"guidance_embeds": True}
    elif name == "StableDiffusion3Pipeline":
        model_class, settings = SD3Transformer2DModel, {"dual_attention_layers": (0, 1), "num_layers": 4}
    else:
        model_class, settings, *_ = list(find_family(name).published.values())[-1]
    with torch.device("meta"):
        return model_class(**settings)


def numbered(places, columns=1):
    """{name.weight: (rows, columns)}: every row of the authors' checkpoint with a number of its own."""
    totals = {place.layer: place.total for place in places.values()}
    tensors, first = Checkpoint(), 0
    for layer, total in totals.items():
        tensors[f"{layer}.weight"] = torch.arange(first, first + total)[:, None].repeat(1, columns)
        tensors[f"{layer}.bias"] = torch.arange(first, first + total)
        first += total
    return tensors


@pytest.mark.parametrize("name", CONVERTERS)
def test_every_layer_of_the_published_model_is_where_the_converter_finds_it(name):
    transformer = published_transformer(name)
    places = find_places(transformer, find_family(name).comfyui_names)
    linears = {n: m for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    assert places.keys() == linears.keys()
    numbers = numbered(places, 1536 if name == "StableDiffusion3Pipeline" else 1)  # it asks for a width
    rows = {key: value.clone() for key, value in numbers.items()}
    converted = CONVERTERS[name](numbers)
    for layer, place in places.items():
        mine = rows[f"{place.layer}.weight"][place.start : place.start + place.rows]
        mine = torch.cat(mine.chunk(2)[::-1]) if place.swapped else mine
        assert torch.equal(converted[f"{layer}.weight"], mine), layer


def test_families_without_names_there_are_refused_by_name(tmp_path, tiny_run):
    assert {name for name in FAMILIES if find_family(name).comfyui_names is None} >= {"SanaPipeline"}
    build, folder = BUILD["SanaPipeline"], tmp_path / "sana"
    build().save_pretrained(folder)
    words = ["--pretrained_model_name_or_path", str(folder), "--output_dir", str(tmp_path / "out")]
    assert export(tiny_run, *words) == 2 and not (tmp_path / "out").exists()


def export(run, *words):
    return main(["export", "--lora", str(run), "--format", "comfyui", *words])


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A pair of random LoRAs as scfm distill leaves them: alpha 7 at rank 3, attention without to_k."""
    from peft import LoraConfig

    folder = tmp_path_factory.mktemp("run")
    pipe = build_flux()
    for seed, (name, file) in enumerate({"ema": "", "ema_2": "pytorch_lora_weights_2.safetensors"}.items()):
        torch.manual_seed(seed)
        targets = ["to_q", "to_v", "proj_mlp", "proj_out", "norm_out.linear", "net.2"]
        pipe.transformer.add_adapter(
            LoraConfig(r=3, lora_alpha=7, target_modules=targets, init_lora_weights=False), name
        )
        path = save_lora(type(pipe), pipe.transformer, folder, name, *[file] * bool(file))
        if not file:
            write_lora_scales(path, LoraScales((1, 4), (1.0, 0.3), 3.0, (), 0.85, 2))
    settings = {
        "pretrained_model_name_or_path": str(TINY),
        "height": 32,
        "width": 32,
        "algorithm": "step_scaled",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def apply_as_comfyui(weights, lora, strength):
    """ComfyUI's rule for keys of this kind: `NAME.weight` + strength B A, with no alpha in the file."""
    for key in [key for key in lora if key.endswith(".lora_A.weight")]:
        name = key.removeprefix("diffusion_model.").removesuffix(".lora_A.weight")
        change = lora[key.replace("lora_A", "lora_B")] @ lora[key]
        assert weights[f"{name}.weight"].shape == change.shape, name
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + strength * change


def test_the_files_change_the_weights_as_the_loras_do(tiny_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert export(tiny_run, "--output_dir", str(out)) == 0
    record = json.loads((out / "export.json").read_text())
    assert record["strengths"]["4"] == {"step.safetensors": 0.3078, "step_2.safetensors": 0.0947}
    card = (out / "README.md").read_text()
    assert "| 4 | 0.3078 | 0.0947 |" in card and "was not run in ComfyUI" in card
    transformer = build_flux().transformer
    places = find_places(transformer, find_family("FluxPipeline").comfyui_names)
    theirs = {
        f"{p.layer}.weight": torch.zeros(p.total, linear(transformer, n).in_features)
        for n, p in places.items()
    }
    wanted = {name: torch.zeros_like(linear(transformer, name).weight) for name in places}
    for power, name in enumerate(("step.safetensors", "step_2.safetensors"), 1):
        apply_as_comfyui(theirs, load_file(out / name), 0.3**power)
        file = "pytorch_lora_weights.safetensors" if power == 1 else "pytorch_lora_weights_2.safetensors"
        for layer, (a, b) in read_layers(tiny_run / file).items():
            wanted[layer] += 0.3**power * b @ a
    changed = 0
    for name, place in places.items():
        mine = theirs[f"{place.layer}.weight"][place.start : place.start + place.rows]
        mine = torch.cat(mine.chunk(2)[::-1]) if place.swapped else mine
        torch.testing.assert_close(mine, wanted[name])
        changed += bool(wanted[name].any())
    assert changed > 10 and not wanted["single_transformer_blocks.0.attn.to_k"].any()


def linear(transformer, name):
    return transformer.get_submodule(name)


def test_alpha_is_in_the_weights_and_other_adapters_are_refused(tmp_path):
    tensors = {
        "transformer.x.lora_A.weight": torch.ones(2, 3),
        "transformer.x.lora_B.weight": torch.ones(4, 2),
    }

    def file(**settings):
        header = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})}
        save_file(tensors, tmp_path / "a.safetensors", metadata=header)
        return tmp_path / "a.safetensors"

    a, b = read_layers(file(lora_alpha=8, r=2))["x"]
    assert torch.equal(a, torch.ones(2, 3)) and torch.equal(b, torch.full((4, 2), 4.0))
    with pytest.raises(ValueError, match="use_dora"):
        read_layers(file(lora_alpha=8, r=2, use_dora=True))
    with pytest.raises(ValueError, match="have no name in ComfyUI, as x"):
        comfyui_tensors(read_layers(file(lora_alpha=2, r=2)), {})
    save_file({"transformer.x.lora_A.weight": torch.ones(2, 3, 1, 1)}, tmp_path / "conv.safetensors")
    with pytest.raises(ValueError, match="has no place in ComfyUI"):
        read_layers(tmp_path / "conv.safetensors")


@pytest.mark.parametrize(
    "words, message",
    [
        (("--format", "kohya"), "diffusers or comfyui"),
        (("--style_lora", "x"), "a file of its own"),
        (("--steps", "3"), "--steps means nothing"),
        (("--lora_scale", "0.5"), "--lora_scale means nothing"),
        (("--tolerance", "0.5"), "--tolerance means nothing"),
    ],
)
def test_what_it_cannot_do_is_said_before_anything_is_read(tiny_run, tmp_path, capsys, words, message):
    assert export(tiny_run, "--output_dir", str(tmp_path / "out"), *words) == 2
    assert message in capsys.readouterr().err
