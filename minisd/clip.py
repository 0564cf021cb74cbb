"""CLIP: a text tower that turns prompts into context, and the image tower it is trained with (Radford et al. 2021)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .config import ImageTowerConfig, TextConfig
from .layers import Attention, ResidualBlock


def quick_gelu(x: Tensor) -> Tensor:
    """`x sigmoid(1.702 x)`: the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


class EncoderBlock(nn.Module):
    """A pre-norm transformer block: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, width: int, heads: int, quick: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, bias=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)
        self.activation = quick_gelu if quick else F.gelu

    def forward(self, x: Float[Tensor, "b n c"], causal: bool) -> Float[Tensor, "b n c"]:
        x = x + self.attention(self.norm1(x), causal=causal)
        return x + self.mlp_out(self.activation(self.mlp_in(self.norm2(x))))


class TextTower(nn.Module):
    """Token ids to context: one vector a place, each knowing the words before it (the attention is causal)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.places, config.width)
        self.blocks = nn.ModuleList(
            EncoderBlock(config.width, config.heads, config.quick_gelu) for _ in range(config.layers)
        )
        self.final_norm = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, config.projection, bias=False) if config.projection else None
        nn.init.normal_(self.position_embedding.weight, std=0.02)  # next to tokens of deviation 1

    def forward(self, ids: Int[Tensor, "b n"], skip_last: int | None = None) -> Float[Tensor, "b n c"]:
        """Context for the U-Net. `skip_last` leaves out so many blocks at the end ("clip skip"; None: config's)."""
        skip = self.config.skip_last if skip_last is None else skip_last
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        for block in self.blocks[: len(self.blocks) - skip]:
            x = block(x, causal=True)
        return self.final_norm(x)

    def embed(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b p"]:
        """One unit vector a text, read at its end mark: the highest id, and the first of them if it also pads."""
        context = self(ids, skip_last=0)
        end = ids.argmax(dim=-1)
        return F.normalize(self.projection(context[torch.arange(len(ids)), end]), dim=-1)


def halvings(patch: int, width: int) -> nn.Sequential:
    """Picture to a map of one vector a patch: halved, looked at, halved again (Xiao et al. 2021, section 4).

    Published CLIPs look at a whole patch in one convolution, and need far more pictures to learn what to look for.
    """
    layers, channels = [], 3
    for halving in reversed(range(int(math.log2(patch)))):
        out = width >> halving
        layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), ResidualBlock(out, out, max(1, out // 8))]
        channels = out
    return nn.Sequential(*layers)


class ImageTower(nn.Module):
    """Picture in [-1, 1] to one unit vector: patches as tokens, a class token that gathers, and a projection."""

    def __init__(self, config: ImageTowerConfig):
        super().__init__()
        self.config = config
        self.patches = halvings(config.patch, config.width)
        self.class_embedding = nn.Parameter(config.width**-0.5 * torch.randn(config.width))
        self.position_embedding = nn.Embedding((config.size // config.patch) ** 2 + 1, config.width)
        self.first_norm = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(
            EncoderBlock(config.width, config.heads, config.quick_gelu) for _ in range(config.layers)
        )
        self.final_norm = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, config.projection, bias=False)

    def embed(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b p"]:
        """One unit vector a picture; it is looked at in `config.size` pixels a side."""
        if image.shape[-2:] != (self.config.size,) * 2:
            image = F.interpolate(image, (self.config.size,) * 2, mode="bilinear", antialias=True)
        x = self.patches(image).flatten(2).transpose(1, 2)  # b c h w -> b (h w) c
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.position_embedding.weight
        x = self.first_norm(x)
        for block in self.blocks:
            x = block(x, causal=False)
        return F.normalize(self.projection(self.final_norm(x[:, 0])), dim=-1)


class CLIP(nn.Module):
    """Both towers and the temperature: trained so that a picture and its caption point the same way."""

    def __init__(self, text: TextConfig, image: ImageTowerConfig):
        super().__init__()
        self.text = TextTower(text)
        self.image = ImageTower(image)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def similarity(self, image: Float[Tensor, "n 3 h w"], ids: Int[Tensor, "m k"]) -> Float[Tensor, "n m"]:
        """Scaled cosine of every picture with every text."""
        return self.log_scale.clamp(max=math.log(100)).exp() * self.image.embed(image) @ self.text.embed(ids).T
