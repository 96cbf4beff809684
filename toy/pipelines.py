"""Genuine, tiny pipelines. Flux: the same classes as FLUX.1-dev, 2.3 M parameters in the transformer instead
of 11.9 B.

`build_flux` makes it with random weights, `load_flux` reads the trained one that the repo carries,
`toy/train_flux.py` is how it was trained. What differs from FLUX.1-dev beside the size: 32 x 32 pixels
instead of 1024 x 1024, a VAE that halves the side once, 16 text tokens (so pass `max_sequence_length=16`),
and a fixed sampling shift of 3.

The others have random weights, and nobody has trained one yet: `build_sd3` makes a StableDiffusion3Pipeline
of the same kind, `BUILD` lists one for each family. The statistics by which they normalise latents are not 0
and 1, so that a test sees them.
"""

import itertools
import os
import re
import tempfile
from collections import Counter
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
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


def build_qwen_image(seed=0):
    """A QwenImagePipeline with random weights, in fp32 on the CPU, whose VAE halves the side once.

    Its scheduler is as that of Qwen-Image: a shift by the size, and a grid stretched to end at .02.
    """
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    text = qwen_layers(tokenizer, 4) | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=WIDTH)
    ids = dict(image_token_id=1, video_token_id=1, vision_start_token_id=1, vision_end_token_id=1)
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=64,
            max_image_seq_len=256,
            shift_terminal=0.02,
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[0.5, 1.5, 2.0, 0.8],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        ),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
        ),
    )


def build_flux2_klein(seed=0):
    """A Flux2KleinPipeline of a base checkpoint with random weights, in fp32 on the CPU, whose VAE halves the
    side once, and whose patches do so again. Its text is layers 9, 18 and 27, so the encoder has as many."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**qwen_layers(tokenizer, 27, 16), head_dim=8)),
        tokenizer=tokenizer,
        transformer=flux2_transformer(guidance_embeds=False),
    )


def build_flux2(seed=0):
    """A Flux2Pipeline with random weights, in fp32 on the CPU. Its tokenizer has no part for images, and a
    template without the system's message, which is longer than our captions."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT.replace("m in messages", "m in messages if m.role != 'system'").replace(
        "m.content", "m.content[0].text"
    )
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=Mistral3ForConditionalGeneration(
            Mistral3Config(
                text_config={"model_type": "mistral", "head_dim": 8, **qwen_layers(tokenizer, 30, 16)},
                vision_config={"model_type": "pixtral", "image_size": 32, "patch_size": 16, **vision},
                image_token_index=1,
            )
        ),
        tokenizer=tokenizer,
        transformer=flux2_transformer(guidance_embeds=True),
    )


def flux2_transformer(guidance_embeds):
    """Of FLUX.2's kind: two blocks of each of both kinds."""
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def flux2_vae():
    """An AutoencoderKLFlux2 of four latent channels that halves the side once."""
    vae = AutoencoderKLFlux2(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def build_z_image(seed=0):
    """A ZImagePipeline with random weights, in fp32 on the CPU, whose VAE halves the side once."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=small_vae(0.3611, 0.1159),
        text_encoder=Qwen3Model(Qwen3Config(**qwen_layers(tokenizer, 3, 16), head_dim=8)),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 64, 64],
        ),
    )


def build_sana(seed=0):
    """A SanaPipeline with random weights, in fp32 on the CPU, whose VAE halves the side once.

    Its scheduler is as that of Sana, a DPM-Solver. Its tokenizer is not Gemma's, but Qwen's.
    """
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    blocks = dict(block_types="ResBlock", block_out_channels=(8, 16), layers_per_block=(1, 1))
    return SanaPipeline(
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
        ),
        vae=AutoencoderDC(
            latent_channels=4,
            scaling_factor=0.41407,
            **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in blocks.items()},
        ),
        text_encoder=Gemma2Model(Gemma2Config(**qwen_layers(tokenizer, 2, 16), head_dim=8)),
        tokenizer=tokenizer,
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=16,
        ),
    )


def build_wan(seed=0, expand_timesteps=False, transformer_2=False):
    """A WanPipeline with random weights, in fp32 on the CPU, whose VAE halves the side twice and has a latent
    frame for four, but for the first, as Wan's has.

    Its scheduler is as that of Wan, UniPC. expand_timesteps: as Wan2.2-TI2V-5B; transformer_2: with a second
    transformer, as Wan2.2-A14B.
    """
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    return WanPipeline(
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
        ),
        vae=AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 2],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[0.5, 1.5, 2.0, 0.8],
            scale_factor_spatial=4,
        ),
        text_encoder=UMT5EncoderModel(UMT5Config(**t5_settings(tokenizer, WIDTH))),
        tokenizer=tokenizer,
        transformer=wan_transformer(),
        transformer_2=wan_transformer() if transformer_2 else None,
        boundary_ratio=0.875 if transformer_2 else None,
        expand_timesteps=expand_timesteps,
    )


def wan_transformer():
    """Of Wan's kind: two blocks, the same normalisations."""
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
    )


def qwen_layers(tokenizer, layers, width=WIDTH):
    """The settings of a text encoder of Qwen's kind."""
    return dict(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
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
    return T5EncoderModel(T5Config(**t5_settings(tokenizer, width)))


def t5_settings(tokenizer, width):
    """The settings of an encoder of T5's kind."""
    return dict(
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


def byte_pairs(words, end="</w>", letters=()):
    """Vocabulary and merges that make each word one token. The library's own trainer breaks ties anew in each
    process."""
    split = [[*w[:-1], w[-1] + end] for w in words]
    symbols, merges = sorted({s for word in split for s in word}.union(letters)), []
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


# What Qwen's chat template makes of one message; a space before each word of a caption but the first.
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SYSTEM = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships "
    "of the objects and background:"
)


def qwen_tokenizer():
    """Qwen's tokenizer with a vocabulary of our words and those of the templates, a token each."""
    words = [form for w in [*WORDS, *re.findall(r"\w+", SYSTEM)] for form in (w, "Ġ" + w)]
    words += [*"system user assistant think".split(), ":Ċ", "ĊĊ", "</", ">ĊĊ", "Ċ"]
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary, merges = byte_pairs(sorted(set(words)), "", letters)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=1024,
    )
    tokenizer.chat_template = CHAT
    return tokenizer


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


# One for each family whose file is plain Python, by its pipeline's class.
BUILD = {
    "QwenImagePipeline": build_qwen_image,
    "Flux2KleinPipeline": build_flux2_klein,
    "Flux2Pipeline": build_flux2,
    "ZImagePipeline": build_z_image,
    "SanaPipeline": build_sana,
    "WanPipeline": build_wan,
}
