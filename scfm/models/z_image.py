"""Z-Image as a family."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel

from scfm.models.base import PipelineFamily, Published, with_negative
from scfm.models.comfyui_names import Z_IMAGE
from scfm.models.sd3 import SD3, Joined, guided_velocity


class ZImage(PipelineFamily):
    """Z-Image (the base, not Turbo): all in which it differs from other families, for one image size."""

    pipeline_class = ZImagePipeline
    comfyui_names = Z_IMAGE
    uses_cfg = True
    time_dtype = torch.float32  # what the time embedding computes in, whatever the weights are
    latents_dtype = torch.float32
    published = {"z-image": Published(ZImageTransformer2DModel, {})}

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """All linear layers but the two that embed the tokens of image and text, which get those of all
        examples in one row, where an example's own LoRA scale has no place. Modulations by their numbers, as
        the last layer's begins with an activation."""
        config = self.pipe.transformer.config
        counts = {"layers": config.n_layers, "noise_refiner": config.n_refiner_layers}
        blocks = [f"{name}.{i}" for name, count in counts.items() for i in range(count)]
        endings = "to_q to_k to_v to_out.0 w1 w2 w3 adaLN_modulation.1 linear mlp.0 mlp.2".split()
        return (*endings, *(f"{block}.adaLN_modulation.0" for block in blocks))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one image: (C, rows, columns)."""
        rows, columns = self.token_grid
        return self.pipe.transformer.config.in_channels, self.patch * rows, self.patch * columns

    @property
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of a caption's row, by name."""
        length = self.max_sequence_length
        return {"tokens": (length, self.pipe.transformer.config.cap_feat_dim), "mask": (length,)}

    @classmethod
    def guidance_arguments(cls, scale: float, negative_prompt: str = "") -> dict[str, Any]:
        """The pipeline counts from 0: caption + g (caption - negative)."""
        return super().guidance_arguments(max(scale - 1, 0.0), negative_prompt)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """The text inputs of n captions, on the CPU: tokens (n, L, D), zero behind a caption's end, and their
        mask (n, L); and those of the negative prompt, empty_tokens and empty_mask, views of one row."""
        length = self.max_sequence_length
        rows, _ = self.pipe.encode_prompt(
            [*captions, self.negative_prompt], do_classifier_free_guidance=False, max_sequence_length=length
        )
        tokens = torch.stack([torch.nn.functional.pad(row, (0, 0, 0, length - len(row))) for row in rows])
        mask = torch.arange(length) < torch.tensor([[len(row)] for row in rows])
        return with_negative({"tokens": tokens.cpu(), "mask": mask})

    encode_images, decode = SD3.encode_images, SD3.decode  # the same normalisation of latents

    def velocity(
        self, transformer: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The velocity noise - data, (B, C, rows, columns), guided where the guidance scale is above 1.

        The network's time runs from noise to data, and so does its output. Captions enter without their
        padding, for the image's positions begin behind a caption's last token.

        x: (B, C, rows, columns). t: (B,) in [0, 1]. cond: tokens, mask, empty_tokens, empty_mask, and
        guidance (B,)
        """

        def evaluate(both: Joined) -> torch.Tensor:
            tokens = both(cond["empty_tokens"], cond["tokens"])
            lengths = both(cond["empty_mask"], cond["mask"]).sum(1).tolist()
            out = transformer(
                list(both(x, x).to(tokens.dtype)[:, :, None]),  # one frame each
                1 - both(t, t).float(),
                [row[:length] for row, length in zip(tokens, lengths, strict=True)],
                return_dict=False,
            )[0]
            return -torch.stack(out)[:, :, 0].to(x.dtype)

        return guided_velocity(evaluate, x, cond["guidance"])
