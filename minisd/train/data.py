"""The data of the recipes: renders cached on disk, and what each network sees of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from ..critters import PARTS, Scene, caption, render
from ..critters.captions import near_misses
from ..files import replacing
from ..schedule import NoiseSchedule
from ..tokenizer import Tokenizer
from ..vae import VAE
from .loop import Batch, share

CHUNK = 80  # renders a file
NEAR_MISSES = 3  # false captions a picture
EYES = PARTS.index("eyes")
EYE_WEIGHT = 8.0  # how much more an error counts in the eyes, which are small and looked at first


class Renders:
    """`count` random training scenes of `size` pixels, rendered once and kept in `folder` in files of eighty.

    Rendering goes on where it stopped. Sample number i is the same on every machine up to rounding: its scene comes
    from a generator seeded by its file's number.
    """

    def __init__(self, folder: Path, count: int, size: int, seed: int = 0, device: str | torch.device = "cpu"):
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{size}-{seed}-{i:04d}.npz" for i in range(-(-count // CHUNK))]
        rank, ranks = share()
        mine = range(rank, len(files), ranks)
        for i in tqdm(mine, desc=f"rendering at {size}", unit_scale=CHUNK, unit="picture", disable=rank > 0):
            if not files[i].exists():
                self._render(files[i], size, torch.Generator().manual_seed(seed * 1_000_003 + i), device)
        if ranks > 1:
            dist.barrier()
        self.images = np.empty((count, 3, size, size), np.uint8)
        self.eyes = np.empty((count, 1, size, size), bool)
        self.scenes: list[Scene] = []
        for i, path in enumerate(files):
            part = slice(i * CHUNK, min((i + 1) * CHUNK, count))
            with np.load(path) as stored:
                self.images[part] = stored["images"][: part.stop - part.start]
                self.eyes[part] = stored["eyes"][: part.stop - part.start]
                self.scenes += [Scene(**s) for s in json.loads(str(stored["scenes"]))[: part.stop - part.start]]

    @staticmethod
    def _render(path: Path, size: int, generator: torch.Generator, device: str | torch.device) -> None:
        scenes = [Scene.sample(generator) for _ in range(CHUNK)]
        result = render(scenes, size, device=device)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                images=((result.image + 1) * 127.5).round().byte().cpu().numpy(),
                eyes=(result.parts == EYES).cpu().numpy(),
                scenes=json.dumps([asdict(s) for s in scenes]),
            )

    def __len__(self) -> int:
        return len(self.scenes)

    def pictures(self, indices: Tensor) -> Tensor:
        """Pictures in [-1, 1]."""
        return torch.from_numpy(self.images[indices.numpy()]).float() / 127.5 - 1

    def mirror_some(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, list[Scene]]:
        """A coin for each of the samples at `indices`, and what it shows: its scene, or the mirrored one."""
        mirrored = torch.rand(len(indices), generator=generator) < 0.5
        scenes = [self.scenes[i] for i in indices.tolist()]
        return mirrored, [s.mirrored() if m else s for s, m in zip(scenes, mirrored.tolist(), strict=True)]


class Pictures:
    """What the autoencoder sees: pictures, mirrored half of the time, and how much each pixel matters."""

    def __init__(self, renders: Renders, latent: tuple[int, int, int]):
        self.renders, self.latent = renders, latent

    def __len__(self) -> int:
        return len(self.renders)

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        image = self.renders.pictures(indices)
        eyes = torch.from_numpy(self.renders.eyes[indices.numpy()]).float()
        mirrored = torch.rand(len(indices), generator=generator) < 0.5
        flip = mirrored[:, None, None, None]
        return {
            "mirrored": mirrored,
            "image": torch.where(flip, image.flip(3), image),
            "weight": 1 + (EYE_WEIGHT - 1) * torch.where(flip, eyes.flip(3), eyes),
            "noise": torch.randn(len(indices), *self.latent, generator=generator),
        }


@torch.no_grad()
def posteriors(renders: Renders, vae: VAE) -> tuple[Float[Tensor, "n 2 z h w"], Float[Tensor, "n 2 z h w"]]:
    """Means and deviations of the unscaled latents of all renders, each as it is and mirrored."""
    means, deviations = [], []
    device = next(vae.parameters()).device
    rank, ranks = share()
    mine = torch.arange(len(renders)).tensor_split(ranks)[rank].split(8)  # small batches stay in the cache
    with torch.autocast(device.type, torch.bfloat16):  # as the autoencoder was trained
        for indices in tqdm(mine, desc="encoding", disable=rank > 0):
            image = renders.pictures(indices).to(device)
            both = [vae.posterior(side) for side in (image, image.flip(3))]
            means.append(torch.stack([p.mean.cpu() for p in both], dim=1))
            deviations.append(torch.stack([(p.logvar / 2).exp().cpu() for p in both], dim=1))
    parts = [(torch.cat(means), torch.cat(deviations))] * ranks
    if ranks > 1:
        dist.all_gather_object(parts, parts[rank])
    mean, deviation = (torch.cat(part) for part in zip(*parts, strict=True))
    return mean, deviation


class Decodings:
    """What a decoder sees that learns by itself: the encoder's latents, each visit sampled anew, and the pictures."""

    def __init__(self, renders: Renders, vae: VAE):
        self.mean, self.deviation = posteriors(renders, vae)
        self.pictures = Pictures(renders, self.mean.shape[2:])

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        batch = self.pictures.batch(indices, generator)
        seen = indices, batch.pop("mirrored").long()
        return batch | {"z": self.mean[seen] + self.deviation[seen] * batch.pop("noise")}


class Captioned:
    """What the mini CLIP sees: pictures, half of them mirrored; a fresh caption of each, and false ones close to it."""

    def __init__(self, renders: Renders, tokenizer: Tokenizer):
        self.renders, self.tokenizer = renders, tokenizer

    def __len__(self) -> int:
        return len(self.renders)

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        mirrored, scenes = self.renders.mirror_some(indices, generator)
        ids = self.tokenizer([text for scene in scenes for text in near_misses(scene, generator, NEAR_MISSES)])
        ids = ids[:, : int(ids.argmax(1).max()) + 1]  # what comes after the end mark, no caption's embedding knows of
        image = self.renders.pictures(indices)
        return {
            "image": torch.where(mirrored[:, None, None, None], image.flip(3), image),
            "ids": ids.unflatten(0, (-1, 1 + NEAR_MISSES)),
        }


class Latents:
    """What the noise predictor sees: a noised latent, its time and its caption; the target is v.

    Every visit samples the picture's latent anew. One caption in ten is dropped (left empty), which is what makes
    classifier-free guidance possible (Ho & Salimans 2022, algorithm 1).
    """

    DROPPED = 0.1

    def __init__(self, renders: Renders, vae: VAE, tokenizer: Tokenizer, schedule: NoiseSchedule):
        self.renders, self.tokenizer, self.schedule = renders, tokenizer, schedule
        self.scaling = vae.config.scaling
        self.mean, self.deviation = posteriors(renders, vae)

    def __len__(self) -> int:
        return len(self.renders)

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        count, shape = len(indices), self.mean.shape[2:]
        keep = torch.rand(count, generator=generator) >= self.DROPPED
        mirrored, scenes = self.renders.mirror_some(indices, generator)
        captions = [caption(scene, generator) for scene in scenes]
        ids = self.tokenizer([c if k else "" for c, k in zip(captions, keep.tolist(), strict=True)])

        noise = torch.randn(count, *shape, generator=generator)
        seen = indices, mirrored.long()
        x0 = self.scaling * (self.mean[seen] + self.deviation[seen] * noise)
        t = torch.randint(len(self.schedule.betas), (count,), generator=generator)
        eps = torch.randn(count, *shape, generator=generator)
        return {
            "x_t": self.schedule.add_noise(x0, t, eps),
            "target": self.schedule.add_noise(eps, t, -x0),  # v: the same mix, a quarter turn on
            "t": t.float(),
            "ids": ids,
        }
