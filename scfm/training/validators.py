"""What must hold of the settings of a distillation."""

from collections.abc import Callable
from typing import Any

from scfm.method.distill import is_int
from scfm.models.loading import DTYPES
from scfm.models.quantize import KINDS, is_known


def refuse_for_shard(config: Any) -> None:
    """ValueError for what cannot be done with a base that several processes share."""
    reasons = {
        "quantize": "a base in fewer bits is not shared: take one of the two",
        "blocks_to_swap": "each process holds its slices on its GPU: take one of the two",
        "prompts": "the teacher that generates is whole in every process: make the images first, with "
        "scfm data, and say --train_data_dir",
        "compile_blocks": "compiled blocks are not shared: leave it out",
        "non_shortcut_ratio": "a process whose examples are all of flow matching would call the base less "
        "often than the others, which would wait for it: take 0",
    }
    named = [name for name in reasons if getattr(config, name)]
    if named:
        raise ValueError(f"{named[0]}={getattr(config, named[0])!r} with shard: {reasons[named[0]]}")
    if config.guidance_mode == "distilled":
        raise ValueError(
            "guidance_mode distilled with shard: the teacher is called apart, for some processes and not for "
            "others, which would wait for it: take --guidance_mode kept"
        )


def at_least(least: int, *names: str) -> list[tuple[str, Callable[[Any], bool], str]]:
    """Validators of whole numbers."""
    return [
        (n, lambda c, n=n: is_int(getattr(c, n), least), f"a whole number of at least {least}") for n in names
    ]


# (field, what must hold, the mend), as in `scfm.method.distill.VALIDATORS`
DISTILL_VALIDATORS = [
    *at_least(
        1,
        "height",
        "width",
        "num_frames",
        "max_sequence_length",
        "rank",
        "teacher_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "num_eval_prompts",
    ),
    *at_least(0, "lora_alpha", "micro_batch_size", "validation_steps", "checkpoint_blocks", "blocks_to_swap"),
    (
        "checkpoint_blocks",
        lambda c: c.gradient_checkpointing or not c.checkpoint_blocks,
        "0 without --gradient_checkpointing",
    ),
    (
        "guidance_scale_range",
        lambda c: len(c.guidance_scale_range) == 2 and c.guidance_scale_range[0] <= c.guidance_scale_range[1],
        "a range, low,high",
    ),
    ("guidance_mode", lambda c: c.guidance_mode in ("kept", "distilled"), "kept or distilled"),
    ("dynamic_shift_prob", lambda c: 0 <= c.dynamic_shift_prob <= 1, "a share of the examples, in [0, 1]"),
    ("teacher_guidance_scale", lambda c: c.teacher_guidance_scale >= 0, "a guidance scale of at least 0"),
    (
        "eval_num_steps",
        lambda c: c.eval_num_steps and all(is_int(n, 1) for n in c.eval_num_steps),
        "step counts of 1 or more, as 3,4",
    ),
    (
        "inference_shift",
        lambda c: c.inference_shift > 0,
        "a number above 0; what training saw, 3 for image latents",
    ),
    (
        "eval_lora_scales",
        lambda c: c.eval_lora_scales and 0 < min(c.eval_lora_scales) <= max(c.eval_lora_scales) <= 4,
        "LoRA scales above 0 and up to 4, as .5,1",
    ),
    (
        "select_adapter",
        lambda c: c.select_adapter in ("best", *c.model_names),
        "best, student, ema_fast or ema_slow; with step_scaled best, student or ema",
    ),
    ("weight_dtype", lambda c: c.weight_dtype in DTYPES, " or ".join(DTYPES)),
    ("shard", lambda c: c.shard == 0 or is_int(c.shard, 2), "a number of processes, 2 or more; 0 for none"),
    ("quantize", lambda c: is_known(c.quantize), f"{KINDS}, or leave it out"),
    ("report_to", lambda c: c.report_to in ("tensorboard", "wandb", "none"), "tensorboard, wandb or none"),
]
