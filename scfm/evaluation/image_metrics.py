"""FID, CLIP score and other metrics of images, and why one is unavailable."""

import hashlib
import importlib
import io
import os
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias
from urllib.parse import urlsplit

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file
from torchvision.transforms.functional import center_crop

from scfm.models.hub import answers, hub_reachable
from scfm.models.loading import no_loading_bars

Batches: TypeAlias = Iterable[tuple[torch.Tensor, Sequence[str] | None]]
"""(images (b, 3, H, W) uint8, captions or None), as from `scfm.evaluation.image_store.image_batches`."""
MetricFunction: TypeAlias = Callable[
    [torch.Tensor, Sequence[str] | None], tuple[torch.Tensor | None, Mapping[str, torch.Tensor]]
]
"""What a user's own function takes and gives: see `CustomMetric`."""


class Measured(NamedTuple):
    """What a metric says of images. features: (n, D), or None; scores: the mean of each over the images."""

    features: torch.Tensor | None
    scores: dict[str, float]


class ImageMetric(Protocol):
    """What measures images.

    name: its own
    distance: what a Frechet distance on its features is called, or None where it has no features

    Where there are no captions, scores of captions are left out.
    """

    @property
    def name(self) -> str: ...

    @property
    def distance(self) -> str | None: ...

    def measure(self, batches: Batches) -> Measured: ...


class MetricUnavailable(Exception):
    """Weights that could not be loaded, in one line that says why."""


class InceptionMetric:
    """FID, by the 2048 features of the Inception network that it was defined with, as torch-fidelity and
    torchmetrics have it.

    path: its weights, a state dict as .safetensors or .pth (read without unpickling code); empty: downloaded
    once by torch.hub
    Attributes: `mark`, as from `mark_of`, of the weights' file.
    Raises `MetricUnavailable`.
    """

    name, distance = "Inception", "FID"

    def __init__(self, path: str = "", device: str | torch.device = "cpu") -> None:
        self.device = device
        try:
            self.network = load_inception(path).to(device)
            self.mark = mark_of([Path(path) if path else inception_cache()])
        except ImportError as error:
            raise not_installed(error) from None
        except (OSError, RuntimeError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
            raise MetricUnavailable(
                f"Inception's weights could not be loaded from {path or 'the hub'} ({first_line(error)})"
            ) from None

    @torch.no_grad()
    def measure(self, batches: Batches) -> Measured:
        """The features of images; there is no score."""
        return Measured(torch.cat([self.network(images.to(self.device)).cpu() for images, _ in batches]), {})


PATCH = 299  # pixels that Inception sees, of which a patch has as many


class PatchInceptionMetric(InceptionMetric):
    """Patch FID: Inception on the 299 x 299 pixels in the middle of each image, cut out without resizing, so
    that it sees the details that scaling down hides (as SDXL-Lightning has it, arXiv 2402.13929).

    size: (H, W) of the images
    Raises `MetricUnavailable`, also where they are not larger than a patch.
    """

    name, distance = "Inception on patches", "patch FID"

    def __init__(self, path: str = "", device: str | torch.device = "cpu", size: tuple[int, int] = (0, 0)):
        if min(size) <= PATCH:
            raise MetricUnavailable(
                f"images of {size[0]} x {size[1]} pixels are not larger than a patch of {PATCH} x {PATCH}"
            )
        super().__init__(path, device)

    def measure(self, batches: Batches) -> Measured:
        """The features of the patches; there is no score."""
        return super().measure((center_crop(images, [PATCH]), captions) for images, captions in batches)


def load_inception(path: str) -> torch.nn.Module:
    """The network with the weights of a file, or of the hub.

    torch-fidelity unpickles whatever file it is given: so it gets one that was written here.
    """
    from torchmetrics.image.fid import NoTrainInceptionV3

    buffer: Any = io.BytesIO()
    torch.save(inception_state(path), buffer)
    buffer.seek(0)
    return NoTrainInceptionV3("inception-v3-compat", ["2048"], buffer)


def inception_state(path: str) -> dict[str, torch.Tensor]:
    """The state dict in a file, or torch-fidelity's own from the hub, which stays in torch's cache."""
    if path:
        if path.endswith(".safetensors"):
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url

    cached = inception_cache()
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") and not cached.is_file():
        raise OSError("HF_HUB_OFFLINE is set and they are not in torch's cache; name a file with --inception")
    if not cached.is_file() and not answers(url):
        host = urlsplit(url).hostname
        raise OSError(
            f"{host} cannot be reached, and they are not in torch's cache; name a file with --inception"
        )
    return torch.hub.load_state_dict_from_url(url, progress=False, map_location="cpu", weights_only=True)


def inception_cache() -> Path:
    """Where torch.hub keeps torch-fidelity's weights of Inception."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url

    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]


class CLIPMetric:
    """The CLIP score, 100 cos(image, caption), by torchmetrics.

    folder: of a CLIP model, or its name on the hub
    name, score: what the metric and its number are called
    Attributes: `mark`, as from `mark_of`, of the weights' files.
    Raises `MetricUnavailable`.
    """

    distance = None

    def __init__(
        self,
        folder: str,
        device: str | torch.device = "cpu",
        name: str = "CLIP",
        score: str = "CLIP score",
    ) -> None:
        self.device, self.name, self.score = device, name, score
        try:
            self.metric = load_clip_score(folder, device)
            self.mark = mark_of(weight_files(folder))
        except ImportError as error:
            raise not_installed(error) from None
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise MetricUnavailable(
                f"{name} could not be loaded from {folder} ({first_line(error)})"
            ) from None

    @torch.no_grad()
    def measure(self, batches: Batches) -> Measured:
        """The score of images with their captions; there are no features."""
        self.metric.reset()
        for images, captions in batches:
            self.metric.update(images.to(self.device), list(captions or ()))
        return Measured(None, {self.score: self.metric.compute().item()})


class PreferenceMetric(CLIPMetric):
    """The score of a model of human preferences in CLIP's format: 100 cos(image, caption), as the CLIP score,
    under the model's own name. Such are PickScore v1 (arXiv 2305.01569), and HPS v2 (arXiv 2306.09341) once
    converted to transformers' format.
    """

    def __init__(self, folder: str, device: str | torch.device = "cpu") -> None:
        name = Path(folder).name
        super().__init__(folder, device, f"preference model {name}", f"preference ({name})")


def load_clip_score(folder: str, device: str | torch.device) -> Any:
    """torchmetrics' CLIPScore with the model and the processor in a folder."""
    from torchmetrics.multimodal import CLIPScore
    from transformers import CLIPModel, CLIPProcessor

    local = not Path(folder).is_dir() and not hub_reachable()
    with no_loading_bars():
        loaded: Any = CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=local)
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=local)
    model = loaded.to(device)

    def parts() -> Any:
        return CLIPEncoders(model), TruncatingProcessor(processor, model)

    return CLIPScore(parts).to(device)


class CLIPEncoders(torch.nn.Module):
    """A CLIPModel whose two encoders give plain tensors: transformers 5 wraps them, torchmetrics 1.9 expects
    them plain."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, *inputs: Any) -> torch.Tensor:
        """(n, D) of preprocessed images."""
        return unwrapped(self.model.get_image_features(*inputs))

    def get_text_features(self, *inputs: Any) -> torch.Tensor:
        """(n, D) of tokens."""
        return unwrapped(self.model.get_text_features(*inputs))


def unwrapped(output: Any) -> torch.Tensor:
    """The tensor in what an encoder of transformers gives."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


class TruncatingProcessor:
    """A CLIPProcessor that cuts long captions before their end mark; torchmetrics would cut the mark off."""

    def __init__(self, processor: Any, model: Any) -> None:
        self.processor, self.longest = processor, model.config.text_config.max_position_embeddings

    def __call__(self, **inputs: Any) -> Any:
        if "text" in inputs:
            inputs |= {"truncation": True, "max_length": self.longest}
        return self.processor(**inputs)


class CustomMetric:
    """A function of the user's own, `module:name`.

    It is called as name(images (b, 3, H, W) in [-1, 1], captions or None) and gives (features (b, D) or None,
    {score: (b,) numbers, nan where there is none}). ValueError when there is no such function.
    """

    def __init__(self, where: str) -> None:
        module, _, name = where.partition(":")
        self.name, self.distance = where, f"Frechet distance on {where}"
        try:
            self.function: MetricFunction = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"--custom_metric {where}: no such function ({error}); say module:function"
            ) from None

    @torch.no_grad()
    def measure(self, batches: Batches) -> Measured:
        """What the function says of images, in batches."""
        parts = [self.function(images.float() / 127.5 - 1, captions) for images, captions in batches]
        names = parts[0][1] if parts else ()
        scores = {n: torch.cat([scores[n].double() for _, scores in parts]).nanmean().item() for n in names}
        features = [features for features, _ in parts if features is not None]
        return Measured(torch.cat(features) if features else None, scores)


def mark_of(paths: Sequence[Path]) -> str:
    """The first 16 digits of the SHA-256 of files, one after another; "" where there is none of them."""
    digest = hashlib.sha256()
    paths = [path for path in paths if path.is_file()]
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()[:16] if paths else ""


def weight_files(folder: str) -> list[Path]:
    """The safetensors files of a folder, or of a model of the hub that lies in its cache, in order."""
    place = Path(folder)
    if not place.is_dir():
        cached = try_to_load_from_cache(folder, "config.json")
        place = Path(cached).parent if isinstance(cached, str) else place
    return sorted(place.glob("*.safetensors"))


def first_line(error: Exception) -> str:
    """The message of a library's error, in one line."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def not_installed(error: ImportError) -> MetricUnavailable:
    """That a library is not installed, and how to install it."""
    return MetricUnavailable(f"{error.name or error} is not installed: pip install 'scfm[evaluate]'")
