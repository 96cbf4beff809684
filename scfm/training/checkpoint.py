"""Checkpoints that are whole or not there."""

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(output_dir: str | Path, step: int, state: dict[str, Any], limit: int = 2) -> Path:
    """Writes `state` (tensors, numbers, strings in dicts and lists) as output_dir/checkpoints/STEP; keeps the
    newest `limit`.

    Whole or not at all: it is written and flushed under another name, then renamed, and only then are older
    ones removed, so a kill or a full disk costs the new checkpoint at most. OSError that names the last
    good one when it cannot be written.
    """
    folder = Path(output_dir) / "checkpoints"
    new, final = folder / f".new-{uuid.uuid4().hex[:8]}", folder / f"{step:06d}"
    if final.exists():  # the same step of the same run: the same state (`set_aside` has seen to later ones)
        return final
    try:
        new.mkdir(parents=True)
        with open(new / "state.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        new.rename(final)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        left = f"; {free_space(folder)}" if isinstance(error, RuntimeError) else ""  # which does not say so
        shutil.rmtree(new, ignore_errors=True)
        raise OSError(
            f"the checkpoint of step {step} could not be written ({error}{left}); the last good one is "
            f"{latest(output_dir) or 'none'}"
        ) from error
    for old in all_checkpoints(output_dir)[:-limit]:
        shutil.rmtree(old)
    return final


def free_space(folder: Path) -> str:
    """How much the disk of a folder still takes, in words."""
    return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB of the disk are free"


def set_aside(output_dir: str | Path, step: int) -> list[Path]:
    """Renames the run's own checkpoints beyond `step`, of which a run that goes back to it makes others;
    returns the new names."""
    moved = []
    for path in all_checkpoints(output_dir):
        if int(path.name) > step:
            moved.append(path.rename(path.with_name(f"set-aside-{path.name}-{uuid.uuid4().hex[:8]}")))
    return moved


def all_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoint folders of a run, oldest first."""
    return sorted((Path(output_dir) / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))


def latest(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint folder, or None."""
    checkpoints = all_checkpoints(output_dir)
    return checkpoints[-1] if checkpoints else None


def load_checkpoint(folder: str | Path) -> dict[str, Any]:
    """What `save_checkpoint` was given, on the CPU. Reads tensors and numbers, never code.

    FileNotFoundError when there is no checkpoint, ValueError when the file is not whole.
    """
    path = Path(folder) / "state.pt"
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint in {folder}: it has no {path.name}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        reason = f"is damaged ({str(error).split('.')[0]})"
        raise ValueError(f"{path} {reason}: delete its folder to go on from the one before") from None


def find_checkpoint(output_dir: str | Path, resume: str = "auto") -> Path | None:
    """The checkpoint folder from which a run in `output_dir` goes on, or None for a fresh start.

    resume: "auto" (the newest, if there is one), "never" (ValueError when there is one), or a checkpoint's
    folder.
    """
    newest = latest(output_dir)
    if resume == "auto":
        return newest
    if resume == "never":
        if newest:
            raise ValueError(
                f"{output_dir} has checkpoints, up to {newest.name}: take another "
                f"--output_dir, or "
                "--resume_from_checkpoint auto"
            )
        return None
    if not (Path(resume) / "state.pt").is_file():
        raise FileNotFoundError(
            f"no checkpoint at {resume}: say --resume_from_checkpoint auto, never, or "
            f"a folder such as "
            f"{output_dir}/checkpoints/000200"
        )
    return Path(resume)


def refuse_fewer_steps(checkpoint: Path | None, last_step: int) -> None:
    """ValueError when a checkpoint lies beyond the last step of a run, before the run's folder is changed."""
    if checkpoint and checkpoint.name.isdigit() and int(checkpoint.name) > last_step:
        raise ValueError(f"max_train_steps={last_step}: the checkpoint is at {int(checkpoint.name)} already")
