import json
import shutil

import pytest

from toy.pipelines import FLUX, WEIGHTS


@pytest.fixture
def lora(tmp_path):
    """A copy of the carried LoRA, which knows its pipeline by its full path, and a setting of the future."""
    folder = shutil.copytree(WEIGHTS / "lora", tmp_path / "lora")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"pretrained_model_name_or_path": str(FLUX), "from_the_future": 1}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder
