"""Recipes with settings of their own, as the command line or a run file gives them, and how they are carried out."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import checks
from ..config import CRITTERS_512, ModelConfig
from ..train.loop import Record, TrainConfig, share
from . import workshop
from .recipes import RECIPES, chosen
from .workshop import RENDERS


@dataclasses.dataclass(frozen=True)
class Stage:
    """A recipe, how it is run, and how many renders of which seed it learns from."""

    recipe: str
    run: TrainConfig
    renders: int = RENDERS
    render_seed: int = 0

    def __post_init__(self):
        checks.integer("renders", self.renders, 1, 10**9)
        checks.integer("render_seed", self.render_seed, 0, 2**32 - 1)

    def train(self, folder: Path, device: torch.device, workers: int, preset: ModelConfig) -> Generator[Record]:
        """Run the recipe in a folder."""
        function, _ = RECIPES[self.recipe]
        shop = workshop.Workshop(folder, device, self.renders, preset, self.render_seed, workers)
        return function(shop, self.run)


def stages(name: str, /, **settings: Any) -> list[Stage]:
    """The recipes that a name stands for (see `chosen`), with some of the fields of `TrainConfig` and `Stage` changed.

    Raises ValueError for unknown recipes and settings, and for values that are not allowed.
    """
    own = {key: settings.pop(key) for key in ("renders", "render_seed") if key in settings}
    if unknown := settings.keys() - {field.name for field in dataclasses.fields(TrainConfig)}:
        raise ValueError(f"{name} has no setting {', '.join(sorted(unknown))}")
    return [Stage(recipe, dataclasses.replace(run, **settings), **own) for recipe, _, run in chosen(name)]


def read_stages(path: Path) -> list[Stage]:
    """The stages of a run file, in order: tables in TOML, each named by its recipe, of settings.

    Raises ValueError, which names the file, where it is not such a file.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        if loose := [name for name, table in tables.items() if not isinstance(table, dict)]:
            raise ValueError(f"{loose[0]} is no table; settings stand below the name of their recipe, such as [vae]")
        return [stage for recipe, settings in tables.items() for stage in stages(recipe, **settings)]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def carry_out(
    stages: Iterable[Stage], folder: Path, device: torch.device, workers: int = 0, preset: ModelConfig = CRITTERS_512
) -> None:
    """Run one stage after the other, each with a bar that shows its progress. An error notes which stage it ended."""
    for stage in stages:
        bar = tqdm(total=stage.run.steps, desc=stage.recipe, disable=share()[0] > 0)
        try:
            with bar, closing(stage.train(folder, device, workers, preset)) as records:
                for record in records:
                    shown = {"loss": record.loss, **record.parts}
                    bar.set_postfix({part: f"{value:.4f}" for part, value in shown.items()}, refresh=False)
                    bar.update(record.step - bar.n)  # a resumed run starts further on
        except BaseException as error:
            error.add_note(f"This ended the stage {stage.recipe}. It goes on where it was when it is started again.")
            raise
