"""One call of the pipeline: everything it was asked for, checked before anything is computed, and noted afterwards."""

from __future__ import annotations

import functools
import secrets
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from . import checks, samplers
from .config import ModelConfig
from .schedule import NoiseSchedule, plan
from .vae import TILES

MAX_GUIDANCE = 100.0


class Run:
    """The settings of one call: what each picture is drawn from, and how. Raises ValueError for what can't be.

    One picture for each of `prompts`, `negatives` and `seeds`; the levels of noise to visit are `sigmas`.
    """

    def __init__(
        self,
        config: ModelConfig,
        noise_schedule: NoiseSchedule,
        prompt: str | Sequence[str],
        *,
        negative: str | Sequence[str] = "",
        seed: int | Sequence[int] | None = None,
        n: int = 1,
        steps: int | None = None,
        guidance: float | None = None,
        rescale: float = 0.0,
        sampler: Callable | None = None,
        schedule: str | None = None,
        strength: float = 1.0,
        long_prompts: Literal["cut", "chunk"] = "cut",
        clip_skip: int | None = None,
        tile: int | None = None,
        progress: bool = True,
    ):
        n = checks.integer("n", n, 1, 10_000)
        prompts = checks.prompts(prompt)
        negatives = checks.matching(negative, "negative prompt", prompts)
        self.prompts = [p for p in prompts for _ in range(n)]
        self.negatives = [p for p in negatives for _ in range(n)]
        self.seeds = checks.seeds(secrets.randbelow(2**31) if seed is None else seed, len(self.prompts))
        self.single = isinstance(prompt, str) and n == 1

        sampler = getattr(samplers, config.sampler) if sampler is None else sampler
        schedule = config.spacing if schedule is None else schedule
        steps = checks.integer("steps", config.steps if steps is None else steps, 1, len(noise_schedule.betas))
        if not callable(sampler):
            raise ValueError(f"sampler is {sampler!r}; it must be a function such as minisd.samplers.euler")
        if isinstance(sampler, functools.partial) and "eta" in sampler.keywords:
            checks.number("eta", sampler.keywords["eta"], 0, 1)
        self.guidance = checks.number("guidance", config.guidance if guidance is None else guidance, 0, MAX_GUIDANCE)
        if self.guidance == 1 and any(negatives):
            warnings.warn("a negative prompt has no effect at guidance 1", stacklevel=4)
        self.rescale = checks.number("rescale", rescale, 0, 1)
        self.strength = checks.number("strength", strength, 0, 1)
        self.tile = None if tile is None else checks.integer("tile", tile, *TILES)
        self.sampler, self.progress = sampler, progress
        self.reading = {"long_prompts": long_prompts, "clip_skip": clip_skip}  # how `encode_text` is to read

        whole = plan(noise_schedule, steps, schedule)
        run = max(1, round(self.strength * steps))
        self.sigmas = whole.sigmas.float()[-run - 1 :]
        self.init_scale = whole.init_scale
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        self.settings = {
            "model": config.name, "steps": steps, "guidance": self.guidance, "rescale": self.rescale,
            "sampler": name(sampler), "schedule": schedule, "strength": self.strength, "tile": self.tile,
            **self.reading,
        }  # fmt: skip

    def __len__(self) -> int:
        """How many pictures."""
        return len(self.prompts)

    def read(self, encode_text: Callable) -> None:
        """Turn the prompts into `context` and, where there is guidance, the negative ones into `negative`."""
        if self.guidance == 1:
            self.context, self.negative = encode_text(self.prompts, **self.reading), None
        else:
            self.context, self.negative = encode_text(self.prompts + self.negatives, **self.reading).chunk(2)

    def noise(self, *shape: int) -> Float[Tensor, "b *shape"]:
        """Each picture's next noise, from its own generator: so a seed draws the same picture in every batch."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self.generators])

    def start(self, shape: Sequence[int], latent: Float[Tensor, "1 z h w"] | None) -> Float[Tensor, "b z h w"]:
        """Where the sampler begins: at pure noise, or at a latent with as much noise as the strength asks for."""
        noise = self.noise(*shape)
        return self.init_scale * noise if self.strength == 1 else latent + self.sigmas[0] * noise

    def finish(self, pictures: list[Image.Image]) -> Image.Image | list[Image.Image]:
        """Note the settings in each picture; one for one prompt."""
        for picture, prompt, negative, seed in zip(pictures, self.prompts, self.negatives, self.seeds, strict=True):
            picture.info = {"prompt": prompt, "negative": negative, "seed": seed, **self.settings}
        return pictures[0] if self.single else pictures


def name(sampler: Callable) -> str:
    """`ancestral`, or `ancestral(eta=0.5)` where its knobs are set."""
    if isinstance(sampler, functools.partial):
        return f"{name(sampler.func)}({', '.join(f'{knob}={value!r}' for knob, value in sampler.keywords.items())})"
    return getattr(sampler, "__name__", type(sampler).__name__)
