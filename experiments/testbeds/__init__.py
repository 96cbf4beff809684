"""Where flows are distilled and judged: the plane, the tiny Flux of toy/, CIFAR-10. All have the interface
`Testbed`.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch

from experiments.runner import Job

Field = Callable[..., torch.Tensor]  # (x (B, ...), t (B,), cond) -> velocity (B, ...)
FieldAtScale = Callable[[float], Field]  # a student's field at a LoRA scale, or at its like for full weights
Walk = Callable[[Field, int], torch.Tensor]  # (field, steps) -> the points reached, (n, ...)
BatchOf = Callable[[torch.Generator, int], Any]  # (generator, examples) -> data, or (data, cond)


@runtime_checkable
class Testbed(Protocol):
    """A teacher, the data that its students are trained on, and what judges them: the same for every method.

    shift: at which samples are drawn.
    """

    shift: float

    def teacher(self, job: Job) -> tuple[Any, Any]:
        """What students start from, and what cells know it by."""

    def batches(self, job: Job) -> Any:
        """What a training draws its examples from: a `BatchOf`, or the labelled images themselves."""

    def search(self, job: Job, teacher: Field) -> tuple[Walk, torch.Tensor]:
        """A walk from noises that no judge sees, and where the teacher's many steps take them: to choose
        scales on.
        """

    def judge(self, job: Job) -> Callable[..., dict[str, float]]:
        """measure(field, steps) -> {metric: number}: noises and reference are the same for all methods."""
