"""Measures of what a model draws: does it do what the prompt says, does it look like the data, does it vary."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from .critters import Scene, prompt
from .critters.oracle import Oracle, shown
from .critters.segmenter import COUNTED, Segmenter, as_usual, count
from .image import from_pil
from .pipeline import StableDiffusion
from .weights import assets, read_module


@dataclass(frozen=True)
class Count:
    """So many right out of so many."""

    right: int
    total: int

    @property
    def share(self) -> float:
        return self.right / self.total if self.total else math.nan

    def interval(self, z: float = 2.576) -> tuple[float, float]:
        """Where the true share lies with 99% confidence (Wilson 1927); `z` is the normal quantile.

        Nothing counted says nothing: 0 to 1.
        """
        n, k = self.total, self.right
        centre = (k + z * z / 2) / (n + z * z)
        half = z / (n + z * z) * math.sqrt(k * (n - k) / max(n, 1) + z * z / 4)
        return centre - half, centre + half


def adherence(scenes: Sequence[Scene], readings: Sequence[dict[str, str]]) -> dict[str, Count]:
    """How often what was read from each picture is what its scene says, by attribute; what a style can't show is not
    counted.

    scenes: what the prompts said; readings: what the oracle read, attribute by attribute.
    """
    counts = {}
    for name in readings[0]:
        pairs = [
            (getattr(scene, name), reading[name])
            for scene, reading in zip(scenes, readings, strict=True)
            if shown(scene, name)
        ]
        counts[name] = Count(sum(said == read for said, read in pairs), len(pairs))
    return counts


def load_oracle() -> Oracle:
    """The bundled oracle."""
    return read_module(Oracle(), assets() / "models" / "oracle.safetensors")


def load_segmenter() -> tuple[Segmenter, dict[str, list[tuple[int, int]]]]:
    """The bundled segmenter, and the counts that are usual in renders."""
    folder = assets() / "models"
    usual = json.loads((folder / "segmenter.json").read_text(encoding="utf-8"))
    return read_module(Segmenter(), folder / "segmenter.safetensors"), usual


def anatomy(
    segmenter: Segmenter,
    usual: dict[str, list[tuple[int, int]]],
    scenes: Sequence[Scene],
    drawn: Float[Tensor, "b 3 h w"],
) -> dict[str, Count]:
    """How often a picture shows as many of each part as renders of its scene's kind do; "whole" is of all parts."""
    right = as_usual(usual, scenes, count(segmenter.parts(drawn)))
    found = {name: Count(int(column.sum()), len(scenes)) for name, column in zip(COUNTED, right.T, strict=True)}
    return found | {"whole": Count(int(right.all(1).sum()), len(scenes))}


def draw_scenes(
    sd: StableDiffusion, scenes: Sequence[Scene], batch: int = 20, **settings: Any
) -> Float[Tensor, "b 3 h w"]:
    """Each scene's full prompt drawn once, with seeds 0, 1, 2 ...; `settings` go to `sd.text_to_image`."""
    drawn = []
    for first in tqdm(range(0, len(scenes), batch), desc="drawing"):
        some = [prompt(scene) for scene in scenes[first : first + batch]]
        drawn.append(from_pil(sd(some, seed=first, progress=False, **settings)))
    return torch.cat(drawn)


def measure(oracle: Oracle, scenes: Sequence[Scene], drawn: Float[Tensor, "b 3 h w"]) -> dict[str, Count]:
    """What the oracle reads back from pictures of scenes, counted.

    The counts hold the oracle's own mistakes too: compare with its accuracy.
    """
    return adherence(scenes, [words for some in drawn.split(50) for words in oracle.read(some)])


def psnr(
    a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"], mask: Float[Tensor, "b 1 h w"] | None = None
) -> Float[Tensor, "b"]:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], over a mask if one is given: `-10 log10(mse / 4)`."""
    square = (a - b).square()
    weight = torch.ones_like(square[:, :1]) if mask is None else mask
    mse = (square * weight).sum(dim=(1, 2, 3)) / (weight.sum(dim=(1, 2, 3)) * a.shape[1])
    return -10 * (mse / 4).log10()


def frechet_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Distance of two sets of features, each taken for a Gaussian (Heusel et al. 2017, equation 6).

    `|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2))` with covariances A and B; it falls with n, so compare at equal n.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()  # tr (A B)^(1/2), by a symmetric form
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def diversity(features: Float[Tensor, "n d"]) -> float:
    """Mean distance between the features of different pictures, of one prompt say."""
    return float(torch.pdist(features.double()).mean())
