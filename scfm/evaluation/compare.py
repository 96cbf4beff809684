"""One prompt by the student and by its teacher from the same noise: images, and what each of them costs."""

import copy
import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from scfm.data.caption_length import fewer_remarks
from scfm.data.prompts import is_text
from scfm.evaluation.latency import synchronized_time, watched
from scfm.inference.step_lora import Scales, StepLora, fixed_shift, generate

TEACHER_STEPS = 32  # of the image that the others are compared with
MOST_STEPS = 32
REMEMBERED = 64  # images of the teacher: they do not change with the LoRA scale
SEEDS = 2**31


class Choice(NamedTuple):
    """What an image is made with.

    prompt: the caption
    steps: Euler steps of the student, and of the teacher beside it
    scale: the LoRA scale; None: what the LoRA's file says for so many steps
    shift: the time shift of the sampling grid
    seed: of the noise
    """

    prompt: str
    steps: int = 4
    scale: float | None = None
    shift: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """ValueError for what cannot be sampled."""
        if not self.prompt.strip() or not is_text(self.prompt):
            raise ValueError("the prompt is empty: write what the image shall show")
        if not (isinstance(self.steps, int) and 1 <= self.steps <= MOST_STEPS):
            raise ValueError(f"steps is {self.steps}: give 1 to {MOST_STEPS}")
        if self.scale is not None and not math.isfinite(self.scale):
            raise ValueError(f"the LoRA scale is {self.scale}: give a number, 0 is the teacher")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift is {self.shift}: give a number above 0")
        if not (isinstance(self.seed, int) and 0 <= self.seed < SEEDS):
            raise ValueError(f"seed is {self.seed}: give a whole number from 0 on, below {SEEDS}")


class Sampled(NamedTuple):
    """An image and what it cost.

    image: (3, height, width) in [-1, 1], on the CPU, or a video (F, 3, height, width)
    steps: Euler steps
    scales: the LoRA scale of each
    seconds: from prompt to pixels
    evaluations: of the network, counted as they happened; guided by a second one, a step takes 2
    """

    image: torch.Tensor
    steps: int
    scales: Scales
    seconds: float
    evaluations: int


class Comparison(NamedTuple):
    """Images from one noise: the student's, the teacher's in as many steps, the teacher's in many."""

    student: Sampled
    teacher: Sampled
    target: Sampled


class Comparer:
    """Samples a prompt with a step LoRA, and with its teacher, whose images it remembers.

    teacher_steps: of the image that the others are compared with
    """

    def __init__(self, step_lora: StepLora, teacher_steps: int = TEACHER_STEPS) -> None:
        self.step_lora, self.teacher_steps = step_lora, teacher_steps
        self.remembered: OrderedDict[Choice, Sampled] = OrderedDict()

    def student(self, choice: Choice) -> Sampled:
        """The student's image, the one that `scfm sample` writes. ValueError for what cannot be sampled."""
        choice.check()
        return self.sample(choice, self.step_lora.config.guidance_scale)

    def teacher(self, choice: Choice) -> Sampled:
        """The teacher's image in as many steps, at its own guidance scale: the LoRA at scale 0."""
        choice.check()
        return self.teacher_at(choice, choice.steps)

    def target(self, choice: Choice) -> Sampled:
        """The teacher's image in `teacher_steps` steps."""
        choice.check()
        return self.teacher_at(choice, self.teacher_steps)

    def compare(self, choice: Choice) -> Comparison:
        """All three. ValueError for what cannot be sampled."""
        return Comparison(self.student(choice), self.teacher(choice), self.target(choice))

    def teacher_at(self, choice: Choice, steps: int) -> Sampled:
        """The teacher's image in so many steps, made or remembered."""
        key = choice._replace(steps=steps, scale=0.0)
        if key not in self.remembered:
            self.remembered[key] = self.sample(key, self.step_lora.config.teacher_guidance_scale)
            if len(self.remembered) > REMEMBERED:
                self.remembered.popitem(last=False)
        self.remembered.move_to_end(key)
        return self.remembered[key]

    def sample(self, choice: Choice, guidance: float) -> Sampled:
        """An image at a guidance scale, timed and counted."""
        step_lora, device = self.step_lora, self.step_lora.pipe.device
        network = step_lora.pipe.transformer
        with changed(step_lora, choice, guidance), watched(network, device) as watch, fewer_remarks():
            start = synchronized_time(device)
            images, scales = generate(step_lora, [choice.prompt], choice.steps, choice.scale)
            seconds = synchronized_time(device) - start
        return Sampled(images[0].float(), choice.steps, scales, seconds, watch.evaluations)


@contextmanager
def changed(step_lora: StepLora, choice: Choice, guidance: float) -> Iterator[None]:
    """Within the block a step LoRA samples with the seed and the shift of a choice, and at this guidance."""
    config, scheduler = step_lora.config, step_lora.pipe.scheduler
    step_lora.config = copy.copy(config)
    step_lora.config.seed, step_lora.config.guidance_scale = choice.seed, guidance
    step_lora.pipe.scheduler = fixed_shift(choice.shift)
    try:
        yield
    finally:
        step_lora.config, step_lora.pipe.scheduler = config, scheduler


def pixel_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square difference of two images (3, H, W) in [-1, 1], or videos, where 1 is black against
    white."""
    return float(((a - b) / 2).square().mean().sqrt())
