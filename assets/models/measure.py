"""Measure the bundled models: `python assets/models/measure.py` writes measured.json beside itself.

Fresh renders (never trained on) tell how well the oracle reads and how much the autoencoder loses; prompts drawn by the
model tell how well it obeys, read by the oracle.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path

import torch

import minisd
from minisd.critters import Scene
from minisd.critters.oracle import accuracy
from minisd.evaluate import load_oracle, measure, psnr
from minisd.train.data import Renders


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
    for split in ("train", "held-out"):
        generator = torch.Generator().manual_seed(0)
        scenes = [Scene.sample(generator, split) for _ in range(options.prompts)]
        for guidance in (1.0, 4.0):
            counts = measure(sd, oracle, scenes, guidance=guidance)
            result["adherence"][f"{split}, guidance {guidance:g}"] = {
                name: [count.right, count.total] for name, count in counts.items()
            }
    Path(__file__).with_name("measured.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
