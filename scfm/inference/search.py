"""The LoRA scale for each number of steps, or for each step, at which a LoRA's endpoints lie nearest to its
teacher's."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from tqdm import tqdm

from scfm.inference.step_lora import Scales, StepLora
from scfm.method.lora_scale import LoraScales, choose_lora_scales, endpoint_curve
from scfm.method.metrics import endpoint_distance
from scfm.method.scale_schedule import ScaleSchedule, search_per_step

Curve: TypeAlias = dict[tuple[int, float], float]
"""{(steps, LoRA scale): distance}, as from `scfm.method.lora_scale.endpoint_curve`."""

STEPS = (1, 2, 3, 4, 8, 16)
SCALES = tuple(i / 4 for i in range(9))
SCHEDULE_STEPS = (2, 3, 4, 8)
LEAST_SCALE = 0.001  # of a step where the guidance is in the LoRA: at 0 it would be gone


def search_lora_scales(
    step_lora: StepLora,
    captions: Sequence[str],
    steps: Sequence[int] = STEPS,
    scales: Sequence[float] = SCALES,
    target_steps: int = 64,
    seed: int = 1,
    progress: bool = True,
) -> tuple[LoraScales, Curve]:
    """(LoRA scales, curve) of a LoRA on captions, one noise for each.

    steps, scales: step counts of the result, and LoRA scales to choose from
    target_steps: steps of the teacher's own path to the endpoints that are compared with

    ValueError where nothing but 0 is to be tried, and 0 is no choice.
    """
    if step_lora.config.guidance_inside and not any(scales):
        raise ValueError("at LoRA scale 0 this LoRA has no guidance: give --lora_scales above 0")
    noise, target = step_lora.target_endpoints(captions, target_steps, seed)
    with tqdm(total=len(steps) * len(scales), desc="searching LoRA scales", disable=not progress) as bar:

        def endpoints(n: int, scale: float) -> torch.Tensor:
            bar.update(1)
            return step_lora.endpoints(captions, noise, n, scale)

        curve = endpoint_curve(endpoints, target, steps, scales)
    config = step_lora.config
    # where the guidance is in the LoRA, scale 0 has none: it is shown, but is no choice
    choices = {pair: distance for pair, distance in curve.items() if pair[1] or not config.guidance_inside}
    chosen, before = choose_lora_scales(choices, config.inference_shift), step_lora.lora_scales
    if before:  # what belongs together stays so
        chosen = chosen._replace(order=before.order, lowest=before.lowest, guidance=before.guidance)
    return chosen, curve


def search_schedules(
    step_lora: StepLora,
    captions: Sequence[str],
    lora_scales: LoraScales,
    steps: Sequence[int] = SCHEDULE_STEPS,
    target_steps: int = 64,
    seed: int = 1,
    progress: bool = True,
) -> dict[int, ScaleSchedule]:
    """{steps: a LoRA scale for each step}, by `search_per_step`, which starts from that of `lora_scales`.

    Captions, targets and noises are those of `search_lora_scales` with the same arguments. Each step count
    takes some 30 paths.
    """
    noise, target = step_lora.target_endpoints(captions, target_steps, seed)
    with tqdm(desc="searching a scale for each step", unit="path", disable=not (progress and steps)) as bar:

        def allowed(scales: Scales) -> Scales:
            return tuple(max(scale, least) for scale in scales)

        def distance(scales: Scales) -> float:
            bar.update(1)
            reached = step_lora.endpoints(captions, noise, len(scales), allowed(scales))
            return endpoint_distance(reached, target)

        least = LEAST_SCALE if step_lora.config.guidance_inside else 0.0
        found = {n: search_per_step(distance, n, lora_scales.scale(n)) for n in steps}
        return {n: schedule._replace(scales=allowed(schedule.scales)) for n, schedule in found.items()}
