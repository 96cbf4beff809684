"""The image flow as a pipeline: captions, the folder, LoRA on convolutions, and the commands on the result
of `scfm pretrain`."""

import io
import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.functional import to_pil_image

from scfm.cli import main
from scfm.inference.step_lora import InferenceConfig, StepLora
from scfm.models.loading import load_pipeline
from scfm.models.lora import WEIGHT_NAME, LoraModels, adapter_parameters, save_lora
from scfm.models.lora_file import read_lora_scales
from scfm.models.pixels import (
    ClassLabelEncoder,
    IdentityVAE,
    PixelPipeline,
    Pixels,
    pipeline_of,
    save_pipeline,
)
from scfm.models.unet import UNetFlow, generate, guided, load_flow
from scfm.training.config import DistillConfig
from scfm.training.distill_trainer import DistillTrainer

NAMES = ("cat", "dog", "fire engine", "engine")


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    return pipeline_of(UNetFlow("tiny", classes=4).eval(), NAMES)


# Captions


@settings(deadline=None, max_examples=30)
@given(
    st.permutations(["ant", "bee", "cow", "door"]),
    st.integers(0, 3),
    st.sampled_from(["{}", "a {}", "one {}, please", "the {}."]),
)
def test_a_caption_is_the_class_that_it_names_wherever_it_stands(names, which, phrase):
    assert ClassLabelEncoder(tuple(names))([phrase.format(names[which]), ""]).tolist() == [which, len(names)]


@pytest.mark.parametrize(
    "caption, message",
    [
        ("a zebra", "names no class: it has to name one of cat, dog"),
        ("concatenate", "names no class"),
        ("a cat and a dog", "more than one class"),
        ("fire engine", "more than one class"),
    ],
)
def test_other_captions_are_errors(caption, message):
    with pytest.raises(ValueError, match=message):
        ClassLabelEncoder(NAMES)([caption])


# The pipeline


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_pipeline_generates_what_generate_generates(pipe, scale):
    noise = torch.randn(3, 3, 32, 32)
    theirs = (
        pipe(
            ["cat", "a dog", ""], num_inference_steps=5, guidance_scale=scale, latents=noise, output_type="pt"
        ).images
        * 2
        - 1
    )
    ours = generate(pipe.transformer, torch.tensor([0, 1, 4]), noise, 5, guidance=scale).clamp(-1, 1)
    assert torch.allclose(ours, theirs, atol=1e-5) and ours.std() > 0.05


def test_the_pipeline_calls_back_after_each_step(pipe):
    steps = []
    pipe(
        ["cat"],
        num_inference_steps=3,
        output_type="pt",
        callback_on_step_end=lambda pipe, number, timestep, tensors: steps.append((number, timestep.item())),
    )
    assert [number for number, _ in steps] == [0, 1, 2] and [t for _, t in steps] == sorted(
        (t for _, t in steps), reverse=True
    )


def test_a_negative_class_takes_the_place_of_nobody(pipe):
    family, noise = Pixels(pipe, 32, 32, negative_prompt="a dog"), torch.randn(2, 3, 32, 32)
    cond = {**family.encode_text(["cat", "cat"]), "guidance": torch.tensor([2.0, 1.0])}
    v = family.velocity(pipe.transformer, noise, torch.full((2,), 0.5), cond)
    by_hand = guided(pipe.transformer, 2.0, null_label=1)(noise, torch.full((2,), 0.5), torch.tensor([0, 0]))
    with torch.no_grad():
        assert torch.allclose(v[0], by_hand[0], atol=1e-5) and torch.allclose(
            v[1], pipe.transformer(noise[1:], torch.tensor([0.5]), torch.tensor([0]))[0], atol=1e-5
        )
    stock = family.sample_stock(["cat", "cat"], noise, 2, 2.0)
    assert (stock - Pixels(pipe, 32, 32).sample_stock(["cat", "cat"], noise, 2, 2.0)).abs().max() > 1e-4


def test_a_folder_comes_back_whole_and_in_parts(pipe, tmp_path):
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "old").touch()
    folder = save_pipeline(pipe.transformer, NAMES, tmp_path / "pipe")
    assert not (folder / "old").exists() and [p.name for p in tmp_path.iterdir()] == ["pipe"]
    full, family = load_pipeline(folder, torch.float32)
    assert family is Pixels and full.text_encoder(["", "dog"]).tolist() == [4, 1]
    for a, b in zip(full.transformer.parameters(), pipe.transformer.parameters(), strict=False):
        assert torch.equal(a, b)
    alone, _ = load_pipeline(folder, torch.float32, parts="transformer")
    assert alone.vae is None and alone.text_encoder is None
    assert Pixels(load_pipeline(folder, torch.float32, parts="encoders")[0], 32, 32).tokens == 256
    half, _ = load_pipeline(folder, torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16 and half.text_encoder(["dog"]).dtype == torch.int64
    assert full.dtype == torch.float32 and half.dtype == torch.bfloat16  # what noise is cast to
    assert half(["cat"], num_inference_steps=2, output_type="pt").images.dtype == torch.bfloat16


def test_a_network_with_a_step_input_has_no_pipeline():
    with pytest.raises(ValueError, match="step size as an input"):
        pipeline_of(UNetFlow("tiny", levels=8), NAMES)


def test_pixels_are_their_own_latents():
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(IdentityVAE().encode(images).latent, images) and torch.equal(
        IdentityVAE().decode(images).sample, images
    )


# LoRA


def test_a_lora_on_convolutions_is_the_weights_it_stands_for(pipe, tmp_path):
    """File, stock loader and scale against the base with the product of the two factors added by hand."""
    save_pipeline(pipe.transformer, NAMES, tmp_path / "pipe")
    family, targets = Pixels(pipe, 32, 32), ("conv1", "conv2", "linear_1")
    models = LoraModels(pipe.transformer, family.velocity, targets, rank=2)
    for weight in adapter_parameters(pipe.transformer, "student"):
        torch.nn.init.normal_(weight, std=0.1)
    save_lora(PixelPipeline, pipe.transformer, tmp_path)
    by_hand = PixelPipeline.from_pretrained(tmp_path / "pipe").transformer.eval()
    added = 0
    for name, module in pipe.transformer.named_modules():
        if hasattr(module, "lora_A"):
            a, b = (getattr(module, part)["student"].weight for part in ("lora_A", "lora_B"))
            product = (b.flatten(1) @ a.flatten(1)).view(module.weight.shape)
            by_hand.get_submodule(name).weight.data += 0.5 * product
            added += product.ndim == 4
    assert added >= 4
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([0.3, 0.9])
    cond = {**family.encode_text(["cat", "dog"]), "guidance": torch.ones(2)}
    stock = PixelPipeline.from_pretrained(tmp_path / "pipe")
    stock.load_lora_weights(str(tmp_path), weight_name=WEIGHT_NAME, adapter_name="step")
    stock.set_adapters(["step"], [0.5])
    with torch.no_grad():
        want = by_hand(x, t, cond["label"])
        assert torch.allclose(models.field("student", 0.5)(x, t, cond), want, atol=1e-5)
        assert torch.allclose(stock.transformer.eval()(x, t, cond["label"]), want, atol=1e-5)
        assert not torch.allclose(want, models.teacher(x, t, cond), atol=1e-2)


# The commands


@pytest.fixture
def data(tmp_path):
    """CIFAR's layout with noise in it, and the same images as an image folder."""
    folder, mine, cells, listing = tmp_path / "data", tmp_path / "mine", [], []
    folder.mkdir(), mine.mkdir()
    for i in range(12):
        image = to_pil_image(
            torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        )
        image.save(mine / f"{i}.png")
        image.save(file := io.BytesIO(), "png")
        cells.append({"bytes": file.getvalue(), "path": None})
        listing.append(json.dumps({"file_name": f"{i}.png", "text": f"a {'cat' if i % 2 else 'dog'}"}))
    (mine / "metadata.jsonl").write_text("\n".join(listing))
    features = {"info": {"features": {"label": {"names": ["dog", "cat"]}}}}
    table = pyarrow.table({"img": cells, "label": [i % 2 for i in range(12)]})
    pyarrow.parquet.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(features)}), folder / "train-0.parquet"
    )
    return tmp_path


def run(*words):
    assert main([str(word) for word in words]) == 0


@pytest.mark.slow
def test_pretrain_distill_kill_resume_dial_sample_evaluate_export(data):
    """What a person does on one small data set, by the commands; a resumed run equals an unbroken one."""
    run(
        "pretrain",
        "--train_data_dir",
        data / "data",
        "--output_dir",
        data / "flow",
        "--size",
        "tiny",
        "--max_train_steps",
        2,
        "--global_batch_size",
        4,
        "--lr_warmup_steps",
        1,
        "--validation_steps",
        0,
    )
    pipe = PixelPipeline.from_pretrained(data / "flow" / "pipeline")
    shipped = load_flow(data / "flow" / "flow.safetensors")
    assert all(
        torch.equal(a, b) for a, b in zip(pipe.transformer.parameters(), shipped.parameters(), strict=False)
    )
    flags = (
        "--pretrained_model_name_or_path",
        data / "flow" / "pipeline",
        "--train_data_dir",
        data / "mine",
        "--height",
        32,
        "--width",
        32,
        "--max_sequence_length",
        1,
        "--algorithm",
        "dual",
        "--rank",
        2,
        "--global_batch_size",
        4,
        "--guidance_scale_range",
        "1,3",
        "--teacher_guidance_scale",
        1,
        "--inference_shift",
        1,
        "--checkpointing_steps",
        2,
        "--validation_steps",
        0,
        "--num_eval_prompts",
        2,
        "--report_to",
        "none",
        "--lora_layers",
        "conv1,conv2,linear_1",
        "--learning_rate",
        "1e-3",
    )
    run("distill", *flags, "--max_train_steps", 4, "--output_dir", data / "full")
    settings = json.loads((data / "full" / "config.json").read_text())
    DistillTrainer(DistillConfig(**{**settings, "output_dir": str(data / "cut")}), progress=False).train(
        until=2
    )  # and no end: as if it had been killed
    run("distill", *flags, "--max_train_steps", 4, "--output_dir", data / "cut")
    ours, theirs = (load(data / name) for name in ("full", "cut"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    run("dial", "--lora", data / "full", "--prompts", captions(data), "--steps", "1,2")
    assert read_lora_scales(data / "full" / WEIGHT_NAME) is not None
    run(
        "sample",
        "--lora",
        data / "full",
        "--prompt",
        "a cat",
        "--prompt",
        "a dog",
        "--steps",
        2,
        "--output",
        data / "two.png",
    )
    assert Image.open(data / "two.png").size == (64, 32)
    run(
        "evaluate",
        "--lora",
        data / "full",
        "--prompts",
        captions(data),
        "--num_images",
        2,
        "--steps",
        2,
        "--teacher_steps",
        4,
        "--inception",
        "none",
        "--clip",
        "none",
        "--latency_repeats",
        1,
    )
    distances = {
        (row["label"], row["steps"]): row["endpoint_distance"]
        for row in json.loads((data / "full" / "evaluation" / "report.json").read_text())["rows"]
    }
    assert (
        distances["teacher, Euler", 2] > 0.01
        and distances["teacher, Euler", 2] != distances["teacher, Midpoint", 2]
    )
    run("export", "--lora", data / "full", "--steps", 2, "--output_dir", data / "fused")
    fused, noise = PixelPipeline.from_pretrained(data / "fused"), torch.randn(2, 3, 32, 32)
    step = StepLora(InferenceConfig(lora=str(data / "full")), "cpu")
    step.set_scale(step.lora_scales.scale(2))
    ours, theirs = (
        p(["a cat", "a dog"], num_inference_steps=2, latents=noise, output_type="pt").images
        for p in (step.pipe, fused)
    )
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert "from scfm.models.pixels import PixelPipeline" in (data / "fused" / "README.md").read_text()
    assert "12 of them" in (data / "full" / "README.md").read_text()


def captions(data):
    (data / "captions.txt").write_text("a cat\na dog\n")
    return data / "captions.txt"


def load(folder):
    return load_file(folder / WEIGHT_NAME)
