"""The features of ImageNet: that the network is the one whose weights these are."""

import builtins
from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from scfm.evaluation.find_metrics import find_metrics
from scfm.evaluation.imagenet_features import NAME, ImageNetMetric

MILITARY_UNIFORM = 652  # of ImageNet's classes


@pytest.fixture(scope="module")
def metric():
    return ImageNetMetric()


def test_it_says_what_is_on_a_photograph(metric):
    """matplotlib ships one, of Grace Hopper in uniform; a wrong order of the weights would not know it."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    photograph = pil_to_tensor(Image.open(path).convert("RGB"))[None]
    shares = metric.classify(photograph).softmax(1)[0]
    assert shares.argmax() == MILITARY_UNIFORM and shares.max() > 0.3


def test_the_features_are_what_the_last_layer_sees(metric):
    images = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8)
    features, scores = metric.measure([(images[:2], None), (images[2:], None)])
    assert features.shape == (3, 1280) and scores == {}
    logits = metric.network.classifier(features)
    torch.testing.assert_close(logits, metric.classify(images), rtol=1e-4, atol=1e-4)


def test_without_the_packages_it_is_missing_and_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest):
        if name == "timm":
            raise ImportError("no timm", name="timm")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert find_metrics("", "none", "none")[1][NAME] == "timm is not installed: pip install 'scfm[evaluate]'"
