"""What the metrics say of all samplers' images, beside each other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tqdm import tqdm

from scfm.evaluation.feature_distances import compare_sets, frechet
from scfm.evaluation.image_metrics import ImageMetric
from scfm.evaluation.image_store import image_batches, image_path

Row: TypeAlias = dict[str, Any]
"""What is known of one sampler, as JSON holds it."""


def measure(
    rows: Sequence[Row],
    out: Path,
    captions: Sequence[str],
    metrics: Sequence[ImageMetric],
    reference: Sequence[Path],
    size: tuple[int, int],
    progress: bool = True,
) -> None:
    """Adds to each row what each metric says of its images: scores, Frechet distances, and how the sets of
    images lie in each other (`compare_sets`).

    rows: the teacher's first
    reference: image files that all are compared with
    size: (H, W) to which these are cut
    """
    with tqdm(total=len(metrics) * len(rows), desc="measuring", disable=not progress) as bar:
        for metric in metrics:
            fixed = None
            if reference and metric.distance:
                fixed = metric.measure(image_batches(reference, size=size)).features
            teacher = None
            for row in rows:
                paths = [image_path(out / row["name"], number) for number in range(len(captions))]
                features, scores = metric.measure(image_batches(paths, captions))
                row.setdefault("scores", {}).update(scores)
                if metric.distance and features is not None:
                    teacher = features if teacher is None else teacher
                    distances = distances_of(features, teacher, fixed)
                    row.setdefault("distances", {})[metric.distance] = distances
                    row.setdefault("sets", {})[metric.name] = {
                        "teacher": compare_sets(features, teacher, paired=True),
                        "reference": compare_sets(features, fixed),
                    }
                bar.update(1)


def distances_of(
    features: torch.Tensor, teacher: torch.Tensor, reference: torch.Tensor | None
) -> dict[str, float | None]:
    """Frechet distances of a sampler's images to the teacher's and to a reference; None where there is none.

    "difference" is |the distance to the reference - the teacher's distance to it|, the |dFID| of the paper.
    """
    to_reference = frechet(features, reference)
    if features is teacher:
        return {"teacher": None, "reference": to_reference, "difference": None}
    own = frechet(teacher, reference)
    difference = None if to_reference is None or own is None else abs(to_reference - own)
    return {"teacher": frechet(features, teacher), "reference": to_reference, "difference": difference}
