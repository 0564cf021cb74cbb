"""The recipes of the bundled model, in the order they are run: `vae`, `clip`, `unet`; and the `oracle` to measure it.

Each works in one folder: it reads what earlier ones left in `model/`, keeps its checkpoint beside it, and adds its own
part. When the three have run, `minisd.load(folder / "model")` draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from ..clip import CLIP
from ..config import CRITTERS_128, CRITTERS_IMAGE_TOWER, ModelConfig
from ..critters import Scene, caption
from ..critters.oracle import Examples, Oracle, oracle_loss
from ..pipeline import SCHEDULES
from ..tokenizer import Tokenizer
from ..unet import UNet
from ..vae import VAE
from ..weights import read_config, read_module, read_tokenizer, save_module, write_config
from .data import Captioned, Latents, Pictures, Renders
from .loop import Record, TrainConfig, fit
from .losses import clip_loss, diffusion_loss, vae_loss

RENDERS = 8_000
CAPTIONS = 50_000  # that the tokenizer learns from

VAE_RUN = TrainConfig(steps=1_500, batch=16, rate=1.5e-3, ema=0.998, half=True)
CLIP_RUN = TrainConfig(steps=500, batch=64, rate=1e-3, weight_decay=0.1)
UNET_RUN = TrainConfig(steps=4_000, batch=32, rate=1e-3, ema=0.999)
ORACLE_RUN = TrainConfig(
    steps=1_500, batch=32, rate=1e-3, warmup=100, cooldown=0.6, ema=0.998, weight_decay=0.02
)


@dataclasses.dataclass(frozen=True)
class Workshop:
    """The folder a model is made in, the device it is made on, and how many renders it learns from."""

    folder: Path
    device: torch.device
    renders: int = RENDERS

    def __post_init__(self):
        self.model.mkdir(parents=True, exist_ok=True)

    @property
    def model(self) -> Path:
        """Where the finished parts go."""
        return self.folder / "model"

    @property
    def config(self) -> ModelConfig:
        """The model's config as far as it is known: recipes fill in what they measure."""
        return read_config(self.model) if (self.model / "config.json").exists() else CRITTERS_128

    def clip(self) -> CLIP:
        """A fresh mini CLIP: the model's text tower, and an image tower for pictures of its size."""
        return CLIP(self.config.text, dataclasses.replace(CRITTERS_IMAGE_TOWER, size=self.config.size))

    def data(self) -> Renders:
        """The renders, made on first use."""
        return Renders(self.folder / "renders", self.renders, self.config.size, device=self.device)

    def run(self, name: str, module: nn.Module, loss: Callable, data: object, config: TrainConfig) -> Iterator[Record]:
        """Train with a checkpoint of this name; channels last is how convolutions like their memory."""
        module.to(self.device, memory_format=torch.channels_last)
        yield from fit(module, loss, data, config, checkpoint=self.folder / f"{name}.pt", every=200)


def vae(shop: Workshop, run: TrainConfig = VAE_RUN) -> Iterator[Record]:
    """The autoencoder; then its scaling factor, one over the deviation of the latents of 512 renders."""
    torch.manual_seed(run.seed)
    module, data = VAE(shop.config.vae), shop.data()
    side = shop.config.size // shop.config.vae.factor
    yield from shop.run("vae", module, vae_loss, Pictures(data, (shop.config.vae.latent_channels, side, side)), run)
    with torch.no_grad():
        latents = torch.cat([module.encode(data.pictures(i).to(shop.device)) for i in torch.arange(min(512,
        len(data))).split(32)])
    sizes = dataclasses.replace(shop.config.vae, scaling=round(shop.config.vae.scaling / latents.std().item(), 5))
    save_module(module, shop.model / "vae.safetensors")
    write_config(shop.model, dataclasses.replace(shop.config, vae=sizes))


def clip(shop: Workshop, run: TrainConfig = CLIP_RUN) -> Iterator[Record]:
    """The tokenizer, trained on captions alone; then both towers of the mini CLIP."""
    generator = torch.Generator().manual_seed(run.seed)
    captions = [caption(Scene.sample(generator), generator) for _ in range(CAPTIONS)]
    Tokenizer.train(captions, shop.config.text.vocabulary).save(shop.model / "tokenizer.txt")
    tokenizer = read_tokenizer(shop.model, shop.config)
    write_config(
        shop.model,
        dataclasses.replace(shop.config, text=dataclasses.replace(shop.config.text, vocabulary=len(tokenizer))),
    )
    torch.manual_seed(run.seed)
    module = shop.clip()
    yield from shop.run("clip", module, clip_loss, Captioned(shop.data(), tokenizer), run)
    save_module(module.text, shop.model / "text.safetensors")
    save_module(module.image, shop.model / "image_tower.safetensors")


def unet(shop: Workshop, run: TrainConfig = UNET_RUN) -> Iterator[Record]:
    """The noise predictor, on latents of the finished autoencoder and contexts of the finished text tower."""
    config = shop.config
    tokenizer = read_tokenizer(shop.model, config)
    data = Latents(
        shop.data(),
        read_module(VAE(config.vae), shop.model / "vae.safetensors").to(shop.device),
        read_module(shop.clip().text, shop.model / "text.safetensors").to(shop.device),
        tokenizer,
        SCHEDULES[config.schedule.name](config.schedule.steps),
    )
    torch.manual_seed(run.seed)
    module = UNet(config.unet)
    yield from shop.run("unet", module, diffusion_loss, data, run)
    save_module(module, shop.model / "unet.safetensors")
    write_config(shop.model, config)


def oracle(shop: Workshop, run: TrainConfig = ORACLE_RUN) -> Iterator[Record]:
    """The network that reads attributes back from pictures, on the same renders."""
    torch.manual_seed(run.seed)
    module, data = Oracle(), shop.data()
    yield from shop.run("oracle", module, oracle_loss, Examples(torch.from_numpy(data.images), data.scenes), run)
    save_module(module, shop.folder / "oracle.safetensors")


RECIPES = {"vae": (vae, VAE_RUN), "clip": (clip, CLIP_RUN), "unet": (unet, UNET_RUN), "oracle": (oracle, ORACLE_RUN)}
