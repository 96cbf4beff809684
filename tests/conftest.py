import json
import os
import runpy
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network


def pytest_configure(config):
    # PEFT warns whenever a second adapter joins a model, which is what scfm.models.lora does on purpose
    config.addinivalue_line("filterwarnings", "ignore:Already found a `peft_config`")


def pytest_collection_modifyitems(items):
    """With `-n`, a file's tests stay together, as they share slow fixtures; notebooks are dealt out one by one."""
    for item in items:
        if item.path.stem != "test_notebooks":
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of one test file."""
    return tmp_path_factory.mktemp("folder")


@pytest.fixture
def bench(request, folder, monkeypatch):
    """Runs the test file's SCRIPT of bench/ in small, with more words, on one cache; returns the record that it wrote as `out`."""
    script = request.module.SCRIPT

    def run(*words, out=script):
        monkeypatch.syspath_prepend(str(BENCH))
        monkeypatch.setattr(sys, "argv", [f"{script}.py", "--smoke", "--cache_dir", str(folder / "cells"), "--output_dir", str(folder / out), *words])
        runpy.run_path(str(BENCH / f"{script}.py"), run_name="__main__")
        return json.loads((folder / f"{out}.json").read_text())
    return run
