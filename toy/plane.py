"""Two-dimensional data, the exact velocity of a Gaussian mixture, and the small network that learns such
fields."""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from scfm.method.flow import interpolate, per_row, velocity


def checkerboard(n, generator=None):
    """Eight of sixteen unit squares of [-2, 2]^2, standardised roughly to unit deviation: (n, 2)."""
    x = torch.rand(n, generator=generator) * 4 - 2
    y = torch.rand(n, generator=generator) - 2 * torch.randint(2, (n,), generator=generator)
    return torch.stack([x, y + x.floor() % 2], 1) / 1.15


def moons(n, generator=None):
    """Two interleaved half circles with noise .05: (n, 2)."""
    angle = math.pi * torch.rand(n, generator=generator)
    upper = torch.randint(2, (n,), generator=generator) == 1
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    return (torch.stack([x, y], 1) + 0.05 * torch.randn(n, 2, generator=generator)) * 1.3


def eight_gaussians(n, generator=None):
    """Eight Gaussians of deviation .1 on a circle of radius 1.4: (n, 2)."""
    mixture = ring_mixture()
    return mixture.sample(n, generator)


class Mixture(NamedTuple):
    """An isotropic Gaussian mixture. `means`: (K, D); `deviation`: one number; equal weights."""

    means: torch.Tensor
    deviation: float

    def sample(self, n, generator=None):
        """(n, D)."""
        which = torch.randint(len(self.means), (n,), generator=generator)
        return self.means[which] + self.deviation * torch.randn(n, self.means.shape[1], generator=generator)

    def field(self, x, t, cond=None):
        """The exact marginal velocity E[noise - data | x_t = x]: what a perfect flow-matching network would
        say.

        Given component k, x_t is Gaussian with mean (1 - t) m_k and variance (1 - t)^2 s^2 + t^2, so both
        conditional expectations are linear in x; the components are weighed by their posterior.
        x: (B, D), t: (B,) -> (B, D).
        """
        t = per_row(t, x)  # (B, 1)
        variance = (1 - t) ** 2 * self.deviation**2 + t**2  # (B, 1)
        away = x[:, None] - (1 - t)[:, None] * self.means  # (B, K, D)
        weight = (-0.5 * away.square().sum(-1) / variance).softmax(1)  # (B, K)
        slope = (t - (1 - t) * self.deviation**2) / variance  # (B, 1)
        return (weight[..., None] * (slope[..., None] * away - self.means)).sum(1)


def ring_mixture(components=8, radius=1.4, deviation=0.1):
    angle = 2 * math.pi * torch.arange(components) / components
    return Mixture(radius * torch.stack([angle.cos(), angle.sin()], 1), deviation)


DATA = {"checkerboard": checkerboard, "moons": moons, "8 gaussians": eight_gaussians}


STEP_FREQUENCIES = 3


class MLP(nn.Module):
    """A velocity field on the plane: x (B, 2), t (B,) -> (B, 2). SiLU layers, Fourier features of the time.

    step_input: it has a second input, the step size d (B,), as d and its three lowest features; left out,
    d is 0. (With all eight, a Shortcut student of 600,000 evaluations stayed at SW2 .17 with 32 steps,
    checkerboard, one seed; with three, .05.)"""

    def __init__(self, width=256, depth=4, frequencies=8, step_input=False):
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(frequencies) / 2)
        self.step_input = step_input
        widths = [2 + 1 + 2 * frequencies + (1 + 2 * STEP_FREQUENCIES) * step_input] + [width] * depth
        self.layers = nn.ModuleList([nn.Linear(i, o) for i, o in zip(widths, widths[1:], strict=False)])
        self.out = nn.Linear(width, 2)

    def forward(self, x, t, d=None):
        h = torch.cat([x, self.features(t)], 1)
        if self.step_input:
            h = torch.cat([h, self.features(torch.zeros_like(t) if d is None else d, STEP_FREQUENCIES)], 1)
        for layer in self.layers:
            h = F.silu(layer(h))
        return self.out(h)

    def features(self, t, count=None):
        """(B,) -> (B, 1 + 2 count): t itself, sine and cosine at the lowest `count` frequencies, or at
        all."""
        angles = t[:, None] * self.frequencies[:count]
        return torch.cat([t[:, None], angles.sin(), angles.cos()], 1)


def with_step(network):
    """A copy of an `MLP` with a step size as second input, to which it does not listen yet: its columns are
    zero."""
    first = network.layers[0]
    stepped = MLP(first.out_features, len(network.layers), len(network.frequencies), step_input=True)
    weights = network.state_dict()
    silent = stepped.layers[0].in_features - first.in_features
    weights["layers.0.weight"] = F.pad(weights["layers.0.weight"], (0, silent))
    stepped.load_state_dict(weights)
    return stepped


def train_flow(network, data, updates=4000, batch=512, lr=1e-3, seed=0):
    """Plain flow matching of `network` on `data(n, generator)`; Adam with a cosine to zero. Returns the
    network."""
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        x0 = data(batch, generator)
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.rand(batch, generator=generator)
        loss = F.mse_loss(network(interpolate(x0, noise, t), t), velocity(x0, noise))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return network


class GaussianStudent(NamedTuple):
    """A linear field on data N(0, deviation^2): V(x, t) = (exact slope + change) x. change: (bins + 1,), by t
    from 0 to 1."""

    deviation: float
    change: torch.Tensor

    def field(self, x, t, cond=None, scale=1.0):
        """x: (B, D), t: (B,) -> (B, D). scale: a number, or one for each row (B, 1); 0 is the exact field."""
        return (
            gaussian_slope(per_row(t, x), self.deviation) + scale * interpolated(self.change, per_row(t, x))
        ) * x


def gaussian_slope(t, deviation):
    """The exact velocity of data N(0, deviation^2) at x and t is this times x."""
    return (t - (1 - t) * deviation**2) / ((1 - t) ** 2 * deviation**2 + t**2)


def interpolated(values, t):
    """A function on [0, 1], given at len(values) even points, at the times t; linear between the points."""
    place = t.double() * (len(values) - 1)
    i = place.long().clamp(0, len(values) - 2)
    return values[i].lerp(values[i + 1], place - i)


def gaussian_rest(
    deviation, jumps, algorithm="one_ema", ema_target_scale=1.0, weight=None, bins=512, sweeps=3000
):
    """Where SCFM comes to rest on data N(0, deviation^2), with the exact field as teacher: a
    `GaussianStudent`.

    At rest the student says at each t1 the mean target of the rows that start there, and its averages say
    what it says. All
    targets are slopes: (h1 a1 + h2 a2 (1 - h1 a1)) / (h1 + h2), see chapter
    02_fixed_point. jumps: many draws, of `draw_jumps`;
    weight: (B,), how much each row counts, all the same when None. Repeats the equation until nothing moves.
    ValueError when
    that does not happen within `sweeps`.
    """
    times, steps = jumps.times.double().T, torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    t1, t2, h1, h2 = times[0], times[1], times[0] - times[1], times[1] - times[2]
    own = ema_target_scale * torch.stack(
        [~jumps.is_teacher, ~jumps.is_teacher | (algorithm == "dual")]
    )  # who hears an EMA
    weight = torch.ones_like(t1) if weight is None else weight.double()
    slot = (t1 * bins).round().long()
    mass = torch.bincount(slot, weight, bins + 1)
    seen = mass > 0
    left = torch.where(seen, torch.arange(bins + 1), -1).cummax(0).values.clamp(min=int(seen.nonzero()[0]))
    right = (
        torch.where(seen, torch.arange(bins + 1), bins + 1)
        .flip(0)
        .cummin(0)
        .values.flip(0)
        .clamp(max=int(seen.nonzero()[-1]))
    )
    share = ((torch.arange(bins + 1) - left) / (right - left).clamp(min=1).double()).clamp(
        0, 1
    )  # between seen times
    exact1, exact2 = gaussian_slope(t1, deviation), gaussian_slope(t2, deviation)
    change = torch.zeros_like(steps)
    for _ in range(sweeps):
        a1, a2 = exact1 + own[0] * interpolated(change, t1), exact2 + own[1] * interpolated(change, t2)
        target = (h1 * a1 + h2 * a2 * (1 - h1 * a1)) / (h1 + h2)
        mean = torch.bincount(slot, weight * (target - exact1), bins + 1) / mass
        before, change = change, mean[left].lerp(mean[right], share)
        if (change - before).abs().max() < 1e-7:
            return GaussianStudent(deviation, change)
    raise ValueError(
        f"no rest after {sweeps} sweeps: the last one still moved {(change - before).abs().max():.1e}"
    )
