"""The transformer of the emoji, its flow matching, and the distillation of its guidance scale."""

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import nn
from torch.nn import functional as F

from toy.emoji.data import TOKENS, Emoji, draw_caption
from toy.emoji.text import CLIP_WIDTH, T5_WIDTH, Text, read

SHIFT = 2.0  # of the times at which the flow is trained
GUIDANCE = (1.0, 6.0)  # the scales that the distilled transformer knows
EMPTY = 0.1  # share of the rows without a caption
Batch = tuple[torch.Tensor, list[str]]


def build_transformer(
    channels: int = 32, width: int = 224, heads: int = 4, double: int = 2, single: int = 5
) -> FluxTransformer2DModel:
    """FLUX.1-dev's transformer, small: 7.8 M parameters unless told otherwise.

    channels: numbers a packed token, four times the VAE's latent channels
    """
    head = width // heads
    axes = (head // 7, 3 * head // 7, 3 * head // 7) if head % 28 == 0 else (head // 4, head // 4, head // 2)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=channels,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=head,
        num_attention_heads=heads,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=axes,
    )
    start_at_identity(transformer)
    return transformer


@torch.no_grad()
def start_at_identity(transformer: nn.Module) -> None:
    """Every block starts as the identity and the output as zero (adaLN-Zero): shorter to train by far."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        if name.endswith((".linear",)) or name == "proj_out":
            nn.init.zeros_(module.weight)


class PlainAttention(FluxAttnProcessor):
    """Attention by two products of matrices: on a CPU, at 80 tokens, a fifth of the time of the fused one."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        query, key, value = (
            f(hidden_states).unflatten(-1, (attn.heads, -1)) for f in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            q, k, v = (f(encoder_hidden_states).unflatten(-1, (attn.heads, -1)) for f in added)
            query = torch.cat([attn.norm_added_q(q), query], 1)
            key, value = torch.cat([attn.norm_added_k(k), key], 1), torch.cat([v, value], 1)
        query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        query, key, value = (x.to(value.dtype).transpose(1, 2) for x in (query, key, value))
        weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        out = (weights.softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return out
        text, image = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


class World(NamedTuple):
    """What a batch of the flow is drawn from.

    latents: (n, N, C), packed, shifted and scaled; rows: what they show; weights: how often each is drawn
    """

    latents: torch.Tensor
    rows: list[Emoji]
    weights: torch.Tensor
    text: Text
    ids: torch.Tensor  # (N, 3) positions


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(n, C, h, w) -> (n, h w / 4, 4 C), as the pipeline packs."""
    n, c, h, w = latents.shape
    return latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def positions(side: int) -> torch.Tensor:
    """(side * side, 3): zero, row, column of each token."""
    line = torch.arange(side).float()
    return torch.stack([torch.zeros(side * side), line.repeat_interleave(side), line.repeat(side)], 1)


def draw(world: World, rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """x_t, its times, the velocity noise - data and the captions of a batch, all set by the seed.

    The times are stratified: one in each of `rows` parts of equal probability.
    """
    generator, words = torch.Generator().manual_seed(seed), random.Random(seed)
    pick = torch.multinomial(world.weights, rows, replacement=True, generator=generator)
    data = world.latents[pick]
    noise = torch.randn(data.shape, generator=generator)
    u = (torch.arange(rows) + torch.rand(rows, generator=generator)) / rows
    t = (SHIFT * u / (1 + (SHIFT - 1) * u)).clamp(max=1 - 1e-5)
    x = (1 - t[:, None, None]) * data + t[:, None, None] * noise
    text = [draw_caption(world.rows[i], words).text for i in pick.tolist()]
    return x, t, noise - data, ["" if words.random() < EMPTY else caption for caption in text]


@torch.no_grad()
def embed(text: Text, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """T5's vectors (n, 16, D) and CLIP's pooled one (n, P), as the pipeline makes them, in float32."""
    first, second = read((text.tokenizer, text.tokenizer_2), captions, text.clip.device)
    with torch.autocast(first.device.type, enabled=False):
        return text.t5(second)[0], text.clip(first).pooler_output


def velocity(
    transformer: nn.Module,
    world: World,
    x: torch.Tensor,
    t: torch.Tensor,
    embedded: tuple[torch.Tensor, torch.Tensor],
    guidance: torch.Tensor,
) -> torch.Tensor:
    """What the transformer answers, (B, N, C) in float32."""
    device, (tokens, pooled) = world.ids.device, embedded
    return transformer(
        hidden_states=x.to(device),
        timestep=t.to(device),
        guidance=guidance.to(device),
        pooled_projections=pooled,
        encoder_hidden_states=tokens,
        txt_ids=torch.zeros(TOKENS, 3, device=device),
        img_ids=world.ids,
        return_dict=False,
    )[0].float()


def flow_loss(transformer: nn.Module, world: World, rows: int) -> Callable[[int], torch.Tensor]:
    """Flow matching at guidance scale 1. The loss of an update is set by its number."""

    def loss(update: int) -> torch.Tensor:
        x, t, target, captions = draw(world, rows, 2 * update)
        answer = velocity(transformer, world, x, t, embed(world.text, captions), torch.ones(rows))
        return F.mse_loss(answer, target.to(answer.device))

    return loss


def guide_loss(
    transformer: nn.Module, teacher: nn.Module, world: World, rows: int
) -> Callable[[int], torch.Tensor]:
    """The guidance scale of classifier-free guidance becomes an input: g learns V0 + g (V - V0)."""

    def loss(update: int) -> torch.Tensor:
        x, t, _, captions = draw(world, rows, 2 * update + 1)
        low, high = GUIDANCE
        generator = torch.Generator().manual_seed(2 * update + 1)
        guidance, ones = low + (high - low) * torch.rand(rows, generator=generator), torch.ones(rows)
        named, empty = embed(world.text, captions), embed(world.text, [""] * rows)
        with torch.no_grad():
            v, v0 = (velocity(teacher, world, x, t, words, ones) for words in (named, empty))
            target = v0 + guidance.to(v.device)[:, None, None] * (v - v0)
        return F.mse_loss(velocity(transformer, world, x, t, named, guidance), target)

    return loss
