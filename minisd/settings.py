"""What every way to draw can be asked for; and one call of it, checked before the work and noted in its pictures."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from . import checks, samplers
from .config import ModelConfig
from .schedule import SPACINGS, NoiseSchedule, plan
from .vae import TILES

MAX_GUIDANCE = 100.0

LongPrompts = Literal["cut", "chunk"]
Pictures = Image.Image | list[Image.Image]
Sampler = Callable[..., samplers.Steps]
Seeds = int | Sequence[int]
Texts = str | Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What can be asked for beside the prompt, the same in every way to draw; None is the model's own choice."""

    negative: Texts = ""  # what to steer away from: one text for all prompts, or one for each
    seed: Seeds | None = None  # of the first picture, the next ones count on; or a list; None: drawn, and noted
    n: int = 1  # pictures a prompt
    steps: int | None = None
    guidance: float | None = None  # 0 ignores the prompt, 1 is plain, more exaggerates it, up to 100
    rescale: float = 0.0  # against glaring colours at strong guidance, 0 to 1
    sampler: Sampler | None = None  # one of `minisd.samplers`
    schedule: str | None = None  # which noise levels to visit: a spacing of `schedule.plan`
    long_prompts: LongPrompts = "cut"  # this one and the next are those of `encode_text`
    clip_skip: int | None = None
    tile: int | None = None  # encode and decode in tiles of so many latent cells a side: for large pictures
    progress: bool = True  # show a bar

    def of(self, config: ModelConfig, most_steps: int) -> Settings:
        """These settings with the model's own where there is none, in plain form; ValueError for what can't be."""
        sampler = getattr(samplers, config.sampler) if self.sampler is None else self.sampler
        if not callable(sampler):
            raise ValueError(f"sampler is {sampler!r}; it must be a function such as minisd.samplers.euler")
        schedule = config.spacing if self.schedule is None else self.schedule
        if schedule not in SPACINGS:
            raise ValueError(f"schedule is {schedule!r}; it must be one of {', '.join(SPACINGS)}")
        knobs = sampler.keywords if isinstance(sampler, functools.partial) else {}
        if "eta" in knobs:
            checks.number("eta", knobs["eta"], 0, 1)
        if "order" in knobs:
            checks.integer("order", knobs["order"], 1, 4)
        return replace(
            self,
            n=checks.integer("n", self.n, 1, 10_000),
            steps=checks.integer("steps", config.steps if self.steps is None else self.steps, 1, most_steps),
            guidance=checks.number(
                "guidance", config.guidance if self.guidance is None else self.guidance, 0, MAX_GUIDANCE
            ),
            rescale=checks.number("rescale", self.rescale, 0, 1),
            sampler=sampler,
            schedule=schedule,
            tile=None if self.tile is None else checks.integer("tile", self.tile, *TILES),
        )


class Run:
    """One call: what each picture is drawn from. Raises ValueError for what can't be.

    One picture for each of `prompts`, `negatives` and `seeds`. `context` and, where there is guidance, `negative` are
    what `encode_text` made of the texts; `sigmas` are the levels of noise to visit: the last `strength * steps` steps
    of a plan, at least one. The settings are those that `Settings.of` returns.
    """

    def __init__(
        self,
        config: ModelConfig,
        noise_schedule: NoiseSchedule,
        encode_text: Callable[..., Float[Tensor, "b n d"]],
        prompt: Texts,
        settings: Settings,
        strength: float = 1.0,
    ):
        self.settings = settings
        prompts = checks.prompts(prompt)
        negatives = checks.matching(settings.negative, "negative prompt", prompts)
        self.prompts = [text for text in prompts for _ in range(settings.n)]
        self.negatives = [text for text in negatives for _ in range(settings.n)]
        seed = secrets.randbelow(2**31) if settings.seed is None else settings.seed
        self.seeds = checks.seeds(seed, len(self.prompts))
        self.single = isinstance(prompt, str) and settings.n == 1
        if settings.guidance == 1 and any(negatives):
            checks.warn("a negative prompt has no effect at guidance 1")

        self.strength = checks.number("strength", strength, 0, 1)
        whole = plan(noise_schedule, settings.steps, settings.schedule)
        self.sigmas = whole.sigmas.float()[-max(1, round(self.strength * settings.steps)) - 1 :]
        self.init_scale = whole.init_scale
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        self.info: dict[Any, Any] = {
            "model": config.name, "steps": settings.steps, "guidance": settings.guidance, "rescale": settings.rescale,
            "sampler": name(settings.sampler), "schedule": settings.schedule, "strength": self.strength,
            "long_prompts": settings.long_prompts,
        }  # fmt: skip
        optional = {"tile": settings.tile, "clip_skip": settings.clip_skip}
        self.info |= {knob: value for knob, value in optional.items() if value is not None}

        texts = self.prompts if settings.guidance == 1 else self.prompts + self.negatives
        different = list(dict.fromkeys(texts))  # each is encoded once
        known = encode_text(different, long_prompts=settings.long_prompts, clip_skip=settings.clip_skip)
        context = known[[different.index(text) for text in texts]]
        self.context, self.negative = (context, None) if settings.guidance == 1 else context.chunk(2)

    def __len__(self) -> int:
        """How many pictures."""
        return len(self.prompts)

    def noise(self, *shape: int) -> Float[Tensor, "b *shape"]:
        """Each picture's next noise, from its own generator: so a seed draws the same picture in every batch."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self.generators])

    def start(self, shape: Sequence[int], latent: Float[Tensor, "1 z h w"] | None) -> Float[Tensor, "b z h w"]:
        """Where the sampler begins: at pure noise, or at a latent with as much noise as the strength asks for."""
        noise = self.noise(*shape)
        return self.init_scale * noise if self.strength == 1 else latent + self.sigmas[0] * noise

    def finish(self, pictures: Sequence[Image.Image]) -> Pictures:
        """Note the settings in each picture; one for one prompt."""
        pictures = list(pictures)
        for picture, prompt, negative, seed in zip(pictures, self.prompts, self.negatives, self.seeds, strict=True):
            picture.info = {"prompt": prompt, "negative": negative, "seed": seed, **self.info}
        return pictures[0] if self.single else pictures


def name(sampler: Callable) -> str:
    """`ancestral`, or `ancestral(eta=0.5)` where its knobs are set."""
    if isinstance(sampler, functools.partial):
        return f"{name(sampler.func)}({', '.join(f'{knob}={value!r}' for knob, value in sampler.keywords.items())})"
    return getattr(sampler, "__name__", type(sampler).__name__)
