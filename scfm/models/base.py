"""What families of pipelines in diffusers' way share: the shift that their scheduler takes, and a call of the
pipeline that starts from given noise."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from inspect import signature
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from scfm.models.comfyui_names import ComfyNames


class Published(NamedTuple):
    """The transformer of a published checkpoint, so that a run can be planned and nothing need be downloaded.

    settings: of its configuration. vae_scale_factor: pixels to a latent, a side; vae_scale_factor_temporal:
    frames to one of its latents
    """

    transformer_class: Any
    settings: Mapping[str, Any]
    vae_scale_factor: int = 8
    vae_scale_factor_temporal: int = 1


class PipelineFamily:
    """Base of a family: `dynamic_shift` and `sample_stock`, and what most share. The rest of
    `scfm.models.check.CONTRACT` is the class's own.

    pipe: the stock pipeline, of the class `pipeline_class`
    height, width: of the images, in pixels
    max_sequence_length: of the text, in tokens
    negative_prompt: where `uses_cfg` holds, empty as a rule

    What a family may say beside: `patch`, latents to a token, a side; `longest_text`, in tokens;
    `call_settings`, further arguments of every call of its pipeline; `output`, under which what the call
    returns has the images; `latents_dtype`, of the noise that the
    pipeline takes where that is not its own dtype; `published`; `comfyui_names`, where ComfyUI runs it.

    ValueError for a size that does not fit the VAE and the patches, and for a length that does not fit.
    """

    pipe: Any
    pipeline_class: ClassVar[Any]  # of a family: the base class has none
    negative_prompt: str  # where uses_cfg holds
    uses_cfg: bool
    extra_text_tokens: int = 0
    patch: int = 2
    longest_text: int = 512
    call_settings: Mapping[str, Any] = {}
    output: str = "images"
    latents_dtype: torch.dtype | None = None
    published: ClassVar[dict[str, Published]] = {}
    comfyui_names: ClassVar[ComfyNames | None] = None

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
        return self.patch * spatial_factor(pipe)

    @property
    def token_grid(self) -> tuple[int, int]:
        """Image tokens down and across."""
        side = self.patch * spatial_factor(self.pipe)
        return self.height // side, self.width // side

    @property
    def tokens(self) -> int:
        """Image tokens of one image."""
        return self.token_grid[0] * self.token_grid[1]

    @staticmethod
    def vae_factor(config: Mapping[str, Any]) -> int:
        """Pixels to a latent, a side, by the configuration of a VAE. ValueError where it does not say."""
        for name in ("scale_factor_spatial", "spatial_compression_ratio"):
            if config.get(name):
                return config[name]
        if "spatio_temporal_scaling" in config:  # of LTX, whose first layer takes patches
            return config["patch_size"] * 2 ** sum(config["spatio_temporal_scaling"])
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
        guidance: float | None,
        grid: bool = True,
        output_type: str = "pt",
    ) -> torch.Tensor:
        """What the stock pipeline gives for captions from noise, (n, 3, height, width) in [0, 1], or latents
        for `output_type` "latent".

        guidance: the guidance scale; None: the pipeline's own default, and no negative prompt
        grid: hand it the plain grid, to which its scheduler adds the shift; else it has its own
        """
        arguments = {}
        if guidance is not None:
            arguments = self.guidance_of_batch(guidance, len(captions), getattr(self, "negative_prompt", ""))
        with plain_grid(self.pipe, steps) if grid else nullcontext({}) as sigmas:
            output = self.pipe(
                prompt=list(captions),
                num_inference_steps=steps,
                latents=self.stock_noise(noise),
                max_sequence_length=self.max_sequence_length,
                output_type=output_type,
                **self.size_arguments(),
                **sigmas,
                **arguments,
                **self.call_settings,
            )
        return self.images_of(output, output_type == "latent")

    def size_arguments(self) -> dict[str, Any]:
        """The arguments of the stock pipeline's call that say how large the image is."""
        return {"height": self.height, "width": self.width}

    def images_of(self, output: Any, is_latent: bool = False) -> torch.Tensor:
        """The images, or the latents, in what the stock pipeline returns."""
        return getattr(output, self.output)

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
        steps: number of steps, on the plain grid (`plain_grid`); the scheduler adds the shift
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


def spatial_factor(pipe: Any) -> int:
    """Pixels to a latent, a side: as we have read it from the VAE's configuration where the pipeline was
    loaded, else as the pipeline says it."""
    known = getattr(pipe, "vae_scale_factor", None)
    return pipe.vae_scale_factor_spatial if known is None else known


def takes_sigmas(pipeline_class: type) -> bool:
    """Whether a pipeline's call can be given its grid."""
    return "sigmas" in signature(pipeline_class.__call__).parameters


@contextmanager
def plain_grid(pipe: Any, steps: int) -> Iterator[dict[str, Any]]:
    """Within the block the pipeline's scheduler, one of Euler steps, makes them on the grid 1, 1 - 1/n, ...,
    1/n, to which it adds its shift. Gives the arguments of the call that say so.

    A pipeline that takes no sigmas (Wan) leaves the grid to its scheduler, which spaces its times evenly
    between bounds that it has shifted already, and shifts them again: the bounds are set to 1 and 1/n.
    """
    if takes_sigmas(type(pipe)):
        yield {"sigmas": [1 - i / steps for i in range(steps)]}
        return
    scheduler = pipe.scheduler
    bounds = scheduler.sigma_max, scheduler.sigma_min
    scheduler.sigma_max, scheduler.sigma_min = 1.0, 1 / steps
    try:
        yield {}
    finally:
        scheduler.sigma_max, scheduler.sigma_min = bounds


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


def channel_statistics(vae: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation, (C, 1, 1, 1) each, of the channels of a VAE whose latents have frames, as
    its configuration says them; in the dtype of `latents`, on their device.
    """
    mean, std = latents.new_tensor([vae.config.latents_mean, vae.config.latents_std]).view(2, -1, 1, 1, 1)
    return mean, std
