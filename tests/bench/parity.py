"""Ours beside diffusers', on the same random weights: every network of every family, and whole pictures.

From the folder `tests`: `python -m bench.parity` for the published sizes, with `--tiny` for small ones, in seconds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageChops
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

import minisd
from minisd import StableDiffusion, config, image, samplers
from minisd.config import DepthConfig, ModelConfig
from minisd.tokenizer import Tokenizer
from minisd.weights import empty_parts
from minisd.weights.checkpoints import CLIP_VOCABULARY, clip_tokenizer, write_folder

FAMILIES = {
    "v1": config.SD1,
    "v1-inpainting": config.SD1_INPAINT,
    "v2": config.SD2,
    "v2-v": config.SD2_V,
    "v2-depth": config.SD2_DEPTH,
    "x4": config.SD_X4,
}
PROMPT, NEGATIVE = "an astronaut riding a horse, oil on canvas", "blurry"
SEED, STEPS, GUIDANCE, NOISE_LEVEL = 7, 4, 7.5, 20


def tiny(model: ModelConfig) -> ModelConfig:
    """A family made small: all that tells it from the others stays, only the numbers shrink."""
    unet, vae = model.unet, model.vae
    return replace(
        model,
        size=64,
        unet=replace(
            unet,
            widths=(16, 32, 32, 32),
            blocks=1,
            heads=unet.heads and 2,
            head_dim=unet.head_dim and 8,
            context_dim=24,
            groups=4,
        ),
        vae=replace(vae, widths=(8, 16, 16, 16)[: len(vae.widths)], blocks=1, groups=2),
        text=replace(model.text, vocabulary=514, width=24, layers=2, heads=2),
        depth=model.depth and DepthConfig(64, 16, (32, 64, 96), (1, 1, 2), 4, 32, heads=4, taps=(1, 2), fusion=16),
    )


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Random weights under which features keep their size, however wide the layers: `v / sqrt(inputs)`."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        torch.randn(p.shape, generator=generator, out=p.data)
        if p.ndim > 1:
            p.data /= p[0].numel() ** 0.5
        else:
            p.data = 0.1 * p.data + (name.endswith("weight"))  # of norms; everything else of one dimension is a bias
    return module


def write_random(model: ModelConfig, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """A model with random weights, as a folder that both read."""
    published = model.text.vocabulary == CLIP_VOCABULARY
    tokenizer = clip_tokenizer(model.text) if published else Tokenizer([], pad=model.text.pad)
    empty = empty_parts(model, folder)
    parts = {name: randomise(part.to_empty(device="cpu"), i) for i, (name, part) in enumerate(empty.items())}
    if model.depth:
        parts["depth"].head[4].bias.data.fill_(9)  # so that the last ReLU hides nothing
    write_folder({"config": model, "tokenizer": tokenizer, **parts}, folder, dtype)


class RecordingDDIM(DDIMScheduler):
    """diffusers' DDIM, which keeps the latents of every step."""

    def set_timesteps(self, *args, **kwargs):
        self.states = []
        super().set_timesteps(*args, **kwargs)

    def step(self, *args, **kwargs):
        stepped = super().step(*args, **kwargs)
        self.states.append(stepped[0])
        return stepped


def load_theirs(folder: Path, **options) -> DiffusionPipeline:
    """The class of diffusers that the folder names, with DDIM to alpha_bar = 1: `schedule.plan`'s "leading"."""
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with redirect_stderr(StringIO()):
        pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    pipe.scheduler = RecordingDDIM.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in standard deviations of the numbers themselves."""
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().std()).item()


# Each network by itself


def calls(
    sd: StableDiffusion, pipe: DiffusionPipeline, size: tuple[int, int], batch: int = 1
) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """One call of each network, ours and theirs, on the same numbers; the U-Net's batch is doubled, as by guidance."""
    c, generator = sd.config, torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> tuple[Tensor, Tensor]:
        """The same numbers for us and for them, each in its own precision."""
        x = torch.randn(shape, generator=generator)
        return x.to(sd.device, sd.dtype), x.to(pipe.device, pipe.unet.dtype)

    width, height = size
    cells = height // c.vae.factor, width // c.vae.factor
    x_t, z = normal(2 * batch, c.unet.in_channels, *cells), normal(batch, c.vae.latent_channels, *cells)
    t = torch.linspace(3, 871, 2 * batch, device=sd.device)
    context = normal(2 * batch, c.text.places, c.unet.context_dim)
    label = torch.full((2 * batch,), NOISE_LEVEL, device=sd.device) if c.unet.classes else None
    pixels = normal(batch, 3, height, width)
    ids = sd.tokenizer([PROMPT, NEGATIVE] * batch).to(sd.device)
    networks = {
        "U-Net": (
            lambda: sd.unet(x_t[0], t, context[0], label),
            lambda: pipe.unet(x_t[1], t, context[1], class_labels=label).sample,
        ),
        "VAE encoder": (
            lambda: moments(sd.vae.posterior(pixels[0])),
            lambda: moments(pipe.vae.encode(pixels[1]).latent_dist),
        ),
        "VAE decoder": (lambda: sd.vae.reconstruct(z[0]), lambda: pipe.vae.decode(z[1]).sample),
        "text encoder": (lambda: sd.text(ids), lambda: pipe.text_encoder(ids).last_hidden_state),
    }
    if c.depth:
        square = normal(batch, 3, c.depth.size, c.depth.size)
        networks["depth estimator"] = (
            lambda: sd.depth(square[0]),
            lambda: pipe.depth_estimator(square[1]).predicted_depth[:, None],
        )
    return networks


def moments(posterior) -> Tensor:
    return torch.cat([posterior.mean, posterior.logvar], dim=1)


# Whole pictures


@dataclass(frozen=True, eq=False)
class Drawn:
    """A picture, and the latents `x_t` after each step."""

    states: list[Tensor]
    picture: Image.Image


def noise_picture(size: tuple[int, int], seed: int) -> Image.Image:
    return image.to_pil(torch.rand(3, *reversed(size), generator=torch.Generator().manual_seed(seed)) * 2 - 1)


def hole(size: tuple[int, int]) -> Image.Image:
    """A mask that is white on the right half, from a multiple of 8 on, as latent cells are."""
    mask = Image.new("L", size)
    mask.paste(255, (size[0] // 16 * 8, 0, *size))
    return mask


def draw_ours(sd: StableDiffusion, size: tuple[int, int]) -> Drawn:
    """Draw by our pipeline's own way for the model: from a prompt, into a hole, by depth, or a small picture larger."""
    states = []

    def recording(denoise, x, sigmas, noise):
        trail = samplers.ddim(denoise, x, sigmas, noise)
        for sigma, (state, x0) in zip(sigmas[1:], trail, strict=True):
            states.append(state / (1 + sigma**2).sqrt())
            yield state, x0

    settings = {
        "negative": NEGATIVE, "seed": SEED, "steps": STEPS, "guidance": GUIDANCE,
        "sampler": recording, "schedule": "leading", "progress": False,
    }  # fmt: skip
    shown = noise_picture(size, 1)
    match sd.config.unet.in_channels:
        case 4:
            picture = sd.text_to_image(PROMPT, size=size, **settings)
        case 9:
            picture = sd.inpaint(PROMPT, shown, hole(size), **settings)
        case 5:
            picture = sd.depth2img(
                PROMPT,
                shown,
                depth=noise_picture(size, 2).convert("L"),
                **settings | {"steps": STEPS + 1, "strength": 0.8},
            )
        case 7:
            small = noise_picture([side // sd.vae.config.factor for side in size], 1)
            picture = sd.upscale(PROMPT, small, noise_level=NOISE_LEVEL, **settings)
    return Drawn(states, picture)


def draw_theirs(pipe: DiffusionPipeline, size: tuple[int, int]) -> Drawn:
    """The same by diffusers, which takes the same noise from the same seed.

    Where we take the mean of the encoder's Gaussian, it draws from it; here it takes the mean as well.
    """
    settings = {
        "negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE,
        "generator": torch.Generator().manual_seed(SEED),
    }  # fmt: skip
    width, height = size
    shown = noise_picture(size, 1)
    with patch.object(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean):
        match pipe.unet.config.in_channels:
            case 4:
                picture = pipe(PROMPT, height=height, width=width, **settings).images[0]
            case 9:
                mask = hole(size)
                filled = pipe(
                    PROMPT, image=shown, mask_image=mask, height=height, width=width, strength=1.0, **settings
                ).images[0]
                picture = Image.composite(filled, shown, mask)  # what we do at the end, and it doesn't
            case 5:
                depth = image.from_pil(noise_picture(size, 2).convert("L"))[:, 0]
                settings |= {"num_inference_steps": STEPS + 1, "strength": 0.8}
                picture = pipe(PROMPT, image=shown, depth_map=depth, **settings).images[0]
            case 7:
                small = noise_picture([side // pipe.vae_scale_factor for side in size], 1)
                picture = pipe(PROMPT, image=small, noise_level=NOISE_LEVEL, **settings).images[0]
    return Drawn(pipe.scheduler.states, picture)


def pixel_difference(ours: Image.Image, theirs: Image.Image) -> int:
    """The largest difference of two pictures, in steps of 8 bits."""
    return max(high for _, high in ImageChops.difference(ours, theirs).getextrema())


# By hand


def compare(
    model: ModelConfig, size: tuple[int, int], pictures: bool, rounding: bool, done: set
) -> Iterator[tuple[str, str]]:
    """What was compared and how far apart it is; a network compared before, which is in `done`, is left out.

    With `rounding`, also how far each is from diffusers' in float64: what of the difference is float32's own.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows deletes no file in use
        write_random(model, Path(folder) / "model")
        sd = minisd.load(Path(folder) / "model", dtype=torch.float32)
        pipe = load_theirs(Path(folder) / "model")
        part = {"U-Net": "unet", "text encoder": "text", "depth estimator": "depth"}
        outputs = {}
        for name, (ours, theirs) in calls(sd, pipe, size).items():
            key = name, getattr(model, part.get(name, "vae"))
            if key not in done:
                done.add(key)
                with torch.no_grad():
                    outputs[name] = ours(), theirs()
                yield name, f"{difference(*outputs[name]):.1e}"
        if pictures:
            ours, theirs = draw_ours(sd, size), draw_theirs(pipe, size)
            errors = map(difference, ours.states, theirs.states)
            yield "latents, step by step", ", ".join(f"{error:.1e}" for error in errors)
            yield "picture", f"{pixel_difference(ours.picture, theirs.picture)}/255"
        if rounding:
            exact = calls(sd, pipe.to(torch.float64), size)
            for name, both in outputs.items():
                with torch.no_grad():
                    truth = exact[name][1]()
                apart = [f"{difference(output, truth):.1e}" for output in both]
                yield f"{name}, from float64", f"ours {apart[0]}, diffusers' {apart[1]}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.parity", description="Compare every network and whole pictures.")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--size", type=int, help="side of the pictures in pixels (512; tiny: 64)")
    parser.add_argument("--tiny", action="store_true", help="small networks, in seconds")
    parser.add_argument("--networks", action="store_true", help="one call of each network, no whole pictures")
    parser.add_argument("--rounding", action="store_true", help="also how far both are from float64: twice the memory")
    options = parser.parse_args(arguments)
    side = options.size or (64 if options.tiny else 512)
    print("| model | what | largest difference, in standard deviations |\n|---|---|---|")
    done = set()
    for name in options.families:
        model = tiny(FAMILIES[name]) if options.tiny else FAMILIES[name]
        for what, error in compare(model, (side, side), not options.networks, options.rounding, done):
            print(f"| {name} | {what} | {error} |", flush=True)


if __name__ == "__main__":
    main()
