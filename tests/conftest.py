import io
import json
import os
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network


BUDGETS = json.loads((Path(__file__).parent / "budgets.json").read_text())  # seconds of the notebooks
# Seconds of the test files that take longest, as processor time with one thread.
LONG = {
    "test_distill_trainer": 80,
    "test_sharding": 60,
    "test_evaluate": 40,
    "test_demo": 40,
    "test_flux": 35,
    "test_docs_site": 35,
    "test_walk": 35,
    "test_compare_study": 30,
    "test_flow_trainer": 25,
    "test_families": 25,
    "test_plan": 20,
    "test_app": 20,
    "test_cifar_study": 20,
    "test_scaled_lora": 20,
    "test_ablations_study": 15,
    "test_prepare": 15,
    "test_wheel": 15,
}


def pytest_configure(config):
    # PEFT warns whenever a second adapter joins a model, which is what scfm.models.lora does on purpose
    config.addinivalue_line("filterwarnings", "ignore:Already found a `peft_config`")
    config.option.loadscopereorder = False  # of xdist: the files with the most tests first


def pytest_collection_modifyitems(items):
    """With `-n` what takes longest comes first, so that all workers end together."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=seconds_of, reverse=True)


def seconds_of(item):
    """Of all that is dealt out with a test."""
    if item.path.stem != "test_notebooks":
        return LONG.get(item.path.stem, 0)
    whole = item.name.startswith("test_it_runs_from_top_to_bottom")
    return BUDGETS.get(item.callspec.params["path"].stem, 0) if whole else 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n` a file's tests stay together, as they share slow fixtures; notebooks are dealt out one by
    one. (`--dist loadgroup` groups nothing where a test's name cannot be changed, as in pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return nodeid if file.endswith("test_notebooks.py") else file

    return ByFile(config, log)


@pytest.fixture(scope="module", autouse=True)
def one_worker(request, tmp_path_factory):
    """Fails where the tests of a file go to two workers, which would build its slow fixtures twice."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker and request.path.stem != "test_notebooks":
        note = tmp_path_factory.getbasetemp().parent / f"worker_of_{request.path.stem}"  # all workers'
        if not note.exists():
            note.write_text(worker)
        assert note.read_text() == worker


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of one test file."""
    return tmp_path_factory.mktemp("folder")


@pytest.fixture
def lora(tmp_path):
    """A copy of the carried LoRA, which knows its pipeline by its full path, and a setting of the future."""
    from toy.pipelines import FLUX, WEIGHTS

    folder = shutil.copytree(WEIGHTS / "lora", tmp_path / "lora")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"pretrained_model_name_or_path": str(FLUX), "from_the_future": 1}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def flux():
    """The carried Flux as a family."""
    from scfm.models.flux import Flux
    from toy.pipelines import TOKENS, load_flux

    return Flux(load_flux(), 32, 32, TOKENS)


@pytest.fixture(scope="module")
def sd3():
    """A tiny SD3 with random weights as a family."""
    from scfm.models.sd3 import SD3
    from toy.pipelines import TOKENS, build_sd3

    pipe = build_sd3()
    pipe.set_progress_bar_config(disable=True)
    return SD3(pipe, 32, 32, TOKENS)


@pytest.fixture(scope="session")
def noise_images(tmp_path_factory):
    """A folder in the layout of CIFAR-10: 40 images of noise a split, ten labels."""
    import pyarrow.parquet
    import torch
    from PIL import Image

    folder, generator = tmp_path_factory.mktemp("noise_images"), torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        cells = []
        for pixels in torch.randint(256, (40, 32, 32, 3), dtype=torch.uint8, generator=generator):
            Image.fromarray(pixels.numpy()).save(file := io.BytesIO(), "png")
            cells.append({"bytes": file.getvalue(), "path": None})
        table = pyarrow.table({"img": cells, "label": [i % 10 for i in range(40)]})
        pyarrow.parquet.write_table(table, folder / f"{split}-0.parquet")
    return str(folder)
