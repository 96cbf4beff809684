"""Which metrics an evaluation has: those whose weights are there, and why the others are missing."""

from collections.abc import Callable

import torch

from scfm.evaluation.composition import CompositionMetric
from scfm.evaluation.image_metrics import (
    CLIPMetric,
    CustomMetric,
    ImageMetric,
    InceptionMetric,
    MetricUnavailable,
    PatchInceptionMetric,
    PreferenceMetric,
)
from scfm.evaluation.imagenet_features import NAME, ImageNetMetric


def find_metrics(
    custom_metric: str,
    inception: str,
    clip: str,
    device: str | torch.device = "cpu",
    imagenet: str = "",
    preference: str = "",
    composition: str = "",
    patch_size: tuple[int, int] | None = None,
) -> tuple[list[ImageMetric], dict[str, str]]:
    """(metrics, {name: why it is missing}), by the settings of that name; "none" leaves one out.

    preference, composition: folders of models, or names on the hub; empty: not wanted, so not missing
    patch_size: (H, W) of the images, where patch FID is wanted
    """
    metrics: list[ImageMetric] = [CustomMetric(custom_metric)] if custom_metric else []
    missing: dict[str, str] = {}
    wanted: list[tuple[str, Callable[[], ImageMetric], str]] = [
        (NAME, lambda: ImageNetMetric(device), imagenet),
        ("Inception (FID)", lambda: InceptionMetric(inception, device), inception),
        ("CLIP score", lambda: CLIPMetric(clip, device), clip),
    ]
    if patch_size is not None:
        size = patch_size
        wanted.append(("patch FID", lambda: PatchInceptionMetric(inception, device, size), inception))
    if preference:
        wanted.append(("preference", lambda: PreferenceMetric(preference, device), preference))
    if composition:
        wanted.append(("composition", lambda: CompositionMetric(composition, device), composition))
    for name, make, place in wanted:
        if place == "none":
            missing[name] = "left out by the settings"
            continue
        try:
            metrics.append(make())
        except MetricUnavailable as reason:
            missing[name] = str(reason)
    return metrics, missing
