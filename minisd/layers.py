"""What every network here is made of: time embedding, residual block, attention, feed-forward, up and down."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def timestep_embedding(t: Float[Tensor, "b"], dim: int) -> Float[Tensor, "b dim"]:
    """Sinusoidal embedding of the time step, `[cos(t f) | sin(t f)]` with `f_i = 10000^(-i / (dim/2))`.

    `t` runs over 0..999 and may be fractional. (Vaswani et al. 2017, section 3.5; cosines first, as in Stable
    Diffusion.)
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResidualBlock(nn.Module):
    """`x + conv(silu(norm(conv(silu(norm(x))) + time)))`: two convolutions beside a shortcut (He et al. 2016).

    Between them the time embedding is added to every pixel (Ho et al. 2020, appendix B), unless `temb_dim` is None.
    The second convolution starts at zero, so that a fresh block passes `x` on unchanged.
    """

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, temb_dim: int | None = None, eps: float = 1e-5
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(temb_dim, out_channels) if temb_dim else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(
        self, x: Float[Tensor, "b c h w"], temb: Float[Tensor, "b e"] | None = None
    ) -> Float[Tensor, "b o h w"]:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time is not None:
            h = h + self.time(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Multi-head attention `softmax(q k^T / sqrt(d)) v` (Vaswani et al. 2017, equation 1).

    Queries come from `x`; keys and values from `context`, or from `x` itself (self-attention) when there is none.
    """

    def __init__(self, width: int, heads: int, context_dim: int | None = None, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=bias)
        self.k = nn.Linear(context_dim or width, width, bias=bias)
        self.v = nn.Linear(context_dim or width, width, bias=bias)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "b n c"], context: Float[Tensor, "b m e"] | None = None, causal: bool = False
    ) -> Float[Tensor, "b n c"]:
        context = x if context is None else context
        q, k, v = (
            proj(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # b heads tokens c/heads
            for proj, y in ((self.q, x), (self.k, context), (self.v, context))
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(h.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """`W2 (a * gelu(b))` with `[a | b] = W1 x`, four times as wide inside: GEGLU (Shazeer 2020, equation 6)."""

    def __init__(self, width: int):
        super().__init__()
        self.proj_in = nn.Linear(width, 8 * width)
        self.proj_out = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Look around the picture, look at the words, think: `x + self(x)`, `x + cross(x, context)`, `x + ff(x)`.

    With `cross_only` the first look, too, is at the words: the x4 upscaler saves the cost of pixels looking at pixels.
    """

    def __init__(self, width: int, heads: int, context_dim: int | None, cross_only: bool = False):
        super().__init__()
        self.cross_only = cross_only
        self.norm1 = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads, context_dim if cross_only else None)
        self.norm2 = nn.LayerNorm(width) if context_dim else None
        self.cross_attention = Attention(width, heads, context_dim) if context_dim else None
        self.norm3 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width)

    def forward(
        self, x: Float[Tensor, "b n c"], context: Float[Tensor, "b m e"] | None = None
    ) -> Float[Tensor, "b n c"]:
        x = x + self.self_attention(self.norm1(x), context if self.cross_only else None)
        if self.cross_attention is not None:
            x = x + self.cross_attention(self.norm2(x), context)
        return x + self.feed_forward(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map, each pixel a token (Rombach et al. 2022, section 3.3).

    `proj_in` and `proj_out` are 1x1 convolutions in the files of Stable Diffusion v1: the same numbers as a Linear.
    """

    def __init__(self, width: int, heads: int, context_dim: int | None, groups: int, cross_only: bool = False):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width)
        self.block = TransformerBlock(width, heads, context_dim, cross_only)
        self.proj_out = nn.Linear(width, width)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(
        self, x: Float[Tensor, "b c h w"], context: Float[Tensor, "b m e"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        h = self.norm(x).flatten(2).transpose(1, 2)  # b c h w -> b (h w) c
        h = self.proj_out(self.block(self.proj_in(h), context))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])  # b (h w) c -> b c h w


class Downsample(nn.Module):
    """Halve height and width by a convolution of stride 2.

    The U-Net pads one pixel on every side; the autoencoder (`one_sided`) only on the right and at the bottom.
    """

    def __init__(self, channels: int, one_sided: bool = False):
        super().__init__()
        self.padding = (0, 1, 0, 1) if one_sided else (1, 1, 1, 1)
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.pad(x, self.padding))


class Upsample(nn.Module):
    """Repeat every pixel, then smooth by a convolution. `size` is for sides that were odd on the way down."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"], size: tuple[int, int] | None = None) -> Float[Tensor, "b c h2 w2"]:
        height, width = x.shape[-2:]
        return self.conv(F.interpolate(x, size=size or (2 * height, 2 * width), mode="nearest"))
