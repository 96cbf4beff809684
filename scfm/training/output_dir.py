"""The folder of a run, which remembers its settings and what they were applied to."""

import json
from pathlib import Path
from typing import Any

from scfm.files import atomic_write
from scfm.training.config import as_json
from scfm.training.environment import environment_info

# What may differ between the runs that share a folder: nothing that changes a step that has been made.
# Paths are compared by what lies there (inputs.json), not by how they are written.
PATHS = ("pretrained_model_name_or_path", "prompts", "train_data_dir", "cache_dir", "output_dir", "teacher")
OURS = ("images", "cache", "logs")  # what may lie in a run's folder before its config.json
HARMLESS = (  # of these, what changes neither the weights nor what is compared at the end
    "output_dir",
    "cache_dir",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "validation_steps",
    "micro_batch_size",
    "blocks_to_swap",
    "shard",
    "report_to",
)
RESUMABLE = (
    *HARMLESS,
    "pretrained_model_name_or_path",
    "prompts",
    "train_data_dir",
    "max_train_steps",
    "num_eval_prompts",
    "eval_lora_scales",
    "eval_num_steps",
    "select_adapter",
)


def load_saved_config(folder: str | Path, config_class: type) -> dict[str, Any] | None:
    """The settings in a folder's config.json, with the defaults of the dataclass for those it lacks; None
    without one."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    return {**as_json(config_class()), **json.loads(path.read_text(encoding="utf-8"))}


def with_full_paths(config: Any) -> dict[str, Any]:
    """The settings as they are saved: the paths that exist here in full, so that they mean the same from any
    folder."""
    settings = as_json(config)
    for name in PATHS:
        value = settings.get(name)
        if value and Path(value).exists():
            settings[name] = str(Path(value).resolve())
    return settings


def init_output_dir(folder: str | Path, config: Any, inputs: dict[str, str] | None = None) -> None:
    """Makes the run's folder with config.json, run.json and inputs.json.

    ValueError when it was begun with other settings or other inputs.
    Settings that an
    older run did not know yet count as their defaults. `max_train_steps` may change while the learning rate
    is constant.
    inputs: fingerprints of what the settings name (transformer, data).
    """
    folder, new, old = Path(folder), with_full_paths(config), load_saved_config(folder, type(config))
    if old:
        refuse_other_settings(folder, config, old, new)
        refuse_other_inputs(folder, inputs or {})
    for name, record in (
        ("config.json", new),
        ("run.json", environment_info()),
        ("inputs.json", inputs or {}),
    ):
        text = json.dumps(record, indent=1)
        atomic_write(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))


def refuse_strangers(folder: Path) -> None:
    """ValueError when a folder without a run's config.json holds files: they may be somebody's."""
    if not folder.is_dir() or (folder / "config.json").is_file():
        return
    strangers = [path.name for path in folder.glob("*") if path.name not in OURS and path.name[0] != "."]
    if strangers:
        names = ", ".join(sorted(strangers)[:3])
        raise ValueError(f"{folder} holds {names}, but no config.json of a run: take a folder of its own")


def refuse_other_settings(folder: Path, config: Any, old: dict[str, Any], new: dict[str, Any]) -> None:
    """ValueError when a setting that changes a step that has been made differs; old and new values are
    shown."""
    falls = config.lr_scheduler != "constant"
    fixed = [k for k in new if k not in RESUMABLE or (k == "max_train_steps" and falls)]
    changed = [k for k in fixed if new[k] != old[k]]
    if changed == ["max_train_steps"]:
        raise ValueError(
            f"{folder} is of a run of {old['max_train_steps']} steps, over which its learning rate falls "
            f"({config.lr_scheduler}): it cannot go on; take another --output_dir, and "
            "--lr_scheduler constant to keep that door open"
        )
    if changed:
        values = "; ".join(f"{k} {old[k]!r} before, {new[k]!r} now" for k in changed[:3])
        raise ValueError(
            f"{folder} is of a run with another {', '.join(changed)} ({values}): take another --output_dir"
        )


def refuse_other_inputs(folder: Path, inputs: dict[str, str]) -> None:
    """ValueError when a file that the settings name is not what it was when the run began."""
    path = folder / "inputs.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    changed = [name for name, mark in inputs.items() if old.get(name, mark) != mark]
    if changed:
        raise ValueError(
            f"{folder} is of a run with another {', '.join(changed)}: what the settings name was changed "
            f"since it began; "
            "put it back, or take another --output_dir"
        )
