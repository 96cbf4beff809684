"""The attribute reader: a small classifier that says which colour, shape, size and place an image shows.

It is trained on drawings (`toy/train_flux.py`), where the truth is known. It gives two figures of merit, each
called by what it is:
*prompt accuracy*, the share of named attributes that the image shows, and the *features of the reader*, on
which a
Frechet distance can be taken. That distance is not FID: FID uses Inception features of natural images.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from toy.shapes import ATTRIBUTES

WEIGHTS = Path(__file__).parent / "weights" / "reader.safetensors"
FEATURES = 64


class Reader(nn.Module):
    """Images (B, 3, 32, 32) in [-1, 1] -> one tensor of logits per attribute, in the order of
    `ATTRIBUTES`."""

    def __init__(self):
        super().__init__()

        def block(i, o, stride):
            return [nn.Conv2d(i, o, 3, stride, 1), nn.GroupNorm(8, o), nn.SiLU()]

        self.body = nn.Sequential(
            *block(3, 16, 1),
            *block(16, 32, 2),
            *block(32, 48, 2),
            *block(48, 64, 2),
            nn.Flatten(),
            nn.Linear(64 * 16, FEATURES),
            nn.SiLU(),
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(FEATURES, len(words)) for name, words in ATTRIBUTES.items()}
        )

    def features(self, images):
        """(B, 64), the input of the heads."""
        return self.body(images)

    def forward(self, images):
        features = self.features(images)
        return [head(features) for head in self.heads.values()]

    def loss(self, images, truth):
        """Sum of the cross-entropies. `truth`: (B, 5) integers."""
        return sum(F.cross_entropy(logits, truth[:, i]) for i, logits in enumerate(self(images)))


def load_reader(path=WEIGHTS):
    reader = Reader()
    reader.load_state_dict({k: v.float() for k, v in load_file(str(path)).items()})
    return reader.eval().requires_grad_(False)


@torch.no_grad()
def read(reader, images, batch=500):
    """What the reader sees: (features (B, 64), attributes (B, 5))."""
    features = torch.cat([reader.features(chunk) for chunk in images.split(batch)])
    seen = torch.stack([head(features).argmax(1) for head in reader.heads.values()], 1)
    return features, seen


def prompt_accuracy(seen, named):
    """Share of the named attributes that are seen, per attribute and for whole captions.

    `seen`, `named`: (B, 5); -1 in `named` where the caption is silent. "all" counts an image only if every
    attribute that its caption names is there; "named" is the mean over all named attributes.
    """
    named_here, right = named >= 0, seen == named
    per = {
        name: (right[:, i] & named_here[:, i]).sum().item() / max(1, named_here[:, i].sum().item())
        for i, name in enumerate(ATTRIBUTES)
    }
    return {
        **per,
        "named": (right & named_here).sum().item() / named_here.sum().item(),
        "all": (right | ~named_here).all(1).float().mean().item(),
    }
