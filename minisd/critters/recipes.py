"""The recipes of the bundled models, in the order they are run: `vae`, `unet`, `clip`; and the measuring `oracle`
and `segmenter`.

`decoder` may be run again whenever the noise predictor has changed: the encoder stays as it is, and with it all that
was trained on latents.
`refine` goes on with the noise predictor; variants of it are to be made anew then.
`inpaint`, `depth` (with its `estimator`), `upscale` and `distilled` make variants of the finished model, `control` a
ControlNet for it, `classifier` reads its latents. `pixels` stands alone.

Each works in one folder: it reads what earlier ones left in the model's own folder there, keeps its checkpoint beside
that, and adds its own part. When the first three have run, `minisd.load(folder / "critters-512")` draws. The settings
here are what a model would want; those that the bundled one was made with are in `assets/models/run.toml`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Generator
from functools import partial

import torch
from torch import nn

from ..adapters import controlnet
from ..adapters.controlnet import ControlNet
from ..classifier import NoisyClassifier
from ..clip import CLIP, TextTower
from ..config import (
    CRITTERS_CLASSIFIER,
    CRITTERS_DEPTH,
    CRITTERS_HINT,
    CRITTERS_IMAGE_TOWER,
    CRITTERS_PIXELS,
    ModelConfig,
)
from ..depth import DPT
from ..schedule import from_config
from ..tokenizer import Tokenizer
from ..train.loop import Record, TrainConfig
from ..train.losses import (
    Predictor,
    classifier_loss,
    clip_loss,
    control_loss,
    decoder_loss,
    depth_loss,
    diffusion_loss,
    distillation_loss,
    noise_loss,
    vae_loss,
)
from ..unet import UNet
from ..vae import VAE
from ..weights import load_strictly, read_tensors, read_tokenizer, save_module, save_tensors
from . import WORDS, Scene, caption
from .data import (
    Captioned,
    Decodings,
    Depths,
    Distances,
    Edges,
    Holes,
    Labelled,
    Latents,
    Pictures,
    Shrunk,
    SmallPictures,
    Stages,
    redrawn,
)
from .oracle import SIZE, Examples, Oracle, oracle_loss
from .segmenter import Segmenter, Segments, count, segmentation_loss, usual
from .workshop import RANK, Workshop

CAPTIONS = 50_000  # that the tokenizer learns from

VAE_RUN = TrainConfig(steps=3_000, batch_size=16, lr=1.5e-3, ema=0.998, bf16=True)
DECODER_RUN = TrainConfig(steps=2_000, batch_size=16, lr=1e-3, cooldown=0.6, ema=0.998, seed=2, bf16=True)
CLIP_RUN = TrainConfig(steps=3_000, batch_size=128, lr=2e-3, weight_decay=0.1, warmup=100, bf16=True)
UNET_RUN = TrainConfig(steps=12_000, batch_size=128, lr=1e-3, ema=0.999, bf16=True)
REFINE_RUN = TrainConfig(steps=4_000, batch_size=512, lr=1e-3, cooldown=0.7, ema=0.998, seed=8, bf16=True)
ORACLE_RUN = TrainConfig(steps=1_500, batch_size=32, lr=1e-3, warmup=100, cooldown=0.6, ema=0.998, weight_decay=0.02)
SEGMENTER_RUN = TrainConfig(
    steps=1_200, batch_size=24, lr=1e-3, warmup=100, cooldown=0.6, ema=0.998, weight_decay=0.02, seed=9, bf16=True
)
VARIANT_RUN = TrainConfig(steps=800, batch_size=64, lr=1e-3, warmup=100, cooldown=0.6, seed=3, bf16=True)
ESTIMATOR_RUN = TrainConfig(steps=1_500, batch_size=16, lr=1e-3, warmup=100, cooldown=0.6, seed=7, bf16=True)
DISTILLED_RUN = TrainConfig(steps=400, batch_size=64, lr=1e-3, warmup=50, cooldown=0.7, ema=0.995, seed=4, bf16=True)
CLASSIFIER_RUN = TrainConfig(
    steps=1_500, batch_size=128, lr=1e-3, warmup=100, cooldown=0.6, weight_decay=0.05, seed=6, bf16=True
)
PIXELS_RUN = TrainConfig(steps=4_000, batch_size=32, lr=1e-3, cooldown=0.5, seed=5, bf16=True)

WHOLE = ("vae", "unet", "clip", "decoder")  # the recipes of a whole model


def mini_clip(config: ModelConfig) -> CLIP:
    """The model's text tower, and an image tower."""
    return CLIP(config.text, CRITTERS_IMAGE_TOWER)


def vae(shop: Workshop, run: TrainConfig = VAE_RUN) -> Generator[Record]:
    """The autoencoder; then its scaling factor, one over the deviation of the latents of 512 renders."""
    config, data = shop.config, shop.data()
    module = shop.fresh(lambda: VAE(config.vae), run.seed)
    side = config.size // config.vae.factor
    yield from shop.run("vae", module, vae_loss, Pictures(data, (config.vae.latent_channels, side, side)), run)
    with torch.no_grad():
        some = torch.arange(min(512, len(data))).split(32)
        latents = torch.cat([module.encode(data.pictures(indices, device=shop.device)) for indices in some])
    scaling = round(config.vae.scaling / latents.std().item(), 5)
    shop.keep(dataclasses.replace(config, vae=dataclasses.replace(config.vae, scaling=scaling)), vae=module)


def decoder(shop: Workshop, run: TrainConfig = DECODER_RUN) -> Generator[Record]:
    """The autoencoder's decoder goes on by itself from where it is, and learns to bear the errors of drawn latents.

    The encoder and the latents stay as they are.

    (The published ft-EMA and ft-MSE autoencoders of Stable Diffusion were made so.)
    """
    shop.require("vae", "unet")
    config, renders = shop.config, shop.data()
    module, text = shop.part("vae", VAE(config.vae)), shop.part("text", TextTower(config.text))
    tokenizer, unet = read_tokenizer(shop.model, config), shop.part("unet", UNet(config.unet))
    schedule = from_config(config.schedule)
    drawn = redrawn(renders, module, tokenizer, text, unet, schedule, config.guidance)
    data = Decodings(renders, module, drawn)
    module.requires_grad_(True).encoder.requires_grad_(False)
    module.quant.requires_grad_(False)
    yield from shop.run("decoder", module, decoder_loss, data, run)
    shop.keep(config, vae=module)


def unet(shop: Workshop, run: TrainConfig = UNET_RUN) -> Generator[Record]:
    """The tokenizer, trained on captions alone; then the noise predictor together with the text tower."""
    shop.require("vae")
    config, generator = shop.config, torch.Generator().manual_seed(run.seed)
    assert config.prediction == "v", config.prediction  # what `Latents` has as its target
    captions = [caption(Scene.sample(generator), generator) for _ in range(CAPTIONS)]
    tokenizer = Tokenizer.train(captions, config.text.vocabulary, pad=config.text.pad, places=config.text.places)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocabulary=len(tokenizer)))
    data = Latents(shop.data(), shop.part("vae", VAE(config.vae)), tokenizer, from_config(config.schedule))
    module = shop.fresh(lambda: Predictor(TextTower(config.text), UNet(config.unet)), run.seed)
    yield from shop.run("unet", module, diffusion_loss, data, run)
    shop.write(tokenizer.save, shop.model / "tokenizer.txt")
    shop.keep(config, text=module.text, unet=module.unet)


def refine(shop: Workshop, run: TrainConfig = REFINE_RUN) -> Generator[Record]:
    """The noise predictor goes on from where it is; the text tower, which other parts know by now, stays as it is."""
    shop.require("vae", "unet")
    module = Predictor(shop.part("text", TextTower(shop.config.text)), shop.part("unet", UNet(shop.config.unet)))
    module.unet.requires_grad_(True)
    yield from shop.run("refine", module, diffusion_loss, shop.latents(), run)
    shop.keep(shop.config, unet=module.unet)


def clip(shop: Workshop, run: TrainConfig = CLIP_RUN) -> Generator[Record]:
    """The image tower, and the text tower's projection: they learn to agree with the text tower, which stays as it is.

    (Zhai et al. 2022, "LiT", with the other tower locked.)
    """
    shop.require("vae", "unet")
    config = shop.config
    module = shop.fresh(lambda: mini_clip(config), run.seed)
    load_strictly(module.text, read_tensors(shop.model / "text.safetensors"), "the text tower")
    module.text.requires_grad_(False).projection.requires_grad_(True)
    data = Captioned(shop.data(), read_tokenizer(shop.model, config), CRITTERS_IMAGE_TOWER.size)
    yield from shop.run("clip", module, clip_loss, data, run)
    shop.keep(config, text=module.text, image_tower=module.image)


def oracle(shop: Workshop, run: TrainConfig = ORACLE_RUN) -> Generator[Record]:
    """The network that reads attributes back from pictures, on the same renders."""
    data = shop.data()
    module = shop.fresh(Oracle, run.seed)
    yield from shop.run("oracle", module, oracle_loss, Examples(data.shrunk(SIZE), data.scenes), run)
    shop.write(save_module, module, shop.folder / "oracle.safetensors")


def segmenter(shop: Workshop, run: TrainConfig = SEGMENTER_RUN) -> Generator[Record]:
    """The network that tells parts, from half of the renders; then what is usual, counted on the others."""
    data = shop.data()
    images, parts, learnt = data.shrunk(SIZE), data.shrunk_parts(SIZE), len(data) // 2
    module = shop.fresh(Segmenter, run.seed)
    yield from shop.run("segmenter", module, segmentation_loss, Segments(images[:learnt], parts[:learnt]), run)
    others, scenes = images[learnt:].float() / 127.5 - 1, data.scenes[learnt:]
    counts = torch.cat([count(module.parts(some)) for some in (others, others.flip(3))])
    table = json.dumps(usual([*scenes, *(scene.mirrored() for scene in scenes)], counts), indent=1)
    shop.write(save_module, module, shop.folder / "segmenter.safetensors")
    shop.write((shop.folder / "segmenter.json").write_text, table + "\n")


def inpaint(shop: Workshop, run: TrainConfig = VARIANT_RUN) -> Generator[Record]:
    """A variant that fills holes: it is also shown which cells to redraw, and the latent of the rest."""
    shop.require("vae", "unet")
    beside = 1 + shop.config.vae.latent_channels
    yield from shop.variant("inpaint", shop.latents(Holes), diffusion_loss, run, beside)


def estimator(shop: Workshop, run: TrainConfig = ESTIMATOR_RUN) -> Generator[Record]:
    """The depth estimator of the variant `depth`."""

    def make() -> DPT:
        module = DPT(CRITTERS_DEPTH)
        last = module.head[-2]
        assert isinstance(last, nn.Conv2d), last
        nn.init.ones_(last.bias)  # a disparity below zero is cut off, and would learn nothing
        return module

    module = shop.fresh(make, run.seed)
    yield from shop.run("estimator", module, depth_loss, Distances(shop.data(), CRITTERS_DEPTH.size), run)
    shop.write(save_module, module, shop.beside("depth") / "depth.safetensors")


def depth(shop: Workshop, run: TrainConfig = VARIANT_RUN) -> Generator[Record]:
    """A variant that is also shown how near everything is to be."""
    shop.require("vae", "unet")
    yield from shop.variant("depth", shop.latents(Depths), diffusion_loss, run, beside=1, depth=CRITTERS_DEPTH)


def upscale(shop: Workshop, run: TrainConfig = VARIANT_RUN) -> Generator[Record]:
    """A variant that enlarges: it is also shown the picture in as many pixels as the latent has cells."""
    shop.require("vae", "unet")
    yield from shop.variant("upscale", shop.latents(Shrunk), diffusion_loss, run, beside=3)


def control(shop: Workshop, run: TrainConfig = VARIANT_RUN) -> Generator[Record]:
    """A ControlNet that is shown edges; it is kept beside the model as what it has that the noise predictor has not."""
    shop.require("vae", "unet")
    config = shop.config
    text, unet = shop.part("text", TextTower(config.text)), shop.part("unet", UNet(config.unet))

    def make() -> ControlNet:
        module = controlnet.beside(unet, CRITTERS_HINT)
        controlnet.attach(module, RANK)
        return module

    module = shop.fresh(make, run.seed)
    yield from shop.run("control", module, partial(control_loss, Predictor(text, unet)), shop.latents(Edges), run)
    shop.write(save_tensors, shop.model / "control.lora.safetensors", controlnet.differences(module))


def distilled(shop: Workshop, run: TrainConfig = DISTILLED_RUN) -> Generator[Record]:
    """A variant that draws in 4 steps of Euler, and needs no guidance: it is distilled into it."""
    shop.require("vae", "unet")
    teacher, schedule = shop.part("unet", UNet(shop.config.unet)), from_config(shop.config.schedule)
    loss = partial(distillation_loss, teacher, schedule, shop.config.guidance)
    yield from shop.variant("distilled", shop.latents(Stages), loss, run, guidance=1.0, **Stages.DRAWN)


def classifier(shop: Workshop, run: TrainConfig = CLASSIFIER_RUN) -> Generator[Record]:
    """A classifier of the model's noisy latents."""
    shop.require("vae", "unet")
    words = {name: len(words) for name, words in WORDS.items()}
    module = shop.fresh(lambda: NoisyClassifier(CRITTERS_CLASSIFIER, words), run.seed)
    yield from shop.run("classifier", module, classifier_loss, shop.latents(Labelled), run)
    shop.keep(shop.config, classifier=module)


def pixels(shop: Workshop, run: TrainConfig = PIXELS_RUN) -> Generator[Record]:
    """A noise predictor for pictures themselves, small ones, without words."""
    module = shop.fresh(lambda: UNet(CRITTERS_PIXELS), run.seed)
    yield from shop.run("pixels", module, noise_loss, SmallPictures(shop.data()), run)
    shop.write(save_module, module, shop.folder / "pixels.safetensors")


RECIPES = {
    "vae": (vae, VAE_RUN),
    "unet": (unet, UNET_RUN),
    "refine": (refine, REFINE_RUN),
    "clip": (clip, CLIP_RUN),
    "decoder": (decoder, DECODER_RUN),
    "oracle": (oracle, ORACLE_RUN),
    "segmenter": (segmenter, SEGMENTER_RUN),
    "inpaint": (inpaint, VARIANT_RUN),
    "estimator": (estimator, ESTIMATOR_RUN),
    "depth": (depth, VARIANT_RUN),
    "upscale": (upscale, VARIANT_RUN),
    "control": (control, VARIANT_RUN),
    "distilled": (distilled, DISTILLED_RUN),
    "classifier": (classifier, CLASSIFIER_RUN),
    "pixels": (pixels, PIXELS_RUN),
}


def chosen(name: str) -> list[tuple[str, Callable, TrainConfig]]:
    """The recipes that a name stands for, "all" for those of a whole model, and their settings.

    Raises ValueError for unknown names.
    """
    if name not in RECIPES and name != "all":
        raise ValueError(f"recipe {name!r} is unknown; choose all or one of: {', '.join(RECIPES)}")
    return [(each, *RECIPES[each]) for each in (WHOLE if name == "all" else [name])]
