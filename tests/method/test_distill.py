"""One update and the loop: settings, keyed draws, what moves, and that a run repeats."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scfm.method.consistency import scfm_loss
from scfm.method.distill import (
    Batch,
    CopiedModels,
    SCFMConfig,
    TimeBins,
    distill,
    make_emas,
    make_optimizer,
    sample_batch,
    train_step,
)
from scfm.streams import keyed_generator


class Net(torch.nn.Module):
    def __init__(self, seed=0, classes=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(3 + classes, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)
        )

    def forward(self, x, t, cond=None):
        parts = [x, t[:, None]] + ([cond] if cond is not None else [])
        return self.layers(torch.cat(parts, 1))


def toy_config(**changes):
    return SCFMConfig(
        **{**dict(max_train_steps=5, global_batch_size=8, learning_rate=1e-2, shift=(1.0, 2.0)), **changes}
    )


def normal(generator, n):
    return torch.randn(n, 2, generator=generator)


def weights(models, name):
    return [p.detach().clone() for p in models.parameters(name)]


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=False))


# ---------------------------------------------------------------- settings


def test_defaults_pass_and_say_what_they_are():
    config = SCFMConfig()
    config.check()
    assert all(f.metadata["help"] for f in config.__dataclass_fields__.values())
    assert (
        config.global_batch_size,
        config.learning_rate,
        config.adam_weight_decay,
        config.max_grad_norm,
    ) == (8, 2e-5, 1e-4, 10)
    assert (config.teacher_ratio, config.teacher_grid, config.t_skip, config.shift) == (
        0.4,
        32,
        2,
        (2.5, 4.5),
    )


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_train_steps", 0),
        ("max_train_steps", 1.5),
        ("global_batch_size", -1),
        ("global_batch_size", True),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", "2e-5"),
        ("learning_rate", math.inf),
        ("lr_scheduler", "linear"),
        ("adam_weight_decay", -1e-4),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", float("nan")),
        ("teacher_ratio", 1.1),
        ("teacher_ratio", -0.1),
        ("teacher_grid", 31),
        ("teacher_grid", 0),
        ("self_grids", ()),
        ("self_grids", (1,)),
        ("self_grids", (2, 9)),
        ("self_grids", 4),
        ("t_skip", 3),
        ("t_skip", 0),
        ("shift", (2.0, 1.0)),
        ("shift", (0.0, 1.0)),
        ("shift", 3.0),
        ("shift", (1.0, 2.0, 3.0)),
        ("algorithm", "both"),
        ("ema_decay_fast", 1.0),
        ("ema_decay_fast", 0.9999),
        ("ema_decay_slow", -0.1),
        ("restart_every", -1),
        ("seed", 0.5),
    ],
)
def test_nonsense_is_named_with_its_value_and_a_mend(name, value):
    with pytest.raises(ValueError) as error:
        SCFMConfig(**{name: value}).check()
    assert (
        str(error.value).startswith(f"{name}={value!r}: ")
        and len(str(error.value)) > len(f"{name}={value!r}: ") + 8
    )


def test_what_makes_sense_passes():
    for changes in (
        dict(teacher_ratio=0.0),
        dict(teacher_ratio=1.0, self_grids=()),
        dict(max_grad_norm=math.inf),
        dict(self_grids=[2, 4]),
        dict(t_skip=4),
        dict(algorithm="one_ema", ema_decay_fast=0.9999),
        dict(shift=(1, 1)),
        dict(restart_every=10),
    ):
        SCFMConfig(**changes).check()


def test_distill_checks_before_it_works():
    with pytest.raises(ValueError, match="learning_rate=-1"):
        distill(None, None, toy_config(learning_rate=-1), progress=False)


# ---------------------------------------------------------------- draws


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([1, 2, 3, 4]), st.integers(1, 6), st.integers(0, 1000), st.integers(0, 1000))
def test_parts_are_the_slices_of_the_whole(parts, each, seed, update):
    config, n = toy_config(seed=seed), parts * each
    noise, jumps = sample_batch(config, update, n, (2, 3))
    dealt = [sample_batch(config, update, n, (2, 3), part=(i, parts)) for i in range(parts)]
    assert torch.equal(torch.cat([d[0] for d in dealt]), noise) and noise.shape == (n, 2, 3)
    for i in range(3):
        assert torch.equal(torch.cat([d[1][i] for d in dealt]), jumps[i])


def test_draws_depend_on_seed_and_update_alone():
    first = sample_batch(toy_config(seed=1), 3, 8, (2,))
    torch.manual_seed(123)
    again = sample_batch(toy_config(seed=1, learning_rate=1.0), 3, 8, (2,))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1].times, again[1].times)
    for seed, update in ((1, 4), (2, 3)):
        other = sample_batch(toy_config(seed=seed), update, 8, (2,))
        assert not torch.equal(first[0], other[0]) and not torch.equal(first[1].times, other[1].times)


def test_uneven_parts_are_refused():
    for part in ((0, 3), (2, 2), (-1, 2)):
        with pytest.raises(ValueError, match="part="):
            sample_batch(toy_config(), 0, 8, (2,), part=part)


# ---------------------------------------------------------------- one update


def test_two_halves_of_an_update_give_the_gradient_of_the_whole():
    config, data = toy_config(), torch.randn(8, 2)
    gradients = []
    for parts in (1, 2):
        models = CopiedModels(Net())
        for i in range(parts):
            noise, jumps = sample_batch(config, 0, 8, (2,), part=(i, parts))
            mine = data[i * 8 // parts : (i + 1) * 8 // parts]
            (scfm_loss(mine, noise, jumps, models).mean() / parts).backward()
        gradients.append([p.grad for p in models.parameters("student")])
    for together, halves in zip(*gradients, strict=False):
        torch.testing.assert_close(together, halves)


@pytest.mark.parametrize("algorithm", ["one_ema", "dual"])
def test_an_update_moves_the_student_and_the_emas_only(algorithm):
    network = Net()
    models, config = CopiedModels(network), toy_config(algorithm=algorithm)
    optimizer, _ = make_optimizer(models, config)
    emas = make_emas(models, config)
    before = {name: weights(models, name) for name in models.networks}
    for update in range(2):
        noise, jumps = sample_batch(config, update, 8, (2,))
        result = train_step(models, emas, optimizer, [Batch(torch.randn(8, 2), noise, jumps)], config)
    assert result.losses.shape == (8,) and not result.losses.requires_grad and result.norm > 0
    assert same(before["teacher"], weights(models, "teacher")) and models.networks["teacher"] is network
    assert not any(same(before[name], weights(models, name)) for name in ("student", "ema_fast", "ema_slow"))
    assert all(
        p.grad is None for name in ("teacher", "ema_fast", "ema_slow") for p in models.parameters(name)
    )
    moved = {
        name: sum((a - b).norm() for a, b in zip(before[name], weights(models, name), strict=False))
        for name in before
    }
    assert moved["student"] > moved["ema_fast"] > moved["ema_slow"] > 0
    assert emas.updates == 2


def test_the_emas_follow_the_new_student():
    models, config = CopiedModels(Net()), toy_config(ema_decay_fast=0.5, ema_decay_slow=0.75)
    optimizer, _ = make_optimizer(models, config)
    emas, start = make_emas(models, config), weights(models, "student")
    train_step(models, emas, optimizer, [Batch(torch.randn(8, 2), *sample_batch(config, 0, 8, (2,)))], config)
    for name, decay in (("ema_fast", 0.5), ("ema_slow", 0.75)):
        for s, old, new in zip(weights(models, name), start, weights(models, "student"), strict=False):
            torch.testing.assert_close(s, decay * old + (1 - decay) * new)


def test_first_step_is_adamws_own():
    """At lr and no schedule: the same gradient in a plain AdamW gives the same student."""
    config, data = toy_config(max_grad_norm=math.inf), torch.randn(8, 2)
    models = CopiedModels(Net())
    twin = copy.deepcopy(models.networks["student"])
    optimizer, _ = make_optimizer(models, config)
    noise, jumps = sample_batch(config, 0, 8, (2,))
    loss = scfm_loss(data, noise, jumps, models).mean()
    grads = torch.autograd.grad(loss, models.parameters("student"))
    train_step(models, make_emas(models, config), optimizer, [Batch(data, noise, jumps)], config)
    plain = torch.optim.AdamW(
        twin.parameters(), lr=config.learning_rate, weight_decay=config.adam_weight_decay
    )
    for p, g in zip(twin.parameters(), grads, strict=False):
        p.grad = g
    plain.step()
    assert same(weights(models, "student"), [p.detach() for p in twin.parameters()])


def test_gradient_is_clipped_and_its_norm_reported():
    config = toy_config(max_grad_norm=1e-3)
    models = CopiedModels(Net())
    seen = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(torch.stack([p.grad.norm() for p in models.parameters("student")]).norm())

    optimizer = Spy(models.parameters("student"), lr=0.0)
    result = train_step(
        models,
        make_emas(models, config),
        optimizer,
        [Batch(5 * torch.randn(8, 2), *sample_batch(config, 0, 8, (2,)))],
        config,
    )
    assert result.norm > 1e-3 and seen[0] == pytest.approx(1e-3, rel=1e-3)


def test_a_gradient_that_is_not_finite_changes_nothing():
    models, config = CopiedModels(Net()), toy_config()
    optimizer, _ = make_optimizer(models, config)
    emas = make_emas(models, config)
    before = {name: weights(models, name) for name in models.networks}
    with pytest.raises(FloatingPointError, match="no weight was changed"):
        train_step(
            models,
            emas,
            optimizer,
            [Batch(torch.full((8, 2), float("nan")), *sample_batch(config, 0, 8, (2,)))],
            config,
        )
    assert all(same(before[name], weights(models, name)) for name in before) and emas.updates == 0
    assert all(p.grad is None for p in models.parameters("student"))


def test_schedules():
    models = CopiedModels(Net())
    for schedule, expected in (("constant", [1, 1, 1, 1, 1]), ("cosine", [1, 0.8535534, 0.5, 0.1464466, 0])):
        optimizer, scheduler = make_optimizer(models, toy_config(max_train_steps=4, lr_scheduler=schedule))
        rates = []
        for _ in range(5):
            rates.append(optimizer.param_groups[0]["lr"] / 1e-2)
            optimizer.step()
            scheduler.step()
        assert rates == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------- models and the loop


def test_speakers_start_equal_and_only_the_student_carries_a_gradient():
    models = CopiedModels(torch.nn.Sequential())
    assert models.parameters("student") == []
    models = CopiedModels(Net())
    x, t = torch.randn(4, 2), torch.rand(4)
    assert [name for name, network in models.networks.items() if network.training] == ["student"]
    velocities = {name: getattr(models, name)(x, t) for name in models.networks}
    assert all(torch.equal(v, velocities["teacher"]) for v in velocities.values())
    assert {name for name, v in velocities.items() if v.requires_grad} == {"student"}


def test_a_low_precision_network_is_refused_by_the_emas():
    with pytest.raises(ValueError, match="float32"):
        make_emas(CopiedModels(Net().bfloat16()), toy_config())


def test_distill_repeats_itself_and_a_seed_changes_it():
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(runs))  # the global generator must not matter
        models = CopiedModels(Net())
        torch.rand(len(runs))
        runs.append(weights(distill(models, normal, toy_config(seed=seed), progress=False), "student"))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_distill_reports_every_update_and_passes_the_condition():
    seen = []

    def batch_of(generator, n):
        return (normal(generator, n), torch.ones(n, 3))

    models = distill(
        CopiedModels(Net(classes=3)),
        batch_of,
        toy_config(),
        on_step=lambda u, r: seen.append((u, r)),
        progress=False,
    )
    assert [u for u, _ in seen] == list(range(5)) and all(len(r.losses) == 8 for _, r in seen)
    assert isinstance(models, CopiedModels)


def test_distill_is_its_own_steps():
    config = toy_config(lr_scheduler="cosine", restart_every=2)
    by_loop = distill(CopiedModels(Net()), normal, config, progress=False)
    models = CopiedModels(Net())
    optimizer, scheduler = make_optimizer(models, config)
    emas = make_emas(models, config)
    for update in range(config.max_train_steps):
        data = normal(keyed_generator(0, update, stream=1), 8)
        train_step(models, emas, optimizer, [Batch(data, *sample_batch(config, update, 8, (2,)))], config)
        scheduler.step()
    assert all(same(weights(by_loop, name), weights(models, name)) for name in models.networks)


def test_time_bins():
    bins = TimeBins(bins=4, momentum=0.5)
    assert torch.isnan(bins.values).all() and "-" in str(bins)
    bins.add(torch.tensor([1.0, 3.0]), torch.tensor([0.1, 1.0]))
    bins.add(torch.tensor([4.0]), torch.tensor([0.2]))
    values = bins.values
    assert values[0] == pytest.approx((0.5 * 1 + 4) / 1.5) and values[3] == pytest.approx(3.0)
    assert torch.isnan(values[1:3]).all() and str(bins).endswith("3 - - 3")
