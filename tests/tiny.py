"""A Stable Diffusion small enough for tests: random weights, every part there."""

import torch
from peers import randomise

from minisd.clip import TextTower
from minisd.config import ModelConfig, TextConfig, UNetConfig, VAEConfig
from minisd.pipeline import StableDiffusion
from minisd.tokenizer import Tokenizer
from minisd.unet import UNet
from minisd.vae import VAE

CONFIG = ModelConfig(
    name="tiny",
    size=64,
    prediction="v",
    guidance=3.0,
    unet=UNetConfig(widths=(16, 16), blocks=1, attention=(True, False), heads=2, context_dim=16, groups=4),
    vae=VAEConfig(widths=(8, 8, 8, 8), blocks=1, groups=2, scaling=0.5),
    text=TextConfig(vocabulary=514, width=16, layers=1, heads=2),
)


def tiny() -> StableDiffusion:
    parts = [randomise(part, i) for i, part in enumerate((TextTower(CONFIG.text), UNet(CONFIG.unet), VAE(CONFIG.vae)))]
    with torch.no_grad():
        parts[1].conv_out.weight.mul_(0.3)
    return StableDiffusion(CONFIG, Tokenizer([]), *parts)
