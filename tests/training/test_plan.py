"""The plan counts what a real update does, and agrees with what is known of the published shapes."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scfm.cli import main
from scfm.commands.plan import shape_of_preset
from scfm.method.distill import Batch, make_emas, make_optimizer, sample_batch, train_step
from scfm.models.flux import Flux
from scfm.models.lora import LoraModels, add_adapters
from scfm.models.scaled_lora import ScaledLoraModels
from scfm.models.sd3 import SD3
from scfm.training.attention import fused_attention
from scfm.training.config import PRESETS, DistillConfig, load_settings
from scfm.training.plan import count_called, count_example, make_plan, meta_inputs, shape_of
from toy.pipelines import FLUX, TOKENS, build_flux, build_sd3

TINY = dict(
    height=32,
    width=32,
    max_sequence_length=TOKENS,
    rank=4,
    global_batch_size=4,
    max_train_steps=10,
    guidance_scale_range=(4.0, 4.0),
)


@pytest.mark.parametrize("family_class, build", [(Flux, build_flux), (SD3, lambda: build_sd3(t5=True))])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("algorithm", ["dual", "step_scaled"])
def test_the_count_is_that_of_a_real_update(family_class, build, checkpointing, algorithm, tmp_path):
    pipe = build()
    family = family_class(pipe, 32, 32, TOKENS)
    pipe.save_pretrained(tmp_path)
    config = DistillConfig(
        pretrained_model_name_or_path=str(tmp_path),
        gradient_checkpointing=checkpointing,
        algorithm=algorithm,
        **TINY,
    )
    if checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
        pipe.transformer.train()
    if algorithm == "dual":
        models = LoraModels(
            pipe.transformer,
            family.velocity,
            family.lora_targets,
            config.rank,
            forward_rows=family.forward_rows,
        )
    else:
        models = ScaledLoraModels(
            pipe.transformer, family.velocity, family.lora_targets, config.rank, None, 2, family.forward_rows
        )
    optimizer, _ = make_optimizer(models, config)
    cond = {**family.encode_text(["a red star"] * 4), "guidance": torch.full((4,), 4.0)}
    data = torch.randn(4, *family.latent_shape)
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):  # the CPU's fused one is not counted
        train_step(
            models,
            make_emas(models, config),
            optimizer,
            [Batch(data, *sample_batch(config, 0, 4, data.shape[1:]), cond)],
            config,
        )
    planned = make_plan(config)
    seen = cond["tokens"].shape[1] / (
        TOKENS + family.extra_text_tokens
    )  # the toy's CLIPs have fewer tokens than 77
    if seen == 1:
        assert planned["operations of a step"] == pytest.approx(counter.get_total_flops(), rel=0.02)
    else:
        assert counter.get_total_flops() < planned["operations of a step"] < 2.5 * counter.get_total_flops()
    assert planned["LoRA, parameters"] == sum(p.numel() for p in models.parameters("student"))


@pytest.mark.parametrize(
    "shape, blocks",
    [
        ("flux-dev", {"num_layers": 4, "num_single_layers": 5}),
        ("flux-dev", {"num_layers": 1, "num_single_layers": 2}),
        ("sd35-large", {"num_layers": 5}),  # whose last block is another
    ],
)
def test_three_blocks_stand_for_those_that_are_alike(shape, blocks):
    config = DistillConfig(max_sequence_length=7)
    family, transformer = shape_of(config, shape, blocks)
    with torch.device("meta"):
        add_adapters(transformer, family.lora_targets, 3, copies={"student": ()})
    lists = [list(part) for part in transformer.children() if isinstance(part, torch.nn.ModuleList)]
    whole = count_called(family, transformer, *meta_inputs(family, transformer, 4.0, torch.float32))
    assert count_example(family, transformer, 4.0, torch.float32) == whole
    assert lists == [list(part) for part in transformer.children() if isinstance(part, torch.nn.ModuleList)]


@pytest.mark.parametrize(
    "name, billion",
    [
        ("qwen-image", 20.43),
        ("flux2-klein-base-4b", 3.88),
        ("flux2-klein-base-9b", 9.08),
        ("z-image", 6.15),
        ("sana-1600m", 1.60),
    ],
)
def test_the_published_shapes_of_plain_families(name, billion):
    _, transformer = shape_of(DistillConfig(max_sequence_length=128), name)
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(billion, abs=0.01)


@pytest.mark.parametrize("preset", ["flux-authors", "flux2-dev-step-scaled", "z-image-step-scaled"])
def test_a_presets_name_says_its_shape(preset):
    shapes = {
        "flux-authors": "flux-dev",
        "flux2-dev-step-scaled": "flux2-dev",
        "z-image-step-scaled": "z-image",
    }
    assert shape_of_preset(preset) == shapes[preset]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, billion, lora, static", [("flux-dev", 11.90, 347.1, 29.9), ("sd35-large", 8.06, 295.4, 21.6)]
)
def test_the_published_shapes(name, billion, lora, static):
    """Parameters, LoRA of rank 64 on all linear layers, and what a bf16 run holds whatever the batch."""
    plan = make_plan(
        DistillConfig(weight_dtype="bf16", max_sequence_length=256, gradient_checkpointing=True), name
    )
    assert plan["transformer, parameters"] / 1e9 == pytest.approx(billion, abs=0.005)
    assert plan["LoRA, parameters"] / 1e6 == pytest.approx(lora, abs=0.2)
    held = sum(size for part, size in plan["GiB"].items() if "guessed" not in part)
    assert held == pytest.approx(static, abs=0.1)


def test_fewer_bits_hold_the_base_in_half_or_a_quarter():
    small = {"num_layers": 1, "num_single_layers": 1}
    whole, eight, four = (
        make_plan(DistillConfig(weight_dtype="bf16", quantize=q), "flux-dev", small)["GiB"]["base"]
        for q in ("", "int8", "nf4")
    )
    assert eight == pytest.approx(whole / 2) and four == pytest.approx(0.5625 / 2 * whole)


@pytest.mark.parametrize("size", [48, 24, 16, 12])
def test_a_preset_for_a_card_fits_it_and_says_what_was_counted(size):
    config = DistillConfig(**load_settings(f"flux-dev-{size}gb"))
    plan = make_plan(config, "flux-dev")
    guessed = plan["GiB"]["activations, guessed"]
    assert plan["GiB in all"] < 0.85 * size  # CUDA's own context, and what fragments
    text = (PRESETS / f"flux-dev-{size}gb.yaml").read_text(encoding="utf-8")
    counted = plan["GiB in all"] - guessed
    assert f"Memory: {counted:.1f} GiB counted and {guessed:.1f} of guessed" in text


def test_the_command_prints_a_plan(capsys):
    assert (
        main(["plan", "--config", "tiny", "--pretrained_model_name_or_path", str(FLUX), "--gpu", "rtx4090"])
        == 0
    )
    said = capsys.readouterr().out
    assert (
        "transformer 0.00234" in said
        and "fits in the 24 GB of one rtx4090" in said
        and "not measured" in said
    )


def test_fewer_recomputed_blocks_cost_memory_and_save_operations():
    small = {"num_layers": 2, "num_single_layers": 2}
    none, all_of_them, *some = (
        make_plan(
            DistillConfig(gradient_checkpointing=count is not None, checkpoint_blocks=count or 0),
            "flux-dev",
            small,
        )
        for count in (None, 0, 4, 2, 1)
    )
    plans = [none, *reversed(some)]
    assert some[0] == all_of_them
    for less, more in zip(plans, plans[1:], strict=False):
        assert less["operations of a step"] < more["operations of a step"]
        assert less["GiB"]["activations, guessed"] > more["GiB"]["activations, guessed"]
    with pytest.raises(ValueError, match="has 4 blocks"):
        make_plan(DistillConfig(gradient_checkpointing=True, checkpoint_blocks=5), "flux-dev", small)


def test_attention_keeps_what_a_gpus_kernels_keep():
    """Counted against a network of one attention whose kernel is called by name: not its weights, as the one
    for tensors without content would."""
    shape, L = (1, 2, 4096, 16), 4096
    q, k, v = (torch.zeros(shape, device="meta", requires_grad=True) for _ in range(3))
    seen: dict[int, torch.Tensor] = {}

    def keep(tensor):
        seen[id(tensor)] = tensor
        return tensor

    def count(call):
        seen.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), fused_attention(keep):
            call()
        return sum(tensor.numel() for tensor in seen.values())

    ours = count(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    kernel = count(lambda: torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True))
    assert ours == 4 * q.numel() and abs(kernel - ours) <= 2 * L + 4  # and a number for each query
    own = torch.nn.functional.scaled_dot_product_attention
    assert own.__name__ == "scaled_dot_product_attention"


def test_a_plan_of_videos_grows_with_their_tokens():
    settings = {"height": 480, "width": 832, "weight_dtype": "bf16", "gradient_checkpointing": True}
    few, many = (
        make_plan(DistillConfig(**settings, num_frames=n), "wan-2.1-1.3b", {"num_layers": 3})
        for n in (17, 81)
    )
    guessed = "activations, guessed"
    assert 3.8 < many["GiB"][guessed] / few["GiB"][guessed] < 4.3  # 21 frames of latents to 5
    assert many["operations of a step"] > 5 * few["operations of a step"]  # attention's grow with the square


@pytest.mark.parametrize(
    "words, message",
    [
        (["--shape", "flux3"], "take one of flux-dev, sd35-large"),
        (["--shape", "flux-dev", "--gpu", "tpu"], "take one of a100"),
        (["--shape", "flux-dev", "--change", "layers=3"], "has no setting layers"),
        (["--shape", "flux-dev", "--change", "num_layers=many"], "NAME=NUMBER"),
        (["--shape", "flux-dev", "--efficiency", "2"], "in (0, 1]"),
        ([], "no model: say --shape"),
        (["--pretrained_model_name_or_path", "nowhere"], "no pipeline in nowhere"),
        (["--config", "nowhere.yaml"], "no settings at nowhere.yaml"),
    ],
)
def test_bad_input_is_one_line_and_code_2(capsys, words, message):
    assert main(["plan", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("scfm plan: ") and message in said
