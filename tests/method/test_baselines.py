"""Each few-step method's target against its closed form, on fields whose paths are known."""

import copy
from functools import partial

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.method.baselines import (
    COSTS,
    SHORTCUT_GRIDS,
    MeanFlowOutput,
    denoise,
    distillation_loss,
    distillation_target,
    dpm_solver_pp,
    fit,
    jump_length,
    make_pairs,
    meanflow_loss,
    meanflow_target,
    neighbour_jumps,
    network_evaluations,
    progressive,
    progressive_loss,
    progressive_target,
    reflow_loss,
    regress,
    sample_renoised,
    sample_with_step_size,
    shortcut_loss,
    shortcut_target,
    train_steps_for,
)
from scfm.method.consistency import DistillModels, Jumps, draw_jumps, scfm_loss
from scfm.method.distill import CopiedModels, SCFMConfig
from scfm.method.flow import interpolate, per_row, sample, time_grid
from scfm.method.metrics import curvature
from toy.plane import MLP, gaussian_slope, ring_mixture, with_step

rates = st.floats(-3, 3).filter(lambda a: abs(a) > 1e-2)
widths = st.floats(0.1, 2)
quick = settings(max_examples=25, deadline=None)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def points(n=16):
    return torch.randn(n, 2, generator=seeded(1)).double()


def linear(a):
    """V = a x: paths x_r = x_t exp(-a (t - r)); and its mean velocity over a step d."""

    def mean(x, t, d):
        return x * (-torch.expm1(-a * d) / d)[:, None]

    return lambda x, t, cond=None: a * x, mean


def gaussian(s):
    """The exact velocity of data N(0, s^2), x_r = x_t sigma(r) / sigma(t); its mean over a step; sigma."""

    def sigma(t):
        return ((1 - t) ** 2 * s**2 + t**2).sqrt()

    def mean(x, t, d):
        ratio = (sigma(t - d) / sigma(t))[:, None]
        return x * (1 - ratio) / d[:, None]

    return lambda x, t, cond=None: gaussian_slope(per_row(t, x), s) * x, mean, sigma


def straight(point):
    """All data are one point: V = (x - point) / t, every path a straight line into it."""
    return lambda x, t, cond=None: (x - point) / per_row(t, x)


POINT = torch.tensor([0.5, -2.0], dtype=torch.float64)


# Reflow


def test_reflow_pairs_end_where_the_teacher_takes_them():
    noise = points()
    endpoints, starts = make_pairs(linear(0.7)[0], noise, 8)
    assert starts is noise and torch.allclose(endpoints, noise * (1 - 0.7 / 8) ** 8)
    assert torch.allclose(make_pairs(straight(POINT), noise, 3)[0], POINT.expand(16, 2))


@quick
@given(widths)
def test_reflow_of_a_gaussian_is_a_known_straight_field(s):
    """Pairs (s z, z) meet nowhere: at x_t = ((1 - t) s + t) z the velocity is (1 - s) z,
    which lands on s z in one step."""

    def straightened(x, t, cond=None):
        return (1 - s) / ((1 - per_row(t, x)) * s + per_row(t, x)) * x

    noise = points()
    losses = reflow_loss(DistillModels(straightened, None, None, None), s * noise, noise, seeded())
    assert losses.shape == (16,) and losses.max() < 1e-12
    assert torch.allclose(sample(straightened, noise, time_grid(1)), s * noise)
    assert curvature(straightened, noise, time_grid(7)) < 1e-12


def test_reflow_loss_is_not_zero_for_another_field():
    noise = points()
    assert (
        reflow_loss(DistillModels(linear(1.0)[0], None, None, None), 0.3 * noise, noise, seeded()).mean()
        > 0.01
    )


# Progressive distillation


@quick
@given(rates, st.sampled_from([1, 2, 4, 16]))
def test_progressive_is_two_euler_steps_of_a_linear_teacher(a, steps):
    jumps, x = draw_jumps(16, 1.0, 2 * steps, shift=(1.0, 1.0), generator=seeded()), points()
    h = 0.5 / steps
    target = progressive_target(x, jumps, linear(a)[0])
    assert torch.allclose(
        target, x * (1 - (1 - a * h) ** 2) / (2 * h), rtol=1e-3, atol=1e-4
    )  # t = 1 is 1 - 1e-5


def test_a_progressive_student_at_its_target_follows_its_teacher_s_grid():
    """The field that is the target at the points of the grid: n steps of it are 2 n of the teacher."""
    teacher, noise = gaussian(0.4)[0], points()

    def student(x, t, cond=None):
        times = torch.stack([t, t - 0.125, t - 0.25], 1)
        return progressive_target(
            x, Jumps(times, torch.ones(len(x), dtype=torch.bool), torch.full((len(x),), 8)), teacher
        )

    assert torch.allclose(
        sample(student, noise, time_grid(4)), sample(teacher, noise, time_grid(8)), atol=1e-6
    )


def test_every_stage_of_progressive_sees_examples_of_its_own():
    seen = []

    def flat(generator, n):
        noise = torch.randn(n, 2, generator=generator)
        seen.append(noise)
        return torch.zeros(n, 2), noise

    progressive(
        MLP(8, 1),
        flat,
        SCFMConfig(max_train_steps=2, global_batch_size=4, learning_rate=1e-3),
        stages=(4, 2, 1),
    )
    assert len(seen) == 6 and len({tuple(noise.flatten().tolist()) for noise in seen}) == 6


def test_progressive_evaluates_its_own_grid_only_and_leaves_the_teacher_alone():
    network = MLP(8, 1)
    before = copy.deepcopy(network.state_dict())
    made = progressive(
        network, flat, SCFMConfig(max_train_steps=1, global_batch_size=4, learning_rate=1e-2), stages=(2, 1)
    )
    assert list(made) == [2, 1] and all(isinstance(n, MLP) for n in made.values())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    seen = []

    def spy(x, t, cond=None):
        seen.append(t)
        return x

    progressive_loss(DistillModels(spy, spy, None, None), points(64).float(), points(64).float(), seeded(), 4)
    assert {round(v, 3) for t in seen for v in t.tolist()} == {i / 8 for i in range(1, 9)}


# Consistency distillation


def test_the_boundary_condition_holds_for_any_field():
    x = points()
    assert torch.equal(denoise(linear(5.0)[0], x, torch.zeros(16)), x)


@quick
@given(rates)
def test_consistency_is_the_one_target_in_other_words(a):
    """(x_t1 - f(x_t2, t2)) / t1, by hand."""
    teacher, average = linear(a)[0], gaussian(0.5)[0]
    jumps, x = neighbour_jumps(16, 8, generator=seeded()), points()
    t1, t2, t3 = jumps.times.double().T
    assert (t1 > t2).all() and (t3 == 0).all() and (t2 == 0).any()
    x2 = x - (t1 - t2)[:, None] * teacher(x, t1)
    by_hand = (x - denoise(average, x2, t2)) / t1[:, None]
    assert torch.allclose(distillation_target(x, jumps, teacher, average), by_hand, rtol=1e-5, atol=1e-6)


@quick
@given(rates, st.sampled_from([2, 3, 8]))
def test_the_fixed_point_of_consistency_is_the_endpoint_of_the_teacher_s_euler_steps(a, grid):
    """With V = a x and steps 1 / grid: f(x, i / grid) = x (1 - a / grid)^i, and the target returns it."""

    def fixed(x, t, cond=None):
        i = (per_row(t, x).double() * grid).round()
        return x * (1 - (1 - a / grid) ** i) / per_row(t, x).double().clamp(min=1e-9)

    jumps, x = neighbour_jumps(32, grid, shift=(1.0, 1.0), generator=seeded()), points(32)
    target = distillation_target(x, jumps, linear(a)[0], fixed)
    assert torch.allclose(target, fixed(x, jumps.t1), rtol=1e-3, atol=1e-3)


def test_neighbours_are_one_step_of_the_warped_grid():
    jumps = neighbour_jumps(200, 4, shift=(1.0, 1.0), generator=seeded())
    assert {round(v, 4) for v in jumps.t1.tolist()} == {0.25, 0.5, 0.75, 1.0}
    assert torch.allclose(jumps.times[:, 0] - jumps.times[:, 1], torch.tensor(0.25), atol=2e-5)
    assert jumps.is_teacher.all()


def test_the_renoising_sampler_step_by_step():
    noise, sigma = points(), gaussian(0.4)[2]

    def one_step(x, t, cond=None):
        return x * (1 - 0.4 / sigma(t))[:, None] / t[:, None]  # exact: guess = x s / sigma(t)

    got = sample_renoised(one_step, noise, [1.0, 0.5, 0.0], seeded(3))
    fresh = torch.randn(16, 2, generator=seeded(3)).double()
    guess = 0.4 * noise
    x = 0.5 * guess + 0.5 * fresh
    assert torch.allclose(got, x * 0.4 / sigma(torch.tensor(0.5).double()), atol=1e-6)
    assert torch.allclose(
        sample_renoised(one_step, noise, [1.0, 0.0]), 0.4 * noise, atol=1e-6
    )  # one step: no fresh noise
    assert torch.allclose(
        sample_renoised(straight(POINT), noise, time_grid(5), seeded()), POINT.expand(16, 2)
    )


# The step as a second input


def test_a_network_with_a_step_input_starts_as_the_one_it_came_from():
    torch.manual_seed(0)
    network = MLP(16, 2)
    with_d, x, t, d = with_step(network), points().float(), torch.rand(16), torch.rand(16)
    assert torch.equal(with_d(x, t), with_d(x, t, torch.zeros(16)))
    assert torch.allclose(with_d(x, t, d), network(x, t), atol=1e-6)
    with_d.layers[0].weight.data[:, -1] = 1.0
    assert not torch.allclose(with_d(x, t, d), network(x, t), atol=1e-2)


@quick
@given(widths, st.integers(1, 5), st.floats(0.5, 3))
def test_the_mean_velocity_lands_exactly_in_any_number_of_steps(s, steps, shift):
    noise, (_, mean, _) = points(), gaussian(s)
    assert torch.allclose(
        sample_with_step_size(mean, noise, time_grid(steps, shift).double()), s * noise, atol=1e-9
    )


# Shortcut Models


@quick
@given(widths)
def test_the_exact_mean_velocity_is_self_consistent(s):
    """Shortcut's own condition: two exact halves make the exact whole, step 0 is the teacher."""
    teacher, mean, _ = gaussian(s)
    jumps, x = (
        draw_jumps(
            32, 0.0, self_grids=(2, 4, 8), shift=(1.0, 1.0), generator=seeded(), non_shortcut_ratio=0.5
        ),
        points(32),
    )
    d = jump_length(jumps).double()
    assert (d == 0).sum() == 16 and {round(v, 3) for v in d.tolist()} <= {0.0, 1.0, 0.5, 0.25}
    target = shortcut_target(x, jumps, teacher, mean)
    t = jumps.t1.double()
    wanted = torch.where((d > 0)[:, None], mean(x, t, d.clamp(min=1e-9)), teacher(x, t))
    assert torch.allclose(target, wanted, rtol=1e-3, atol=1e-3)


def test_shortcut_s_halves_of_a_linear_field():
    """An average that is a x whatever the step: two halves of length h give x (1 - (1 - a h)^2) / (2 h)."""
    jumps, x = draw_jumps(16, 0.0, self_grids=(2,), shift=(1.0, 1.0), generator=seeded()), points()
    inputs = []

    def average(x, t, d):
        inputs.append(d)
        return 0.6 * x

    target = shortcut_target(x, jumps, linear(9.0)[0], average)
    assert torch.allclose(target, x * (1 - (1 - 0.3) ** 2), rtol=1e-3, atol=1e-3)
    assert len(inputs) == 2 and all(torch.allclose(d, torch.tensor(0.5), atol=1e-4) for d in inputs)


def test_shortcut_s_smallest_halves_are_evaluated_as_no_step_at_all():
    inputs = []

    def average(x, t, d):
        inputs.append(d)
        return x

    jumps = draw_jumps(64, 0.0, self_grids=SHORTCUT_GRIDS, shift=(1.0, 1.0), generator=seeded())
    shortcut_target(points(64), jumps, linear(1.0)[0], average, 1 / 32)
    sizes = {round(v, 4) for v in inputs[0].tolist()}
    assert sizes == {0.0, *(round(1 / n, 4) for n in (2, 4, 8, 16))} and torch.equal(
        inputs[0] == 0, jumps.steps == 32
    )
    for steps, wanted in ((32, 0.0), (16, 1 / 16)):
        sizes = []
        sample_with_step_size(
            lambda x, t, d, sizes=sizes: sizes.append(d) or x, points(2), time_grid(steps), 1 / 32
        )
        assert len(sizes) == steps and torch.allclose(torch.stack(sizes), torch.tensor(wanted), atol=1e-6)


# MeanFlow


@quick
@given(st.one_of(rates.map(lambda a: linear(a)), widths.map(lambda s: gaussian(s)[:2])))
def test_the_exact_mean_velocity_is_meanflow_s_fixed_point(fields):
    teacher, mean = fields
    x, t = points(), torch.rand(16, generator=seeded()).double() * 0.9 + 0.1
    d = t * torch.rand(16, generator=seeded(2)).double().clamp(min=0.05)
    output = meanflow_target(mean, x, t, d, teacher(x, t))
    assert torch.allclose(output.pred, mean(x, t, d)) and torch.allclose(
        output.target, output.pred, atol=1e-9
    )


def test_meanflow_s_target_of_a_wrong_prediction_is_known():
    """u = b x everywhere, teacher a x: the target is a x - d b a x."""
    x, t = points(), torch.full((16,), 0.8).double()
    output = meanflow_target(lambda x, t, d: 2.0 * x, x, t, t / 2, 3.0 * x)
    assert isinstance(output, MeanFlowOutput) and torch.allclose(output.target, 3 * x - 0.4 * 2 * 3 * x)


def test_meanflow_at_step_zero_is_the_teacher_and_keeps_the_gradient():
    torch.manual_seed(0)
    network, x, t = with_step(MLP(16, 2)), points().float(), torch.rand(16)
    output = meanflow_target(network, x, t, torch.zeros(16), 3 * x)
    assert torch.equal(output.target, 3 * x) and not output.target.requires_grad
    pred = network(x, t, torch.zeros(16))
    assert torch.allclose(output.pred, pred, atol=1e-6)
    ours = torch.autograd.grad((output.pred - output.target).square().mean(), network.parameters())
    plain = torch.autograd.grad((pred - 3 * x).square().mean(), network.parameters())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, plain, strict=False))


def test_meanflow_s_derivative_is_that_of_finite_differences():
    torch.manual_seed(0)
    network = with_step(MLP(16, 2, frequencies=3)).double()
    network.layers[0].weight.data.normal_()
    x, t, d, v, h = (
        points(),
        torch.full((16,), 0.8).double(),
        torch.full((16,), 0.3).double(),
        3 * points(),
        1e-5,
    )
    change = (network(x + h * v, t + h, d + h) - network(x - h * v, t - h, d - h)) / (2 * h)
    assert torch.allclose(meanflow_target(network, x, t, d, v).target, v - 0.3 * change, atol=1e-5)


@quick
@given(widths)
def test_meanflow_is_the_limit_of_a_jump_whose_first_step_is_short(s):
    """First step h by the teacher, the rest by u itself: target - u = h / d (MeanFlow's target - u), also for
    a wrong u."""
    teacher, x, t, d, h = (
        gaussian(s)[0],
        points(),
        torch.full((16,), 0.9).double(),
        torch.full((16,), 0.5).double(),
        1e-5,
    )

    def wrong(x, t, d):
        return (x * t[:, None]).sin() * (1 + d)[:, None]

    output = meanflow_target(wrong, x, t, d, teacher(x, t))
    second = wrong(x - h * teacher(x, t), t - h, d - h)
    target = (h * teacher(x, t) + (0.5 - h) * second) / 0.5
    assert torch.allclose(
        (target - output.pred) / (h / 0.5), output.target - output.pred, atol=1e-2, rtol=1e-2
    )


# The dpm_solver_pp solver


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_multistep_is_diffusers_dpm_solver(steps, shift):
    stock = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
    )
    stock.set_timesteps(steps)
    field, noise = ring_mixture().field, torch.randn(32, 2, generator=seeded())
    x = noise
    for t, sigma in zip(stock.timesteps, stock.sigmas, strict=False):
        x = stock.step(field(x, sigma.expand(32)), t, x).prev_sample
    assert torch.allclose(dpm_solver_pp(field, noise, stock.sigmas), x, atol=2e-5)


def test_multistep_is_of_second_order_and_euler_where_it_has_no_past():
    noise, field = points(), gaussian(0.4)[0]
    wrong = [(dpm_solver_pp(field, noise, time_grid(n)) - 0.4 * noise).abs().max() for n in (128, 256)]
    assert wrong[0] / wrong[1] > 3
    assert torch.allclose(
        dpm_solver_pp(field, noise, time_grid(2)), sample(field, noise, time_grid(2)), atol=1e-6
    )
    assert torch.allclose(dpm_solver_pp(straight(POINT), noise, time_grid(5)), POINT.expand(16, 2))


# The cost, and the loop


def flat(generator, n):
    return torch.randn(n, 2, generator=generator), torch.randn(n, 2, generator=generator)


class Counted:
    """Models that count the examples that each is evaluated on."""

    def __init__(self):
        self.examples = dict.fromkeys(DistillModels._fields, 0)
        for name in DistillModels._fields:
            setattr(self, name, partial(self.evaluate, name))

    def evaluate(self, name, x, t, cond=None):
        self.examples[name] += len(x)
        return x * per_row(t, x)


LOSSES = {
    "reflow": reflow_loss,
    "progressive": partial(progressive_loss, steps=4),
    "consistency": distillation_loss,
    "shortcut": shortcut_loss,
    "meanflow": meanflow_loss,
    "scfm": lambda models, data, noise, g: scfm_loss(data, noise, draw_jumps(len(data), generator=g), models),
}


@pytest.mark.parametrize("method", COSTS)
def test_the_cost_is_what_is_counted(method):
    models, n = Counted(), 64
    losses = LOSSES[method](models, *flat(seeded(), n), seeded())
    assert losses.shape == (n,)
    derivative = n if method == "meanflow" else 0  # rides along with the forward, unseen by the count
    assert sum(models.examples.values()) + derivative + 2 * n == network_evaluations(method, n)
    assert network_evaluations(method, n, lora=True) == network_evaluations(method, n) - n


@pytest.mark.parametrize(
    "method, evaluated",
    [
        ("reflow", {}),
        ("progressive", {"teacher": 128}),
        ("consistency", {"teacher": 64, "ema_fast": 64}),
        ("shortcut", {"teacher": 48, "ema_fast": 32}),
        ("meanflow", {"teacher": 64}),
    ],
)
def test_each_target_comes_from_its_own_models(method, evaluated):
    models = Counted()
    LOSSES[method](models, *flat(seeded(), 64), seeded())
    assert models.examples == {"student": 64, "teacher": 0, "ema_fast": 0, "ema_slow": 0} | evaluated


def test_meanflows_loss_is_each_error_over_its_own_size_and_half_of_the_examples_have_no_length():
    inputs = []

    def student(x, t, step):
        inputs.append((x, t, step))
        return x * per_row(t, x) * (1 + per_row(step, x))

    def teacher(x, t, step=None):
        return torch.cos(x)

    data, noise = flat(seeded(), 2000)
    losses = meanflow_loss(DistillModels(student, teacher, None, None), data, noise, seeded())
    x, t, d = (part.detach() for part in inputs[0])
    assert (
        0.46 < (d == 0).float().mean() < 0.54
        and (d <= t).all()
        and torch.allclose(x, interpolate(data, noise, t))
    )
    v = teacher(x, t)  # u = x t (1 + d): along the path v t (1 + d) + x (1 + d) + x t
    change = v * per_row(t * (1 + d), x) + x * per_row(1 + d + t, x)
    error = (student(x, t, d) - (v - per_row(d, x) * change)).square().sum(1)
    assert torch.allclose(losses, error / (error + 1e-3), atol=1e-5)


def test_pairs_are_paid_and_the_budget_is_spent():
    assert network_evaluations("reflow", 100, pairs=7, pair_steps=32) == 300 + 224
    for method in COSTS:
        steps = train_steps_for(method, 100_000, 64, pairs=500)
        left = 100_000 - network_evaluations(method, 64 * steps, pairs=500)
        assert 0 <= left < network_evaluations(method, 64)
    with pytest.raises(ValueError, match="buys no step of 64 examples of reflow"):
        train_steps_for("reflow", 32_000, 64, pairs=1000)
    with pytest.raises(ValueError, match="method='dmd': known are reflow"):
        network_evaluations("dmd", 1)


@pytest.mark.parametrize("method", COSTS)
def test_every_loss_trains_the_student_alone_and_the_same_each_time(method):
    def run():
        torch.manual_seed(0)
        network = with_step(MLP(8, 1))
        models = fit(
            CopiedModels(network),
            flat,
            SCFMConfig(max_train_steps=2, global_batch_size=8, learning_rate=1e-2),
            LOSSES[method],
        )
        return [[p.clone() for p in models.parameters(name)] for name in ("teacher", "student")]

    (teacher, student), (_, again) = run(), run()
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(teacher, with_step(MLP(8, 1)).parameters(), strict=False))
    assert any(not torch.equal(a, b) for a, b in zip(teacher, student, strict=False))
    assert all(torch.equal(a, b) for a, b in zip(student, again, strict=False))


def test_regress_is_the_mean_square_of_each_example():
    x = points()
    assert torch.allclose(
        regress(DistillModels(linear(2.0)[0], None, None, None), x, torch.ones(16), x), x.square().mean(1)
    )


def test_a_config_that_makes_no_sense_is_refused_before_any_step():
    with pytest.raises(ValueError, match="max_train_steps=0"):
        fit(CopiedModels(MLP(8, 1)), flat, SCFMConfig(max_train_steps=0), reflow_loss)


def test_the_losses_agree_with_interpolate():
    """At t = t1 the student is inputs at the path's point: a data point 0 makes it t1 noise."""
    seen = []

    def spy(x, t, cond=None):
        seen.append((x, t))
        return x

    noise = points().float()
    distillation_loss(DistillModels(spy, spy, spy, spy), torch.zeros(16, 2), noise, seeded())
    x, t = seen[-1]
    assert torch.allclose(x, interpolate(torch.zeros(16, 2), noise, t))
