"""Today's names, and the words in which cells and trainings are stored.

A cell is found by a hash of what determines it, written in these words. They stay as they were when the first
cells were measured, so that no renaming in the library orphans a measurement.
"""

from typing import Any

# the name in today's code -> the word in the cells
STORED_WORDS = {
    "max_train_steps": "updates",
    "global_batch_size": "batch",
    "learning_rate": "lr",
    "lr_scheduler": "schedule",
    "lr_warmup_steps": "warmup",
    "adam_weight_decay": "weight_decay",
    "max_grad_norm": "clip",
    "teacher_ratio": "teacher_share",
    "teacher_ratio_end": "share_to",
    "non_shortcut_ratio": "flow_share",
    "ema_decay_fast": "fast_decay",
    "ema_decay_slow": "slow_decay",
    "ema_target_scale": "speaker_scale",
    "ema_fast": "fast",
    "ema_slow": "slow",
    "weight_dtype": "precision",
    "checkpointing_steps": "checkpoint_every",
    "images": "pictures",
}
TODAYS_NAMES = {word: name for name, word in STORED_WORDS.items()}


def to_stored(value: Any) -> Any:
    """A value with today's names, as keys or as strings, in the words of the cells."""
    return _translate(value, STORED_WORDS)


def from_stored(value: Any) -> Any:
    """The reverse of `to_stored`."""
    return _translate(value, TODAYS_NAMES)


def _translate(value: Any, words: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {words.get(key, key): _translate(part, words) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_translate(part, words) for part in value)
    return words.get(value, value) if isinstance(value, str) else value
