"""LoRA scales for students: one for each number of steps, or one for each step of a walk. Chosen without
data.
"""

from collections.abc import Callable, Sequence

import torch

from experiments.testbeds import Field, FieldAtScale, Walk
from scfm.method.flow import time_grid
from scfm.method.lora_scale import LoraScales, choose_lora_scales, endpoint_curve
from scfm.method.metrics import endpoint_distance
from scfm.method.scale_schedule import per_step_field

FAR = 1e6  # stands for a distance that is no finite number

Curve = dict[tuple[int, float], float]  # {(steps, scale): distance}


def finite(distance: float) -> float:
    """The distance; FAR for one of a student that has run away, which is inf, nan or close to it."""
    return distance if distance < FAR else FAR


def find_scales(
    walk: Walk,
    goal: torch.Tensor,
    field_at: FieldAtScale,
    steps: Sequence[int],
    scales: Sequence[float],
    shift: float = 1.0,
) -> LoraScales:
    """The scale for each number of steps at which the student's endpoints lie nearest to `goal`, the
    teacher's.
    """
    curve = endpoint_curve(lambda n, scale: walk(field_at(scale), n), goal, steps, scales)
    return choose_lora_scales({pair: finite(distance) for pair, distance in curve.items()}, shift)


def by_steps(scales: LoraScales) -> dict[int, float]:
    """The table of `LoraScales` as {steps: scale}."""
    return dict(zip(scales.steps, scales.scales, strict=True))


def scheduled_field(field_at: FieldAtScale, scales: Sequence[float], shift: float = 1.0) -> Field:
    """The field that has scales[k] at the k-th step of a walk of len(scales) steps."""
    return per_step_field(field_at, time_grid(len(scales), shift), scales)


def schedule_distance(
    walk: Walk, goal: torch.Tensor, field_at: FieldAtScale, shift: float = 1.0
) -> Callable[[Sequence[float]], float]:
    """distance(scales of the steps): how far from `goal` a walk with these scales ends."""

    def distance(scales: Sequence[float]) -> float:
        return finite(endpoint_distance(walk(scheduled_field(field_at, scales, shift), len(scales)), goal))

    return distance


def uniform_curve(
    distance: Callable[[Sequence[float]], float], steps: Sequence[int], scales: Sequence[float]
) -> Curve:
    """{(steps, scale): distance} of walks with one scale for all their steps."""
    return {(n, scale): distance((scale,) * n) for n in steps for scale in scales}
