"""Light on the critter: a warm key light, the sky, light bounced from the ground, and a rim."""

from __future__ import annotations

import torch
from torch import Tensor

from .anatomy import Anatomy
from .field import length, mix
from .material import Material
from .trace import Hits


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
    through = n.new_tensor([0.10, 0.035, 0.03])[:, None, None] * (wrap - cosine.clamp(min=0))
    diffuse = a.key * wrap * (0.35 + 0.65 * lit) + (a.sky * up + a.bounce * (1 - up)) * openness + through
    glowing = m.glow * (0.55 * diffuse + 0.45)
    rim = a.rim * (0.40 * fresnel * (0.3 + 0.7 * up) * (1 - m.glow)) * (0.35 + m.colour)
    return m.colour * (diffuse * (1 - m.glow) + glowing) + rim + a.key * (m.shine * mirror)


def shoulder(c: Tensor) -> Tensor:
    """Roll off the highlights of linear colours [3, ...], two thirds by a common factor: orange must not turn yellow."""
    c = c.clamp(min=0)
    brightest = c.amax(0).clamp(min=1e-4)
    return mix(c * (_roll(brightest) / brightest), _roll(c), 0.35)


def display(c: Tensor) -> Tensor:
    """Linear light to display values 0..1 (gamma 2.2)."""
    return c.clamp(0, 1) ** (1 / 2.2)


def _roll(x: Tensor) -> Tensor:
    return 1.06 * (1 - torch.exp(-1.22 * x))
