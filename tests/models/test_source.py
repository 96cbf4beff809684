"""How people have their pipelines on disk: what loads, and what is named before anything is made."""

import shutil

import pytest
import torch
from diffusers import FluxPipeline

from scfm.cli import main
from scfm.models.loading import load_pipeline, with_vae
from scfm.models.source import PipelineSource
from toy.pipelines import FLUX, TOKENS

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def flux(tmp_path):
    """A copy of the carried pipeline."""
    return shutil.copytree(FLUX, tmp_path / "flux")


@pytest.fixture(scope="module")
def half():
    return FluxPipeline.from_pretrained(FLUX, dtype=torch.float16)


@pytest.mark.parametrize("size", ["5GB", "1MB"], ids=["whole", "sharded"])
def test_weights_of_a_variant_are_loaded(half, tmp_path, size):
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    source = PipelineSource(tmp_path)
    pipe, _ = load_pipeline(source, torch.float32)
    for name, weight in half.transformer.named_parameters():
        assert torch.equal(pipe.transformer.get_parameter(name), weight.float())
    pipe, _ = load_pipeline(source, torch.float32, parts="transformer")
    with with_vae(pipe, source):
        assert torch.equal(next(pipe.vae.parameters()), next(half.vae.parameters()).float())


def test_weights_without_a_variant_come_first_and_parts_may_differ(half, flux):
    shutil.rmtree(flux / "vae")
    half.vae.save_pretrained(flux / "vae", variant="fp16")
    half.transformer.save_pretrained(flux / "transformer", variant="ema")  # beside the plain ones
    source = PipelineSource(flux)
    source.check_files()
    assert source.variant_of("vae") == "fp16" and source.variant_of("transformer") is None
    pipe, _ = load_pipeline(source, torch.float32)
    stock = FluxPipeline.from_pretrained(FLUX)
    assert torch.equal(next(pipe.transformer.parameters()), next(stock.transformer.parameters()))
    assert torch.equal(next(pipe.vae.parameters()), next(half.vae.parameters()).float())


def test_parts_that_nobody_loads_may_be_missing(flux):
    for part in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(flux / part)
    (flux / "vae").mkdir()
    shutil.copy(FLUX / "vae/config.json", flux / "vae")
    pipe, _ = load_pipeline(flux, torch.float32, parts="transformer")
    assert pipe.transformer is not None and pipe.vae is None
    with pytest.raises(FileNotFoundError, match="has no text_encoder: download or save"):
        load_pipeline(flux, torch.float32)


def test_configuration_files_are_enough_to_plan(flux, capsys):
    for path in flux.rglob("*.safetensors"):
        path.unlink()
    assert main(["plan", "--pretrained_model_name_or_path", str(flux)]) == 0
    assert "B parameters" in capsys.readouterr().out


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def no_shard(flux):
    transformer = FluxPipeline.from_pretrained(FLUX).transformer
    shutil.rmtree(flux / "transformer")
    transformer.save_pretrained(flux / "transformer", max_shard_size="1MB")
    sorted((flux / "transformer").glob("*-00002-of-*"))[0].unlink()


def two_variants(flux):
    for part, variant in {"transformer": "bf16", "vae": "fp16"}.items():
        path = flux / part / "diffusion_pytorch_model.safetensors"
        path.rename(path.with_name(f"diffusion_pytorch_model.{variant}.safetensors"))


def rename_part(flux):
    (flux / "text_encoder_2").rename(flux / "t5")


BROKEN = {
    "no folder": (rename_part, "has no text_encoder_2: download or save the whole pipeline again"),
    "no weights": (lambda flux: (flux / TRANSFORMER).unlink(), "has no weights in transformer"),
    "cut short": (lambda flux: cut(flux / TRANSFORMER), f"has a {TRANSFORMER} that is not whole"),
    "a pointer of git": (
        lambda flux: (flux / TRANSFORMER).write_text("version https://git-lfs.github.com/spec/v1\n"),
        f"has a {TRANSFORMER} that is not whole",
    ),
    "no shard": (no_shard, "has no transformer/diffusion_pytorch_model-00002-of-"),
    "no config": (lambda flux: (flux / "transformer/config.json").unlink(), "has no transformer/config.json"),
    "no tokenizer": (lambda flux: shutil.rmtree(flux / "tokenizer_2"), "has no tokenizer_2"),
    "two variants": (
        two_variants,
        "no variant of their weights in common (transformer in bf16, vae in fp16)",
    ),
    "a damaged index": (
        lambda flux: (flux / "model_index.json").write_text("{"),
        "model_index.json is not as save_pretrained writes it (JSONDecodeError",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("command", ["distill", "data"])
def test_what_is_not_whole_is_named_before_anything_is_made(
    flux, tmp_path, capsys, monkeypatch, what, command
):
    monkeypatch.setattr("scfm.data.prepare.load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    damage, message = BROKEN[what]
    damage(flux)
    (tmp_path / "captions.txt").write_text("a red star\n")
    size = {"distill": ["--height", "32", "--width", "32"], "data": ["--sizes", "32x32"]}[command]
    words = [command, "--pretrained_model_name_or_path", flux, "--prompts", tmp_path / "captions.txt"]
    words += ["--output_dir", tmp_path / "run", "--max_sequence_length", TOKENS, *size]
    capsys.readouterr()  # what the damage had to load
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, message",
    [
        ("flux1-dev.safetensors", "a single file, and a pipeline is a folder: read it with from_single_file"),
        ("flux/transformer", "it is a part alone"),
        ("models--me--flux", "there is one in .*snapshots/0123: name that folder"),
        ("downloads", "there is one in .*downloads/flux: name that folder"),
        ("nowhere", "expected model_index.json there"),
    ],
)
def test_what_lies_where_a_pipeline_was_expected_is_said(flux, tmp_path, name, message):
    shutil.copy(flux / TRANSFORMER, tmp_path / "flux1-dev.safetensors")
    shutil.copytree(flux, tmp_path / "models--me--flux/snapshots/0123")
    shutil.copytree(flux, tmp_path / "downloads/flux")
    with pytest.raises(FileNotFoundError, match=message):
        PipelineSource(tmp_path / name)
