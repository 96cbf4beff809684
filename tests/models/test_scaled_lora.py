"""Many LoRA scales in one forward: equal to one forward each, in whatever family, with and without
recomputation; files that stock diffusers adds up."""

import subprocess
import sys

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file

from scfm.method.consistency import TARGET_MODELS, consistency_target, draw_jumps, velocity_by_row
from scfm.method.distill import SCFMConfig, make_emas, make_optimizer
from scfm.method.flow import sample, time_grid
from scfm.method.step_scale import StepScale, draw_step_jumps, step_scale_loss, step_scale_target
from scfm.models.family import velocities
from scfm.models.flux import Flux
from scfm.models.lora import ADAPTERS, WEIGHT_NAME, LoraModels, adapter_state, load_adapter_state
from scfm.models.pixels import Pixels, pipeline_of
from scfm.models.scaled_lora import MODELS, ScaledLoraModels, power_file
from scfm.models.sd3 import SD3
from scfm.models.unet import UNetFlow
from scfm.streams import keyed_generator
from toy.pipelines import TOKENS, build_flux, build_sd3

SCALES = torch.tensor([0.0, 0.3, 1.0, 0.5])
GUIDANCE = torch.tensor([2.5, 1.0, 4.0, 0.0])  # guided and unguided examples in one batch


def build_flow():
    torch.manual_seed(0)
    pipe = pipeline_of(UNetFlow("tiny", classes=4).eval(), ("star", "ring", "cross", "dot"))
    for p in pipe.transformer.parameters():  # whose last layer starts at zero
        p.data.add_(0.02 * torch.randn(p.shape))
    return pipe


BUILDS = {"flux": (build_flux, Flux), "sd3": (build_sd3, SD3), "pixels": (build_flow, Pixels)}


class Setup:
    """Four examples, and models whose adapters are random."""

    def __init__(
        self,
        name: str,
        order: int,
        dtype: torch.dtype = torch.float32,
        alpha: int | None = None,
        guidance: bool = False,
    ):
        self.build, kind = BUILDS[name]
        self.pipe = self.build()
        self.pipe.transformer.to(dtype)
        self.family = kind(self.pipe, 32, 32, TOKENS)
        text = self.family.encode_text(["a red star", "a small blue ring", "a cross", "a large green ring"])
        text = {k: v.to(dtype) if v.is_floating_point() else v for k, v in text.items()}
        self.cond = {**text, "guidance": GUIDANCE}
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(4, *self.family.latent_shape, generator=generator)
        self.t = torch.tensor([0.9, 0.2, 0.6, 0.4])
        with torch.no_grad():
            self.teacher = self.family.velocity(self.pipe.transformer, self.x, self.t, self.cond)
        torch.manual_seed(0)
        velocity, teachers = velocities(self.family, "distilled" if guidance else "kept")
        self.models = ScaledLoraModels(
            self.pipe.transformer,
            velocity,
            self.family.lora_targets,
            rank=3,
            alpha=alpha,
            order=order,
            forward_rows=self.family.forward_rows,
            teacher_velocity=teachers if guidance else None,
        )
        for model in MODELS:
            for p in self.models.parameters(model):
                p.data.add_(0.05 * torch.randn(p.shape, generator=generator))

    def at(self, model: str) -> torch.Tensor:
        return self.models.scaled_velocity(model, SCALES, self.x, self.t, self.cond)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    "family, dtype, tolerance",
    [
        ("flux", torch.float32, 1e-5),
        ("sd3", torch.float32, 1e-5),
        ("pixels", torch.float32, 1e-5),
        ("flux", torch.bfloat16, 0.06),
        ("sd3", torch.bfloat16, 0.06),
    ],
)
def test_one_forward_for_all_scales_is_one_for_each(family, order, dtype, tolerance):
    setup = Setup(family, order, dtype)
    for model in MODELS:
        together = setup.at(model).detach()
        for i, scale in enumerate(SCALES.tolist()):
            alone = setup.models.field(model, scale)(setup.x, setup.t, setup.cond)[i]
            torch.testing.assert_close(together[i], alone, rtol=0, atol=tolerance)
        assert torch.equal(together[0], setup.teacher[0])  # at scale 0, to the last bit
        assert (together[1:] - setup.teacher[1:]).abs().amin(0).max() > 0.01
    assert torch.equal(setup.models.field("teacher")(setup.x, setup.t, setup.cond), setup.teacher)


@pytest.mark.parametrize("order", [1, 2])
def test_the_weights_at_a_scale_are_the_base_and_the_powers_times_the_products(order):
    """By weights that are added up, not by PEFT; alpha is twice the rank."""
    setup = Setup("flux", order, alpha=6)
    ours = setup.models.field("student", 0.7)(setup.x, setup.t, setup.cond)
    plain = build_flux().transformer
    weights = dict(plain.named_parameters())
    trained = dict(setup.pipe.transformer.named_parameters())
    for power, adapter in enumerate(setup.models.adapters["student"], 1):
        for name in [name for name in trained if f".lora_A.{adapter}." in name]:
            product = trained[name.replace("lora_A", "lora_B")] @ trained[name]
            layer = name.replace(f".lora_A.{adapter}", "")
            weights[layer] = weights[layer] + 2 * 0.7**power * product
    inputs = setup.x, setup.t, setup.cond
    with torch.no_grad():
        merged = torch.func.functional_call(Caller(plain, setup.family), prefixed(weights), inputs)
    torch.testing.assert_close(ours, merged, rtol=0, atol=1e-4)


class Caller(torch.nn.Module):
    """A family's velocity as a module."""

    def __init__(self, transformer: torch.nn.Module, family: Flux):
        super().__init__()
        self.transformer, self.family = transformer, family

    def forward(self, x, t, cond):
        return self.family.velocity(self.transformer, x, t, cond)


def prefixed(weights):
    return {f"transformer.{name}": value for name, value in weights.items()}


def gradients(setup: Setup, disturb: bool) -> list[torch.Tensor]:
    """Of the loss. disturb: other models are evaluated between forward and backward."""
    for p in setup.models.parameters("student"):
        p.grad = None
    jumps = draw_step_jumps(4, StepScale(), (3.0, 3.0), generator=keyed_generator(5, 0))
    noise = torch.randn(setup.x.shape, generator=keyed_generator(6, 0))
    losses = step_scale_loss(setup.x, noise, jumps, setup.models, StepScale(), setup.cond)
    if disturb:
        setup.models.field("student", 0.9)(setup.x, setup.t, setup.cond)
        setup.models.field("teacher")(setup.x, setup.t, setup.cond)
        setup.models.scaled_velocity("ema", SCALES, setup.x, setup.t, setup.cond)
    losses.mean().backward()
    return [p.grad for p in setup.models.parameters("student")]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("family", ["flux", "sd3", "pixels"])
def test_the_gradient_is_that_of_one_forward_for_each_also_when_recomputed(family, order):
    setup = Setup(family, order)
    ours = [g.clone() for g in gradients(setup, disturb=False)]
    assert all(p.grad is None for p in setup.models.parameters("ema"))
    if family != "pixels":  # whose network has none
        setup.pipe.transformer.enable_gradient_checkpointing()
        setup.pipe.transformer.train()
    for a, b in zip(ours, gradients(setup, disturb=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)
    for a, b in zip(ours, one_at_a_time(setup), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)


def one_at_a_time(setup: Setup) -> list[torch.Tensor]:
    """The gradient of the same loss, an example a forward, each at its one scale."""
    models, rule = setup.models, StepScale()
    for p in models.parameters("student"):
        p.grad = None
    jumps = draw_step_jumps(4, rule, (3.0, 3.0), generator=keyed_generator(5, 0))
    noise = torch.randn(setup.x.shape, generator=keyed_generator(6, 0))
    t1 = jumps.t1.view(-1, *[1] * (setup.x.ndim - 1))
    x1 = (1 - t1) * setup.x + t1 * noise
    target = step_scale_target(x1, jumps, models, rule, setup.cond)
    for i in range(4):
        row = slice(i, i + 1)
        cond = {name: part[row] for name, part in setup.cond.items()}
        scale = torch.tensor([rule.scale(int(jumps.steps[i]) // 2)])
        v = models.scaled_velocity("student", scale, x1[row], jumps.t1[row], cond)
        ((v - target[row]).square().mean() / 4).backward()
    return [p.grad for p in models.parameters("student")]


def test_more_rows_than_scales_are_refused():
    setup = Setup("sd3", 1)
    setup.models.forward_rows = lambda cond: None
    with pytest.raises(ValueError, match="4 LoRA scales for 6 rows"):
        setup.at("ema")


class Four(Setup):
    """The same with the paper's four models."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32):
        super().__init__(name, 1, dtype)
        pipe = {"flux": build_flux, "sd3": build_sd3, "pixels": build_flow}[name]()
        pipe.transformer.to(dtype)
        family = type(self.family)(pipe, 32, 32, TOKENS)
        self.models = LoraModels(
            pipe.transformer, family.velocity, family.lora_targets, 3, forward_rows=family.forward_rows
        )
        generator = torch.Generator().manual_seed(2)
        for model in ADAPTERS:
            for p in self.models.parameters(model):
                p.data.add_(0.05 * torch.randn(p.shape, generator=generator))


class Apart:
    """The same models, each evaluated on its own examples alone."""

    def __init__(self, models: LoraModels):
        self.student, self.teacher = models.student, models.teacher
        self.ema_fast, self.ema_slow = models.ema_fast, models.ema_slow


@pytest.mark.parametrize("ema_scale", [1.0, 0.7])
@pytest.mark.parametrize("algorithm", list(TARGET_MODELS))
@pytest.mark.parametrize("family", ["flux", "sd3", "pixels"])
def test_a_target_of_one_forward_a_half_is_that_of_each_model_apart(family, algorithm, ema_scale):
    four = Four(family)
    four.models.ema_target_scale = ema_scale
    calls = []
    hook = four.models.transformer.register_forward_hook(lambda *_: calls.append(1))
    jumps = draw_jumps(4, 0.5, shift=(3.0, 3.0), generator=keyed_generator(1, 0))
    assert 0 < jumps.is_teacher.sum() < 4
    ours = consistency_target(four.x, jumps, four.models, four.cond, algorithm)
    assert len(calls) == 2
    apart = consistency_target(four.x, jumps, Apart(four.models), four.cond, algorithm)
    hook.remove()
    torch.testing.assert_close(ours, apart, rtol=0, atol=1e-5)
    swapped = jumps._replace(is_teacher=~jumps.is_teacher)
    assert (ours - consistency_target(four.x, swapped, four.models, four.cond, algorithm)).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_teacher_examples_get_the_teachers_velocity_to_the_last_bit(family, dtype):
    four, mask = Four(family, dtype), torch.tensor([True, False, True, False])
    mixed = velocity_by_row(four.models, ("teacher", "ema_fast"), mask, four.x, four.t, four.cond)
    assert torch.equal(mixed[mask], four.models.teacher(four.x, four.t, four.cond)[mask])
    torch.testing.assert_close(
        mixed[~mask], four.models.ema_fast(four.x, four.t, four.cond)[~mask], rtol=0, atol=0.06
    )
    assert (mixed[~mask] - four.models.teacher(four.x, four.t, four.cond)[~mask]).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapters_stay_in_float32_and_multiply_in_the_dtype_of_the_base(dtype):
    four, seen = Four("flux", dtype), set()
    layer = four.models.transformer.x_embedder
    assert {w.dtype for name in ADAPTERS for w in four.models.parameters(name)} == {torch.float32}

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                seen.update(a.dtype for a in args if isinstance(a, torch.Tensor))
            return function(*args, **(kwargs or {}))

    x = torch.randn(2, 5, layer.in_features, dtype=dtype)
    with Seen():
        y = layer(x)
    assert seen == {dtype} and y.dtype == dtype
    y.float().square().mean().backward()
    assert layer.lora_A["student"].weight.grad.dtype == torch.float32


def test_an_adapter_whose_name_begins_with_anothers_is_kept_apart():
    models = Setup("flux", 2).models
    states = {name: adapter_state(models.transformer, name) for name in models.adapter_names}
    for name, state in states.items():
        assert list(map(len, (state, states["ema"]))) == [len(models.tensors[name])] * 2
        assert all(".lora_A.weight" in key or ".lora_B.weight" in key for key in state)
    load_adapter_state(models.transformer, "ema", states["student"])
    assert all(map(torch.equal, models.tensors["ema"], models.tensors["student"]))
    assert not any(map(torch.equal, models.tensors["ema_2"], models.tensors["student_2"]))


def test_the_ema_starts_as_the_student_and_both_as_the_teacher():
    pipe = build_flux()
    family = Flux(pipe, 32, 32, TOKENS)
    models = ScaledLoraModels(pipe.transformer, family.velocity, family.lora_targets, 2)
    pairs = list(zip(models.parameters("student"), models.parameters("ema"), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(a.requires_grad and not b.requires_grad for a, b in pairs)
    products = [p for p in models.parameters("student") if not p.any()]
    assert len(products) == len(pairs) / 2  # B starts at zero, A does not, and the two A differ
    half = len(pairs) // 2
    assert not torch.equal(pairs[0][0], pairs[half][0])


STOCK = """
import sys, torch
from diffusers import FluxPipeline
pipe = FluxPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
pipe.load_lora_weights(sys.argv[2], weight_name="pytorch_lora_weights.safetensors", adapter_name="step")
pipe.load_lora_weights(sys.argv[2], weight_name="pytorch_lora_weights_2.safetensors", adapter_name="step_2")
for n in (1, 2, 3, 5, 8):
    pipe.set_adapters(["step", "step_2"], [n ** -0.85, n ** -1.7])
    image = pipe("a red star", num_inference_steps=n, sigmas=[1 - i / n for i in range(n)], height=32,
                 width=32, max_sequence_length=16, guidance_scale=2.5, output_type="latent",
                 latents=torch.load(sys.argv[3])).images
    torch.save(image, f"{sys.argv[3]}.{n}")
assert "scfm" not in sys.modules
"""


@pytest.mark.slow
def test_stock_diffusers_samples_the_pair_at_any_step_count(tmp_path):
    """Without scfm: the endpoints are those of our own field at the scale of the rule."""
    setup, rule = Setup("flux", 2), StepScale()
    shift = setup.pipe.scheduler.config.shift
    setup.models.save(FluxPipeline, tmp_path / "lora", "student")
    build_flux().save_pretrained(tmp_path / "base")
    noise = setup.x[:1]
    torch.save(noise, tmp_path / "noise")
    words = [str(tmp_path / name) for name in ("base", "lora", "noise")]
    subprocess.run([sys.executable, "-c", STOCK, *words], check=True, cwd=tmp_path)
    cond = {name: part[:1] for name, part in setup.cond.items()}
    for n in (1, 2, 3, 5, 8):
        field = setup.models.field("student", rule.scale(n))
        ours = sample(lambda x, t, _, field=field: field(x, t, cond), noise, time_grid(n, shift))
        theirs = torch.load(tmp_path / f"noise.{n}", weights_only=True)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_a_pair_lies_in_two_files(tmp_path):
    setup = Setup("flux", 2, alpha=6)
    first = setup.models.save(FluxPipeline, tmp_path, "ema")
    assert first == tmp_path / WEIGHT_NAME and power_file(first, 2).is_file()
    for adapter, path in zip(setup.models.adapters["ema"], (first, power_file(first, 2)), strict=True):
        saved = load_file(path)
        key = next(name for name in saved if "lora_B" in name)
        mine = dict(setup.pipe.transformer.named_parameters())[
            key.removeprefix("transformer.").replace("lora_B", f"lora_B.{adapter}")
        ]
        assert torch.equal(saved[key], 2 * mine)  # alpha / rank is multiplied in


# guidance distilled into the weights


def unguided_sum(setup: Setup, model: str, scale: float) -> torch.Tensor:
    """The velocities of the base with all LoRAs of a model added to its weights, guidance left out."""
    trained = dict(setup.pipe.transformer.named_parameters())
    plain = setup.build().transformer
    weights = dict(plain.named_parameters())
    for power, adapter in zip((0, 1, 2), setup.models.adapters[model], strict=False):
        for name in [name for name in trained if f".lora_A.{adapter}." in name]:
            a, b = trained[name], trained[name.replace("lora_A", "lora_B")]
            layer = name.replace(f".lora_A.{adapter}", "")
            product = (b.flatten(1) @ a.flatten(1)).view(weights[layer].shape)
            weights[layer] = weights[layer] + scale**power * product
    cond = {**setup.cond, "guidance": torch.ones(4)}
    with torch.no_grad():
        return torch.func.functional_call(
            Caller(plain, setup.family), prefixed(weights), (setup.x, setup.t, cond)
        )


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("family", ["sd3", "pixels"])
def test_where_guidance_is_distilled_one_lora_more_counts_at_every_scale(family, order):
    """Held to weights that are added up by hand; at scale 0 the EMA is the guided teacher."""
    setup = Setup(family, order, guidance=True)
    assert setup.models.powers == (0, 1, 2)[: order + 1]
    ema, student = setup.at("ema"), setup.at("student").detach()
    for i, scale in enumerate(SCALES.tolist()):
        if scale:
            torch.testing.assert_close(ema[i], unguided_sum(setup, "ema", scale)[i], rtol=0, atol=1e-4)
            torch.testing.assert_close(
                student[i], unguided_sum(setup, "student", scale)[i], rtol=0, atol=1e-4
            )
    torch.testing.assert_close(ema[0], setup.teacher[0], rtol=0, atol=1e-5)
    for model in ("teacher", "student", "ema"):
        assert torch.equal(setup.models.field(model, 0.0)(setup.x, setup.t, setup.cond), setup.teacher)


def test_where_guidance_is_distilled_the_teacher_alone_is_evaluated_twice():
    setup, rows = Setup("sd3", 2, guidance=True), []
    hook = setup.models.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    setup.at("student")
    assert rows == [4]
    rows.clear()
    setup.models.scaled_velocity("ema", torch.tensor([0.0, 0.3, 0.0, 0.5]), setup.x, setup.t, setup.cond)
    assert rows == [4, 2]  # both teacher's examples are guided, 2.5 and 4
    rows.clear()
    setup.models.scaled_velocity("ema", torch.zeros(4), setup.x, setup.t, setup.cond)
    hook.remove()
    assert rows == [6]


@pytest.mark.parametrize("order", [1, 2])
def test_the_gradient_of_the_guidances_lora_is_that_of_one_forward_for_each(order):
    setup = Setup("sd3", order, guidance=True)
    ours = [g.clone() for g in gradients(setup, disturb=True)]
    assert len(setup.models.by_power("student")[0]) * (order + 1) == len(ours)
    assert all(any(p.grad.any() for p in part) for part in setup.models.by_power("student").values())
    for a, b in zip(ours, one_at_a_time(setup), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)


def test_the_guidances_lora_learns_at_the_plain_rate_and_has_the_short_ema():
    setup = Setup("sd3", 2, guidance=True)
    config = SCFMConfig(algorithm="step_scaled", learning_rate=1e-4, ema_decay=0.5)
    optimizer, _ = make_optimizer(setup.models, config)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [1e-4, config.rate_of_differences, config.rate_of_differences]
    emas = make_emas(setup.models, config)  # which are copies now
    before = [p.clone() for p in setup.models.parameters("ema")]
    for p in setup.models.parameters("student"):
        p.data.add_(1)
    emas.update()
    for old, new in zip(before, setup.models.parameters("ema"), strict=True):
        torch.testing.assert_close(new - old, torch.full_like(old, 0.5))


def test_the_guidances_lora_lies_beside_the_pair(tmp_path):
    setup = Setup("sd3", 2, guidance=True)
    first = setup.models.save(StableDiffusion3Pipeline, tmp_path, "student")
    names = {path.name for path in tmp_path.glob("*.safetensors")}
    assert first.name == WEIGHT_NAME and names == {power_file(first, power).name for power in (0, 1, 2)}


def test_models_of_a_family_that_does_not_say_whose_rows_are_whose_are_evaluated_apart():
    four = Four("sd3")
    expected = consistency_target(four.x, jumps := some_jumps(), four.models, four.cond)
    four.models.forward_rows, rows = None, []
    hook = four.models.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    apart = consistency_target(four.x, jumps, four.models, four.cond)
    hook.remove()
    assert len(rows) == 3  # teacher and fast EMA each on its own examples, then the slow EMA on all
    torch.testing.assert_close(apart, expected, rtol=0, atol=1e-5)


def some_jumps():
    return draw_jumps(4, 0.5, shift=(3.0, 3.0), generator=keyed_generator(1, 0))
