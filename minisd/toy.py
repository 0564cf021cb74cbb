"""Cats and dogs in two dimensions: point clouds whose perfect denoiser is known in closed form.

Every picture of the toy world is one point; all its cats together fill the silhouette of a cat, all its dogs that of a
dog. Because the data are known in full, so is the best possible prediction of the clean point, E[x0 | x]: a weighted
mean of the points. Every sampler and every trained network can be held against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Cloud:
    """Labelled points, and all that follows from them once noise is added: `x = x0 + sigma * eps`.

    The density of `x` is a mixture of equal Gaussians, one around each point, of variance `width^2 + sigma^2`. Methods
    follow the dtype of `x`, and take one `sigma`, a number or a 0-dim tensor, for the whole batch.
    """

    points: Float[Tensor, "n d"]
    labels: Int[Tensor, "n"]
    names: tuple[str, ...]  # names[label]
    width: float = 0.0  # standard deviation of the data around each point

    def only(self, name: str) -> Cloud:
        """The points of one label alone; their denoiser is the class-conditional one."""
        mine = self.labels == self.names.index(name)
        return Cloud(self.points[mine], self.labels[mine], self.names, self.width)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Float[Tensor, "m d"], Int[Tensor, "m"]]:
        """Draw `n` clean samples, with their labels."""
        pick = torch.randint(len(self.points), (n,), generator=generator)
        spread = self.width * torch.randn(n, self.points.shape[1], generator=generator, dtype=self.points.dtype)
        return self.points[pick] + spread, self.labels[pick]

    def log_joint(self, x: Float[Tensor, "b d"], sigma: Tensor | float) -> Float[Tensor, "b n"]:
        """log p(x, point): the log of each Gaussian of the mixture at `x`, weight included."""
        variance = torch.as_tensor(self.width**2 + sigma**2, dtype=x.dtype)
        squared = torch.cdist(x, self.points.to(x), compute_mode="donot_use_mm_for_euclid_dist").square()
        return -squared / (2 * variance) - x.shape[1] / 2 * (2 * math.pi * variance).log() - math.log(len(self.points))

    def log_density(self, x: Float[Tensor, "b d"], sigma: Tensor | float) -> Float[Tensor, "b"]:
        """log p(x) at the noise level `sigma`."""
        return self.log_joint(x, sigma).logsumexp(dim=1)

    def posterior(self, x: Float[Tensor, "b d"], sigma: Tensor | float) -> Float[Tensor, "b n"]:
        """p(point | x): which point `x` was before the noise came, by Bayes' rule."""
        return self.log_joint(x, sigma).softmax(dim=1)

    def label_posterior(self, x: Float[Tensor, "b d"], sigma: Tensor | float) -> Float[Tensor, "b k"]:
        """p(label | x): the best possible classifier of noisy points."""
        return self.posterior(x, sigma) @ F.one_hot(self.labels, len(self.names)).to(x)

    def denoise(self, x: Float[Tensor, "b d"], sigma: Tensor | float) -> Float[Tensor, "b d"]:
        """E[x0 | x]: the denoiser of least squared error (Karras et al. 2022, eq. 57 for width 0)."""
        mean = self.posterior(x, sigma) @ self.points.to(x)
        return (sigma**2 * mean + self.width**2 * x) / (self.width**2 + sigma**2)

    def score(self, x: Float[Tensor, "b d"], sigma: Tensor | float) -> Float[Tensor, "b d"]:
        """The gradient of `log_density`, `(E[x0 | x] - x) / sigma^2` (Tweedie's formula; Karras et al. 2022, eq. 3)."""
        return (self.denoise(x, sigma) - x) / sigma**2


def cloud(names: tuple[str, ...] = ("cat", "dog"), n: int = 800, width: float = 0.0) -> Cloud:
    """Silhouettes side by side, `n` points each, in float64; the mean is 0 and the mean square of a coordinate is 1.

    `names` are out of "cat", "dog" and "human".
    """
    shapes = [_fill(SHAPES[name], n) + torch.tensor([2.3 * place, 0]) for place, name in enumerate(names)]
    points = torch.cat(shapes)
    points = points - points.mean(dim=0)
    return Cloud(points / points.square().mean().sqrt(), torch.arange(len(names)).repeat_interleave(n), names, width)


def _fill(inside: Callable[[Tensor, Tensor], Tensor], n: int) -> Float[Tensor, "n 2"]:
    """The first `n` points inside a shape of an even, seemingly random sequence over [-1, 1]^2 (Roberts 2018, R2)."""
    plastic = 1.32471795724474602596  # the real root of x^3 = x + 1
    xy = torch.arange(1, 20 * n, dtype=torch.float64)[:, None] / torch.tensor([plastic, plastic**2]) % 1 * 2 - 1
    return xy[inside(*xy.T)][:n]


def _cat(x: Tensor, y: Tensor) -> Bool[Tensor, "n"]:
    a = x.abs()
    head = _ellipse(x, y, 0, 0.36, 0.46, 0.35) | _triangle(a, y, (0.07, 0.60), (0.44, 0.40), (0.40, 1.00))
    body = _ellipse(x, y, 0, -0.5, 0.40, 0.54) | _ellipse(a, y, 0.24, -0.9, 0.20, 0.11)
    tail = _stroke(x, y, 0.075, (0.30, -0.85), (0.62, -0.80), (0.78, -0.55), (0.76, -0.25), (0.88, -0.02))
    face = _ellipse(a, y, 0.18, 0.40, 0.07, 0.09) | _triangle(x, y, (-0.06, 0.25), (0.06, 0.25), (0, 0.17))
    return (head | body | tail) & ~face


def _dog(x: Tensor, y: Tensor) -> Bool[Tensor, "n"]:
    a = x.abs()
    head = _ellipse(x, y, 0, 0.50, 0.36, 0.34) | _ellipse(x, y, 0, 0.26, 0.30, 0.22)
    gap = _ellipse(a, y, 0.47, 0.30, 0.20, 0.40, tilt=0.22)
    ears = _ellipse(a, y, 0.50, 0.36, 0.15, 0.40, tilt=0.22)
    body = _ellipse(x, y, 0, -0.5, 0.38, 0.56) | _ellipse(a, y, 0.24, -0.9, 0.20, 0.11)
    tail = _stroke(x, y, 0.085, (-0.30, -0.80), (-0.62, -0.62), (-0.76, -0.34))
    face = _ellipse(a, y, 0.15, 0.52, 0.06, 0.075) | _ellipse(x, y, 0, 0.25, 0.12, 0.075)
    return (head & ~gap | ears | body | tail) & ~face


def _human(x: Tensor, y: Tensor) -> Bool[Tensor, "n"]:
    a = x.abs()
    trunk = _ellipse(x, y, 0, 0.75, 0.20, 0.23) | _stroke(a, y, 0.13, (0, 0.30), (0.12, 0.30), (0.08, -0.25))
    return trunk | _stroke(a, y, 0.09, (0.15, 0.33), (0.50, -0.10)) | _stroke(a, y, 0.11, (0.10, -0.30), (0.22, -0.95))


def _ellipse(x: Tensor, y: Tensor, cx: float, cy: float, rx: float, ry: float, tilt: float = 0.0) -> Bool[Tensor, "n"]:
    u = (x - cx) * math.cos(tilt) + (y - cy) * math.sin(tilt)
    v = (y - cy) * math.cos(tilt) - (x - cx) * math.sin(tilt)
    return (u / rx) ** 2 + (v / ry) ** 2 < 1


def _triangle(x: Tensor, y: Tensor, *corners: tuple[float, float]) -> Bool[Tensor, "n"]:
    sides = zip(corners, corners[1:] + corners[:1], strict=True)
    left = torch.stack([(bx - ax) * (y - ay) > (by - ay) * (x - ax) for (ax, ay), (bx, by) in sides])
    return left.all(dim=0) | ~left.any(dim=0)


def _stroke(x: Tensor, y: Tensor, radius: float, *path: tuple[float, float]) -> Bool[Tensor, "n"]:
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in pairwise(path):
        dx, dy = bx - ax, by - ay
        along = (((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
        inside |= (x - ax - along * dx) ** 2 + (y - ay - along * dy) ** 2 < radius**2
    return inside


SHAPES = {"cat": _cat, "dog": _dog, "human": _human}
