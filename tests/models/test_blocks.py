"""Blocks that are recomputed or compiled compute the same; nothing is compiled anew after the first step."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from scfm.method.distill import Batch, SCFMConfig, make_emas, make_optimizer, sample_batch, train_step
from scfm.models.blocks import blocks_of, compile_blocks, recompute_blocks
from scfm.models.flux import Flux
from scfm.models.lora import LoraModels
from scfm.models.scaled_lora import ScaledLoraModels
from scfm.models.sd3 import SD3
from toy.pipelines import TOKENS, build_flux, build_sd3

BATCH = 4


class Run:
    """Training steps of a small pipeline."""

    def __init__(self, algorithm: str, build=build_flux, kind=Flux):
        pipe = build()
        self.transformer, self.family = pipe.transformer, kind(pipe, 32, 32, TOKENS)
        torch.manual_seed(0)
        make = ScaledLoraModels if algorithm == "step_scaled" else LoraModels
        rows = getattr(self.family, "forward_rows", lambda cond: None)
        targets = self.family.lora_targets
        self.models = make(self.transformer, self.family.velocity, targets, 2, forward_rows=rows)
        generator = torch.Generator().manual_seed(1)
        for p in self.models.parameters("student"):
            p.data.add_(0.05 * torch.randn(p.shape, generator=generator))
        more = {"algorithm": algorithm, "ema_decay": 0.5, "ema_decay_fast": 0.5}
        self.config = SCFMConfig(global_batch_size=BATCH, learning_rate=1e-2, teacher_ratio=0.5, **more)
        self.optimizer, _ = make_optimizer(self.models, self.config)
        self.emas = make_emas(self.models, self.config)
        captions = ["a red star", "a small blue ring", "a cross", "a large green ring"]
        self.cond = {**self.family.encode_text(captions), "guidance": torch.full((BATCH,), 2.5)}

    def step(self, i: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(i)
        data = torch.randn(BATCH, *self.family.latent_shape, generator=generator)
        batch = Batch(data, *sample_batch(self.config, i, BATCH, data.shape[1:]), self.cond)
        train_step(self.models, self.emas, self.optimizer, [batch], self.config)
        return torch.cat([p.detach().flatten().clone() for p in self.models.parameters("student")])


@pytest.mark.parametrize("build, kind, blocks", [(build_flux, Flux, 6), (build_sd3, SD3, 3)])
def test_what_is_recomputed_changes_nothing_but_what_is_kept(build, kind, blocks):
    plain, kept = Run("step_scaled", build, kind), {}
    expected = plain.step(0)
    assert len(blocks_of(plain.transformer)) == blocks
    for count in (0, 1, blocks):
        run = Run("step_scaled", build, kind)
        recompute_blocks(run.transformer, count)
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, n=numbers: n.append(t.numel()) or t, lambda t: t
        ):
            torch.testing.assert_close(run.step(0), expected, rtol=1e-4, atol=1e-6)
        kept[count] = sum(numbers)
    assert kept[0] == kept[blocks] < kept[1]


def test_more_blocks_than_there_are_are_refused():
    with pytest.raises(ValueError, match="checkpoint_blocks is 7: FluxTransformer2DModel has 6 blocks"):
        recompute_blocks(build_flux().transformer, 7)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm, checkpointing", [("dual", True), ("step_scaled", False)])
def test_compiled_blocks_compute_the_same_and_are_not_compiled_again(algorithm, checkpointing):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    runs = [Run(algorithm), Run(algorithm)]
    for run in runs:
        if checkpointing:
            recompute_blocks(run.transformer)
    compile_blocks(runs[1].transformer, backend=counter)
    graphs = []
    for i in range(2):
        plain, compiled = (run.step(i) for run in runs)
        # the order of sums depends on the CPU
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=2e-4)
        graphs.append(counter.frame_count)
    assert 0 < graphs[0] <= 9 and graphs[1] == graphs[0]
