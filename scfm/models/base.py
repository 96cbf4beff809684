"""What families of pipelines in diffusers' way share: the shift that their scheduler takes, and a call of the
pipeline that starts from given noise."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift


class Published(NamedTuple):
    """The transformer of a published checkpoint, so that a run can be planned and nothing need be downloaded.

    settings: of its configuration. vae_scale_factor: pixels to a latent, a side
    """

    transformer_class: Any
    settings: Mapping[str, Any]
    vae_scale_factor: int = 8


class PipelineFamily:
    """Base of a family: `dynamic_shift` and `sample_stock`, and what most share. The rest of
    `scfm.models.check.CONTRACT` is the class's own.

    pipe: the stock pipeline, of the class `pipeline_class`
    height, width: of the images, in pixels
    max_sequence_length: of the text, in tokens
    negative_prompt: where `uses_cfg` holds, empty as a rule

    What a family may say beside: `patch`, latents to a token, a side; `longest_text`, in tokens;
    `call_settings`, further arguments of every call of its pipeline; `latents_dtype`, of the noise that the
    pipeline takes where that is not its own dtype; `published`.

    ValueError for a size that does not fit the VAE and the patches, and for a length that does not fit.
    """

    pipe: Any
    negative_prompt: str  # where uses_cfg holds
    uses_cfg: bool
    extra_text_tokens: int = 0
    patch: int = 2
    longest_text: int = 512
    call_settings: Mapping[str, Any] = {}
    latents_dtype: torch.dtype | None = None
    published: ClassVar[dict[str, Published]] = {}

    def __init__(
        self, pipe: Any, height: int, width: int, max_sequence_length: int = 512, negative_prompt: str = ""
    ) -> None:
        step = self.size_step(pipe)
        if height % step or width % step or height < step or width < step:
            raise ValueError(
                f"{height} x {width} pixels do not divide into patches of {step}: take multiples of {step}"
            )
        if not 1 <= max_sequence_length <= self.longest_text:
            raise ValueError(
                f"max_sequence_length is {max_sequence_length}: the pipeline takes 1 to {self.longest_text}"
            )
        self.pipe, self.height, self.width = pipe, height, width
        self.max_sequence_length, self.negative_prompt = max_sequence_length, negative_prompt

    def size_step(self, pipe: Any) -> int:
        """Pixels that height and width are multiples of."""
        return self.patch * pipe.vae_scale_factor

    @property
    def token_grid(self) -> tuple[int, int]:
        """Image tokens down and across."""
        side = self.patch * self.pipe.vae_scale_factor
        return self.height // side, self.width // side

    @property
    def tokens(self) -> int:
        """Image tokens of one image."""
        return self.token_grid[0] * self.token_grid[1]

    @staticmethod
    def vae_factor(config: Mapping[str, Any]) -> int:
        """Pixels to a latent, a side, by the configuration of a VAE. ValueError where it does not say."""
        if "scale_factor_spatial" in config:
            return config["scale_factor_spatial"]
        if "temperal_downsample" in config:  # as diffusers spells it
            return 2 ** len(config["temperal_downsample"])
        blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels")
        if not blocks:
            raise ValueError("the VAE's configuration has no block_out_channels, so its scale is unknown")
        return 2 ** (len(blocks) - 1)

    @property
    def dynamic_shift(self) -> float | None:
        """The stock pipeline's time shift at this size; None where its scheduler has a fixed one."""
        config = self.pipe.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return None
        mu = calculate_shift(
            self.tokens,
            config.base_image_seq_len,
            config.max_image_seq_len,
            config.base_shift,
            config.max_shift,
        )
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)

    @property
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a caption's row of `encode_text`, by name, without those of the negative prompt; a mask
        is boolean. Of Flux and SD3: tokens and a pooled vector."""
        shape = self.pipe.transformer.config
        length = self.max_sequence_length + self.extra_text_tokens
        return {"tokens": (length, shape.joint_attention_dim), "pooled": (shape.pooled_projection_dim,)}

    def forward_rows(self, cond: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """(rows,): which example each row of the network's forward is of; None where row i is of example i.

        Guided examples have two rows: `guided_velocity` puts those without captions first.
        """
        if not self.uses_cfg:
            return None
        guided = (cond["guidance"] > 1).nonzero().flatten()
        return torch.cat([guided, torch.arange(len(cond["guidance"]), device=guided.device)])

    @classmethod
    def guidance_arguments(cls, scale: float, negative_prompt: str = "") -> dict[str, Any]:
        """The arguments of the stock pipeline's call that say a guidance scale, as users give them."""
        negative = {"negative_prompt": negative_prompt} if negative_prompt else {}
        return {**negative, "guidance_scale": scale}

    @classmethod
    def guidance_of_batch(cls, scale: float, n: int, negative_prompt: str = "") -> dict[str, Any]:
        """`guidance_arguments` of a call with n captions, which has a list of negative prompts."""
        arguments = cls.guidance_arguments(scale, negative_prompt)
        lists = {name: [text] * n for name, text in arguments.items() if name == "negative_prompt"}
        return {**arguments, **lists}

    def stock_noise(self, noise: torch.Tensor) -> torch.Tensor:
        """Noise (n, *latent_shape) as the stock pipeline takes it."""
        return noise.to(self.pipe.device, self.latents_dtype or self.pipe.dtype)

    def latents_from_stock(self, latents: torch.Tensor) -> torch.Tensor:
        """What the stock pipeline returns as latents, as (n, *latent_shape)."""
        return latents

    def call_stock(
        self,
        captions: Sequence[str],
        noise: torch.Tensor,
        steps: int,
        guidance: float,
        grid: bool = True,
        output_type: str = "pt",
    ) -> torch.Tensor:
        """What the stock pipeline gives for captions from noise, (n, 3, height, width) in [0, 1], or latents
        for `output_type` "latent".

        grid: hand it the plain grid as sigmas, to which its scheduler adds the shift; else it has its own
        """
        arguments = self.guidance_of_batch(guidance, len(captions), getattr(self, "negative_prompt", ""))
        if grid:
            arguments["sigmas"] = [1 - i / steps for i in range(steps)]
        return self.pipe(
            prompt=list(captions),
            height=self.height,
            width=self.width,
            num_inference_steps=steps,
            latents=self.stock_noise(noise),
            max_sequence_length=self.max_sequence_length,
            output_type=output_type,
            **arguments,
            **self.call_settings,
        ).images

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
        with time_shift(self.pipe, shift):
            return self.call_stock(captions, noise, steps, guidance) * 2 - 1


def with_negative(rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Text inputs (n + 1, ...) whose last row is the negative prompt's: those of n captions, and under
    "empty_" + name views of that row, (n, ...)."""
    captions = {name: part[:-1] for name, part in rows.items()}
    empty = {f"empty_{name}": part[-1:].expand_as(part[:-1]) for name, part in rows.items()}
    return {**captions, **empty}


def scheduler_shift(scheduler: Any) -> float:
    """The fixed time shift of a scheduler, whatever its class calls it."""
    config = scheduler.config
    return scheduler.shift if hasattr(scheduler, "shift") else config.get("flow_shift") or 1.0


def is_plain(scheduler: Any) -> bool:
    """Whether a scheduler takes a grid of sigmas as it is, but for its shift.

    Others replace it (UniPC, DPM-Solver), or stretch it to end at `shift_terminal`, which makes the grid of
    one step nan.
    """
    config: Any = scheduler.config
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not config.shift_terminal


@contextmanager
def time_shift(pipe: Any, shift: float | None) -> Iterator[None]:
    """Within the block the pipeline's scheduler takes Euler steps on the grid that it is given.

    shift: its fixed time shift; None: the scheduler's own, by the image's size where it has it so
    """
    scheduler = pipe.scheduler
    fixed = {} if shift is None else {"shift": shift, "use_dynamic_shifting": False}
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(**{"shift": scheduler_shift(scheduler), **fixed})
    elif fixed or not is_plain(scheduler):  # set_shift would do nothing where the shift is dynamic
        pipe.scheduler = type(scheduler).from_config(scheduler.config, shift_terminal=None, **fixed)
    try:
        yield
    finally:
        pipe.scheduler = scheduler
