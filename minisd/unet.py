"""The noise predictor: a U-Net whose feature maps also look at the prompt (Rombach et al. 2022, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .config import UNetConfig
from .layers import Downsample, ResidualBlock, SpatialTransformer, Upsample, timestep_embedding


class Block(nn.Module):
    """One rung of the U: a residual block told the time, then, at most levels, a transformer told the prompt."""

    def __init__(
        self, in_channels: int, out_channels: int, config: UNetConfig, attention: bool, cross_only: bool = False
    ):
        super().__init__()
        self.residual = ResidualBlock(in_channels, out_channels, config.groups, temb_dim=4 * config.widths[0])
        heads = config.heads or out_channels // config.head_dim
        self.transformer = (
            SpatialTransformer(out_channels, heads, config.context_dim, config.groups, cross_only)
            if attention
            else None
        )

    def forward(
        self, h: Float[Tensor, "b c h w"], temb: Float[Tensor, "b e"], context: Float[Tensor, "b m d"] | None
    ) -> Float[Tensor, "b o h w"]:
        h = self.residual(h, temb)
        return h if self.transformer is None else self.transformer(h, context)


class WayDown(nn.Module):
    """The first half of the U: blocks and halvings, every result kept; then the middle."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, temb_dim = config.widths, 4 * config.widths[0]
        self.time_embed = nn.Sequential(nn.Linear(widths[0], temb_dim), nn.SiLU(), nn.Linear(temb_dim, temb_dim))
        self.class_embed = nn.Embedding(config.classes, temb_dim) if config.classes else None
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)

        self.down = nn.ModuleList()
        channels, self.kept = widths[0], [widths[0]]  # how many channels each kept result has
        for level, (width, attention) in enumerate(zip(widths, config.attention, strict=True)):
            for _ in range(config.blocks):
                self.down.append(Block(channels, width, config, attention, cross_only=level < config.cross_only))
                channels = width
                self.kept.append(channels)
            if level < len(widths) - 1:
                self.down.append(Downsample(channels))
                self.kept.append(channels)

        self.middle = nn.ModuleList(
            [Block(channels, channels, config, attention=True), Block(channels, channels, config, attention=False)]
        )

    def descend(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, "b"],
        context: Float[Tensor, "b m d"] | None = None,
        label: Int[Tensor, "b"] | None = None,
        hint: Float[Tensor, "#b w0 h w"] | None = None,
    ) -> tuple[Tensor, list[Tensor], Float[Tensor, "b e"]]:
        """The middle's result, those kept on the way there, and the time's embedding; a hint is added at the start."""
        temb = self.time_embed(timestep_embedding(t, self.config.widths[0]).to(x_t.dtype))
        if self.class_embed is not None:
            temb = temb + self.class_embed(label)
        h = self.conv_in(x_t)
        if hint is not None:
            h = h + hint
        kept = [h]
        for layer in self.down:
            h = layer(h) if isinstance(layer, Downsample) else layer(h, temb, context)
            kept.append(h)
        for layer in self.middle:
            h = layer(h, temb, context)
        return h, kept, temb


class UNet(WayDown):
    """Predict noise (or v, or x0: whatever it was trained for) from a noisy picture or latent, the time and the prompt.

    Down: blocks and halvings, every result kept. Middle. Up: blocks and doublings, each block fed its own last result
    beside the result kept from the same height of the way down.
    """

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        widths, kept = config.widths, list(self.kept)
        channels = widths[-1]
        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for _ in range(config.blocks + 1):
                attention, cross_only = config.attention[level], level < config.cross_only
                self.up.append(Block(channels + kept.pop(), widths[level], config, attention, cross_only))
                channels = widths[level]
            if level:
                self.up.append(Upsample(channels))

        self.norm_out = nn.GroupNorm(config.groups, channels)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, "b"],
        context: Float[Tensor, "b m d"] | None = None,
        label: Int[Tensor, "b"] | None = None,
        control: Sequence[Tensor] | None = None,
    ) -> Float[Tensor, "b o h w"]:
        """`x_t` is the variance preserving sample, `t` its time step in 0..999, `context` the encoded prompt.

        `label` is for models with `classes`: the x4 upscaler's is the noise level of the small picture it enlarges.
        `control` is what a ControlNet adds to every kept result, and last to the middle's.
        """
        h, kept, temb = self.descend(x_t, t, context, label)
        if control is not None:
            *kept, h = (own + added for own, added in zip([*kept, h], control, strict=True))
        for layer in self.up:
            if isinstance(layer, Upsample):
                h = layer(h, size=kept[-1].shape[-2:])
            else:
                h = layer(torch.cat([h, kept.pop()], dim=1), temb, context)
        return self.conv_out(F.silu(self.norm_out(h)))
