"""Two-dimensional data, the exact velocity of a Gaussian mixture, and the small network that learns such fields."""
import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from scfm.flow import interpolate, per_row, velocity


def checkerboard(n, generator=None):
    """Eight of sixteen unit squares of [-2, 2]^2, standardised roughly to unit deviation: (n, 2)."""
    x = torch.rand(n, generator=generator) * 4 - 2
    y = torch.rand(n, generator=generator) - 2 * torch.randint(2, (n,), generator=generator)
    return torch.stack([x, y + x.floor() % 2], 1) / 1.15


def moons(n, generator=None):
    """Two interleaved half circles with noise .05: (n, 2)."""
    angle = math.pi * torch.rand(n, generator=generator)
    upper = torch.randint(2, (n,), generator=generator) == 1
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - .5
    y = torch.where(upper, angle.sin(), .5 - angle.sin()) - .25
    return (torch.stack([x, y], 1) + .05 * torch.randn(n, 2, generator=generator)) * 1.3


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
        """The exact marginal velocity E[noise - data | x_t = x]: what a perfect flow-matching network would say.

        Given component k, x_t is Gaussian with mean (1 - t) m_k and variance (1 - t)^2 s^2 + t^2, so both
        conditional expectations are linear in x; the components are weighed by their posterior.
        x: (B, D), t: (B,) -> (B, D).
        """
        t = per_row(t, x)                                                       # (B, 1)
        variance = (1 - t) ** 2 * self.deviation ** 2 + t ** 2                  # (B, 1)
        away = x[:, None] - (1 - t)[:, None] * self.means                       # (B, K, D)
        weight = (-.5 * away.square().sum(-1) / variance).softmax(1)            # (B, K)
        slope = (t - (1 - t) * self.deviation ** 2) / variance                  # (B, 1)
        return (weight[..., None] * (slope[..., None] * away - self.means)).sum(1)


def ring_mixture(components=8, radius=1.4, deviation=.1):
    angle = 2 * math.pi * torch.arange(components) / components
    return Mixture(radius * torch.stack([angle.cos(), angle.sin()], 1), deviation)


DATA = {"checkerboard": checkerboard, "moons": moons, "8 gaussians": eight_gaussians}


class MLP(nn.Module):
    """A velocity field on the plane: x (B, 2), t (B,) -> (B, 2). SiLU layers, Fourier features of the time."""

    def __init__(self, width=256, depth=4, frequencies=8):
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(frequencies) / 2)
        widths = [2 + 1 + 2 * frequencies] + [width] * depth
        self.layers = nn.ModuleList([nn.Linear(i, o) for i, o in zip(widths, widths[1:])])
        self.out = nn.Linear(width, 2)

    def forward(self, x, t):
        angles = t[:, None] * self.frequencies
        h = torch.cat([x, t[:, None], angles.sin(), angles.cos()], 1)
        for layer in self.layers:
            h = F.silu(layer(h))
        return self.out(h)


def train_flow(network, data, updates=4000, batch=512, lr=1e-3, seed=0):
    """Plain flow matching of `network` on `data(n, generator)`; Adam with a cosine to zero. Returns the network."""
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
