"""Five ways to paint a scene from its layers: 3d render, cartoon, pencil sketch, watercolor, pixel art.

Each style takes the `Layers` of one scene and a generator for its grain, and gives display values [1, 3, h, w] in 0..1.
Lengths are shares of the picture's height, so a style looks alike at every size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .field import mix, vector
from .material import PARTS

# Which part ink takes each one for: there is no line where an ear grows out of the head, or a leg out of the body.
GROWS_OUT_OF = {"ears": "head", "legs": "body", "tail": "body"}
OUTLINED = [PARTS.index(GROWS_OUT_OF.get(part, part)) for part in PARTS]


class Layers(NamedTuple):
    """What is known of every pixel of a scene: colours are display values [1, 3, h, w], the rest [1, 1, h, w]."""

    picture: Tensor  # the finished 3-D render
    albedo: Tensor  # the critter's own colours, unlit
    backdrop: Tensor  # the place without the critter, with half of its shadow
    mask: Tensor  # coverage by the critter
    depth: Tensor
    part: Tensor  # labels of PARTS
    whiskers: Tensor
    light: Tensor  # how much light arrives, about 0..1.2
    glow: Tensor  # 1 in the eyes, 0 elsewhere


def ink(x: Layers, width: float = 1.0) -> Tensor:
    """Lines round silhouettes, folds, parts and whiskers, [1, 1, h, w] in 0..1."""
    size = x.mask.shape[-1]
    fold = x.depth.clamp(max=9.6)
    fold = (8 * (fold - _box(fold, 1)).clamp(min=0) - 0.10).clamp(0, 1) * x.mask  # a jump in depth, seen from behind
    border = _step(x.part.new_tensor(OUTLINED)[x.part.long()]).clamp(max=1) * (x.part > 0)
    lines = torch.stack((_step(x.mask), fold, border)).amax(0)
    wide = 2 * round(width * size / 600) + 1
    lines = _blur(F.max_pool2d(lines, wide, 1, wide // 2), max(0.5, width * size / 570))
    return torch.maximum(lines * min(1.6, 1.15 + 0.5 * width), 0.9 * x.whiskers).clamp(0, 1)


def render_3d(x: Layers, generator: torch.Generator) -> Tensor:
    return x.picture


def cartoon(x: Layers, generator: torch.Generator) -> Tensor:
    """Flat colours in two tones, outlined in ink."""
    lit = torch.sigmoid(30 * (x.light - 0.36))
    shadow = vector(x.albedo, 0.76, 0.75, 0.84)
    critter = x.albedo**0.90 * mix(shadow, vector(x.albedo, 1.02, 1.02, 1.02), lit)
    critter = mix(critter, x.albedo, (x.glow / 0.85).clamp(0, 1))
    return mix(mix(x.backdrop, critter, x.mask), vector(x.albedo, 0.20, 0.14, 0.20), ink(x, 1.3)).clamp(0, 1)


def pencil_sketch(x: Layers, generator: torch.Generator) -> Tensor:
    """Graphite on paper: outlines, a soft tone, and two layers of hatching in the dark places."""
    size = x.picture.shape[-1]
    tone = _gray(mix(0.55 + 0.45 * x.picture, x.picture, x.mask))
    row, column = torch.meshgrid(*[torch.arange(size, device=tone.device)] * 2, indexing="ij")
    waver = 0.9 * _noise(x, 10, generator)
    spacing = 0.7 * 2 * torch.pi / max(3.0, size / 85)
    one, two = (torch.sin(spacing * way + waver) for way in (row + column, row - column))
    pressure = _noise(x, min(size, 200), generator).abs()
    light_tone, dark_tone = (1.6 * (0.80 - tone)).clamp(0, 1), (2.0 * (0.50 - tone)).clamp(0, 1)
    dark = 0.42 * light_tone * (0.55 + 0.45 * one).clamp(0, 1) + 0.42 * dark_tone * (0.55 + 0.45 * two).clamp(0, 1)
    detail = (1.3 * _gradient(_blur(x.picture, max(0.4, size / 400))) - 0.08).clamp(0, 1)
    lines = torch.maximum(ink(x, 0.9), 0.7 * detail) * (0.70 + 0.2 * pressure.clamp(max=1))
    # Hatching would hide the eyes: they keep their own tones.
    eyes = (x.part == PARTS.index("eyes")).float()
    dark = mix(dark + 0.25 * light_tone, 0.9 * (1 - tone), eyes)
    paper = 0.965 + 0.008 * _noise(x, min(size, 128), generator, 2)
    sheet = paper - torch.maximum(dark, lines) * (0.80 + 0.12 * pressure.clamp(max=1.5))
    return (sheet * vector(sheet, 1.0, 0.985, 0.955)).clamp(0.05, 1)


def watercolor(x: Layers, generator: torch.Generator) -> Tensor:
    """Wavering washes of pigment that pool at their edges, on paper left white at the rim."""
    size = x.picture.shape[-1]
    bend = 0.010 * torch.cat([_noise(x, 8, generator, 3) for _ in range(2)], 1)
    eyes = ((x.part == PARTS.index("eyes")) | (x.part == PARTS.index("nose"))).float()
    still = bend * (1 - _blur(eyes, size / 50).mul(3).clamp(max=1))  # a painter takes care with the face
    picture = _bent(x.picture, still)
    wash = mix(_calm(picture, max(1, size // 100)), picture, 0.85 * _blur(_bent(eyes, still), size / 200))
    edge = (_gradient(_blur(wash, size / 220 + 0.3)) * (size / 128) ** 0.6).clamp(0, 1)
    wash = mix(wash, _blur(wash, size / 64), 0.15 * (1 - eyes))
    gray = _gray(wash)
    wash = gray + 1.22 * (wash - gray)
    paint = 1 - (1 - wash) * 0.97 * (1 + 0.09 * _noise(x, 5, generator, 3)) - 0.20 * edge
    grain = _noise(x, min(size, 170), generator)
    paint = paint + 0.010 * grain
    paper = vector(paint, 0.985, 0.975, 0.950) + 0.006 * grain
    axis = torch.linspace(-1, 1, size, device=paint.device)
    rim = torch.maximum(axis.abs()[:, None], axis.abs()) + 0.04 * _noise(x, 7, generator, 3)
    return mix(paint, paper, torch.sigmoid(30 * (rim - 0.96))).clamp(0, 1)


def pixel_art(x: Layers, generator: torch.Generator) -> Tensor:
    """Some 43 x 43 large pixels in few colours, with a dark outline."""
    size = x.picture.shape[-1]
    pixel = max(1, round(size / 43))
    cells = -(-size // pixel)
    small = _cells(x.picture, pixel, cells)
    eyes = _cells((x.part == PARTS.index("eyes")).float(), pixel, cells)
    centres = x.picture[..., pixel // 2 :: pixel, pixel // 2 :: pixel]
    small = mix(small, F.pad(centres, (0, cells - centres.shape[3], 0, cells - centres.shape[2])), 0.6 * eyes)
    small = (small + 0.45 * (small - _box(small, 1))).clamp(0, 1)
    gray = _gray(small)
    small = gray + 1.12 * (small - gray)
    mask = (_cells(x.mask, pixel, cells) > 0.5).float()
    gray = _gray(small)
    small = (small + torch.round(12 * gray) / 12 - gray).clamp(0, 1)  # few tones, but of the true hue
    around = F.max_pool2d(mask, (3, 1), 1, (1, 0)).maximum(F.max_pool2d(mask, (1, 3), 1, (0, 1))) - mask
    small = mix(small, vector(small, 0.16, 0.11, 0.17), around)
    return small.repeat_interleave(pixel, 2).repeat_interleave(pixel, 3)[..., :size, :size]


PAINT = {
    "3d render": render_3d,
    "cartoon": cartoon,
    "pencil sketch": pencil_sketch,
    "watercolor": watercolor,
    "pixel art": pixel_art,
}


def _gray(x: Tensor) -> Tensor:
    return (x * vector(x, 0.30, 0.59, 0.11)).sum(1, keepdim=True)


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur by two one-dimensional passes."""
    radius = max(1, int(2.5 * sigma + 0.5))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.conv2d(F.pad(x, (radius, radius, 0, 0), mode="reflect"), kernel, groups=x.shape[1])
    return F.conv2d(F.pad(x, (0, 0, radius, radius), mode="reflect"), kernel.transpose(2, 3), groups=x.shape[1])


def _box(x: Tensor, radius: int) -> Tensor:
    return F.avg_pool2d(F.pad(x, (radius,) * 4, mode="replicate"), 2 * radius + 1, 1)


def _gradient(x: Tensor) -> Tensor:
    """Length of the central differences over all channels, [1, 1, h, w]."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    across, down = x[..., 1:-1, 2:] - x[..., 1:-1, :-2], x[..., 2:, 1:-1] - x[..., :-2, 1:-1]
    return (across.square() + down.square()).sum(1, keepdim=True).sqrt()


def _step(x: Tensor) -> Tensor:
    """The larger jump to the neighbour on the right or below, [1, 1, h, w]: lines of a single pixel."""
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    here = x[..., :-1, :-1]
    return torch.maximum((x[..., :-1, 1:] - here).abs(), (x[..., 1:, :-1] - here).abs())


def _noise(x: Layers, cells: int, generator: torch.Generator, octaves: int = 1) -> Tensor:
    """Smooth Gaussian noise of so many cells across, each octave twice as fine and half as strong, [1, 1, h, w]."""
    size, total = x.mask.shape[-1], torch.zeros_like(x.mask[:1, :1])
    for octave in range(octaves):
        n = min(cells * 2**octave, size)
        coarse = torch.randn(1, 1, n, n, generator=generator).to(x.mask.device)
        total = total + F.interpolate(coarse, size=(size, size), mode="bicubic") * 0.5**octave
    return total


def _bent(x: Tensor, shift: Tensor) -> Tensor:
    """The picture with every pixel fetched from a place shifted by [1, 2, h, w] (in half widths)."""
    axis = torch.linspace(-1, 1, x.shape[-1], device=x.device)
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack((u, v), -1) + shift.permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, align_corners=True, padding_mode="reflection")


def _calm(x: Tensor, radius: int) -> Tensor:
    """Kuwahara's filter: every pixel takes the mean of the calmest of four windows beside it, so edges stay sharp."""
    mean = _box(x, radius)
    variance = (_box(x * x, radius) - mean * mean).sum(1, keepdim=True)
    shifts = [(dy, dx) for dy in (-radius, radius) for dx in (-radius, radius)]
    means = torch.stack([mean.roll(shift, (2, 3)) for shift in shifts])
    calmest = torch.stack([variance.roll(shift, (2, 3)) for shift in shifts]).argmin(0, keepdim=True)
    return means.gather(0, calmest.expand(1, *x.shape))[0]


def _cells(x: Tensor, pixel: int, cells: int) -> Tensor:
    over = cells * pixel - x.shape[-1]
    return F.avg_pool2d(F.pad(x, (0, over, 0, over), mode="replicate"), pixel)
