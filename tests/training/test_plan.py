"""The plan counts what a real update does, and agrees with what is known of the published shapes."""

import json
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scfm.cli import main
from scfm.commands.plan import shape_of_preset
from scfm.method.distill import Batch, make_emas, make_optimizer, sample_batch, train_step
from scfm.models.blocks import blocks_of
from scfm.models.flux import Flux
from scfm.models.lora import LoraModels, add_adapters
from scfm.models.quantize import quantize_linears
from scfm.models.scaled_lora import ScaledLoraModels
from scfm.models.sd3 import SD3
from scfm.models.swap import swap_blocks
from scfm.training import measured
from scfm.training.attention import fused_attention
from scfm.training.config import PRESETS, DistillConfig, load_settings
from scfm.training.measured import settings_of
from scfm.training.memory import count_base
from scfm.training.plan import HOST_LINK, count_called, count_example, make_plan, meta_inputs, shape_of
from toy.pipelines import FLUX, TOKENS, build_flux, build_sd3, load_flux

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


def test_where_guidance_is_distilled_the_teachers_halves_alone_cost_twice(tmp_path):
    """In the quarter of the examples whose halves are finer than 16: those of 12 and 16 steps."""
    build_sd3().save_pretrained(tmp_path)
    usual = {"pretrained_model_name_or_path": str(tmp_path), **TINY}
    guided, plain = (make_plan(DistillConfig(**usual | {"guidance_scale_range": (g, g)})) for g in (4.0, 1.0))
    ours = make_plan(DistillConfig(**usual, guidance_mode="distilled"))
    operations, forward = "operations of a step", "operations of an example's forward"
    teachers = TINY["global_batch_size"] * 2 * 0.25 * (guided[forward] - plain[forward])
    assert guided[forward] > 1.9 * plain[forward]
    assert ours[forward] == pytest.approx(plain[forward], rel=0.05)  # three LoRAs, not two
    assert ours[operations] == pytest.approx(plain[operations] + teachers, rel=0.06)
    generating = "hours of generating"  # by the teacher, guided
    images = {"images": 10}
    assert make_plan(DistillConfig(**usual, guidance_mode="distilled"), **images)[
        generating
    ] == pytest.approx(make_plan(DistillConfig(**usual), **images)[generating], rel=0.05)
    for change in ({"algorithm": "dual"}, {"teacher_guidance_scale": 1.0}):
        with pytest.raises(ValueError, match="guidance_mode distilled with"):
            make_plan(DistillConfig(**usual, guidance_mode="distilled", **change))
    assert ours["LoRA, parameters"] == 1.5 * guided["LoRA, parameters"]
    few = make_plan(
        DistillConfig(**usual, guidance_mode="distilled", algorithm="dual_pure", teacher_ratio=0.5)
    )
    assert few[operations] == pytest.approx(
        make_plan(DistillConfig(**usual | {"guidance_scale_range": (1.0, 1.0)}, algorithm="dual_pure"))[
            operations
        ]
        + 2 * teachers,
        rel=0.02,
    )


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
        ("wan-2.1-1.3b", 1.42),
        ("wan-2.1-14b", 14.29),
        ("wan-2.2-ti2v-5b", 5.00),
    ],
)
def test_the_published_shapes_of_plain_families(name, billion):
    _, transformer = shape_of(DistillConfig(max_sequence_length=128), name)
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(billion, abs=0.01)


@pytest.mark.parametrize(
    "preset", ["flux-authors", "flux2-dev-step-scaled", "z-image-step-scaled", "wan-2.1-14b-step-scaled"]
)
def test_a_presets_name_says_its_shape(preset):
    shapes = {
        "flux-authors": "flux-dev",
        "flux2-dev-step-scaled": "flux2-dev",
        "z-image-step-scaled": "z-image",
        "wan-2.1-14b-step-scaled": "wan-2.1-14b",
    }
    assert shape_of_preset(preset) == shapes[preset]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, billion, lora, static", [("flux-dev", 11.90, 347.1, 29.9), ("sd35-large", 8.06, 295.4, 21.6)]
)
def test_the_published_shapes(name, billion, lora, static):
    """Parameters, LoRA of rank 64 on all linear layers, and what a bf16 run holds whatever the batch."""
    plan = make_plan(
        DistillConfig(
            algorithm="dual", weight_dtype="bf16", max_sequence_length=256, gradient_checkpointing=True
        ),
        name,
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


def test_the_base_is_counted_as_it_is_held():
    """By the storages of a real transformer, when its largest swapped block is there, against the plan."""
    for quantize, most in (("", 1e-9), ("int8", 0.06), ("nf4", 0.08)):  # norms and biases stay as they are
        pipe = load_flux()
        blocks = blocks_of(pipe.transformer)[:3]
        if quantize:
            quantize_linears(pipe.transformer, quantize, on_host=blocks)
        swap = swap_blocks(pipe.transformer, 3, "cpu")
        swap.need(max(swap.blocks, key=lambda weights: sum(host.nbytes for _, host in weights.pairs)))
        held = sum(p.untyped_storage().nbytes() for p in pipe.transformer.parameters())
        # a scale for each row of int8; the table of NF4, 2 KiB a layer, is of weight in a toy alone
        named = {name: b for name, b in pipe.transformer.named_buffers() if not name.endswith("pairs")}
        held += sum(b.untyped_storage().nbytes() for b in named.values())
        config = DistillConfig(pretrained_model_name_or_path=str(FLUX), quantize=quantize, blocks_to_swap=3)
        counted = count_base(config, shape_of(config)[1])
        parts = counted.held["base"] + counted.held["swapped block in use"]
        assert held == pytest.approx(parts, rel=most)
        tables = {id(b) for name, b in pipe.transformer.named_buffers() if name.endswith("pairs")}
        pairs = [pair for weights in swap.blocks for pair in weights.pairs if id(pair[0]) not in tables]
        on_host = sum(host.nbytes for _, host in pairs)
        assert on_host == pytest.approx(counted.on_host, rel=most)


def test_a_block_on_the_host_is_fetched_four_times_a_forwards_step():
    small, card = {"num_layers": 2, "num_single_layers": 2}, dict(weight_dtype="bf16", quantize="int8")
    plans = [
        make_plan(DistillConfig(**card, blocks_to_swap=n, micro_batch_size=2), "flux-dev", small, images=16)
        for n in (0, 2, 4)
    ]
    for none, some in zip(plans[:1] * 2, plans[1:], strict=True):
        gone = none["GiB"]["base"] - some["GiB"]["base"]
        assert gone == pytest.approx(some["GiB on the host"])
        assert some["GiB fetched a step"] == pytest.approx(4 * 4 * gone)  # four forwards of two examples
        waits = some["GiB fetched a step"] * 2**30 / HOST_LINK
        assert some["seconds a step"] == pytest.approx(none["seconds a step"] + waits)
        assert some["hours of generating"] > none["hours of generating"]
    assert plans[0]["GiB fetched a step"] == plans[0]["GiB on the host"] == 0
    with pytest.raises(ValueError, match="blocks_to_swap is 5: FluxTransformer2DModel has 4 blocks"):
        make_plan(DistillConfig(blocks_to_swap=5), "flux-dev", small)


def test_adams_moments_in_8_bits_take_a_quarter():
    small = {"num_layers": 1, "num_single_layers": 1}
    plain, eight = (
        make_plan(DistillConfig(use_8bit_adam=yes), "flux-dev", small)["GiB"]["Adam"] for yes in (False, True)
    )
    assert eight == pytest.approx(plain / 4, rel=0.02)


def test_a_measurement_of_the_same_settings_is_printed_and_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    config = DistillConfig(**load_settings("flux-dev-24gb"))
    step = {"seconds": 1.234, "peak_gib": 15.5}
    record = {
        "shape": "flux-dev",
        "settings": settings_of(config),
        "machine": "Some GPU",
        "tiny": False,
        "one_forward_for_all_models": True,
        "rows": [{"batch": 2, "scfm": step}, {"batch": 4, "scfm": step}, {"batch": 2, "out_of_memory": "no"}],
    }
    (tmp_path / "gpu_a.json").write_text(json.dumps(record))
    assert main(["plan", "--config", "flux-dev-24gb"]) == 0
    said = capsys.readouterr().out
    line = "measured on Some GPU: 1.23 s for a step of 2 examples in one forward, 15.50 GiB at its peak"
    assert f"{line} (gpu_a.json)" in said and said.count("measured") == 1
    for more in (
        ["--rank", "8"],
        ["--quantize", "nf4"],
        ["--blocks_to_swap", "3"],
        ["--micro_batch_size", "8"],
    ):
        assert main(["plan", "--config", "flux-dev-24gb", *more]) == 0
        assert "counted, not measured" in capsys.readouterr().out
    for name, value in (("tiny", True), ("shape", "sd35-large"), ("one_forward_for_all_models", False)):
        (tmp_path / "gpu_a.json").write_text(json.dumps({**record, name: value}))
        assert main(["plan", "--config", "flux-dev-24gb"]) == 0
        assert "counted, not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    "size, words",
    [
        (16, dict(quantize="nf4", blocks_to_swap=0)),
        (12, dict(quantize="nf4", blocks_to_swap=0, rank=8)),
    ],
)
def test_a_preset_says_what_fits_too(size, words):
    said = " ".join(f"--{name} {value}" for name, value in words.items())
    text = (PRESETS / f"flux-dev-{size}gb.yaml").read_text(encoding="utf-8")
    assert f"`{said}`, fits too" in text
    config = DistillConfig(**{**load_settings(f"flux-dev-{size}gb"), **words})
    assert make_plan(config, "flux-dev")["GiB in all"] < 0.85 * size


@pytest.mark.parametrize("size", [48, 24, 16, 12, 8])
def test_a_preset_for_a_card_fits_it_and_says_what_was_counted(size):
    config = DistillConfig(**load_settings(f"flux-dev-{size}gb"))
    plan = make_plan(config, "flux-dev")
    guessed = plan["GiB"]["activations, guessed"]
    assert plan["GiB in all"] < 0.85 * size  # CUDA's own context, and what fragments
    text = (PRESETS / f"flux-dev-{size}gb.yaml").read_text(encoding="utf-8")
    counted = plan["GiB in all"] - guessed
    assert f"Memory: {counted:.1f} GiB counted and {guessed:.1f} of guessed" in text


SAYS = re.compile(r"Memory: about (\d+) GiB, (\d+(?:\.\d)?) of them counted")


@pytest.mark.slow
@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*-step-scaled.yaml")), ids=lambda path: path.stem)
def test_a_preset_says_the_memory_that_is_planned(preset):
    said = SAYS.search(preset.read_text(encoding="utf-8"))
    if said is None:
        pytest.skip("it is of a tiny pipeline, and says nothing")
    plan = make_plan(DistillConfig(**load_settings(preset)), shape_of_preset(preset.stem))
    counted = plan["GiB in all"] - plan["GiB"]["activations, guessed"]
    assert abs(plan["GiB in all"] - int(said[1])) <= 0.5
    assert abs(counted - float(said[2])) <= (0.05 if "." in said[2] else 0.5)


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
