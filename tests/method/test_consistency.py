"""Jumps on their grids, the models of a target, the target in closed form, and where the gradient goes."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.method.consistency import (
    LOSSES,
    TARGET_MODELS,
    DistillModels,
    Jumps,
    consistency_target,
    draw_jumps,
    draw_teacher_mask,
    index_cond,
    scfm_loss,
    snap_times,
    velocity_by_row,
)
from scfm.method.flow import interpolate, shift_time
from scfm.streams import keyed_generator

ALGORITHMS = ("one_ema", "dual", "dual_pure")
rows_ = st.integers(1, 40)
shares = st.floats(0, 1)
shifts = st.floats(1.0, 4.5).flatmap(lambda low: st.tuples(st.just(low), st.floats(low, 4.5)))


def all_are(field):
    return DistillModels(*[field] * 4)


def constant(value):
    return lambda x, t, cond=None: torch.full_like(x, value)


def linear(a):
    return lambda x, t, cond=None: a * x


def jumps_from_config(times, teacher=False):
    times = torch.tensor(times, dtype=torch.float64)
    return Jumps(times, torch.full((len(times),), teacher), torch.full((len(times),), 8))


# ---------------------------------------------------------------- draws


@settings(deadline=None, max_examples=60)
@given(
    rows_,
    shares,
    shifts,
    st.integers(0, 10_000),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([2, 4]),
)
def test_times_decrease_and_stay_on_the_path(rows, share, shift, seed, dtype, t_skip):
    jumps = draw_jumps(
        rows, share, shift=shift, t_skip=t_skip, dtype=dtype, generator=keyed_generator(seed, 0)
    )
    assert jumps.times.shape == (rows, t_skip + 1) and jumps.times.dtype == torch.float32
    assert (jumps.times[:, :-1] > jumps.times[:, 1:]).all()
    assert (jumps.times[:, :-1] > 0).all() and (jumps.times >= 0).all() and (jumps.times <= 1).all()
    assert torch.equal(jumps.times, jumps.times.to(dtype).float())
    if dtype == torch.float32:
        assert jumps.times.max() <= 1 - 1e-6  # never t = 1 itself


@settings(deadline=None, max_examples=60)
@given(rows_, st.floats(0.5, 6.0), st.integers(0, 10_000), st.sampled_from([2, 4]))
def test_every_time_lies_on_its_examples_shifted_grid(rows, shift, seed, t_skip):
    jumps = draw_jumps(rows, shift=(shift, shift), t_skip=t_skip, generator=keyed_generator(seed, 0))
    for times, is_teacher, steps in zip(*jumps, strict=False):
        assert steps == 32 if is_teacher else steps in (2, 4, 8, 16)
        assert steps >= t_skip
        index = [
            round(float((1 - shift_time(t, 1 / shift)) * steps)) for t in times
        ]  # 1/s undoes a shift of s
        assert index == list(range(index[0], index[0] + t_skip + 1)) and index[0] % t_skip == 0
        exact = shift_time(1 - torch.tensor(index, dtype=torch.float64) / steps, shift).clamp(max=1 - 1e-5)
        torch.testing.assert_close(times.double(), exact, rtol=0, atol=3e-7)


def test_shift_is_drawn_per_example_within_its_range():
    jumps = draw_jumps(4000, 0.0, self_grids=(2,), shift=(2.5, 4.5), generator=keyed_generator(0, 0))
    middle = jumps.times[:, 1]  # s/2 / (1 + (s-1)/2) = s / (s + 1)
    shift = middle / (1 - middle)
    assert 2.5 - 1e-3 <= shift.min() < 2.55 and 4.45 < shift.max() <= 4.5 + 1e-3
    assert shift.mean() == pytest.approx(3.5, abs=0.05)


def test_segments_are_drawn_evenly():
    jumps = draw_jumps(40_000, 0.0, self_grids=(16,), shift=(1, 1), generator=keyed_generator(0, 0))
    count = torch.bincount(((1 - jumps.times[:, 1]) * 8).long(), minlength=8)
    assert (count.float() / 40_000 - 1 / 8).abs().max() < 0.01


def test_grids_below_t_skip_are_dropped_and_bad_ones_named():
    jumps = draw_jumps(500, 0.0, t_skip=4, generator=keyed_generator(0, 0))
    assert set(jumps.steps.tolist()) == {4, 8, 16}
    for settings_, word in (
        (dict(self_grids=(2, 9)), "9"),
        (dict(teacher_grid=31), "31"),
        (dict(t_skip=3), "t_skip=3"),
        (dict(self_grids=(2,), t_skip=4), "self_grids"),
        (dict(shift=(2, 1)), "shift"),
        (dict(shift=(0, 1)), "shift"),
        (dict(teacher_ratio=1.2), "teacher_ratio"),
        (dict(teacher_grid=2, t_skip=4, self_grids=(4,)), "teacher_grid"),
    ):
        with pytest.raises(ValueError, match=word):
            draw_jumps(4, **settings_)
    assert draw_jumps(4, 1.0, self_grids=()).is_teacher.all()  # teacher examples alone need no self grid


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 64), shares, st.integers(0, 1000))
def test_count_of_teacher_examples_is_a_neighbour_of_its_mean(rows, share, seed):
    count = int(draw_teacher_mask(rows, share, keyed_generator(seed, 0)).sum())
    assert math.floor(rows * share) <= count <= math.ceil(rows * share)


@pytest.mark.parametrize("rows, share", [(1, 0.4), (8, 0.4), (3, 0.25), (5, 0.2)])
def test_mean_count_of_teacher_examples_is_exact(rows, share):
    draws = 4000
    masks = torch.stack(
        [draw_teacher_mask(rows, share, keyed_generator(0, step)) for step in range(draws)]
    ).float()
    # the count is one of two neighbours, so its deviation is at most .5: five standard errors
    assert masks.sum(1).mean() == pytest.approx(rows * share, abs=5 * 0.5 / draws**0.5)
    assert (masks.mean(0) - share).abs().max() < 5 * 0.5 / draws**0.5  # and every place is as likely
    if (rows, share) == (1, 0.4):
        assert 0 < masks.sum() < draws  # sometimes a teacher example, never always


def test_snapping_names_the_mend():
    assert torch.equal(snap_times(torch.tensor([[0.751, 0.5]]), torch.bfloat16), torch.tensor([[0.75, 0.5]]))
    with pytest.raises(ValueError, match="bfloat16.*teacher_grid"):
        snap_times(torch.tensor([[0.751, 0.750]]), torch.bfloat16)
    with pytest.raises(ValueError, match="same in"):
        draw_jumps(200, 1.0, teacher_grid=512, dtype=torch.bfloat16, generator=keyed_generator(0, 0))


# ---------------------------------------------------------------- the models of a target


@pytest.mark.parametrize(
    "algorithm, teacher_row, self_row",
    [
        ("one_ema", (1.0, 1.0), (3.0, 3.0)),
        ("dual", (1.0, 3.0), (2.0, 3.0)),
        ("dual_pure", (1.0, 1.0), (2.0, 3.0)),
    ],
)
@pytest.mark.parametrize("t_skip", [2, 4])
def test_each_algorithm_takes_its_models(algorithm, teacher_row, self_row, t_skip):
    models = DistillModels(*map(constant, (0.0, 1.0, 2.0, 3.0)))  # student 0, teacher 1, fast 2, slow 3
    jumps = draw_jumps(20, 0.5, t_skip=t_skip, generator=keyed_generator(0, 0))
    target = consistency_target(torch.randn(20, 2), jumps, models, algorithm=algorithm)
    half = jumps.times[:, t_skip // 2]
    first = (jumps.times[:, 0] - half) / (jumps.times[:, 0] - jumps.times[:, -1])  # A's share of the jump
    for kind, (a, b) in ((True, teacher_row), (False, self_row)):
        rows = jumps.is_teacher == kind
        assert rows.any()
        expected = (first * a + (1 - first) * b)[rows, None].expand(-1, 2)
        torch.testing.assert_close(target[rows], expected, rtol=1e-5, atol=1e-5)


def test_the_table_is_the_papers():
    assert TARGET_MODELS["one_ema"] == {"teacher": ("teacher", "teacher"), "self": ("ema_slow", "ema_slow")}
    assert TARGET_MODELS["dual"] == {"teacher": ("teacher", "ema_slow"), "self": ("ema_fast", "ema_slow")}
    with pytest.raises(ValueError, match="triple.*one_ema, dual"):
        consistency_target(
            torch.zeros(1, 2),
            jumps_from_config([[0.5, 0.4, 0.3]]),
            all_are(constant(0.0)),
            algorithm="triple",
        )


def test_each_model_is_evaluated_once_and_on_its_own_rows():
    calls = []

    def recorded(name):
        def field(x, t, cond):
            calls.append((name, len(x)))
            return x * 0 + cond["w"][:, None] * t[:, None]

        return field

    models = DistillModels(*map(recorded, DistillModels._fields))
    x, t, w = torch.randn(6, 2), torch.rand(6), torch.arange(6.0)
    mask = torch.tensor([True, False, True, False, False, False])
    v = velocity_by_row(models, ("teacher", "ema_fast"), mask, x, t, {"w": w})
    assert calls == [("teacher", 2), ("ema_fast", 4)]
    torch.testing.assert_close(v, (w * t)[:, None].expand(-1, 2))
    calls.clear()
    velocity_by_row(models, ("ema_slow", "ema_slow"), mask, x, t, {"w": w})
    velocity_by_row(models, ("teacher", "ema_fast"), ~mask & mask, x, t, {"w": w})
    assert calls == [("ema_slow", 6), ("ema_fast", 6)]


def test_velocities_have_the_dtype_of_x():
    models = all_are(lambda x, t, cond: x.bfloat16())
    mask = torch.tensor([True, False])
    for names in (("teacher", "ema_slow"), ("ema_slow", "ema_slow")):
        assert velocity_by_row(models, names, mask, torch.zeros(2, 3), torch.ones(2)).dtype == torch.float32


def test_index_cond():
    x = torch.arange(6).reshape(3, 2)
    for index in (slice(1, 3), torch.tensor([False, True, True]), torch.tensor([1, 2])):
        assert torch.equal(index_cond(x, index), x[1:])
        taken = index_cond({"a": x, "b": (x, None), "c": [x]}, index)
        assert torch.equal(taken["a"], x[1:]) and torch.equal(taken["b"][0], x[1:]) and taken["b"][1] is None
        assert isinstance(taken["b"], tuple) and isinstance(taken["c"], list)
    named = Jumps(x, x, x)
    assert isinstance(index_cond(named, slice(1)), Jumps)
    with pytest.raises(TypeError, match="str"):
        index_cond("a prompt", slice(1))


def test_jumps_rows_are_the_same_rows():
    jumps = draw_jumps(10, generator=keyed_generator(0, 0))
    part = jumps.rows(slice(3, 7))
    assert torch.equal(part.times, jumps.times[3:7]) and torch.equal(part.is_teacher, jumps.is_teacher[3:7])
    assert torch.equal(part.steps, jumps.steps[3:7]) and torch.equal(part.t1, jumps.t1[3:7])


# ---------------------------------------------------------------- the target


@settings(deadline=None, max_examples=60)
@given(st.floats(-3, 3), st.lists(st.floats(0.01, 0.3), min_size=2, max_size=2), st.integers(0, 1000))
def test_target_on_linear_fields(a, steps, seed):
    """v = a x: two Euler steps multiply x by (1 - h1 a)(1 - h2 a), the target is x (1 - that) / (h1 + h2)."""
    h1, h2 = steps
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed)).double()
    target = consistency_target(
        x, jumps_from_config([[0.9, 0.9 - h1, 0.9 - h1 - h2]] * 3), all_are(linear(a))
    )
    torch.testing.assert_close(target, x * (a - a * a * h1 * h2 / (h1 + h2)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("algorithm, a, b", [("one_ema", 5.0, 5.0), ("dual", 7.0, 5.0)])
def test_target_of_four_steps_gives_each_model_half(algorithm, a, b):
    models = DistillModels(linear(2.0), linear(3.0), linear(7.0), linear(5.0))
    x = torch.ones(1, 2, dtype=torch.float64)
    times = [0.9, 0.75, 0.55, 0.4, 0.1]
    target = consistency_target(x, jumps_from_config([times]), models, algorithm=algorithm)
    factor = (1 - 0.15 * a) * (1 - 0.2 * a) * (1 - 0.15 * b) * (1 - 0.3 * b)
    torch.testing.assert_close(target, x * (1 - factor) / 0.8, rtol=1e-9, atol=0)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.sampled_from(ALGORITHMS), st.sampled_from([2, 4]), st.floats(0, 1))
def test_a_straight_field_is_a_fixed_point(seed, algorithm, t_skip, share):
    """On a straight path the velocity is the same all the way, so every jump lands: the loss is zero."""
    generator = keyed_generator(seed, 0)
    data, noise = torch.randn(2, 8, 3, generator=generator)
    direction = noise - data
    jumps = draw_jumps(8, share, t_skip=t_skip, generator=generator)

    def straight(x, t, cond):
        return cond  # each example's own direction, everywhere

    loss = scfm_loss(data, noise, jumps, all_are(straight), direction, algorithm)
    assert loss.shape == (8,) and loss.max() < 1e-9


def test_the_target_lands_where_the_two_steps_land():
    def field(x, t, cond=None):
        return torch.sin(3 * x) + t[:, None]

    x1 = torch.randn(16, 2, dtype=torch.float64)
    jumps = draw_jumps(16, generator=keyed_generator(1, 0))
    t1, t2, t3 = jumps.times.double()[..., None].unbind(1)
    jumps = Jumps(jumps.times.double(), *jumps[1:])
    x2 = x1 - (t1 - t2) * field(x1, t1[:, 0])
    x3 = x2 - (t2 - t3) * field(x2, t2[:, 0])
    torch.testing.assert_close(x1 - (t1 - t3) * consistency_target(x1, jumps, all_are(field)), x3)


def test_images_and_points_share_the_loss():
    data, noise = torch.randn(2, 4, 3, 5, 5)
    jumps = draw_jumps(4, generator=keyed_generator(0, 0))
    models = DistillModels(linear(0.5), *[linear(1.0)] * 3)
    flat = scfm_loss(data.flatten(1), noise.flatten(1), jumps, models)
    torch.testing.assert_close(scfm_loss(data, noise, jumps, models), flat)


# ---------------------------------------------------------------- the gradient


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradient_is_plain_autograd_with_a_detached_target(algorithm):
    torch.manual_seed(0)
    nets = {
        name: torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
        for name in DistillModels._fields
    }
    fields = DistillModels(*[lambda x, t, cond, n=n: n(torch.cat([x, t[:, None]], 1)) for n in nets.values()])
    data, noise = torch.randn(2, 12, 2)
    jumps = draw_jumps(12, generator=keyed_generator(0, 0))
    scfm_loss(data, noise, jumps, fields, algorithm=algorithm).mean().backward()
    got = [p.grad.clone() for p in nets["student"].parameters()]
    assert all(
        p.grad is None for name in ("teacher", "ema_fast", "ema_slow") for p in nets[name].parameters()
    )

    t1, t2, t3 = jumps.times[..., None].unbind(1)
    x1 = interpolate(data, noise, jumps.t1)
    velocities = {name: fields._asdict()[name](x1, t1[:, 0], None).detach() for name in DistillModels._fields}

    def velocity_of(step):
        return torch.where(
            jumps.is_teacher[:, None],
            *[velocities[TARGET_MODELS[algorithm][kind][step]] for kind in ("teacher", "self")],
        )

    v1 = velocity_of(0)
    x2 = x1 - (t1 - t2) * v1
    velocities = {name: fields._asdict()[name](x2, t2[:, 0], None).detach() for name in DistillModels._fields}
    target = ((t1 - t2) * v1 + (t2 - t3) * velocity_of(1)) / (t1 - t3)
    plain = (fields.student(x1, t1[:, 0], None) - target).square().mean()
    expected = torch.autograd.grad(plain, list(nets["student"].parameters()))
    for g, e in zip(got, expected, strict=False):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)


def test_targets_come_before_the_student():
    """The models may share one network: no other is evaluated between the student's forward and backward."""
    order = []
    models = DistillModels(
        *[lambda x, t, cond, name=name: (order.append(name), x)[1] for name in DistillModels._fields]
    )
    scfm_loss(
        torch.zeros(8, 2), torch.ones(8, 2), draw_jumps(8, 0.5, generator=keyed_generator(0, 0)), models
    )
    assert order.count("student") == 1 and order[-1] == "student"


@pytest.mark.slow
@pytest.mark.parametrize("module", ["consistency", "ema", "distill"])
def test_chapters_need_torch_alone(module):
    code = f"import sys, scfm.method.{module}\n"
    code += (
        "print([m for m in ('diffusers', 'transformers', 'peft', 'accelerate', 'toy') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


# Flow-matching examples, losses, the model's own shift


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 12), share=st.floats(0, 1), teacher_ratio=st.floats(0, 1), seed=st.integers(0, 99))
def test_flow_examples_have_one_time_and_no_teacher(rows, share, teacher_ratio, seed):
    jumps = draw_jumps(
        rows, teacher_ratio, non_shortcut_ratio=share, shift=(2.5, 4.5), generator=keyed_generator(seed, 0)
    )
    flow = jumps.is_flow
    assert abs(int(flow.sum()) - rows * share) < 1
    assert not (flow & jumps.is_teacher).any() and (jumps.times[flow] == jumps.t1[flow, None]).all()
    assert (
        (jumps.times[~flow, :-1] > jumps.times[~flow, 1:]).all()
        and (jumps.times >= 0).all()
        and (jumps.times < 1).all()
    )


def test_flow_times_are_uniform_before_the_warp():
    jumps = draw_jumps(40_000, 0.0, non_shortcut_ratio=1.0, shift=(3.0, 3.0), generator=keyed_generator(0, 0))
    u = (jumps.t1 / (3 - 2 * jumps.t1)).sort().values  # the warp undone
    assert (u - (torch.arange(40_000) + 0.5) / 40_000).abs().max() < 0.01


def test_a_share_of_flow_examples_changes_no_other_draw():
    plain, mixed = (
        draw_jumps(64, 0.4, non_shortcut_ratio=share, generator=keyed_generator(5, 0)) for share in (0.0, 0.5)
    )
    shortcut = ~mixed.is_flow
    assert torch.equal(plain.times[shortcut], mixed.times[shortcut]) and torch.equal(
        plain.is_teacher[shortcut], mixed.is_teacher[shortcut]
    )


def test_flow_examples_train_towards_noise_minus_data_and_the_others_as_before():
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 16, 3, generator=generator)
    jumps = draw_jumps(16, 0.5, non_shortcut_ratio=0.5, generator=keyed_generator(0, 0))
    models = DistillModels(linear(0.3), linear(1.0), linear(1.5), linear(2.0))
    losses = scfm_loss(data, noise, jumps, models)
    x1 = (1 - jumps.t1)[:, None] * data + jumps.t1[:, None] * noise
    for i in range(16):
        target = (
            noise[i : i + 1] - data[i : i + 1]
            if jumps.is_flow[i]
            else consistency_target(x1[i : i + 1], jumps.rows(slice(i, i + 1)), models)
        )
        torch.testing.assert_close(losses[i], (0.3 * x1[i] - target[0]).square().mean())


@settings(deadline=None, max_examples=30)
@given(
    pred=st.lists(st.floats(-4, 4), min_size=3, max_size=3),
    target=st.lists(st.floats(-4, 4), min_size=3, max_size=3),
)
def test_losses_are_what_their_names_mean(pred, target):
    a, b = torch.tensor([pred], dtype=torch.float64), torch.tensor([target], dtype=torch.float64)
    errors = [abs(x - y) for x, y in zip(pred, target, strict=False)]
    assert float(LOSSES["mse"](a, b)) == pytest.approx(sum(e * e for e in errors) / 3)
    assert float(LOSSES["huber"](a, b)) == pytest.approx(
        sum(e * e if e <= 1 else 2 * e - 1 for e in errors) / 3
    )
    lengths = [math.sqrt(sum(v * v for v in row)) for row in (pred, target)]
    if min(lengths) > 1e-3:
        cosine = sum(x * y for x, y in zip(pred, target, strict=False)) / lengths[0] / lengths[1]
        assert float(LOSSES["cosine"](a, b)) == pytest.approx(1 - cosine, abs=1e-9)


def test_a_tenth_of_the_examples_take_the_models_own_shift():
    jumps = draw_jumps(
        20_000,
        1.0,
        teacher_grid=4,
        t_skip=4,
        shift=(2.0, 2.0),
        dynamic_shift=8.0,
        generator=keyed_generator(0, 0),
    )
    odds = jumps.times[:, 2] / (1 - jumps.times[:, 2])  # the middle of the path: odds 1 before the warp
    assert set(odds.round().int().tolist()) == {2, 8}
    assert abs((odds > 5).float().mean() - 0.1) < 0.01
    each = draw_jumps(
        4,
        1.0,
        teacher_grid=4,
        t_skip=4,
        dynamic_shift=torch.tensor([2.0, 3, 4, 5]),
        dynamic_shift_prob=1.0,
        generator=keyed_generator(0, 0),
    )
    torch.testing.assert_close(each.times[:, 2] / (1 - each.times[:, 2]), torch.tensor([2.0, 3, 4, 5]))
