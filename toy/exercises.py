"""The checks of the exercises in the chapters:  from toy.exercises import check;  check("01.1", my_function)

A check says what is wrong; the solutions are folded under the exercises, and the tests keep them right.
"""

from collections.abc import Callable
from typing import Any

import torch

from scfm.method.consistency import DistillModels, consistency_target, draw_jumps, scfm_loss
from scfm.method.flow import interpolate, sample, time_grid
from scfm.streams import keyed_generator

CHECKS: dict[str, Callable[[Any], None]] = {}


def check(number: str, answer: Any) -> str:
    """ "right", or an AssertionError that says what is not. number: as in the chapter, such as "01.1"."""
    if number not in CHECKS:
        raise ValueError(f"there is no exercise {number!r}: one of {', '.join(CHECKS)}")
    CHECKS[number](answer)
    return "right"


def exercise(number: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Notes a check under its number."""

    def note(function: Callable[[Any], None]) -> Callable[[Any], None]:
        CHECKS[number] = function
        return function

    return note


def near(found: Any, wanted: float, what: str, within: float = 1e-3) -> None:
    """AssertionError with both numbers where they differ."""
    assert found is not None, f"{what}: nothing came back; did you forget to return it?"
    assert abs(float(found) - wanted) <= within, f"{what}: {float(found):.4f}, should be {wanted:.4f}"


def slope(t: float) -> float:
    """a(t) of the exact velocity a(t) x for data N(0, 1)."""
    return (2 * t - 1) / ((1 - t) ** 2 + t**2)


def exact_mean(n: int) -> float:
    """The slope that one step of length 1 / n from t = 1 should have, for data N(0, 1)."""
    end = 1 - 1 / n
    return n * (1 - ((1 - end) ** 2 + end**2) ** 0.5)


@exercise("00.1")
def predicts_the_data(predict: Callable) -> None:
    data, noise = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.1, 0.3, 0.5, 0.9, 1.0])
    found = predict(interpolate(data, noise, t), t, noise - data)
    assert isinstance(found, torch.Tensor) and found.shape == data.shape, "give (B, 2), as x has"
    far = (found - data).abs().max().item()
    assert far < 1e-5, (
        f"off by up to {far:.2g}: which way does the velocity point, and how much time is left?"
    )


@exercise("00.2")
def knows_the_end(end: Callable) -> None:
    start = torch.tensor([[-1.5], [0.2], [2.0]], dtype=torch.float64)
    for m, s in ((0.0, 1.0), (2.0, 0.5), (-1.0, 0.1)):

        def exact(x, t, cond=None, m=m, s=s):
            t = t[:, None]
            return (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2) * (x - (1 - t) * m) - m

        reached = sample(exact, start, time_grid(400), solver="midpoint")
        for z, x in zip(start[:, 0].tolist(), reached[:, 0].tolist(), strict=True):
            near(end(z, m, s), x, f"where {z} ends for data N({m}, {s}^2)")


@exercise("00.3")
def crosses(answer: Any) -> None:
    ((data1, noise1), (data2, noise2)), t = answer
    assert 0 < t < 1, "the time lies between 0 and 1"
    places = [(1 - t) * data + t * noise for data, noise in ((data1, noise1), (data2, noise2))]
    near(places[1], places[0], f"the second pair's place at t = {t}, against the first's")
    assert abs((noise1 - data1) - (noise2 - data2)) > 1e-3, "their velocities are the same: nothing disagrees"


@exercise("00.4")
def knows_the_last_step(last_step: Callable) -> None:
    for n, s in ((1, 3.0), (4, 1.0), (4, 3.0), (8, 0.5)):
        near(last_step(n, s), time_grid(n, s)[-2].item(), f"the last step of {n} at shift {s:g}", 1e-5)


@exercise("00.5")
def knows_the_spread(spread: Callable) -> None:
    start = torch.linspace(-2, 2, 9)[:, None]
    for n in (1, 2, 4, 16):
        ends = sample(lambda x, t, cond=None: slope(float(t[0])) * x, start, time_grid(n))
        near(spread(n), (ends / start)[0].item(), f"the deviation after {n} steps")


@exercise("00.6")
def finds_the_best_middle(answer: Any) -> None:
    middle, best = answer
    near(middle, 0.5, "the time in the middle")
    near(best, 0.5, "the deviation that it reaches")


@exercise("01.1")
def averages_three(target: Callable) -> None:
    times = (0.9, 0.7, 0.4, 0.3)
    v = torch.tensor([1.0, -2.0, 5.0])
    moved = sum((a - b) * u for a, b, u in zip(times, times[1:], v.tolist(), strict=False))
    found = target(*v, *times)
    near(found, moved / (times[0] - times[-1]), "the velocity that lands where three steps land")


@exercise("01.2")
def knows_the_slope(solution: Callable) -> None:
    for a, (t1, t2, t3) in ((2.0, (0.9, 0.6, 0.4)), (-1.0, (1.0, 0.5, 0.0)), (0.3, (0.5, 0.4, 0.1))):
        h1, h2 = t1 - t2, t2 - t3
        wanted = (h1 * a + h2 * a * (1 - h1 * a)) / (h1 + h2)
        near(solution(a, t1, t2, t3), wanted, f"the slope for a = {a} and the jump {t1}, {t2}, {t3}")


@exercise("01.3")
def collapses(field: Callable) -> None:
    generator = keyed_generator(0, 0)
    data, noise = torch.randn(2, 256, 2, generator=generator)
    data = data * 0.1 + 1
    jumps = draw_jumps(256, 0.0, generator=generator)
    models = DistillModels(*[lambda x, t, cond=None: field(x, t)] * 4)
    loss = scfm_loss(data, noise, jumps, models).max().item()
    assert loss < 1e-8, (
        f"the loss is still {loss:.2g} somewhere: one jump of your field is not two of its own"
    )
    ends = sample(models.student, noise, time_grid(4))
    assert (ends.mean() - 1).abs() > 0.3, "this field does bring the data: the loss is right about it"
    straight = consistency_target(noise, jumps, models)
    assert straight.isfinite().all(), "the velocity is not finite"


@exercise("02.1")
def knows_the_decay(decay: Callable) -> None:
    for memory in (10, 100, 2000):
        near(decay(memory), 1 - 1 / memory, f"the decay with a memory of {memory} steps", 1e-6)


@exercise("02.2")
def knows_the_rest_of_the_start(steps: Callable) -> None:
    for d in (0.9, 0.99, 0.999):
        found = steps(d)
        assert d**found <= 0.01 < d ** (found - 1), (
            f"after {found} steps at decay {d} the start has weight {d**found:.4f}: give the first count at "
            "which it is a hundredth or less"
        )


@exercise("02.3")
def knows_when_it_is_stuck(stuck: Callable) -> None:
    for d in (0.9, 0.98, 0.99, 0.993, 0.995, 0.999):
        average, source = torch.tensor(1.0).bfloat16(), torch.tensor(1.5).bfloat16()
        moved = average + ((1 - d) * (source - average).float()).bfloat16()
        assert bool(stuck(d)) == bool(moved == average), (
            f"at decay {d} it {'stays' if moved == average else 'moves'}"
        )


@exercise("06.1")
def knows_the_rule(scales: Callable) -> None:
    for n, wanted in ((1, (1.0, 1.0)), (4, (0.3078, 0.0947)), (16, (0.0947, 0.009))):
        found = scales(n)
        assert len(found) == 2, "give two numbers: of the first LoRA and of the second"
        for number, right, which in zip(found, wanted, ("first", "second"), strict=True):
            near(number, right, f"{n} steps, the {which} LoRA")


@exercise("06.2")
def knows_the_first_difference(difference: Callable) -> None:
    for n in (1, 2, 8, 1000):
        near(difference(n), (exact_mean(n) - 1) * n, f"d1 at t = 1 for {n} steps", 2e-3)


@exercise("06.3")
def knows_who_takes_the_order(answer: Any) -> None:
    wanted = {1.0: (-0.5, 0.0), 0.5: (0.0, -0.5)}
    assert set(answer) == set(wanted), "an entry for p = 1 and one for p = .5"
    for p, (first, second) in wanted.items():
        near(answer[p][0], first, f"p = {p}: J D1 in units of dV/dt along the flow")
        near(answer[p][1], second, f"p = {p}: the term of s squared, in the same units")


@exercise("02.4")
def knows_the_rest(rest: Callable) -> None:
    for w, g, h, a2 in ((1.0, 0.98, 0.25, 0.8), (0.1, 1.0, 0.5, 0.0), (0.3, 0.9, 0.125, -0.6)):
        c = 0.0
        for _ in range(2000):  # the equation, repeated until nothing moves
            c = w * g + (1 - w) * (c + a2 * (1 - h * c)) / 2
        near(rest(w, g, h, a2), c, f"the slope at rest for w = {w}, g = {g}, h = {h}, a2 = {a2}")


@exercise("02.5")
def knows_the_area(too_wide: Callable) -> None:
    start, n = torch.ones(1, 1, dtype=torch.float64), 4000
    for gap, length in ((0.2, 1.0), (1.0, 0.25), (0.5, 0.5)):

        def student(x, t, cond=None, gap=gap, length=length):
            return (slope(float(t[0])) - gap * (float(t[0]) > 1 - length)) * x

        found = sample(student, start, time_grid(n)).item()
        near(too_wide(gap, length), found, f"a gap of {gap} over {length} of the time", 2e-3)


def rest_slopes(ratio: float) -> dict[int, float]:
    """{j: the student's slope at j / 16} at rest, for data N(0, 1), no shift, and a teacher ratio."""
    a = {0: slope(0)}
    for j in range(1, 17):
        first, second = slope(j / 16), slope(j / 16 - 1 / 32)
        total, own = ratio / 16, 0.0
        fixed = total * (first + second * (1 - first / 32)) / 2
        for n in (2, 4, 8, 16):
            if j % (32 // n) == 0:
                p, a2 = (1 - ratio) / 4 * 2 / n, a[j - 16 // n]
                total, fixed, own = total + p, fixed + p * a2 / 2, own + p * (1 - a2 / n) / 2
        a[j] = fixed / (total - own)
    return a


@exercise("02.6")
def widens(ratio: Any) -> None:
    assert ratio > 0, "with 0 nothing ties the student to the data; stay above it"
    a, spread = rest_slopes(float(ratio)), 1.0
    for i in range(8):
        spread *= 1 - a[16 - 2 * i] / 8
    assert spread > 1.25, f"at a ratio of {ratio:g} samples of 8 steps are {spread:.2f} times too wide"


@exercise("03.1")
def adds_up(weights: Callable) -> None:
    for sizes in ((4, 4), (8, 3, 1)):
        x = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0))
        found = weights(list(sizes))
        assert len(found) == len(sizes), "give one number for each part"
        total = sum(w * part.mean().item() for w, part in zip(found, x.split(sizes), strict=True))
        near(total, x.mean().item(), f"the mean of parts of {sizes}, added up", 1e-5)


@exercise("03.2")
def knows_the_lag(behind: Callable) -> None:
    for decay in (0.9, 0.99, 0.999):
        student = average = 0.0
        for step in range(1, 401):
            student += 1
            average += (1 - decay) * (student - average)
            if step in (1, 10, 400):
                near(behind(decay, step), student - average, f"decay {decay}, after {step} steps")


@exercise("03.3")
def unties(config: Any) -> None:
    config.check()
    jumps = draw_jumps(
        512, config.teacher_ratio, config.teacher_grid, config.self_grids, config.t_skip, config.shift_range,
        generator=keyed_generator(0, 0), non_shortcut_ratio=config.non_shortcut_ratio,
    )  # fmt: skip
    assert config.algorithm != "step_scaled", "its finest targets are the teacher's; try another algorithm"
    tied = int((jumps.is_teacher | jumps.is_flow).sum())
    assert tied == 0, f"{tied} of 512 examples still have a target from the teacher or the data"


@exercise("40.1")
def knows_consistency(target: Callable) -> None:
    for x, v, w, t1, t2 in ((1.0, 2.0, -1.0, 0.8, 0.7), (-0.5, 0.3, 4.0, 1.0, 0.25)):
        end = x - (t1 - t2) * v - t2 * w  # the average's prediction of the data, one step of the teacher on
        near(target(v, w, t1, t2), (x - end) / t1, f"the velocity for v = {v}, w = {w}, {t1} and {t2}")


@exercise("40.2")
def knows_the_width(too_wide: Callable) -> None:
    start = torch.ones(1, 1, dtype=torch.float64)
    for s in (0.1, 0.5, 1.0):

        def direct(x, t, cond=None, s=s):
            t = t[:, None]
            return (x - s * x / ((1 - t) ** 2 * s**2 + t**2) ** 0.5) / t

        found = sample(direct, start, time_grid(2)).item()
        near(too_wide(s), found / s, f"the width over the right one for s = {s}")


@exercise("40.3")
def loses_the_coupling(steps: Any) -> None:
    def correlation(n: int) -> float:
        left = 1.0
        for t in time_grid(n)[1:-1].tolist():
            left *= (1 - t) / ((1 - t) ** 2 + t**2) ** 0.5
        return left

    found = correlation(int(steps))
    assert found < 0.1, f"with {steps} steps the correlation is still {found:.3f}"
    assert correlation(int(steps) - 1) >= 0.1, f"with {steps} it is {found:.3f}, but fewer steps are enough"
