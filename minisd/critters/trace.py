"""Sphere tracing: where does each ray meet the critter, and what light reaches that point?

Rays are marched by the distance field, whose value is a step that cannot pass through a surface. Coarse pictures are traced
first: a cone of rays that misses the critter needs no finer rays, and the others start where their cone came close.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import field
from .anatomy import DISTANCE, Anatomy
from .field import length

NEAR, FAR = DISTANCE - 2.4, DISTANCE + 3.0
ROUND = 8  # steps between two clean-ups of the list of rays


class Hits(NamedTuple):
    """The rays that meet the critter: k of them in every scene, the largest count in the batch.

    `index` says to which pixel each belongs; a scene with fewer hits fills its list with rays whose coverage is 0.
    """

    index: Tensor  # [b, k]
    t: Tensor  # [b, k] distance along the ray
    coverage: Tensor  # [b, k] share of the pixel that the critter covers, 0..1
    direction: Tensor  # [3, b, k]
    point: Tensor  # [3, b, k]
    normal: Tensor  # [3, b, k]


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


def trace(a: Anatomy, size: int) -> Hits:
    """Find the pixels that the critter covers and the point that each of them sees."""
    levels = [(factor, rounds, relax) for factor, rounds, relax in ((8, 5, 0.72), (2, 3, 0.80)) if size % factor == 0]
    batch, device = a.elevation.shape[0], a.elevation.device
    index, t, previous = None, None, None
    for factor, rounds, relax in (*levels, (1, 6, 0.95)):
        grid = size // factor
        if index is None:
            index = torch.arange(grid * grid, device=device).expand(batch, -1)
            t = torch.full((batch, grid * grid), NEAR, device=device)
        else:
            index, t = _children(index, t, previous, grid)
        origin, direction = rays(a, _at(screen(grid, device).expand(-1, batch, -1), index))
        pixel = 2 * a.half_height / grid
        tolerance = pixel * (0.75 if factor > 1 else 0.05)
        t, nearest, closest = _march(a, origin, direction, t, tolerance, rounds, relax)
        if factor > 1:
            reached = (t < FAR) | (nearest < tolerance)
            order = _first(reached)
            index, t, previous = index.gather(1, order), t.gather(1, order), grid
            # A list shorter than its neighbours in the batch is filled up with rays that missed: they miss again.
    coverage = (1.06 - nearest / pixel).clamp(0, 1)
    order = _first(coverage > 0)
    index, t, coverage = index.gather(1, order), closest.gather(1, order), coverage.gather(1, order)
    direction = _at(direction, order)
    point = origin + direction * t
    return Hits(index, t, coverage, direction, point, normal(a, point))


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(2, index.expand(len(values), -1, -1))


def _first(chosen: Tensor) -> Tensor:
    """Indices of the chosen entries of each row, in order, padded with others to the longest row's count, [b, k]."""
    count = max(1, int(chosen.sum(1).max()))
    return chosen.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]


def _children(index: Tensor, t: Tensor, coarse: int, fine: int) -> tuple[Tensor, Tensor]:
    """The finer pixels inside coarse ones, each with its parent's start."""
    ratio = fine // coarse
    row, column = index // coarse * ratio, index % coarse * ratio
    offsets = torch.arange(ratio, device=index.device)
    rows = row[..., None, None] + offsets[:, None]
    columns = column[..., None, None] + offsets
    return (rows * fine + columns).flatten(1), t.repeat_interleave(ratio * ratio, dim=1)


def step(
    a: Anatomy,
    origin: Tensor,
    direction: Tensor,
    t: Tensor,
    nearest: Tensor,
    closest: Tensor,
    tolerance: Tensor,
    relax: float,
):
    """March every ray by one step; keep the smallest distance met and where it was."""
    distance = field.field(a, origin + direction * t)
    closest = torch.where(distance < nearest, t, closest)
    nearest = torch.minimum(nearest, distance)
    return torch.where((distance < tolerance) | (t > FAR), t, t + distance * relax), nearest, closest


def _march(a: Anatomy, origin: Tensor, direction: Tensor, t: Tensor, tolerance: Tensor, rounds: int, relax: float):
    """March until all rays have arrived or left; after every round only those still on their way go on."""
    nearest, closest = torch.full_like(t, 9.0), t
    rest = (t, nearest, closest)
    order, ways = None, direction
    for _ in range(rounds):
        for _ in range(ROUND):
            rest = STEP(a, origin, ways, *rest, tolerance, relax)
        if order is None:
            t, nearest, closest = rest
        else:
            t, nearest, closest = (x.scatter(1, order, y) for x, y in zip((t, nearest, closest), rest, strict=True))
        walking = (nearest > tolerance) & (t < FAR)
        if not walking.any():
            break
        order = _first(walking)
        ways, rest = _at(direction, order), tuple(x.gather(1, order) for x in (t, nearest, closest))
    return t, nearest, closest


def normal(a: Anatomy, p: Tensor, reach: float = 0.004) -> Tensor:
    """The unit gradient of the distance field, from four evaluations at the corners of a tetrahedron."""
    corners = p.new_tensor([[1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]])[..., None, None]
    n = sum(corner * FIELD(a, p + reach * corner) for corner in corners)
    return n / length(n).clamp(min=1e-6)


def occlusion(a: Anatomy, p: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """How open a point is to the sky, and how much of the key light reaches it: two [b, n] in 0..1.

    Ambient occlusion compares the field with its expected value along the normal; the soft shadow keeps the narrowest
    gap, in widths of the lamp, on the way to the light.
    """
    blocked = 0
    for i in range(1, 5):
        blocked = blocked + (0.10 * i - FIELD(a, p + n * (0.10 * i))).clamp(min=0) * 0.75**i
    gap, t = torch.ones_like(p[0]), torch.full_like(p[0], 0.06)
    for _ in range(8):
        distance = FIELD(a, p + 0.03 * n + a.light * t)
        gap = torch.minimum(gap, 0.5 + 0.5 * distance / (0.16 * t))
        t = t + distance.clamp(0.05, 0.30)
    gap = gap.clamp(0, 1)
    return (1 - 1.25 * blocked).clamp(0.15, 1), gap * gap * (3 - 2 * gap)


def whiskers(a: Anatomy, uv: Tensor, depth: Tensor) -> Tensor:
    """Coverage of the pixels by a cat's whiskers, [b, n]: six projected lines, hidden where the critter is nearer."""
    ends = a.elevation.new_tensor(
        [
            [[s * 0.20, y, 0.56], [s * 0.74, z, 0.40]]
            for s in (-1, 1)
            for y, z in ((-0.15, -0.08), (-0.20, -0.21), (-0.25, -0.34))
        ]
    )
    ends = ends.permute(2, 0, 1).reshape(3, 1, 12).expand(-1, a.elevation.shape[0], -1)
    body = field.out_of(a.head_axes, ends * a.head_size) + a.head
    place, far = project(a, field.out_of(a.body_axes, body))
    width = torch.maximum(
        1.1 / depth.shape[1] ** 0.5 / torch.ones_like(a.half_height), torch.full_like(a.half_height, 0.0052)
    )
    cover = torch.zeros_like(depth)
    for i in range(0, 12, 2):
        start, way = place[..., i, None], place[..., i + 1, None] - place[..., i, None]
        t = (((uv - start) * way).sum(0) / way.square().sum(0)).clamp(0, 1)
        sag = torch.stack((torch.zeros_like(t), -0.12 * t * (1 - t)))
        gap = length(uv - start - way * t + sag)
        seen = depth + 0.05 > mix_ends(far, i, t)
        cover = torch.maximum(cover, field.smoothstep(1.5 * width, 0.5 * width, gap) * seen * (1 - 0.5 * t))
    return cover * a.cat


def mix_ends(values: Tensor, i: int, t: Tensor) -> Tensor:
    return values[:, i, None] * (1 - t) + values[:, i + 1, None] * t


def ground_shadow(a: Anatomy, ground: Tensor, size: int) -> Tensor:
    """How dark the critter makes the ground at points [3, b, size * size]: 1 in the open, traced at a quarter of the size."""
    batch = a.elevation.shape[0]
    small = (
        F.avg_pool2d(ground.clamp(-3, 3).transpose(0, 1).reshape(batch, 3, size, size), 4)
        .flatten(2)
        .transpose(0, 1)
        .contiguous()
    )
    up = torch.zeros_like(small)
    up[1] = 1
    openness, lit = OCCLUSION(a, small, up)
    shadow = (0.55 + 0.45 * lit) * (0.45 + 0.55 * openness)
    return F.interpolate(shadow.reshape(batch, 1, size // 4, size // 4), scale_factor=4, mode="bilinear").flatten(1)


# The hot functions by name, so that `compile` can put faster versions of the same functions in their places.
FIELD, STEP, OCCLUSION = field.field, step, occlusion
