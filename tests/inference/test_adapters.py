"""A LoRA of which a part fits nowhere: said where one is loaded, refused where nobody would see it later."""

import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from scfm.cli import main
from scfm.inference.adapters import load_adapter, partial_fit
from scfm.models.lora import WEIGHT_NAME
from toy.pipelines import load_flux


def pair(layer):
    """The two tensors of a LoRA of a layer of the tiny Flux."""
    return {f"{layer}.lora_A.weight": torch.ones(2, 128), f"{layer}.lora_B.weight": torch.ones(128, 2)}


def kohya(layer):
    """The same as kohya's trainer spells it."""
    down, up = pair(layer).values()
    layer = "lora_unet_" + layer.replace(".", "_")
    return {
        f"{layer}.lora_down.weight": down,
        f"{layer}.lora_up.weight": up,
        f"{layer}.alpha": torch.tensor(2.0),
    }


FITS = {
    "diffusers": pair("transformer.transformer_blocks.0.attn.to_q"),
    "kohya": kohya("double_blocks.0.img_attn.proj"),
}
LOST = {
    "deeper": (pair("transformer.transformer_blocks.31.attn.to_q"), "transformer_blocks.31.attn.to_q"),
    "text encoder": (
        pair("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"),
        "text_encoder_2.encoder",
    ),
    "other names": (pair("unet.down_blocks.0.to_q"), "unet.down_blocks.0.to_q"),
    "DoRA": ({"transformer.transformer_blocks.0.attn.to_q.dora_scale": torch.ones(128)}, "to_q.dora_scale"),
}


@pytest.fixture
def half(lora):
    """The carried LoRA with 36 of its 124 tensors named as for a deeper Flux."""
    tensors = load_file(lora / WEIGHT_NAME)
    for k in (1, 2, 3):
        old, new = f"single_transformer_blocks.{k}.", f"single_transformer_blocks.{30 + k}."
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    folder = shutil.copytree(lora, lora.with_name("half"))
    save_file(tensors, folder / WEIGHT_NAME)
    return folder


def run(*words):
    return main([str(word) for word in words])


@pytest.mark.parametrize("spelling", FITS)
def test_what_fits_is_passed_over_in_silence(tmp_path, caplog, recwarn, spelling):
    save_file(FITS[spelling], tmp_path / "a.safetensors")
    pipe = load_flux()
    load_adapter(pipe, tmp_path / "a.safetensors", "a")
    assert partial_fit(pipe, tmp_path / "a.safetensors", "a") == ""
    assert not caplog.records


@pytest.mark.parametrize("what", LOST)
def test_what_fits_nowhere_is_counted_and_named(tmp_path, caplog, what):
    tensors, name = LOST[what]
    save_file(FITS["diffusers"] | tensors, tmp_path / "a.safetensors")
    with caplog.at_level(logging.WARNING):
        load_adapter(load_flux(), tmp_path / "a.safetensors", "a")
    (line,) = (record.getMessage() for record in caplog.records)
    assert f"{len(tensors)} of {2 + len(tensors)} tensors of " in line and name in line
    assert "take the pipeline that it was made for" in line


def test_what_fits_nowhere_is_found_in_another_trainers_spelling(tmp_path):
    path, pipe = tmp_path / "a.safetensors", load_flux()
    save_file(FITS["kohya"] | kohya("double_blocks.7.img_attn.proj"), path)
    load_adapter(pipe, path, "a")
    assert "2 of 4 tensors" in partial_fit(pipe, path, "a")
    assert "(transformer.transformer_blocks.7.attn.to_out.0)" in partial_fit(pipe, path, "a")


def test_sample_says_it_in_one_line(half, tmp_path, caplog, recwarn):
    words = ["--prompt", "a red star", "--steps", 1, "--output", tmp_path / "a.png"]
    assert run("sample", "--lora", half, *words) == 0
    (line,) = (record.getMessage() for record in caplog.records)
    assert "36 of 124 tensors of" in line and "single_transformer_blocks.31.attn.to_k, " in line
    assert len(line) < 700 and not [w for w in recwarn if "PEFT adapters" in str(w.message)]


def test_dial_refuses_it_before_the_search(half, tmp_path, capsys, monkeypatch):
    """Its scales would go into the file, for whoever loads it into the right pipeline."""
    monkeypatch.setattr("scfm.commands.dial.search_lora_scales", lambda *_: pytest.fail("searched"))
    (tmp_path / "prompts.txt").write_text("a red star\n")
    before = (half / WEIGHT_NAME).read_bytes()
    assert run("dial", "--lora", half, "--prompts", tmp_path / "prompts.txt") == 2
    assert "36 of 124 tensors" in capsys.readouterr().err
    assert (half / WEIGHT_NAME).read_bytes() == before


@pytest.mark.parametrize("which", ["step", "style"])
def test_export_refuses_it(lora, half, tmp_path, capsys, which):
    """Nobody would see it in the weights any more."""
    words = ["--lora", half] if which == "step" else ["--lora", lora, "--style_lora", half]
    assert run("export", *words, "--output_dir", tmp_path / "out") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("scfm export: 36 of 124 tensors of") and not (tmp_path / "out").exists()
