"""What a result depends on beside its settings."""

import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import scfm


def environment_info() -> dict[str, Any]:
    """What a run depends on beside its settings: versions, machine, and the commit when the code is a
    checkout of its own."""
    record: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    for name in ("scfm", "torch", "diffusers", "transformers", "peft", "accelerate"):
        with suppress(PackageNotFoundError):
            record[name] = version(name)
    return record | git_state(Path(scfm.__file__).parents[1])


def git_state(checkout: Path) -> dict[str, Any]:
    """commit and changed files of the checkout that holds this library; {} where it is installed somewhere
    else.

    An installed copy may lie in the repository of somebody's project, whose commit says nothing about this
    code.
    """
    if not (checkout / ".git").exists() or not (checkout / "settings.ini").is_file():
        return {}

    def git(*words: str) -> str:
        command = ["git", "-C", str(checkout), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with suppress(OSError, subprocess.CalledProcessError):
        changed = sorted(line[3:] for line in git("status", "--porcelain").splitlines())
        return {"commit": git("rev-parse", "HEAD").strip(), "changed": changed[:20]}
    return {}
