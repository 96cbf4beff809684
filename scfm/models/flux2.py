"""FLUX.2 as two families: klein's base checkpoints, guided by a second evaluation, and dev, whose guidance is
an input."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from scfm.models.base import PipelineFamily, Published, with_negative
from scfm.models.comfyui_names import FLUX2
from scfm.models.sd3 import Joined, guided_velocity

SHIFT_STEPS = 4  # the pipelines' time shift depends on the number of steps, too: that for so many is taken
TARGETS = (
    "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out to_qkv_mlp_proj linear_in "
    "linear_out linear linear_1 linear_2 x_embedder context_embedder proj_out"
)


def published(double: int, single: int, heads: int, width: int, embedded: bool = False) -> Published:
    """A FLUX.2 of so many blocks of both kinds and heads, and the width of its text."""
    settings = dict(num_layers=double, num_single_layers=single, num_attention_heads=heads)
    return Published(
        Flux2Transformer2DModel, {**settings, "joint_attention_dim": width, "guidance_embeds": embedded}
    )


class Flux2Dev(PipelineFamily):
    """FLUX.2-dev: all in which it differs from other families, for one image size."""

    pipeline_class: Any = Flux2Pipeline
    comfyui_names = FLUX2
    uses_cfg = False  # the guidance scale is an input of the network
    published = {"flux2-dev": published(8, 48, 48, 15360, True)}

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """All linear layers: attention, feed-forward, modulations, embedders and output. The single blocks'
        `to_out` by their numbers, as in the others it is a list."""
        numbers = range(self.pipe.transformer.config.num_single_layers)
        return (*TARGETS.split(), *(f"single_transformer_blocks.{i}.attn.to_out" for i in numbers))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one image: (N, C)."""
        return self.tokens, self.pipe.transformer.config.in_channels

    @property
    def time_dtype(self) -> torch.dtype:
        """What the time embedding is fed in: t is cast to the dtype of the weights first."""
        return self.pipe.transformer.dtype

    @property
    def dynamic_shift(self) -> float | None:
        """The stock pipeline's time shift at this size and `SHIFT_STEPS`; None where it has a fixed one."""
        dynamic = self.pipe.scheduler.config.use_dynamic_shifting
        return math.exp(compute_empirical_mu(self.tokens, SHIFT_STEPS)) if dynamic else None

    @property
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of a caption's row, by name."""
        width = self.pipe.transformer.config.joint_attention_dim
        return {"tokens": (self.max_sequence_length, width)}

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """The text inputs of n captions, on the CPU: tokens (n, L, D), of which the network reads the padding
        too."""
        tokens, _ = self.pipe.encode_prompt(list(captions), max_sequence_length=self.max_sequence_length)
        return {"tokens": tokens.cpu()}

    def normalized(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's latents (n, C / 4, 2 h, 2 w) -> (n, N, C), by the statistics of its batch norm."""
        mean, std = self.vae_statistics(latents)
        return self.pipe._pack_latents((self.pipe._patchify_latents(latents) - mean) / std)

    def vae_statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the patches' channels, (C, 1, 1) each."""
        vae = self.pipe.vae
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        return vae.bn.running_mean.to(latents).view(-1, 1, 1), std.to(latents).view(-1, 1, 1)

    def unpacked(self, x: torch.Tensor) -> torch.Tensor:
        """(n, N, C) -> (n, C, h, w)."""
        return x.transpose(1, 2).unflatten(2, self.token_grid)

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, height, width) in [-1, 1] -> latents (n, N, C), the mode of the VAE's posterior."""
        vae = self.pipe.vae
        return self.normalized(vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode())

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (n, N, C) -> images (n, 3, height, width) in [-1, 1]."""
        mean, std = self.vae_statistics(latents)
        latents = self.pipe._unpatchify_latents(self.unpacked(latents) * std + mean)
        return self.pipe.vae.decode(latents.to(self.pipe.vae.dtype)).sample.clamp(-1, 1)

    def velocity(
        self, transformer: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The velocity noise - data, (B, N, C).

        x: (B, N, C). t: (B,) in [0, 1]. cond: tokens, and guidance (B,)
        """
        return self.evaluate(transformer, x, t, cond["tokens"], cond["guidance"]).to(x.dtype)

    def evaluate(
        self,
        transformer: torch.nn.Module,
        x: torch.Tensor,
        t: torch.Tensor,
        tokens: torch.Tensor,
        guidance: torch.Tensor | None,
    ) -> torch.Tensor:
        """One call of the network."""
        (rows, columns), axis = self.token_grid, torch.arange(max(self.token_grid), device=x.device)
        one, length = axis[:1], torch.arange(tokens.shape[1], device=x.device)
        return transformer(
            hidden_states=x.to(tokens.dtype),
            timestep=t.to(tokens.dtype),
            guidance=guidance,
            encoder_hidden_states=tokens,
            img_ids=torch.cartesian_prod(one, axis[:rows], axis[:columns], one),
            txt_ids=torch.cartesian_prod(one, one, one, length),
            return_dict=False,
        )[0]

    def stock_noise(self, noise: torch.Tensor) -> torch.Tensor:
        """The pipeline packs noise itself."""
        return self.unpacked(super().stock_noise(noise))

    def sample_stock(
        self,
        captions: Sequence[str],
        noise: torch.Tensor,
        steps: int,
        guidance: float,
        shift: float | None = None,
    ) -> torch.Tensor:
        """As of the base; the pipeline's own shift is that for `SHIFT_STEPS`, whatever the steps."""
        return super().sample_stock(captions, noise, steps, guidance, shift or self.dynamic_shift)


class Flux2Klein(Flux2Dev):
    """The base checkpoints of FLUX.2 klein; klein itself is a few-step model already."""

    pipeline_class = Flux2KleinPipeline
    uses_cfg = True
    published = {
        "flux2-klein-base-4b": published(5, 20, 24, 7680),
        "flux2-klein-base-9b": published(8, 24, 32, 12288),
    }

    def __init__(
        self, pipe: Any, height: int, width: int, max_sequence_length: int = 512, negative_prompt: str = ""
    ) -> None:
        super().__init__(pipe, height, width, max_sequence_length, negative_prompt)
        if pipe.config.get("is_distilled"):
            raise ValueError("this FLUX.2 klein is a few-step model already: take its base checkpoint")
        if negative_prompt:
            raise ValueError("negative_prompt: FLUX.2 klein's is always empty: leave it out")

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """tokens (n, L, D) of n captions, on the CPU, and empty_tokens, views of one row."""
        return with_negative(super().encode_text([*captions, ""]))

    def latents_from_stock(self, latents: torch.Tensor) -> torch.Tensor:
        """This pipeline returns latents as the VAE takes them."""
        return self.normalized(latents)

    def velocity(
        self, transformer: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The velocity noise - data, (B, N, C), guided where the guidance scale is above 1.

        x: (B, N, C). t: (B,) in [0, 1]. cond: tokens, empty_tokens, and guidance (B,)
        """

        def evaluate(both: Joined) -> torch.Tensor:
            tokens = both(cond["empty_tokens"], cond["tokens"])
            return self.evaluate(transformer, both(x, x), both(t, t), tokens, None).to(x.dtype)

        return guided_velocity(evaluate, x, cond["guidance"])
