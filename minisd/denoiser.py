"""From a network's prediction to the clean picture: what every sampler calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .schedule import NoiseSchedule
from .unet import UNet

Prediction = Literal["eps", "v", "x0"]


def to_x0(
    prediction: Float[Tensor, "b c h w"], x: Float[Tensor, "b c h w"], sigma: Float[Tensor, ""], kind: Prediction
) -> Float[Tensor, "b c h w"]:
    """The clean sample that a network's prediction implies at `x = x0 + sigma * eps`.

    `eps`: x0 = x - sigma eps. `v = sqrt(ab) eps - sqrt(1 - ab) x0` (Salimans & Ho 2022, appendix D):
    x0 = ab x - sqrt(1 - ab) v, where ab = alpha_bar = 1 / (1 + sigma^2).
    """
    alpha_bar = 1 / (1 + sigma**2)
    if kind == "eps":
        return x - sigma * prediction
    if kind == "v":
        return alpha_bar * x - (1 - alpha_bar).sqrt() * prediction
    assert kind == "x0", kind
    return prediction


def guide(
    cond: Float[Tensor, "b c h w"], uncond: Float[Tensor, "b c h w"], guidance: float, rescale: float = 0.0
) -> Float[Tensor, "b c h w"]:
    """Classifier-free guidance, `uncond + w (cond - uncond)`: 0 ignores the prompt, 1 is plain, more exaggerates it.

    (Ho & Salimans 2022, equation 6; their w is ours minus 1.) `rescale` pulls the result's deviation back towards that
    of `cond`, wholly at 1 (Lin et al. 2024, equations 15 and 16).
    """
    guided = uncond + guidance * (cond - uncond)
    if rescale:
        ratio = cond.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
        guided = guided * (rescale * ratio + 1 - rescale)
    return guided


@dataclass(frozen=True, eq=False)
class Denoiser:
    """`denoise(x, sigma)`, the predicted clean sample: a network, its schedule, what it is told, and how loudly.

    `context` is the encoded prompt, or one a sample; `negative` what to steer away from, such as the encoded empty
    prompt. At guidance 1 the network runs on `context` alone, else once on a batch of both, which takes a `negative`.
    `concat` are channels that stand beside the noisy latent (a mask and what it leaves, a depth map, a small picture),
    `label` the noise level of the small picture; guidance leaves both as they are. The network runs in its own dtype
    and device; the result comes back in those of `x`.
    """

    unet: UNet
    schedule: NoiseSchedule
    kind: Prediction
    context: Float[Tensor, "#b n d"] | None = None
    negative: Float[Tensor, "#b m d"] | None = None
    guidance: float = 1.0
    rescale: float = 0.0
    concat: Float[Tensor, "#b k h w"] | None = None
    label: Int[Tensor, "#b"] | None = None

    def __post_init__(self):
        if self.guidance != 1 and (self.context is None or self.negative is None):
            raise ValueError(f'guidance {self.guidance} needs a context and a negative one, such as encode_text("")')
        if self.guidance != 1 and self.context.shape[1] != self.negative.shape[1]:
            raise ValueError(
                f"the context has {self.context.shape[1]} places, the negative one {self.negative.shape[1]}; encode "
                "both in one call, encode_text([prompt, negative]), and they are as long"
            )

    def predict(self, x: Float[Tensor, "b c h w"], sigma: Float[Tensor, ""]) -> Float[Tensor, "b c h w"]:
        """The network's raw prediction, guided."""
        weight = self.unet.conv_in.weight
        x_t = (x / (1 + sigma**2).sqrt()).to(weight)
        if self.concat is not None:
            x_t = torch.cat([x_t, self.concat.to(weight).expand(len(x), -1, -1, -1)], dim=1)
        t = self.schedule.t(sigma.cpu()).to(weight.device, torch.float32).expand(len(x))
        label = None if self.label is None else self.label.to(weight.device).expand(len(x))
        told = [c.to(weight).expand(len(x), -1, -1) for c in (self.negative, self.context) if c is not None]
        if self.guidance == 1:
            return self.unet(x_t, t, told[-1] if told else None, label).to(x)
        label = None if label is None else label.repeat(2)
        uncond, cond = self.unet(x_t.repeat(2, 1, 1, 1), t.repeat(2), torch.cat(told), label).to(x).chunk(2)
        return guide(cond, uncond, self.guidance, self.rescale)

    def __call__(self, x: Float[Tensor, "b c h w"], sigma: Float[Tensor, ""]) -> Float[Tensor, "b c h w"]:
        return to_x0(self.predict(x, sigma), x, sigma, self.kind)
