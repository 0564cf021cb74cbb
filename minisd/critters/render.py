"""From scenes to pictures and everything known about them: trace, colour, light, place, style."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from . import backdrop, camera, light, material, styles, trace
from .anatomy import Anatomy, anatomy
from .field import mix, vector
from .scene import Scene

SOLID = 0.5  # a pixel is the critter's if this much of it is covered
SMALLEST = 128  # smaller pictures are drawn at this size or more and shrunk: eyes and styles need the pixels


@dataclass(frozen=True)
class Render:
    """Pictures and their ground truth: all of one batch, pixel for pixel.

    `depth` is the distance from the camera in heads (the critter lies at about 8, the sky at 16); `normals` point in
    world space (x right, y up, z to the viewer) and are 0 off the critter; `parts` are indices into `PARTS`;
    `edges` are ink lines, 0..1.
    """

    image: Float[Tensor, "b 3 h w"]
    depth: Float[Tensor, "b 1 h w"]
    normals: Float[Tensor, "b 3 h w"]
    parts: Int[Tensor, "b 1 h w"]
    edges: Float[Tensor, "b 1 h w"]


@torch.no_grad()
def render(scenes: list[Scene], size: int = 128, device: str | torch.device = "cpu", chunk: int = 8) -> Render:
    """Draw scenes as pictures of size x size pixels, `chunk` of them at a time.

    A scene's picture depends on the scene and the size alone, not on its company: the same scene gives the same bytes.
    Raises ValueError for an empty list and for sizes that are not a positive multiple of 8.
    """
    parts = [_render(some, size, device) for some in _chunks(scenes, size, chunk)]
    return Render(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Render)})


@torch.no_grad()
def depths(
    scenes: list[Scene], size: int = 128, device: str | torch.device = "cpu", chunk: int = 8
) -> Float[Tensor, "b 1 h w"]:
    """The `depth` of `render`, and nothing else: no colours, no light. Raises what `render` raises."""
    parts = []
    for some in _chunks(scenes, size, chunk):
        shrink = -(-SMALLEST // size)
        a, full = anatomy(some, device), size * shrink
        uv = camera.screen(full, a.phase.device)
        distance = _distance(backdrop.stage(a, uv, *camera.rays(a, uv), full), trace.trace(a, full))
        parts.append(distance.unflatten(1, (1, full, full))[..., shrink // 2 :: shrink, shrink // 2 :: shrink])
    return torch.cat(parts)


def batches(
    generator: torch.Generator,
    size: int = 128,
    batch: int = 8,
    split: str = "train",
    device: str | torch.device = "cpu",
) -> Iterator[tuple[list[Scene], Render]]:
    """Sample and draw scenes without end: yields a list of `batch` scenes and their render."""
    while True:
        scenes = [Scene.sample(generator, split) for _ in range(batch)]
        yield scenes, render(scenes, size, device)


def _chunks(scenes: list[Scene], size: int, chunk: int) -> Iterator[list[Scene]]:
    if not scenes:
        raise ValueError("no scenes to render: give a list of at least one Scene")
    if not isinstance(size, int) or size <= 0 or size % 8:
        raise ValueError(f"size={size!r} must be a positive multiple of 8, such as 64, 128 or 256")
    for i in range(0, len(scenes), chunk):
        yield scenes[i : i + chunk]


def _render(scenes: list[Scene], size: int, device: str | torch.device) -> Render:
    shrink = -(-SMALLEST // size)
    full = size * shrink
    a = anatomy(scenes, device)
    layers, normals = _layers(a, scenes, full)
    pictures, edges = [], []
    for i, scene in enumerate(scenes):  # one by one: each has its own style and its own grain
        one = styles.Layers(*(layer[i : i + 1] for layer in layers))
        pictures.append(styles.PAINT[scene.style](one, torch.Generator().manual_seed(scene.seed)))
        edges.append(styles.ink(one))
    image = F.avg_pool2d(torch.cat(pictures), shrink) * 2 - 1
    centre = slice(shrink // 2, None, shrink)
    return Render(
        image=image,
        depth=layers.depth[..., centre, centre].contiguous(),
        normals=normals[..., centre, centre].contiguous(),
        parts=layers.part[..., centre, centre].to(torch.int64),
        edges=F.avg_pool2d(torch.cat(edges), shrink),
    )


def _spread(values: Float[Tensor, "*n b k"], index: Int[Tensor, "b k"], pixels: int) -> Float[Tensor, "*n b p"]:
    """Values of the hits put at their pixels, and zeros at the others."""
    return values.new_zeros(*values.shape[:-1], pixels).scatter(-1, index.expand(values.shape), values)


def _distance(stage: backdrop.Stage, hits: trace.Hits) -> Float[Tensor, "b p"]:
    """How far away each pixel is: the critter's, else its background's."""
    far = backdrop.depth(stage)
    solid = _spread(hits.coverage, hits.pixel, far.shape[1]) > SOLID
    return torch.where(solid, _spread(hits.t, hits.pixel, far.shape[1]), far)


def _layers(a: Anatomy, scenes: list[Scene], size: int) -> tuple[styles.Layers, Tensor]:
    """All layers of a batch of scenes, and the normals [b, 3, size, size]."""
    uv = camera.screen(size, a.phase.device)
    origin, direction = camera.rays(a, uv)
    stage = backdrop.stage(a, uv, origin, direction, size)
    hits = trace.trace(a, size)
    m = material.material(a, hits.point, hits.normal, 2 * a.half_height / size)
    openness, lit = light.occlusion(a, hits.point, hits.normal)
    lights = light.shoulder(light.shade(a, hits, m, openness, lit))
    arriving = ((hits.normal * a.light).sum(0).clamp(min=0) * 0.8 + 0.2) * (0.25 + 0.75 * lit) + 0.12 * m.glow

    place = backdrop.paint(a, stage, [s.background for s in scenes])
    near = material.smoothstep(-2.6, -1.4, stage.ground[2]) * (direction[1] < -0.01)
    shadow = mix(1.0, light.ground_shadow(a, stage.ground, size), near)
    tint = vector(place, 0.092, 0.097, 0.106)
    shaded = place * (shadow + (1 - shadow) * tint)

    def spread(values: Tensor) -> Tensor:
        return _spread(values, hits.pixel, size * size)

    mask = spread(hits.coverage)
    solid = mask > SOLID
    distance = _distance(stage, hits)
    whisker = camera.whiskers(a, uv, distance)
    picture = mix(shaded, spread(lights), mask)
    pale = torch.where(a.fur.mean(0) > 0.5, 0.25, 0.92)
    picture = mix(picture, pale, 0.8 * whisker)
    flakes = backdrop.snowflakes(a, stage) * a.phase.new_tensor([s.background == "snow" for s in scenes])[:, None]
    picture = mix(picture, 1.0, flakes * (1 - mask))

    def square(x: Tensor) -> Tensor:
        x = x[None] if x.dim() == 2 else x
        return x.transpose(0, 1).reshape(-1, len(x), size, size)

    layers = styles.Layers(
        picture=light.display(picture), albedo=light.display(spread(m.colour)),
        backdrop=light.display(mix(shaded, place, 0.5)), mask=mask, depth=distance, part=spread(m.part) * solid,
        whiskers=whisker, light=spread(arriving), glow=spread(m.glow),
    )  # fmt: skip
    return styles.Layers(*map(square, layers)), square(spread(hits.normal) * solid)
