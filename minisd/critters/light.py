"""Light on the critter: a warm key light, the sky, light bounced from the ground, and a rim."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .anatomy import Anatomy
from .field import field, length, mix, vector
from .material import Material
from .trace import Hits


def occlusion(a: Anatomy, p: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """How open a point is to the sky, and how much of the key light reaches it: two [b, n] in 0..1.

    Ambient occlusion compares the field with its expected value along the normal; the soft shadow keeps the narrowest
    gap, in widths of the lamp, on the way to the light.
    """
    blocked = torch.zeros_like(p[0])
    for i in range(1, 5):
        blocked = blocked + (0.10 * i - field(a, p + n * (0.10 * i))).clamp(min=0) * 0.75**i
    gap, t = torch.ones_like(p[0]), torch.full_like(p[0], 0.06)
    for _ in range(8):
        distance = field(a, p + 0.03 * n + a.light * t)
        gap = torch.minimum(gap, 0.5 + 0.5 * distance / (0.16 * t))
        t = t + distance.clamp(0.05, 0.30)
    gap = gap.clamp(0, 1)
    return (1 - 1.25 * blocked).clamp(0.15, 1), gap * gap * (3 - 2 * gap)


def ground_shadow(a: Anatomy, ground: Tensor, size: int) -> Tensor:
    """How much light the critter leaves for the ground points [3, b, size * size]: 1 in the open, [b, size * size].

    Shadows on the ground are soft, so a quarter of the size is enough to trace them.
    """
    batch = ground.shape[1]
    image = ground.clamp(-3, 3).transpose(0, 1).reshape(batch, 3, size, size)
    points = F.avg_pool2d(image, 4).flatten(2).transpose(0, 1).contiguous()
    up = torch.zeros_like(points)
    up[1] = 1
    openness, lit = occlusion(a, points, up)
    shadow = (0.55 + 0.45 * lit) * (0.45 + 0.55 * openness)
    return F.interpolate(shadow.reshape(batch, 1, size // 4, size // 4), scale_factor=4, mode="bilinear").flatten(1)


def shade(a: Anatomy, hits: Hits, m: Material, openness: Tensor, lit: Tensor) -> Tensor:
    """Linear light that each hit sends to the camera, [3, b, k].

    The key light wraps round the form, max((n.l + .35) / 1.35, 0), as if the fur let a little of it through.
    """
    n = hits.normal
    cosine = (n * a.light).sum(0)
    wrap = ((cosine + 0.35) / 1.35).clamp(min=0)
    up = 0.5 + 0.5 * n[1]
    fresnel = (1 + (n * hits.direction).sum(0).clamp(-1, 0)) ** 3
    half = a.light - hits.direction
    mirror = ((n * half).sum(0) / length(half)).clamp(min=0) ** 30 * lit
    through = vector(n, 0.10, 0.035, 0.03) * (wrap - cosine.clamp(min=0))
    diffuse = a.key * wrap * (0.35 + 0.65 * lit) + (a.sky * up + a.bounce * (1 - up)) * openness + through
    glowing = m.glow * (0.55 * diffuse + 0.45)
    rim = a.rim * (0.40 * fresnel * (0.3 + 0.7 * up) * (1 - m.glow)) * (0.35 + m.colour)
    return m.colour * (diffuse * (1 - m.glow) + glowing) + rim + a.key * (m.shine * mirror)


def shoulder(c: Tensor) -> Tensor:
    """Roll off the highlights of linear colours [3, ...].

    Two thirds of it is one factor for all three channels: a curve for each alone would turn orange to yellow.
    """
    c = c.clamp(min=0)
    brightest = c.amax(0).clamp(min=1e-4)
    return mix(c * (_roll(brightest) / brightest), _roll(c), 0.35)


def display(c: Tensor) -> Tensor:
    """Linear light to display values 0..1 (gamma 2.2)."""
    return c.clamp(0, 1) ** (1 / 2.2)


def _roll(x: Tensor) -> Tensor:
    return 1.06 * (1 - torch.exp(-1.22 * x))
