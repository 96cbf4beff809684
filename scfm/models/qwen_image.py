"""Qwen-Image as a family."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

from scfm.models.base import PipelineFamily, Published, channel_statistics, with_negative
from scfm.models.comfyui_names import QWEN_IMAGE
from scfm.models.sd3 import Joined, guided_velocity


class QwenImage(PipelineFamily):
    """Qwen-Image: all in which it differs from other families, for one image size."""

    pipeline_class = QwenImagePipeline
    comfyui_names = QWEN_IMAGE
    uses_cfg = True
    longest_text = 1024  # tokens after the template's
    # All linear layers: attention, feed-forward, modulations, embedders and output.
    lora_targets = tuple(
        "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out net.0.proj net.2 img_mod.1 "
        "txt_mod.1 img_in txt_in linear_1 linear_2 norm_out.linear proj_out".split()
    )
    published = {
        "qwen-image": Published(
            QwenImageTransformer2DModel,
            dict(
                in_channels=64,
                out_channels=16,
                num_layers=60,
                attention_head_dim=128,
                num_attention_heads=24,
                joint_attention_dim=3584,
                axes_dims_rope=(16, 56, 56),
            ),
        )
    }

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one image: (N, C)."""
        return self.tokens, self.pipe.transformer.config.in_channels

    @property
    def time_dtype(self) -> torch.dtype:
        """What the time embedding is fed in: t is cast to the dtype of the weights first."""
        return self.pipe.transformer.dtype

    @property
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of a caption's row, by name."""
        length = self.max_sequence_length
        return {"tokens": (length, self.pipe.transformer.config.joint_attention_dim), "mask": (length,)}

    @classmethod
    def guidance_arguments(cls, scale: float, negative_prompt: str = "") -> dict[str, Any]:
        """Guidance needs a negative prompt, be it empty: without one the pipeline leaves it out."""
        negative = {"negative_prompt": negative_prompt} if scale > 1 else {}
        return {**negative, "true_cfg_scale": scale}

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """The text inputs of n captions, on the CPU: tokens (n, L, D), zero behind a caption's end, and their
        mask (n, L); and those of the negative prompt, empty_tokens and empty_mask, views of one row."""
        rows = [self.encode(caption) for caption in [*captions, self.negative_prompt]]
        return with_negative({name: torch.stack([row[name] for row in rows]) for name in ("tokens", "mask")})

    def encode(self, caption: str) -> dict[str, torch.Tensor]:
        """Tokens (L, D) and mask (L,) of one caption, alone: the pipeline pads to the longest beside it."""
        length = self.max_sequence_length
        tokens = self.pipe.encode_prompt([caption], max_sequence_length=length)[0][0].cpu()
        padded = tokens.new_zeros(length, tokens.shape[1])
        padded[: len(tokens)] = tokens
        return {"tokens": padded, "mask": torch.arange(length) < len(tokens)}

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, height, width) in [-1, 1] -> latents (n, N, C), the mode of the VAE's posterior."""
        vae = self.pipe.vae
        latents = vae.encode(images[:, :, None].to(vae.device, vae.dtype)).latent_dist.mode()  # one frame
        mean, std = channel_statistics(self.pipe.vae, latents)
        n, channels, _, rows, columns = latents.shape
        return self.pipe._pack_latents((latents - mean) / std, n, channels, rows, columns)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (n, N, C) -> images (n, 3, height, width) in [-1, 1]."""
        latents = self.pipe._unpack_latents(latents, self.height, self.width, self.pipe.vae_scale_factor)
        mean, std = channel_statistics(self.pipe.vae, latents)
        vae = self.pipe.vae
        return vae.decode((latents * std + mean).to(vae.dtype)).sample[:, :, 0].clamp(-1, 1)

    def velocity(
        self, transformer: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The velocity noise - data, (B, N, C), guided where the guidance scale is above 1.

        A guided token is scaled back to the length that its velocity for the caption has: the guidance is
        not linear in its scale.

        x: (B, N, C). t: (B,) in [0, 1]. cond: tokens, mask, empty_tokens, empty_mask, and guidance (B,)
        """
        lengths = []

        def evaluate(both: Joined) -> torch.Tensor:
            tokens = both(cond["empty_tokens"], cond["tokens"])
            out = transformer(
                hidden_states=both(x, x).to(tokens.dtype),
                timestep=both(t, t).to(tokens.dtype),
                encoder_hidden_states=tokens,
                encoder_hidden_states_mask=both(cond["empty_mask"], cond["mask"]).to(x.device),
                img_shapes=[[(1, *self.token_grid)]] * len(tokens),
                return_dict=False,
            )[0].to(x.dtype)
            lengths.append(out[-len(x) :].norm(dim=-1, keepdim=True))
            return out

        v = guided_velocity(evaluate, x, cond["guidance"])
        scaled = v * (lengths[0] / v.norm(dim=-1, keepdim=True))
        return torch.where(cond["guidance"].to(x.device).view(-1, 1, 1) > 1, scaled, v)
