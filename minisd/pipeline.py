"""Stable Diffusion, whole: text to image, image to image, inpainting, and every part of them by its own name."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from . import checks, samplers
from . import image as images
from .clip import TextTower
from .config import ModelConfig
from .denoiser import Denoiser, Prediction
from .depth import DPT, depth_channel
from .devices import check_device, check_dtype, fast_dtype, free_memory, naming_the_knob
from .prompt import encode as encode_prompts
from .schedule import NoiseSchedule, from_config
from .settings import LongPrompts, Pictures, Run, Sampler, Seeds, Settings, Texts
from .tokenizer import Tokenizer
from .unet import UNet
from .vae import VAE
from .weights import is_published, read_parts, resolve, write_folder, write_single

MAX_NOISE_LEVEL = 350  # of the upscaler's training
FAINT = 16  # of 255: what is darker in a mask is black, or has become grey in a JPEG
WAYS = {  # by the number of input channels: what a model is for
    4: "draws from prompts: call it with one, or text_to_image, img2img, inpaint",
    5: "draws by depth: call depth2img with a picture",
    7: "enlarges pictures: call upscale with one",
    9: "draws from prompts and fills holes: call text_to_image, img2img, inpaint",
}


class StableDiffusion:
    """A text encoder, a noise predictor and an autoencoder, and the ways to draw with them.

    Call it with a prompt; or take the steps yourself: `encode_text`, `denoiser`, `schedule.plan`, a sampler, `decode`.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        text: TextTower,
        unet: UNet,
        vae: VAE,
        depth: DPT | None = None,
    ):
        self.config, self.tokenizer = config, tokenizer
        self.text, self.unet, self.vae, self.depth = text, unet, vae, depth
        self.schedule: NoiseSchedule = from_config(config.schedule)

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> StableDiffusion:
        """Move all networks, cast them, or both; returns the pipeline itself."""
        for module in filter(None, (self.text, self.unet, self.vae, self.depth)):
            module.to(device=device, dtype=dtype)
        return self

    def _parts(self) -> list[tuple[str, nn.Module, str]]:
        """Name, network and what it does, of every part."""
        config = self.config
        width, cells = config.text.width, config.size // config.vae.factor
        latent = f"{config.vae.latent_channels} x {cells} x {cells}"
        does = {
            "text": f"a prompt to {config.text.places} vectors of {width}",
            "unet": f"a noisy latent of {latent}, its time and these vectors to {config.prediction}",
            "vae": f"a picture of {config.size} x {config.size} to a latent and back",
            "depth": "a picture to how near everything is",
        }
        return [(name, part, says) for name, says in does.items() if (part := getattr(self, name)) is not None]

    def info(self) -> str:
        """What the model is, in some lines: its networks, and what it draws with where nothing else is asked for."""
        config = self.config
        rows = [f"  {name:6}{count(part):>8}  {says}" for name, part, says in self._parts()]
        ending = f"{config.steps} steps of {config.sampler}, spaced {config.spacing}, guidance {config.guidance:g}"
        return "\n".join([repr(self), *rows, f"  drawn with {ending}"])

    def __repr__(self) -> str:
        total = count(*(part for _, part, _ in self._parts()))
        dtype = str(self.dtype).removeprefix("torch.")
        return f"<StableDiffusion {self.config.name}: {total} numbers, {dtype} on {self.device}>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        cells = [[name, type(part).__name__, count(part), says] for name, part, says in self._parts()]
        rows = ["".join(f"<td style='text-align:left'>{html.escape(text)}</td>" for text in row) for row in cells]
        return f"{html.escape(repr(self))}<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write the model for other tools: to a single file where the path ends in .safetensors, else to a diffusers
        folder. Raises FileExistsError where there is something already.
        """
        parts = {name: part for name, part in vars(self).items() if name != "schedule" and part is not None}
        write = write_single if str(path).endswith(".safetensors") else write_folder
        write(parts, path, dtype)

    # The parts

    @torch.no_grad()
    def encode_text(
        self,
        prompts: Texts,
        *,
        long_prompts: LongPrompts = "cut",
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
        negative: Float[Tensor, "b m d"] | None = None,
        guidance: float = 1.0,
        rescale: float = 0.0,
        concat: Float[Tensor, "#b k h w"] | None = None,
        label: Int[Tensor, "#b"] | None = None,
    ) -> Denoiser:
        """`denoise(x, sigma)` for the given contexts: what samplers call."""
        kind = self.config.prediction
        return Denoiser(self.unet, self.schedule, kind, context, negative, guidance, rescale, concat, label)

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "b 3 h w"], tile: int | None = None) -> Float[Tensor, "b z h8 w8"]:
        """Pictures in [-1, 1] to latents, the posterior's mean, in float32 on the CPU.

        `tile`: work in overlapping tiles of so many latent cells a side, which takes less memory (see `VAE`).
        """
        return self._finite(lambda x: self.vae.encode(x, tile=tile), pixels)

    @torch.no_grad()
    def decode(self, z: Float[Tensor, "b z h8 w8"], tile: int | None = None) -> Float[Tensor, "b 3 h w"]:
        """Latents to pictures in [-1, 1], in float32 on the CPU; `tile` as in `encode`."""
        return self._finite(lambda x: self.vae.decode(x, tile), z)

    def _finite(self, way: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """What the autoencoder makes of x; in float32 where numbers of half precision are too small for it."""
        out = way(x.to(self.device, self.dtype))
        if self.dtype != torch.float32 and not out.isfinite().all():
            checks.warn(f'the autoencoder overflowed in {self.dtype}: worked in float32; dtype="float32" asks for that')
            self.vae.float()
            out = way(x.to(self.device, torch.float32))
            self.vae.to(self.dtype)
        return out.float().cpu()

    @torch.no_grad()
    def estimate_depth(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h2 w2"]:
        """How near everything in pictures in [-1, 1] is (their disparity), at the estimator's own size."""
        if self.depth is None:
            raise ValueError(f"{self.config.name} came without a depth estimator; give a depth picture, nearest white")
        return self.depth.estimate(pixels.to(self.device, self.dtype)).float().cpu()

    # The ways to draw

    def text_to_image(
        self, prompt: Texts, *, size: int | tuple[int, int] | None = None,
        negative: Texts = "", seed: Seeds | None = None, n: int = 1, steps: int | None = None,
        guidance: float | None = None, rescale: float = 0.0, sampler: Sampler | None = None,
        schedule: str | None = None, long_prompts: LongPrompts = "cut", clip_skip: int | None = None,
        tile: int | None = None, progress: bool = True,
    ) -> Pictures:  # fmt: skip
        """Draw pictures from prompts alone: one picture for one prompt and n = 1, else a list, n in a row a prompt.

        `size`: a side or (width, height) in pixels, multiples of the autoencoder's factor; by default the size of
        training. What else can be asked for is the same in every way to draw, and `Settings` says what it means; what
        is left out is the model's own choice: mostly 20 steps of `samplers.dpmpp_2m`, spaced "karras".

        The settings, seed included, are in each picture's `info`. The same seed gives the same picture in every batch.
        Raises ValueError for settings that can't be.
        """
        settings = Settings(
            negative=negative, seed=seed, n=n, steps=steps, guidance=guidance, rescale=rescale, sampler=sampler,
            schedule=schedule, long_prompts=long_prompts, clip_skip=clip_skip, tile=tile, progress=progress,
        )  # fmt: skip
        run, cells = self._from_noise(prompt, size, settings)
        return self._draw(run, cells)

    __call__ = text_to_image

    def latents(
        self, prompt: Texts, *, size: int | tuple[int, int] | None = None,
        negative: Texts = "", seed: Seeds | None = None, n: int = 1, steps: int | None = None,
        guidance: float | None = None, rescale: float = 0.0, sampler: Sampler | None = None,
        schedule: str | None = None, long_prompts: LongPrompts = "cut", clip_skip: int | None = None,
        tile: int | None = None, progress: bool = True,
    ) -> Iterator[tuple[Float[Tensor, "b z h w"], Float[Tensor, "b z h w"]]]:  # fmt: skip
        """What `text_to_image` goes through, step by step: `(x, x0)` after each, to `decode` or to stop at.

        `x` is the latent with the noise that is left in it, `x0 + sigma * noise`; `x0` is what the network takes to be
        behind the noise, a picture from the first step on. The last `x` is what `text_to_image` decodes. Settings and
        errors, raised at once, are those of `text_to_image`.
        """
        settings = Settings(
            negative=negative, seed=seed, n=n, steps=steps, guidance=guidance, rescale=rescale, sampler=sampler,
            schedule=schedule, long_prompts=long_prompts, clip_skip=clip_skip, tile=tile, progress=progress,
        )  # fmt: skip
        run, cells = self._from_noise(prompt, size, settings)
        return self._sample(run, cells)

    def img2img(
        self, prompt: Texts, picture: Image.Image, *, strength: float = 0.6,
        negative: Texts = "", seed: Seeds | None = None, n: int = 1, steps: int | None = None,
        guidance: float | None = None, rescale: float = 0.0, sampler: Sampler | None = None,
        schedule: str | None = None, long_prompts: LongPrompts = "cut", clip_skip: int | None = None,
        tile: int | None = None, progress: bool = True,
    ) -> Pictures:  # fmt: skip
        """Redraw a picture: add noise by the denoising strength, then denoise towards the prompt (Meng et al. 2022,
        SDEdit).

        `strength` 0 gives the picture back; 1 forgets it and is text to image; between them the last `strength *
        steps` steps run, at least one. The rest is as in `text_to_image`.
        """
        settings = Settings(
            negative=negative, seed=seed, n=n, steps=steps, guidance=guidance, rescale=rescale, sampler=sampler,
            schedule=schedule, long_prompts=long_prompts, clip_skip=clip_skip, tile=tile, progress=progress,
        )  # fmt: skip
        self._must_take(4, 9)
        picture = images.fit(images.to_rgb(picture), multiple=self.vae.config.factor)
        run = self._run("img2img", prompt, settings, picture.size, strength)
        return self._redraw(run, picture)

    def inpaint(
        self, prompt: Texts, picture: Image.Image, mask: Image.Image, *, strength: float = 1.0,
        negative: Texts = "", seed: Seeds | None = None, n: int = 1, steps: int | None = None,
        guidance: float | None = None, rescale: float = 0.0, sampler: Sampler | None = None,
        schedule: str | None = None, long_prompts: LongPrompts = "cut", clip_skip: int | None = None,
        tile: int | None = None, progress: bool = True,
    ) -> Pictures:  # fmt: skip
        """Redraw only where the mask is white.

        A model of 9 channels is shown the mask and the rest of the picture; with any other every prediction outside the
        mask is replaced by the picture's own latent. Pixels where the mask is black come back untouched; where it is
        grey, old and new are blended by it. A mask of another size is resized, with a warning; an all but black one
        leaves the picture as it is, with a warning. `strength` as in `img2img`, the rest as in `text_to_image`.
        """
        settings = Settings(
            negative=negative, seed=seed, n=n, steps=steps, guidance=guidance, rescale=rescale, sampler=sampler,
            schedule=schedule, long_prompts=long_prompts, clip_skip=clip_skip, tile=tile, progress=progress,
        )  # fmt: skip
        self._must_take(4, 9)
        picture, mask = self._picture_and_mask(picture, mask)
        run = self._run("inpaint", prompt, settings, picture.size, strength)
        white = (images.from_pil(mask)[:, :1] > FAINT / 127.5 - 1).float()
        if not white.any():
            checks.warn("the mask is all black: nothing is redrawn; paint white what should change")
            return run.finish([picture.copy() for _ in range(len(run))])
        # A cell is redrawn if any pixel of it is. (In training the first pixel of a cell decided for an inpainting
        # model, and thin strokes could miss it.)
        cells = F.max_pool2d(white, self.vae.config.factor)
        if self.config.unet.in_channels == 9:
            rest = self.encode(images.from_pil(picture) * (1 - white), settings.tile)  # grey, which is 0, in the hole
            drawn = self._redraw(run, picture, concat=torch.cat([cells, rest], dim=1))
        else:
            drawn = self._redraw(run, picture, mask=cells)
        for new in drawn if isinstance(drawn, list) else [drawn]:
            new.paste(picture, mask=mask.point(lambda value: 255 - value))
        return drawn

    def depth2img(
        self, prompt: Texts, picture: Image.Image, *, depth: Image.Image | None = None, strength: float = 0.9,
        negative: Texts = "", seed: Seeds | None = None, n: int = 1, steps: int | None = None,
        guidance: float | None = None, rescale: float = 0.0, sampler: Sampler | None = None,
        schedule: str | None = None, long_prompts: LongPrompts = "cut", clip_skip: int | None = None,
        tile: int | None = None, progress: bool = True,
    ) -> Pictures:  # fmt: skip
        """Redraw a picture and keep its depths: colours and materials may change, shapes and places stay.

        `depth` is a grey picture of how near everything is, the nearest white, of 8 or 16 bits or of floating point
        numbers; without it the model's own estimator looks at `picture`. `strength` as in `img2img`, the rest as in
        `text_to_image`.
        """
        settings = Settings(
            negative=negative, seed=seed, n=n, steps=steps, guidance=guidance, rescale=rescale, sampler=sampler,
            schedule=schedule, long_prompts=long_prompts, clip_skip=clip_skip, tile=tile, progress=progress,
        )  # fmt: skip
        self._must_take(5)
        picture = images.fit(images.to_rgb(picture), multiple=self.vae.config.factor)
        run = self._run("depth2img", prompt, settings, picture.size, strength)
        if depth is None:
            disparity = self.estimate_depth(images.from_pil(picture))
        else:
            disparity = images.levels(depth, picture.size)
        width, height = (side // self.vae.config.factor for side in picture.size)
        return self._redraw(run, picture, concat=depth_channel(disparity, (height, width)))

    def upscale(
        self, prompt: Texts, picture: Image.Image, *, noise_level: int = 20,
        negative: Texts = "", seed: Seeds | None = None, n: int = 1, steps: int | None = None,
        guidance: float | None = None, rescale: float = 0.0, sampler: Sampler | None = None,
        schedule: str | None = None, long_prompts: LongPrompts = "cut", clip_skip: int | None = None,
        tile: int | None = None, progress: bool = True,
    ) -> Pictures:  # fmt: skip
        """Enlarge a picture, four times with the published upscaler (Rombach et al. 2022, section 4.5).

        The network sees the small picture beside the latent, with noise of step `noise_level` of the schedule (0 to
        350) added: more noise leaves more to invention. The rest is as in `text_to_image`.
        """
        settings = Settings(
            negative=negative, seed=seed, n=n, steps=steps, guidance=guidance, rescale=rescale, sampler=sampler,
            schedule=schedule, long_prompts=long_prompts, clip_skip=clip_skip, tile=tile, progress=progress,
        )  # fmt: skip
        self._must_take(7)
        noise_level = checks.integer("noise_level", noise_level, 0, MAX_NOISE_LEVEL)
        small = images.from_pil(images.to_rgb(picture))
        height, width = small.shape[-2:]
        factor = self.vae.config.factor
        run = self._run("upscale", prompt, settings, (width * factor, height * factor))
        run.info["noise_level"] = noise_level
        label = torch.tensor([noise_level])
        noised = self.schedule.add_noise(
            small.expand(len(run), -1, -1, -1), label.expand(len(run)), run.noise(3, height, width)
        )
        return self._draw(run, (height, width), concat=noised, label=label)

    # What the ways have in common

    def _run(self, way: str, prompt: Texts, settings: Settings, size: tuple[int, int], strength: float = 1.0) -> Run:
        """A call, checked: what can't be and what can't fit is refused before the long work."""
        settings = settings.of(self.config, len(self.schedule.betas))
        self._check_memory(len(checks.prompts(prompt)) * settings.n, *size, settings.tile)
        run = Run(self.config, self.schedule, self.encode_text, prompt, settings, strength)
        run.info |= {"way": way, "size": "{}x{}".format(*size), "dtype": str(self.dtype).removeprefix("torch.")}
        return run

    def _from_noise(
        self, prompt: Texts, size: int | tuple[int, int] | None, settings: Settings
    ) -> tuple[Run, tuple[int, int]]:
        """A call that begins at pure noise, and the height and width of its latents."""
        self._must_take(4, 9)
        factor = self.vae.config.factor
        width, height = checks.size(self.config.size if size is None else size, factor)
        return self._run("text_to_image", prompt, settings, (width, height)), (height // factor, width // factor)

    def _redraw(
        self, run: Run, picture: Image.Image, mask: Tensor | None = None, concat: Tensor | None = None
    ) -> Pictures:
        """From a picture, as far as the strength goes; strength 0 gives its own pixels."""
        if run.strength == 0:
            return run.finish([picture.copy() for _ in range(len(run))])
        latent = self.encode(images.from_pil(picture), run.settings.tile)
        height, width = latent.shape[-2:]
        return self._draw(run, (height, width), latent, mask, concat)

    @torch.no_grad()
    def _draw(
        self,
        run: Run,
        cells: tuple[int, int],
        latent: Float[Tensor, "1 z h w"] | None = None,
        mask: Float[Tensor, "1 1 h w"] | None = None,
        concat: Float[Tensor, "#b k h w"] | None = None,
        label: Int[Tensor, "1"] | None = None,
    ) -> Pictures:
        """Sample as `_sample` does, and decode where it ends."""
        for step in self._sample(run, cells, latent, mask, concat, label):
            x, _ = step
        with naming_the_knob():
            return run.finish([images.one_to_pil(self.decode(z, run.settings.tile)[0]) for z in x.split(1)])

    @torch.no_grad()
    def _sample(
        self,
        run: Run,
        cells: tuple[int, int],
        latent: Float[Tensor, "1 z h w"] | None = None,
        mask: Float[Tensor, "1 1 h w"] | None = None,
        concat: Float[Tensor, "#b k h w"] | None = None,
        label: Int[Tensor, "1"] | None = None,
    ) -> Iterator[tuple[Float[Tensor, "b z h w"], Float[Tensor, "b z h w"]]]:
        """Sample at a latent size, from pure noise or from a noised latent: `(x, x0)` after every step.

        Each picture's generator gives the start first, then one noise a step where the sampler asks for it.
        """
        settings, shape = run.settings, (self.config.vae.latent_channels, *cells)
        with naming_the_knob():
            if concat is None and self.config.unet.in_channels == 9:
                concat = self._all_masked(cells, settings.tile)
            denoise = self.denoiser(run.context, run.negative, settings.guidance, settings.rescale, concat, label)
            blended = denoise if mask is None else lambda x, sigma: torch.where(mask > 0, denoise(x, sigma), latent)
            x, noise = run.start(shape, latent), samplers.BrownianNoise(lambda: run.noise(*shape))
            trail = settings.sampler(blended, x, run.sigmas, noise)
            bar = tqdm(trail, total=len(run.sigmas) - 1, disable=not settings.progress)
            for step, (x, x0) in enumerate(bar, start=1):
                if not x.isfinite().all():
                    raise ValueError(f"the latents are not finite after step {step}; lower the guidance or add steps")
                noise.forget(run.sigmas[step])
                yield x, x0

    def _all_masked(self, cells: tuple[int, int], tile: int | None) -> Float[Tensor, "1 5 h w"]:
        """What an inpainting model is shown where there is nothing to keep: a mask all ones, and grey behind it."""
        height, width = (side * self.vae.config.factor for side in cells)
        return torch.cat([torch.ones(1, 1, *cells), self.encode(torch.zeros(1, 3, height, width), tile)], dim=1)

    def _picture_and_mask(self, picture: Image.Image, mask: Image.Image) -> tuple[Image.Image, Image.Image]:
        """A picture whose sides fit, and its mask, grey, cropped as the picture is."""
        picture = images.to_rgb(picture)
        if not isinstance(mask, Image.Image):
            raise ValueError(f"the mask is a PIL image, not {type(mask).__name__}; minisd.image.read opens a file")
        mask = images.to_rgb(mask, background="black").convert("L")
        if mask.size != picture.size:
            checks.warn(f"the mask is {mask.size}, the picture {picture.size}: the mask is resized")
            mask = mask.resize(picture.size, Image.Resampling.NEAREST)
        picture = images.fit(picture, multiple=self.vae.config.factor)
        return picture, images.fit(mask, picture.size)

    def _must_take(self, *channels: int) -> None:
        """Refuse what the network was not trained for: its input channels say what it is shown beside the latent."""
        took = self.config.unet.in_channels
        if took not in channels:
            raise ValueError(f"{self.config.name} {WAYS[took]}")

    def _check_memory(self, count: int, width: int, height: int, tile: int | None) -> None:
        """Refuse what can't fit, before it is tried: some dozen feature maps at the finest level."""
        vae, unet, bytes_ = self.vae.config, self.config.unet, self.dtype.itemsize
        longest = max(width, height) if tile is None else tile * vae.factor
        at_once = min(width, longest) * min(height, longest)  # pixels of one picture, or of one tile
        decoder = 7 * bytes_ * max(vae.widths[:2]) * at_once
        cells = count * width * height // vae.factor**2
        predictor = 40 * bytes_ * unet.widths[0] * 2 * cells  # all pictures, doubled by guidance
        needed = max(decoder, predictor)
        free = free_memory(self.device)
        if free is not None and needed > free:
            raise ValueError(
                f"{count} picture{'s' * (count > 1)} of {width} x {height} would take about {needed / 2**30:.1f} GiB, "
                f"there are {free / 2**30:.1f}; choose a smaller size or fewer pictures, or set tile"
            )


def load(
    model: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    unet: str | Path | None = None,
    prediction: Prediction | None = None,
) -> StableDiffusion:
    """The bundled model, or another, ready to draw.

    `model`: the name of a bundled one, or the path of published weights, v1 or v2: a single file (safetensors or
    .ckpt), or a diffusers folder; or a folder that `train` or `save` has made.
    `dtype`: what the networks compute in, float32, float16 or bfloat16. By default float32 for the bundled models and
    those of `train`, which are small, so that every machine draws the same; for published weights what the device is
    fastest with: float16 on CUDA, bfloat16 on a CPU with instructions for it, else float32.
    `unet`: a file, or a diffusers folder, whose noise predictor takes the place of a published model's.
    `prediction`: what the noise predictor predicts, "eps", "v" or "x0", where the files don't say it or are wrong.

    Raises CheckpointError (a ValueError) where there is no such model or a file doesn't fit, and ValueError for a
    device that isn't there or a dtype that can't be.
    """
    device, path = check_device(device), resolve(model)
    if dtype is None:
        dtype = fast_dtype(device) if is_published(path) else torch.float32
    parts = read_parts(path, check_dtype(dtype), unet=unet, prediction=prediction)
    return StableDiffusion(**parts).to(device)


def count(*modules: nn.Module) -> str:
    """How many numbers networks have: "6.9 M"."""
    return f"{sum(p.numel() for module in modules for p in module.parameters()) / 1e6:.1f} M"
