"""The depth estimator that Stable Diffusion 2 depth takes: DPT-hybrid of MiDaS (Ranftl et al. 2021; 2022).

A residual network looks closely, a transformer looks far, and a ladder of convolutions brings both back to full size.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .clip import EncoderBlock
from .config import DepthConfig

DEEPEST = 32  # the smallest feature map is so many times smaller than the picture


def pad_same(x: Float[Tensor, "b c h w"], kernel: int, stride: int) -> Float[Tensor, "b c h2 w2"]:
    """Zeros around a map for just `ceil(size / stride)` outputs a side: TensorFlow's "SAME".

    Where their number is odd, right and bottom get one more. That depends on the size, so PyTorch's own padding can't.
    """
    sides = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides)


class StandardizedConv(nn.Conv2d):
    """A convolution by `(w - mean(w)) / std(w)`, filter by filter (Qiao et al. 2019, equation 4)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1):
        super().__init__(in_channels, out_channels, kernel, stride, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o h2 w2"]:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) / torch.sqrt(variance + 1e-8)
        return F.conv2d(pad_same(x, self.kernel_size[0], self.stride[0]), weight, stride=self.stride)


def conv_norm(in_channels: int, out_channels: int, kernel: int, groups: int, stride: int = 1) -> nn.Sequential:
    """The residual network's unit: a standardised convolution, then GroupNorm."""
    conv = StandardizedConv(in_channels, out_channels, kernel, stride)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.GroupNorm(groups, out_channels)))


class Bottleneck(nn.Module):
    """`relu(x + expand(relu(mix(relu(reduce(x))))))`: the 3x3 works at a quarter of the width (He et al. 2016)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, stride: int):
        super().__init__()
        inner = out_channels // 4
        self.reduce = conv_norm(in_channels, inner, 1, groups)
        self.mix = conv_norm(inner, inner, 3, groups, stride)
        self.expand = conv_norm(inner, out_channels, 1, groups)
        same = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else conv_norm(in_channels, out_channels, 1, groups, stride)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o h2 w2"]:
        h = F.relu(self.reduce(x))
        h = F.relu(self.mix(h))
        return F.relu(self.shortcut(x) + self.expand(h))


class ResNet(nn.Module):
    """Picture to feature maps at 1/4, 1/8 and 1/16 of its size: ResNet-50 but for its last stage."""

    def __init__(self, config: DepthConfig):
        super().__init__()
        self.stem = conv_norm(3, config.stem, 7, config.groups, stride=2)
        self.stages = nn.ModuleList()
        channels = config.stem
        for i, (width, blocks) in enumerate(zip(config.widths, config.blocks, strict=True)):
            stage = nn.Sequential(Bottleneck(channels, width, config.groups, stride=2 if i else 1))
            stage.extend(Bottleneck(width, width, config.groups, stride=1) for _ in range(blocks - 1))
            self.stages.append(stage)
            channels = width

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        h = F.relu(self.stem(x))
        h = F.max_pool2d(pad_same(h, 3, 2), 3, stride=2)  # the zeros change no maximum: nothing is below them
        maps = []
        for stage in self.stages:
            h = stage(h)
            maps.append(h)
        return maps


class ViTBlock(EncoderBlock):
    """CLIP's transformer block, looking both ways, with the epsilon that ViT was trained with."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads, quick=False)
        self.norm1.eps = self.norm2.eps = 1e-6


class ViT(nn.Module):
    """A transformer whose tokens are the places of a feature map, and one more that gathers (Dosovitskiy et al. 2021).

    Returns the tokens after each of `config.taps`, the gathering one first.
    """

    def __init__(self, config: DepthConfig):
        super().__init__()
        self.taps = config.taps
        self.grid = config.size // 16
        self.proj_in = nn.Conv2d(config.widths[-1], config.width, 1)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, config.width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + self.grid**2, config.width))
        self.blocks = nn.ModuleList(ViTBlock(config.width, config.heads) for _ in range(config.taps[-1] + 1))

    def resized_positions(self, height: int, width: int) -> Float[Tensor, "1 n c"]:
        """The table of positions, learnt on a square grid, stretched bilinearly to another."""
        square = self.positions[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        stretched = F.interpolate(square, size=(height, width), mode="bilinear")
        return torch.cat([self.positions[:, :1], stretched.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, features: Float[Tensor, "b c h w"]) -> list[Tensor]:
        x = self.proj_in(features).flatten(2).transpose(1, 2)  # b c h w -> b (h w) c
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.resized_positions(*features.shape[-2:])
        tapped = []
        for i, block in enumerate(self.blocks):
            x = block(x, causal=False)
            if i in self.taps:
                tapped.append(x)
        return tapped


class Reassemble(nn.Module):
    """Tokens back to a feature map: each is told what the class token gathered, `gelu(W [token | class])`.

    (Ranftl et al. 2021, section 3: "Read" by projection, "Concatenate", "Resample" to half the size if asked for.)
    """

    def __init__(self, width: int, halve: bool):
        super().__init__()
        self.readout = nn.Linear(2 * width, width)
        self.proj_out = nn.Conv2d(width, width, 1)
        self.halve = nn.Conv2d(width, width, 3, stride=2, padding=1) if halve else nn.Identity()

    def forward(self, tokens: Float[Tensor, "b n c"], size: tuple[int, int]) -> Float[Tensor, "b c h w"]:
        gathered, places = tokens[:, :1], tokens[:, 1:]
        h = F.gelu(self.readout(torch.cat([places, gathered.expand_as(places)], dim=-1)))
        return self.halve(self.proj_out(h.transpose(1, 2).unflatten(2, size)))  # b (h w) c -> b c h w


class ConvUnit(nn.Module):
    """`x + conv(relu(conv(relu(x))))`."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Rung(nn.Module):
    """One rung of the ladder: add the backbone's map to what comes from below, refine, double the size (RefineNet).

    The lowest has nothing below it (`lowest`) and refines the backbone's map itself.
    """

    def __init__(self, in_channels: int, channels: int, lowest: bool):
        super().__init__()
        self.proj_in = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.unit1 = None if lowest else ConvUnit(channels)
        self.unit2 = ConvUnit(channels)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(
        self, features: Float[Tensor, "b c h w"], below: Float[Tensor, "b d h w"] | None
    ) -> Float[Tensor, "b d h2 w2"]:
        h = self.proj_in(features)
        if self.unit1 is not None:
            h = below + self.unit1(h)
        h = F.interpolate(self.unit2(h), scale_factor=2, mode="bilinear", align_corners=True)
        return self.proj_out(h)


class DPT(nn.Module):
    """Dense prediction transformer: how near every pixel is, up to an unknown scale and shift of the whole picture."""

    def __init__(self, config: DepthConfig):
        super().__init__()
        self.config = config
        self.resnet = ResNet(config)
        self.vit = ViT(config)
        self.reassemble = nn.ModuleList([Reassemble(config.width, halve=False), Reassemble(config.width, halve=True)])
        widths = (*config.widths[:2], config.width, config.width)  # at 1/4, 1/8, 1/16 and 1/32
        self.ladder = nn.ModuleList(Rung(width, config.fusion, lowest=i == 3) for i, width in enumerate(widths))
        self.head = nn.Sequential(
            nn.Conv2d(config.fusion, config.fusion // 2, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(config.fusion // 2, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 1, 1),
            nn.ReLU(),
        )

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
        """Disparities of pictures in [-1, 1] whose sides are multiples of 32: not negative, larger is nearer."""
        assert x.shape[-2] % DEEPEST == x.shape[-1] % DEEPEST == 0, tuple(x.shape)
        quarter, eighth, sixteenth = self.resnet(x)
        size = sixteenth.shape[-2:]
        early, late = self.vit(sixteenth)
        maps = [quarter, eighth, self.reassemble[0](early, size), self.reassemble[1](late, size)]
        h = None
        for rung, features in zip(reversed(self.ladder), reversed(maps), strict=True):
            h = rung(features, below=h)
        return self.head(h)

    def estimate(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h2 w2"]:
        """Disparities of pictures in [-1, 1] of any size, at the size of `network_size`: larger is nearer."""
        height, width = pixels.shape[-2:]
        size = network_size(height, width, self.config.size)
        return self(F.interpolate(pixels, size=size, mode="bicubic"))


def network_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width at which MiDaS looks at a picture: multiples of 32 in nearly its proportions.

    Of the two scales that bring one side to `side`, that nearer to 1 is taken.
    """
    scale = min(side / height, side / width, key=lambda scale: abs(1 - scale))
    height, width = (max(1, round(scale * length / DEEPEST)) * DEEPEST for length in (height, width))
    return height, width


def depth_channel(disparity: Float[Tensor, "b 1 h w"], cells: tuple[int, int]) -> Float[Tensor, "b 1 h8 w8"]:
    """The U-Net's fifth channel: disparity at the latent's size, each picture's farthest cell -1, its nearest 1.

    `2 (d - min) / (max - min) - 1`. A flat picture is -1 everywhere, as in training, where the span had 0.001 added.
    """
    d = F.interpolate(disparity, size=cells, mode="bicubic")
    low, high = d.amin(dim=(1, 2, 3), keepdim=True), d.amax(dim=(1, 2, 3), keepdim=True)
    span = torch.where(high > low, high - low, 1)
    return 2 * (d - low) / span - 1
