"""The critter as a signed distance field: how far is a point from the surface of each part?

Points are [3, b, n]: b scenes, n points each; distances [b, n]. Parts are joined by a smooth minimum, which is what
makes a cheek grow out of a skull. Left and right are one: points are folded onto the right side first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .anatomy import Anatomy
from .fuse import hot

ABSENT = 9.0  # added to the distance of an accessory that is not worn


def vector(like: Tensor, x: float, y: float, z: float) -> Tensor:
    """A constant vector or colour [3, 1, 1], on the device of another tensor."""
    return like.new_tensor([x, y, z])[:, None, None]


def length(v: Tensor) -> Tensor:
    return v.square().sum(0).sqrt()


def mix(a, b, t):
    return a + (b - a) * t


def smoothstep(low, high, x: Tensor) -> Tensor:
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def smooth_min(a: Tensor, b: Tensor, k: float) -> Tensor:
    """The minimum with a fillet of width k: min(a, b) - max(k - |a - b|, 0)^2 / 4k."""
    h = (k - (a - b).abs()).clamp(min=0)
    return torch.minimum(a, b) - h * h / (4 * k)


def ellipsoid(p: Tensor, centre: Tensor | float, radii: Tensor) -> Tensor:
    """Distance to an ellipsoid, to first order: k0 (k0 - 1) / k1, where k0 = |q / r| and k1 = |q / r^2|."""
    q = (p - centre) / radii
    k0, k1 = length(q), length(q / radii)
    return k0 * (k0 - 1) / k1.clamp(min=1e-6)


def capsule(p: Tensor, a: Tensor, b: Tensor, radius_a: Tensor, radius_b: Tensor) -> Tensor:
    """Distance to a tapered capsule from a to b."""
    pa, ba = p - a, b - a
    t = ((pa * ba).sum(0) / ba.square().sum(0)).clamp(0, 1)
    return length(pa - ba * t) - mix(radius_a, radius_b, t)


def fold(p: Tensor) -> Tensor:
    """Mirror points onto the side x > 0, softly, so that no crease shows where the halves meet."""
    right = vector(p, 1.0, 0, 0)
    return p + right * ((p[0].square() + 1e-4).sqrt() - p[0])


def into(axes: Tensor, p: Tensor) -> Tensor:
    """World to frame: the transposed rotation, axes [3, 3, b, 1] with one axis a column."""
    return axes[0] * p[0] + axes[1] * p[1] + axes[2] * p[2]


def out_of(axes: Tensor, p: Tensor) -> Tensor:
    """Frame to world."""
    return axes[:, 0] * p[0] + axes[:, 1] * p[1] + axes[:, 2] * p[2]


def head_frame(a: Anatomy, body: Tensor) -> Tensor:
    """Points of the body's frame in the head's frame, where the skull is centred and of unit size."""
    return into(a.head_axes, body - a.head) / a.head_size


class Distances(NamedTuple):
    """The distance to every part, [b, n], and the points in the frames of the body, the head and the hat, [3, b, n]."""

    body_point: Tensor
    head_point: Tensor
    hat_point: Tensor
    skull: Tensor
    ears: Tensor
    muzzle: Tensor
    head: Tensor  # skull, ears and muzzle in one
    eyes: Tensor
    nose: Tensor
    tongue: Tensor
    hat: Tensor
    pompom: Tensor
    torso: Tensor
    legs: Tensor  # the front ones
    hind_legs: Tensor
    haunch: Tensor
    tail: Tensor
    body: Tensor  # torso, legs, haunches and tail in one
    neckwear: Tensor
    tag: Tensor
    bow: Tensor


def distances(a: Anatomy, p: Tensor) -> Distances:
    """Measure the distance from points [3, b, n] to every part of the critter."""
    body_point = into(a.body_axes, p)
    head_point = head_frame(a, body_point)
    size = a.head_size
    skull, ears, muzzle = (d * size for d in _skull(a, fold(head_point)))
    head = smooth_min(smooth_min(skull, ears, 0.07), muzzle, 0.07)
    hat_point, hat, pompom = _hat(a, head_point)
    torso, legs, hind_legs, haunch, tail, body = _body(a, body_point)
    neckwear, tag, bow = _neck(a, body_point)
    return Distances(
        body_point, head_point, hat_point, skull, ears, muzzle, head,
        eyes=(length(fold(head_point) - a.eye) - a.eye_radius) * size,
        nose=ellipsoid(head_point, a.nose, a.nose_radii) * size,
        tongue=_tongue(a, head_point) * size, hat=hat * size, pompom=pompom * size,
        torso=torso, legs=legs, hind_legs=hind_legs, haunch=haunch, tail=tail, body=body,
        neckwear=neckwear, tag=tag, bow=bow,
    )  # fmt: skip


@hot
def field(a: Anatomy, p: Tensor) -> Tensor:
    """Signed distance from points [3, b, n] to the critter, [b, n]: negative inside."""
    d = distances(a, p)
    head = torch.minimum(torch.minimum(d.head, d.eyes), smooth_min(d.nose, d.head, 0.02))
    head = torch.minimum(torch.minimum(head, d.tongue), d.hat)
    worn = torch.minimum(torch.minimum(d.neckwear, d.tag), d.bow)
    return torch.minimum(smooth_min(head, d.body, 0.06), worn)


def _skull(a: Anatomy, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    squash = vector(p, 1, 1.15, 1)
    cheek = length((p - a.cheek) * squash) - a.cheek_radius
    skull = smooth_min(ellipsoid(p, 0.0, a.skull), cheek, 0.18)
    # Flattening space shortens distances: without the last factor rays overshoot and ears come out blocky.
    flat = 1 + vector(p, 0, 0, 1) * (1 / a.ear_flat - 1)
    ears = capsule(p * flat, a.ear_root * flat, a.ear_tip * flat, *a.ear_radii) * (0.25 + 0.7 * a.ear_flat)
    return skull, ears, ellipsoid(p, a.muzzle, a.muzzle_radii)


def _tongue(a: Anatomy, p: Tensor) -> Tensor:
    down = vector(p, 0, -1.15, 0.55)
    narrow = vector(p, 0.42, 0.75, 0.35)
    middle = (a.muzzle + down * a.muzzle_radii) * vector(p, 0, 1, 1)
    return ellipsoid(p, middle, a.muzzle_radii * narrow) + (1 - a.tongue) * ABSENT


def _hat(a: Anatomy, p: Tensor, tilt: float = 0.16, height: float = 0.62) -> tuple[Tensor, Tensor, Tensor]:
    """A party hat: a cone with a pompom, tilted on the head."""
    axes = p.new_tensor([[1, tilt, 0], [-tilt, 1, 0], [0, 0, 1]])[..., None, None] / (1 + tilt**2) ** 0.5
    q = into(axes, p - vector(p, 0.06, 0.44, 0))
    x, y, z = q
    wall = ((x.square() + z.square()).sqrt() - 0.27 * (1 - (y / height).clamp(0, 1))) * 0.90
    cone = torch.maximum(wall, torch.maximum(-y, y - height)) - 0.015
    pompom = length(q - vector(q, 0, height + 0.03, 0)) - 0.10
    return q, torch.minimum(cone, pompom) + (1 - a.hat) * ABSENT, pompom + (1 - a.hat) * ABSENT


def _body(a: Anatomy, p: Tensor) -> tuple[Tensor, ...]:
    """Torso, front legs, hind legs, haunches and tail, and all of them in one."""
    q = fold(p)
    torso = capsule(p, a.chest, a.hip, *a.torso_radii)
    fore, hind = a.fore_radius, a.hind_radius
    legs = smooth_min(
        capsule(q, a.fore_hip, a.fore_paw, fore * 1.05, fore),
        ellipsoid(q, _moved(a.fore_paw, 0.02, 0.06), fore * vector(q, 1.12, 0.90, 1.35)), 0.06,
    )  # fmt: skip
    hind_legs = smooth_min(
        capsule(q, a.hind_hip, a.hind_paw, hind * 1.1, hind * 0.85),
        ellipsoid(q, _moved(a.hind_paw, 0.01, 0.05), hind * vector(q, 0.95, 0.80, 1.25)), 0.06,
    )  # fmt: skip
    haunch = ellipsoid(q, a.haunch, a.haunch_radii)
    tail = capsule(p[:, None], a.tail[:, :-1], a.tail[:, 1:], a.tail_radii[:-1], a.tail_radii[1:]).amin(0)
    body = smooth_min(smooth_min(torso, legs, 0.10), smooth_min(hind_legs, haunch, 0.10), 0.09)
    return torso, legs, hind_legs, haunch, tail, smooth_min(body, tail, 0.08)


def _moved(p: Tensor, up: float, forward: float) -> Tensor:
    return p + vector(p, 0, up, forward)


def _neck(a: Anatomy, p: Tensor, slope: float = 0.18) -> tuple[Tensor, Tensor, Tensor]:
    """Collar or scarf, tag, and bow tie, on a ring round the neck that slopes down to the front."""
    cos, sin = 1 / (1 + slope**2) ** 0.5, slope / (1 + slope**2) ** 0.5
    x, ny, nz = p - a.neck
    y, z = cos * ny + sin * nz, cos * nz - sin * ny
    ring = (x.square() + z.square()).sqrt() - a.neck_radius
    front = z - a.neck_radius
    collar = (ring.square() + (0.70 * y).square()).sqrt() - 0.052 + (1 - a.collar) * ABSENT
    wrap = ((0.75 * ring).square() + (0.72 * y).square()).sqrt() - 0.095
    knot = torch.stack((x - 0.13, y + 0.20, front - 0.06))
    end = ellipsoid(knot, 0.0, vector(x, 0.085, 0.20, 0.05))
    scarf = smooth_min(wrap, end, 0.05) + (1 - a.scarf) * ABSENT
    tag = (x.square() + (y + 0.11).square() + (front - 0.055).square()).sqrt() - 0.075 + (1 - a.tag) * ABSENT
    side = (x.square() + 1e-5).sqrt()
    flare = side.clamp(max=0.26)
    wing = ((y + 0.03) / (0.055 + 0.42 * flare)).square() + ((front - 0.08) / (0.045 + 0.12 * flare)).square()
    wings = torch.maximum(0.5 * wing.sqrt() - 0.5, 3 * (side - 0.24)) * 0.10
    heart = torch.stack((x, y + 0.03, front - 0.10))
    bow = torch.minimum(wings, ellipsoid(heart, 0.0, vector(x, 0.06, 0.07, 0.06)))
    return torch.minimum(collar, scarf), tag, bow + (1 - a.bow) * ABSENT
