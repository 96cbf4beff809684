"""Every sampler of an evaluation beside diffusers' own, and what an image costs."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from scfm.evaluation.external_models import parse_external_model
from scfm.evaluation.image_store import generate_set
from scfm.evaluation.latency import measure_latency
from scfm.evaluation.samplers import lora_digest, reference_samplers
from scfm.evaluation.solvers import conditioned_field, dpm_solver_pp, second_order
from scfm.inference.config import InferenceConfig
from scfm.inference.step_lora import StepLora, fixed_shift
from scfm.method.lora_scale import LoraScales
from scfm.models.flux import Flux
from scfm.models.lora import WEIGHT_NAME
from scfm.models.lora_file import write_lora_scales
from scfm.models.sampling import start_noise, stock_latents
from toy.pipelines import FLUX, TOKENS, WEIGHTS, load_flux

CAPTIONS = ["a large red cross", "a small blue ring on the left", "a pink star"]


def noise_for(family):
    return start_noise(family, range(3), 5)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_samplers_of_a_lora_are_the_stock_pipelines(lora, steps):
    step_lora = StepLora(InferenceConfig(lora=str(lora)), "cpu")
    samplers = {sampler.name: sampler for sampler in reference_samplers(step_lora, [steps], 4)}
    noise, family, pipe = noise_for(step_lora.family), step_lora.family, load_flux()
    plain = Flux(pipe, 32, 32, TOKENS)
    ours = {name: family.decode(sampler.latents(CAPTIONS, noise)) for name, sampler in samplers.items()}
    theirs = {f"teacher-{n}": plain.sample_stock(CAPTIONS, noise, n, 2.5, 3.0) for n in (4, steps)}
    stock = pipe(
        CAPTIONS,
        height=32,
        width=32,
        num_inference_steps=steps,
        guidance_scale=2.5,
        latents=noise,
        max_sequence_length=TOKENS,
        output_type="pt",
    ).images
    theirs[f"teacher-stock-{steps}"] = stock * 2 - 1
    pipe.load_lora_weights(str(lora), adapter_name="a")
    pipe.set_adapters(["a"], [step_lora.lora_scales.scale(steps)])
    theirs[f"student-{steps}"] = plain.sample_stock(CAPTIONS, noise, steps, 2.5, 3.0)
    for name, image in theirs.items():
        torch.testing.assert_close(ours[name], image, rtol=0, atol=2e-5, msg=name)
    assert not torch.allclose(ours[f"student-{steps}"], ours[f"teacher-{steps}"], atol=0.1)


def test_what_a_sampler_depends_on_is_in_its_settings(lora):
    step_lora = StepLora(InferenceConfig(lora=str(lora), teacher_guidance_scale=1.5), "cpu")
    step_lora.lora_scales = LoraScales((2,), (0.75,), 3.0, ((0.5, 1.0),))
    samplers = {sampler.name: sampler for sampler in reference_samplers(step_lora, [2], 4)}
    assert [sampler.kind for sampler in samplers.values()] == ["teacher", "student", *["solver"] * 5]
    assert samplers["teacher-4"].settings == {
        "steps": 4,
        "guidance_scale": 1.5,
        "shift": 3.0,
        "solver": "Euler",
    }
    assert samplers["student-2"].settings == {
        "steps": 2,
        "guidance_scale": 2.5,
        "shift": 3.0,
        "lora_scale": [0.5, 1.0],
        "lora": lora_digest(lora / WEIGHT_NAME),
    }
    assert samplers["teacher-stock-2"].settings == {"steps": 2, "guidance_scale": 1.5, "solver": "stock"}


def test_the_digest_of_a_lora_is_of_its_tensors_alone(lora):
    path = lora / WEIGHT_NAME
    before = lora_digest(path)
    write_lora_scales(path, LoraScales((2,), (0.75,), 3.0))
    assert lora_digest(path) == before


@pytest.mark.parametrize(
    "evaluations, solver", [(3, "heun"), (5, "heun"), (2, "heun"), (4, "midpoint"), (3, "midpoint")]
)
def test_second_order_costs_what_it_says(flux, evaluations, solver):
    calls = []
    hook = flux.pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    second_order(flux, CAPTIONS, noise_for(flux), evaluations, 2.5, 3.0, solver)
    hook.remove()
    assert len(calls) == evaluations


@pytest.mark.parametrize("evaluations", [3, 5])
def test_heun_is_diffusers_heun(flux, evaluations):
    noise, solver = noise_for(flux), FlowMatchHeunDiscreteScheduler(shift=3.0)
    steps = (evaluations + 1) // 2
    solver.set_timesteps(steps)
    # its own grid runs from 1 to 1/1000 before the zero: it gets ours, every inner time twice
    times = torch.tensor([3 * t / (1 + 2 * t) for t in (1 - i / steps for i in range(steps))] + [0.0])
    solver.sigmas = torch.cat([times[:1], times[1:-1].repeat_interleave(2), times[-1:]])
    solver.timesteps = 1000 * solver.sigmas[:-1]
    field, x = conditioned_field(flux, CAPTIONS, 2.5), noise
    with torch.no_grad():
        for t in solver.timesteps:
            x = solver.step(field(x, (t / 1000).expand(3)), t, x).prev_sample
    ours = second_order(flux, CAPTIONS, noise, evaluations, 2.5, 3.0, "heun")
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_multistep_solver_is_that_of_the_stock_pipeline(sd3, guidance):
    """SD3's pipeline takes it as it is (Flux's insists on a shift of its own), and rounds the times down to
    thousandths, which we do not: hence the tolerance, a hundredth of the latents' spread."""
    noise = noise_for(sd3)
    solver = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0
    )
    stock = stock_latents(sd3, CAPTIONS, noise, 4, guidance, solver, grid=False)
    ours = dpm_solver_pp(sd3, CAPTIONS, noise, 4, guidance, 2.0)
    torch.testing.assert_close(ours, stock, rtol=0, atol=0.02)


def test_a_fixed_shift_holds_where_the_pipeline_would_choose_its_own(flux):
    """FLUX.1-dev's scheduler ignores set_shift; this one has its settings."""
    moving = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    fixed, own, plain = (
        stock_latents(flux, CAPTIONS, noise_for(flux), 3, 2.5, scheduler)
        for scheduler in (fixed_shift(3.0), moving, flux.pipe.scheduler)
    )
    torch.testing.assert_close(fixed, plain, rtol=0, atol=1e-6)
    assert not torch.allclose(fixed, own, atol=0.01)


@pytest.mark.parametrize("guidance, evaluations", [(1.0, 3), (3.0, 6)])
def test_evaluations_are_counted_and_guidance_by_a_second_example_counts_twice(sd3, guidance, evaluations):
    def latents(captions, noise):
        return stock_latents(sd3, captions, noise, 3, guidance, sd3.pipe.scheduler)

    sampler = SimpleNamespace(network=sd3.pipe.transformer, latents=latents)
    latency = measure_latency(sampler, sd3, CAPTIONS, 0, 1, "cpu")
    assert latency["evaluations"] == evaluations
    assert 0 < latency["network_seconds"] < latency["seconds"]
    assert not sd3.pipe.transformer._forward_hooks and not sd3.pipe.transformer._forward_pre_hooks


def test_the_negative_prompt_reaches_the_stock_pipeline(sd3):
    noise, scheduler = noise_for(sd3), sd3.pipe.scheduler
    plain = stock_latents(sd3, CAPTIONS, noise, 2, 3.0, scheduler)
    sd3.negative_prompt = "a red star"
    try:
        guided = stock_latents(sd3, CAPTIONS, noise, 2, 3.0, scheduler)
        again = sd3.sample_stock(CAPTIONS, noise, 2, 3.0)
    finally:
        sd3.negative_prompt = ""
    assert not torch.equal(plain, guided)
    torch.testing.assert_close(sd3.decode(guided), again, rtol=0, atol=1e-5)


def test_images_of_another_sampler_are_refused(tmp_path, flux):
    sampler = SimpleNamespace(settings={"lora_scale": 1}, latents=lambda captions, noise: noise, images=None)
    generate_set(sampler, flux, CAPTIONS, tmp_path / "a", 0)
    sampler.settings = {"lora_scale": 0.5}
    with pytest.raises(ValueError, match="images of another lora_scale"):
        generate_set(sampler, flux, CAPTIONS, tmp_path / "a", 0)


@pytest.mark.parametrize("name", ["00000.png", "settings.json"])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path, flux, name):
    (tmp_path / name).write_text("[1, 2]")
    sampler = SimpleNamespace(settings={"steps": 1}, latents=lambda captions, noise: noise, images=None)
    with pytest.raises(ValueError, match="take another --output_dir"):
        generate_set(sampler, flux, CAPTIONS, tmp_path, 0)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["[1, 2]"]


def test_an_external_model_in_full():
    words = "lora_scale=.125,steps=4+8,guidance_scale=3.5,inference_shift=3"
    model = parse_external_model(f"hyper={WEIGHTS / 'lora'},{words}")
    assert (model.name, model.lora_scale, model.steps) == ("hyper", 0.125, (4, 8))
    assert (model.guidance_scale, model.inference_shift, model.is_pipeline) == (3.5, 3.0, False)
    assert model.path.name == WEIGHT_NAME and parse_external_model(f"schnell={FLUX}").is_pipeline
