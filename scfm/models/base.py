"""What families of pipelines in diffusers' way share: the shift that their scheduler takes, and a call of the
pipeline that starts from given noise."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift


class PipelineFamily:
    """Base of a family: `dynamic_shift` and `sample_stock`. The rest of `scfm.models.check.CONTRACT` is the
    class's own."""

    pipe: Any
    height: int
    width: int
    max_sequence_length: int
    negative_prompt: str  # where uses_cfg holds
    uses_cfg: bool
    tokens: Any

    @property
    def dynamic_shift(self) -> float | None:
        """The stock pipeline's time shift at this size; None where its scheduler has a fixed one."""
        config = self.pipe.scheduler.config
        if not config.use_dynamic_shifting:
            return None
        return math.exp(
            calculate_shift(
                self.tokens,
                config.base_image_seq_len,
                config.max_image_seq_len,
                config.base_shift,
                config.max_shift,
            )
        )

    def forward_rows(self, cond: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """(rows,): which example each row of the network's forward is of; None where row i is of example i.

        Guided examples have two rows: `guided_velocity` puts those without captions first.
        """
        if not self.uses_cfg:
            return None
        guided = (cond["guidance"] > 1).nonzero().flatten()
        return torch.cat([guided, torch.arange(len(cond["guidance"]), device=guided.device)])

    def sample_stock(
        self,
        captions: Sequence[str],
        noise: torch.Tensor,
        steps: int,
        guidance: float,
        shift: float | None = None,
    ) -> torch.Tensor:
        """The stock pipeline's images, (n, 3, height, width) in [-1, 1], from the same noise.

        captions: n of them
        noise: (n, *latent_shape)
        steps: number of steps, on the plain grid, which is given as sigmas; the scheduler adds the shift
        guidance: guidance scale
        shift: the time shift; the scheduler's own when None
        """
        negative = {"negative_prompt": self.negative_prompt} if self.uses_cfg else {}
        with time_shift(self.pipe, shift):
            images = self.pipe(
                list(captions),
                height=self.height,
                width=self.width,
                num_inference_steps=steps,
                sigmas=[1 - i / steps for i in range(steps)],
                guidance_scale=guidance,
                latents=noise,
                max_sequence_length=self.max_sequence_length,
                output_type="pt",
                **negative,
            ).images
        return images * 2 - 1


@contextmanager
def time_shift(pipe: Any, shift: float | None) -> Iterator[None]:
    """Within the block the pipeline's scheduler has a fixed time shift; the one that it has when None."""
    scheduler = pipe.scheduler
    if shift is not None:  # set_shift would do nothing where the shift is dynamic
        pipe.scheduler = type(scheduler).from_config(
            scheduler.config, shift=shift, use_dynamic_shifting=False
        )
    try:
        yield
    finally:
        pipe.scheduler = scheduler
