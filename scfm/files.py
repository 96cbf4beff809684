"""Files that are whole or not there, paths as the shell means them, folders that one run has to itself."""

import json
import os
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

LOCK = ".scfm-lock"


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Calls write(a temporary path) and renames the result: `path` is whole or not there, also when two write
    it at once.

    The file gets the mode that the umask asks for (safetensors alone would make it private). OSError names
    the path.
    """
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(new)
        new.chmod(0o666 & ~current_umask())
        os.replace(new, path)
    except SafetensorError as error:  # is no OSError, whatever went wrong with the disk
        raise OSError(f"{path} could not be written ({error})") from None
    except OSError as error:  # of a full disk it names no file, otherwise the temporary one
        raise OSError(f"{path} could not be written ({error.strerror or error})") from None
    finally:
        with suppress(OSError):  # a read-only disk refuses even to remove what is not there
            new.unlink()


def check_writable(folder: str | Path, mend: str, size: int = 0) -> None:
    """ValueError with the mend when a folder, or the one to be made it in, takes no new file. Leaves nothing
    there.

    For what works long and writes at its end. size: bytes that the file will have at least
    """
    folder = Path(folder)
    place = next((path for path in (folder, *folder.parents) if path.exists()), Path())
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".scfm-") as file:
            file.write(b"0")  # a full disk may still take an empty file
            file.flush()
    except OSError as error:
        raise ValueError(f"{place} cannot be written to ({error.strerror}): {mend}") from None
    free = shutil.disk_usage(place).free
    if free < size:
        room = f"{free / 2**20:.1f} MiB are free there, {size / 2**20:.1f} are needed"
        raise ValueError(f"{place} cannot be written to ({room}): {mend}")


def short_path(path: str | Path) -> str:
    """A path for people: relative where it lies below the working folder, else as it is."""
    path = Path(path)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def current_umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def expand_user(config: Any) -> None:
    """Replaces a leading ~ or ~user in the string settings of a dataclass, as the shell does for words
    without quotes."""
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, str) and re.match(r"~[\w.-]*(/|$)", value):
            setattr(config, f.name, os.path.expanduser(value))


def lock_folder(folder: Path) -> None:
    """Marks a folder as in use by this process until `unlock_folder`. ValueError when another live process
    has it.

    A lock of a process that is gone, or of an earlier boot of this machine's process number, is taken over.
    """
    path, mine = folder / LOCK, {"host": socket.gethostname(), "pid": os.getpid()}
    folder.mkdir(parents=True, exist_ok=True)
    holder = {}
    with suppress(OSError, json.JSONDecodeError):
        holder = json.loads(path.read_text())
    if holder and holder != mine and is_alive(holder):
        raise ValueError(
            f"{folder} is in use by process {holder.get('pid')} on {holder.get('host')}: wait for it, take "
            f"another --output_dir, or delete {path} if that process is gone"
        )
    atomic_write(path, lambda new: new.write_text(json.dumps(mine)))


def unlock_folder(folder: Path) -> None:
    """Takes this process's own lock away."""
    path = folder / LOCK
    with suppress(OSError, json.JSONDecodeError):
        if json.loads(path.read_text()) == {"host": socket.gethostname(), "pid": os.getpid()}:
            path.unlink()


def is_alive(holder: dict[str, Any]) -> bool:
    """Whether a lock's process runs; taken for granted where it is another machine's."""
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(holder["pid"]), 0)
    except (ProcessLookupError, KeyError, ValueError):
        return False
    except PermissionError:  # somebody else's process: it is there
        return True
    return True
