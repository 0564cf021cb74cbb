"""What every point of the critter is made of: colour, part, shine."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .anatomy import Anatomy
from .field import Distances, capsule, distances, fold, into, length, mix, smoothstep, vector

PARTS = (
    "background", "head", "body", "eyes", "nose", "tongue", "hat", "neckwear", "tag", "ears", "legs", "tail",
)  # fmt: skip


class Material(NamedTuple):
    """Linear colour [3, b, n], part label [b, n], shine and glow [b, n] (glow: how far the light is ignored)."""

    colour: Tensor
    part: Tensor
    shine: Tensor
    glow: Tensor


def material(a: Anatomy, p: Tensor, n: Tensor, pixel: Tensor) -> Material:
    """Colour the points p [3, b, n] with normals n.

    `pixel` [b, 1] is the width of a pixel, over which borders are softened.
    """
    d = distances(a, p)
    on_head = smoothstep(0.03, -0.03, d.head - d.body)
    facing = into(a.head_axes, into(a.body_axes, n))[2]
    colour = _face(a, d, on_head, facing, _coat(a, d, on_head))
    part = _limbs(d, on_head)
    shine, glow = torch.full_like(part, 0.06), torch.zeros_like(part)
    skin = torch.minimum(d.head, d.body)
    surface = torch.minimum(skin, d.eyes)
    cloth_surface = torch.minimum(surface, d.neckwear)
    stripes = smoothstep(-0.15, 0.15, torch.sin(26 * (d.hat_point[1] + 0.35 * d.hat_point[0])))
    cream = vector(p, 1.0, 0.81, 0.39)
    hat = mix(mix(a.hat_colour, cream, stripes), vector(p, 0.95, 0.90, 0.80), _inside(d.pompom, pixel))
    checks = smoothstep(-0.18, 0.18, torch.sin(30 * d.body_point[0]) - 0.2) * a.scarf
    layers = (  # part, distance beyond what lies beneath, colour, shine, glow
        ("nose", d.nose - skin + 0.004, a.nose_colour, 0.5, 0.0),
        ("tongue", d.tongue - skin, vector(p, 0.85, 0.25, 0.28), 0.25, 0.0),
        ("eyes", d.eyes - skin, _eye(a, d.head_point, pixel), 0.15, 0.85),
        ("hat", d.hat - surface, hat, 0.15, 0.0),
        ("neckwear", d.neckwear - surface, mix(a.cloth, 0.75 * a.cloth + 0.2, checks), 0.15, 0.0),
        ("neckwear", d.bow - cloth_surface, a.cloth, 0.2, 0.0),
        ("tag", d.tag - cloth_surface, vector(p, 0.95, 0.66, 0.16), 0.8, 0.0),
    )
    for name, depth, paint, shininess, glowing in layers:
        mask = _inside(depth, pixel)
        colour, shine, glow = mix(colour, paint, mask), mix(shine, shininess, mask), mix(glow, glowing, mask)
        part = torch.where(mask > 0.5, float(PARTS.index(name)), part)
    return Material(colour, part, shine, glow)


def _limbs(d: Distances, on_head: Tensor) -> Tensor:
    """Which part of the skin a point belongs to: that whose own surface is nearest, before they were joined."""
    head = torch.where(d.ears < torch.minimum(d.skull, d.muzzle), PARTS.index("ears"), PARTS.index("head"))
    trunk = torch.minimum(d.torso, d.haunch)
    body = torch.where(torch.minimum(d.legs, d.hind_legs) < trunk, PARTS.index("legs"), PARTS.index("body"))
    body = torch.where(d.tail < torch.minimum(trunk, torch.minimum(d.legs, d.hind_legs)), PARTS.index("tail"), body)
    return torch.where(on_head > 0.5, head, body).to(on_head)


def noise(p: Tensor, frequency: float) -> Tensor:
    """Smooth, cheap, repeatable noise in about -1..1: sines bent by sines."""
    x, y, z = p * frequency
    first = torch.sin(x + 1.7 * torch.sin(0.8 * y + 1.3)) * torch.sin(1.1 * y + 1.5 * torch.sin(0.7 * z + 0.4))
    return 0.6 * first + 0.4 * torch.sin(1.3 * z + 1.2 * torch.sin(0.9 * x)) * torch.sin(0.9 * x + 2.1)


def _inside(depth: Tensor, pixel: Tensor) -> Tensor:
    return smoothstep(0.7 * pixel, -0.35 * pixel, depth)


def _band(x: Tensor, width: float = 0.18) -> Tensor:
    return smoothstep(-width, width, x)


def _coat(a: Anatomy, d: Distances, on_head: Tensor) -> Tensor:
    """Fur with its pattern, and the lighter muzzle and chest, [3, b, n]."""
    head, body = d.head_point, d.body_point
    on_muzzle = smoothstep(0.035, -0.015, d.muzzle - d.skull) * on_head
    on_ears = smoothstep(0.02, -0.03, d.ears - d.skull) * on_head
    on_legs = smoothstep(0.03, -0.02, d.legs - d.torso)
    on_tail = smoothstep(0.06, 0.0, d.tail)
    middle = a.chest + vector(head, 0, -0.20, 0.36)
    chest = smoothstep(0.03, -0.05, length((body - middle) * vector(head, 1.2, 0.55, 1)) - 0.30) * (1 - on_head)

    fur = mix(a.fur, a.fur_marks, 0.88 * a.striped * _stripes(a, d, on_head, on_legs, on_tail))
    fur = mix(fur, a.fur_marks, a.spotted * _spots(a, head, body, on_head, on_ears))
    fur = mix(fur, 0.72 * a.fur, 0.8 * on_ears * (1 - a.cat) * (1 - a.spotted))
    fur = mix(fur, a.fur_light, 0.92 * on_muzzle)
    paws = smoothstep(-1.02, -1.08, body[1]) * (1 - on_head) * (1 - on_tail)
    white = torch.stack((_blaze(head) * on_head, chest, paws, on_muzzle)).amax(0)
    fur = mix(fur, vector(fur, 0.88, 0.86, 0.83), a.tuxedo * white)
    return mix(fur, a.fur_light, 0.55 * chest * (1 - a.tuxedo) * (1 - on_legs))


def _face(a: Anatomy, d: Distances, on_head: Tensor, facing: Tensor, fur: Tensor) -> Tensor:
    """Inner ears, blush and mouth painted onto the fur, [3, b, n]."""
    x, y, z = d.head_point
    fur = mix(fur, mix(vector(fur, 0.88, 0.44, 0.44), a.fur, 0.15), _inner_ear(a, d, facing))
    blush = smoothstep(0.17, 0.02, ((x.abs() - a.eye[0] - 0.13).square() + (1.25 * (y + 0.20)).square()).sqrt())
    blush = blush * on_head * smoothstep(0.1, 0.4, z) * (0.20 + 0.30 * smoothstep(0.05, 0.35, a.fur.mean(0)))
    fur = mix(fur, fur * vector(fur, 0.60, 0.75, 0.75) + vector(fur, 0.42, 0.07, 0.09), blush)
    return mix(fur, vector(fur, 0.10, 0.04, 0.04), 0.85 * _mouth(a, d.head_point, facing))


def _blaze(head: Tensor) -> Tensor:
    """A tuxedo's white wedge between the eyes."""
    x, y, z = head
    wedge = x.abs() - 0.055 - 0.25 * (0.05 - y).clamp(min=0)
    return smoothstep(0.02, -0.02, wedge) * smoothstep(0.42, 0.30, y) * smoothstep(0, 0.3, z)


def _stripes(a: Anatomy, d: Distances, on_head: Tensor, on_legs: Tensor, on_tail: Tensor) -> Tensor:
    """A tabby's bars on forehead and cheeks, and rings round body, legs and tail."""
    x, y, z = d.head_point
    side = x.abs()
    bend = noise(d.head_point + a.phase, 6.0)
    forehead = (
        _band(torch.cos(25 * x + 0.5 * bend) - 0.25)
        * smoothstep(0.16, 0.26, y - 0.12 * side)
        * smoothstep(0.30, 0.20, side)
    )
    cheeks = _band(torch.sin(24 * y - 9 * side + 0.6 * bend) - 0.15)
    cheeks = cheeks * smoothstep(0.40, 0.47, side) * smoothstep(0.22, 0.1, y) * smoothstep(-0.45, -0.35, y)
    bend = noise(d.body_point + a.phase, 4.0)
    spine = a.hip - a.chest
    along = ((d.body_point - a.chest) * spine).sum(0) / length(spine)
    x, y, z = d.body_point
    ring = mix(torch.sin(21 * along + 1.5 * bend), torch.sin(21 * y + 0.7 * bend), on_legs)
    ring = mix(ring, torch.sin(17 * (x.abs() + y + z)), on_tail)
    return mix(_band(ring - 0.25), torch.maximum(forehead, cheeks), on_head)


def _spots(a: Anatomy, head: Tensor, body: Tensor, on_head: Tensor, on_ears: Tensor) -> Tensor:
    """A dog's spots on the body, its dark ears, and a patch round one eye."""
    blobs = _band(noise(1.2 * body + a.phase.roll(-1, 0), 5.2) - 0.34, 0.05) * (
        1 - on_head * smoothstep(0.5, 0.2, head[0].abs())
    )
    side = torch.where(a.phase[0] > 50, 1.0, -1.0)
    mirrored = vector(head, 1.0, 0, 0) * (side - 1) + 1
    squash = vector(head, 1, 0.9, 0.6)
    patch = length((head - a.eye * mirrored) * squash) - 0.25 + 0.03 * noise(head + a.phase, 6.0)
    spots = torch.maximum(blobs, _band(-patch, 0.02) * on_head)
    return torch.maximum(spots * (1 - on_ears), on_ears)


def _inner_ear(a: Anatomy, d: Distances, facing: Tensor) -> Tensor:
    flat = vector(d.head_point, 1, 1, 0)
    root, tip = mix(a.ear_root, a.ear_tip, 0.12) * flat, mix(a.ear_root, a.ear_tip, 0.80) * flat
    shell = capsule(fold(d.head_point) * flat, root, tip, 0.60 * a.ear_radii[0], 0.5 * a.ear_radii[1])
    return (
        smoothstep(0.02, -0.02, shell) * a.cat * smoothstep(0.1, 0.4, facing) * smoothstep(0.0, -0.03, d.ears - d.skull)
    )


def _mouth(a: Anatomy, head: Tensor, facing: Tensor) -> Tensor:
    """Two arcs under the nose, and the line that joins them to it."""
    x, y, z = head
    top = a.muzzle[1] + 0.10 * a.muzzle_radii[1]
    radius = 0.42 * a.muzzle_radii[0]
    arcs = (((x.abs() - radius).square() + (y - top + 0.02).square()).sqrt() - radius).abs() + 9.0 * (y > top - 0.02)
    line = x.abs() + 9.0 * ((y < top - 0.02) | (y > a.nose[1]))
    return smoothstep(0.020, 0.008, torch.minimum(arcs, line)) * (z > 0.4) * smoothstep(0, 0.3, facing)


def _eye(a: Anatomy, head: Tensor, pixel: Tensor) -> Tensor:
    """An eye in its own plane: white, iris lighter below, pupil (a slit for cats), dark lid, two highlights."""
    side = torch.sign(head[0])
    x, y = (head[0] - side * a.eye[0]) / a.eye_radius, (head[1] - a.eye[1]) / a.eye_radius
    gx, gy = x - a.gaze[0], y - a.gaze[1]
    soft = pixel / a.eye_radius
    radius = (gx * gx + gy * gy).sqrt()
    iris = mix(0.50 * a.iris, 1.25 * a.iris + 0.04, smoothstep(0.5, -0.6, gy))
    eye = mix(vector(head, 0.80, 0.78, 0.76), iris, smoothstep(0.80 + soft, 0.80 - soft, radius))
    eye = mix(eye, 0.35 * a.iris, 0.8 * smoothstep(0.14, 0.02, (radius - 0.78).abs()))
    slit = 0.25 * (((gx / 0.25).square() + (gy / 0.56).square()).sqrt() - 1)
    pupil = smoothstep(soft, -soft, mix(radius - 0.46, slit, a.cat))
    lid = smoothstep(0.86, 0.95, (x * x + y * y).sqrt() + 0.10 * y)
    eye = mix(eye, vector(head, 0.012, 0.010, 0.016), pupil)
    eye = mix(eye, vector(head, 0.020, 0.015, 0.018), lid)
    lit = torch.sign(a.light[0])
    large = ((x - 0.26 * lit).square() + (y - 0.34).square()).sqrt() - 0.21
    small = ((x + 0.30 * lit).square() + (y + 0.30).square()).sqrt() - 0.10
    return mix(eye, 1.25, smoothstep(soft, -soft, torch.minimum(large, small)))
