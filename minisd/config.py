"""Sizes of every network, as frozen dataclasses: a model is Stable Diffusion's architecture with its config's numbers.

The defaults are the published Stable Diffusion v1; the `CRITTERS_*` presets at the end are the bundled model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class UNetConfig:
    """The noise predictor. One entry of `widths` and `attention` a resolution level, finest first."""

    in_channels: int = 4
    out_channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    blocks: int = 2  # residual blocks a level on the way down; one more on the way up
    attention: tuple[bool, ...] = (True, True, True, False)
    heads: int | None = 8  # a fixed number of heads (v1) ...
    head_dim: int | None = None  # ... or a fixed width of each head (v2)
    context_dim: int | None = 768  # None: no cross-attention, an unconditional model
    groups: int = 32  # of every GroupNorm; keep at least 4 channels a group
    cross_only: int = 0  # in so many of the finest levels pixels look at the words twice, at each other never (x4)
    classes: int | None = None  # size of a table added to the time embedding: x4's noise levels


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder: each level but the last halves the picture, so three halvings make a factor of 8."""

    image_channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2  # residual blocks a level in the encoder; one more in the decoder
    groups: int = 32
    scaling: float = 0.18215  # latents are multiplied by it, so that their deviation is about 1

    @property
    def factor(self) -> int:
        """How many pixels a side one latent cell stands for."""
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class TextConfig:
    """CLIP's text tower: a causal transformer over `places` tokens."""

    vocabulary: int = 49408
    width: int = 768
    layers: int = 12
    heads: int = 12
    places: int = 77
    quick_gelu: bool = True  # x * sigmoid(1.702 x), as OpenAI trained; OpenCLIP uses the exact GELU
    skip_last: int = 0  # transformer blocks left out at the end: 1 is v2's "penultimate layer"
    pad: Literal["end", "zero"] = "end"  # v1 pads a short prompt with the end mark, v2 with token 0
    projection: int | None = None  # width of the space shared with pictures; None where only the context is wanted


@dataclass(frozen=True)
class ImageTowerConfig:
    """CLIP's image tower: a transformer over square patches of the picture."""

    size: int = 128
    patch: int = 16  # a power of 2
    width: int = 128
    layers: int = 4
    heads: int = 4
    quick_gelu: bool = True
    projection: int = 128


@dataclass(frozen=True)
class DepthConfig:
    """The depth estimator, DPT-hybrid: a residual network, a transformer on its last map, a ladder back up."""

    size: int = 384  # pixels a side it was trained at, a multiple of 32
    stem: int = 64
    widths: tuple[int, int, int] = (256, 512, 1024)  # of the residual stages at 1/4, 1/8 and 1/16 of the size
    blocks: tuple[int, int, int] = (3, 4, 9)  # bottlenecks a stage
    groups: int = 32  # of every GroupNorm; the 3x3 convolutions are a quarter as wide as their stage
    width: int = 768  # of the transformer
    heads: int = 12
    taps: tuple[int, int] = (8, 11)  # the transformer blocks whose tokens the ladder takes; the second is the last
    fusion: int = 256  # channels of the ladder


@dataclass(frozen=True)
class ScheduleConfig:
    """The forward process: which betas, and how many steps."""

    name: Literal["linear", "cosine", "scaled_linear"] = "scaled_linear"
    steps: int = 1000
    ends: tuple[float, float] | None = None  # the first and the last beta, where they are not the schedule's own
    zero_terminal_snr: bool = False  # stretched so that the last step is pure noise


@dataclass(frozen=True)
class ModelConfig:
    """Everything `StableDiffusion` needs to know to be built."""

    name: str = "Stable Diffusion v1"
    size: int = 512  # pixels a side it was trained at
    prediction: Literal["eps", "v", "x0"] = "eps"
    guidance: float = 7.5  # used where none is asked for; so are the next three
    steps: int = 20
    sampler: Literal["dpmpp_2m", "euler"] = "dpmpp_2m"
    spacing: Literal["karras", "trailing"] = "karras"  # of `schedule.plan`
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    depth: DepthConfig | None = None  # only where the U-Net is shown depths
    base: str | None = None  # of a variant: the folder beside its own whose parts it shares, some of them changed

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, ready for JSON."""
        return dataclasses.asdict(self)


SD1 = ModelConfig()
SD1_INPAINT = dataclasses.replace(
    SD1, name="Stable Diffusion v1 inpainting", unet=dataclasses.replace(SD1.unet, in_channels=9)
)
SD2 = ModelConfig(
    name="Stable Diffusion v2",
    unet=UNetConfig(heads=None, head_dim=64, context_dim=1024),
    # OpenCLIP's ViT-H/14 without its last block: v2 reads the penultimate layer, so the 24th is never run
    text=TextConfig(width=1024, layers=23, heads=16, quick_gelu=False, pad="zero"),
)
SD2_V = dataclasses.replace(SD2, name="Stable Diffusion v2 768-v", size=768, prediction="v")
SD2_INPAINT = dataclasses.replace(
    SD2, name="Stable Diffusion v2 inpainting", unet=dataclasses.replace(SD2.unet, in_channels=9)
)
SD2_DEPTH = dataclasses.replace(
    SD2, name="Stable Diffusion v2 depth", unet=dataclasses.replace(SD2.unet, in_channels=5), depth=DepthConfig()
)
SD_X4 = dataclasses.replace(
    SD2,
    name="Stable Diffusion x4 upscaler",
    prediction="v",
    guidance=9.0,
    schedule=ScheduleConfig(ends=(1e-4, 0.02)),
    unet=UNetConfig(
        in_channels=7,
        widths=(256, 512, 512, 1024),
        attention=(False, True, True, True),
        context_dim=1024,
        cross_only=3,
        classes=1000,
    ),
    vae=VAEConfig(widths=(128, 256, 512), scaling=0.08333),
)

CRITTERS_512 = ModelConfig(
    name="critters-512",
    prediction="v",
    guidance=4.0,
    # At the last step of Stable Diffusion's own schedule 4,096 noisy cells together still show how bright a picture is.
    schedule=ScheduleConfig(ends=(0.00085, 0.02)),
    unet=UNetConfig(
        widths=(32, 64, 128, 128), blocks=1, attention=(False, True, True, True), heads=4, context_dim=128, groups=8
    ),
    vae=VAEConfig(widths=(16, 32, 64, 128), blocks=1, groups=4, scaling=1.0),
    text=TextConfig(vocabulary=1024, width=128, layers=4, heads=4, projection=128),
)
CRITTERS_IMAGE_TOWER = ImageTowerConfig()
CRITTERS_DEPTH = DepthConfig(
    size=128, stem=16, widths=(32, 64, 128), blocks=(1, 1, 2), groups=8, width=96, heads=4, taps=(1, 3), fusion=32
)
CRITTERS_HINT = (8, 16, 32, 32)  # widths of the encoder of what its ControlNet is shown
CRITTERS_CLASSIFIER = dataclasses.replace(
    CRITTERS_512.unet, widths=(32, 64, 96, 96), attention=(False, False, True, True), context_dim=None
)
CRITTERS_PIXELS = UNetConfig(  # draws pictures of 32 x 32 themselves, without words
    in_channels=3, out_channels=3, widths=(32, 48, 64), blocks=1, attention=(False, True, True), heads=4,
    context_dim=None, groups=8,
)  # fmt: skip
