"""Where a model is made: the folder of its renders, its checkpoints and its finished parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..adapters import lora
from ..clip import TextTower
from ..config import CRITTERS_512, ModelConfig
from ..schedule import from_config
from ..train.loop import Data, Record, TrainConfig, fit, share
from ..train.losses import Predictor
from ..unet import UNet
from ..vae import VAE
from ..weights import read_config, read_module, read_tokenizer, save_module, save_tensors, write_config
from .data import Latents, Renders

M = TypeVar("M", bound=nn.Module)

RENDERS = 5_000
RANK = 16  # of a variant's changes
MAKES = {  # what the recipes that others build on leave in the model's folder
    "vae": ("config.json", "vae.safetensors"),
    "unet": ("tokenizer.txt", "text.safetensors", "unet.safetensors"),
}


@dataclasses.dataclass(frozen=True)
class Workshop:
    """The folder a model is made in, the device it is made on, and its sizes.

    It learns from so many renders, of the scenes that `render_seed` stands for; `workers` processes make the batches.
    """

    folder: Path
    device: torch.device
    renders: int = RENDERS
    preset: ModelConfig = CRITTERS_512
    render_seed: int = 0
    workers: int = 0

    def __post_init__(self):
        self.model.mkdir(parents=True, exist_ok=True)

    @property
    def model(self) -> Path:
        """Where the finished parts go."""
        return self.folder / self.preset.name

    @property
    def config(self) -> ModelConfig:
        """The model's config as far as it is known: recipes fill in what they measure."""
        return read_config(self.model) if (self.model / "config.json").exists() else self.preset

    def data(self) -> Renders:
        """The renders, made on first use."""
        return Renders(self.folder / "renders", self.renders, self.config.size, self.render_seed, self.device)

    def require(self, *recipes: str) -> None:
        """Raise ValueError where a recipe that must have been run has not left its parts: to be called before work."""
        for recipe in recipes:
            if missing := [name for name in MAKES[recipe] if not (self.model / name).exists()]:
                raise ValueError(f"{self.model} has no {', '.join(missing)} yet: run {recipe} first")

    def latents(self, kind: type[Latents] = Latents) -> Latents:
        """What a noise predictor learns from, once there are a tokenizer and an autoencoder."""
        tokenizer, schedule = read_tokenizer(self.model, self.config), from_config(self.config.schedule)
        return kind(self.data(), self.part("vae", VAE(self.config.vae)), tokenizer, schedule)

    def part(self, name: str, module: M) -> M:
        """A finished part of the model, frozen."""
        return read_module(module, self.model / f"{name}.safetensors").to(self.device)

    def fresh(self, make: Callable[[], M], seed: int) -> M:
        """A new module with weights drawn from a seed; the global random state stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            module = make()
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # how convolutions like memory
        return module.to(self.device)

    def run(self, name: str, module: nn.Module, loss: Callable, data: Data, config: TrainConfig) -> Generator[Record]:
        """Train with a checkpoint, and a table beside it: step, loss, learning rate, gradient's norm.

        A run that goes on after a crash repeats some rows.
        """
        path = self.folder / f"{self.preset.name}-{name}"  # may hold a dot: no suffix is to be replaced
        for record in fit(module, loss, data, config, Path(f"{path}.pt"), every=200, workers=self.workers):
            if share()[0] == 0:
                with Path(f"{path}.csv").open("a", encoding="utf-8") as table:
                    table.write(f"{record.step},{record.loss:.5f},{record.lr:.2e},{record.grad_norm:.3f}\n")
            yield record

    def write(self, save: Callable, *arguments: object) -> None:
        """Have the first process write a file by `save(*arguments)`; the others wait until it is there."""
        if share()[0] == 0:
            save(*arguments)
        if dist.is_initialized():
            dist.barrier()

    def keep(self, config: ModelConfig, **modules: nn.Module) -> None:
        """Write finished parts and the config beside them."""
        for name, module in modules.items():
            self.write(save_module, module, self.model / f"{name}.safetensors")
        self.write(write_config, self.model, config)

    def beside(self, variant: str) -> Path:
        """The folder of a variant of the model."""
        folder = self.folder / f"{self.preset.name}-{variant}"
        folder.mkdir(exist_ok=True)
        return folder

    def variant(
        self, name: str, data: Latents, loss: Callable, run: TrainConfig, beside: int = 0, **changed: Any
    ) -> Generator[Record]:
        """Another model that shares all parts of this one, with low-rank changes of its noise predictor.

        The predictor is also shown `beside` more channels. Their weights start at zero and are kept whole: at first it
        does what it did. `changed` are settings of the model's config.
        """
        unet_config = dataclasses.replace(self.config.unet, in_channels=self.config.unet.in_channels + beside)
        config = dataclasses.replace(
            self.config, name=f"{self.preset.name}-{name}", base=self.preset.name, unet=unet_config, **changed
        )

        def make() -> Predictor:
            text, unet = self.part("text", TextTower(config.text)), self.part("unet", UNet(self.config.unet))
            lora.attach(unet, RANK)
            if beside:
                unet.conv_in = widened(unet.conv_in, beside)
            return Predictor(text, unet)

        module = self.fresh(make, run.seed)
        yield from self.run(name, module, loss, data, run)
        folder = self.beside(name)
        first = {f"conv_in.{key}": t for key, t in module.unet.conv_in.state_dict().items()} if beside else {}
        self.write(save_tensors, folder / "unet.lora.safetensors", first | lora.changes(module.unet))
        self.write(write_config, folder, config)


def widened(conv: nn.Conv2d, beside: int) -> nn.Conv2d:
    """A convolution that takes more channels, and does not look at them yet."""
    wide = nn.Conv2d(conv.in_channels + beside, conv.out_channels, 3, padding=1)  # as every U-Net's first
    with torch.no_grad():
        wide.weight.zero_()
        wide.weight[:, : conv.in_channels] = conv.weight
        wide.bias.copy_(conv.bias)
    return wide
