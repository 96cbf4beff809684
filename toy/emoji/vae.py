"""The VAE of the emoji: factor 4, 8 latent channels, so 64 packed tokens of 32 numbers for 64 x 64 pixels."""

import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from toy.emoji.data import SIDE

KL = 1e-3  # weight of the KL divergence, per pixel: it keeps latents bounded, no more


def build_vae(
    channels: tuple[int, ...] = (32, 64, 64), latent_channels: int = 8, layers: int = 1
) -> AutoencoderKL:
    """An AutoencoderKL of factor 2 ** (len(channels) - 1)."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        block_out_channels=list(channels),
        layers_per_block=layers,
        latent_channels=latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=SIDE,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def to_floats(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 -> [-1, 1], channels last, which convolutions on a CPU prefer."""
    return (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def pyramid_loss(made: torch.Tensor, images: torch.Tensor, levels: int = 4) -> torch.Tensor:
    """L1 over pixels, and over the edges at each of `levels` sizes: what is sharp must stay sharp.

    made, images: (B, 3, H, W)
    """
    error = made - images  # edges are linear: those of the difference are the difference of the edges
    loss = error.abs().mean()
    for _ in range(levels):
        loss = loss + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        error = F.avg_pool2d(error, 2)
    return loss


def vae_loss(vae: torch.nn.Module, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """images: (B, 3, H, W) in [-1, 1]; noise: of the latents' shape, for the posterior's sample."""
    posterior = vae.encode(images).latent_dist
    made = vae.decode(posterior.mean + posterior.std * noise).sample.float()
    squares = F.mse_loss(made, images)
    return pyramid_loss(made, images) + squares + KL * posterior.kl().float().mean() / SIDE**2


def decoder_loss(vae: torch.nn.Module, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The reconstruction of latents with a little noise, as a transformer's are not exact either."""
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(images.device)
        latents = posterior.mean + posterior.std * noise
    made = vae.decode(latents).sample.float()
    return pyramid_loss(made, images) + F.mse_loss(made, images)


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """uint8 (n, 3, H, W) -> latents (n, C, h, w), the posterior's mean, neither shifted nor scaled."""
    means = [
        vae.encode(to_floats(p).to(vae.device)).latent_dist.mean.float().cpu() for p in pixels.split(batch)
    ]
    return torch.cat(means)


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: torch.Tensor, batch: int = 64) -> float:
    """Of the reconstructions, in dB: the mean over images, at a range of values of 1."""
    errors = []
    for p in pixels.split(batch):
        images = to_floats(p).to(vae.device)
        made = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
        errors.append(((made - images) / 2).square().mean((1, 2, 3)))
    return (-10 * torch.cat(errors).log10()).mean().item()


def scale_latents(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """Sets the shift and the scaling factor with which these latents have mean 0 and deviation 1."""
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4)
    )
