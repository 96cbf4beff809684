"""FID, CLIP score and other metrics of images, and why one is unavailable."""
import importlib
import io
import os
import pickle
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from scfm.method.metrics import frechet_distance
from scfm.models.loading import no_loading_bars


class ImageMetric(NamedTuple):
    """Something that looks at images. name: its own; distance: what a Frechet distance on its features is called, or None.

    look(batches) -> (features (n, D) or None, {name of a score: mean}); batches yields (images (b, 3, H, W) uint8, captions
    or None). Where there are no captions, scores of captions are left out.
    """
    name: str
    distance: str
    look: object


class MetricUnavailable(Exception):
    """Weights that could not be loaded, in one line that says why."""


def frechet(features, others):
    """`frechet_distance`, or None where one of the two is missing or has fewer than 2 rows."""
    if features is None or others is None or min(len(features), len(others)) < 2:
        return None
    return frechet_distance(features, others)


def first_line(error):
    """What a library said, in one line."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def inception(path="", device="cpu"):
    """The `ImageMetric` of FID: the 2048 features of the Inception network that FID was defined with, by torch-fidelity and torchmetrics.

    path: its weights, a state dict as .safetensors or .pth (read without unpickling code); empty: downloaded once by
    torch.hub. Raises `MetricUnavailable`.
    """
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3
        state = inception_state(path)
        buffer = io.BytesIO()               # torch-fidelity unpickles whatever it is given: so it gets what we have just written
        torch.save(state, buffer)
        buffer.seek(0)
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], buffer).to(device)
    except ImportError as error:
        raise MetricUnavailable(f"{error.name or error} is not installed: pip install 'scfm[evaluate]'") from None
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        raise MetricUnavailable(f"Inception's weights could not be loaded from {path or 'the hub'} ({first_line(error)})") from None

    @torch.no_grad()
    def look(batches):
        return torch.cat([network(images.to(device)).cpu() for images, _ in batches]), {}
    return ImageMetric("Inception", "FID", look)


def inception_state(path):
    """The state dict in a file, or torch-fidelity's own from the hub (kept in torch's cache)."""
    if not path:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        cached = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") and not cached.is_file():
            raise OSError("HF_HUB_OFFLINE is set and they are not in torch's cache; name a file with --inception")
        return torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, progress=False, map_location="cpu", weights_only=True)
    if str(path).endswith(".safetensors"):
        return load_file(str(path))
    return torch.load(path, map_location="cpu", weights_only=True)


def clip(name, device="cpu"):
    """The `ImageMetric` of the CLIP score, 100 cos(image, caption), by torchmetrics. name: folder, or hub name. Raises `MetricUnavailable`."""
    try:
        from torchmetrics.multimodal import CLIPScore
        from transformers import CLIPModel, CLIPProcessor
        with no_loading_bars():
            model = CLIPModel.from_pretrained(name, use_safetensors=True).to(device)
            processor = CLIPProcessor.from_pretrained(name)
        metric = CLIPScore(lambda: (CLIPEncoders(model), TruncatingProcessor(processor, model))).to(device)
    except ImportError as error:
        raise MetricUnavailable(f"{error.name or error} is not installed: pip install 'scfm[evaluate]'") from None
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise MetricUnavailable(f"CLIP could not be loaded from {name} ({first_line(error)})") from None

    @torch.no_grad()
    def look(batches):
        metric.reset()
        for images, captions in batches:
            metric.update(images.to(device), list(captions))
        return None, {"CLIP score": metric.compute().item()}
    return ImageMetric("CLIP", None, look)


class CLIPEncoders(torch.nn.Module):
    """A CLIPModel whose two towers give plain tensors: transformers 5 wraps them, torchmetrics 1.9 expects them plain."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, *inputs):
        return plain(self.model.get_image_features(*inputs))

    def get_text_features(self, *inputs):
        return plain(self.model.get_text_features(*inputs))


def plain(out):
    return out if isinstance(out, torch.Tensor) else out.pooler_output


class TruncatingProcessor:
    """A CLIPProcessor that cuts long captions before their end mark; torchmetrics would cut the mark off."""

    def __init__(self, processor, model):
        self.processor, self.longest = processor, model.config.text_config.max_position_embeddings

    def __call__(self, **inputs):
        if "text" in inputs:
            inputs |= {"truncation": True, "max_length": self.longest}
        return self.processor(**inputs)


def custom_metric(where):
    """The `ImageMetric` of a function of yours, `module:name`: name(images (b, 3, H, W) in [-1, 1], captions or None) ->
    (features (b, D) or None, {score: (b,) numbers, nan where there is none}). ValueError when there is no such function."""
    module, _, name = where.partition(":")
    try:
        judge = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--custom_metric {where}: no such function ({error}); say module:function") from None

    @torch.no_grad()
    def look(batches):
        said = [judge(images.float() / 127.5 - 1, captions) for images, captions in batches]
        names = said[0][1] if said else ()
        scores = {k: torch.cat([scores[k].double() for _, scores in said]).nanmean().item() for k in names}
        return (None if said[0][0] is None else torch.cat([features for features, _ in said])), scores
    return ImageMetric(where, f"Frechet distance on {where}", look)


def find_metrics(config, device="cpu"):
    """([ImageMetric], {name: why it is missing}) of a config with `inception`, `clip` and `judge`; "none" leaves one out."""
    eyes, missing = [custom_metric(config.custom_metric)] if config.custom_metric else [], {}
    for name, make, place in (("Inception (FID)", inception, config.inception), ("CLIP score", clip, config.clip)):
        try:
            if place == "none":
                raise MetricUnavailable("left out, as asked")
            eyes.append(make(place, device))
        except MetricUnavailable as reason:
            missing[name] = str(reason)
    return eyes, missing
