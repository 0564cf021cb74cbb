"""ControlNet: a copy of a U-Net's way down is shown a picture, and talks into its way up (Zhang et al. 2023).

The U-Net stays as it is. Whatever the copy says goes through convolutions of 1x1 that start at zero: at first nothing
is said, and training does no harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from ..config import UNetConfig
from ..unet import UNet, WayDown
from ..weights import load_strictly, read_tensors
from ..weights.native import merged
from . import lora

WIDTHS = (16, 32, 96, 256)  # of the hint's encoder, as published for Stable Diffusion


def zero(conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution that starts by saying nothing."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


def hint_encoder(widths: Sequence[int], out_channels: int) -> nn.Sequential:
    """A picture to a map that is smaller by two a side for each width but the first: 3x3 convolutions, SiLU between."""
    layers = [nn.Conv2d(3, widths[0], 3, padding=1), nn.SiLU()]
    for width, wider in pairwise(widths):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
        layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.SiLU()]
    return nn.Sequential(*layers, zero(nn.Conv2d(widths[-1], out_channels, 3, padding=1)))


class ControlNet(WayDown):
    """What to add to each result that a U-Net keeps on its way down, and last to its middle's."""

    def __init__(self, config: UNetConfig, widths: Sequence[int] = WIDTHS):
        super().__init__(config)
        self.hint = hint_encoder(widths, config.widths[0])
        self.zeros = nn.ModuleList(zero(nn.Conv2d(n, n, 1)) for n in [*self.kept, config.widths[-1]])

    def forward(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, "b"],
        context: Float[Tensor, "b m d"] | None,
        picture: Float[Tensor, "#b 3 H W"],
    ) -> list[Tensor]:
        """`picture` is the condition, in [0, 1] and as large as the picture to be drawn; the rest as for a `UNet`."""
        h, kept, _ = self.descend(x_t, t, context, hint=self.hint(picture))
        return [say(own) for say, own in zip(self.zeros, [*kept, h], strict=True)]


class Controlled(nn.Module):
    """A U-Net, a ControlNet beside it, and the picture it is shown: this takes a U-Net's place wherever one runs.

    `strength` is what everything the ControlNet says is multiplied by: at 0 the U-Net is alone.
    """

    def __init__(self, unet: UNet, control: ControlNet, picture: Float[Tensor, "1 3 H W"], strength: float = 1.0):
        super().__init__()
        self.unet, self.control, self.strength = unet, control, strength
        self.register_buffer("picture", picture)

    @property
    def conv_in(self) -> nn.Conv2d:
        """Its weight says in which dtype and on which device the network runs."""
        return self.unet.conv_in

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        said = self.control(x_t, t, context, self.picture.to(x_t))
        return self.unet(x_t, t, context, label, [self.strength * each for each in said])


def beside(unet: UNet, widths: Sequence[int] = WIDTHS) -> ControlNet:
    """A ControlNet that starts as a copy of a U-Net's way down, on the U-Net's device."""
    control = ControlNet(unet.config, widths).to(unet.conv_in.weight)
    load_strictly(control, copied(unet, control) | whole(control), "the U-Net")
    return control


def copied(unet: UNet, control: ControlNet) -> dict[str, Tensor]:
    """The weights of a U-Net that a ControlNet has, too."""
    own = control.state_dict()
    return {name: tensor for name, tensor in unet.state_dict().items() if name in own}


def whole(control: ControlNet) -> dict[str, Tensor]:
    """The weights of a ControlNet that no U-Net has."""
    return {name: t for name, t in control.state_dict().items() if name.startswith(("hint.", "zeros."))}


def attach(control: ControlNet, rank: int) -> None:
    """Let the copied part learn changes of this rank, and the ControlNet's own parts all they can."""
    for part in (control.time_embed, control.conv_in, control.down, control.middle):
        lora.attach(part, rank)


def differences(control: ControlNet) -> dict[str, Tensor]:
    """What a ControlNet has that its U-Net has not, ready to be kept in a file: low-rank changes, and its own parts."""
    return lora.changes(control) | whole(control)


def read(path: Path, unet: UNet, widths: Sequence[int] = WIDTHS) -> ControlNet:
    """The ControlNet whose differences from a U-Net a file keeps. Raises CheckpointError where they don't fit."""
    control = ControlNet(unet.config, widths).to(unet.conv_in.weight)
    load_strictly(control, merged(copied(unet, control), read_tensors(path)), str(path))
    return control.eval().requires_grad_(False)
