"""What every family offers: the stock pipeline's images, its scheduler's sign and times, LoRA on all layers.

A new family is one more line in `BUILD`; the checks are those of `scfm.models.check`, which are themselves
tested in test_new_family.py. Weights are random: a contract does not need images that mean something.
"""

import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from scfm.inference.step_lora import InferenceConfig, StepLora, generate
from scfm.method.consistency import consistency_target, draw_jumps
from scfm.method.flow import euler_step, sample, time_grid
from scfm.method.metrics import endpoint_distance
from scfm.models.check import (
    LAYERS,
    check_images,
    check_latents,
    check_lora,
    check_text,
    check_velocity,
    untargeted_layers,
)
from scfm.models.family import FAMILIES, velocities
from scfm.models.loading import load_pipeline
from scfm.models.lora import ADAPTERS, LoraModels, add_adapters
from scfm.models.lora_file import read_lora_scales
from scfm.models.pixels import pipeline_of
from scfm.models.sampling import start_noise
from scfm.models.sd3 import SD3
from scfm.models.source import PipelineSource
from scfm.models.unet import UNetFlow
from scfm.streams import keyed_generator
from scfm.training.config import DistillConfig
from scfm.training.distill_trainer import DistillTrainer
from scfm.training.selection import endpoints
from toy import pipelines
from toy.pipelines import FLUX, TOKENS, build_flux, build_sd3

CAPTIONS = [
    "a large red cross",
    "a small blue ring on the left",
    "a yellow circle at the top",
    "a green star",
]
BUILD = {
    "FluxPipeline": build_flux,
    "StableDiffusion3Pipeline": build_sd3,
    "StableDiffusion3Pipeline without T5": lambda: build_sd3(t5=False),
    "PixelPipeline": lambda: build_pixels(),
}


def build_pixels():
    torch.manual_seed(0)
    return pipeline_of(UNetFlow("nano", classes=4).eval(), ("circle", "cross", "ring", "star"))


each_family = pytest.mark.parametrize("family", BUILD, indirect=True)
each_guidance = pytest.mark.parametrize("guidance", [1.0, 4.0])


@pytest.fixture(scope="module")
def family(request):
    pipe = BUILD[request.param]()
    pipe.set_progress_bar_config(disable=True)
    return FAMILIES[request.param.split()[0]](pipe, 32, 32, TOKENS)


def noise_for(family, seed=0):
    return torch.randn(4, *family.latent_shape, generator=torch.Generator().manual_seed(seed))


def cond_for(family, guidance):
    return {**family.encode_text(CAPTIONS), "guidance": torch.as_tensor(guidance).expand(4)}


def field_of(family):
    @torch.no_grad()
    def field(x, t, cond):
        return family.velocity(family.pipe.transformer, x, t, cond)

    return field


def test_every_family_is_held_to_its_contract():
    here = {name.split()[0] for name in BUILD}
    assert here | set(pipelines.BUILD) == set(FAMILIES) and not here & set(pipelines.BUILD)


@each_family
@each_guidance
@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_our_sampler_is_the_stock_pipeline(family, guidance, steps, shift):
    assert check_images(family, CAPTIONS, [steps], [guidance], shift)


@each_family
@each_guidance
def test_the_networks_times_and_its_velocity_are_those_of_the_stock_pipeline(family, guidance):
    assert check_velocity(family, CAPTIONS, 3, [guidance], tolerance=1e-4)


@pytest.mark.parametrize("family", ["FluxPipeline", "StableDiffusion3Pipeline"], indirect=True)
def test_a_shift_that_the_pipeline_takes_by_the_size_is_met(family, monkeypatch):
    scheduler = family.pipe.scheduler
    own = type(scheduler).from_config(scheduler.config, use_dynamic_shifting=True)
    monkeypatch.setattr(family.pipe, "scheduler", own)
    assert check_velocity(family, CAPTIONS) and check_images(family, CAPTIONS, (2,))
    assert check_images(family, CAPTIONS, (2,), shift=3.0)  # a fixed one for the call, and its own again
    assert family.pipe.scheduler is own


@each_family
def test_the_schedulers_step_is_our_euler_step(family):
    scheduler = type(family.pipe.scheduler).from_config(family.pipe.scheduler.config)
    scheduler.set_timesteps(sigmas=[1 - i / 4 for i in range(4)])
    x, times, cond = noise_for(family), time_grid(4, scheduler.shift), cond_for(family, 4.0)
    for i, timestep in enumerate(scheduler.timesteps):
        v = field_of(family)(x, times[i].expand(4), cond)
        theirs = scheduler.step(v, timestep, x, return_dict=False)[0]
        x = euler_step(field_of(family), x, times[i].expand(4), float(times[i] - times[i + 1]), cond)
        torch.testing.assert_close(x, theirs, rtol=0, atol=1e-5)


@each_family
def test_lora_sits_on_every_linear_layer_and_on_nothing_else(family):
    assert check_lora(family) and untargeted_layers(family) == []
    convolutions = (
        type(family.pipe.transformer) is UNetFlow
    )  # where most of its weights are; SD3's one is a linear layer of patches
    linear = {
        n
        for n, m in family.pipe.transformer.named_modules()
        if isinstance(m, LAYERS if convolutions else torch.nn.Linear)
    }
    transformer = type(family.pipe.transformer).from_config(family.pipe.transformer.config)
    add_adapters(transformer, family.lora_targets, 1)  # PEFT's own idea of what the targets reach
    step_lora = {n.split(".lora_A.")[0] for n, _ in transformer.named_parameters() if ".lora_A.student." in n}
    assert step_lora == linear


@each_family
def test_text_and_latents(family):
    assert check_text(family, CAPTIONS) and check_latents(family)
    text = {
        **family.encode_text(CAPTIONS[:3]),
        "guidance": torch.tensor([0.0, 1.0, 4.0]),
    }  # examples of their own guidance each
    x = noise_for(family)[:3]
    assert family.velocity(family.pipe.transformer, x, torch.full((3,), 0.5), text).shape == x.shape


@each_family
@pytest.mark.parametrize("size", [(30, 32), (32, 34), (0, 32)])
def test_sizes_that_do_not_fit_are_refused(family, size):
    with pytest.raises(ValueError, match="take multiples of [48]"):
        type(family)(family.pipe, *size, TOKENS)


# SD3: true guidance


def rows_of(transformer):
    """A list that grows by the rows of each forward, and the hook that fills it."""
    rows = []
    return rows, transformer.register_forward_hook(lambda module, args, out: rows.append(len(out[0])))


def test_guidance_goes_from_the_empty_caption_through_the_caption(sd3):
    x, t, field = noise_for(sd3), torch.tensor([0.9, 0.7, 0.5, 0.2]), field_of(sd3)
    plain = field(x, t, cond_for(sd3, 1.0))
    nothing = field(x, t, {**sd3.encode_text([""] * 4), "guidance": torch.ones(4)})
    assert (plain - nothing).abs().max() > 1e-2
    scales = torch.tensor([4.0, 0.5, 1.0, 7.5])  # each example its own; at 1 and below the plain velocity
    want = nothing + scales.clamp(min=1).view(4, 1, 1, 1) * (plain - nothing)
    torch.testing.assert_close(field(x, t, cond_for(sd3, scales)), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "scales, count", [([1.0, 1.0, 0.3, 0.0], 4), ([4.0, 4.0, 4.0, 4.0], 8), ([1.0, 4.0, 1.0, 1.0], 5)]
)
def test_only_guided_examples_are_evaluated_twice(sd3, scales, count):
    rows, hook = rows_of(sd3.pipe.transformer)
    field_of(sd3)(noise_for(sd3), torch.full((4,), 0.5), cond_for(sd3, torch.tensor(scales)))
    hook.remove()
    assert rows == [count]


def test_an_examples_gradient_is_of_its_own_velocity_only(sd3):
    x, t = noise_for(sd3).requires_grad_(), torch.full((4,), 0.5)
    v = sd3.velocity(sd3.pipe.transformer, x, t, cond_for(sd3, torch.tensor([4.0, 1.0, 4.0, 1.0])))
    (gradient,) = torch.autograd.grad(v[2].sum(), x)
    assert gradient[2].abs().max() > 0 and gradient[[0, 1, 3]].count_nonzero() == 0


def test_bfloat16_tells_close_times_apart(sd3):
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    net = build_sd3().transformer.to(torch.bfloat16)
    cond = {k: v[:3].bfloat16() for k, v in sd3.encode_text(CAPTIONS[:1] * 3).items()} | {
        "guidance": torch.full((3,), 4.0)
    }
    v = sd3.velocity(net, noise_for(sd3)[:1].expand(3, -1, -1, -1), torch.tensor([0.750, 0.751, 0.755]), cond)
    assert v.dtype == torch.float32 and len({tuple(row.flatten().tolist()) for row in v}) == 3


def test_an_image_larger_than_the_table_of_positions_is_refused(sd3):
    assert SD3(sd3.pipe, 48, 32, TOKENS).latent_shape == (4, 24, 16)
    with pytest.raises(ValueError, match="at most 48 a side"):
        SD3(sd3.pipe, 52, 32, TOKENS)
    with pytest.raises(ValueError, match="1 to 512"):
        SD3(sd3.pipe, 32, 32, 513)


def test_images_need_not_be_square(sd3):
    wide = SD3(sd3.pipe, 24, 40, TOKENS)
    noise = noise_for(wide)
    ours = wide.decode(sample(field_of(wide), noise, time_grid(2, 3.0), cond_for(wide, 4.0)))
    assert ours.shape == (4, 3, 24, 40)
    torch.testing.assert_close(ours, wide.sample_stock(CAPTIONS, noise, 2, 4.0, 3.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("t5", [True, False])
def test_it_saves_and_reloads(tmp_path, t5):
    build_sd3(seed=1, t5=t5).save_pretrained(tmp_path)
    assert PipelineSource(tmp_path).family is SD3
    pipe, family_class = load_pipeline(tmp_path, torch.float32)
    assert family_class is SD3 and (pipe.text_encoder_3 is None) == (not t5)
    again, made = SD3(pipe, 32, 32, TOKENS), SD3(build_sd3(seed=1, t5=t5), 32, 32, TOKENS)
    noise = noise_for(again)
    assert torch.equal(
        again.sample_stock(CAPTIONS, noise, 2, 4.0), made.sample_stock(CAPTIONS, noise, 2, 4.0)
    )


# SD3 by the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd3")
    build_sd3().save_pretrained(path / "pipeline")
    (path / "prompts.txt").write_text("\n".join(CAPTIONS) + "\n")
    return path


@pytest.fixture(scope="module")
def distill_sd3(folder, distill):
    """Distills the pipeline of the folder, or the one that is given, into an output_dir."""
    settings = {
        "pretrained_model_name_or_path": folder / "pipeline",
        "prompts": folder / "prompts.txt",
        "height": 32,
        "width": 32,
        "max_sequence_length": TOKENS,
        "guidance_scale_range": "4.5,4.5",
        "teacher_guidance_scale": 4.5,
        "max_grad_norm": 2,
    }
    return lambda out, **more: distill(output_dir=out, **{**settings, **more})


@pytest.fixture(scope="module")
def distilled(folder, distill_sd3):
    assert distill_sd3(folder / "run") == 0
    return folder / "run"


def stock_of(folder, lora=None):
    pipe, _ = load_pipeline(folder / "pipeline", torch.float32)
    assert type(pipe) is StableDiffusion3Pipeline
    if lora:
        pipe.load_lora_weights(str(lora))
    return SD3(pipe, 32, 32, TOKENS)


def config_of(out):
    saved = json.loads((out / "config.json").read_text())
    return DistillConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


@pytest.mark.slow
def test_a_stock_pipeline_loads_what_distill_wrote(folder, distilled):
    run = DistillTrainer(config_of(distilled), progress=False)
    assert run.resume() == 2
    stock = stock_of(folder)
    x, t = noise_for(stock), torch.tensor([0.99, 0.8, 0.5, 0.1])
    plain = field_of(stock)(x, t, cond_for(stock, 4.5))
    stock.pipe.transformer = run.pipe.transformer  # the run holds no encoder and no VAE
    for name in ADAPTERS:
        theirs = stock_of(folder, distilled / name)
        for guidance in (1.0, 4.5):
            ours = run.models.field(name)(x, t, cond_for(stock, guidance))
            assert torch.equal(ours, field_of(theirs)(x, t, cond_for(theirs, guidance)))
        with run.models.using(name):
            images = stock.sample_stock(CAPTIONS, x, 3, 4.5)
        assert torch.equal(images, theirs.sample_stock(CAPTIONS, x, 3, 4.5))
        assert name != "student" or (ours - plain).abs().max() > 1e-3  # and it is not the teacher


@pytest.mark.slow
def test_a_run_in_two_parts_is_the_run_in_one(folder, distilled, distill_sd3):
    assert distill_sd3(folder / "parts", max_train_steps=1) == 0
    assert distill_sd3(folder / "parts") == 0
    for name in ADAPTERS:
        a, b = (
            load_file(out / name / "pytorch_lora_weights.safetensors")
            for out in (distilled, folder / "parts")
        )
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_it_runs_in_bfloat16_without_t5_and_with_checkpointing(tmp_path, distill_sd3):
    build_sd3(t5=False).save_pretrained(tmp_path / "pipeline")
    bare = {"pretrained_model_name_or_path": tmp_path / "pipeline", "weight_dtype": "bf16"}
    assert distill_sd3(tmp_path / "run", validation_steps=0, **bare) == 0


@pytest.fixture
def dial_and_sample(command, tmp_path):
    """Dials a run at one and two steps, then samples from it; returns the scales that its file holds then."""

    def run(out):
        dial = {"num_prompts": 2, "steps": "1,2", "lora_scales": 1, "target_steps": 3}
        assert command("dial", lora=out, **dial) == 0
        image = tmp_path / "a.png"
        assert command("sample", lora=out, prompt="a red star", steps=2, output=image) == 0
        assert image.is_file()
        return set(read_lora_scales(out / "pytorch_lora_weights.safetensors").scales)

    return run


def test_sample_and_dial_know_it(distilled, dial_and_sample):
    assert dial_and_sample(distilled) <= {0.0, 1.0}
    assert "guidance_scale=4.5" in (distilled / "README.md").read_text()


def test_kept_guidance_reaches_all_four_models(sd3):
    """All four models evaluate empty + g (caption - empty) with the example's own g."""
    net = build_sd3().transformer
    models = LoraModels(net, sd3.velocity, sd3.lora_targets, 2)
    x, t = noise_for(sd3), torch.full((4,), 0.5)
    for name in ("student", "teacher", "ema_fast", "ema_slow"):
        with torch.no_grad():
            plain, guided = (getattr(models, name)(x, t, cond_for(sd3, g)) for g in (1.0, 4.0))
            nothing = getattr(models, name)(x, t, {**sd3.encode_text([""] * 4), "guidance": torch.ones(4)})
        torch.testing.assert_close(guided, nothing + 4 * (plain - nothing), rtol=0, atol=1e-5)


# SD3, guidance distilled into the weights


def models_with_adapters(sd3):
    """DistillModels of the distilled kind whose three adapters all have a velocity of their own."""
    velocity, teachers = velocities(sd3, "distilled")
    models = LoraModels(build_sd3().transformer, velocity, sd3.lora_targets, 2, teacher_velocity=teachers)
    with torch.no_grad():
        for i, name in enumerate(ADAPTERS):
            for weight in models.parameters(name):
                weight.normal_(std=0.05, generator=torch.Generator().manual_seed(i))
    return models


def test_teacher_examples_have_the_guided_teacher_as_target_and_the_others_no_guidance(sd3):
    models, scales = models_with_adapters(sd3), torch.tensor([4.0, 2.0, 7.5, 4.0])
    jumps = draw_jumps(4, 1.0, shift=(2.5, 4.5), generator=keyed_generator(0, 0))
    x, cond, text = noise_for(sd3), cond_for(sd3, scales), sd3.encode_text(CAPTIONS)

    def stock(x, t, name):  # the plain network, called by hand: no class of ours
        tokens, pooled = text[name + "tokens"], text[name + "pooled"]
        with torch.no_grad():
            return sd3.pipe.transformer(x, tokens, pooled, t * 1000, return_dict=False)[0]

    def guided(x, t):
        caption, nothing = stock(x, t, ""), stock(x, t, "empty_")
        return nothing + scales.view(4, 1, 1, 1) * (caption - nothing)

    t1, t2, t3 = (jumps.times[:, i].view(4, 1, 1, 1) for i in range(3))
    v1 = guided(x, jumps.times[:, 0])
    v2 = guided(x - (t1 - t2) * v1, jumps.times[:, 1])
    want = ((t1 - t2) * v1 + (t2 - t3) * v2) / (t1 - t3)
    for algorithm in ("dual_pure", "one_ema"):
        torch.testing.assert_close(
            consistency_target(x, jumps, models, cond, algorithm), want, rtol=0, atol=1e-4
        )

    own = jumps._replace(is_teacher=torch.zeros(4, dtype=torch.bool))
    ones = {**cond, "guidance": torch.ones(4)}
    fast = models.field("ema_fast")(x, own.times[:, 0], ones)
    slow = models.field("ema_slow")(x - (t1 - t2) * fast, own.times[:, 1], ones)
    want = ((t1 - t2) * fast + (t2 - t3) * slow) / (t1 - t3)
    torch.testing.assert_close(consistency_target(x, own, models, cond, "dual_pure"), want, rtol=0, atol=1e-5)


def test_the_distilled_student_is_evaluated_once_and_the_kept_one_twice(sd3):
    x, t, cond = noise_for(sd3), torch.full((4,), 0.5), cond_for(sd3, 4.0)
    guided_models = LoraModels(build_sd3().transformer, sd3.velocity, sd3.lora_targets, 2)
    for models, student in ((models_with_adapters(sd3), 4), (guided_models, 8)):
        rows, hook = rows_of(models.transformer)
        for name in ("student", "ema_fast", "ema_slow", "teacher"):
            getattr(models, name)(x, t, cond)
        hook.remove()
        assert rows == [student, student, student, 8]


@pytest.mark.slow
def test_a_distilled_run_samples_at_guidance_scale_1(folder, tmp_path, distill_sd3, dial_and_sample):
    out = tmp_path / "run"
    assert distill_sd3(out, guidance_mode="distilled", algorithm="dual_pure") == 0
    record = json.loads((out / "selection.json").read_text())
    assert record["guidance_mode"] == "distilled"
    run = DistillTrainer(config_of(out), progress=False)
    run.resume()
    stock = stock_of(folder)
    noise = noise_for(stock)
    teacher, plain = (
        sample(field_of(stock), noise, time_grid(2, 3.0), cond_for(stock, g)) for g in (4.5, 1.0)
    )
    torch.testing.assert_close(endpoints(run, "teacher", CAPTIONS, noise, 2), teacher, rtol=0, atol=1e-4)
    torch.testing.assert_close(endpoints(run, "student", CAPTIONS, noise, 2, 0.0), plain, rtol=0, atol=1e-4)
    ours = stock.decode(endpoints(run, "student", CAPTIONS, noise, 2))
    theirs = stock_of(folder, out / "student").sample_stock(CAPTIONS, noise, 2, 1.0, 3.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)

    config = InferenceConfig(lora=str(out)).resolved()
    config.check()
    assert (config.guidance_scale, config.teacher_guidance_scale) == (1.0, 4.5)
    bare = InferenceConfig(lora=str(out / "student")).resolved()  # without config.json the header says it
    assert (bare.guidance_scale, bare.teacher_guidance_scale) == (1.0, 4.5)
    assert dial_and_sample(out) == {1.0}  # scale 0 is no guidance at all, hence no choice
    rows = {
        (r["steps"], r["scale"]): r["distance"]
        for r in json.loads((out / "lora_scales.json").read_text())["curve"]
    }
    captions, noise = CAPTIONS[:2], start_noise(run.family, range(2), 1)

    def reached(steps):
        return endpoints(run, "teacher", captions, noise, steps)

    assert rows[1, 0.0] == pytest.approx(endpoint_distance(reached(1), reached(3)), abs=1e-5)
    assert "guidance_scale=1," in (out / "README.md").read_text()


STEP_SCALED = {
    "guidance_mode": "distilled",
    "algorithm": "step_scaled",
    "guidance_scale_range": "1,4.5",  # of no meaning: one student has one guidance scale
    "eval_lora_scales": "0.25,0.5,0.75,1,1.25",  # as they are by default: they mean nothing here
}


@pytest.mark.slow
def test_a_scale_that_is_the_step_size_and_guidance_in_the_weights(
    folder, tmp_path, distill_sd3, command, capsys, caplog
):
    """Three LoRAs: stock diffusers by the card's lines, ours, and the training's own field agree; half the
    run twice is the run; a file that is lost is named."""
    out, parts = tmp_path / "run", tmp_path / "parts"
    assert distill_sd3(out, **STEP_SCALED) == 0
    assert distill_sd3(parts, **STEP_SCALED, max_train_steps=1) == 0
    assert distill_sd3(parts, **STEP_SCALED) == 0
    names = [f"pytorch_lora_weights{end}.safetensors" for end in ("_0", "", "_2")]
    for name in names:
        whole, resumed = (load_file(path / "student" / name) for path in (out, parts))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert read_lora_scales(out / names[1]).powers == (0, 1, 2)

    run = DistillTrainer(config_of(out), progress=False)
    run.resume()
    assert run.draw(0, torch.tensor([0, 1]))[1].tolist() == [4.5, 4.5]
    stock, scale = stock_of(folder), 2**-0.85
    selected = json.loads((out / "selection.json").read_text())["selected"]
    noise = noise_for(stock)[:2]
    ours = endpoints(run, selected, CAPTIONS[:2], noise, 2, scale)
    assert (ours - endpoints(run, "teacher", CAPTIONS[:2], noise, 2)).abs().max() > 1e-3
    images = stock.decode(ours)

    card = (out / "README.md").read_text()
    line = next(row for row in card.splitlines() if row.startswith("| 2 |")).split("`")[1]
    assert line == 'pipe.set_adapters(["step_0", "step", "step_2"], [1, 0.5548, 0.3078])'
    loads = [row for row in card.splitlines() if row.startswith("pipe.load_lora_weights")]
    assert [row.split('"')[-2] for row in loads] == ["step", "step_0", "step_2"]  # else PEFT complains
    for row in (*loads, line):
        exec(row.replace('"run"', repr(str(out))), {"pipe": stock.pipe})
    theirs = stock.sample_stock(CAPTIONS[:2], noise, 2, 1.0, 3.0)
    assert "guidance_scale=1," in card and "that of the guidance at 1" in card
    torch.testing.assert_close(theirs, images, rtol=0, atol=1e-3)  # the card has four digits of a scale

    step_lora = StepLora(InferenceConfig(lora=str(out)), "cpu")
    assert (step_lora.config.guidance_scale, step_lora.config.teacher_guidance_scale) == (1.0, 4.5)
    assert step_lora.adapter_scales(0.5) == {"step_0": 1.0, "step": 0.5, "step_2": 0.25}
    assert set(step_lora.adapter_scales(0).values()) == {0.0}  # the teacher, guided
    torch.testing.assert_close(step_lora.endpoints(CAPTIONS[:2], noise, 2, scale), ours, rtol=0, atol=1e-4)
    fused = tmp_path / "fused"
    assert command("export", lora=out, steps=2, output_dir=fused) == 0
    assert json.loads((fused / "export.json").read_text())["differences"]["mean"] < 1e-3
    dial = {"num_prompts": 2, "steps": "1,2", "lora_scales": 1, "target_steps": 3}
    assert command("dial", lora=parts, **dial) == 0
    assert read_lora_scales(parts / names[1]).powers == (0, 1, 2)

    # a folder without config.json: the header says it
    bare = InferenceConfig(lora=str(out / "student")).resolved()
    assert (bare.guidance_scale, bare.teacher_guidance_scale, bare.guidance_inside) == (1.0, 4.5, True)
    images, _ = generate(step_lora, CAPTIONS[:2], 2, 0.0)  # at scale 0 the teacher, guided
    teachers = stock_of(folder).sample_stock(
        CAPTIONS[:2], start_noise(stock, range(2), step_lora.config.seed), 2, 4.5, 3.0
    )
    torch.testing.assert_close(images, teachers, rtol=0, atol=1e-4)
    schedule = {**dial, "lora_scales": 0.25, "per_step": 2}
    assert command("dial", lora=parts, **schedule) == 0
    dialled = read_lora_scales(parts / names[1])
    assert dialled.guidance == 4.5 and min(min(dialled.schedules)) > 0  # at 0 the guidance would be gone
    card = (parts / "README.md").read_text()
    assert "algorithm step_scaled" in card and "Guidance scale 4.5 is in the weights" in card
    assert '`pipe.set_adapters(["step_0", "step", "step_2"], [1, 0.25, 0.0625])`' in card
    capsys.readouterr()
    assert command("dial", lora=parts, **{**dial, "lora_scales": 0}) == 2
    assert "has no guidance: give --lora_scales above 0" in capsys.readouterr().err
    twice = {"prompt": "a star", "steps": 1, "guidance_scale": 4.5, "output": tmp_path / "b.png"}
    assert command("sample", lora=out, **twice) == 0
    assert "is now there twice" in caplog.text

    (out / names[0]).unlink()
    assert command("sample", lora=out, prompt="a star", steps=2, output=tmp_path / "a.png") == 2
    assert f"{names[0]} is not beside it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "pipeline, change, message",
    [
        ("sd3", {"guidance_mode": "distilled"}, "dual_pure or one_ema"),
        ("sd3", {"guidance_mode": "both"}, "kept or distilled"),
        ("sd3", {"height": 64}, "at most 48 a side"),
        ("sd3", {"height": 30}, "multiples of 4"),
        ("sd3", {"max_sequence_length": 600}, "1 to 512"),
        ("flux", {"guidance_mode": "distilled", "algorithm": "dual_pure"}, "guidance_mode kept"),
    ],
)
def test_bad_input_is_one_line_and_code_2(distill_sd3, tmp_path, capsys, pipeline, change, message):
    more = {"pretrained_model_name_or_path": FLUX} if pipeline == "flux" else {}
    assert distill_sd3(tmp_path / "run", **more, **change) == 2
    message_shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert message_shown.startswith("scfm distill: ") and message in message_shown
    assert not (tmp_path / "run").exists()
