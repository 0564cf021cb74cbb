"""The data of the recipes: renders cached on disk, and what each network sees of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from ..clip import TextTower
from ..config import CRITTERS_DEPTH
from ..denoiser import Denoiser
from ..depth import depth_channel
from ..files import replacing
from ..image import edges
from ..samplers import dpmpp_2m
from ..schedule import NoiseSchedule, linear, plan
from ..tokenizer import Tokenizer
from ..train.loop import Batch, share
from ..unet import UNet
from ..vae import VAE
from . import PARTS, Scene, caption, depths, prompt, render
from .captions import near_misses
from .oracle import targets

CHUNK = 80  # renders a file
NEAR_MISSES = 3  # false captions a picture
EYES = PARTS.index("eyes")
REDRAWN, REDRAWN_STEPS = (0.3, 1.5), 20  # noise on latents that are drawn anew, from and to; steps from pure noise
EYE_WEIGHT = 8.0  # how much more an error counts in the eyes, which are small and looked at first


class Renders:
    """`count` random training scenes of `size` pixels, rendered once and kept in `folder` in files of eighty.

    Rendering goes on where it stopped. Sample number i is the same on every machine up to rounding: its scene comes
    from a generator seeded by its file's number. Pictures stay on the disk, and only those asked for are read.

    Raises ValueError for a file that holds something else.
    """

    def __init__(self, folder: Path, count: int, size: int, seed: int = 0, device: str | torch.device = "cpu"):
        self.folder, self.size, self.seed, self.device = folder, size, seed, device
        self.files = self._made(f"{size}", count, self._render)
        rows = [json.loads(row) for file in self.files for row in file["scene"].tolist()]
        self.scenes = [Scene(**row) for row in rows[:count]]

    def _made(self, kind: str, count: int, make: Callable[[int], dict[str, np.ndarray]]) -> list[np.ndarray]:
        """The files of `count` samples, mapped into memory: a table each, with the columns that `make(number)` gives
        where it isn't there yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = [self.folder / f"{kind}-{self.seed}-{i:04d}.npy" for i in range(-(-count // CHUNK))]
        rank, ranks = share()
        mine = range(rank, len(paths), ranks)
        for i in tqdm(mine, desc=f"rendering {kind}", unit_scale=CHUNK, unit="picture", disable=rank > 0):
            if not paths[i].exists():
                with replacing(paths[i]) as temporary, temporary.open("wb") as file:
                    np.save(file, _table(make(i)))
        if ranks > 1:
            dist.barrier()
        return [_mapped(path) for path in paths]

    def _render(self, number: int) -> dict[str, np.ndarray]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        scenes = [Scene.sample(generator) for _ in range(CHUNK)]
        on_cpu = torch.device(self.device).type == "cpu"
        result = render(scenes, self.size, self.device, chunk=8 if on_cpu else CHUNK)  # what a cache or a GPU holds
        return {
            "image": ((result.image + 1) * 127.5).round().byte().cpu().numpy(),
            "parts": result.parts.byte().cpu().numpy(),
            "scene": np.array([json.dumps(asdict(s)) for s in scenes], "S"),
        }

    def known(self, kind: str, make: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What else is to be known of all samples, as `make` says it of those at some indices: in half precision.

        It is made on first use and kept beside the pictures. `kind` is a name for it.
        """
        indices = torch.arange(len(self)).split(CHUNK)
        files = self._made(
            f"{kind}-{len(indices[-1])}",  # the last file may hold fewer samples: then it's no use to a longer set
            len(self),
            lambda number: {name: t.half().cpu().numpy() for name, t in make(indices[number]).items()},
        )
        return {name: torch.from_numpy(np.concatenate([file[name] for file in files])) for name in files[0].dtype.names}

    def disparities(self, size: int) -> Float[Tensor, "n 1 size size"]:
        """How near everything is, 1 / depth."""

        def make(indices: Tensor) -> dict[str, Tensor]:
            return {"disparity": 1 / depths([self.scenes[i] for i in indices], size, device=self.device)}

        return self.known(f"depth-{size}", make)["disparity"].float()

    def __len__(self) -> int:
        return len(self.scenes)

    def pictures(
        self,
        indices: Tensor,
        mirrored: Bool[Tensor, "b"] | None = None,
        size: int | None = None,
        device: str | torch.device = "cpu",
    ) -> Float[Tensor, "b 3 h w"]:
        """Pictures in [-1, 1], some of them mirrored, and shrunk to `size` pixels a side where it is given."""
        images = self._column("image", indices, mirrored).to(device).float() / 127.5 - 1
        return images if size is None else F.adaptive_avg_pool2d(images, size)

    def parts(self, indices: Tensor, mirrored: Bool[Tensor, "b"] | None = None) -> UInt8[Tensor, "b 1 h w"]:
        """Which part of the critter every pixel shows, as indices into `PARTS`."""
        return self._column("parts", indices, mirrored)

    def _column(self, name: str, indices: Tensor, mirrored: Bool[Tensor, "b"] | None) -> Tensor:
        rows = [self.files[i // CHUNK][name][i % CHUNK] for i in indices.tolist()]
        return _mirrored(torch.from_numpy(np.stack(rows)), mirrored)

    def shrunk(self, size: int) -> UInt8[Tensor, "n 3 size size"]:
        """All pictures at another size, as bytes."""
        some = torch.arange(len(self)).split(CHUNK)
        return torch.cat([((self.pictures(i, size=size) + 1) * 127.5).round().byte() for i in some])

    def shrunk_parts(self, size: int) -> UInt8[Tensor, "n size size"]:
        """The part that the middle of each pixel of the shrunk pictures shows."""
        some = torch.arange(len(self)).split(CHUNK)
        return torch.cat([F.interpolate(self.parts(i), size, mode="nearest-exact")[:, 0] for i in some])

    def eye_shares(self, factor: int) -> Float[Tensor, "n 1 h8 w8"]:
        """What share of each cell of `factor` pixels a side is eyes."""
        some = torch.arange(len(self)).split(CHUNK)
        return torch.cat([F.avg_pool2d((self.parts(i) == EYES).float(), factor) for i in some])

    def mirror_some(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, list[Scene]]:
        """A coin for each of the samples at `indices`, and what it shows: its scene, or the mirrored one."""
        mirrored = torch.rand(len(indices), generator=generator) < 0.5
        scenes = [self.scenes[i] for i in indices.tolist()]
        return mirrored, [s.mirrored() if m else s for s, m in zip(scenes, mirrored.tolist(), strict=True)]


def _table(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Columns of as many rows as one array of records, which a file can be mapped as."""
    rows = len(next(iter(columns.values())))
    table = np.empty(rows, [(name, column.dtype, column.shape[1:]) for name, column in columns.items()])
    for name, column in columns.items():
        table[name] = column
    return table


def _mapped(path: Path) -> np.ndarray:
    """A table that `_table` made, mapped into memory. Raises ValueError where the file is something else."""
    table = None
    with suppress(ValueError, EOFError):
        table = np.lib.format.open_memmap(path, mode="r")
    if table is None or table.dtype.names is None:
        raise ValueError(f"{path} is not what was stored there; remove it, and it is made anew")
    return table


def _mirrored(maps: Tensor, mirrored: Bool[Tensor, "b"] | None) -> Tensor:
    """Maps, some of them turned left to right."""
    return maps if mirrored is None else torch.where(mirrored[:, None, None, None], maps.flip(3), maps)


class Pictures:
    """What the autoencoder sees: pictures, mirrored half of the time, and how much each pixel matters."""

    def __init__(self, renders: Renders, latent: tuple[int, int, int]):
        self.renders, self.latent = renders, latent

    def __len__(self) -> int:
        return len(self.renders)

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        mirrored = torch.rand(len(indices), generator=generator) < 0.5
        return {
            "image": self.renders.pictures(indices, mirrored),
            "weight": eye_weight(self.renders.parts(indices, mirrored) == EYES),
            "noise": torch.randn(len(indices), *self.latent, generator=generator),
        }


def eye_weight(eyes: Bool[Tensor, "b 1 h w"] | Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
    """How much errors count, by the share that is eyes: 1 without, `EYE_WEIGHT` where there is nothing else."""
    return 1 + (EYE_WEIGHT - 1) * eyes.float()


def posteriors(renders: Renders, vae: VAE) -> tuple[Float[Tensor, "n z h w"], Float[Tensor, "n z h w"]]:
    """Means and deviations of the unscaled latents of all renders."""
    device = next(vae.parameters()).device

    @torch.no_grad()
    def make(indices: Tensor) -> dict[str, Tensor]:
        with torch.autocast(device.type, torch.bfloat16):  # as the autoencoder was trained
            found = [vae.posterior(renders.pictures(some, device=device)) for some in indices.split(8)]  # fit the cache
        return {
            "mean": torch.cat([p.mean for p in found]),
            "deviation": torch.cat([(p.logvar / 2).exp() for p in found]),
        }

    latents = renders.known(f"posteriors-{renders.size}-{name_of(vae.encoder, vae.quant)}", make)
    return latents["mean"], latents["deviation"]


def name_of(*modules: nn.Module) -> str:
    """A name for modules, by their weights: what was made with others is not taken for theirs."""
    weights = b"".join(p.detach().cpu().numpy().tobytes() for module in modules for p in module.parameters())
    return hashlib.sha256(weights).hexdigest()[:12]


def redrawn(
    renders: Renders,
    vae: VAE,
    tokenizer: Tokenizer,
    text: TextTower,
    unet: UNet,
    schedule: NoiseSchedule,
    guidance: float,
) -> Float[Tensor, "n z h w"]:
    """The unscaled latents of all renders as the noise predictor draws them: with so much noise that it must draw anew
    what is fine, and may keep what is coarse, under their own prompts.
    """
    mean, _ = posteriors(renders, vae)
    levels = plan(schedule, REDRAWN_STEPS, "karras").sigmas.float()
    negative = text(tokenizer([""]))

    @torch.no_grad()
    def draw(z: Tensor, scenes: list[Scene], generator: torch.Generator) -> Tensor:
        low, high = REDRAWN
        first = low * (high / low) ** torch.rand(1, generator=generator)
        x0 = vae.config.scaling * z.float().to(negative.device)
        x = x0 + first.item() * torch.randn(x0.shape, generator=generator).to(x0)
        context = text(tokenizer([prompt(scene) for scene in scenes]))
        denoise = Denoiser(unet, schedule, "v", context, negative, guidance)
        *_, (x, _) = dpmpp_2m(denoise, x, torch.cat([first, levels[levels < first]]), None)
        return x / vae.config.scaling

    def make(indices: Tensor) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(int(indices[0]))
        some = indices.split(8)
        return {"z": torch.cat([draw(mean[i], [renders.scenes[k] for k in i.tolist()], generator) for i in some])}

    return renders.known(f"redrawn-{renders.size}-{name_of(unet, text, vae.encoder, vae.quant)}", make)["z"]


class Decodings:
    """What a decoder sees that learns by itself: a square of a latent, and the pixels it stands for.

    Drawn latents are not quite right anywhere. A decoder that has only seen the encoder's takes each small error for a
    detail: smooth fur comes out crumpled. So half of these are the encoder's with noise on them, and half are `drawn`
    ones (see `redrawn`).
    """

    SIDE = 32  # of the square, in cells
    NOISE = 0.2  # at most, in deviations of the latents

    def __init__(self, renders: Renders, vae: VAE, drawn: Float[Tensor, "n z h w"]):
        self.renders, self.drawn = renders, drawn
        self.factor, self.level = vae.config.factor, self.NOISE / vae.config.scaling
        self.mean, self.deviation = posteriors(renders, vae)

    def __len__(self) -> int:
        return len(self.renders)

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        count, shape = len(indices), self.mean.shape[1:]
        z = self.mean[indices] + self.deviation[indices] * torch.randn(count, *shape, generator=generator)
        level = self.level * torch.rand(count, 1, 1, 1, generator=generator)
        z = z + level * torch.randn(count, *shape, generator=generator)
        z = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, self.drawn[indices].float(), z)
        pixels = {
            "image": self.renders.pictures(indices),
            "weight": eye_weight(self.renders.parts(indices) == EYES),
        }
        side = min(self.SIDE, z.shape[-1])
        corners = torch.randint(z.shape[-1] - side + 1, (count, 2), generator=generator).tolist()

        def squares(maps: Tensor, cell: int) -> Tensor:
            places = [(slice(cell * y, cell * (y + side)), slice(cell * x, cell * (x + side))) for y, x in corners]
            return torch.stack([one[:, rows, columns] for one, (rows, columns) in zip(maps, places, strict=True)])

        return {"z": squares(z, 1), **{name: squares(maps, self.factor) for name, maps in pixels.items()}}


class Distances:
    """What the depth estimator sees: pictures, half of them mirrored, and how near everything in them is."""

    UNIT = 8.0  # heads: disparities are `UNIT / depth`, about 1 at the critter and 0.5 at the sky

    def __init__(self, renders: Renders, size: int):
        self.renders, self.size, self.disparities = renders, size, renders.disparities(size)

    def __len__(self) -> int:
        return len(self.renders)

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        mirrored = torch.rand(len(indices), generator=generator) < 0.5
        return {
            "image": self.renders.pictures(indices, mirrored, self.size),
            "disparity": self.UNIT * _mirrored(self.disparities[indices], mirrored),
        }


class Captioned:
    """What the mini CLIP sees: pictures, half of them mirrored; a fresh caption of each, and false ones close to it."""

    def __init__(self, renders: Renders, tokenizer: Tokenizer, size: int):
        self.renders, self.tokenizer, self.size = renders, tokenizer, size

    def __len__(self) -> int:
        return len(self.renders)

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        mirrored, scenes = self.renders.mirror_some(indices, generator)
        ids = self.tokenizer([text for scene in scenes for text in near_misses(scene, generator, NEAR_MISSES)])
        ids = ids[:, : int(ids.argmax(1).max()) + 1]  # what comes after the end mark, no caption's embedding knows of
        return {
            "image": self.renders.pictures(indices, mirrored, self.size),
            "ids": ids.unflatten(0, (-1, 1 + NEAR_MISSES)),
        }


class Latents:
    """What the noise predictor sees: a noised latent, its time and its caption; the target is v.

    Every visit samples the picture's latent anew. One caption in ten is dropped (left empty), which is what makes
    classifier-free guidance possible (Ho & Salimans 2022, algorithm 1). Half of the others name everything, as a
    prompt does that knows what it wants; the rest leave out what they like. A cell weighs what its pixels weigh to the
    autoencoder, more in the eyes: the best prediction stays the same, its errors are mended in another order.

    No picture is mirrored: no word tells a picture from its mirror image, so that it would be one choice more.
    """

    DROPPED, WHOLE = 0.1, 0.5  # shares of the captions: left empty; of the others, those that leave nothing out

    def __init__(self, renders: Renders, vae: VAE, tokenizer: Tokenizer, schedule: NoiseSchedule):
        self.renders, self.tokenizer, self.schedule = renders, tokenizer, schedule
        self.scaling = vae.config.scaling
        self.mean, self.deviation = posteriors(renders, vae)
        self.weight = eye_weight(renders.eye_shares(vae.config.factor))

    def __len__(self) -> int:
        return len(self.renders)

    def times(self, count: int, generator: torch.Generator) -> Int[Tensor, "b"]:
        """Of which times there shall be noise: each is as likely as any other, but a batch's are spread evenly.

        (Kingma et al. 2021, "Variational Diffusion Models", appendix I.1: the loss differs so much from time to time
        that a batch of independent ones says little of it.)
        """
        spread = torch.rand(1, generator=generator) + torch.arange(count) / count
        return (spread % 1 * len(self.schedule.betas)).long()

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        count, shape = len(indices), self.mean.shape[1:]
        scenes = [self.renders.scenes[i] for i in indices.tolist()]
        keep = torch.rand(count, generator=generator) >= self.DROPPED
        leave_out = 0.15 * (torch.rand(count, generator=generator) >= self.WHOLE)
        captions = [caption(s, generator, p, plain=True) for s, p in zip(scenes, leave_out.tolist(), strict=True)]
        ids = self.tokenizer([c if k else "" for c, k in zip(captions, keep.tolist(), strict=True)])

        noise = torch.randn(count, *shape, generator=generator)
        x0 = self.scaling * (self.mean[indices] + self.deviation[indices] * noise)
        t = self.times(count, generator)
        eps = torch.randn(count, *shape, generator=generator)
        return {
            "x_t": self.schedule.add_noise(x0, t, eps),
            "target": self.schedule.add_noise(eps, t, -x0),  # v: the same mix, a quarter turn on
            "weight": self.weight[indices],
            "t": t.float(),
            "ids": ids,
        }


class Holes(Latents):
    """What a noise predictor sees that fills holes: beside the latent, which cells are to be redrawn, and the rest's.

    Each render has a hole of its own, and what is left of it is encoded once.
    """

    def __init__(self, renders: Renders, vae: VAE, tokenizer: Tokenizer, schedule: NoiseSchedule):
        super().__init__(renders, vae, tokenizer, schedule)
        device, factor = next(vae.parameters()).device, vae.config.factor

        def shown(image: Tensor, generator: torch.Generator) -> Tensor:
            white = holes(len(image), image.shape[-1], generator).to(device)
            return torch.cat([white[:, :, ::factor, ::factor], vae.encode(image * (1 - white))], dim=1)

        @torch.no_grad()
        def make(indices: Tensor) -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed(int(indices[0]))
            some = indices.split(8)
            return {"shown": torch.cat([shown(renders.pictures(i, device=device), generator) for i in some])}

        self.shown = renders.known(f"holes-{renders.size}-{name_of(vae.encoder, vae.quant)}", make)["shown"]

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        batch = super().batch(indices, generator)
        return batch | {"x_t": torch.cat([batch["x_t"], self.shown[indices]], dim=1)}


def holes(count: int, size: int, generator: torch.Generator, whole: float = 0.25) -> Float[Tensor, "b 1 h w"]:
    """Random masks, 1 where there is a hole: one to three ellipses or rectangles in each.

    A share of `whole` are holes altogether, as in the training of Stable Diffusion's inpainting models (their model
    cards).
    """
    at = torch.linspace(-1, 1, size)
    centre = 2 * torch.rand(count, 3, 2, 1, generator=generator) - 1
    reach = 0.1 + 0.6 * torch.rand(count, 3, 2, 1, generator=generator)
    down, across = ((at - centre) / reach).abs().unbind(2)  # each b 3 n, 1 at the border
    down, across = down[..., :, None], across[..., None, :]
    round_, square = down.square() + across.square() < 1, (down < 1) & (across < 1)
    shape = torch.where(torch.rand(count, 3, 1, 1, generator=generator) < 0.5, round_, square)
    there = torch.arange(3) <= torch.randint(3, (count, 1), generator=generator)
    white = (shape & there[:, :, None, None]).any(1, keepdim=True).float()
    white[torch.rand(count, generator=generator) < whole] = 1
    return white


class Depths(Latents):
    """What a noise predictor sees that is told depths: beside the latent, how near each cell is."""

    def __init__(self, renders: Renders, vae: VAE, tokenizer: Tokenizer, schedule: NoiseSchedule):
        super().__init__(renders, vae, tokenizer, schedule)
        height, width = self.mean.shape[-2:]
        self.near = depth_channel(renders.disparities(CRITTERS_DEPTH.size), (height, width))

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        batch = super().batch(indices, generator)
        return batch | {"x_t": torch.cat([batch["x_t"], self.near[indices]], dim=1)}


class Shrunk(Latents):
    """What an upscaler sees: beside the latent, the picture shrunk to a pixel a cell, with a little noise on it.

    (Ho et al. 2022, "Cascaded diffusion models", section 4: with noise it learns not to trust each pixel.)
    """

    NOISE = 50  # at most, in steps of the schedule

    def __init__(self, renders: Renders, vae: VAE, tokenizer: Tokenizer, schedule: NoiseSchedule):
        super().__init__(renders, vae, tokenizer, schedule)
        self.small = renders.shrunk(self.mean.shape[-1])

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        batch = super().batch(indices, generator)
        small = self.small[indices].float() / 127.5 - 1
        level = torch.randint(self.NOISE + 1, (len(indices),), generator=generator)
        noised = self.schedule.add_noise(small, level, torch.randn(small.shape, generator=generator))
        return batch | {"x_t": torch.cat([batch["x_t"], noised], dim=1)}


class Edges(Latents):
    """What a ControlNet sees: beside the latent, the edges of the picture, as large as it is."""

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        batch = super().batch(indices, generator)
        return batch | {"picture": edges(self.renders.pictures(indices))}


class Labelled(Latents):
    """What a classifier of noisy latents sees: beside the latent, an index by attribute, as the oracle's `targets`."""

    def __init__(self, renders: Renders, vae: VAE, tokenizer: Tokenizer, schedule: NoiseSchedule):
        super().__init__(renders, vae, tokenizer, schedule)
        self.targets = targets(renders.scenes)

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        return super().batch(indices, generator) | {name: index[indices] for name, index in self.targets.items()}


class Stages(Latents):
    """What a model of few steps is distilled on: latents at one of its noise levels, and the teacher's levels from
    there to its next one. All samples of a batch are at the same level.
    """

    STEPS, SUBSTEPS = 4, 3  # of the student; of the teacher, to each of the student's
    DRAWN: ClassVar[dict[str, Any]] = {
        "steps": STEPS,
        "sampler": "euler",
        "spacing": "trailing",
    }  # how the student is to be used

    def times(self, count: int, generator: torch.Generator) -> Int[Tensor, "b"]:
        visited = plan(self.schedule, self.STEPS, "trailing").timesteps.long()
        return visited[torch.randint(self.STEPS, (1,), generator=generator)].expand(count)

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        batch, count = super().batch(indices, generator), len(indices)
        path = plan(self.schedule, self.STEPS * self.SUBSTEPS, "trailing")
        first = path.timesteps.tolist().index(batch["t"][0])
        sigmas = path.sigmas[first : first + self.SUBSTEPS + 1].float()
        return batch | {"sigmas": sigmas.repeat(count, 1), "empty": self.tokenizer([""]).repeat(count, 1)}


class SmallPictures:
    """What the noise predictor of chapter 03 sees: pictures of 32 x 32 with noise, on DDPM's own schedule."""

    SIZE = 32

    def __init__(self, renders: Renders):
        self.images = renders.shrunk(self.SIZE).float() / 127.5 - 1
        self.schedule = linear()

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        x0 = self.images[indices]
        mirrored = torch.rand(len(indices), 1, 1, 1, generator=generator) < 0.5
        t = torch.randint(len(self.schedule.betas), (len(indices),), generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        x_t = self.schedule.add_noise(torch.where(mirrored, x0.flip(3), x0), t, eps)
        return {"x_t": x_t, "t": t.float(), "eps": eps}
