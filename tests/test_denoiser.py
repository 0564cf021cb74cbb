"""Predictions, guidance and casts: what stands between a network and a sampler."""

import pytest
import torch

from minisd import schedule
from minisd.config import UNetConfig
from minisd.denoiser import Denoiser, guide, to_x0
from minisd.unet import UNet

SCHEDULE = schedule.scaled_linear()


def shaped(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6])
def test_every_prediction_of_a_known_mixture_gives_back_the_clean_sample(sigma):
    sigma = torch.tensor(sigma, dtype=torch.float64)
    x0, eps = shaped(0, 2, 4, 3, 3), shaped(1, 2, 4, 3, 3)
    alpha_bar = 1 / (1 + sigma**2)
    predictions = {"eps": eps, "v": alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0, "x0": x0}
    for kind, prediction in predictions.items():
        assert torch.allclose(to_x0(prediction, x0 + sigma * eps, sigma, kind), x0, atol=1e-12)


def test_guidance_scale_0_is_uncond_1_is_cond_and_2_goes_as_far_again():
    cond, uncond = shaped(0, 1, 4, 2, 2), shaped(1, 1, 4, 2, 2)
    assert torch.equal(guide(cond, uncond, 0.0), uncond)
    assert torch.allclose(guide(cond, uncond, 1.0), cond, atol=1e-15)
    assert torch.allclose(guide(cond, uncond, 2.0) - cond, cond - uncond, atol=1e-15)


def test_rescale_restores_the_deviation_of_cond():
    cond, uncond = shaped(0, 3, 4, 8, 8), shaped(1, 3, 4, 8, 8)
    full = guide(cond, uncond, 9.0, rescale=1.0)
    assert torch.allclose(full.std(dim=(1, 2, 3)), cond.std(dim=(1, 2, 3)))
    assert torch.allclose(
        guide(cond, uncond, 9.0, rescale=0.7), 0.7 * full + 0.3 * guide(cond, uncond, 9.0), atol=1e-12
    )


class Recorder(UNet):
    """A U-Net that predicts the mean of the context, and remembers what it was asked."""

    def __init__(self):
        super().__init__(UNetConfig(widths=(8,), blocks=1, attention=(False,), heads=1, context_dim=8, groups=2))
        self.calls, self.labels = [], []

    def forward(self, x_t, t, context=None, label=None):
        self.calls.append((x_t, t, context))
        self.labels.append(label)
        x_t = x_t[:, :4]
        return context.mean(dim=(1, 2)).view(-1, 1, 1, 1).expand_as(x_t)


def test_the_network_sees_the_variance_preserving_sample_its_time_and_a_doubled_batch():
    network = Recorder()
    cond, uncond = torch.full((2, 3, 8), 5.0), torch.full((2, 3, 8), 1.0)
    sigma, x = SCHEDULE.sigma(400.0), shaped(0, 2, 4, 3, 3).float()
    guided = Denoiser(network, SCHEDULE, "eps", cond, uncond, guidance=3.0)(x, sigma)
    ((x_t, t, context),) = network.calls
    assert torch.allclose(x_t, (x / (1 + sigma**2).sqrt()).float().repeat(2, 1, 1, 1))
    assert torch.allclose(t, torch.full((4,), 400.0), atol=1e-4)
    assert torch.equal(context, torch.cat([uncond, cond]))
    assert torch.allclose(guided, x - sigma.float() * 13.0)  # 1 + 3 (5 - 1)

    Denoiser(network, SCHEDULE, "eps", cond, uncond, guidance=1.0)(x, sigma)
    assert len(network.calls[-1][0]) == 2  # guidance 1 needs no second half


def test_the_network_runs_in_its_own_dtype_and_the_sampler_keeps_its():
    network = Recorder().to(torch.bfloat16)
    x = shaped(0, 1, 4, 3, 3)
    x0 = Denoiser(network, SCHEDULE, "v", torch.zeros(1, 3, 8, dtype=torch.bfloat16))(x, SCHEDULE.sigma(10.0))
    assert network.calls[0][0].dtype == torch.bfloat16
    assert x0.dtype == torch.float64


def test_one_context_serves_a_whole_batch_and_guidance_needs_something_to_lead_away_from():
    cond, uncond, x = torch.full((1, 3, 8), 5.0), torch.full((1, 3, 8), 1.0), shaped(0, 4, 4, 3, 3).float()
    sigma = torch.tensor(2.0)
    one = Denoiser(Recorder(), SCHEDULE, "eps", cond, uncond, guidance=3.0)(x, sigma)
    each = Denoiser(Recorder(), SCHEDULE, "eps", cond.repeat(4, 1, 1), uncond.repeat(4, 1, 1), guidance=3.0)(x, sigma)
    assert torch.equal(one, each)
    with pytest.raises(ValueError, match=r"guidance 7\.5 needs"):
        Denoiser(Recorder(), SCHEDULE, "eps", cond, guidance=7.5)
    with pytest.raises(ValueError, match="3 places, the negative one 6"):
        Denoiser(Recorder(), SCHEDULE, "eps", cond, uncond.repeat(1, 2, 1), guidance=7.5)


def test_channels_beside_the_latent_and_the_label_are_the_same_for_both_halves():
    network, x, sigma = Recorder(), shaped(0, 2, 4, 3, 3).float(), SCHEDULE.sigma(400.0)
    cond, uncond, mask = torch.full((1, 3, 8), 5.0), torch.full((1, 3, 8), 1.0), shaped(1, 1, 5, 3, 3).float()
    told = {"concat": mask, "label": torch.tensor([20])}
    for guidance, count in ((3.0, 4), (1.0, 2)):
        x0 = Denoiser(network, SCHEDULE, "eps", cond, uncond, guidance, **told)(x, sigma)
        assert x0.shape == x.shape
        x_t = network.calls[-1][0]
        assert x_t.shape == (count, 9, 3, 3) and torch.equal(x_t[:, 4:], mask.expand(count, -1, -1, -1))
        assert torch.equal(network.labels[-1], torch.full((count,), 20))
