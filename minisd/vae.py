"""The autoencoder between pictures and latents (Kingma & Welling 2014; Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .config import VAEConfig
from .layers import Attention, Downsample, ResidualBlock, Upsample

EPS = 1e-6  # of every GroupNorm in the autoencoder


@dataclass(frozen=True)
class Gaussian:
    """What the encoder returns: for every latent number a mean and a log variance."""

    mean: Float[Tensor, "b c h w"]
    logvar: Float[Tensor, "b c h w"]

    def sample(self, noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """`mean + exp(logvar / 2) * noise` for unit normal noise: the reparametrisation (Kingma & Welling, eq. 4)."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Float[Tensor, "b"]:
        """Divergence from the unit normal in nats, summed over each latent: `sum (mean^2 + var - 1 - logvar) / 2`."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))


class PixelAttention(nn.Module):
    """Self-attention with a single head over all places of a feature map, beside a shortcut."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.attention = Attention(channels, heads=1, bias=True)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        return x + self.attention(tokens).transpose(1, 2).view_as(x)


def middle(channels: int, groups: int) -> nn.Sequential:
    """Residual, attention, residual: the lowest part of both halves."""
    return nn.Sequential(
        ResidualBlock(channels, channels, groups, eps=EPS),
        PixelAttention(channels, groups),
        ResidualBlock(channels, channels, groups, eps=EPS),
    )


class Encoder(nn.Module):
    """Picture to feature map with `2 * latent_channels` channels: means and log variances."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.conv_in = nn.Conv2d(config.image_channels, config.widths[0], 3, padding=1)
        self.down = nn.Sequential()
        channels = config.widths[0]
        for level, width in enumerate(config.widths):
            for _ in range(config.blocks):
                self.down.append(ResidualBlock(channels, width, config.groups, eps=EPS))
                channels = width
            if level < len(config.widths) - 1:
                self.down.append(Downsample(channels, one_sided=True))
        self.middle = middle(channels, config.groups)
        self.norm_out = nn.GroupNorm(config.groups, channels, eps=EPS)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b z2 h8 w8"]:
        h = self.middle(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latent to picture: the encoder run backwards, with one more residual block a level."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels = config.widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.middle = middle(channels, config.groups)
        self.up = nn.Sequential()
        for level, width in reversed(list(enumerate(config.widths))):
            for _ in range(config.blocks + 1):
                self.up.append(ResidualBlock(channels, width, config.groups, eps=EPS))
                channels = width
            if level:
                self.up.append(Upsample(channels))
        self.norm_out = nn.GroupNorm(config.groups, channels, eps=EPS)
        self.conv_out = nn.Conv2d(channels, config.image_channels, 3, padding=1)

    def forward(self, z: Float[Tensor, "b z h8 w8"]) -> Float[Tensor, "b c h w"]:
        h = self.up(self.middle(self.conv_in(z)))
        return self.conv_out(F.silu(self.norm_out(h)))


class VAE(nn.Module):
    """Pictures in [-1, 1] to latents `config.factor` times smaller a side, and back."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def posterior(self, image: Float[Tensor, "b c h w"]) -> Gaussian:
        """The Gaussian over unscaled latents, in float32; log variances are clamped to [-30, 20] as in the original."""
        mean, logvar = self.quant(self.encoder(image)).float().chunk(2, dim=1)
        return Gaussian(mean, logvar.clamp(-30.0, 20.0))

    def reconstruct(self, z: Float[Tensor, "b z h8 w8"]) -> Float[Tensor, "b c h w"]:
        """Unscaled latents to pictures, not clamped: what training compares with the input."""
        return self.decoder(self.post_quant(z))

    def encode(
        self, image: Float[Tensor, "b c h w"], noise: Float[Tensor, "b z h8 w8"] | None = None
    ) -> Float[Tensor, "b z h8 w8"]:
        """Scaled latent of deviation about 1: a sample if `noise` is given, else the mean."""
        posterior = self.posterior(image)
        return self.config.scaling * (posterior.mean if noise is None else posterior.sample(noise))

    def decode(self, z: Float[Tensor, "b z h8 w8"]) -> Float[Tensor, "b c h w"]:
        """Picture in [-1, 1] of a scaled latent."""
        return self.reconstruct(z / self.config.scaling).clamp(-1, 1)
