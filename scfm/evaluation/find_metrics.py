"""Which metrics an evaluation has: those whose weights are there, and why the others are missing."""

import torch

from scfm.evaluation.image_metrics import (
    CLIPMetric,
    CustomMetric,
    ImageMetric,
    InceptionMetric,
    MetricUnavailable,
)
from scfm.evaluation.imagenet_features import NAME, ImageNetMetric


def find_metrics(
    custom_metric: str, inception: str, clip: str, device: str | torch.device = "cpu", imagenet: str = ""
) -> tuple[list[ImageMetric], dict[str, str]]:
    """(metrics, {name: why it is missing}), by the settings of that name; "none" leaves one out."""
    metrics: list[ImageMetric] = [CustomMetric(custom_metric)] if custom_metric else []
    missing: dict[str, str] = {}
    for name, make, place in (
        (NAME, lambda: ImageNetMetric(device), imagenet),
        ("Inception (FID)", lambda: InceptionMetric(inception, device), inception),
        ("CLIP score", lambda: CLIPMetric(clip, device), clip),
    ):
        if place == "none":
            missing[name] = "left out by the settings"
            continue
        try:
            metrics.append(make())
        except MetricUnavailable as reason:
            missing[name] = str(reason)
    return metrics, missing
