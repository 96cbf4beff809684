"""What families of video pipelines share: frames beside rows and columns. One frame is an image."""

from typing import Any

import torch

from scfm.models.base import PipelineFamily


class VideoFamily(PipelineFamily):
    """Base of a family whose latents are (C, frames, rows, columns).

    num_frames: of a video, 1 more than a multiple of the frames to one of the VAE's latents, so that the
        first has a latent of its own. Videos are (n, F, 3, height, width); with one frame they are images as
        everywhere, (n, 3, height, width), and F is 1 in the latents alone.

    ValueError for another number.
    """

    makes_videos = True
    output = "frames"
    frames_to_latent = 4  # where there is nothing that says otherwise

    def __init__(
        self,
        pipe: Any,
        height: int,
        width: int,
        max_sequence_length: int = 512,
        negative_prompt: str = "",
        num_frames: int = 1,
    ) -> None:
        super().__init__(pipe, height, width, max_sequence_length, negative_prompt)
        every = self.temporal_factor
        if num_frames < 1 or (num_frames - 1) % every:
            near = max(num_frames - 1, 0) // every * every + 1
            raise ValueError(
                f"num_frames is {num_frames}: this pipeline makes 1, {1 + every}, {1 + 2 * every}, ... "
                f"frames: take {near} or {near + every}"
            )
        self.num_frames = num_frames

    @property
    def temporal_factor(self) -> int:
        """Frames to one of the VAE's latents."""
        return getattr(self.pipe, "vae_scale_factor_temporal", self.frames_to_latent)

    @property
    def latent_frames(self) -> int:
        """Frames of latents."""
        return (self.num_frames - 1) // self.temporal_factor + 1

    @property
    def tokens(self) -> int:
        """Tokens of one video; a token is of one latent frame."""
        return self.latent_frames * super().tokens

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one video: (C, frames, rows, columns)."""
        rows, columns = self.token_grid
        channels = self.pipe.transformer.config.in_channels
        return channels, self.latent_frames, self.patch * rows, self.patch * columns

    def size_arguments(self) -> dict[str, Any]:
        """The arguments of the stock pipeline's call that say how large the video is."""
        return {**super().size_arguments(), "num_frames": self.num_frames}

    def images_of(self, output: Any, is_latent: bool = False) -> torch.Tensor:
        """The videos, images for one frame, or the latents, in what the stock pipeline returns."""
        frames = super().images_of(output)
        return frames[:, 0] if self.num_frames == 1 and not is_latent else frames

    def to_vae(self, images: torch.Tensor) -> torch.Tensor:
        """Images (n, 3, H, W) or videos (n, F, 3, H, W), as the VAE takes them: (n, 3, F, H, W)."""
        return images[:, :, None] if images.ndim == 4 else images.transpose(1, 2)

    def from_vae(self, frames: torch.Tensor) -> torch.Tensor:
        """What the VAE gives, (n, 3, F, H, W), as images where there is one frame, else as videos."""
        return frames[:, :, 0] if self.num_frames == 1 else frames.transpose(1, 2)


def frame_options(family_class: Any, num_frames: int) -> dict[str, Any]:
    """What a family is made with for so many frames. ValueError where it makes images."""
    if num_frames == 1:
        return {}
    if not getattr(family_class, "makes_videos", False):
        raise ValueError(
            f"num_frames is {num_frames}, and {family_class.__name__} makes images: leave it out"
        )
    return {"num_frames": num_frames}
