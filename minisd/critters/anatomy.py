"""From words to numbers: proportions, places, colours and lights of a batch of scenes, each jittered by its seed.

Lengths are in heads: the skull has a radius of about 0.6, the ground lies at y = -1.3. x points right, y up, z towards
the viewer. Pairs (ears, eyes, legs) are stored once, for the right side, and mirrored in the distance field.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .scene import Scene

GROUND = -1.30
DISTANCE = 8.0  # from the camera to the plane z = 0

# fur: base, light (muzzle, belly), marks (stripes, spots); marks are darker than the base, on black lighter
FUR_COLOURS = {
    "orange": ("F0A04B", "FFE9C7", "C9692A"),
    "black": ("33313A", "8A8794", "595662"),
    "white": ("F6F1E9", "FFFBF4", "A59B94"),
    "gray": ("9C9EA6", "E8E8EC", "62656F"),
    "brown": ("8E5B3D", "E9CBA7", "54301F"),
    "cream": ("F2D6A6", "FFF4DF", "C6945A"),
}
IRIS_COLOURS = {"blue": "4FB4F0", "green": "63C46B", "yellow": "F5C531", "brown": "8A5426"}
NOSE_COLOURS = {"cat": "F29CA0", "dog": "3A2A2C"}
STUDIO_COLOURS = {
    "pink": "F7C9D0",
    "mint": "BFE6D2",
    "lavender": "D3C9F2",
    "yellow": "FBE3A1",
    "peach": "FBD0B4",
    "blue": "BFE0F5",
}
ACCESSORY_COLOURS = {
    "none": ("E0453F",),
    "red collar": ("E0453F",),
    "blue collar": ("3D7DDB",),
    "party hat": ("E0453F",),
    "bow tie": ("D9415F", "3E6FC4", "2E9E83"),
    "scarf": ("D8504A", "4D9A6A", "5B6FC0", "E6A23C"),
}
HAT_COLOURS = ("F2668B", "5AA9E6", "7ACB8B", "B48CE0")

# lights: key, sky, ground, rim, strength of the key. Keys are nearly white: coloured light would hide the fur's colour.
LIGHTS = {
    "grass": ("FFF4E0", "CFE4F8", "C2D6AE", "FFF6DC", 1.95),
    "beach": ("FFF4E8", "D8E8F8", "F0E4CC", "FFEBD0", 1.95),
    "night": ("FFFBF6", "B4B4C2", "6C6C80", "D2DCFA", 1.66),
    "snow": ("FFF7EC", "E4EAF2", "F2F3F6", "FFFFFF", 1.95),
    "studio": ("FFF4E8", "F3F0FA", None, "FFFFFF", 1.95),
}

# Each head: (value, relative jitter). Radii are x y z; an ear is a flattened tapered capsule from root to tip.
HEADS: dict[str, dict[str, Any]] = {
    "cat": {
        "skull": [(0.66, 0.04), (0.54, 0.04), (0.55, 0.03)],
        "cheek": [(0.34, 0.06), (-0.20, 0), (0.14, 0)],
        "cheek_radius": [(0.34, 0.05)],
        "muzzle": [(0.10, 0), (-0.205, 0), (0.47, 0)],
        "muzzle_radii": [(0.155, 0), (0.115, 0), (0.13, 0)],
        "nose": [(0, 0), (-0.125, 0), (0.595, 0)],
        "nose_radii": [(0.058, 0), (0.042, 0), (0.045, 0)],
        "eye": [(0.262, 0.04), (-0.015, 1.0), (0.43, 0)],
        "eye_radius": [(0.172, 0.06)],
    },
    "dog": {
        "skull": [(0.60, 0.05), (0.56, 0.05), (0.55, 0.03)],
        "cheek": [(0.26, 0.08), (-0.22, 0), (0.18, 0)],
        "cheek_radius": [(0.32, 0.06)],
        "muzzle": [(0.075, 0), (-0.215, 0), (0.53, 0.05)],
        "muzzle_radii": [(0.20, 0.06), (0.155, 0.05), (0.25, 0.08)],
        "nose": [(0, 0), (-0.10, 0), (0, 0)],  # its z follows the muzzle
        "nose_radii": [(0.105, 0), (0.075, 0), (0.07, 0)],
        "eye": [(0.235, 0.05), (0.03, 0.5), (0.435, 0)],
        "eye_radius": [(0.150, 0.07)],
    },
}
# root, tip, radius at the root, radius at the tip, flatness (thickness over width)
EARS = {
    "cat": (
        {
            "root": [(0.35, 0), (0.30, 0), (-0.02, 0)],
            "tip": [(0.55, 0.05), (0.78, 0.05), (-0.03, 0)],
            "radii": [(0.245, 0.06), (0.05, 0)],
            "flat": [(0.46, 0)],
        },
    ),
    "dog": (
        {
            "root": [(0.47, 0), (0.36, 0), (0.02, 0)],
            "tip": [(0.74, 0.04), (-0.16, 0.2), (0.10, 0)],
            "radii": [(0.13, 0), (0.205, 0.08)],
            "flat": [(0.48, 0)],
        },
        {
            "root": [(0.50, 0), (0.30, 0), (0.00, 0)],
            "tip": [(0.72, 0.04), (-0.42, 0.1), (0.08, 0)],
            "radii": [(0.13, 0), (0.215, 0.08)],
            "flat": [(0.48, 0)],
        },
        {
            "root": [(0.44, 0), (0.40, 0), (0.02, 0)],
            "tip": [(0.74, 0.04), (0.10, 0.2), (0.16, 0)],
            "radii": [(0.15, 0), (0.185, 0.1)],
            "flat": [(0.50, 0)],
        },
    ),
}
# Where the parts of the body lie. Legs and torso are tapered capsules, haunches ellipsoids, the tail a quadratic curve.
SITTING = {
    "head": (0, 0.38, 0.12), "chest": (0, -0.30, 0.03), "hip": (0, -0.84, -0.14), "torso_radii": (0.34, 0.45),
    "fore_hip": (0.17, -0.55, 0.24), "fore_paw": (0.20, -1.16, 0.34), "fore_radius": 0.13,
    "hind_hip": (0.36, -0.92, -0.02), "hind_paw": (0.40, -1.17, 0.30), "hind_radius": 0.15,
    "haunch": (0.34, -0.92, -0.06), "haunch_radii": (0.24, 0.30, 0.34), "neck_lift": 0.03,
    "tail_cat": ((0.15, -1.12, -0.40), (1.15, -1.32, -0.25), (0.74, -0.36, -0.2)),
    "tail_dog": ((0.15, -1.05, -0.42), (0.85, -1.05, -0.30), (0.80, -0.57, -0.25)),
}  # fmt: skip
LYING = {
    "head": (0, -0.28, 0.34), "chest": (0, -0.86, 0.16), "hip": (0, -0.86, -0.46), "torso_radii": (0.34, 0.40),
    "fore_hip": (0.24, -1.02, 0.30), "fore_paw": (0.26, -1.16, 0.72), "fore_radius": 0.125,
    "hind_hip": (0.42, -1.06, -0.46), "hind_paw": (0.50, -1.16, -0.10), "hind_radius": 0.14,
    "haunch": (0.36, -0.95, -0.50), "haunch_radii": (0.24, 0.30, 0.34), "neck_lift": -0.05,
    "tail_cat": ((0.20, -1.12, -0.80), (0.78, -1.16, -0.62), (0.86, -1.08, -0.10)),
    "tail_dog": ((0.20, -1.12, -0.80), (0.78, -1.16, -0.62), (0.86, -1.03, -0.10)),
}  # fmt: skip
STANDING = {
    "head": (0, 0.22, 0.46), "chest": (0, -0.46, 0.30), "hip": (0, -0.50, -0.46), "torso_radii": (0.33, 0.34),
    "fore_hip": (0.20, -0.60, 0.34), "fore_paw": (0.21, -1.16, 0.38), "fore_radius": 0.125,
    "hind_hip": (0.20, -0.62, -0.50), "hind_paw": (0.22, -1.16, -0.50), "hind_radius": 0.135,
    "haunch": (0.17, -0.62, -0.48), "haunch_radii": (0.19, 0.26, 0.26), "neck_lift": 0.0,
    "tail_cat": ((0.0, -0.38, -0.74), (0.0, -0.30, -1.30), (0.12, 0.50, -0.95)),
    "tail_dog": ((0.0, -0.38, -0.74), (0.0, -0.30, -1.30), (0.12, 0.55, -0.95)),
}  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {"portrait": SITTING, "sitting": SITTING, "lying": LYING, "standing": STANDING}
TAIL_RADII = {"cat": (0.095, 0.075), "dog": (0.105, 0.07)}

# camera: sideways spread, height, its spread, half-height of the picture, its relative jitter
CAMERAS = {
    "portrait": (0.05, 0.45, 0.05, 1.11, 0.05),
    "sitting": (0.10, -0.10, 0.05, 1.40, 0.05),
    "lying": (0.10, -0.48, 0.05, 1.22, 0.06),
    "standing": (0.10, -0.18, 0.05, 1.38, 0.05),
}
# turn of the body in radians: lowest, highest, share of the look; lying and standing bodies turn to the look's side
TURNS = {
    "portrait": (-0.12, 0.12, 0.15),
    "sitting": (-0.22, 0.22, 0.30),
    "lying": (0.25, 0.60, 0),
    "standing": (0.55, 0.85, 0),
}
SIDES = {"front": 0.0, "left": -1.0, "right": 1.0}


class Anatomy(SimpleNamespace):
    """All numbers of a batch of scenes, ready to meet rays [3, b, n]: scalars [b, 1], vectors and colours [k, b, 1]."""

    def rows(self, index: list[int]) -> Anatomy:
        """The numbers of some of the scenes."""
        return Anatomy(**{name: value[..., index, :] for name, value in vars(self).items()})


def anatomy(scenes: list[Scene], device: str | torch.device = "cpu") -> Anatomy:
    """Turn scenes into the numbers that the distance field, the materials and the lights read."""
    each = [_numbers(scene) for scene in scenes]
    return Anatomy(**{name: torch.stack([e[name] for e in each], -1)[..., None].to(device) for name in each[0]})


def linear(colour: str) -> Tensor:
    """An sRGB colour like "F0A04B" as linear light, [3] (gamma 2.2)."""
    return torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]) ** 2.2


class Dice:
    """Jitter from one seed: uniform numbers, relative jitter, choices."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def jitter(self, value: float, relative: float) -> float:
        return value * (1 + self.uniform(-relative, relative))

    def choice(self, options):
        return options[int(torch.randint(len(options), (), generator=self.generator))]

    def table(self, table: dict[str, list[tuple[float, float]]]) -> dict[str, list[float]]:
        return {name: [self.jitter(*pair) for pair in pairs] for name, pairs in table.items()}


def _numbers(scene: Scene) -> dict[str, Tensor]:
    """The numbers of one scene as float tensors: [] or [k]."""
    dice = Dice(scene.seed)
    parts = (_head(scene, dice), _body(scene, dice), _pose(scene, dice), _colours(scene, dice), _stage(scene, dice))
    return {
        name: _squeezed(torch.as_tensor(value, dtype=torch.float32)) for part in parts for name, value in part.items()
    }


def _squeezed(value: Tensor) -> Tensor:
    return value.reshape(()) if value.numel() == 1 else value


def _head(scene: Scene, dice: Dice) -> dict:
    head = dice.table(HEADS[scene.species])
    ear = dice.table(dice.choice(EARS[scene.species]))
    if scene.species == "dog":
        head["nose"][2] = head["muzzle"][2] + 0.88 * head["muzzle_radii"][2]
    return head | {
        "ear_root": ear["root"], "ear_tip": ear["tip"], "ear_radii": ear["radii"], "ear_flat": ear["flat"],
        "head_size": dice.jitter(1, 0.03), "cat": scene.species == "cat",
        "tongue": scene.species == "dog" and dice.uniform(0, 1) < 0.55,
        "collar": scene.accessory in ("red collar", "blue collar", "bow tie"), "tag": "collar" in scene.accessory,
        "bow": scene.accessory == "bow tie", "scarf": scene.accessory == "scarf", "hat": scene.accessory == "party hat",
    }  # fmt: skip


def _body(scene: Scene, dice: Dice) -> dict:
    body = dict(BODIES[scene.pose])
    tails = {"cat": body.pop("tail_cat"), "dog": body.pop("tail_dog")}
    start, middle, end = torch.tensor(tails[scene.species])
    t = torch.tensor([0, 0.2, 0.36, 0.5, 0.62, 0.74, 0.87, 1.0])[:, None]
    knots = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end
    if scene.pose != "standing" and dice.uniform(0, 1) < 0.5:
        knots = knots * torch.tensor([-1.0, 1, 1])
    chest, radii = body["chest"], body["torso_radii"]
    tail_radii = TAIL_RADII[scene.species]
    return body | {
        "torso_radii": (radii[0], dice.jitter(radii[1], 0.05)),
        "neck": (0, chest[1] + body.pop("neck_lift"), chest[2] + 0.01), "neck_radius": radii[0],
        "tail": knots.T, "tail_radii": tail_radii[0] + t[:, 0] * (tail_radii[1] - tail_radii[0]),
    }  # fmt: skip


def _pose(scene: Scene, dice: Dice) -> dict:
    """Rotations, as matrices whose columns are the axes of the body and of the head in the world."""
    look = SIDES[scene.look]
    low, high, share = TURNS[scene.pose]
    side = 1.0 if share else look or dice.choice((-1.0, 1.0))
    yaw = dice.uniform(low, high) * side + share * look
    head_yaw = dice.uniform(-0.12, 0.12) if not look else dice.uniform(-0.10, 0.10) + look * dice.uniform(0.50, 0.68)
    pitch, roll = dice.uniform(-0.10, 0.06), dice.uniform(-0.14, 0.14)
    return {
        "body_axes": _turn(yaw, 2, 0),
        "head_axes": _turn(head_yaw - yaw, 2, 0) @ _turn(-pitch, 2, 1) @ _turn(roll, 0, 1),  # within the body's frame
        "gaze": (dice.uniform(-0.10, 0.10) + 0.12 * look, dice.uniform(-0.06, 0.10)),
    }


def _turn(angle: float, i: int, j: int) -> Tensor:
    """The rotation by an angle that takes axis i towards axis j, [3, 3]."""
    matrix = torch.eye(3)
    matrix[i, i] = matrix[j, j] = math.cos(angle)
    matrix[i, j], matrix[j, i] = -math.sin(angle), math.sin(angle)
    return matrix


def _colours(scene: Scene, dice: Dice) -> dict:
    base, light, marks = (linear(colour) for colour in FUR_COLOURS[scene.fur])
    tint = torch.tensor([dice.jitter(1, 0.02) for _ in range(3)])
    return {
        "fur": base * tint * dice.jitter(1, 0.05),
        "fur_light": light,
        "fur_marks": marks,
        "striped": scene.pattern == "striped",
        "spotted": scene.pattern == "spotted",
        "tuxedo": scene.pattern == "tuxedo",
        "iris": linear(IRIS_COLOURS[scene.eyes]),
        "nose_colour": linear(NOSE_COLOURS[scene.species]),
        "cloth": linear(dice.choice(ACCESSORY_COLOURS[scene.accessory])),
        "hat_colour": linear(dice.choice(HAT_COLOURS)),
        "studio": linear(STUDIO_COLOURS[scene.studio]),
    }


def _stage(scene: Scene, dice: Dice) -> dict:
    """Camera, lights and the phases of everything random that is painted."""
    key, sky, ground, rim, strength = LIGHTS[scene.background]
    spread, height, height_spread, half, half_jitter = CAMERAS[scene.pose]
    hat = scene.accessory == "party hat"
    light = torch.tensor([dice.choice((-1, 1)) * dice.uniform(0.35, 0.65), 0.75, 0.65])
    return {
        "camera": (dice.uniform(-spread, spread), height + dice.uniform(-height_spread, height_spread) + 0.16 * hat),
        "half_height": dice.jitter(half, half_jitter) * (1.13 if hat else 1.0), "elevation": dice.uniform(0.10, 0.22),
        "light": light / light.norm(), "key": linear(key) * strength, "sky": linear(sky) * 0.80,
        "bounce": linear(ground or STUDIO_COLOURS[scene.studio]) * 0.45,
        "rim": linear(rim) * (2.2 if scene.background == "night" else 1.0),
        "sun": (dice.uniform(-0.8, 0.8), dice.uniform(0.52, 0.8)), "phase": [dice.uniform(0, 100) for _ in range(3)],
    }  # fmt: skip
