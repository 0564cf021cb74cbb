"""The autoencoder between pictures and latents (Kingma & Welling 2014; Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from . import checks
from .config import VAEConfig
from .layers import Attention, Downsample, ResidualBlock, Upsample

EPS = 1e-6  # of every GroupNorm in the autoencoder
TILES = 4, 2**16  # the smallest and the largest side of a tile, in latent cells


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


def ordered(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """The same numbers in the order in memory that suits them, which all layers keep.

    In half precision a pixel's channels stand side by side, which saves a CPU an eighth of the time. In float32 they
    don't: there PyTorch's group norms are ten times less exact so (1e-4 from float64 at 512 x 512, not 1e-5).
    """
    return x if x.dtype.itemsize > 2 else x.contiguous(memory_format=torch.channels_last)


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
        h = self.middle(self.down(self.conv_in(ordered(x))))
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
        h = self.up(self.middle(self.conv_in(ordered(z))))
        return self.conv_out(F.silu(self.norm_out(h)))


def windows(cells: int, tile: int, scale: int) -> list[tuple[int, int, Float[Tensor, "n"]]]:
    """Where tiles begin and end along a side, and what each counts for at every one of its pixels, `scale` a cell.

    Neighbours share at least a quarter of a tile. There one fades out linearly as the other fades in; everywhere the
    tiles count for 1 together.
    """
    overlap = tile // 4
    count = math.ceil(max(cells - tile, 0) / (tile - overlap)) + 1
    tile = min(tile, cells)
    starts = [round(i * (cells - tile) / max(count - 1, 1)) for i in range(count)]
    from_edge = torch.arange(tile * scale) + 0.5
    fade = torch.minimum(from_edge, from_edge.flip(0)).clamp(max=overlap * scale)
    weights = torch.zeros(count, cells * scale)
    for row, start in zip(weights, starts, strict=True):
        row[start * scale : (start + tile) * scale] = fade
    weights /= weights.sum(dim=0)
    return [(i, i + tile, row[i * scale : (i + tile) * scale]) for i, row in zip(starts, weights, strict=True)]


@contextmanager
def fixed_norms(network: nn.Module, x: Float[Tensor, "1 c h w"]) -> Iterator[None]:
    """Within it, every GroupNorm of a network scales and shifts as it does when `x` goes through.

    A tile of plain sky has another mean and deviation than the picture it is part of; normed by its own it would come
    out in other colours than its neighbours.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    fixed = {}

    def record(norm: nn.GroupNorm, inputs: tuple[Tensor]) -> None:
        channels = norm.num_channels // norm.num_groups
        grouped = inputs[0].unflatten(1, (norm.num_groups, channels))
        variance, mean = torch.var_mean(grouped, dim=(2, 3, 4), correction=0)
        scale = norm.weight * torch.rsqrt(variance + norm.eps).repeat_interleave(channels, dim=1)
        shift = norm.bias - scale * mean.repeat_interleave(channels, dim=1)
        fixed[norm] = scale[..., None, None], shift[..., None, None]

    def replay(norm: nn.GroupNorm, inputs: tuple[Tensor], _: Tensor) -> Tensor:
        scale, shift = fixed[norm]
        return torch.addcmul(shift, scale, inputs[0])

    with ExitStack() as hooks:
        for norm in norms:
            hooks.enter_context(norm.register_forward_pre_hook(record))
        network(x)
    with ExitStack() as hooks:
        for norm in norms:
            hooks.enter_context(norm.register_forward_hook(replay))
        yield


def tiled(
    network: nn.Module, x: Float[Tensor, "b c h w"], tile: int | None, cell_in: int, cell_out: int
) -> Float[Tensor, "b d h2 w2"]:
    """`network(x)` from overlapping squares of one picture at a time: it takes the memory of one square.

    A square is `tile` latent cells a side, where a cell is `cell_in` pixels a side of `x` and `cell_out` of the result.
    A picture that fits into a square isn't cut; with `tile` None nothing is, and the batch goes through at once.
    What is cut comes out nearly the same, not equal: attention sees a square where it saw everything, and the norms are
    those of the picture made as small as a square.
    """
    if tile is None:
        return network(x)
    tile = checks.integer("tile", tile, *TILES)
    height, width = (side // cell_in for side in x.shape[-2:])
    longest = max(height, width)
    if longest <= tile:
        return torch.cat([network(picture) for picture in x.split(1)])
    size = [max(1, side * tile // longest) * cell_in for side in (height, width)]
    pictures = []
    for picture in x.split(1):
        whole = torch.zeros(())
        # every n-th pixel: an average would be smoother than the picture, and so vary less
        with fixed_norms(network, F.interpolate(picture, size=size, mode="nearest")):
            for top, bottom, down in windows(height, tile, cell_out):
                for left, right, across in windows(width, tile, cell_out):
                    rows, columns = slice(top * cell_in, bottom * cell_in), slice(left * cell_in, right * cell_in)
                    square = network(picture[..., rows, columns])
                    square = square * down[:, None].to(square) * across.to(square)
                    around = (left, width - right, top, height - bottom)
                    whole = whole + F.pad(square, [cell_out * cells for cells in around])
        pictures.append(whole)
    return torch.cat(pictures)


class VAE(nn.Module):
    """Pictures in [-1, 1] to latents `config.factor` times smaller a side, and back."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def posterior(self, image: Float[Tensor, "b c h w"], tile: int | None = None) -> Gaussian:
        """The Gaussian over unscaled latents, in float32; log variances are clamped to [-30, 20] as in the original."""
        moments = self.quant(tiled(self.encoder, image, tile, self.config.factor, 1))
        mean, logvar = moments.float().chunk(2, dim=1)
        return Gaussian(mean, logvar.clamp(-30.0, 20.0))

    def reconstruct(self, z: Float[Tensor, "b z h8 w8"], tile: int | None = None) -> Float[Tensor, "b c h w"]:
        """Unscaled latents to pictures, not clamped: what training compares with the input."""
        return tiled(self.decoder, self.post_quant(z), tile, 1, self.config.factor)

    def encode(
        self,
        image: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b z h8 w8"] | None = None,
        tile: int | None = None,
    ) -> Float[Tensor, "b z h8 w8"]:
        """Scaled latent of deviation about 1: a sample if `noise` is given, else the mean.

        `tile`, a number of latent cells, bounds memory: see `tiled`.
        """
        posterior = self.posterior(image, tile)
        return self.config.scaling * (posterior.mean if noise is None else posterior.sample(noise))

    def decode(self, z: Float[Tensor, "b z h8 w8"], tile: int | None = None) -> Float[Tensor, "b c h w"]:
        """Picture in [-1, 1] of a scaled latent. `tile`, a number of latent cells, bounds memory: see `tiled`."""
        return self.reconstruct(z / self.config.scaling, tile).clamp(-1, 1)
