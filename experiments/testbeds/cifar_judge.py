"""Images of samplers on CIFAR-10, and what feature networks say of them; each is stored as a file, and made
once.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from experiments.runner import write_json
from experiments.stored import STORED_WORDS
from scfm.data.labelled_images import load_labelled_images
from scfm.evaluation.feature_distances import manifold
from scfm.files import atomic_write
from scfm.method.flow import EVALUATIONS
from scfm.method.metrics import frechet_distance
from scfm.models.unet import header_of
from toy.features import load_features, look, mark

Sampler = Callable[..., torch.Tensor]  # (labels, noise, steps, solver) -> images (n, 3, 32, 32) in [-1, 1]
NEIGHBOURS = 3  # of precision and recall, as in arXiv 1904.06991
GENERATED = STORED_WORDS["generated"]  # the folder of the images


class Samples:
    """Images from the same noises and labels for every sampler."""

    def __init__(self, cells: Path, count: int, device: str, seed: int = 1):
        self.folder, self.count, self.device = cells / GENERATED, count, device
        self.labels = torch.arange(count) % 10
        self.noise = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))

    def generate(self, name: str, sampler: Sampler | None, nfe: int, solver: str) -> Path:
        """The file of the pixels (count, 3, 32, 32) uint8 that so many evaluations give; sampler: None where
        it is there.
        """
        path = self.folder / f"{name}-{self.count}-{solver}-{nfe}.safetensors"
        if not path.is_file():
            began = time.time()
            labels, noise = self.labels.to(self.device), self.noise.to(self.device)
            images = sampler(labels, noise, nfe // EVALUATIONS[solver], solver).cpu()
            pixels, seconds = ((images.clamp(-1, 1) + 1) * 127.5).round().byte(), time.time() - began
            atomic_write(path, partial(save_file, {"pixels": pixels}, metadata={"seconds": f"{seconds:.1f}"}))
            print(f"generated {name}, {solver}, NFE {nfe}: {seconds:.1f} s", flush=True)
        return path


class Judge:
    """The same references for every set of images. The features are those of `toy.features`; with
    `inception`, the weights of Inception, the true FID stands beside.
    """

    def __init__(self, data: str, cells: Path, count: int, device: str, inception: str = "", seed: int = 1):
        self.cells, self.count, self.device = cells, count, device
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % 10
        self.metrics = {"frechet": self._own_features()}
        if inception:
            self.metrics["FID"] = self._inception_features(inception)
        self.name = "-".join((*self.metrics, mark()))
        train, test = load_labelled_images(data), load_labelled_images(data, "test")
        order = torch.randperm(len(train.pixels), generator=generator)
        half = min(10_000, len(order) // 2)
        self.reference = {
            "train": self._reference("train", train.pixels[order[:half]]),
            "test": self._reference("test", test.pixels),
        }
        self.fresh = train.pixels[order[half : half + count]]  # real images outside the reference

    def _own_features(self) -> Callable:
        return partial(look, load_features().to(self.device))

    def _inception_features(self, weights: str) -> Callable:
        from scfm.evaluation.image_metrics import InceptionMetric

        metric = InceptionMetric(weights, self.device)
        return lambda images: metric.measure((chunk, None) for chunk in images.split(100))

    def see(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """{metric: features (N, D)} of images (N, 3, 32, 32) uint8, and what the classifier takes them for,
        "logits".
        """
        seen = {name: metric(pixels) for name, metric in self.metrics.items()}
        features = {name: found[0].float() for name, found in seen.items()}
        return features | {"logits": seen["frechet"][1]}

    def _reference(self, name: str, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is seen of real images, stored as a file."""
        path = self.cells / f"reference-{name}-{len(pixels)}-{self.name}.safetensors"
        if not path.is_file():
            atomic_write(path, partial(save_file, self.see(pixels)))
        return load_file(path)

    def scores(self, seen: dict[str, torch.Tensor], labels: torch.Tensor | None = None) -> dict[str, float]:
        """Distances of every metric to both references, precision and recall, what the classifier says about
        labels and balance.
        """
        marks = {
            f"{metric}_{name}": round(frechet_distance(seen[metric], reference[metric]), 4)
            for metric in self.metrics
            for name, reference in self.reference.items()
        }
        real = self.reference["test"]["frechet"][: len(seen["frechet"])]
        lies = manifold(seen["frechet"], real, NEIGHBOURS)
        predicted = seen["logits"].argmax(1)
        shares = predicted.bincount(minlength=10).double() / len(predicted)
        marks |= {
            "precision": round(lies.precision, 4),
            "recall": round(lies.recall, 4),
            "balance": round(torch.special.entr(shares).sum().exp().item(), 3),
        }
        if labels is not None:
            marks["label_accuracy"] = round((predicted == labels).float().mean().item(), 4)
        return marks

    def score_file(self, path: Path, place: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
        """One row of the record for a file of images, stored as a file. place: solver and evaluations; about:
        more.
        """
        row = self.cells / "measured" / f"{path.stem}-{self.name}.json"
        if not row.is_file():
            marks = self.scores(self.see(load_file(path)["pixels"]), self.labels)
            text = json.dumps({**place, **marks, "seconds": float(header_of(path)["seconds"]), **about})
            write_json(text, row)
            print(path.stem, text, flush=True)
        return json.loads(row.read_text())

    def floor(self) -> dict[str, float]:
        """What as many real training images score that are in neither reference; stored as a file."""
        path = self.cells / "measured" / f"floor-{self.count}-{self.name}.json"
        if not path.is_file():
            write_json(json.dumps(self.scores(self.see(self.fresh))), path)
        return json.loads(path.read_text())
