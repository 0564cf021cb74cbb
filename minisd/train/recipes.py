"""The recipes of the bundled model, in the order they are run: `vae`, `unet`, `clip`; and the `oracle` to measure it.

`decoder` may be run at any time after `vae`: the encoder stays as it is, and with it all that was trained on latents.

Each works in one folder: it reads what earlier ones left in `model/`, keeps its checkpoint beside it, and adds its own
part. When the first three have run, `minisd.load(folder / "model")` draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from ..clip import CLIP, TextTower
from ..config import CRITTERS_128, CRITTERS_IMAGE_TOWER, ModelConfig
from ..critters import Scene, caption
from ..critters.oracle import Examples, Oracle, oracle_loss
from ..files import load_strictly, read_tensors
from ..schedule import from_config
from ..tokenizer import Tokenizer
from ..unet import UNet
from ..vae import VAE
from ..weights import read_config, read_module, read_tokenizer, save_module, write_config
from .data import Captioned, Decodings, Latents, Pictures, Renders
from .loop import Record, TrainConfig, fit, share
from .losses import Predictor, clip_loss, decoder_loss, diffusion_loss, vae_loss

RENDERS = 12_000
CAPTIONS = 50_000  # that the tokenizer learns from

VAE_RUN = TrainConfig(steps=2_500, batch_size=16, lr=1.5e-3, ema=0.998, bf16=True)
DECODER_RUN = TrainConfig(steps=4_000, batch_size=16, lr=1e-3, cooldown=0.6, ema=0.998, seed=2, bf16=True)
CLIP_RUN = TrainConfig(steps=600, batch_size=64, lr=2e-3, weight_decay=0.1, warmup=100, bf16=True)
UNET_RUN = TrainConfig(steps=6_800, batch_size=32, lr=1e-3, ema=0.999)
ORACLE_RUN = TrainConfig(steps=1_500, batch_size=32, lr=1e-3, warmup=100, cooldown=0.6, ema=0.998, weight_decay=0.02)


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

    def data(self) -> Renders:
        """The renders, made on first use."""
        return Renders(self.folder / "renders", self.renders, self.config.size, device=self.device)

    def fresh(self, make: Callable[[], nn.Module], seed: int) -> nn.Module:
        """A new module with weights drawn from a seed; the global random state stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            module = make()
        return module.to(self.device, memory_format=torch.channels_last)  # how convolutions like their memory

    def run(self, name: str, module: nn.Module, loss: Callable, data: object, config: TrainConfig) -> Iterator[Record]:
        """Train with a checkpoint of this name."""
        yield from fit(module, loss, data, config, checkpoint=self.folder / f"{name}.pt", every=200)

    def keep(self, config: ModelConfig, **modules: nn.Module) -> None:
        """Write finished parts and the config beside them, from one process alone."""
        if share()[0] == 0:
            for name, module in modules.items():
                save_module(module, self.model / f"{name}.safetensors")
            write_config(self.model, config)


def mini_clip(config: ModelConfig) -> CLIP:
    """The model's text tower, and an image tower for pictures of its size."""
    return CLIP(config.text, dataclasses.replace(CRITTERS_IMAGE_TOWER, size=config.size))


def vae(shop: Workshop, run: TrainConfig = VAE_RUN) -> Iterator[Record]:
    """The autoencoder; then its scaling factor, one over the deviation of the latents of 512 renders."""
    config, data = shop.config, shop.data()
    module = shop.fresh(lambda: VAE(config.vae), run.seed)
    side = config.size // config.vae.factor
    yield from shop.run("vae", module, vae_loss, Pictures(data, (config.vae.latent_channels, side, side)), run)
    with torch.no_grad():
        some = torch.arange(min(512, len(data))).split(32)
        latents = torch.cat([module.encode(data.pictures(indices).to(shop.device)) for indices in some])
    scaling = round(config.vae.scaling / latents.std().item(), 5)
    shop.keep(dataclasses.replace(config, vae=dataclasses.replace(config.vae, scaling=scaling)), vae=module)


def decoder(shop: Workshop, run: TrainConfig = DECODER_RUN) -> Iterator[Record]:
    """The autoencoder's decoder goes on by itself from where it is; the encoder and the latents stay as they are.

    (The published ft-EMA and ft-MSE autoencoders of Stable Diffusion were made so.)
    """
    config = shop.config
    module = read_module(VAE(config.vae), shop.model / "vae.safetensors").to(shop.device)
    data = Decodings(shop.data(), module)
    module.requires_grad_(True).encoder.requires_grad_(False)
    module.quant.requires_grad_(False)
    yield from shop.run("decoder", module, decoder_loss, data, run)
    shop.keep(config, vae=module)


def unet(shop: Workshop, run: TrainConfig = UNET_RUN) -> Iterator[Record]:
    """The tokenizer, trained on captions alone; then the noise predictor together with the text tower."""
    config, generator = shop.config, torch.Generator().manual_seed(run.seed)
    assert config.prediction == "v", config.prediction  # what `Latents` has as its target
    captions = [caption(Scene.sample(generator), generator) for _ in range(CAPTIONS)]
    tokenizer = Tokenizer.train(captions, config.text.vocabulary, pad=config.text.pad, places=config.text.places)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocabulary=len(tokenizer)))
    autoencoder = read_module(VAE(config.vae), shop.model / "vae.safetensors").to(shop.device)
    data = Latents(shop.data(), autoencoder, tokenizer, from_config(config.schedule))
    module = shop.fresh(lambda: Predictor(TextTower(config.text), UNet(config.unet)), run.seed)
    yield from shop.run("unet", module, diffusion_loss, data, run)
    if share()[0] == 0:
        tokenizer.save(shop.model / "tokenizer.txt")
    shop.keep(config, text=module.text, unet=module.unet)


def clip(shop: Workshop, run: TrainConfig = CLIP_RUN) -> Iterator[Record]:
    """The image tower, and the text tower's projection: they learn to agree with the text tower, which stays as it is.

    (Zhai et al. 2022, "LiT", with the other tower locked.)
    """
    config = shop.config
    module = shop.fresh(lambda: mini_clip(config), run.seed)
    load_strictly(module.text, read_tensors(shop.model / "text.safetensors"), "the text tower")
    module.text.requires_grad_(False).projection.requires_grad_(True)
    data = Captioned(shop.data(), read_tokenizer(shop.model, config))
    yield from shop.run("clip", module, clip_loss, data, run)
    shop.keep(config, text=module.text, image_tower=module.image)


def oracle(shop: Workshop, run: TrainConfig = ORACLE_RUN) -> Iterator[Record]:
    """The network that reads attributes back from pictures, on the same renders."""
    data = shop.data()
    module = shop.fresh(Oracle, run.seed)
    yield from shop.run("oracle", module, oracle_loss, Examples(torch.from_numpy(data.images), data.scenes), run)
    if share()[0] == 0:
        save_module(module, shop.folder / "oracle.safetensors")


RECIPES = {
    "vae": (vae, VAE_RUN),
    "unet": (unet, UNET_RUN),
    "clip": (clip, CLIP_RUN),
    "decoder": (decoder, DECODER_RUN),
    "oracle": (oracle, ORACLE_RUN),
}
