"""Go on with the bundled models on one GPU for so many minutes: `python assets/models/make.py 12`.

Renders first, in several processes; then the noise predictor, alone; then all that is made from it, side by side. Each
recipe has its share of the time. Whatever is finished lies in `runs/critters-512` and the folders beside it, its losses
in tables beside those; `minisd train` goes on with one recipe alone.

On an H100 with 16 cores one process renders 146 pictures a second, after 39 seconds of compiling, and five encode 400.
A step of the noise predictor is 3,300 small kernels, which take the CPU 80 to 120 ms to start, whatever the batch; the
GPU has done them after 93 ms for a batch of 256. Hence batches of 512. Compiled, 256 take 88 ms, after two minutes.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from minisd import critters
from minisd.train.data import Depths, Holes
from minisd.train.workshop import Workshop
from minisd.weights import BUNDLED, assets

RENDERERS = 5  # processes
RENDERS = 8_000  # that the noise predictor learns from
FEW = 2_400  # that all else learns from: each recipe reads its renders into memory
READING = 0.5  # minutes until a recipe has read its renders
STAGES = [  # a share of the time that is left when the renders are there, and what is trained in it on how many
    (0.65, RENDERS, ["refine"]),
    (0.35, FEW, ["inpaint", "depth", "control", "distilled", "classifier", "clip"]),
]


def render(rank: int, ranks: int, folder: Path) -> None:
    """One process's share of the renders, and of what recipes ask of them."""
    if torch.cuda.is_available():  # of 80 GB five took 60 when left alone
        torch.cuda.set_per_process_memory_fraction(0.12)
    critters.compile()
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:29400", rank=rank, world_size=ranks)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    Workshop(folder, device, RENDERS).latents()
    for kind in (Depths, Holes):
        Workshop(folder, device, FEW).latents(kind)


def train(folder: Path, renders: int, recipes: list[str], minutes: float) -> None:
    """Recipes side by side, each to the end of its time; one that fails leaves the others alone."""
    running = {}
    for recipe in recipes:
        options = ["--folder", folder, "--renders", renders, "--steps", 10**6, "--minutes", minutes]
        with (folder / f"{recipe}.log").open("w", encoding="utf-8") as log:
            command = [sys.executable, "-m", "minisd", "train", recipe, *map(str, options)]
            running[recipe] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    for recipe, process in running.items():
        if process.wait():
            print(f"{recipe} failed: see {folder / recipe}.log", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("minutes", type=float)
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes

    if not (options.folder / BUNDLED).exists():
        shutil.copytree(assets() / "models" / BUNDLED, options.folder / BUNDLED)
    processes.spawn(render, (RENDERERS, options.folder), nprocs=RENDERERS)
    left = (end - time.monotonic()) / 60
    for share, renders, recipes in STAGES:
        print(f"{', '.join(recipes)}: {share * left:.1f} minutes", flush=True)
        train(options.folder, renders, recipes, share * left - READING)


if __name__ == "__main__":
    main()
