"""Wan 2.1 and 2.2 as a family: videos, and images of one frame."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel

from scfm.models.base import Published, channel_statistics, with_negative
from scfm.models.comfyui_names import WAN
from scfm.models.sampling import together
from scfm.models.sd3 import Joined, guided_velocity
from scfm.models.video import VideoFamily


class Wan(VideoFamily):
    """Wan 2.1 text to video, and 2.2-TI2V-5B: all in which they differ from other families, for one size.

    ValueError for 2.2-A14B, which has two transformers.
    """

    pipeline_class = WanPipeline
    comfyui_names = WAN
    uses_cfg = True
    time_dtype = torch.float32  # what the time embedding computes in, whatever the weights are
    latents_dtype = torch.float32
    # All linear layers: attention to video and text, feed-forward, embedders of time and text, and output.
    # The patches enter by a convolution in three dimensions.
    lora_targets = tuple(
        "to_q to_k to_v to_out.0 net.0.proj net.2 linear_1 linear_2 time_proj proj_out".split()
    )
    published = {
        "wan-2.1-1.3b": Published(
            WanTransformer3DModel, dict(num_attention_heads=12, ffn_dim=8960, num_layers=30), 8, 4
        ),
        "wan-2.1-14b": Published(
            WanTransformer3DModel, dict(num_attention_heads=40, ffn_dim=13824, num_layers=40), 8, 4
        ),
        "wan-2.2-ti2v-5b": Published(
            WanTransformer3DModel,
            dict(num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48),
            16,
            4,
        ),
    }

    def __init__(self, pipe: Any, *args: Any, **more: Any) -> None:
        if any(pipe.config.get("transformer_2") or ()):
            raise ValueError(
                "this pipeline has a second transformer (transformer_2, as Wan2.2-A14B), for times near the "
                "data, and a step of a student may cross from one to the other: take Wan 2.1 or "
                "Wan2.2-TI2V-5B"
            )
        super().__init__(pipe, *args, **more)

    def size_step(self, pipe: Any) -> int:
        """The pipeline asks for multiples of 16, whatever its VAE."""
        return math.lcm(16, super().size_step(pipe))

    @property
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of a caption's row, by name."""
        return {"tokens": (self.max_sequence_length, self.pipe.transformer.config.text_dim)}

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """The text inputs of n captions, on the CPU: tokens (n, L, D), zero behind a caption's end, which the
        network reads like the rest; and those of the negative prompt, empty_tokens, a view of one row."""
        tokens, _ = self.pipe.encode_prompt(
            [*captions, self.negative_prompt],
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return with_negative({"tokens": tokens.cpu()})

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, height, width), or with frames (n, F, 3, height, width), in [-1, 1] -> latents (n, C,
        frames, rows, columns), the mode of the VAE's posterior."""
        vae = self.pipe.vae
        parts = self.to_vae(images).to(vae.device, vae.dtype).split(together(self, len(images)))
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in parts])
        mean, std = channel_statistics(self.pipe.vae, latents)
        return (latents - mean) / std

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (n, C, frames, rows, columns) -> images (n, 3, height, width), or with frames (n, F, 3,
        height, width), in [-1, 1]."""
        vae = self.pipe.vae
        latents = latents.to(vae.dtype)
        mean, std = channel_statistics(self.pipe.vae, latents)
        parts = (latents * std + mean).split(together(self, len(latents)))
        return self.from_vae(torch.cat([vae.decode(part).sample for part in parts])).clamp(-1, 1)

    def velocity(
        self, transformer: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The velocity noise - data, (B, C, frames, rows, columns), guided where the scale is above 1.

        Wan2.2-TI2V-5B's pipeline hands each token its time, the same for all of a video made from text: one
        time for each example says that in a token's share of the memory.

        x: (B, C, frames, rows, columns). t: (B,) in [0, 1]. cond: tokens, empty_tokens, and guidance (B,)
        """

        def evaluate(both: Joined) -> torch.Tensor:
            tokens = both(cond["empty_tokens"], cond["tokens"])
            return transformer(
                hidden_states=both(x, x).to(tokens.dtype),
                timestep=1000 * both(t, t).float(),
                encoder_hidden_states=tokens,
                return_dict=False,
            )[0].to(x.dtype)

        return guided_velocity(evaluate, x, cond["guidance"])
