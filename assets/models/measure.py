"""Measure the bundled models: `python assets/models/measure.py` writes measured.json beside itself.

Fresh renders (never trained on) tell how well the oracle reads and how much the autoencoder loses; prompts drawn by the
model tell how well it obeys, read by the oracle, and how far its pictures are from renders.
"""

import argparse
import json
import platform
import resource
import tempfile
import time
from pathlib import Path

import torch

import minisd
from minisd.critters import Scene
from minisd.critters.oracle import accuracy
from minisd.evaluate import diversity, draw_scenes, frechet_distance, load_oracle, measure, psnr
from minisd.train.data import Renders

SETTINGS = [  # split, guidance, steps
    *[("train", 1, 20), ("held-out", 1, 20), ("held-out", 2, 20), ("held-out", 4, 20), ("held-out", 7, 20)],
    *[("held-out", 4, 5), ("held-out", 4, 10)],
]


def scenes_of(split: str, count: int) -> list[Scene]:
    generator = torch.Generator().manual_seed(0)
    return [Scene.sample(generator, split) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--renders", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "minisd-fresh")
    options = parser.parse_args()
    sd, oracle = minisd.load(), load_oracle()

    fresh = Renders(options.cache, options.renders, sd.config.size, seed=1)
    parts = torch.arange(len(fresh)).split(50)
    pictures = torch.cat([fresh.pictures(i) for i in parts])
    rebuilt = torch.cat([sd.decode(sd.encode(fresh.pictures(i))) for i in parts])
    eyes = torch.from_numpy(fresh.eyes).float()
    seen = eyes.flatten(1).any(1)
    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "renders": len(fresh),
        "oracle_on_renders": accuracy(oracle, pictures, fresh.scenes),
        "oracle_on_reconstructions": accuracy(oracle, rebuilt, fresh.scenes),
        "psnr": psnr(pictures, rebuilt).mean().item(),
        "psnr_in_the_eyes": psnr(pictures[seen], rebuilt[seen], eyes[seen]).mean().item(),
        "adherence": {},
    }

    def count(name: str, scenes: list[Scene], drawn: torch.Tensor) -> None:
        counts = measure(oracle, scenes, drawn)
        result["adherence"][name] = {attribute: [c.right, c.total] for attribute, c in counts.items()}

    def features(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([oracle.features(some) for some in images.split(50)])

    # Half of the renders against as many drawn, and against the other half: the distance at which nothing is wrong.
    scenes, start = scenes_of("train", len(fresh) // 2), time.perf_counter()
    drawn = draw_scenes(sd, scenes, guidance=4)
    result["seconds_a_picture"] = (time.perf_counter() - start) / len(scenes)
    count("train, guidance 4, 20 steps", scenes, drawn)
    one, other = features(pictures).chunk(2)
    result["frechet"] = {
        "n": len(one),
        "renders": frechet_distance(one, other),
        "reconstructions": frechet_distance(features(rebuilt)[: len(one)], other),
        "drawn": frechet_distance(features(drawn), other),
    }
    result["diversity"] = {"renders": diversity(one), "drawn": diversity(features(drawn))}

    for split, guidance, steps in SETTINGS:
        scenes = scenes_of(split, options.prompts)
        drawn = draw_scenes(sd, scenes, guidance=guidance, steps=steps)
        count(f"{split}, guidance {guidance}, {steps} steps", scenes, drawn)
    result["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    Path(__file__).with_name("measured.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
