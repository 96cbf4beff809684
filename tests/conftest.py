import io
import json
import os
import shutil

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network


def pytest_configure(config):
    # PEFT warns whenever a second adapter joins a model, which is what scfm.models.lora does on purpose
    config.addinivalue_line("filterwarnings", "ignore:Already found a `peft_config`")


def pytest_collection_modifyitems(items):
    """With `-n`, a file's tests stay together, as they share slow fixtures; notebooks are dealt out one by
    one."""
    for item in items:
        if item.path.stem != "test_notebooks":
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


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
