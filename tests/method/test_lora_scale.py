"""The dial: the choice is exact, the table interpolates, the file keeps what it held, and scales 0 and 1 are
teacher and student."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scfm.method.distill import CopiedModels
from scfm.method.lora_scale import SCALES, STEPS, LoraScales, choose_lora_scales, endpoint_curve
from scfm.models.lora import ADAPTERS, LoraModels
from scfm.models.lora_file import KEY, read_lora_scales, write_lora_scales
from toy.plane import MLP

# Distances that collide and include 0, so that ties and the logarithm's end are tried
distance = st.one_of(st.sampled_from([0.0, 0.1, 0.5, 0.5, 1.0, 3.0]), st.floats(0, 10, allow_nan=False))


@st.composite
def curves(draw):
    steps = draw(st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True))
    scales = draw(st.lists(st.floats(0, 2, allow_nan=False), min_size=1, max_size=4, unique=True))
    return {(n, s): draw(distance) for n in steps for s in scales}


@st.composite
def dials(draw):
    steps = sorted(draw(st.lists(st.integers(1, 128), min_size=1, max_size=6, unique=True)))
    scales = sorted(draw(st.lists(st.floats(0, 2), min_size=len(steps), max_size=len(steps))), reverse=True)
    return LoraScales(tuple(steps), tuple(scales))


def cost(curve, steps, scales):
    return sum(math.log(max(curve[n, s], 1e-12)) for n, s in zip(steps, scales, strict=False))


# ---------------------------------------------------------------- choosing


@settings(deadline=None, max_examples=200)
@given(curves())
def test_the_choice_is_the_best_of_all_that_never_increase(curve):
    steps, scales = sorted({n for n, _ in curve}), sorted({s for _, s in curve})
    falling = [
        seq
        for seq in itertools.product(scales, repeat=len(steps))
        if all(a >= b for a, b in itertools.pairwise(seq))
    ]
    chosen = choose_lora_scales(curve)
    assert chosen.steps == tuple(steps) and chosen.scales in falling
    assert cost(curve, steps, chosen.scales) == pytest.approx(
        min(cost(curve, steps, seq) for seq in falling), abs=1e-9
    )


def test_where_the_best_scales_fall_anyway_each_step_count_gets_its_own():
    curve = {(n, s): 0.1 + abs(s - 2 / n) for n in (1, 2, 4, 8) for s in (0.0, 0.25, 0.5, 1.0, 2.0)}
    assert choose_lora_scales(curve, shift=3.0) == LoraScales((1, 2, 4, 8), (2.0, 1.0, 0.5, 0.25), 3.0)


def test_one_measurement_that_is_off_does_not_lift_the_scales_of_more_steps():
    curve = {(n, s): 0.1 + abs(s - 1 / n) for n in (1, 2, 4) for s in (0.25, 0.5, 1.0)}
    curve[4, 1.0] = 0.09  # a lucky draw, better by little
    assert choose_lora_scales(curve).scales == (1.0, 0.5, 0.25)


def test_of_equal_scales_the_one_nearer_to_the_teacher():
    assert choose_lora_scales({(n, s): 1.0 for n in (2, 4) for s in (0.0, 0.5, 1.0)}).scales == (0.0, 0.0)


def test_the_order_of_the_curve_does_not_matter():
    curve = {
        (n, s): torch.rand((), generator=torch.Generator().manual_seed(int(100 * n + 8 * s))).item()
        for n in STEPS
        for s in SCALES
    }
    assert choose_lora_scales(curve) == choose_lora_scales(dict(reversed(curve.items())))


@pytest.mark.parametrize(
    "curve",
    [
        {},
        {(2, 0.0): 1.0, (2, 1.0): 1.0, (4, 0.0): 1.0},
        {(2, 0.0): float("nan")},
        {(2, 0.0): math.inf},
        {(2, 0.0): -1.0},
    ],
)
def test_a_curve_that_cannot_be_judged_is_refused(curve):
    with pytest.raises(ValueError):
        choose_lora_scales(curve)


def test_the_curve_is_the_distance_of_endpoints_and_asks_for_each_pair_once():
    target, calls = torch.zeros(5, 3), []

    def endpoints(steps, scale):
        calls.append((steps, scale))
        return target + scale / steps

    curve = endpoint_curve(endpoints, target, (1, 2), (0.0, 1.0))
    assert curve == {(1, 0.0): 0.0, (1, 1.0): 1.0, (2, 0.0): 0.0, (2, 1.0): 0.5} and sorted(calls) == sorted(
        curve
    )


# ---------------------------------------------------------------- the table


@given(dials())
def test_the_table_holds_at_its_entries_and_outside(dial):
    assert [dial.scale(n) for n in dial.steps] == list(dial.scales)
    assert dial.scale(dial.steps[-1] * 7) == dial.scales[-1]
    if dial.steps[0] > 1:
        assert dial.scale(1) == dial.scales[0]


@given(dials())
def test_between_its_entries_the_scale_falls_and_stays_between(dial):
    scales = [dial.scale(n) for n in range(1, 140)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(scales))
    assert all(dial.scales[-1] - 1e-12 <= s <= dial.scales[0] + 1e-12 for s in scales)


def test_a_schedule_speaks_for_its_own_number_of_steps():
    dial = LoraScales((2, 8), (1.5, 0.5), 1.0, ((1.0, 2.0), (0.1, 0.2, 0.3)))
    assert dial.per_step(2) == (1.0, 2.0) and dial.per_step(3) == (0.1, 0.2, 0.3)
    assert dial.per_step(4) == (dial.scale(4),) * 4 and dial.scale(2) == 1.5


def test_it_is_linear_in_the_logarithm_of_the_steps():
    dial = LoraScales((2, 32), (2.0, 0.0))
    assert [dial.scale(n) for n in (2, 4, 8, 16, 32)] == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])
    assert dial.scale(3) == pytest.approx(2 - 0.5 * math.log2(1.5))


# ---------------------------------------------------------------- the file

TENSORS = {
    "a.lora_A.weight": torch.randn(2, 5),
    "a.lora_B.weight": torch.randn(5, 2).bfloat16(),
    "half": torch.randn(3).half(),
    "whole": torch.arange(6, dtype=torch.int8).reshape(2, 3),
    "one": torch.tensor(1.5, dtype=torch.float64),
    "none": torch.zeros(0, 4),
}


def header(path):
    with safe_open(str(path), framework="pt") as opened:
        return dict(opened.metadata() or {})


def same_tensors(path):
    held = load_file(path)
    return held.keys() == TENSORS.keys() and all(
        held[k].dtype == v.dtype and held[k].shape == v.shape and torch.equal(held[k], v)
        for k, v in TENSORS.items()
    )


@settings(deadline=None, max_examples=25)
@given(
    dial=dials(),
    shift=st.floats(0.1, 5),
    others=st.dictionaries(st.text(max_size=8).filter(lambda k: k != KEY), st.text(max_size=20), max_size=3),
)
def test_the_header_gives_the_dial_back_and_keeps_everything_else(tmp_path_factory, dial, shift, others):
    path = tmp_path_factory.mktemp("dial") / "lora.safetensors"
    save_file(TENSORS, path, metadata=others)
    dial = dial._replace(shift=shift, schedules=(dial.scales, (0.5, 0.25)))
    write_lora_scales(path, dial)
    assert read_lora_scales(path) == dial and same_tensors(path)
    assert {k: v for k, v in header(path).items() if k != KEY} == others
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_second_dial_replaces_the_first(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(TENSORS, path)
    assert read_lora_scales(path) is None
    write_lora_scales(path, LoraScales((2, 4), (1.0, 0.5)))
    write_lora_scales(str(path), LoraScales((3,), (0.75,), 3.0))
    assert read_lora_scales(str(path)) == LoraScales((3,), (0.75,), 3.0) and same_tensors(path)
    assert json.loads(header(path)[KEY])["scales"] == [0.75]


def test_a_dial_from_before_there_were_schedules_is_read(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(
        TENSORS, path, metadata={KEY: json.dumps({"steps": [2, 4], "scales": [1.0, 0.5], "shift": 3.0})}
    )
    assert read_lora_scales(path) == LoraScales((2, 4), (1.0, 0.5), 3.0, ())


def test_a_file_that_is_not_there_is_an_error_and_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_lora_scales(tmp_path / "no.safetensors", LoraScales((2,), (1.0,)))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the fields


def shaken(parameters):
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


def full():
    torch.manual_seed(0)
    models = CopiedModels(MLP(16, 2))
    for name in ("student", "ema_fast", "ema_slow"):
        shaken(models.parameters(name))
    return models, torch.randn(6, 2), torch.rand(6)


class Attention(torch.nn.Module):
    """A block with the names that peft looks for, in a model with adapters like those of diffusers."""

    def __init__(self):
        super().__init__()
        self.to_q, self.out = torch.nn.Linear(3, 8), torch.nn.Linear(8, 2)

    def forward(self, x, t):
        return self.out(torch.tanh(self.to_q(torch.cat([x, t[:, None]], 1))))


def lora():
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.loaders import PeftAdapterMixin

    class Model(ModelMixin, ConfigMixin, PeftAdapterMixin):
        def __init__(self):
            super().__init__()
            self.block = Attention()

        def forward(self, x, t):
            return self.block(x, t)

    torch.manual_seed(0)
    models = LoraModels(Model(), lambda model, x, t, cond: model(x, t), ["to_q"], rank=2, alpha=4)
    for name in ADAPTERS:
        shaken(models.parameters(name))
    return models, torch.randn(6, 2), torch.rand(6)


@pytest.mark.parametrize("made", [full, lora])
@pytest.mark.parametrize("name", ["student", "ema_fast", "ema_slow"])
def test_scale_0_is_the_teacher_and_scale_1_the_speaker(made, name):
    models, x, t = made()
    teacher, own = models.teacher(x, t), getattr(models, name)(x, t).detach()
    assert not torch.allclose(teacher, own, atol=1e-3)
    torch.testing.assert_close(models.field(name, 0.0)(x, t), teacher, atol=1e-6, rtol=0)
    torch.testing.assert_close(models.field(name, 1.0)(x, t), own, atol=0, rtol=0)
    torch.testing.assert_close(models.field(name)(x, t), own, atol=0, rtol=0)
    half = models.field(name, 0.5)(x, t)
    assert (
        not half.requires_grad
        and not torch.allclose(half, teacher, atol=1e-4)
        and not torch.allclose(half, own, atol=1e-4)
    )


@pytest.mark.parametrize("made", [full, lora])
def test_a_field_at_a_scale_leaves_no_trace(made):
    models, x, t = made()
    before = {
        name: getattr(models, name)(x, t).detach() for name in ("teacher", "student", "ema_fast", "ema_slow")
    }
    models.field("student", 0.3)(x, t), models.field("ema_slow", 1.7)(x, t)
    assert all(torch.equal(getattr(models, name)(x, t), v) for name, v in before.items())


def test_the_scale_of_a_lora_is_an_interpolation_of_weights():
    models, x, t = lora()
    layer = models.transformer.block.to_q
    delta = layer.scaling["student"] * layer.lora_B["student"].weight @ layer.lora_A["student"].weight
    for scale in (0.0, 0.375, 1.0, 1.5):
        folded = Attention()
        folded.to_q.load_state_dict(
            {"weight": layer.base_layer.weight + scale * delta, "bias": layer.base_layer.bias}
        )
        folded.out.load_state_dict(models.transformer.block.out.state_dict())
        torch.testing.assert_close(
            models.field("student", scale)(x, t), folded(x, t).detach(), atol=1e-6, rtol=1e-5
        )


@pytest.mark.parametrize("order, lowest, powers", [(1, 1, (1,)), (2, 1, (1, 2)), (2, 0, (0, 1, 2))])
def test_each_lora_is_multiplied_by_its_power_of_the_scale_and_the_teacher_by_none(order, lowest, powers):
    scales = LoraScales((1, 4), (1.0, 0.5), 3.0, (), 0.85, order, lowest, 4.5)
    assert scales.powers == powers
    assert scales.strengths(0.5) == tuple(0.5**power for power in powers)
    assert scales.strengths(0) == (0.0,) * len(powers)


def test_the_header_keeps_the_lowest_power_and_the_guidance(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"a": torch.zeros(1)}, str(path))
    scales = LoraScales((1, 4), (1.0, 0.5), 3.0, (), 0.85, 2, 0, 4.5)
    write_lora_scales(path, scales)
    assert read_lora_scales(path) == scales
