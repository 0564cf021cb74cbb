"""Measure the bundled models: `python assets/models/measure.py` writes measured.json beside itself.

Fresh renders (never trained on) tell how well the oracle reads and how much the autoencoder loses; prompts drawn by the
models tell how well they obey, read by the oracle, how far their pictures are from renders, and whether they are copies
of training renders. `--only` measures some of that anew and keeps the rest. `card.py` puts it all into the card.
"""

import argparse
import dataclasses
import itertools
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import minisd
from minisd import evaluate, samplers
from minisd.clip import ImageTower
from minisd.config import CRITTERS_IMAGE_TOWER
from minisd.critters import WORDS, Scene, prompt
from minisd.critters.data import EYES, Distances, Renders
from minisd.critters.oracle import SIZE, Oracle, accuracy, as_seen, shown
from minisd.critters.segmenter import COUNTED, Segmenter, count
from minisd.evaluate import diversity, draw_scenes, frechet_distance, load_oracle, load_segmenter, measure, psnr
from minisd.image import from_pil, to_pil
from minisd.weights import read_module, resolve

SETTINGS = [  # split, guidance, steps
    *[("held-out", 1, 20), ("held-out", 2, 20), ("held-out", 4, 20), ("held-out", 7, 20)],
    *[("held-out", 4, 5), ("held-out", 4, 10)],
]


def sde_then_ode(denoise: Callable, x: Tensor, sigmas: Tensor, noise: Callable) -> Iterator[tuple[Tensor, Tensor]]:
    """Fresh noise while the picture's layout forms, none while its details do."""
    border = int((sigmas[:-1] > 1).sum())
    for state, x0 in samplers.euler_a(denoise, x, sigmas[: border + 1], noise):
        yield state, x0
    yield from samplers.dpmpp_2m(denoise, state, sigmas[border:], noise)


SAMPLERS = {  # what the model could be drawn with, at each of these scales of guidance
    "DPM++ 2M": (samplers.dpmpp_2m, (20,)),
    "Euler a": (samplers.euler_a, (20, 24, 28)),
    "DPM++ 2M SDE": (samplers.dpmpp_2m_sde, (20, 28)),
    "Euler a above sigma 1, then DPM++ 2M": (sde_then_ode, (20,)),
}
SCALES = (3, 4, 5)


def scenes_of(split: str, count: int) -> list[Scene]:
    generator = torch.Generator().manual_seed(0)
    return [Scene.sample(generator, split) for _ in range(count)]


def features(oracle: Oracle, images: Tensor) -> Tensor:
    return torch.cat([oracle.features(some) for some in images.split(50)])


class Bench:
    """What is measured, and with what: made once, when it is first asked for."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.sd, self.oracle = minisd.load(), load_oracle()

    @cached_property
    def fresh(self) -> Renders:
        return Renders(self.options.cache, self.options.renders, self.sd.config.size, seed=1)

    @cached_property
    def pictures(self) -> Tensor:
        """The fresh renders as the oracle sees them: at 512 x 512 a thousand take three gigabytes."""
        return torch.cat([as_seen(self.fresh.pictures(some)) for some in torch.arange(len(self.fresh)).split(10)])

    @cached_property
    def rebuilt(self) -> tuple[Tensor, dict[str, float]]:
        """Their reconstructions, as the oracle sees them, and how good these are at their own size."""
        small, whole, eyes = [], [], []
        for some in torch.arange(len(self.fresh)).split(10):
            pictures, mask = self.fresh.pictures(some), (self.fresh.parts(some) == EYES).float()
            again, seen = self.sd.decode(self.sd.encode(pictures)), mask.flatten(1).any(1)
            small.append(as_seen(again))
            whole.append(psnr(pictures, again))
            eyes.append(psnr(pictures[seen], again[seen], mask[seen]))
        quality = {"psnr": torch.cat(whole).mean().item(), "psnr_in_the_eyes": torch.cat(eyes).mean().item()}
        return torch.cat(small), quality

    @cached_property
    def read_right(self) -> dict[str, dict[str, float]]:
        """How well the oracle reads them, by attribute and style."""
        return accuracy(self.oracle, self.pictures, self.fresh.scenes)

    def counted(self, scenes: list[Scene], drawn: Tensor) -> dict[str, dict[str, float]]:
        """By attribute: of how many pictures, how many it was read rightly from, and in how many renders of the same
        styles it would be."""
        return {
            attribute: {
                "right": count.right,
                "total": count.total,
                "of renders": sum(self.read_right[attribute][s.style] for s in scenes if shown(s, attribute)),
            }
            for attribute, count in measure(self.oracle, scenes, drawn).items()
        }

    @cached_property
    def segmenter(self) -> tuple[Segmenter, dict]:
        return load_segmenter()

    def whole(self, scenes: list[Scene], drawn: Tensor) -> dict[str, dict[str, float]]:
        """By style, and in all: the share of pictures with as many of each part as renders of their kind have."""
        chosen = {"all": list(range(len(scenes)))}
        chosen |= {style: [i for i, s in enumerate(scenes) if s.style == style] for style in WORDS["style"]}
        table = {}
        for style, some in chosen.items():
            found = evaluate.anatomy(*self.segmenter, [scenes[i] for i in some], drawn[some])
            table[style] = {"of": len(some)} | {part: count.share for part, count in found.items()}
        return table

    @cached_property
    def trained(self) -> tuple[list[Scene], Tensor]:
        """Scenes of the training split and what is drawn from them."""
        scenes = scenes_of("train", self.options.renders // 2)
        return scenes, as_seen(draw_scenes(self.sd, scenes, guidance=4))


def renders(bench: Bench) -> dict:
    """How well the oracle reads renders and reconstructions, and how good these are."""
    rebuilt, quality = bench.rebuilt
    return {
        "renders": len(bench.fresh),
        "oracle_on_renders": bench.read_right,
        "oracle_on_reconstructions": accuracy(bench.oracle, rebuilt, bench.fresh.scenes),
        **quality,
    }


def sets(bench: Bench) -> dict:
    """How far drawn pictures are from renders; beside each number what renders have, at which nothing is wrong.

    `nearest` is the median distance to the nearest training render: copies would be nearer than fresh renders are.
    """
    training = Renders(bench.options.training, bench.options.known, bench.sd.config.size).shrunk(SIZE).float()
    one, other = features(bench.oracle, bench.pictures).chunk(2)
    new, known = features(bench.oracle, bench.trained[1]), features(bench.oracle, training / 127.5 - 1)

    def nearest(some: Tensor) -> float:
        return torch.cdist(some, known).amin(dim=1).median().item()

    return {
        "frechet": {
            "n": len(one),
            "renders": frechet_distance(one, other),
            "reconstructions": frechet_distance(features(bench.oracle, bench.rebuilt[0])[: len(one)], other),
            "drawn": frechet_distance(new, other),
        },
        "diversity": {"renders": diversity(one), "drawn": diversity(new)},
        "nearest": {"training": len(known), "renders": nearest(one), "drawn": nearest(new)},
    }


def anatomy(bench: Bench) -> dict:
    """How often pictures show as many of each part as renders of their kind do, by style; and how well that is read."""
    segmenter, _ = bench.segmenter
    true, read = count(bench.fresh.shrunk_parts(SIZE)), count(segmenter.parts(bench.pictures))
    again = count(segmenter.parts(bench.rebuilt[0]))
    scenes = scenes_of("held-out", bench.options.prompts)
    models = {"drawn": (bench.sd, scenes), "distilled": (minisd.load("critters-512-distilled"), scenes)}
    return {
        "anatomy": {
            "as labelled": {"renders": shares(read == true), "reconstructions": shares(again == true)},
            "renders": bench.whole(bench.fresh.scenes, bench.pictures),
            "reconstructions": bench.whole(bench.fresh.scenes, bench.rebuilt[0]),
            **{name: bench.whole(scenes, as_seen(draw_scenes(sd, scenes))) for name, (sd, scenes) in models.items()},
        }
    }


def shares(right: Tensor) -> dict[str, float]:
    """The share of pictures in which each part's count is right, and all of them are."""
    each = dict(zip(COUNTED, right.float().mean(0).tolist(), strict=True))
    return each | {"whole": right.all(1).float().mean().item()}


def sampling(bench: Bench) -> dict:
    """What the model is best drawn with: adherence, anatomy, Frechet distance and seconds a picture, by setting."""
    scenes, found = scenes_of("held-out", bench.options.prompts), {}
    real = features(bench.oracle, bench.pictures)
    for (name, (sampler, many)), guidance in itertools.product(SAMPLERS.items(), SCALES):
        for steps in many:
            begun = time.perf_counter()
            drawn = as_seen(draw_scenes(bench.sd, scenes, sampler=sampler, steps=steps, guidance=guidance))
            found[f"{name}, {steps} steps, guidance {guidance}"] = {
                "seconds": (time.perf_counter() - begun) / len(scenes),
                "adherence": bench.counted(scenes, drawn),
                "anatomy": bench.whole(scenes, drawn)["all"],
                "frechet": frechet_distance(features(bench.oracle, drawn), real[: len(scenes)]),
            }
    nothing_wrong = frechet_distance(*real[: 2 * len(scenes)].chunk(2))
    return {"sampling": {"n": len(scenes), "renders to renders": nothing_wrong, "settings": found}}


def obeys(bench: Bench) -> dict:
    """What the oracle reads back, by setting."""
    found = {"train, guidance 4, 20 steps": bench.counted(*bench.trained)}
    for split, guidance, steps in SETTINGS:
        scenes = scenes_of(split, bench.options.prompts)
        drawn = draw_scenes(bench.sd, scenes, guidance=guidance, steps=steps)
        found[f"{split}, guidance {guidance}, {steps} steps"] = bench.counted(scenes, drawn)
    return {"adherence": found}


def distilled(bench: Bench) -> dict:
    """The same of the variant of four steps, drawn as its config says."""
    scenes = scenes_of("held-out", bench.options.prompts)
    drawn = draw_scenes(minisd.load("critters-512-distilled"), scenes)
    return {"distilled": {"held-out, 4 steps, distilled": bench.counted(scenes, drawn)}}


def zero_shot(bench: Bench) -> dict:
    """How often the mini CLIP finds the right one among a scene's prompts with each word of one attribute."""
    sd, scenes, pictures = bench.sd, bench.fresh.scenes[:400], bench.pictures[:400]
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
        "zero_shot": {
            name: {"right": sum(r for r, _ in f) / len(f), "chance": sum(c for _, c in f) / len(f), "count": len(f)}
            for name, f in found.items()
        }
    }


def depth(bench: Bench) -> dict:
    """How well the estimator tells depths, and the depth variant keeps those of a render under another one's prompt.

    `error` is the mean of |8 / depth| estimated against true; the others are correlations of disparities over a
    picture's pixels: of what was drawn with the render, as the estimator sees both, and of two renders by chance.
    """
    fresh, count = bench.fresh, min(40, len(bench.fresh) - 1)
    sd, near = minisd.load("critters-512-depth"), fresh.disparities(SIZE)[: count + 1]
    pictures = fresh.pictures(torch.arange(count))
    estimated, drawn = sd.depth.estimate(pictures), []
    for i, picture in enumerate(to_pil(pictures)):
        drawn.append(from_pil(sd.depth2img(prompt(fresh.scenes[i + 1]), picture, strength=1, seed=i, progress=False)))

    def alike(a: Tensor, b: Tensor) -> float:
        a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (a, b))
        return F.cosine_similarity(a, b).mean().item()

    return {
        "depth": {
            "pictures": count,
            "error": (estimated - Distances.UNIT * near[:-1]).abs().mean().item(),
            "kept": alike(sd.depth.estimate(torch.cat(drawn)), estimated),
            "by chance": alike(near[1:], near[:-1]),
        }
    }


SECTIONS = {each.__name__: each for each in (renders, zero_shot, sets, anatomy, sampling, obeys, distilled, depth)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[*SECTIONS])
    parser.add_argument("--renders", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "minisd-fresh")
    parser.add_argument("--known", type=int, default=2400, help="how many of the training renders to compare with")
    parser.add_argument("--training", type=Path, default=Path("runs/renders"), help="the renders it was trained on")
    options = parser.parse_args()

    path = Path(__file__).with_name("measured.json")
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    bench = Bench(options)
    for name in options.only:
        result |= SECTIONS[name](bench)
        result["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
