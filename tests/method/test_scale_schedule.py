"""A scale for each step: parabolas are exact, the search arrives and never gets worse, a schedule holds."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.method.distill import CopiedModels
from scfm.method.flow import sample, time_grid
from scfm.method.scale_schedule import parabola_min, per_step_field, search_per_step, step_groups
from toy.plane import MLP

number = st.floats(-3, 3, allow_nan=False)


@given(
    lowest=number,
    bend=st.floats(0.1, 10),
    floor=number,
    xs=st.lists(number, min_size=3, max_size=3, unique_by=lambda x: round(x, 1)),
)
def test_the_vertex_of_a_parabola_is_exact_where_the_points_hold_it(lowest, bend, floor, xs):
    xs = sorted(xs)
    result = parabola_min([(x, bend * (x - lowest) ** 2 + floor) for x in xs])
    assert result == pytest.approx(min(max(lowest, xs[0]), xs[-1]), abs=1e-6)


@given(
    xs=st.lists(number, min_size=3, max_size=3, unique_by=lambda x: round(x, 2)),
    ys=st.lists(st.floats(0, 10), min_size=3, max_size=3),
)
def test_whatever_the_distances_the_vertex_stays_between_the_points(xs, ys):
    xs = sorted(xs)
    assert xs[0] <= parabola_min(list(zip(xs, ys, strict=False))) <= xs[-1]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8, 13, 32])
def test_the_shares_are_all_steps_in_order_and_nearly_equal(steps):
    groups = step_groups(steps)
    assert sum(groups, []) == list(range(steps)) and len(groups) == min(steps, 4)
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


@st.composite
def bowls(draw):
    """(steps, start, where a distance is lowest, its bends, how the steps pull at each other)."""
    steps = draw(st.integers(1, 8))
    return (
        steps,
        draw(st.floats(0, 2)),
        [draw(st.floats(0, 2)) for _ in step_groups(steps)],
        [draw(st.floats(0.1, 5)) for _ in step_groups(steps)],
        draw(st.floats(-0.1, 0.1)),
    )


def distance_of(wanted, bends, pull, calls):
    def distance(scales):
        calls.append(scales)
        off = [scales[members[0]] - w for members, w in zip(step_groups(len(scales)), wanted, strict=False)]
        crossed = sum(a * b for a, b in zip(off, off[1:], strict=False))
        return max(sum(b * d * d for b, d in zip(bends, off, strict=False)) + pull * crossed + 0.5, 0) ** 0.5

    return distance


@settings(deadline=None, max_examples=60)
@given(bowls())
def test_the_search_evaluates_each_schedule_once_and_never_gets_worse(bowl):
    steps, start, *shape = bowl
    calls = []
    distance = distance_of(*shape, calls)
    result = search_per_step(distance, steps, start)
    assert len(calls) == len(set(calls)) == result.evaluations <= 1 + 4 * (1 + 4 * 2)
    assert len(result.scales) == steps and min(result.scales) >= 0
    assert result.distance == distance(result.scales) <= distance((start,) * steps)
    for members in step_groups(steps):
        assert len({result.scales[i] for i in members}) == 1


@settings(deadline=None, max_examples=40)
@given(
    start=st.floats(0.3, 1.7),
    wanted=st.lists(st.floats(-0.2, 0.2), min_size=4, max_size=4),
    bends=st.lists(st.floats(0.5, 5), min_size=4, max_size=4),
)
def test_steps_that_do_not_pull_at_each_other_arrive_in_one_round(start, wanted, bends):
    target = [start + w for w in wanted]
    scales, distance, _ = search_per_step(distance_of(target, bends, 0, []), 4, start, width=0.45, rounds=1)
    assert distance == pytest.approx(0.5**0.5, abs=1e-6) and scales == pytest.approx(target, abs=1e-3)


@pytest.mark.parametrize(
    "wrong", [dict(steps=0), dict(scale=-0.1), dict(scale=float("nan")), dict(width=0.0)]
)
def test_a_search_that_cannot_begin_is_refused(wrong):
    with pytest.raises(ValueError, match="give steps from 1"):
        search_per_step(lambda scales: 1.0, **{"steps": 2, "scale": 1.0, **wrong})


def student():
    torch.manual_seed(0)
    models = CopiedModels(MLP(16, 2))
    with torch.no_grad():
        for p in models.parameters("ema_slow"):
            p.add_(0.2 * torch.randn_like(p))
    return partial(models.field, "ema_slow")


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_schedule_is_the_walk_that_one_writes_by_hand(shift):
    field_at, times, scales, x = student(), time_grid(5, shift), (0.2, 1.7, 0.0, 0.9, 0.4), torch.randn(6, 2)
    by_hand = x
    for k, scale in enumerate(scales):
        by_hand = by_hand - (times[k] - times[k + 1]).item() * field_at(scale)(
            by_hand, times[k].expand(6), None
        )
    torch.testing.assert_close(
        sample(per_step_field(field_at, times, scales), x, times), by_hand, atol=0, rtol=0
    )


def test_equal_strengths_are_the_walk_at_one():
    field_at, times, x = student(), time_grid(4), torch.randn(6, 2)
    torch.testing.assert_close(
        sample(per_step_field(field_at, times, (0.7,) * 4), x, times),
        sample(field_at(0.7), x, times),
        atol=0,
        rtol=0,
    )


def test_a_schedule_of_another_length_is_refused():
    with pytest.raises(ValueError, match="3 scales for 4 steps"):
        per_step_field(student(), time_grid(4), (1.0, 1.0, 1.0))
