import os

import pytest

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
