"""Four models on one base: the adapter trap, precision, and files that a stock model loads."""

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from scfm.method.distill import Batch, SCFMConfig, make_emas, make_optimizer, sample_batch, train_step
from scfm.models.flux import Flux
from scfm.models.lora import ADAPTERS, LoraModels, adapter_parameters, add_adapters, save_lora
from toy.pipelines import build_flux

N, TEXT = 16, 8


def transformer(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).to(dtype)


def velocity(model, x, t, cond):
    dtype = cond["tokens"].dtype
    return model(
        hidden_states=x.to(dtype),
        timestep=t.to(dtype),
        guidance=cond["guidance"],
        pooled_projections=cond["pooled"],
        encoder_hidden_states=cond["tokens"],
        txt_ids=torch.zeros(TEXT, 3),
        img_ids=torch.zeros(N, 3),
        return_dict=False,
    )[0].to(x.dtype)


def inputs(n=4, dtype=torch.float32):
    g = torch.Generator().manual_seed(5)
    cond = {
        "tokens": torch.randn(n, TEXT, 32, generator=g).to(dtype),
        "pooled": torch.randn(n, 32, generator=g).to(dtype),
        "guidance": torch.full((n,), 3.5, dtype=dtype),
    }
    return torch.randn(n, N, 16, generator=g), torch.rand(n, generator=g), cond


def models(dtype=torch.float32, **options):
    made = LoraModels(transformer(dtype=dtype), velocity, Flux.lora_targets, **{"rank": 4, **options})
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name in ADAPTERS:
            for p in made.parameters(name):
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    return made


def pipeline_around(model):
    """A stock FluxPipeline of nothing but a transformer."""
    nothing = dict.fromkeys(
        ["scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
    )
    return FluxPipeline(transformer=model, **nothing)


def test_all_models_start_as_the_teacher():
    fresh = LoraModels(transformer(), velocity, Flux.lora_targets, rank=4)
    x, t, cond = inputs()
    velocities = [getattr(fresh, n)(x, t, cond) for n in ("teacher", *ADAPTERS)]
    assert all(torch.equal(velocities[0], v) for v in velocities[1:])
    assert torch.equal(velocities[0], velocity(transformer(), x, t, cond))
    for a, b in (("student", "ema_fast"), ("student", "ema_slow")):
        assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(a), fresh.parameters(b), strict=False))


def test_every_model_speaks_for_itself_and_hands_back_to_the_student():
    four = models()
    x, t, cond = inputs()
    velocities = [getattr(four, n)(x, t, cond) for n in ("teacher", *ADAPTERS)]
    for i in range(4):
        assert four.switch.active == {"student": 1}
        for j in range(i):
            assert not torch.allclose(velocities[i], velocities[j], atol=1e-4)
    assert torch.equal(velocities[0], velocity(transformer(), x, t, cond))
    assert [v.requires_grad for v in velocities] == [False, True, False, False]


def test_the_student_is_active_again_after_an_error():
    four = models()
    for name in ("teacher", "ema_fast", "ema_slow"):
        with pytest.raises(RuntimeError):
            with four.using(name):
                raise RuntimeError("as when memory runs out")
        assert four.switch.active == {"student": 1}
    assert {n.split(".")[-2] for n, p in four.transformer.named_parameters() if p.requires_grad} == {
        "student"
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_plain_autograd_on_a_merged_copy(checkpointing):
    four = models(alpha=8)
    x, t, cond = inputs()
    if checkpointing:
        four.transformer.enable_gradient_checkpointing()
        four.transformer.train()
    target = four.ema_slow(x, t, cond)
    loss = (four.student(x, t, cond) - target).square().mean()
    four.teacher(x, t, cond), four.ema_fast(x, t, cond)  # others are evaluated between forward and backward
    loss.backward()
    ours = [p.grad for p in four.parameters("student")]
    assert all(g is not None for g in ours)

    plain = transformer().requires_grad_(False)
    leaves = [p.detach().clone().requires_grad_() for p in four.parameters("student")]
    names = [
        n.replace(".lora_A.student", "")
        for n, _ in four.transformer.named_parameters()
        if "lora_A.student" in n
    ]
    weights = dict(plain.named_parameters())
    for a, b, name in zip(leaves[::2], leaves[1::2], names, strict=False):
        weights[name] = weights[name] + 8 / 4 * b @ a
    velocities = velocity(lambda **k: torch.func.functional_call(plain, weights, kwargs=k), x, t, cond)
    (velocities - target).square().mean().backward()
    for mine, theirs in zip(ours, (p.grad for p in leaves), strict=False):
        assert (mine - theirs).norm() <= 1e-3 * theirs.norm() + 1e-9
    assert all(p.grad is None for n in ("ema_fast", "ema_slow") for p in four.parameters(n))


def test_targets_cover_every_linear_layer_of_flux():
    model = transformer()
    linears = sum(isinstance(m, torch.nn.Linear) for m in model.modules())
    add_adapters(model, Flux.lora_targets, 2)
    assert len(adapter_parameters(model, "student")) == 2 * linears


def test_adapters_are_fp32_on_a_bf16_base_and_the_slow_ema_moves():
    four = LoraModels(transformer(dtype=torch.bfloat16), velocity, Flux.lora_targets, rank=4)
    assert {p.dtype for n in ADAPTERS for p in four.parameters(n)} == {torch.float32}
    config = SCFMConfig(max_train_steps=3, learning_rate=1e-3, global_batch_size=4, shift=(1.0, 2.0))
    (optimizer, _), emas = make_optimizer(four, config), make_emas(four, config)
    x, _, cond = inputs(dtype=torch.bfloat16)
    before = [p.detach().clone() for p in four.parameters("ema_slow")]
    expected = before
    for update in range(3):
        noise, jumps = sample_batch(config, update, 4, (N, 16), dtype=torch.bfloat16)
        train_step(four, emas, optimizer, [Batch(x, noise, jumps, cond)], config)
        expected = [
            e + 0.001 * (p.detach() - e) for e, p in zip(expected, four.parameters("student"), strict=False)
        ]
    after = four.parameters("ema_slow")
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=False))
    for e, a in zip(expected, after, strict=False):
        torch.testing.assert_close(a.detach(), e, rtol=1e-5, atol=1e-9)


def test_one_update_moves_adapters_only():
    four = models()
    base = {n: p.clone() for n, p in four.transformer.named_parameters() if "lora" not in n}
    config = SCFMConfig(
        max_train_steps=1,
        learning_rate=1e-2,
        global_batch_size=4,
        shift=(1.0, 2.0),
        ema_decay_fast=0.5,
        ema_decay_slow=0.9,
    )
    (optimizer, _), emas = make_optimizer(four, config), make_emas(four, config)
    x, _, cond = inputs()
    before = {n: [p.detach().clone() for p in four.parameters(n)] for n in ADAPTERS}
    noise, jumps = sample_batch(config, 0, 4, (N, 16))
    train_step(four, emas, optimizer, [Batch(x, noise, jumps, cond)], config)
    assert all(torch.equal(base[n], p) for n, p in four.transformer.named_parameters() if "lora" not in n)
    for name in ADAPTERS:
        assert any(not torch.equal(p, q) for p, q in zip(before[name], four.parameters(name), strict=False))


def test_bf16_flux_tells_the_snapped_times_apart():
    """Unsnapped, .750 and .751 are one time to a bf16 Flux; the times that we draw never are."""
    pipe = build_flux()
    flux, model = Flux(pipe, 32, 32, 16), pipe.transformer.to(torch.bfloat16)
    cond = {k: v.to(torch.bfloat16) for k, v in flux.encode_text(["a red star"]).items()} | {
        "guidance": torch.ones(1)
    }
    x = torch.randn(1, *flux.latent_shape, generator=torch.Generator().manual_seed(0))

    def velocity_at(t):
        return flux.velocity(model, x, torch.as_tensor(t).reshape(1), cond)

    with torch.no_grad():
        assert torch.equal(velocity_at(0.750), velocity_at(0.751))
        config = SCFMConfig(global_batch_size=8)
        _, jumps = sample_batch(config, 0, 8, tuple(x.shape[1:]), dtype=torch.bfloat16)
        for t1, t2, t3 in jumps.times:
            assert t1 > t2 > t3 and not torch.equal(velocity_at(t1), velocity_at(t2))
            assert torch.equal(t1.bfloat16().float(), t1) and torch.equal(t2.bfloat16().float(), t2)


@pytest.mark.parametrize("alpha", [4, 8])
def test_a_stock_model_loads_what_we_save(tmp_path, alpha):
    four = models(alpha=alpha)
    x, t, cond = inputs()
    for name in ADAPTERS:
        path = save_lora(FluxPipeline, four.transformer, tmp_path / name, name)
        stock = pipeline_around(transformer())
        stock.load_lora_weights(str(path.parent))
        with torch.no_grad():
            assert torch.equal(velocity(stock.transformer, x, t, cond), getattr(four, name)(x, t, cond))


def test_attach_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="rank"):
        add_adapters(transformer(), Flux.lora_targets, 0)
    with pytest.raises(ValueError, match="[Tt]arget"):
        add_adapters(transformer(), ["no_such_layer"], 4)
    twice = transformer()
    add_adapters(twice, Flux.lora_targets, 4)
    with pytest.raises(ValueError, match="carries adapters already"):
        add_adapters(twice, Flux.lora_targets, 4)
