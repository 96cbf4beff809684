"""Blocks whose weights are on the host: a step is the same to the last bit; absent weights are poison."""

import pytest
import torch
from safetensors.torch import load_file

from scfm.cli import main
from scfm.method.distill import Batch, SCFMConfig, make_emas, make_optimizer, sample_batch, train_step
from scfm.models.blocks import blocks_of, recompute_blocks
from scfm.models.family import FAMILIES
from scfm.models.flux import Flux
from scfm.models.lora import LoraModels
from scfm.models.quantize import quantize_linears
from scfm.models.scaled_lora import ScaledLoraModels
from scfm.models.sd3 import SD3
from scfm.models.swap import HostWeights, refuse_group_offload, swap_blocks
from scfm.training.checkpoint import latest, load_checkpoint
from toy.pipelines import BUILD, FLUX, TOKENS, build_flux, build_sd3, load_flux

BATCH = 4


@pytest.fixture(params=[True, False], ids=["poison", "empty"])
def absent(request, monkeypatch):
    """Weights that are not there are nan, or numbers from elsewhere, in place of no memory; or empty, as they
    are in earnest: then also what they take is looked at, whenever others are loaded."""
    if request.param:
        monkeypatch.setattr(HostWeights, "release", poison)
    return "poison" if request.param else "empty"


def poison(self):
    for tensor, _ in self.pairs:
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 77)


class Run:
    """Training steps of a small pipeline. swap: so many blocks; checkpointing: None, or so many blocks."""

    def __init__(
        self, algorithm, swap=0, kind="", dtype=torch.float32, checkpointing=None, build="flux", targets=()
    ):
        pipe = {"flux": build_flux, "sd3": build_sd3}[build]()
        self.transformer = pipe.transformer.to(dtype)
        family = {"flux": Flux, "sd3": SD3}[build](pipe, 32, 32, TOKENS)
        captions = ["a red star", "a small blue ring", "a cross", "a large green ring"]
        text = {name: t.to(dtype) for name, t in family.encode_text(captions).items()}
        self.cond = {**text, "guidance": torch.full((BATCH,), 2.5)}
        blocks = blocks_of(self.transformer)[:swap]
        if kind:
            quantize_linears(self.transformer, kind, on_host=blocks)
        self.swap = swap_blocks(self.transformer, swap, "cpu") if swap else None
        torch.manual_seed(0)
        make = ScaledLoraModels if algorithm == "step_scaled" else LoraModels
        self.models = make(
            self.transformer,
            family.velocity,
            targets or family.lora_targets,
            2,
            forward_rows=family.forward_rows,
        )
        generator = torch.Generator().manual_seed(1)
        for p in self.models.parameters("student"):
            p.data.add_(0.05 * torch.randn(p.shape, generator=generator))
        if checkpointing is not None:
            recompute_blocks(self.transformer, checkpointing)
        self.config = SCFMConfig(
            global_batch_size=BATCH, learning_rate=1e-2, teacher_ratio=0.5, algorithm=algorithm, ema_decay=0.5
        )
        self.optimizer, _ = make_optimizer(self.models, self.config)
        self.emas, self.shape = make_emas(self.models, self.config), family.latent_shape

    def step(self, i):
        """The student's numbers after step i."""
        data = torch.randn(BATCH, *self.shape, generator=torch.Generator().manual_seed(i))
        batch = Batch(data, *sample_batch(self.config, i, BATCH, data.shape[1:]), self.cond)
        train_step(self.models, self.emas, self.optimizer, [batch], self.config)
        return torch.cat([p.detach().flatten() for p in self.models.parameters("student")])


@pytest.mark.parametrize(
    "more",
    [
        dict(algorithm="step_scaled"),
        dict(algorithm="dual"),
        dict(algorithm="step_scaled", checkpointing=0),
        dict(algorithm="dual", checkpointing=2),
        dict(algorithm="step_scaled", kind="int8", checkpointing=0),
        dict(algorithm="dual", kind="int8"),
        dict(algorithm="step_scaled", kind="nf4"),
        dict(algorithm="step_scaled", dtype=torch.bfloat16),
        dict(algorithm="dual", dtype=torch.bfloat16, checkpointing=0),
        dict(algorithm="step_scaled", build="sd3"),
        dict(algorithm="step_scaled", build="sd3", checkpointing=0),
        # nothing before the last swapped block learns: its inputs need no gradient
        dict(algorithm="step_scaled", targets=("single_transformer_blocks.2.proj_out", "norm_out.linear")),
    ],
    ids=lambda more: "-".join(map(str, more.values())),
)
def test_a_step_is_the_same_to_the_last_bit(more, absent):
    plain, count = Run(**more), 3 if more.get("build") == "sd3" else 5
    swapped = Run(**more, swap=count)
    largest, seen = max(weights_of(swapped)), []
    load = HostWeights.load

    def noted(weights):
        load(weights)
        seen.append(sum(w.device_bytes for w in swapped.swap.blocks))

    for weights in swapped.swap.blocks:
        weights.load = lambda w=weights: noted(w)
    for i in range(2):
        now, expected = swapped.step(i), plain.step(i)
        assert expected.isfinite().all() and torch.equal(now, expected)
    if absent == "empty":
        assert max(seen) == largest and len(seen) == swapped.swap.loads  # one block at a time, never two


@pytest.mark.parametrize("name", BUILD)
def test_every_familys_velocity_and_gradient_are_the_same_in_any_bits(name, monkeypatch):
    """All blocks on the host; examples with guidance and without, each at its own scale."""
    monkeypatch.setattr(HostWeights, "release", poison)
    captions, guidance = ["a large red cross", "a small blue ring", "a star"], torch.tensor([1.0, 4.0, 2.0])
    for kind in ("", "int8", "nf4"):
        outcomes = []
        for swapped, checkpointing in ((False, False), (True, False), (True, True)):
            pipe = BUILD[name]()
            transformer, family = pipe.transformer, FAMILIES[name](pipe, 32, 32, 32)
            cond = {**family.encode_text(captions), "guidance": guidance}
            x = torch.randn(3, *family.latent_shape, generator=torch.Generator().manual_seed(1))
            blocks = blocks_of(transformer) if swapped else []
            if kind:
                quantize_linears(transformer, kind, on_host=blocks)
            if swapped:
                swap_blocks(transformer, len(blocks), "cpu")
            torch.manual_seed(0)
            models = ScaledLoraModels(
                transformer, family.velocity, family.lora_targets, 2, forward_rows=family.forward_rows
            )
            for p in models.parameters("student"):
                p.data.add_(0.05 * torch.randn(p.shape))
            if checkpointing:
                recompute_blocks(transformer)
            scales, t = torch.tensor([0.3, 1.0, 0.6]), torch.tensor([0.9, 0.5, 0.2])
            v = models.scaled_velocity("student", scales, x, t, cond)
            v.square().mean().backward()
            gradients = [p.grad.flatten() for p in models.parameters("student") if p.grad is not None]
            outcomes.append(torch.cat([v.detach().flatten(), *gradients]))
        assert outcomes[0].isfinite().all()
        assert torch.equal(outcomes[1], outcomes[0]) and torch.equal(outcomes[2], outcomes[0]), kind


def weights_of(run):
    """Bytes of each swapped block."""
    return [sum(host.numel() * host.element_size() for _, host in w.pairs) for w in run.swap.blocks]


@pytest.mark.parametrize("checkpointing", [None, 0])
def test_a_block_travels_once_for_each_forward_and_once_for_backward(checkpointing):
    run, blocks = Run("step_scaled", swap=5, checkpointing=checkpointing), 5
    run.step(0)
    # two forwards of the target, the student's, whose last block is still there when backward comes
    assert run.swap.loads == 4 * blocks - 1
    run.step(1)
    assert run.swap.loads == 2 * (4 * blocks - 1) - 1  # and its first one, when the next step comes


def test_adapters_and_other_weights_are_never_swapped():
    run = Run("dual", swap=2)
    tensors = {id(tensor) for weights in run.swap.blocks for tensor, _ in weights.pairs}
    for name, p in run.transformer.named_parameters():
        swapped = name.startswith(("transformer_blocks.0.", "transformer_blocks.1.")) and "lora_" not in name
        assert (id(p) in tensors) == swapped, name


def test_group_offload_of_diffusers_is_refused():
    from diffusers.hooks import apply_group_offloading

    pipe = load_flux()
    refuse_group_offload(pipe.transformer)
    apply_group_offloading(
        pipe.transformer,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    )
    with pytest.raises(ValueError, match="group offload is on, which puts adapters back.*blocks_to_swap"):
        LoraModels(pipe.transformer, Flux(pipe, 32, 32, TOKENS).velocity, Flux.lora_targets, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", "int8", "nf4"])
def test_a_run_with_swapped_blocks_is_the_run_without(kind, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red star\na small blue ring\na green cross\n")
    settings = {
        "pretrained_model_name_or_path": FLUX,
        "prompts": tmp_path / "prompts.txt",
        "config": "tiny-step-scaled",
        "lr_scheduler": "constant",
        "max_sequence_length": TOKENS,
        "teacher_steps": 1,
        "global_batch_size": 2,
        "rank": 2,
        "max_train_steps": 3,
        "num_eval_prompts": 2,
        "eval_num_steps": "2",
        "validation_steps": 2,
        "quantize": kind,
        "report_to": "none",
    }
    words = ["distill", *(w for name, value in settings.items() if value for w in (f"--{name}", str(value)))]
    folders = [tmp_path / "plain", tmp_path / "swapped"]
    assert main([*words, "--output_dir", str(folders[0])]) == 0
    swapped = [*words, "--output_dir", str(folders[1])]
    assert main([*swapped, "--blocks_to_swap", "99"]) == 2
    assert "blocks_to_swap is 99: FluxTransformer2DModel has 6 blocks" in capsys.readouterr().err
    assert main([*swapped, "--blocks_to_swap", "4", "--max_train_steps", "1"]) == 0
    assert main([*swapped, "--blocks_to_swap", "2"]) == 0  # gone on from, with another number
    for part in ("adapters", "optimizer"):
        plain, other = (load_checkpoint(latest(folder))[part] for folder in folders)
        assert same(plain, other), part
    assert same(*(load_file(folder / "pytorch_lora_weights.safetensors") for folder in folders))


def same(a, b):
    """Whether two states are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
