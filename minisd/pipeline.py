"""Stable Diffusion, whole: text to image, image to image, inpainting, and every part of them by its own name."""

from __future__ import annotations

import functools
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from . import checks, samplers
from . import image as images
from .clip import TextTower
from .config import ModelConfig
from .denoiser import Denoiser
from .prompt import encode as encode_prompts
from .schedule import NoiseSchedule, from_config, plan
from .tokenizer import Tokenizer
from .unet import UNet
from .vae import VAE
from .weights import read_parts, resolve

MAX_GUIDANCE = 100.0


class StableDiffusion:
    """A text encoder, a noise predictor and an autoencoder, and the ways to draw with them.

    Call it with a prompt; or take the steps yourself: `encode_text`, `denoiser`, `schedule.plan`, a sampler, `decode`.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, text: TextTower, unet: UNet, vae: VAE):
        self.config, self.tokenizer = config, tokenizer
        self.text, self.unet, self.vae = text, unet, vae
        self.schedule: NoiseSchedule = from_config(config.schedule)

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> StableDiffusion:
        """Move all three networks, cast them, or both; returns the pipeline itself."""
        for module in (self.text, self.unet, self.vae):
            module.to(device=device, dtype=dtype)
        return self

    # The parts

    @torch.no_grad()
    def encode_text(
        self,
        prompts: str | Sequence[str],
        *,
        long_prompts: Literal["cut", "chunk"] = "cut",
        clip_skip: int | None = None,
    ) -> Float[Tensor, "b n d"]:
        """The context of one prompt or several: encode a prompt and its negative in one call, they are then as long.

        `(blue eyes:1.3)` weighs words more, `[blue eyes]` less, BREAK starts a new chunk; a bracket that is meant is
        written with a backslash before it (see `minisd.prompt`). `long_prompts`: "cut" keeps one chunk, as many places
        as the text tower has, and names the words that are dropped in a warning; "chunk" encodes them in further
        chunks. `clip_skip` counts as AUTOMATIC1111's web UI and most model cards do: 1 reads the last block, 2 leaves
        it out (diffusers' `clip_skip=1`); by default as the model's config says. (The web UI
        ignores it for v2, here 2 leaves out one more.) Raises ValueError for what can't be.
        """
        skip_last = None
        if clip_skip is not None:
            skip_last = checks.integer("clip_skip", clip_skip, 1, self.text.config.layers) - 1
        return encode_prompts(self.text, self.tokenizer, prompts, long_prompts, skip_last)

    def denoiser(
        self,
        context: Float[Tensor, "b n d"],
        negative: Float[Tensor, "b n d"] | None = None,
        guidance: float = 1.0,
        rescale: float = 0.0,
    ) -> Denoiser:
        """`denoise(x, sigma)` for the given contexts: what samplers call."""
        return Denoiser(self.unet, self.schedule, self.config.prediction, context, negative, guidance, rescale)

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b z h8 w8"]:
        """Pictures in [-1, 1] to latents, the posterior's mean, in float32 on the CPU."""
        return self.vae.encode(pixels.to(self.device, self.dtype)).float().cpu()

    @torch.no_grad()
    def decode(self, z: Float[Tensor, "b z h8 w8"]) -> Float[Tensor, "b 3 h w"]:
        """Latents to pictures in [-1, 1], in float32 on the CPU."""
        return self.vae.decode(z.to(self.device, self.dtype)).float().cpu()

    # The ways to draw

    def text_to_image(
        self,
        prompt: str | Sequence[str],
        *,
        negative: str | Sequence[str] = "",
        seed: int | Sequence[int] | None = None,
        n: int = 1,
        size: int | tuple[int, int] | None = None,
        **settings: Any,
    ) -> Image.Image | list[Image.Image]:
        """Draw pictures from prompts alone: one picture for one prompt and n = 1, else a list, n in a row a prompt.

        `negative`: what to steer away from. `seed`: of the first picture, the next ones count on; or a list; without
        one it is drawn. `size`: a side or (width, height) in pixels, multiples of the autoencoder's factor; by default
        the size of training. `settings`: `steps` (20), `guidance` (the model's own), `rescale` (0), `sampler`
        (`samplers.dpmpp_2m`), `schedule` ("karras", or another spacing of `schedule.plan`), `progress` (True).

        The settings, seed included, are in each picture's `info`. The same seed gives the same picture in every batch.
        Raises ValueError for settings that can't be.
        """
        factor = self.vae.config.factor
        width, height = checks.size(self.config.size if size is None else size, factor)
        run = self._run(prompt, negative, seed, n, **settings)
        self._check_memory(run.count, width, height)
        return run.draw((height // factor, width // factor))

    __call__ = text_to_image

    def img2img(
        self,
        prompt: str | Sequence[str],
        picture: Image.Image,
        *,
        strength: float = 0.6,
        negative: str | Sequence[str] = "",
        seed: int | Sequence[int] | None = None,
        n: int = 1,
        **settings: Any,
    ) -> Image.Image | list[Image.Image]:
        """Redraw a picture: add noise by the denoising strength, then denoise towards the prompt (Meng et al. 2022,
        SDEdit).

        `strength` 0 gives the picture back; 1 forgets it and is text to image; between them the last `strength *
        steps` steps run, at least one. Other settings as in `text_to_image`.
        """
        strength = checks.number("strength", strength, 0, 1)
        picture = images.fit(images.to_rgb(picture), multiple=self.vae.config.factor)
        run = self._run(prompt, negative, seed, n, strength=strength, **settings)
        self._check_memory(run.count, *picture.size)
        if strength == 0:
            return run.finish([picture.copy() for _ in range(run.count)])
        latent = self.encode(images.from_pil(picture))
        return run.draw(latent.shape[-2:], latent)

    def inpaint(
        self,
        prompt: str | Sequence[str],
        picture: Image.Image,
        mask: Image.Image,
        *,
        strength: float = 1.0,
        negative: str | Sequence[str] = "",
        seed: int | Sequence[int] | None = None,
        n: int = 1,
        **settings: Any,
    ) -> Image.Image | list[Image.Image]:
        """Redraw only where the mask is white: elsewhere every prediction is replaced by the picture's own latent.

        Pixels outside the mask come back untouched. A mask of another size is resized, with a warning; an all black one
        leaves the picture as it is, with a warning. Other settings as in `img2img`.
        """
        strength = checks.number("strength", strength, 0, 1)
        factor = self.vae.config.factor
        picture = images.to_rgb(picture)
        if not isinstance(mask, Image.Image):
            raise ValueError(f"the mask is a PIL image, not {type(mask).__name__}; minisd.image.read opens a file")
        mask = images.to_rgb(mask, background="black").convert("L")
        if mask.size != picture.size:
            warnings.warn(f"the mask is {mask.size}, the picture {picture.size}: the mask is resized", stacklevel=2)
            mask = mask.resize(picture.size, Image.Resampling.NEAREST)
        picture = images.fit(picture, multiple=factor)
        mask = images.fit(mask, picture.size).point(lambda value: 255 * (value >= 128))  # cropped as the picture is
        run = self._run(prompt, negative, seed, n, strength=strength, **settings)
        self._check_memory(run.count, *picture.size)
        if mask.getextrema() == (0, 0):
            warnings.warn("the mask is all black: nothing is redrawn; paint white what should change", stacklevel=2)
            strength = 0
        if strength == 0:
            return run.finish([picture.copy() for _ in range(run.count)])
        latent = self.encode(images.from_pil(picture))
        white = (images.from_pil(mask)[:, :1] > 0).float()
        cells = F.max_pool2d(white, factor)  # a cell of the latent is redrawn if any pixel of it is
        drawn = run.draw(latent.shape[-2:], latent, cells)
        several = drawn if isinstance(drawn, list) else [drawn]
        for new in several:
            new.paste(picture, mask=mask.point(lambda value: 255 - value))
        return drawn

    def _run(self, prompt: Any, negative: Any, seed: Any, n: int, **settings: Any) -> _Run:
        """Check everything before anything is computed."""
        n = checks.integer("n", n, 1, 10_000)
        prompts = checks.prompts(prompt)
        negatives = checks.matching(negative, "negative prompt", prompts)
        count = n * len(prompts)
        if seed is None:
            seed = secrets.randbelow(2**31)
        return _Run(
            self,
            prompts=[p for p in prompts for _ in range(n)],
            negatives=[p for p in negatives for _ in range(n)],
            seeds=checks.seeds(seed, count),
            single=isinstance(prompt, str) and n == 1,
            **settings,
        )

    def _check_memory(self, count: int, width: int, height: int) -> None:
        """Refuse what can't fit, before it is tried: some dozen feature maps at the finest level."""
        pixels, vae, unet, bytes_ = width * height, self.vae.config, self.unet.config, self.dtype.itemsize
        decoder = 6 * bytes_ * max(vae.widths[:2]) * pixels  # one picture at a time
        predictor = 40 * bytes_ * unet.widths[0] * 2 * count * pixels // vae.factor**2  # all, doubled by guidance
        needed = max(decoder, predictor)
        free = _free_memory(self.device)
        if free is not None and needed > free:
            raise ValueError(
                f"{count} pictures of {width} x {height} need about {needed / 2**30:.1f} GiB, there are "
                f"{free / 2**30:.1f}; choose a smaller size or fewer pictures"
            )


def _name(sampler: Callable) -> str:
    """`ancestral`, or `ancestral(eta=0.5)` where its knobs are set."""
    if isinstance(sampler, functools.partial):
        return f"{_name(sampler.func)}({', '.join(f'{knob}={value!r}' for knob, value in sampler.keywords.items())})"
    return getattr(sampler, "__name__", type(sampler).__name__)


@contextmanager
def _naming_the_knob() -> Iterator[None]:
    """What to do about a device that runs out of memory all the same: CUDA says so by type, the others by text."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "memory" not in str(error):
            raise
        raise MemoryError(f"{error}; choose a smaller size or fewer pictures") from error


def _free_memory(device: torch.device) -> int | None:
    """Bytes to be had on a device, where the system tells: what is free, and what can be freed for the asking."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # all: "available" leaves out the file cache
    except (AttributeError, ValueError, OSError):
        return None


class _Run:
    """One call's settings, checked; `draw` carries it out."""

    def __init__(
        self,
        sd: StableDiffusion,
        prompts: list[str],
        negatives: list[str],
        seeds: list[int],
        single: bool,
        steps: int = 20,
        guidance: float | None = None,
        rescale: float = 0.0,
        sampler: Callable = samplers.dpmpp_2m,
        schedule: str = "karras",
        strength: float = 1.0,
        progress: bool = True,
    ):
        self.sd, self.prompts, self.negatives, self.seeds, self.single = sd, prompts, negatives, seeds, single
        steps = checks.integer("steps", steps, 1, sd.config.schedule.steps)
        if not callable(sampler):
            raise ValueError(f"sampler is {sampler!r}; it must be a function such as minisd.samplers.euler")
        if isinstance(sampler, functools.partial) and "eta" in sampler.keywords:
            checks.number("eta", sampler.keywords["eta"], 0, 1)
        self.plan = plan(sd.schedule, steps, schedule)
        self.guidance = checks.number("guidance", sd.config.guidance if guidance is None else guidance, 0, MAX_GUIDANCE)
        if self.guidance == 1 and any(negatives):
            warnings.warn("a negative prompt has no effect at guidance 1", stacklevel=4)
        self.rescale = checks.number("rescale", rescale, 0, 1)
        self.sampler, self.strength, self.progress = sampler, strength, progress
        self.settings = {
            "model": sd.config.name, "steps": steps, "guidance": self.guidance, "rescale": self.rescale,
            "sampler": _name(sampler), "schedule": schedule, "strength": strength,
        }  # fmt: skip

    @property
    def count(self) -> int:
        return len(self.prompts)

    @_naming_the_knob()
    @torch.no_grad()
    def draw(
        self,
        cells: tuple[int, int],
        latent: Float[Tensor, "1 z h w"] | None = None,
        mask: Float[Tensor, "1 1 h w"] | None = None,
    ) -> Image.Image | list[Image.Image]:
        """Sample at a latent size, from pure noise or from a noised latent, and decode."""
        sd, shape = self.sd, (self.sd.config.vae.latent_channels, *cells)
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]

        def noise(*_: Tensor) -> Float[Tensor, "b z h w"]:
            """Each picture's next noise, from its own generator: first the start, then one a step if asked for."""
            return torch.stack([torch.randn(shape, generator=g) for g in generators])

        negative = sd.encode_text(self.negatives) if self.guidance != 1 else None
        denoise = sd.denoiser(sd.encode_text(self.prompts), negative, self.guidance, self.rescale)
        sigmas = self.plan.sigmas.float()
        if self.strength == 1:
            x = self.plan.init_scale * noise()
        else:
            steps = max(1, round(self.strength * (len(sigmas) - 1)))
            sigmas = sigmas[-steps - 1 :]
            x = latent + sigmas[0] * noise()
        blended = denoise if mask is None else lambda x, sigma: torch.where(mask > 0, denoise(x, sigma), latent)
        trail = self.sampler(blended, x, sigmas, noise)
        for step, (x, _) in enumerate(tqdm(trail, total=len(sigmas) - 1, disable=not self.progress), start=1):
            if not x.isfinite().all():
                raise ValueError(f"the latents are not finite after step {step}; lower the guidance or add steps")
        pixels = torch.cat([sd.decode(z) for z in x.split(1)])
        return self.finish(images.to_pil(pixels))

    def finish(self, pictures: list[Image.Image]) -> Image.Image | list[Image.Image]:
        """Note the settings in each picture; one for one prompt."""
        for picture, prompt, negative, seed in zip(pictures, self.prompts, self.negatives, self.seeds, strict=True):
            picture.info = {"prompt": prompt, "negative": negative, "seed": seed, **self.settings}
        return pictures[0] if self.single else pictures


def check_device(device: str | torch.device) -> torch.device:
    """A device that is there, or a ValueError that lists those that are."""
    there = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r} is unknown; there is: {', '.join(there)}") from error
    if found.type not in there or (found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {str(device)!r} is not to be had here; there is: {', '.join(there)}")
    return found


def load(
    model: str | Path | None = None, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> StableDiffusion:
    """The bundled model, or another by its name or folder, ready to draw.

    Raises CheckpointError (a ValueError) where there is no such model or a file doesn't fit, and ValueError for a
    device that isn't there.
    """
    device = check_device(device)
    return StableDiffusion(**read_parts(resolve(model))).to(device, dtype)
