"""A classifier of noisy latents: the way down of a U-Net, read off at its end (Dhariwal & Nichol 2021, section 4).

Its gradient says in which direction a noisy latent looks more like a word: classifier guidance, before there was any
other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .config import UNetConfig
from .layers import Downsample, timestep_embedding
from .unet import Block


class NoisyClassifier(nn.Module):
    """A noisy latent and its time to logits of every attribute's words: `words` says how many each has."""

    def __init__(self, config: UNetConfig, words: Mapping[str, int]):
        super().__init__()
        self.config = config
        widths, temb_dim = config.widths, 4 * config.widths[0]
        self.time_embed = nn.Sequential(nn.Linear(widths[0], temb_dim), nn.SiLU(), nn.Linear(temb_dim, temb_dim))
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down, channels = nn.ModuleList(), widths[0]
        for level, (width, attention) in enumerate(zip(widths, config.attention, strict=True)):
            if level:
                self.down.append(Downsample(channels))
            self.down.append(Block(channels, width, config, attention))
            channels = width
        self.norm_out = nn.GroupNorm(config.groups, channels)
        self.looks = nn.Linear(channels, len(words))  # where each attribute is looked for
        self.heads = nn.ModuleDict({name: nn.Linear(channels, count) for name, count in words.items()})

    def forward(self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, "b"]) -> dict[str, Float[Tensor, "b words"]]:
        """`x_t` is the variance preserving sample, `t` its time step in 0..999, as a `UNet` takes them."""
        temb = self.time_embed(timestep_embedding(t, self.config.widths[0]).to(x_t.dtype))
        h = self.conv_in(x_t)
        for layer in self.down:
            h = layer(h) if isinstance(layer, Downsample) else layer(h, temb, None)
        pixels = F.silu(self.norm_out(h)).flatten(2).transpose(1, 2)  # b c h w -> b (h w) c
        seen = torch.einsum("bna,bnc->abc", self.looks(pixels).softmax(dim=1), pixels)
        return {name: head(at) for (name, head), at in zip(self.heads.items(), seen, strict=True)}
