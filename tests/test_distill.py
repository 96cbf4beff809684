"""One update and the loop: settings, keyed draws, what moves, and that a run repeats."""
import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.method.consistency import keyed_generator, scfm_loss
from scfm.method.distill import (
    DistillConfig, FullSpeakers, TimeBins, distill, draw_update, make_emas, make_optimizer, one_update)


class Net(torch.nn.Module):
    def __init__(self, seed=0, classes=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.Sequential(torch.nn.Linear(3 + classes, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))

    def forward(self, x, t, cond=None):
        parts = [x, t[:, None]] + ([cond] if cond is not None else [])
        return self.layers(torch.cat(parts, 1))


def toy_config(**changes):
    return DistillConfig(**{**dict(updates=5, batch=8, lr=1e-2, shift=(1., 2.)), **changes})


def normal(generator, rows):
    return torch.randn(rows, 2, generator=generator)


def weights(speakers, name):
    return [p.detach().clone() for p in speakers.parameters(name)]


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b))


# ---------------------------------------------------------------- settings

def test_defaults_pass_and_say_what_they_are():
    config = DistillConfig()
    config.check()
    assert all(f.metadata["help"] for f in config.__dataclass_fields__.values())
    assert (config.batch, config.lr, config.weight_decay, config.clip) == (8, 2e-5, 1e-4, 10)
    assert (config.teacher_share, config.teacher_grid, config.t_skip, config.shift) == (.4, 32, 2, (2.5, 4.5))


@pytest.mark.parametrize("name, value", [
    ("updates", 0), ("updates", 1.5), ("batch", -1), ("batch", True), ("lr", 0.), ("lr", float("nan")), ("lr", "2e-5"), ("lr", math.inf),
    ("schedule", "linear"), ("weight_decay", -1e-4), ("clip", 0.), ("clip", float("nan")), ("teacher_share", 1.1), ("teacher_share", -.1),
    ("teacher_grid", 31), ("teacher_grid", 0), ("self_grids", ()), ("self_grids", (1,)), ("self_grids", (2, 9)), ("self_grids", 4),
    ("t_skip", 3), ("t_skip", 0), ("shift", (2., 1.)), ("shift", (0., 1.)), ("shift", 3.), ("shift", (1., 2., 3.)),
    ("algorithm", "both"), ("fast_decay", 1.), ("fast_decay", .9999), ("slow_decay", -.1), ("restart_every", -1), ("seed", .5)])
def test_nonsense_is_named_with_its_value_and_a_mend(name, value):
    with pytest.raises(ValueError) as error:
        DistillConfig(**{name: value}).check()
    assert str(error.value).startswith(f"{name}={value!r}: ") and len(str(error.value)) > len(f"{name}={value!r}: ") + 8


def test_what_makes_sense_passes():
    for changes in (dict(teacher_share=0.), dict(teacher_share=1., self_grids=()), dict(clip=math.inf), dict(self_grids=[2, 4]),
                    dict(t_skip=4), dict(algorithm="one_ema", fast_decay=.9999), dict(shift=(1, 1)), dict(restart_every=10)):
        DistillConfig(**changes).check()


def test_distill_checks_before_it_works():
    with pytest.raises(ValueError, match="lr=-1"):
        distill(None, None, toy_config(lr=-1), progress=False)


# ---------------------------------------------------------------- draws

@settings(deadline=None, max_examples=40)
@given(st.sampled_from([1, 2, 3, 4]), st.integers(1, 6), st.integers(0, 1000), st.integers(0, 1000))
def test_parts_are_the_slices_of_the_whole(parts, each, seed, update):
    config, rows = toy_config(seed=seed), parts * each
    noise, jumps = draw_update(config, update, rows, (2, 3))
    dealt = [draw_update(config, update, rows, (2, 3), part=(i, parts)) for i in range(parts)]
    assert torch.equal(torch.cat([d[0] for d in dealt]), noise) and noise.shape == (rows, 2, 3)
    for i in range(3):
        assert torch.equal(torch.cat([d[1][i] for d in dealt]), jumps[i])


def test_draws_depend_on_seed_and_update_alone():
    first = draw_update(toy_config(seed=1), 3, 8, (2,))
    torch.manual_seed(123)
    again = draw_update(toy_config(seed=1, lr=1.), 3, 8, (2,))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1].times, again[1].times)
    for seed, update in ((1, 4), (2, 3)):
        other = draw_update(toy_config(seed=seed), update, 8, (2,))
        assert not torch.equal(first[0], other[0]) and not torch.equal(first[1].times, other[1].times)


def test_uneven_parts_are_refused():
    for part in ((0, 3), (2, 2), (-1, 2)):
        with pytest.raises(ValueError, match="part="):
            draw_update(toy_config(), 0, 8, (2,), part=part)


# ---------------------------------------------------------------- one update

def test_two_halves_of_an_update_give_the_gradient_of_the_whole():
    config, data = toy_config(), torch.randn(8, 2)
    gradients = []
    for parts in (1, 2):
        speakers = FullSpeakers(Net())
        for i in range(parts):
            noise, jumps = draw_update(config, 0, 8, (2,), part=(i, parts))
            mine = data[i * 8 // parts:(i + 1) * 8 // parts]
            (scfm_loss(mine, noise, jumps, speakers).mean() / parts).backward()
        gradients.append([p.grad for p in speakers.parameters("student")])
    for whole, halves in zip(*gradients):
        torch.testing.assert_close(whole, halves)


@pytest.mark.parametrize("algorithm", ["one_ema", "dual"])
def test_an_update_moves_the_student_and_the_emas_only(algorithm):
    network = Net()
    speakers, config = FullSpeakers(network), toy_config(algorithm=algorithm)
    optimizer, _ = make_optimizer(speakers, config)
    emas = make_emas(speakers, config)
    before = {name: weights(speakers, name) for name in speakers.networks}
    for update in range(2):
        noise, jumps = draw_update(config, update, 8, (2,))
        result = one_update(speakers, emas, optimizer, torch.randn(8, 2), noise, jumps, config)
    assert result.losses.shape == (8,) and not result.losses.requires_grad and result.norm > 0
    assert same(before["teacher"], weights(speakers, "teacher")) and speakers.networks["teacher"] is network
    assert not any(same(before[name], weights(speakers, name)) for name in ("student", "fast", "slow"))
    assert all(p.grad is None for name in ("teacher", "fast", "slow") for p in speakers.parameters(name))
    moved = {name: sum((a - b).norm() for a, b in zip(before[name], weights(speakers, name))) for name in before}
    assert moved["student"] > moved["fast"] > moved["slow"] > 0
    assert emas.updates == 2


def test_the_emas_follow_the_new_student():
    speakers, config = FullSpeakers(Net()), toy_config(fast_decay=.5, slow_decay=.75)
    optimizer, _ = make_optimizer(speakers, config)
    emas, start = make_emas(speakers, config), weights(speakers, "student")
    one_update(speakers, emas, optimizer, torch.randn(8, 2), *draw_update(config, 0, 8, (2,)), config)
    for name, decay in (("fast", .5), ("slow", .75)):
        for s, old, new in zip(weights(speakers, name), start, weights(speakers, "student")):
            torch.testing.assert_close(s, decay * old + (1 - decay) * new)


def test_first_step_is_adamws_own():
    """At lr and no schedule: the same gradient in a plain AdamW gives the same student."""
    config, data = toy_config(clip=math.inf), torch.randn(8, 2)
    speakers = FullSpeakers(Net())
    twin = copy.deepcopy(speakers.networks["student"])
    optimizer, _ = make_optimizer(speakers, config)
    noise, jumps = draw_update(config, 0, 8, (2,))
    loss = scfm_loss(data, noise, jumps, speakers).mean()
    grads = torch.autograd.grad(loss, speakers.parameters("student"))
    one_update(speakers, make_emas(speakers, config), optimizer, data, noise, jumps, config)
    plain = torch.optim.AdamW(twin.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    for p, g in zip(twin.parameters(), grads):
        p.grad = g
    plain.step()
    assert same(weights(speakers, "student"), [p.detach() for p in twin.parameters()])


def test_gradient_is_clipped_and_its_norm_reported():
    config = toy_config(clip=1e-3)
    speakers = FullSpeakers(Net())
    seen = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(torch.stack([p.grad.norm() for p in speakers.parameters("student")]).norm())
    optimizer = Spy(speakers.parameters("student"), lr=0.)
    result = one_update(speakers, make_emas(speakers, config), optimizer, 5 * torch.randn(8, 2), *draw_update(config, 0, 8, (2,)), config)
    assert result.norm > 1e-3 and seen[0] == pytest.approx(1e-3, rel=1e-3)


def test_a_gradient_that_is_not_finite_changes_nothing():
    speakers, config = FullSpeakers(Net()), toy_config()
    optimizer, _ = make_optimizer(speakers, config)
    emas = make_emas(speakers, config)
    before = {name: weights(speakers, name) for name in speakers.networks}
    with pytest.raises(FloatingPointError, match="nan"):
        one_update(speakers, emas, optimizer, torch.full((8, 2), float("nan")), *draw_update(config, 0, 8, (2,)), config)
    assert all(same(before[name], weights(speakers, name)) for name in before) and emas.updates == 0
    assert all(p.grad is None for p in speakers.parameters("student"))


def test_schedules():
    speakers = FullSpeakers(Net())
    for schedule, expected in (("constant", [1, 1, 1, 1, 1]), ("cosine", [1, .8535534, .5, .1464466, 0])):
        optimizer, scheduler = make_optimizer(speakers, toy_config(updates=4, schedule=schedule))
        rates = []
        for _ in range(5):
            rates.append(optimizer.param_groups[0]["lr"] / 1e-2)
            optimizer.step()
            scheduler.step()
        assert rates == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------- speakers and the loop

def test_speakers_start_equal_and_only_the_student_carries_a_gradient():
    speakers = FullSpeakers(torch.nn.Sequential())
    assert speakers.parameters("student") == []
    speakers = FullSpeakers(Net())
    x, t = torch.randn(4, 2), torch.rand(4)
    assert [name for name, network in speakers.networks.items() if network.training] == ["student"]
    said = {name: getattr(speakers, name)(x, t) for name in speakers.networks}
    assert all(torch.equal(v, said["teacher"]) for v in said.values())
    assert {name for name, v in said.items() if v.requires_grad} == {"student"}


def test_a_low_precision_network_is_refused_by_the_emas():
    with pytest.raises(ValueError, match="float32"):
        make_emas(FullSpeakers(Net().bfloat16()), toy_config())


def test_distill_repeats_itself_and_a_seed_changes_it():
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(runs))                                  # the global generator must not matter
        speakers = FullSpeakers(Net())
        torch.rand(len(runs))
        runs.append(weights(distill(speakers, normal, toy_config(seed=seed), progress=False), "student"))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_distill_reports_every_update_and_passes_the_condition():
    seen = []
    batch_of = lambda generator, rows: (normal(generator, rows), torch.ones(rows, 3))
    speakers = distill(FullSpeakers(Net(classes=3)), batch_of, toy_config(), on_update=lambda u, r: seen.append((u, r)), progress=False)
    assert [u for u, _ in seen] == list(range(5)) and all(len(r.losses) == 8 for _, r in seen)
    assert isinstance(speakers, FullSpeakers)


def test_distill_is_its_own_steps():
    config = toy_config(schedule="cosine", restart_every=2)
    by_loop = distill(FullSpeakers(Net()), normal, config, progress=False)
    speakers = FullSpeakers(Net())
    optimizer, scheduler = make_optimizer(speakers, config)
    emas = make_emas(speakers, config)
    for update in range(config.updates):
        data = normal(keyed_generator(0, update, stream=1), 8)
        one_update(speakers, emas, optimizer, data, *draw_update(config, update, 8, (2,)), config)
        scheduler.step()
    assert all(same(weights(by_loop, name), weights(speakers, name)) for name in speakers.networks)


def test_time_bins():
    bins = TimeBins(bins=4, momentum=.5)
    assert torch.isnan(bins.values).all() and "-" in str(bins)
    bins.add(torch.tensor([1., 3.]), torch.tensor([.1, 1.]))
    bins.add(torch.tensor([4.]), torch.tensor([.2]))
    values = bins.values
    assert values[0] == pytest.approx((.5 * 1 + 4) / 1.5) and values[3] == pytest.approx(3.)
    assert torch.isnan(values[1:3]).all() and str(bins).endswith("3 - - 3")
