"""What the metrics say of all samplers' images, beside each other."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tqdm import tqdm

from scfm.data.animation import motion_of
from scfm.data.images import in_threads
from scfm.evaluation.feature_distances import FeatureSet, compare_sets, floor_of, frechet
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
) -> dict[str, Any]:
    """Adds to each row what each metric says of its images: scores, Frechet distances, and how the sets of
    images lie in each other (`compare_sets`). Returns what the reference's own halves are to each other:
    {name of a metric: `floor_of`}.

    rows: the teacher's first
    reference: image files that all are compared with
    size: (H, W) to which these are cut
    """
    floors = {}
    with tqdm(total=len(metrics) * len(rows), desc="measuring", disable=not progress) as bar:
        for metric in metrics:
            fixed = None
            if reference and metric.distance:
                fixed = metric.measure(image_batches(reference, size=size)).features
            if fixed is not None and (floor := floor_of(fixed)):
                floors[metric.name] = floor
            compare = Comparison(metric, fixed)
            for row in rows:
                paths = [image_path(out / row["name"], number) for number in range(len(captions))]
                features, scores = metric.measure(image_batches(paths, captions))
                row.setdefault("scores", {}).update(scores)
                if features is not None:
                    compare.add_to(row, features)
                bar.update(1)
    return floors


def measure_motion(rows: Sequence[Row], out: Path, count: int) -> None:
    """Adds to each row how much its videos move, a mean over `count` of them: a student whose videos stand
    still lies near the teacher's in every single frame."""
    for row in rows:
        paths = [image_path(out / row["name"], number) for number in range(count)]
        row["motion"] = statistics.fmean(in_threads(motion_of, paths))


class Comparison:
    """Features of one metric, compared with the teacher's, which come first, and with a reference's."""

    def __init__(self, metric: ImageMetric, reference: torch.Tensor | None) -> None:
        self.metric, self.reference = metric, reference
        self.reference_set = None if reference is None else FeatureSet(reference)
        self.teacher: torch.Tensor | None = None
        self.teacher_set: FeatureSet | None = None

    def add_to(self, row: Row, features: torch.Tensor) -> None:
        """Adds to a row its distances, where the metric has a name for them. features: (n, D)"""
        if not self.metric.distance:
            return
        found = FeatureSet(features)
        if self.teacher is None:
            self.teacher, self.teacher_set = features, found
        distances = distances_of(features, self.teacher, self.reference)
        row.setdefault("distances", {})[self.metric.distance] = distances
        row.setdefault("sets", {})[self.metric.name] = {
            "teacher": compare_sets(found, self.teacher_set, paired=True),
            "reference": compare_sets(found, self.reference_set),
        }


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
