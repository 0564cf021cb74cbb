"""The camera: from the screen into the world and back."""

from __future__ import annotations

import torch
from torch import Tensor

from .anatomy import DISTANCE, Anatomy
from .field import length, mix, out_of, smoothstep, vector


def screen(size: int, device: torch.device) -> Tensor:
    """Coordinates u, v in -1..1 of the pixels' centres, row by row from the top left, [2, 1, size * size]."""
    centres = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
    v, u = torch.meshgrid(-centres, centres, indexing="ij")
    return torch.stack((u, v)).reshape(2, 1, -1)


def rays(a: Anatomy, uv: Tensor) -> tuple[Tensor, Tensor]:
    """Origin [3, b, 1] and unit directions [3, b, n] of the rays through the screen's points uv [2, b or 1, n]."""
    sin, cos = a.elevation.sin(), a.elevation.cos()
    x, y = uv * a.half_height
    origin = torch.stack((a.camera[0], a.camera[1] + DISTANCE * sin, DISTANCE * cos))
    direction = torch.stack((x, cos * y - sin * DISTANCE, -sin * y - cos * DISTANCE))
    return origin, direction / length(direction)


def project(a: Anatomy, p: Tensor) -> tuple[Tensor, Tensor]:
    """World points [3, b, n] on the screen: uv [2, b, n] in -1..1 and depth [b, n]."""
    sin, cos = a.elevation.sin(), a.elevation.cos()
    x, y, z = p[0] - a.camera[0], p[1] - a.camera[1], p[2]
    depth = DISTANCE - (y * sin + z * cos)
    return torch.stack((x, y * cos - z * sin)) * (DISTANCE / depth / a.half_height), depth


WHISKERS = [((0.20, y, 0.56), (0.74, z, 0.40)) for y, z in ((-0.15, -0.08), (-0.20, -0.21), (-0.25, -0.34))]


def whiskers(a: Anatomy, uv: Tensor, depth: Tensor) -> Tensor:
    """Coverage of the pixels by a cat's whiskers, [b, n]: six projected lines, hidden where the critter is nearer."""
    size = depth.shape[1] ** 0.5
    width = (1.1 / size / torch.ones_like(a.half_height)).clamp(min=0.0052)
    cover = torch.zeros_like(depth)
    for side in (-1, 1):
        for ends in WHISKERS:
            root, tip = (depth.new_tensor(end)[:, None, None] * _mirror(depth, side) for end in ends)
            (start, near), (end, far) = (project(a, head_to_world(a, p)) for p in (root, tip))
            way = end - start
            t = (((uv - start) * way).sum(0) / way.square().sum(0)).clamp(0, 1)
            sag = torch.stack((torch.zeros_like(t), -0.12 * t * (1 - t)))
            line = smoothstep(1.5 * width, 0.5 * width, length(uv - start - way * t + sag)) * (1 - 0.5 * t)
            cover = torch.maximum(cover, line * (depth + 0.05 > mix(near, far, t)))
    return cover * a.cat


def eyes(a: Anatomy) -> tuple[Tensor, Tensor]:
    """Where the eyes are on the screen, [b, 2 eyes, 2 coordinates u, v] in -1..1, the left one in the picture first.

    The second result is their radius on the screen, [b].
    """
    places = [project(a, head_to_world(a, a.eye * _mirror(a.eye, side)))[0][..., 0] for side in (-1, 1)]
    return torch.stack(places).permute(2, 0, 1), (a.eye_radius * a.head_size / a.half_height)[:, 0]


def head_to_world(a: Anatomy, p: Tensor) -> Tensor:
    """Points of the head's frame [3, b or 1, n] in the world."""
    return out_of(a.body_axes, out_of(a.head_axes, p * a.head_size) + a.head)


def _mirror(like: Tensor, side: int) -> Tensor:
    return vector(like, side, 1, 1)
