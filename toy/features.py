"""A small ResNet on CIFAR-10, whose features stand in for Inception's where no download is possible.

It looks at images (B, 3, 32, 32) in [-1, 1] and gives 256 features and 10 class logits. A Frechet distance on
the features is
*not* FID: other features, another scale. `toy/train_features.py` trains it; what it reached stands in the
file's header.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

WEIGHTS = Path(__file__).parent / "weights" / "cifar_features.safetensors"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
WIDTHS = (32, 64, 128, 256)


def convolution(wide_in, wide_out, halve=False):
    """3 x 3 convolution, a max over 2 x 2 where the size is to be halved, batch norm, ReLU."""
    pool = [nn.MaxPool2d(2)] if halve else []
    return nn.Sequential(
        nn.Conv2d(wide_in, wide_out, 3, 1, 1, bias=False), *pool, nn.BatchNorm2d(wide_out), nn.ReLU()
    )


class Residual(nn.Module):
    """x + two convolutions of x."""

    def __init__(self, wide):
        super().__init__()
        self.body = nn.Sequential(convolution(wide, wide), convolution(wide, wide))

    def forward(self, x):
        return x + self.body(x)


class Features(nn.Module):
    """Nine layers. Images (B, 3, 32, 32) in [-1, 1] -> logits (B, 10); features(images) -> (B, 256), the
    head's input."""

    def __init__(self):
        super().__init__()
        a, b, c, d = WIDTHS
        self.body = nn.Sequential(
            convolution(3, a),
            convolution(a, b, True),
            Residual(b),
            convolution(b, c, True),
            convolution(c, d, True),
            Residual(d),
        )
        self.head = nn.Linear(d, len(CLASSES))

    def features(self, images):
        """(B, 256): the mean over the last 4 x 4 places."""
        return self.body(images).mean((2, 3))

    def forward(self, images):
        return self.head(self.features(images))


class Seen(NamedTuple):
    """What the network sees in N images. features: (N, 256) float32; logits: (N, 10)."""

    features: torch.Tensor
    logits: torch.Tensor


def load_features(path=WEIGHTS):
    """The trained network, ready to look. FileNotFoundError with the command that makes the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing: python -m toy.train_features FOLDER makes it")
    network = Features()
    network.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in load_file(str(path)).items()}
    )
    return network.eval().requires_grad_(False)


def recipe(path=WEIGHTS):
    """What is known about the weights: test accuracy, data, recipe. A dict, from the file's header."""
    with safe_open(str(path), framework="pt") as opened:
        return json.loads(opened.metadata()["recipe"])


def mark(path=WEIGHTS):
    """Eight digits of the weights, by which what they saw is told from what others saw."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]


@torch.no_grad()
def look(network, images, batch=500):
    """`Seen` of images (N, 3, 32, 32), uint8 or float in [-1, 1]; in parts of `batch`, on the network's
    device."""
    device, seen = next(network.parameters()).device, []
    for chunk in images.split(batch):
        chunk = chunk.to(device)
        chunk = chunk.float() / 127.5 - 1 if chunk.dtype == torch.uint8 else chunk.float().clamp(-1, 1)
        features = network.features(chunk)
        seen.append((features.cpu(), network.head(features).cpu()))
    return Seen(*(torch.cat(part) for part in zip(*seen, strict=False)))
