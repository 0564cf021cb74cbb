"""What each network is asked to make small. A loss draws nothing at random: the batch holds it all.

Most are means over samples, so that their mean over the shares of several processes is the loss of the whole batch.
`clip_loss`, `vae_loss` and `classifier_loss` are not, and say what differs there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .. import samplers
from ..adapters.controlnet import ControlNet
from ..classifier import NoisyClassifier
from ..clip import CLIP, TextTower
from ..denoiser import Denoiser
from ..depth import DPT
from ..schedule import NoiseSchedule
from ..unet import UNet
from ..vae import VAE
from .loop import Batch

COLOUR_WEIGHT = 0.3  # of what latents can't tell of colours
KL_WEIGHT = 1e-4  # of the divergence per latent number, against errors per pixel
UNSEEN = -100  # the index of an attribute that a picture does not show


def edges(x: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor]:
    """Differences between neighbouring pixels, down and across."""
    return x.diff(dim=2), x.diff(dim=3)


def reconstruction_loss(output: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Absolute and edge error of reconstructed pictures, weighted by pixel.

    Batch: `image` [b 3 h w] in [-1, 1], `weight` [b 1 h w] (larger where errors are seen first: the eyes).
    """
    weight, error = batch["weight"], output.float() - batch["image"]
    pixel = (weight * (error.abs() + 0.5 * error**2)).mean()
    down, across = edges(error * weight)
    edge = down.abs().mean() + across.abs().mean()
    return pixel + edge, {"pixel": pixel.detach(), "edge": edge.detach()}


def unexplained(z: Float[Tensor, "b z h w"], colour: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """How much of the colours no linear map of the latents can tell: 0 where all, the number of colours where none.

    The canonical correlations' missing squares, `c - tr(C^-1 B Z^-1 B^T)`, with the covariances Z of latents, C of
    colours, and B between them (Hotelling 1936): every axis of colour counts the same, however rare it is.

    This is no mean over samples: a batch's covariances are not those of its halves. Where processes share a batch, each
    has those of its own share.
    """
    z, colour = (x.transpose(0, 1).flatten(1) for x in (z, colour))
    z, colour = z - z.mean(1, keepdim=True), colour - colour.mean(1, keepdim=True)
    between = colour @ z.T / z.shape[1]
    within = [x @ x.T / x.shape[1] + 1e-4 * torch.eye(len(x), device=x.device) for x in (z, colour)]
    explained = torch.linalg.solve(within[1], between @ torch.linalg.solve(within[0], between.T))
    return len(colour) - explained.trace()


def vae_loss(vae: VAE, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The reconstruction's loss, a little divergence, and the colours that latents don't tell.

    The first two are the evidence bound of Kingma & Welling 2014, equation 3, with another error and another weight.
    The third makes mean colours nearly a linear function of the latents. Without it details crowd out a colour: pink
    comes back as beige, teal as blue.

    Batch: that of `reconstruction_loss`, and `noise` as the latent. The third part, `unexplained`, is no mean over
    samples: where two processes share a batch, gradients differ by about 0.3% from those of one.
    """
    posterior = vae.posterior(batch["image"])
    z = posterior.sample(batch["noise"])
    loss, parts = reconstruction_loss(vae.reconstruct(z), batch)
    kl = posterior.kl().mean() / z[0].numel()
    with torch.autocast(z.device.type, enabled=False):
        colour = unexplained(z, F.avg_pool2d(batch["image"], vae.config.factor))
    return loss + KL_WEIGHT * kl + COLOUR_WEIGHT * colour, parts | {"kl": kl.detach(), "colour": colour.detach()}


def decoder_loss(vae: VAE, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The reconstruction's loss from latents that are there already. Batch: that of `reconstruction_loss`, and `z`."""
    return reconstruction_loss(vae.reconstruct(batch["z"]), batch)


def clip_loss(clip: CLIP, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of finding each caption's picture in the batch, and each picture's caption among all.

    (Radford et al. 2021, figure 3; with false captions added to the true ones: Yuksekgonul et al. 2023, section 5.)

    Batch: `image` [b 3 h w], `ids` [b k n], of whose k captions a picture the first is true. This is no mean over
    samples: where processes share a batch, each looks for its pictures and captions among its own share alone.
    """
    image, ids = batch["image"], batch["ids"]
    true, false = ids[:, 0], ids[:, 1:].flatten(0, 1)
    similarity = clip.similarity(image, torch.cat([true, false])).float()  # b, b k
    own = torch.arange(len(image), device=image.device)
    loss = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity[:, : len(image)].T, own)) / 2
    return loss, {"accuracy": (similarity.argmax(dim=1) == own).float().mean()}


class Predictor(nn.Module):
    """The text tower and the U-Net as one network, to be trained together (Rombach et al. 2022, section 3.3).

    Stable Diffusion takes CLIP's text tower as it is: 400 million captions had taught it all their words. Ours has seen
    some thousand, and learns from the noise predictor's mistakes what else there is to tell apart.
    """

    def __init__(self, text: TextTower, unet: UNet):
        super().__init__()
        self.text, self.unet = text, unet

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x_t, t, self.text(ids))


def diffusion_loss(predictor: Predictor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted squared error of the prediction (Ho et al. 2020, eq. 14; of v: Salimans & Ho 2022, appendix D).

    Batch: `x_t` [b c h w], `t` [b], `ids` [b n], `target` as x_t, `weight` [b 1 h w].
    """
    return weighted_error(predictor(batch["x_t"], batch["t"], batch["ids"]), batch), {}


def weighted_error(predicted: Tensor, batch: Batch) -> Float[Tensor, ""]:
    """Mean squared distance from `target`, weighted by `weight`."""
    return (batch["weight"] * (predicted.float() - batch["target"]) ** 2).mean()


def depth_loss(dpt: DPT, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Absolute error of disparities: renders know theirs, so that scale and shift, which MiDaS must leave out, count.

    Batch: `image` [b 3 h w], `disparity` [b 1 h w].
    """
    return F.l1_loss(dpt(batch["image"]).float(), batch["disparity"]), {}


def noise_loss(unet: UNet, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error of the predicted noise (Ho et al. 2020, equation 14).

    Batch: `x_t` and `eps` [b c h w], `t` [b].
    """
    return F.mse_loss(unet(batch["x_t"], batch["t"]).float(), batch["eps"]), {}


def control_loss(predictor: Predictor, control: ControlNet, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """`diffusion_loss` of a finished network that a ControlNet talks to (Zhang et al. 2023, equation 5).

    Batch: that of `diffusion_loss`, and `picture` [b 1 H W] in [0, 1], what the ControlNet is shown.
    """
    x_t, t, picture = batch["x_t"], batch["t"], batch["picture"].expand(-1, 3, -1, -1)
    with torch.no_grad():
        context = predictor.text(batch["ids"])
    said = control(x_t, t, context, picture)
    return weighted_error(predictor.unet(x_t, t, context, control=said), batch), {}


def distillation_loss(
    teacher: UNet, schedule: NoiseSchedule, guidance: float, student: Predictor, batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """How far the student's one step ends from where several guided steps of the teacher end.

    (Salimans & Ho 2022, algorithm 2, with more than two steps in one; guidance goes in as well: Meng et al. 2023,
    section 3.) What the student should have taken for the clean latent to get there is its target, weighted as v is.

    Batch: `x_t` [b c h w], `ids` [b n], `empty` [b n], the tokens of no words, and `sigmas` [b k + 1], the teacher's
    noise levels, the same in every row.
    """
    sigmas = batch["sigmas"][0]
    first, last = sigmas[0], sigmas[-1]
    x = batch["x_t"] * (1 + first**2).sqrt()
    with torch.no_grad():
        context, empty = student.text(torch.cat([batch["ids"], batch["empty"]])).chunk(2)
        denoise = Denoiser(teacher, schedule, "v", context, empty, guidance)
        *_, (x_next, _) = samplers.dpmpp_2m(denoise, x, sigmas, no_noise)
        ratio = last / first  # Euler's step is x_next = x0 + ratio (x - x0)
        target = (x_next - ratio * x) / (1 - ratio)
    x0 = Denoiser(student.unet, schedule, "v", context)(x, first)
    return (1 + 1 / first**2) * F.mse_loss(x0, target), {}


def no_noise(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """For samplers that need none."""
    raise AssertionError("this sampler draws no noise")


def misreadings(logits: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Cross-entropy of every attribute, over those of the batch that show it.

    Batch: an index [b] by attribute, `UNSEEN` where it does not show.
    """
    parts = {}
    for name, scores in logits.items():
        total = F.cross_entropy(scores.float(), batch[name], ignore_index=UNSEEN, reduction="sum")
        parts[name] = total / (batch[name] != UNSEEN).sum().clamp(min=1)
    return parts


def classifier_loss(classifier: NoisyClassifier, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of every attribute that shows. Batch: `x_t` [b c h w], `t` [b], and an index [b] by attribute.

    This is no mean over the samples of the batch, but over those that show an attribute (`misreadings`): where
    processes share a batch, each divides by how many there are in its own share.
    """
    parts = misreadings(classifier(batch["x_t"], batch["t"]), batch)
    return torch.stack([*parts.values()]).sum(), {name: part.detach() for name, part in parts.items()}
