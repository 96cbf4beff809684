"""Checkpoints that are whole or not there."""
import os
import shutil
from pathlib import Path

import torch


def save_checkpoint(out, update, state, keep=2):
    """Writes `state` (tensors, numbers, strings in dicts and lists) as out/checkpoints/UPDATE; removes all but the newest `keep`.

    Whole or not at all: it is written and flushed under another name, then renamed, and only then are older ones removed, so
    a kill or a full disk costs the new checkpoint at most. OSError that names the last good one when it cannot be written.
    """
    folder = Path(out) / "checkpoints"
    new, final = folder / "new", folder / f"{update:06d}"
    if final.exists():                                # the same update of the same run: the same state
        return final
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        with open(new / "state.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        new.rename(final)
    except (OSError, RuntimeError) as error:          # torch's writer turns a full disk into a RuntimeError
        shutil.rmtree(new, ignore_errors=True)
        raise OSError(f"the checkpoint of update {update} could not be written ({error}); the last good one is "
                      f"{latest(out) or 'none'}") from error
    for old in all_checkpoints(out)[:-keep]:
        shutil.rmtree(old)
    return final


def all_checkpoints(out):
    """The complete checkpoint folders of a run, oldest first."""
    return sorted((Path(out) / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))


def latest(out):
    """The newest complete checkpoint folder, or None."""
    found = all_checkpoints(out)
    return found[-1] if found else None


def load_checkpoint(folder):
    """What `save_checkpoint` was given, on the CPU. Reads tensors and numbers, never code.

    FileNotFoundError when there is no checkpoint, ValueError when the file is not whole.
    """
    path = Path(folder) / "state.pt"
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint in {folder}: it has no {path.name}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                        # torch raises half a dozen kinds for a damaged file
        raise ValueError(f"{path} is damaged ({str(error).split('.')[0]}): delete its folder to go on from the one before") from None


def find_checkpoint(out, resume="auto"):
    """The checkpoint folder from which a run in `out` goes on, or None for a fresh start.

    resume: "auto" (the newest, if there is one), "never" (ValueError when there is one), or a checkpoint's folder.
    """
    if resume == "auto":
        return latest(out)
    if resume == "never":
        if latest(out):
            raise ValueError(f"{out} has checkpoints, up to {latest(out).name}: take another --output_dir, or --resume_from_checkpoint auto")
        return None
    if not (Path(resume) / "state.pt").is_file():
        raise FileNotFoundError(f"no checkpoint at {resume}: say --resume_from_checkpoint auto, never, or a folder such as {out}/checkpoints/000200")
    return Path(resume)
