"""What every family in a plain file is held to, on a tiny genuine pipeline of random weights.

A new family is a line in `BUILD` of toy/pipelines.py, and one of videos a line in `CASES` too. The older
families have the same tests, and more, in test_families.py.
"""

import json
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict

from scfm.data.caption_length import warn_of_long_captions
from scfm.evaluation.external_models import ExternalModel, PipelineImages
from scfm.inference.config import InferenceConfig
from scfm.inference.step_lora import fixed_shift
from scfm.models.base import time_shift
from scfm.models.check import check_images, check_latents, check_lora, check_text, check_velocity
from scfm.models.family import FAMILIES, velocities
from scfm.models.loading import load_pipeline
from scfm.models.lora import WEIGHT_NAME, LoraModels, adapter_metadata, add_adapters, save_lora
from scfm.models.lora_file import read_lora_scales
from scfm.models.sampling import start_noise, stock_latents, stock_shift
from scfm.models.scaled_lora import ScaledLoraModels
from scfm.models.source import HUB_FILES, PipelineSource
from scfm.training.config import DistillConfig
from scfm.training.plan import count_called, meta_inputs, shape_of
from toy.pipelines import BUILD, build_wan

CAPTIONS = ["a large red cross", "a small blue ring on the left", "a green star"]
LENGTH = 32  # of the text: a caption and what the chat templates put around it
GUIDANCE = torch.tensor([1.0, 4.0, 2.0])  # of each example: with classifier-free guidance some run twice
SIZES = {"square": (32, 32), "wide": (32, 64)}
# {case: (its pipeline's class, how that is built, what its family is made with)}
CASES = {name: (name, build, {}) for name, build in BUILD.items()} | {
    "Wan, 5 frames": ("WanPipeline", build_wan, {"num_frames": 5}),
    "Wan 2.2, 9 frames": ("WanPipeline", partial(build_wan, expand_timesteps=True), {"num_frames": 9}),
}
each_family = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def pipes():
    """{case: pipeline}: built once, and never changed."""
    made = {}
    for name, (_, build, _) in CASES.items():
        made[name] = build()
        made[name].set_progress_bar_config(disable=True)
    return made


def bound(name, pipe, size=SIZES["square"], length=LENGTH):
    """The family of a case."""
    pipeline_class, _, more = CASES[name]
    return FAMILIES[pipeline_class](pipe, *size, length, **more)


@pytest.fixture
def family(name, pipes):
    return bound(name, pipes[name])


def point_of(family, guidance, captions=CAPTIONS):
    """(x, t, cond) of captions."""
    n = len(captions)
    x = torch.randn(n, *family.latent_shape, generator=torch.Generator().manual_seed(1))
    cond = {**family.encode_text(captions), "guidance": torch.as_tensor(guidance).float().expand(n)}
    return x, torch.linspace(0.9, 0.2, n), cond


def rows_of(cond, rows):
    return {name: part[rows] for name, part in cond.items()}


def shaken(transformer, names):
    """Adapters that no longer are zero."""
    with torch.no_grad():
        for i, (key, weight) in enumerate(transformer.named_parameters()):
            if any(f".lora_B.{name}." in key for name in names):
                weight.normal_(std=0.2, generator=torch.Generator().manual_seed(i))


@each_family
@pytest.mark.parametrize("size", SIZES)
def test_our_sampler_is_the_stock_pipeline(name, pipes, size):
    family = bound(name, pipes[name], SIZES[size])
    assert check_latents(family)
    assert check_velocity(family, CAPTIONS[:2], 3, tolerance=1e-4)
    assert check_images(family, CAPTIONS[:2], (1, 3, 8), (1.0, 4.0))
    assert check_images(family, CAPTIONS[:2], (2,), (4.0,), shift=2.0)


@each_family
def test_a_caption_alone_gives_what_it_gives_in_company(family):
    assert check_text(family, CAPTIONS)
    x, t, cond = point_of(family, GUIDANCE)
    together = family.velocity(family.pipe.transformer, x, t, cond)
    for i, caption in enumerate(CAPTIONS):
        own = {**family.encode_text([caption]), "guidance": cond["guidance"][i : i + 1]}
        alone = family.velocity(family.pipe.transformer, x[i : i + 1], t[i : i + 1], own)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)
    assert (
        together - family.velocity(family.pipe.transformer, x, t, point_of(family, 1.0)[2])
    ).abs().max() > 1e-3


@each_family
def test_gradient_checkpointing_changes_nothing(name, family):
    transformer = CASES[name][1]().transformer
    add_adapters(transformer, family.lora_targets, 2, copies={"student": ()})
    shaken(transformer, ["student"])
    point, results = point_of(family, GUIDANCE), []
    for checkpointing in (False, True):
        if checkpointing:
            transformer.enable_gradient_checkpointing()
            transformer.train()
        v = family.velocity(transformer, *point)
        v.square().mean().backward()
        gradients = [p.grad for p in transformer.parameters() if p.grad is not None]
        results.append([v.detach(), *(g.clone() for g in gradients)])
        transformer.zero_grad()
    assert len(results[0]) > 20
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@each_family
def test_a_lora_goes_through_the_stock_pipeline(name, family, tmp_path):
    assert check_lora(family)
    transformer = CASES[name][1]().transformer
    models = LoraModels(transformer, family.velocity, family.lora_targets, rank=2, alpha=6)
    shaken(transformer, ["student"])
    save_lora(family.pipeline_class, transformer, tmp_path)
    stock = CASES[name][1]()
    stock.load_lora_weights(str(tmp_path))
    x, t, cond = point_of(family, GUIDANCE)
    with torch.no_grad():
        theirs, ours = family.velocity(stock.transformer, x, t, cond), models.field("student")(x, t, cond)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - models.teacher(x, t, cond)).abs().max() > 1e-2
    layers = [n for n, _ in stock.transformer.named_modules() if n.endswith(".lora_A")]
    assert len(layers) == sum(".lora_A.student." in n for n, _ in transformer.named_parameters())


@each_family
def test_each_example_has_its_own_scale_in_one_forward(name, family):
    models = ScaledLoraModels(
        CASES[name][1]().transformer, family.velocity, family.lora_targets, 2, None, 2, family.forward_rows
    )
    shaken(models.transformer, models.adapter_names)
    (x, t, cond), scales = point_of(family, GUIDANCE), torch.tensor([0.3, 1.0, 0.6])
    together = models.scaled_velocity("student", scales, x, t, cond).detach()
    for i, scale in enumerate(scales.tolist()):
        row = slice(i, i + 1)
        alone = models.field("student", scale)(x[row], t[row], rows_of(cond, row))
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)


@each_family
def test_guidance_in_the_weights_leaves_the_teacher_alone_guided(name, family):
    """Half of a target: the guided teacher's where the scale is 0, else one row an example, unguided."""
    if not family.uses_cfg:
        with pytest.raises(ValueError, match="costs nothing"):
            velocities(family, "distilled")
        return
    velocity, teachers = velocities(family, "distilled")
    pipe = CASES[name][1]()
    x, t, cond = point_of(family, GUIDANCE)
    with torch.no_grad():
        guided = family.velocity(pipe.transformer, x, t, cond)
    models = ScaledLoraModels(
        pipe.transformer, velocity, family.lora_targets, 2, None, 1, family.forward_rows, None, teachers
    )
    shaken(models.transformer, models.adapter_names)
    mixed = models.scaled_velocity("ema", torch.tensor([0.0, 0.7, 0.0]), x, t, cond)
    torch.testing.assert_close(mixed[::2], guided[::2], rtol=0, atol=1e-4)
    alone = models.field("ema", 0.7)(x, t, {**cond, "guidance": torch.ones(3)})
    torch.testing.assert_close(mixed[1], alone[1], rtol=0, atol=1e-4)
    small = models.field("ema", 1e-9)(x, t, cond)  # the LoRA of power 0 is there at any scale
    assert (small - guided).abs().max() > 1e-2


@each_family
def test_it_saves_and_reloads_and_a_part_alone_knows_its_sizes(name, pipes, family, tmp_path):
    pipes[name].save_pretrained(tmp_path)
    saved = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert all(any(fnmatch(file, pattern) for pattern in HUB_FILES) for file in saved)  # is downloaded
    source = PipelineSource(tmp_path)
    assert source.family is FAMILIES[CASES[name][0]]
    skeleton = source.skeleton
    skeleton.scheduler = source.scheduler()
    alone = bound(name, skeleton)
    assert alone.latent_shape == family.latent_shape and alone.tokens == family.tokens
    assert stock_shift(alone) == pytest.approx(stock_shift(family))
    bare, _ = load_pipeline(tmp_path, torch.float32, parts="transformer")
    assert bound(name, bare).latent_shape == family.latent_shape
    whole, _ = load_pipeline(tmp_path, torch.float32)
    again = bound(name, whole)
    noise = point_of(family, 1.0)[0]
    images = again.sample_stock(CAPTIONS, noise, 2, 4.0)
    assert torch.equal(images, family.sample_stock(CAPTIONS, noise, 2, 4.0))
    latents = stock_latents(family, CAPTIONS, noise, 2, 4.0, fixed_shift(stock_shift(family)))
    torch.testing.assert_close(family.decode(latents), images, rtol=0, atol=1e-4)


@each_family
def test_another_pipeline_of_its_class_is_called_as_it_is(name, pipes, family):
    """As `scfm evaluate --external_model` does it."""
    size = {"height": 32, "width": 32, "max_sequence_length": LENGTH}
    model = ExternalModel("other", Path(), guidance_scale=4.0, inference_shift=3.0)
    images = PipelineImages(pipes[name], model, InferenceConfig(**size), 2, family)
    with time_shift(pipes[name], 3.0):
        theirs = images(CAPTIONS[:2], [0, 1])
    ours = family.sample_stock(CAPTIONS[:2], start_noise(family, [0, 1], 0), 2, 4.0, 3.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@each_family
def test_bfloat16_is_close(name, family):
    transformer = CASES[name][1]().transformer.to(torch.bfloat16)
    x, t, cond = point_of(family, GUIDANCE)
    half = {k: v.bfloat16() if v.is_floating_point() and k != "guidance" else v for k, v in cond.items()}
    with torch.no_grad():
        whole, rough = (
            family.velocity(family.pipe.transformer, x, t, cond),
            family.velocity(transformer, x, t, half),
        )
    assert rough.dtype == torch.float32 and (whole - rough).abs().max() < 0.2 * whole.abs().max()


@each_family
@pytest.mark.parametrize("size", [(30, 32), (32, 33), (0, 32)])
def test_sizes_that_do_not_fit_are_refused(family, size):
    with pytest.raises(ValueError, match="take multiples of"):
        type(family)(family.pipe, *size, LENGTH)


@each_family
def test_lengths_that_do_not_fit_are_refused(family):
    with pytest.raises(ValueError, match=f"the pipeline takes 1 to {family.longest_text}"):
        type(family)(family.pipe, *SIZES["square"], family.longest_text + 1)


@each_family
def test_the_plan_knows_its_text(name, pipes, family, tmp_path):
    text = family.encode_text(CAPTIONS[:1])
    shapes = {k: tuple(v.shape[1:]) for k, v in text.items() if not k.startswith("empty_")}
    assert shapes == family.text_shapes
    pipes[name].save_pretrained(tmp_path)
    settings = {"height": 32, "width": 32, "max_sequence_length": LENGTH, **CASES[name][2]}
    config = DistillConfig(pretrained_model_name_or_path=str(tmp_path), **settings)
    planned, transformer = shape_of(config)
    add_adapters(transformer, planned.lora_targets, 2, copies={"student": ()})
    count = count_called(planned, transformer, *meta_inputs(planned, transformer, 4.0, torch.float32))
    assert planned.tokens == family.tokens
    assert count.student > count.forward > 0


def test_a_processors_tokenizer_counts_the_words_of_captions(pipes, caplog):
    processor = SimpleNamespace(tokenizer=pipes["Flux2Pipeline"].tokenizer)
    shown = SimpleNamespace(pipe=SimpleNamespace(components={"tokenizer": processor}), max_sequence_length=4)
    warn_of_long_captions(shown, CAPTIONS)
    assert "1 of 3 captions are longer than 4 tokens" in caplog.text


def style_lora(name, folder):
    """A LoRA on the attention as a stock trainer saves it: rank 3, alpha 7 in the header."""
    pipe = CASES[name][1]()
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(2)
    pipe.transformer.add_adapter(config, "style")
    type(pipe).save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer, adapter_name="style"),
        transformer_lora_adapter_metadata=adapter_metadata(config) | {"lora_alpha": 7},
    )
    return folder


@pytest.mark.slow
@each_family
def test_the_commands_know_it(name, pipes, tmp_path, command):
    """From captions to an exported pipeline, which is a stock one, and to one LoRA with a style's, by both
    algorithms.
    """
    pipeline_class, _, more = CASES[name]
    pipes[name].save_pretrained(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS) + "\n")
    ours = {"pretrained_model_name_or_path": tmp_path / "pipeline", "max_sequence_length": LENGTH, **more}
    made = {"prompts": tmp_path / "prompts.txt", "output_dir": tmp_path / "images", "sizes": "32x32"}
    assert command("data", **ours, **made, teacher_steps=2, teacher_guidance_scale=3) == 0
    run = {"train_data_dir": tmp_path / "images", "height": 32, "width": 32, "rank": 2, "report_to": "none"}
    run |= {"max_train_steps": 2, "global_batch_size": 2, "teacher_steps": 2, "num_eval_prompts": 2}
    run |= {"guidance_scale_range": "1,4", "teacher_guidance_scale": 3, "validation_steps": 2}
    for algorithm, exponent in {"dual": 0.0, "step_scaled": 0.85}.items():
        lora, image = tmp_path / algorithm, tmp_path / f"{algorithm}.png"
        assert command("distill", **ours, **run, algorithm=algorithm, output_dir=lora, eval_num_steps=2) == 0
        assert read_lora_scales(lora / WEIGHT_NAME).exponent == exponent
        assert (
            command("sample", lora=lora, prompt=CAPTIONS[0], steps=2, output=image) == 0 and image.is_file()
        )
        measured = {"num_images": 2, "steps": 2, "teacher_steps": 2, "latency_repeats": 1, "imagenet": "none"}
        assert command("evaluate", lora=lora, output_dir=tmp_path / f"{algorithm}_measured", **measured) == 0
        assert (tmp_path / f"{algorithm}_measured" / "report.html").is_file()
        exported = tmp_path / f"{algorithm}_exported"
        assert command("export", lora=lora, output_dir=exported, steps=2) == 0
        assert json.loads((exported / "export.json").read_text())["differences"]["mean"] < 1e-3
        assert type(type(pipes[name]).from_pretrained(str(exported))) is type(pipes[name])
        merged = tmp_path / f"{algorithm}_merged"
        style = style_lora(name, tmp_path / f"{algorithm}_style")
        assert command("export", style_lora=style, lora=lora, output_dir=merged, steps=2) == 0
        assert json.loads((merged / "export.json").read_text())["differences"]["mean"] < 1e-3
        family_class = FAMILIES[pipeline_class]
        for argument in {**family_class.guidance_arguments(3.5), **family_class.call_settings, **more}:
            assert f"    {argument}=" in (lora / "README.md").read_text()
