"""Our networks against the same of diffusers and transformers, with the same random weights."""

import math

import pytest
import torch
from peers import randomise, text_peer, unet_peer, vae_peer

from minisd import config
from minisd.clip import CLIP, ImageTower, TextTower
from minisd.config import CRITTERS_512, ImageTowerConfig, TextConfig, UNetConfig, VAEConfig
from minisd.layers import timestep_embedding
from minisd.unet import UNet
from minisd.vae import VAE, Gaussian

V1 = UNetConfig(widths=(32, 64, 64), attention=(True, True, False), heads=4, context_dim=24, groups=8)
V2 = UNetConfig(widths=(32, 64, 64), attention=(True, True, False), heads=None, head_dim=16, context_dim=24, groups=8)
X4 = UNetConfig(7, 4, (16, 32, 32), 1, (False, True, True), 4, None, 24, groups=4, cross_only=2, classes=10)


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("form", [V1, V2, CRITTERS_512.unet], ids=["v1", "v2", "bundled"])
@pytest.mark.parametrize("size", [(16, 16), (12, 20), (10, 14)], ids=str)
def test_unet_equals_diffusers(form, size):
    unet = randomise(UNet(form))
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(2, 4, *size, generator=generator)
    t, context = torch.tensor([3.0, 871.0]), torch.randn(2, 7, form.context_dim, generator=generator)
    theirs = unet_peer(unet, linear=form is V2)(x_t, t, context).sample
    assert relative(unet(x_t, t, context), theirs) < 1e-5


def test_upscaling_unet_equals_diffusers():
    """Levels whose pixels look at the words twice, and a noise level embedded beside the time."""
    unet = randomise(UNet(X4))
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(2, 7, 12, 20, generator=generator)
    t, context = torch.tensor([3.0, 871.0]), torch.randn(2, 7, X4.context_dim, generator=generator)
    label = torch.tensor([0, 9])
    theirs = unet_peer(unet, linear=True)(x_t, t, context, class_labels=label).sample
    assert relative(unet(x_t, t, context, label), theirs) < 1e-5
    assert relative(unet(x_t, t, context, label.flip(0)), theirs) > 1e-3


@pytest.mark.parametrize("size", [(32, 32), (24, 40)], ids=str)
def test_vae_equals_diffusers(size):
    vae = randomise(VAE(VAEConfig(widths=(16, 32, 32), blocks=2, groups=4, scaling=0.5)))
    peer = vae_peer(vae)
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    posterior, theirs = vae.posterior(image), peer.encode(image).latent_dist
    assert relative(posterior.mean, theirs.mean) < 1e-5
    assert relative(posterior.logvar, theirs.logvar) < 1e-5
    assert relative(posterior.kl(), theirs.kl()) < 1e-5
    assert relative(vae.reconstruct(posterior.mean), peer.decode(posterior.mean).sample) < 1e-5
    assert relative(vae.decode(vae.encode(image)), peer.decode(posterior.mean).sample.clamp(-1, 1)) < 1e-5


@pytest.mark.parametrize("quick", [True, False])
def test_text_tower_equals_transformers(quick):
    text = randomise(TextTower(TextConfig(vocabulary=100, width=32, layers=3, heads=4, quick_gelu=quick)))
    ids = torch.randint(100, (2, 77), generator=torch.Generator().manual_seed(1))
    theirs = text_peer(text)(ids, output_hidden_states=True)
    assert relative(text(ids), theirs.last_hidden_state) < 1e-5
    penultimate = text.final_norm(theirs.hidden_states[-2])
    assert relative(text(ids, skip_last=1), penultimate) < 1e-5


PUBLISHED = {  # parameters of U-Net, autoencoder and the part of the text tower that is used
    "v1": (config.SD1, 859_520_964, 83_653_863, 123_060_480),
    "v1 inpainting": (config.SD1_INPAINT, 859_535_364, 83_653_863, 123_060_480),
    "v2": (config.SD2, 865_910_724, 83_653_863, 340_387_840),
    "v2 768-v": (config.SD2_V, 865_910_724, 83_653_863, 340_387_840),
    "v2 inpainting": (config.SD2_INPAINT, 865_925_124, 83_653_863, 340_387_840),
    "v2 depth": (config.SD2_DEPTH, 865_913_604, 83_653_863, 340_387_840),
    "x4": (config.SD_X4, 473_398_020, 55_325_927, 340_387_840),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_families_have_the_published_numbers_of_parameters(family):
    model, *counts = PUBLISHED[family]
    with torch.device("meta"):
        modules = UNet(model.unet), VAE(model.vae), TextTower(model.text)
    assert [sum(p.numel() for p in module.parameters()) for module in modules] == counts


def test_later_words_do_not_change_earlier_context():
    text = randomise(TextTower(TextConfig(vocabulary=50, width=16, layers=2, heads=2)))
    ids = torch.randint(50, (1, 77), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 40] = (changed[0, 40] + 1) % 50
    assert torch.equal(text(ids)[:, :40], text(changed)[:, :40])
    assert (text(ids)[:, 40:] != text(changed)[:, 40:]).any(-1).all()


def test_timestep_embedding_by_hand():
    row = timestep_embedding(torch.tensor([2.0]), 4)[0]
    expected = [math.cos(2), math.cos(2 / 100), math.sin(2), math.sin(2 / 100)]  # frequencies 1 and 10000^(-1/2)
    assert torch.allclose(row, torch.tensor(expected), atol=1e-7)


def test_a_fresh_unet_predicts_zero_and_a_changed_time_changes_a_random_one():
    generator = torch.Generator().manual_seed(0)
    x_t, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 24, generator=generator)
    assert UNet(V1)(x_t, torch.tensor([5.0]), context).abs().max() == 0
    unet = randomise(UNet(V1))
    at = [unet(x_t, torch.tensor([t]), context) for t in (5.0, 500.0)]
    assert relative(at[0], at[1]) > 0.01


def test_gaussian_moments_and_divergence():
    mean, logvar = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), math.log(9.0))
    noise = torch.randn(1, 1, 400, 500, generator=torch.Generator().manual_seed(0))
    sample = Gaussian(mean, logvar).sample(noise)
    assert abs(sample.mean() - 2) < 0.03  # 4.5 standard errors of 200,000 draws
    assert abs(sample.std() - 3) < 0.03
    unit, own = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(2.0, 3.0)
    assert torch.isclose(Gaussian(mean, logvar).kl(), torch.distributions.kl_divergence(own, unit))


def test_clip_prefers_what_it_was_shown_in_a_tiny_fit():
    torch.manual_seed(0)
    clip = CLIP(
        TextConfig(vocabulary=20, width=16, layers=1, heads=2, projection=8),
        ImageTowerConfig(size=16, patch=8, width=16, layers=1, heads=2, projection=8),
    )
    image, ids = torch.randn(4, 3, 16, 16), torch.randint(18, (4, 77))
    ids[:, 9] = 19
    optimizer = torch.optim.Adam(clip.parameters(), 1e-2)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(clip.similarity(image, ids), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (clip.similarity(image, ids).argmax(1) == torch.arange(4)).all()
    assert torch.allclose(clip.image.embed(image).norm(dim=1), torch.ones(4), atol=1e-5)


def test_an_image_tower_looks_at_any_picture_in_its_own_size():
    tower = ImageTower(ImageTowerConfig(size=16, patch=8, width=16, layers=1, heads=2, projection=8))
    for shape in ((16, 16), (32, 16), (16, 32)):
        assert tower.embed(torch.randn(2, 3, *shape)).shape == (2, 8)
