"""Sana as a family."""

import math
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from diffusers import SanaPipeline, SanaTransformer2DModel

from scfm.models.base import PipelineFamily, Published, with_negative
from scfm.models.sd3 import Joined, guided_velocity

# What the pipeline puts before every caption when it is called, but not in its encode_prompt.
INSTRUCTION = signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


class Sana(PipelineFamily):
    """Sana 1.0 and 1.5 (not Sprint): all in which they differ from other families, for one image size."""

    pipeline_class = SanaPipeline
    uses_cfg = True
    patch = 1
    longest_text = 300
    time_dtype = torch.float32  # what the time embedding computes in, whatever the weights are
    latents_dtype = torch.float32
    call_settings = {"use_resolution_binning": False}  # else the size is another, and the image resized
    # All linear layers, and the convolutions of patches and feed-forward, where most weights are. Not
    # conv_depth: a LoRA of a grouped convolution would need a rank of as many as its channels.
    lora_targets = tuple(
        "to_q to_k to_v to_out.0 linear linear_1 linear_2 proj_out patch_embed.proj conv_inverted "
        "conv_point".split()
    )
    published = {"sana-1600m": Published(SanaTransformer2DModel, {}, 32)}

    def size_step(self, pipe: Any) -> int:
        """The pipeline asks for multiples of 32, whatever its VAE."""
        return math.lcm(32, pipe.vae_scale_factor)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one image: (C, rows, columns)."""
        return self.pipe.transformer.config.in_channels, *self.token_grid

    @property
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of a caption's row, by name."""
        length = self.max_sequence_length
        return {"tokens": (length, self.pipe.transformer.config.caption_channels), "mask": (length,)}

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """The text inputs of n captions, on the CPU: tokens (n, L, D) and their mask (n, L); and those of the
        negative prompt, which has no instruction, empty_tokens and empty_mask, views of one row."""
        both = ((list(captions), INSTRUCTION), ([self.negative_prompt], None))
        parts = [
            self.pipe.encode_prompt(
                texts,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
                complex_human_instruction=instruction,
            )[:2]
            for texts, instruction in both
        ]
        tokens, mask = (torch.cat(rows).cpu() for rows in zip(*parts, strict=True))
        return with_negative({"tokens": tokens, "mask": mask.bool()})

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, height, width) in [-1, 1] -> (n, C, rows, columns)."""
        vae = self.pipe.vae
        return vae.encode(images.to(vae.device, vae.dtype)).latent * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (n, C, rows, columns) -> images (n, 3, height, width) in [-1, 1]."""
        vae = self.pipe.vae
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample.clamp(-1, 1)

    def velocity(
        self, transformer: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The velocity noise - data, (B, C, rows, columns), guided where the guidance scale is above 1.

        x: (B, C, rows, columns). t: (B,) in [0, 1]. cond: tokens, mask, empty_tokens, empty_mask, and
        guidance (B,)
        """
        scale = 1000 * self.pipe.transformer.config.timestep_scale

        def evaluate(both: Joined) -> torch.Tensor:
            tokens = both(cond["empty_tokens"], cond["tokens"])
            return transformer(
                both(x, x).to(tokens.dtype),
                encoder_hidden_states=tokens,
                encoder_attention_mask=both(cond["empty_mask"], cond["mask"]).to(x.device),
                timestep=both(t, t).float() * scale,
                return_dict=False,
            )[0].to(x.dtype)

        return guided_velocity(evaluate, x, cond["guidance"])
