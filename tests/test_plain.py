"""nbs/learn/plain_scfm.ipynb imports nothing of ours and computes what the library does: loss, gradient,
weights."""

import ast
import json
from pathlib import Path

import pytest
import torch

from scfm.method import flow
from scfm.method.consistency import DistillModels, Jumps, consistency_target, draw_jumps
from scfm.method.distill import (
    Batch,
    CopiedModels,
    SCFMConfig,
    make_emas,
    make_optimizer,
    sample_batch,
    train_step,
)
from scfm.streams import keyed_generator

NOTEBOOK = Path(__file__).parents[1] / "nbs" / "learn/plain_scfm.ipynb"
CODE = [
    "".join(c["source"])
    for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    if c["cell_type"] == "code"
]
DECAYS = (0.9, 0.97)


@pytest.fixture(scope="module")
def plain():
    """The functions and classes of the notebook, without what its cells do besides defining them."""
    space = {}
    for cell in CODE:
        tree = ast.parse(cell)
        tree.body = [
            n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
        ]
        exec(compile(tree, NOTEBOOK.name, "exec"), space)
    return space


def test_it_stands_alone_and_is_short():
    names = [
        a.name
        for cell in CODE
        for n in ast.walk(ast.parse(cell))
        if isinstance(n, ast.Import)
        for a in n.names
    ]
    names += [n.module for cell in CODE for n in ast.walk(ast.parse(cell)) if isinstance(n, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= {"copy", "math", "matplotlib", "torch"}
    assert sum(bool(line.strip()) for cell in CODE for line in cell.splitlines()) <= 130


def pair(plain, seed=0):
    """The library's four models, and the same four networks for the notebook; the models already differ."""
    torch.manual_seed(seed)
    ours = CopiedModels(plain["Net"](width=16))
    with torch.no_grad():
        for name in ("student", "ema_fast", "ema_slow"):
            for p in ours.parameters(name):
                p.add_(0.05 * torch.randn_like(p))
    theirs = {}
    for name, network in ours.networks.items():
        theirs[name] = plain["Net"](width=16).requires_grad_(name == "student")
        theirs[name].load_state_dict(network.state_dict())
    return ours, theirs


def batch(config, step):
    data = torch.randn(config.global_batch_size, 2, generator=keyed_generator(0, step, stream=1))
    return data, *sample_batch(config, step, config.global_batch_size, (2,))


def test_the_target_is_the_librarys(plain):
    ours, theirs = pair(plain)
    data, noise, jumps = batch(SCFMConfig(global_batch_size=64, shift=(1.0, 2.0)), 0)
    x1 = flow.interpolate(data, noise, jumps.t1)
    torch.testing.assert_close(plain["interpolate"](data, noise, jumps.t1), x1, atol=0, rtol=0)
    models = DistillModels(ours.student, ours.teacher, ours.ema_fast, ours.ema_slow)
    target = plain["target"](
        x1, jumps.times, jumps.is_teacher, theirs["teacher"], theirs["ema_fast"], theirs["ema_slow"]
    )
    torch.testing.assert_close(target, consistency_target(x1, jumps, models), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("lr", [0.0, 5e-4])
def test_loss_gradient_and_weights_are_the_librarys(plain, lr):
    config = SCFMConfig(
        global_batch_size=64,
        learning_rate=5e-4,
        shift=(1.0, 2.0),
        ema_decay_fast=DECAYS[0],
        ema_decay_slow=DECAYS[1],
        max_train_steps=20,
    )
    ours, theirs = pair(plain)
    before = {name: [p.clone() for p in ours.parameters(name)] for name in ("ema_fast", "ema_slow")}
    (optimizer, _), emas = make_optimizer(ours, config), make_emas(ours, config)
    with torch.no_grad():  # make_emas restarts them; here they are to differ
        for name, tensors in before.items():
            for p, q in zip(ours.parameters(name), tensors, strict=False):
                p.copy_(q)
    optimizer.param_groups[0]["lr"] = lr
    other = torch.optim.AdamW(theirs["student"].parameters(), lr, weight_decay=config.adam_weight_decay)
    for step in range(8):
        data, noise, jumps = batch(config, step)
        gradients = []
        for parameters, opt in (
            (ours.parameters("student"), optimizer),
            (list(theirs["student"].parameters()), other),
        ):
            opt.register_step_pre_hook(
                lambda *_, p=parameters, g=gradients: g.append([q.grad.clone() for q in p])
            )
        result = train_step(ours, emas, optimizer, [Batch(data, noise, jumps)], config)
        loss = plain["train_step"](
            *(theirs[n] for n in ("student", "teacher", "ema_fast", "ema_slow")),
            other,
            data,
            noise,
            jumps.times,
            jumps.is_teacher,
            DECAYS,
        )
        assert loss == pytest.approx(result.losses.mean().item(), rel=2e-5)
        for a, b in zip(gradients[0], gradients[-1], strict=False):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)
        for name, network in theirs.items():
            for a, b in zip(ours.parameters(name), network.parameters(), strict=False):
                torch.testing.assert_close(a.detach(), b.detach(), atol=2e-5, rtol=1e-4)
        assert (lr == 0) == all(
            torch.equal(a, b)
            for a, b in zip(ours.parameters("student"), pair(plain)[0].parameters("student"), strict=False)
        )


def test_a_teacher_that_moved_would_be_noticed(plain):
    ours, theirs = pair(plain)
    data, noise, jumps = batch(SCFMConfig(global_batch_size=64, shift=(1.0, 2.0)), 0)
    swapped = plain["target"](
        data, jumps.times, jumps.is_teacher, theirs["ema_slow"], theirs["ema_fast"], theirs["ema_slow"]
    )
    right = plain["target"](
        data, jumps.times, jumps.is_teacher, theirs["teacher"], theirs["ema_fast"], theirs["ema_slow"]
    )
    assert not torch.allclose(swapped[jumps.is_teacher], right[jumps.is_teacher], atol=1e-4)
    assert torch.equal(swapped[~jumps.is_teacher], right[~jumps.is_teacher])


def test_its_jumps_are_drawn_from_the_librarys_distribution(plain):
    times, is_teacher = plain["draw_jumps"](200_000, torch.Generator().manual_seed(0))
    jumps = draw_jumps(200_000, generator=keyed_generator(0, 0))
    assert (
        times.shape == jumps.times.shape
        and times.dtype == jumps.times.dtype
        and (times[:, :-1] > times[:, 1:]).all()
    )
    assert abs(is_teacher.float().mean() - 0.4) < 0.005
    for rows, others in ((is_teacher, jumps.is_teacher), (~is_teacher, ~jumps.is_teacher)):
        for column in range(3):  # all of the distribution: quantile by quantile
            a, b = (
                times[rows][:50_000, column].sort().values,
                jumps.times[others][:50_000, column].sort().values,
            )
            assert (a[:50_000] - b[:50_000]).abs().mean() < 0.006
        assert (
            abs((times[rows][:, 0] > 0.9999).float().mean() - (jumps.t1[others] > 0.9999).float().mean())
            < 0.006
        )


def test_its_sampler_is_the_librarys(plain):
    net = plain["Net"](width=16)
    x = torch.randn(10, 2)
    for steps in (1, 3, 8):
        ours = flow.sample(lambda x, t, cond: net(x, t), x, flow.time_grid(steps))
        torch.testing.assert_close(plain["sample"](net, x, steps), ours, atol=1e-6, rtol=1e-5)


def test_its_dial_is_the_librarys(plain):
    ours, theirs = pair(plain)
    x, t = torch.randn(10, 2), torch.rand(10)
    for scale in (0.0, 0.4, 1.0, 1.5):
        mixed = plain["at_scale"](theirs["teacher"], theirs["student"], scale)
        torch.testing.assert_close(
            mixed(x, t).detach(), ours.field("student", scale)(x, t), atol=1e-6, rtol=1e-5
        )


def test_the_jumps_of_the_library_have_the_shape_that_the_page_uses():
    jumps = draw_jumps(4)
    assert isinstance(jumps, Jumps) and jumps.times.shape == (4, 3) and jumps.is_teacher.dtype == torch.bool
