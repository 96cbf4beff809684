import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from toy.pipelines import clip_tokenizer


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
