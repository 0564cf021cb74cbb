"""Measure the bundled models: `python assets/models/measure.py` writes measured.json beside itself.

Fresh renders (never trained on) tell how well the oracle reads and how much the autoencoder loses; prompts drawn by the
models tell how well they obey, read by the oracle, how far their pictures are from renders, and whether they are copies
of training renders. `card.py` puts it all into the card.
"""

import argparse
import dataclasses
import json
import platform
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import minisd
from minisd.clip import ImageTower
from minisd.config import CRITTERS_IMAGE_TOWER
from minisd.critters import WORDS, Scene, prompt
from minisd.critters.oracle import SIZE, Oracle, accuracy, as_seen, shown
from minisd.evaluate import diversity, draw_scenes, frechet_distance, load_oracle, measure, psnr
from minisd.image import from_pil, to_pil
from minisd.pipeline import StableDiffusion
from minisd.train.data import Distances, Renders
from minisd.weights import read_module, resolve

SETTINGS = [  # split, guidance, steps
    *[("held-out", 1, 20), ("held-out", 2, 20), ("held-out", 4, 20), ("held-out", 7, 20)],
    *[("held-out", 4, 5), ("held-out", 4, 10)],
]


def scenes_of(split: str, count: int) -> list[Scene]:
    generator = torch.Generator().manual_seed(0)
    return [Scene.sample(generator, split) for _ in range(count)]


def counted(oracle: Oracle, scenes: list[Scene], drawn: Tensor) -> dict[str, list[int]]:
    return {attribute: [c.right, c.total] for attribute, c in measure(oracle, scenes, drawn).items()}


def features(oracle: Oracle, images: Tensor) -> Tensor:
    return torch.cat([oracle.features(some) for some in images.split(50)])


def rebuild(sd: StableDiffusion, fresh: Renders) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Renders and their reconstructions as the oracle sees them (at 512 x 512 a thousand take three gigabytes), and how
    good these are at their own size.
    """
    small, rebuilt, whole, eyes = [], [], [], []
    for some in torch.arange(len(fresh)).split(10):
        pictures, mask = fresh.pictures(some), torch.from_numpy(fresh.eyes[some.numpy()]).float()
        again = sd.decode(sd.encode(pictures))
        seen = mask.flatten(1).any(1)
        whole.append(psnr(pictures, again))
        eyes.append(psnr(pictures[seen], again[seen], mask[seen]))
        small.append(as_seen(pictures))
        rebuilt.append(as_seen(again))
    quality = {"psnr": torch.cat(whole).mean().item(), "psnr_in_the_eyes": torch.cat(eyes).mean().item()}
    return torch.cat(small), torch.cat(rebuilt), quality


def as_a_set(oracle: Oracle, drawn: Tensor, pictures: Tensor, rebuilt: Tensor, training: Tensor) -> dict:
    """How far drawn pictures are from renders; beside each number what renders have, at which nothing is wrong.

    `nearest` is the median distance to the nearest training render: copies would be nearer than fresh renders are.
    """
    one, other = features(oracle, pictures).chunk(2)
    new, known = features(oracle, drawn), features(oracle, training)

    def nearest(some: Tensor) -> float:
        return torch.cdist(some, known).amin(dim=1).median().item()

    return {
        "frechet": {
            "n": len(one),
            "renders": frechet_distance(one, other),
            "reconstructions": frechet_distance(features(oracle, rebuilt)[: len(one)], other),
            "drawn": frechet_distance(new, other),
        },
        "diversity": {"renders": diversity(one), "drawn": diversity(new)},
        "nearest": {"training": len(known), "renders": nearest(one), "drawn": nearest(new)},
    }


def zero_shot(sd: StableDiffusion, scenes: list[Scene], pictures: Tensor) -> dict[str, dict[str, float]]:
    """How often the mini CLIP finds the right one among a scene's prompts with each word of one attribute."""
    tower = read_module(ImageTower(CRITTERS_IMAGE_TOWER), resolve(None) / "image_tower.safetensors")
    found = {name: [] for name in WORDS if name != "studio"}
    for scene, own in zip(scenes, tower.embed(pictures), strict=True):
        for name in filter(lambda name: shown(scene, name), found):
            texts = {prompt(scene): True}  # where a prompt leaves a word unsaid, two may be one
            for word in set(WORDS[name]) - {getattr(scene, name)}:
                with suppress(ValueError):  # a coat that can't be
                    texts.setdefault(prompt(dataclasses.replace(scene, **{name: word})), False)
            if len(texts) > 1:
                best = (sd.text.embed(sd.tokenizer(list(texts))) @ own).argmax().item()
                found[name].append((best == 0, 1 / len(texts)))
    return {
        name: {"right": sum(r for r, _ in f) / len(f), "chance": sum(c for _, c in f) / len(f), "count": len(f)}
        for name, f in found.items()
    }


def depths_kept(fresh: Renders, count: int) -> dict[str, float]:
    """How well the estimator tells depths, and the depth variant keeps those of a render under another one's prompt.

    `error` is the mean of |8 / depth| estimated against true; the others are correlations of disparities over a
    picture's pixels: of what was drawn with the render, as the estimator sees both, and of two renders by chance.
    """
    sd, near = minisd.load("critters-512-depth"), torch.from_numpy(fresh.disparities(SIZE)[: count + 1]).float()
    pictures = fresh.pictures(torch.arange(count))
    estimated, drawn = sd.depth.estimate(pictures), []
    for i, picture in enumerate(to_pil(pictures)):
        drawn.append(from_pil(sd.depth2img(prompt(fresh.scenes[i + 1]), picture, strength=1, seed=i, progress=False)))

    def alike(a: Tensor, b: Tensor) -> float:
        a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (a, b))
        return F.cosine_similarity(a, b).mean().item()

    return {
        "pictures": count,
        "error": (estimated - Distances.UNIT * near[:-1]).abs().mean().item(),
        "kept": alike(sd.depth.estimate(torch.cat(drawn)), estimated),
        "by chance": alike(near[1:], near[:-1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--renders", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "minisd-fresh")
    parser.add_argument("--known", type=int, default=2400, help="how many of the training renders to compare with")
    parser.add_argument("--training", type=Path, default=Path("runs/renders"), help="the renders it was trained on")
    options = parser.parse_args()
    sd, oracle = minisd.load(), load_oracle()

    fresh = Renders(options.cache, options.renders, sd.config.size, seed=1)
    pictures, rebuilt, quality = rebuild(sd, fresh)
    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "renders": len(fresh),
        "oracle_on_renders": accuracy(oracle, pictures, fresh.scenes),
        "oracle_on_reconstructions": accuracy(oracle, rebuilt, fresh.scenes),
        **quality,
    }

    result["zero_shot"] = zero_shot(sd, fresh.scenes[:400], pictures[:400])

    scenes = scenes_of("train", len(fresh) // 2)
    drawn = as_seen(draw_scenes(sd, scenes, guidance=4))
    training = Renders(options.training, options.known, sd.config.size).shrunk(SIZE).float() / 127.5 - 1
    result |= as_a_set(oracle, drawn, pictures, rebuilt, training)

    result["adherence"] = {"train, guidance 4, 20 steps": counted(oracle, scenes, drawn)}
    for split, guidance, steps in SETTINGS:
        scenes = scenes_of(split, options.prompts)
        drawn = draw_scenes(sd, scenes, guidance=guidance, steps=steps)
        result["adherence"][f"{split}, guidance {guidance}, {steps} steps"] = counted(oracle, scenes, drawn)
    result["depth"] = depths_kept(fresh, count=min(40, len(fresh) - 1))
    Path(__file__).with_name("measured.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
