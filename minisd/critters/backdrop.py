"""The painted places: meadow, beach, night, snow and studio paper, each a function of the screen and the ground."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .anatomy import GROUND, Anatomy, linear
from .field import mix, smoothstep
from .material import noise


class Stage(NamedTuple):
    """Where each pixel looks: screen u, v; its point of the ground [3, b, n] and the way there; the horizon."""

    u: Tensor
    v: Tensor
    ground: Tensor
    t: Tensor
    horizon: Tensor
    pixel: float


def stage(a: Anatomy, uv: Tensor, origin: Tensor, direction: Tensor, size: int) -> Stage:
    t = (GROUND - origin[1]) / direction[1].clamp(max=-1e-3)
    horizon = 0.18 + 0.10 * torch.sin(a.phase[0]) - 0.35 * (a.camera[1] + 0.12)
    u, v = uv.expand(-1, a.phase.shape[1], -1)
    return Stage(u, v, origin + direction * t, t, horizon, 2 / size)


def paint(a: Anatomy, s: Stage, backgrounds: list[str]) -> Tensor:
    """The backdrop of every scene in linear light, [3, b, n], without the critter and its shadow."""
    out = torch.empty(3, *s.u.shape, device=s.u.device)
    for name in set(backgrounds):
        rows = [i for i, background in enumerate(backgrounds) if background == name]
        part = Stage(s.u[rows], s.v[rows], s.ground[:, rows], s.t[rows], s.horizon[rows], s.pixel)
        out[:, rows] = PAINTERS[name](a.rows(rows), part)
    return out


def depth(s: Stage) -> Tensor:
    """Distance to the ground below the horizon, and a far sky above it, [b, n]."""
    return torch.where(s.v < s.horizon, s.t.clamp(max=14.0), 16.0)


def snowflakes(a: Anatomy, s: Stage) -> Tensor:
    """Falling snow over the whole picture: coverage [b, n]."""
    cover = torch.zeros_like(s.u)
    for i, frequency in enumerate((4.0, 6.5, 9.0)):
        x, y = s.u * frequency + a.phase[0] + 3.3 * i, s.v * frequency + a.phase[1] + 1.7 * i
        one, two = _hash(x.floor(), y.floor(), i)
        away = ((x.frac() - 0.2 - 0.6 * one).square() + (y.frac() - 0.2 - 0.6 * two).square()).sqrt()
        cover = torch.maximum(cover, smoothstep(0.13, 0.06, away) * (two > 0.55) * (0.95 - 0.2 * i))
    return cover


def _colour(text: str, s: Stage) -> Tensor:
    return linear(text).to(s.u.device)[:, None, None]


def _hash(x: Tensor, y: Tensor, salt: float) -> tuple[Tensor, Tensor]:
    """Two numbers in 0..1 for every cell."""
    one = torch.sin(12.9 * x + 78.2 * y + salt) * 437.58
    two = torch.sin(39.3 * x + 11.1 * y + salt) * 237.51
    return one.frac().abs(), two.frac().abs()


def _under(s: Stage, height: Tensor) -> Tensor:
    """1 below a line on the screen, 0 above it."""
    return smoothstep(s.pixel, -s.pixel, s.v - height)


def _hills(s: Stage, base: float, height: float, frequency: float, phase: Tensor) -> Tensor:
    wave = torch.sin(s.u * frequency + phase) + 0.5 * torch.sin(2.3 * frequency * s.u + 1.7 * phase)
    return _under(s, s.horizon + base + height * wave)


def _clouds(a: Anatomy, s: Stage, height: float) -> Tensor:
    flat = torch.stack((s.u * 1.3 + a.phase[0], (s.v - height) * 3.2 + a.phase[1], a.phase[2].expand_as(s.u)))
    fine = torch.stack((s.u * 3 + a.phase[2], s.v * 5, torch.zeros_like(s.u)))
    return smoothstep(0.30, 0.62, noise(flat, 2.0) + 0.35 * noise(fine, 2.7)) * smoothstep(0.05, 0.25, s.v - s.horizon)


def _soil(a: Anatomy, s: Stage, x: float = 1, z: float = 1, frequency: float = 2.2, shift: int = 0) -> Tensor:
    """Noise on the ground."""
    gx, _, gz = s.ground
    phase = a.phase.roll(-shift, 0)
    return noise(torch.stack((gx * x + phase[0], gz * z + phase[1], torch.zeros_like(gx))), frequency)


def _sun(a: Anatomy, s: Stage, dx: float = 0, dy: float = 0) -> Tensor:
    return ((s.u - a.sun[0] - dx).square() + (s.v - a.sun[1] - dy).square()).sqrt()


def _grass(a: Anatomy, s: Stage) -> Tensor:
    patches = _soil(a, s)
    up = ((s.v - s.horizon) / 1.2).clamp(0, 1)
    sky = mix(_colour("D6F0FA", s), _colour("86C8F0", s), up)
    sky = mix(sky, _colour("FFFFFF", s), 0.85 * _clouds(a, s, 0.5))
    far = mix(sky, _colour("9CCF9A", s), _hills(s, 0.09, 0.05, 2.2, a.phase[0]))
    far = mix(far, _colour("7FBF74", s), _hills(s, 0.02, 0.03, 3.1, a.phase[1]))
    grass = mix(_colour("8FCB62", s), _colour("5FA64A", s), smoothstep(-0.9, 0.9, patches))
    grass = mix(grass, _colour("B7DE7B", s), 0.5 * smoothstep(0.25, 0.9, _soil(a, s, 3, 3, 3.1, 1)))
    petals = mix(_colour("FFF6D0", s), _colour("F7A8C4", s), smoothstep(-0.2, 0.2, patches))
    grass = mix(grass, petals, smoothstep(0.80, 0.86, _soil(a, s, 4.1, 2.6, 3.0, 2)))
    return mix(far, grass, _under(s, s.horizon))


def _beach(a: Anatomy, s: Stage) -> Tensor:
    up, sun = ((s.v - s.horizon) / 1.2).clamp(0, 1), _sun(a, s)
    sky = mix(_colour("FFE9CF", s), _colour("8FD0F2", s), (1.5 * up).clamp(max=1))
    sky = mix(sky, _colour("FFF8D8", s), smoothstep(0.17, 0.14, sun))
    sky = mix(sky, _colour("FFF0C0", s), 0.5 * smoothstep(0.55, 0.1, sun))
    sky = mix(sky, _colour("FFFFFF", s), 0.7 * _clouds(a, s, 0.6))
    down = s.horizon - s.v
    sea = mix(_colour("3FA7C9", s), _colour("7FD6D6", s), (down / 0.25).clamp(0, 1))
    foam = smoothstep(0.75, 0.95, torch.sin(90 * down + 3 * torch.sin(5 * s.u + a.phase[1])))
    sea = mix(sea, _colour("D8F6F2", s), 0.35 * foam)
    sand = mix(_colour("F3DDAE", s), _colour("E3C48E", s), smoothstep(-0.9, 0.9, _soil(a, s)))
    sand = mix(sand, _colour("FFF3D6", s), 0.4 * smoothstep(0.3, 0.9, _soil(a, s, 3, 3, 3.1, 1)))
    shore = s.horizon - 0.20 - 0.025 * torch.sin(3 * s.u + a.phase[0])
    sand = mix(_colour("FFFFFF", s), sand, smoothstep(0, 0.022, shore - s.v))
    return mix(mix(sky, sea, _under(s, s.horizon)), sand, _under(s, shore + 0.012))


def _night(a: Anatomy, s: Stage) -> Tensor:
    up, moon = ((s.v - s.horizon) / 1.2).clamp(0, 1), _sun(a, s)
    disc = smoothstep(s.pixel, -s.pixel, moon - 0.16)
    sky = mix(_colour("5B63B5", s), _colour("171C4A", s), (1.2 * up).clamp(max=1))
    x, y = 7 * s.u + a.phase[0], 7 * s.v + a.phase[1]
    one, two = _hash(x.floor(), y.floor(), 0)
    dx, dy = (x.frac() - 0.2 - 0.6 * one).abs(), (y.frac() - 0.2 - 0.6 * two).abs()
    stars = (
        smoothstep(0.11, 0.02, 0.6 * (dx**0.7 + dy**0.7) ** 1.43)
        * (two > 0.45)
        * smoothstep(0.05, 0.2, s.v - s.horizon)
    )
    sky = mix(sky, _colour("FFF9DC", s), stars)
    sky = mix(sky, _colour("8F9BE8", s), 0.45 * smoothstep(0.55, 0.12, moon))
    sky = mix(sky, _colour("FFF6CF", s), disc)
    for dx, dy, radius in ((0.05, 0.03, 0.035), (-0.05, -0.05, 0.025)):
        sky = mix(sky, _colour("EADFAE", s), 0.6 * smoothstep(s.pixel, -s.pixel, _sun(a, s, dx, dy) - radius))
    far = mix(sky, _colour("353A78", s), _hills(s, 0.10, 0.06, 2.4, a.phase[1]))
    meadow = mix(_colour("4A559A", s), _colour("343C78", s), smoothstep(-0.9, 0.9, _soil(a, s)))
    return mix(far, meadow, _under(s, s.horizon))


def _snow(a: Anatomy, s: Stage) -> Tensor:
    up = ((s.v - s.horizon) / 1.2).clamp(0, 1)
    sky = mix(_colour("EEF3FB", s), _colour("A9C8EA", s), up)
    far = mix(sky, _colour("D5E3F3", s), _hills(s, 0.12, 0.06, 1.9, a.phase[2]))
    x = 3.1 * s.u + a.phase[0]
    cell = x.floor()
    height = 0.16 + 0.10 * torch.sin(12.7 * cell)
    fir = _under(s, s.horizon + height - (x.frac() - 0.5).abs() / 3.1 * 2.2) * (torch.sin(5.3 * cell) > -0.3)
    far = mix(far, _colour("7FA3B5", s), fir)
    snow = mix(_colour("F4F8FF", s), _colour("CFDFF2", s), smoothstep(-0.9, 0.9, _soil(a, s)))
    return mix(far, snow, _under(s, s.horizon - 0.02))


def _studio(a: Anatomy, s: Stage) -> Tensor:
    glow = smoothstep(1.2, 0.0, (s.u.square() + (s.v - 0.25).square()).sqrt())
    vignette = 1.04 - 0.12 * (s.u.square() + (s.v - 0.1).square())
    paper = a.studio * (vignette * (1 + 0.10 * glow))
    return mix(paper, 0.93 * paper, 0.8 * smoothstep(0.25, -0.35, s.v - s.horizon + 0.1))


PAINTERS = {"grass": _grass, "beach": _beach, "night": _night, "snow": _snow, "studio": _studio}
