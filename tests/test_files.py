"""Files that are whole or not there, and places that take none."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from scfm.cli import main
from scfm.files import atomic_write, check_writable, short_path


def test_a_file_has_the_mode_that_the_umask_asks_for(tmp_path):
    path = tmp_path / "a.safetensors"
    before = os.umask(0o027)
    try:
        atomic_write(path, lambda new: save_file({"a": torch.zeros(1)}, str(new)))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("No space left on device"),
        OSError(errno.ENOSPC, "No space left on device"),  # as Pillow and json have it: without a name
        PermissionError(errno.EACCES, "No space left on device", ".a.safetensors.12345678.new"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_disk_that_takes_no_more_is_an_oserror_that_names_the_file(tmp_path, error):
    def full(path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    with pytest.raises(OSError, match=r"/a.safetensors could not be written \(No space left on device\)$"):
        atomic_write(tmp_path / "a.safetensors", full)
    assert not list(tmp_path.iterdir())


def test_a_command_says_in_one_line_that_weights_could_not_be_written(capsys, monkeypatch):
    """Also where a library writes them, whose error is no OSError."""

    def full(argv: object) -> int:
        raise SafetensorError("Error while serializing: No space left on device")

    monkeypatch.setattr("scfm.commands.distill.main", full)
    assert main(["distill"]) == 1
    line = "scfm distill: a file of weights could not be read or written (Error while serializing: No space"
    assert capsys.readouterr().err.startswith(line)


def test_a_place_that_takes_no_file_is_named_before_the_work(tmp_path):
    check_writable(tmp_path / "new/deep", "take another")
    assert not list(tmp_path.iterdir())  # it was only tried
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="/file cannot be written to .*: take another"):
        check_writable(tmp_path / "file/below", "take another")


def test_paths_are_short_for_people(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert short_path(tmp_path / "a/b.txt") == short_path("a/b.txt") == str(Path("a/b.txt"))
    assert short_path("/elsewhere/b.txt") == str(Path("/elsewhere/b.txt"))
