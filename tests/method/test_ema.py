"""The fast and the slow EMA against their closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.method.ema import EMA, FastSlow, half_life, memory, shorten


def tensors(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 4), (5,), ())]


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 0.9999), st.integers(1, 60), st.integers(0, 1000))
def test_average_is_the_weighted_sum_of_its_history(decay, updates, seed):
    history = [
        torch.randn(4, generator=torch.Generator().manual_seed(seed + i)).double() for i in range(updates + 1)
    ]
    source = [history[0].clone()]
    average = [torch.empty(4, dtype=torch.float64)]
    ema = EMA(average, source, decay)
    for value in history[1:]:
        source[0].copy_(value)
        ema.update()
    closed = decay**updates * history[0] + sum(
        (1 - decay) * decay ** (updates - i) * history[i] for i in range(1, updates + 1)
    )
    torch.testing.assert_close(average[0], closed, rtol=1e-9, atol=1e-9)


def test_starts_as_a_copy_and_leaves_the_source_alone():
    source = tensors(0)
    average = [torch.zeros_like(s) for s in source]
    ema = EMA(average, source, 0.9)
    assert all(torch.equal(a, s) and a is not s for a, s in zip(average, source, strict=False))
    before = [s.clone() for s in source]
    ema.update()
    assert all(torch.equal(b, s) for b, s in zip(before, source, strict=False))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.99, 0.999])
def test_foreach_equals_a_loop_bitwise(decay):
    source, average = tensors(1), [torch.empty_like(s) for s in tensors(1)]
    ema = EMA(average, source, decay)
    loop = [s.clone() for s in source]
    for step in range(20):
        for s, n in zip(source, tensors(step + 2), strict=False):
            s.copy_(n)
        ema.update()
        for mean, s in zip(loop, source, strict=False):
            mean.lerp_(s, 1 - decay)
    assert all(torch.equal(a, mean) for a, mean in zip(average, loop, strict=False))


def test_float32_average_follows_a_bfloat16_source():
    source = [torch.ones(4, dtype=torch.bfloat16)]
    average = [torch.empty(4)]
    ema = EMA(average, source, 0.999)
    source[0].add_(0.0078125)  # the next bfloat16 after 1
    for _ in range(100):
        ema.update()
    torch.testing.assert_close(
        average[0], torch.full((4,), 1 + 0.0078125 * (1 - 0.999**100)), rtol=1e-6, atol=0
    )
    assert average[0].dtype == torch.float32 and source[0].dtype == torch.bfloat16


def test_a_bfloat16_average_would_never_move():
    """Why EMA refuses it: this is what torch itself does."""
    average, source = torch.ones(4, dtype=torch.bfloat16), torch.full((4,), 1.0078125, dtype=torch.bfloat16)
    for _ in range(10_000):
        average.lerp_(source, 0.001)
    assert torch.equal(average, torch.ones(4, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_average_is_refused(dtype):
    with pytest.raises(ValueError, match="float32"):
        EMA([torch.zeros(3, dtype=dtype)], [torch.zeros(3)], 0.99)


def test_lists_must_match_and_decay_must_be_a_decay():
    with pytest.raises(ValueError, match="shapes"):
        EMA([torch.zeros(3)], [torch.zeros(4)], 0.9)
    with pytest.raises(ValueError, match="shapes"):
        EMA([torch.zeros(3)], [torch.zeros(3)] * 2, 0.9)
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="decay"):
            EMA([torch.zeros(3)], [torch.zeros(3)], decay)


def test_fast_and_slow_each_have_their_decay_and_do_not_touch_each_other():
    source = [torch.zeros(2)]
    fast, slow = [torch.empty(2)], [torch.empty(2)]
    emas = FastSlow(fast, slow, iter(source), 0.5, 0.9)  # any iterable, as Module.parameters() is one
    source[0].fill_(1.0)
    for _ in range(3):
        emas.update()
    torch.testing.assert_close(fast[0], torch.full((2,), 1 - 0.5**3))
    torch.testing.assert_close(slow[0], torch.full((2,), 1 - 0.9**3))
    assert emas.updates == 3


def test_restart_comes_every_r_updates_and_only_then():
    source = [torch.zeros(1)]
    fast, slow = [torch.empty(1)], [torch.empty(1)]
    emas = FastSlow(fast, slow, source, 0.9, 0.99, restart_every=4)
    for update in range(1, 13):
        source[0].fill_(float(update))
        emas.update()
        same = [bool(fast[0] == source[0]), bool(slow[0] == source[0])]
        assert same == [update % 4 == 0] * 2


def test_requires_grad_sources_are_averaged_without_a_graph():
    source = [torch.ones(2, requires_grad=True)]
    average = [torch.zeros(2)]
    EMA(average, source, 0.5).update()
    assert not average[0].requires_grad and source[0].grad is None


def test_memory_half_life_and_shorten():
    assert memory(0.99) == pytest.approx(100) and memory(0.999) == pytest.approx(1000) and memory(0) == 1
    assert 0.999 ** half_life(0.999) == pytest.approx(0.5)
    assert half_life(0.999) == pytest.approx(math.log(2) * 1000, rel=1e-3)
    assert shorten(0.999, 5000) == 0.999 and shorten(0.999, 9000) == 0.999
    assert memory(shorten(0.999, 500)) / 500 == pytest.approx(memory(0.999) / 5000)
    assert shorten(0.99, 10) == 0
