"""The scale trained in as the step size: one forward for many scales, the target by hand, the teacher at
0."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.method.consistency import Jumps
from scfm.method.distill import SCFMConfig, distill, make_optimizer
from scfm.method.flow import time_grid
from scfm.method.step_scale import (
    ScaledNetwork,
    StepScale,
    draw_step_jumps,
    step_scale_loss,
    step_scale_target,
)
from scfm.models.unet import UNetFlow
from scfm.streams import keyed_generator
from toy.plane import MLP

RULE = StepScale()


def random_models(order: int = 2) -> ScaledNetwork:
    torch.manual_seed(0)
    models = ScaledNetwork(MLP(16, 2), order)
    for name in ("student", "ema"):
        for w in models.parameters(name):
            w.data.normal_(0, 0.05)
    return models


@given(seed=st.integers(0, 2**16), shift=st.floats(0.5, 4), exponent=st.floats(0.3, 1.5))
@settings(max_examples=30, deadline=None)
def test_a_drawn_jump_is_a_step_of_its_grid_and_its_middle_one_of_twice_as_many(seed, shift, exponent):
    rule = StepScale(exponent)
    jumps = draw_step_jumps(64, rule, (shift, shift), generator=keyed_generator(seed, 0))
    assert set((jumps.steps // 2).tolist()) <= set(rule.counts)
    assert torch.equal(jumps.is_teacher, jumps.steps > rule.finest)
    for times, steps in zip(jumps.times, jumps.steps.tolist(), strict=True):
        grid = time_grid(steps, shift).clamp(max=1 - 1e-5)
        start = int((grid - times[0]).abs().argmin())
        assert start % 2 == 0 and torch.allclose(grid[start : start + 3], times, atol=1e-5)


def test_the_weights_of_the_counts_are_obeyed():
    rule = StepScale(weights=(0.0, 3.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0))
    jumps = draw_step_jumps(4000, rule, generator=keyed_generator(0, 0))
    assert (jumps.steps == 4).float().mean().item() == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("order", [1, 2])
def test_many_scales_at_once_are_one_at_a_time(order):
    models, x, t = random_models(order), torch.randn(9, 2), torch.rand(9)
    scales = torch.tensor([0.0, 1.0, 0.3, 0.3, 0.0, 1.0, 0.5, 0.5, 0.3])
    together = models.scaled_velocity("student", scales, x, t)
    for i, scale in enumerate(scales.tolist()):
        network = copy.deepcopy(models.network)
        count = len(models.names)
        for j, w in enumerate(network.parameters()):
            for k in range(order):
                w.data += scale ** (k + 1) * models.parameters("student")[k * count + j].data
        torch.testing.assert_close(together[i], network(x[i : i + 1], t[i : i + 1])[0], rtol=0, atol=1e-6)


class Attends(torch.nn.Module):
    """Every kind of layer that `ScaledLayers` knows, in a network that shares one of them."""

    def __init__(self):
        super().__init__()
        self.label, self.mix = torch.nn.Embedding(4, 8), torch.nn.Conv1d(8, 8, 3, padding=1)
        self.groups, self.layer, self.rms = (
            torch.nn.GroupNorm(2, 8),
            torch.nn.LayerNorm(8),
            torch.nn.RMSNorm(8),
        )
        self.qkv, self.out = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)

    def forward(self, x, t, cond):
        h = self.mix(self.groups(x)) + self.label(cond)[..., None] * t[:, None, None]
        q, k, v = self.qkv(self.layer(h.transpose(1, 2))).chunk(3, -1)
        h = torch.nn.functional.scaled_dot_product_attention(q, k, v).to(self.out.weight.dtype)
        return self.out(self.rms(self.out(h))).transpose(1, 2)


class Table(Attends):
    """A weight that goes into a sum."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(8, 1))

    def forward(self, x, t, cond):
        return super().forward(x + self.table, t, cond)


class Token(Table):
    """A weight that hides in a list."""

    def forward(self, x, t, cond):
        x = torch.cat([x, self.table.expand(len(x), -1, -1)], 2)
        return Attends.forward(self, x, t, cond)[..., :-1]


class Positions(Attends):
    """A layer whose rows are not the examples."""

    def forward(self, x, t, cond):
        places = self.label(torch.arange(2, device=x.device).repeat(3))
        return super().forward(x + places.T[None, :, : x.shape[-1]], t, cond)


def spread_out(network: torch.nn.Module, order: int, train_base: bool = False) -> ScaledNetwork:
    """Models with differences, and a base of the EMA's own."""
    models = ScaledNetwork(network, order, train_base)
    for w in [w for name in ("student", "ema") for w in models.differences[name]]:
        w.data.normal_(0, 0.1)
    return models


@pytest.mark.parametrize("train_base", [False, True])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", [Attends, Table, Token, Positions, partial(UNetFlow, "nano")])
def test_all_layers_take_a_scale_for_each_example(kind, order, train_base):
    """Velocities and gradients are those of a forward for each scale; no more than two forwards where all
    weights go into layers."""
    torch.manual_seed(0)
    models, scales = spread_out(kind(), order, train_base), torch.tensor([0.0, 1.0, 0.3, 0.3, 0.0, 0.7])
    images = isinstance(models.network, UNetFlow)
    x, t, cond = (
        torch.randn(6, *((3, 32, 32) if images else (8, 5))),
        torch.rand(6),
        torch.tensor([0, 1, 2, 3, 0, 1]),
    )
    calls = []
    models.network.register_forward_hook(lambda *_: calls.append(1))

    def velocities_and_gradients():
        v = models.scaled_velocity("student", scales, x, t, cond)
        parameters = models.parameters("student")
        return v.detach(), torch.autograd.grad(v.square().sum(), parameters, allow_unused=True)

    velocities_and_gradients()  # where a weight goes elsewhere, this is what notices
    calls.clear()
    v, gradients = velocities_and_gradients()
    forwards = len(calls)
    linear, models.linear = models.linear, False
    expected, expected_gradients = velocities_and_gradients()
    assert linear == (kind is Attends or images) and forwards == (2 if linear else 4)
    torch.testing.assert_close(v, expected, rtol=1e-4, atol=1e-4)
    largest = max(float(g.abs().max()) for g in expected_gradients if g is not None)
    for mine, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5 * largest)


def test_in_bf16_all_scales_at_once_are_as_near_as_one_at_a_time():
    torch.manual_seed(0)
    models, scales = spread_out(UNetFlow("nano"), 2), torch.tensor([1.0, 0.3, 0.55, 0.7])
    x, t, cond = torch.randn(4, 3, 32, 32), torch.rand(4), torch.arange(4)

    def velocity(bf16, linear):
        models.network.bf16, models.linear = bf16, linear
        return models.scaled_velocity("ema", scales, x, t, cond)

    exact = velocity(False, False)
    apart, together = ((velocity(True, linear) - exact).square().mean() for linear in (False, True))
    assert 0 < together < 2 * apart


def test_scale_0_is_the_teacher_to_the_last_bit():
    models, x, t = random_models(), torch.randn(5, 2), torch.rand(5)
    assert torch.equal(models.field("ema", 0.0)(x, t), models.network(x, t))
    assert torch.equal(models.scaled_velocity("ema", torch.zeros(5), x, t), models.network(x, t))


def test_the_target_by_hand():
    """Two examples: halves of a half of the path by the average at s(4), of a 32nd by the teacher."""
    models = random_models()
    jumps = Jumps(
        torch.tensor([[0.75, 0.5, 0.25], [0.5, 0.46875, 0.4375]]),
        torch.tensor([False, True]),
        torch.tensor([4, 32]),
    )
    x = torch.randn(2, 2)
    target = step_scale_target(x, jumps, models, RULE)
    for i, scale in enumerate((4**-0.85, 0.0)):
        field, (t1, t2, t3) = models.field("ema", scale), jumps.times[i]
        v1 = field(x[i : i + 1], t1[None])
        v2 = field(x[i : i + 1] - (t1 - t2) * v1, t2[None])
        by_hand = ((t1 - t2) * v1 + (t2 - t3) * v2) / (t1 - t3)
        torch.testing.assert_close(target[i : i + 1], by_hand, rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", [1, 2])
def test_the_gradient_is_plain_autograds_with_a_detached_target(order):
    models, n = random_models(order), 12
    jumps = draw_step_jumps(n, RULE, generator=keyed_generator(3, 0))
    data, noise = torch.randn(n, 2), torch.randn(n, 2)
    step_scale_loss(data, noise, jumps, models, RULE).mean().backward()
    ours = [w.grad.clone() for w in models.parameters("student")]
    for w in models.parameters("student"):
        w.grad = None
    t1 = jumps.times[:, :1]
    x1 = (1 - t1) * data + t1 * noise
    target = step_scale_target(x1, jumps, models, RULE)
    total = 0.0
    for i, steps in enumerate((jumps.steps // 2).tolist()):
        weights = models.weights("student", RULE.scale(steps))
        v = torch.func.functional_call(models.network, weights, (x1[i : i + 1], jumps.t1[i : i + 1]))
        total = total + (v - target[i : i + 1]).square().mean()
    (total / n).backward()
    for a, b in zip(ours, models.parameters("student"), strict=True):
        torch.testing.assert_close(a, b.grad, rtol=1e-4, atol=1e-7)


def train(models, on_step=None, **settings):
    """A short training on Gaussian data."""
    usual = {"global_batch_size": 16, "learning_rate": 1e-3, "shift": (0.9, 1.1), "algorithm": "step_scaled"}
    config = SCFMConfig(**usual, **settings)
    distill(models, lambda g, n: torch.randn(n, 2, generator=g), config, on_step, progress=False)


def test_training_moves_the_differences_alone_and_repeats_itself():
    def trained():
        torch.manual_seed(0)
        models = ScaledNetwork(MLP(16, 2))
        before = [w.clone() for w in models.bases["student"]]
        train(models, max_train_steps=4)
        assert all(torch.equal(a, b) for a, b in zip(before, models.bases["student"], strict=True))
        return models

    one, two = trained(), trained()
    for name in ("student", "ema"):
        pairs = zip(one.parameters(name), two.parameters(name), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert any(w.abs().sum() > 0 for w in one.parameters(name))


def test_any_number_of_steps_has_a_scale():
    assert [round(RULE.scale(n), 3) for n in (1, 2, 5, 64)] == [1.0, 0.555, 0.255, 0.029]
    steps = torch.tensor([2, 16, 18])
    assert RULE.target_scales(steps).tolist() == pytest.approx([2**-0.85, 16**-0.85, 0.0])
    assert RULE.student_scales(steps).tolist() == pytest.approx([1.0, 8**-0.85, 9**-0.85])


def test_from_scratch_flow_examples_train_the_base_and_the_others_the_differences():
    torch.manual_seed(0)
    models = ScaledNetwork(MLP(16, 2), train_base=True)
    jumps = draw_step_jumps(8, RULE, generator=keyed_generator(0, 0))
    data, noise = torch.randn(8, 2), torch.randn(8, 2)
    flow = Jumps(jumps.t1[:, None].expand(-1, 3), torch.zeros(8, dtype=torch.bool), torch.zeros(8))
    for drawn, learn, rest in (
        (flow, models.bases, models.differences),
        (jumps, models.differences, models.bases),
    ):
        for w in models.parameters("student"):
            w.grad = None
        step_scale_loss(data, noise, drawn, models, RULE).mean().backward()
        assert all(w.grad is not None for w in learn["student"])
        assert all(w.grad is None or not w.grad.any() for w in rest["student"])
    losses = step_scale_loss(data, noise, flow, models, RULE)  # and this one is plain flow matching
    x = torch.lerp(data, noise, jumps.t1[:, None])
    by_hand = (models.network(x, jumps.t1) - (noise - data)).square().mean(1)
    torch.testing.assert_close(losses, by_hand, rtol=1e-5, atol=1e-6)


def test_from_scratch_the_ema_of_the_base_is_an_ema():
    torch.manual_seed(0)
    network = MLP(16, 2)
    start = [w.detach().clone() for w in network.parameters()]
    models = ScaledNetwork(network, train_base=True)
    seen = []

    def on_step(i, output):
        seen.append([w.detach().clone() for w in models.bases["student"]])

    train(models, on_step, max_train_steps=3, non_shortcut_ratio=0.75, ema_decay=0.0, ema_decay_slow=0.9)
    for weights in seen:
        start = [a.lerp(w, 0.1) for a, w in zip(start, weights, strict=True)]
    for a, b in zip(start, models.bases["ema"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert not torch.equal(models.bases["ema"][0], models.bases["student"][0])


@pytest.mark.parametrize("order", [1, 2])
def test_the_learning_rate_of_a_difference_is_divided_by_what_it_is_multiplied_by(order):
    config = SCFMConfig(algorithm="step_scaled", scale_order=order, learning_rate=2e-4, lr_scheduler="cosine")
    models = ScaledNetwork(MLP(16, 2), order, train_base=True)
    optimizer, scheduler = make_optimizer(models, config)
    scales = [n**-0.85 for n in config.step_counts]
    means = [1.0] + [sum(scales) / len(scales)] * order  # the base, where it is trained, has no scale
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2e-4 / mean for mean in means])
    parts = [w for group in optimizer.param_groups for w in group["params"]]
    assert {id(w) for w in parts} == {id(w) for w in models.parameters("student")}
    assert len(parts) == len(models.parameters("student"))
    for _ in range(config.max_train_steps // 2):
        optimizer.step()
        scheduler.step()
    halved = [group["lr"] for group in optimizer.param_groups]
    assert halved == pytest.approx([1e-4 / mean for mean in means])
    from_scratch = SCFMConfig(algorithm="step_scaled", learning_rate=2e-4, non_shortcut_ratio=0.75)
    assert from_scratch.rate_of_differences == 5e-5  # on a base that learns, at its rate one step is lost
    weighted = StepScale(counts=(1, 4), weights=(3.0, 1.0))
    assert weighted.mean() == pytest.approx((3 + 4**-0.85) / 4)
    assert RULE.by_teacher() == 2 / 8  # of 12 and 16 steps
    assert StepScale(counts=(1, 16), weights=(3.0, 1.0)).by_teacher() == 1 / 4
    assert StepScale(counts=(1, 16), weights=(1.0, 0.0)).by_teacher() == 0
