import json
import shutil

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from scfm.models.flux import Flux
from scfm.models.sd3 import SD3
from toy.pipelines import FLUX, TOKENS, WEIGHTS, build_sd3, clip_tokenizer, load_flux


@pytest.fixture
def lora(tmp_path):
    """A copy of the carried LoRA, which knows its pipeline by its full path, and a setting of the future."""
    folder = shutil.copytree(WEIGHTS / "lora", tmp_path / "lora")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"pretrained_model_name_or_path": str(FLUX), "from_the_future": 1}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def flux():
    return Flux(load_flux(), 32, 32, TOKENS)


@pytest.fixture(scope="module")
def sd3():
    pipe = build_sd3()
    pipe.set_progress_bar_config(disable=True)
    return SD3(pipe, 32, 32, TOKENS)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A tiny random CLIP, saved as transformers saves them."""
    folder, words = tmp_path_factory.mktemp("clip"), clip_tokenizer()
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **small,
        "vocab_size": len(words),
        "max_position_embeddings": 8,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    vision = {**small, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPProcessor(CLIPImageProcessor(size=size, crop_size=size), words).save_pretrained(folder)
    return folder
