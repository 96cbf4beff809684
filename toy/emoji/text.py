"""The two text encoders in the places that a FluxPipeline has for them, both trained as CLIP was.

CLIP's pooled vector and the mean of T5's vectors each learn to find the image of a caption among the images
of a batch. The image tower that they learn against is thrown away.
"""

import random
import tempfile
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    T5EncoderModel,
    T5TokenizerFast,
)

from toy.emoji.data import TOKENS, Caption, Emoji, Emojis, draw_caption
from toy.emoji.vae import to_floats
from toy.pipelines import byte_pairs, clip_config, t5_encoder

CLIP_TOKENS = 32  # its tokens cost the transformer nothing; commas and spelled words fit as well
CLIP_WIDTH, T5_WIDTH, SPACE = 64, 128, 128
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
STOPS = ",.!?"


class Text(NamedTuple):
    """The four parts of a FluxPipeline that read captions."""

    clip: CLIPTextModel
    tokenizer: CLIPTokenizer
    t5: T5EncoderModel
    tokenizer_2: T5TokenizerFast


def build_text(words: list[str]) -> Text:
    """Encoders with random weights, and tokenizers in which each of `words` is one token."""
    clip, t5 = clip_tokenizer(words), t5_tokenizer(words)
    config = clip_config(clip, CLIP_WIDTH, CLIP_TOKENS)
    return Text(CLIPTextModel(config), clip, t5_encoder(t5, T5_WIDTH), t5)


def clip_tokenizer(words: list[str]) -> CLIPTokenizer:
    """Byte-pair encoding with a token for each word, in the layout that CLIP's tokenizer reads."""
    vocabulary, merges = byte_pairs(sorted({*words, *LETTERS, ","}))
    for letter in LETTERS:  # any word can be spelled
        vocabulary.setdefault(letter, len(vocabulary))
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    with tempfile.TemporaryDirectory() as folder:
        inner.model.save(folder)
        return CLIPTokenizer.from_pretrained(folder, model_max_length=CLIP_TOKENS, pad_token="<|endoftext|>")


def t5_tokenizer(words: list[str]) -> T5TokenizerFast:
    """A fixed Unigram vocabulary: a piece a word, the same with a capital, letters to fall back on.

    T5's tokenizer has no lower case (a normalizer would be lost on loading): hence the capitals and
    `tie_capitals`.
    """
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + w, -2.0) for w in dict.fromkeys([*words, *(w.capitalize() for w in words)])]
    pieces += [(c, -12.0) for c in "▁" + LETTERS + STOPS]
    inner = Tokenizer(models.Unigram(pieces, unk_id=2))
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


@torch.no_grad()
def tie_capitals(t5: T5EncoderModel, tokenizer: T5TokenizerFast) -> None:
    """A word with a capital is embedded like the word, every stop like the comma: only those were trained."""
    pieces, rows = tokenizer.get_vocab(), t5.get_input_embeddings().weight
    for piece, row in pieces.items():
        same = "," if piece in STOPS else piece.lower()
        rows[row] = rows[pieces.get(same, row)]


def read(tokenizers: tuple, captions: list[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids for CLIP and for T5. CLIP sees no pads from where it pools: its rows end with the longest."""
    first, second = tokenizers
    first = first(captions, padding=True, truncation=True, return_tensors="pt").input_ids
    second = second(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return first.to(device), second.to(device)


class DualEncoder(nn.Module):
    """Both text encoders, and the image tower, with their ways into one space of unit vectors."""

    def __init__(self, text: Text) -> None:
        super().__init__()
        self.clip, self.t5 = text.clip, text.t5
        self.tokenizers = text.tokenizer, text.tokenizer_2
        self.clip_out, self.t5_out = nn.Linear(CLIP_WIDTH, SPACE), nn.Linear(T5_WIDTH, SPACE)
        sizes = (3, 32, 64, 128, 128)
        layers = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU())
            for a, b in zip(sizes, sizes[1:], strict=False)
        ]
        self.image = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(128 * 4, 256), nn.SiLU(), nn.Linear(256, SPACE)
        )
        self.scale = nn.Parameter(torch.tensor(2.5))  # log of the inverse temperature

    def texts(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors (n, SPACE) by CLIP and by T5."""
        first, second = read(self.tokenizers, captions, self.scale.device)
        pooled = self.clip(first).pooler_output
        tokens = self.t5(second)[0]  # pads attend and are attended, as in the pipeline
        seen = (second != self.tokenizers[1].pad_token_id)[..., None]
        mean = (tokens * seen).sum(1) / seen.sum(1)
        return F.normalize(self.clip_out(pooled), dim=-1), F.normalize(self.t5_out(mean), dim=-1)

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (n, 3, 64, 64) -> unit vectors (n, SPACE). The tower sees every second pixel's mean."""
        small = F.avg_pool2d(to_floats(pixels.to(self.scale.device)), 2)
        return F.normalize(self.image(small).float(), dim=-1)


def contrastive_loss(
    model: DualEncoder, pixels: torch.Tensor, rows: list[Emoji], captions: list[Caption]
) -> torch.Tensor:
    """Cross-entropy of finding the image of a caption and the caption of an image, for both encoders.

    A caption that fits several images of the batch is not held against the others.
    """
    other = torch.tensor(
        [[a is not b and c.fits(b) for b in rows] for a, c in zip(rows, captions, strict=True)]
    )
    images, truth = model.images(pixels), torch.arange(len(rows), device=model.scale.device)
    total = torch.zeros((), device=truth.device)
    for text in model.texts([c.text for c in captions]):
        logits = model.scale.exp().clamp(max=50) * text.float() @ images.T
        logits = logits.masked_fill(other.to(truth.device), -1e4)
        total = total + F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)
    return total / 4


def text_batch(
    data: Emojis, weights: torch.Tensor, rows: int, generator: torch.Generator, draw: random.Random
):
    """(pixels, rows, captions) of distinct images."""
    pick = torch.multinomial(weights, min(rows, len(data.rows)), generator=generator).tolist()
    chosen = [data.rows[i] for i in pick]
    return data.pixels[pick], chosen, [draw_caption(row, draw) for row in chosen]


@torch.no_grad()
def retrieval(model: DualEncoder, data: Emojis, queries: list[int]) -> dict[str, float]:
    """The share of full names whose image comes first (and among the first five) of all images of `data`."""
    images = torch.cat([model.images(p) for p in data.pixels.split(256)])
    found = {}
    for name, text in zip(("clip", "t5"), model.texts([data.rows[i].name for i in queries]), strict=True):
        ranks = (text @ images.T).topk(min(5, len(images))).indices.cpu() == torch.tensor(queries)[:, None]
        found |= {
            f"{name}_top1": ranks[:, 0].float().mean().item(),
            f"{name}_top5": ranks.any(1).float().mean().item(),
        }
    return found
