"""Sphere tracing: where does each ray meet the critter?

Rays are marched by the distance field, whose value is a step that cannot pass through a surface (Hart 1996). Coarse
pictures are traced first: a cone of rays that misses the critter needs no finer rays, and the others start where their
cone came close.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .anatomy import DISTANCE, Anatomy
from .camera import rays, screen
from .field import field, length

NEAR, FAR = DISTANCE - 2.4, DISTANCE + 3.0
ROUND = 8  # steps between two clean-ups of the list of rays


class Level(NamedTuple):
    """One pass over the picture: cones so many pixels wide, marched at most for so many rounds of steps.

    Steps are `caution` times the distance: flattened parts promise a little more room than there is. A cone has arrived
    when the surface is nearer than `close` times its width.
    """

    width: int
    rounds: int
    caution: float
    close: float


LEVELS = (Level(8, 5, 0.72, 0.75), Level(2, 3, 0.80, 0.75), Level(1, 6, 0.95, 0.05))


class Hits(NamedTuple):
    """The rays that meet the critter: k of them in every scene, the largest count in the batch.

    `pixel` says to which one each belongs; a scene with fewer hits fills its list with rays whose coverage is 0.
    """

    pixel: Tensor  # [b, k]
    t: Tensor  # [b, k] distance along the ray
    coverage: Tensor  # [b, k] share of the pixel that the critter covers, 0..1
    direction: Tensor  # [3, b, k]
    point: Tensor  # [3, b, k]
    normal: Tensor  # [3, b, k]


def trace(a: Anatomy, size: int) -> Hits:
    """Find the pixels that the critter covers, and the point that each of them sees."""
    batch, device = len(a.elevation), a.elevation.device
    index = torch.zeros(batch, 1, dtype=torch.int64, device=device)  # one cone for the whole picture
    t, grid = torch.full((batch, 1), NEAR, device=device), 1
    for level in LEVELS:
        index, t = _split(index, t, grid, size // level.width)
        grid = size // level.width
        origin, direction = rays(a, _at(screen(grid, device).expand(-1, batch, -1), index))
        pixel = 2 * a.half_height / grid
        t, nearest, closest = _march(a, origin, direction, t, level.close * pixel, level)
        if level is not LEVELS[-1]:
            # A list shorter than its neighbours in the batch is filled up with cones that missed: they miss again.
            order = _first((t < FAR) | (nearest < level.close * pixel))
            index, t = index.gather(1, order), t.gather(1, order)
    coverage = (1.06 - nearest / pixel).clamp(0, 1)
    order = _first(coverage > 0)
    index, t, coverage = (x.gather(1, order) for x in (index, closest, coverage))
    direction = _at(direction, order)
    point = origin + direction * t
    return Hits(index, t, coverage, direction, point, normal(a, point))


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(2, index.expand(len(values), -1, -1))


def _first(chosen: Tensor) -> Tensor:
    """Indices of the chosen entries of each row, in order, padded with others to the longest row's count, [b, k]."""
    count = max(1, int(chosen.sum(1).max()))
    return chosen.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]


def _split(index: Tensor, t: Tensor, coarse: int, fine: int) -> tuple[Tensor, Tensor]:
    """Split the cones of a coarse grid into those of a finer one; each starts where its parent stopped."""
    ratio = fine // coarse
    offsets = torch.arange(ratio, device=index.device)
    rows = (index // coarse * ratio)[..., None, None] + offsets[:, None]
    columns = (index % coarse * ratio)[..., None, None] + offsets
    return (rows * fine + columns).flatten(1), t.repeat_interleave(ratio * ratio, dim=1)


def _march(a: Anatomy, origin: Tensor, direction: Tensor, t: Tensor, close: Tensor, level: Level) -> tuple[Tensor, ...]:
    """March until all rays have arrived or left: how far each came, how near to the surface, and where that was.

    After every round only those still on their way go on.
    """
    state: tuple[Tensor, ...] = (t, torch.full_like(t, 9.0), t)
    order = torch.arange(t.shape[1], device=t.device).expand(t.shape)
    for _ in range(level.rounds):
        ways, some = _at(direction, order), tuple(x.gather(1, order) for x in state)
        for _ in range(ROUND):
            some = _step(a, origin, ways, some, close, level.caution)
        state = tuple(x.scatter(1, order, y) for x, y in zip(state, some, strict=True))
        t, nearest, _ = state
        walking = (nearest > close) & (t < FAR)
        if not walking.any():
            break
        order = _first(walking)
    return state


def _step(
    a: Anatomy,
    origin: Tensor,
    direction: Tensor,
    state: tuple[Tensor, ...],
    close: Tensor,
    caution: float,
) -> tuple[Tensor, ...]:
    """March every ray by one step; keep the smallest distance met and where it was."""
    t, nearest, closest = state
    distance = field(a, origin + direction * t)
    closest = torch.where(distance < nearest, t, closest)
    nearest = torch.minimum(nearest, distance)
    return torch.where((distance < close) | (t > FAR), t, t + distance * caution), nearest, closest


def normal(a: Anatomy, p: Tensor, reach: float = 0.004) -> Tensor:
    """The unit gradient of the distance field, from four evaluations at the corners of a tetrahedron."""
    corners = p.new_tensor([[1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]])[..., None, None]
    n = sum(corner * field(a, p + reach * corner) for corner in corners)
    return n / length(n).clamp(min=1e-6)
