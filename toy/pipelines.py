"""Genuine, tiny pipelines. Flux: the same classes as FLUX.1-dev, 2.3 M parameters in the transformer instead
of 11.9 B.

`build_flux` makes it with random weights, `load_flux` reads the trained one that the repo carries,
`toy/train_flux.py` is how it was trained. What differs from FLUX.1-dev beside the size: 32 x 32 pixels
instead of 1024 x 1024, a VAE that halves the side once, 16 text tokens (so pass `max_sequence_length=16`),
and a fixed sampling shift of 3.

`build_sd3` makes a StableDiffusion3Pipeline of the same kind, with random weights: nobody has trained one
yet.
"""

import itertools
import os
import tempfile
from collections import Counter
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from scfm.models.loading import no_loading_bars
from toy.shapes import COLOURS, OPENINGS, PLACES, SHAPES, SIDE, SIZES

WEIGHTS = Path(__file__).parent / "weights"
FLUX = WEIGHTS / "flux"
TOKENS = 16  # length of every caption, in tokens
GUIDANCE = 2.5  # the guidance scale at which the carried pipeline is sampled; set beforehand, not tuned
WIDTH = 64  # of the text's tokens
SHIFT = 3.0  # of the sampling grid, fixed

WORDS = sorted({w for line in (*COLOURS, *SHAPES, *SIZES, *PLACES, *OPENINGS, "a an") for w in line.split()})


def build_flux(seed=0):
    """A FluxPipeline with random weights, in fp32 on the CPU: for training it, and for tests that need no
    images."""
    torch.manual_seed(seed)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False),
        vae=small_vae(1.0, 0.0),
        text_encoder=CLIPTextModel(clip_config(clip, WIDTH)),
        tokenizer=clip,
        text_encoder_2=t5_encoder(t5),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 14, 14),
        ),
    )


def build_sd3(seed=0, t5=True):
    """A StableDiffusion3Pipeline with random weights, in fp32 on the CPU, for 32 x 32 pixels.

    Built like SD3.5: normalized queries and keys, a second attention in the first block (as in Medium). The
    VAE's scale and shift are those of SD3, and the table of positions is larger than the image, so that it is
    cropped. t5=False leaves the third text encoder out, as people do to save memory.
    """
    torch.manual_seed(seed)
    clip = clip_tokenizer()
    t5_words = t5_tokenizer() if t5 else None
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False),
        vae=small_vae(1.5305, 0.0609),
        text_encoder=CLIPTextModelWithProjection(clip_config(clip, WIDTH // 2)),
        tokenizer=clip,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(clip, WIDTH // 2)),
        tokenizer_2=clip,
        text_encoder_3=t5_encoder(t5_words) if t5 else None,
        tokenizer_3=t5_words,
        transformer=SD3Transformer2DModel(
            sample_size=SIDE // 2,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=32,
            num_attention_heads=4,
            caption_projection_dim=128,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            pos_embed_max_size=12,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
    )


def small_vae(scaling_factor, shift_factor):
    """An AutoencoderKL of four latent channels that halves the side once."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[16, 32],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=SIDE,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )


def clip_config(tokenizer, width, tokens=TOKENS):
    """Of a CLIP text encoder of two layers."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_encoder(tokenizer, width=WIDTH):
    """A T5 encoder of two layers."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=width // 4,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def load_flux(folder=FLUX, dtype=torch.float32):
    """The trained pipeline. The folder is plain diffusers: `FluxPipeline.from_pretrained(folder)` reads it as
    well.

    A stock pipeline's call needs `max_sequence_length=16` (`TOKENS`).
    """
    if not (Path(folder) / "model_index.json").is_file():
        raise FileNotFoundError(
            f"no pipeline in {folder}: it has no model_index.json (python -m toy.train_flux makes one)"
        )
    with no_loading_bars():
        pipe = FluxPipeline.from_pretrained(str(folder), dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_flux(pipe, folder):
    """Writes the pipeline, the transformer and the VAE in float16; the one in memory stays as it was.

    The text encoders stay in float32: stock loaders would run them in the precision that they find on disk.
    """
    folder = Path(folder)
    big = [pipe.transformer, pipe.vae]
    kept = [{k: v.clone() for k, v in part.state_dict().items()} for part in big]
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        for part in big:
            part.half()
        pipe.save_pretrained(new)
        for part, state in zip(big, kept, strict=False):
            part.float().load_state_dict(state)
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)


def clip_tokenizer():
    """Byte-pair encoding of the 30-odd words of our captions, in the layout that CLIP's tokenizer reads."""
    vocabulary, merges = byte_pairs(WORDS)
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with tempfile.TemporaryDirectory() as folder:
        inner.model.save(folder)
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS, pad_token="<|endoftext|>")


def byte_pairs(words):
    """Vocabulary and merges that make each word one token. The library's own trainer breaks ties anew in each
    process."""
    split = [[*w[:-1], w[-1] + "</w>"] for w in words]
    symbols, merges = sorted({s for word in split for s in word}), []
    while pairs := Counter(pair for word in split for pair in itertools.pairwise(word)):
        best = min(
            pairs, key=lambda pair: (-pairs[pair], pair)
        )  # the most frequent, and of these the first by name
        merges.append(best)
        for word in split:
            for i in range(len(word) - 1, 0, -1):
                if word[i - 1 : i + 1] == [*best]:
                    word[i - 1 : i + 1] = ["".join(best)]
    symbols += ["".join(pair) for pair in merges]
    return {s: i for i, s in enumerate(dict.fromkeys(["<|startoftext|>", "<|endoftext|>", *symbols]))}, merges


def t5_tokenizer():
    """A fixed Unigram vocabulary, a piece a word, with letters to fall back on."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + w, -2.0) for w in WORDS] + [(c, -12.0) for c in "▁" + letters]
    inner = Tokenizer(models.Unigram(pieces, unk_id=2))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(
        tokenizer_object=inner,
        extra_ids=0,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=TOKENS,
    )
