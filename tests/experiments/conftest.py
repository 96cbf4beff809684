"""The studies at a size of seconds: each test file runs its STUDY once, and all its tests share the cells."""

import contextlib
import importlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest


@pytest.fixture(scope="module", autouse=True)
def few_drawings():
    """Judges of the tiny Flux hold samples against few drawings: what they say means nothing here.

    For a file and no longer: a process goes on to other folders' tests, whose judges are to mean something.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toy.judge.REFERENCE", 100)
        yield


class Run(NamedTuple):
    """A record, and what the command printed."""

    record: dict[str, Any]
    printed: str


class Study:
    """A study's command in small, on one folder of cells."""

    def __init__(self, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.cells, self.name = folder, folder / "cells", name
        self.module = importlib.import_module(f"experiments.studies.{name}")
        self.first = self.run()
        for name in [name for name in vars(self.module) if name.startswith("plot")]:
            monkeypatch.setattr(self.module, name, lambda *_: None)  # one drawing is enough

    def run(self, *words: str, out: str = "") -> Run:
        """The command with more words; out: another name of its files."""
        path, printed = self.folder / (out or self.name), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            self.module.main(["--smoke", "--cache", str(self.cells), "--out", str(path), *words])
        return Run(json.loads(path.with_suffix(".json").read_text()), printed.getvalue())

    def lose(self, kind: str) -> Path:
        """Removes one cell of a kind; returns where it was."""
        path = min(self.cells.glob(f"{kind}-*"))
        path.unlink()
        return path


@pytest.fixture(scope="module")
def study(request, tmp_path_factory):
    """The test file's STUDY, which has run once: everything computed, nothing from elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        yield Study(request.module.STUDY, tmp_path_factory.mktemp(request.module.STUDY), patch)
