"""Draw how the losses fell: `python assets/models/curves.py runs curves.png` writes curves.png beside itself.

It reads the tables that `minisd train` keeps beside its checkpoints. Every dot is the mean of a fiftieth of a run.
"""

import csv
import statistics
import sys
from pathlib import Path

from matplotlib.axes import Axes

from minisd import image
from minisd.plots import curves, show

HERE = Path(__file__).parent
WHAT = {  # recipes, and what their losses are
    "vae": "the autoencoder:\nerror of pixels, edges, colours",
    "unet": "the noise predictor:\nsquared error of v",
    "refine": "the noise predictor, trained further:\nsquared error of v",
    "decoder": "the decoder alone:\nerror of pixels and edges",
    "clip": "the mini CLIP:\ncross-entropy",
}


def read(path: Path) -> dict[int, float]:
    """Loss by step; where a run went back to its checkpoint, what came later counts."""
    with path.open(encoding="utf-8") as table:
        return {int(step): float(loss) for step, loss, *_ in csv.reader(table)}


def thinned(losses: dict[int, float], points: int = 50) -> tuple[list[float], list[float]]:
    """Steps and losses, each the mean over one of so many parts of the run."""
    length = max(losses) / points
    parts = [[s for s in losses if i * length < s <= (i + 1) * length] for i in range(points)]
    parts = [part for part in parts if part]
    return [statistics.mean(part) for part in parts], [statistics.mean(losses[s] for s in part) for part in parts]


def few_ticks(axes: Axes) -> None:
    axes.locator_params(axis="x", nbins=4)


def main(folder: Path, name: str) -> None:
    tables = {what: folder / f"critters-512-{recipe}.csv" for recipe, what in WHAT.items()}
    runs = {what: thinned(read(path)) for what, path in tables.items() if path.exists()}
    panels = [[curves(steps, {"": losses}, "step", "loss"), few_ticks] for steps, losses in runs.values()]
    figure = show(*panels, titles=list(runs), columns=min(2, len(runs)), width=3.4, height=2.2)
    image.save(figure, HERE / name, force=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
