"""Pictures too large for memory, encoded and decoded tile by tile."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peers import randomise
from torch import nn

from minisd.config import VAEConfig
from minisd.critters import Scene, render
from minisd.evaluate import psnr
from minisd.vae import VAE, fixed_norms, tiled, windows
from minisd.weights import read_config, read_module, resolve

SMALL = VAEConfig(widths=(8, 16, 16), blocks=1, groups=2, scaling=0.5)  # a cell is 4 x 4 pixels
TILE = 16  # of the bundled model: as large as the pictures it was trained on


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 90), st.integers(4, 40), st.integers(1, 8))
def test_tiles_cover_a_side_and_count_for_one_together(cells, tile, scale):
    total, end = torch.zeros(cells * scale), None
    for first, last, weights in windows(cells, tile, scale):
        assert last - first == min(tile, cells)
        assert end is None or end - first >= tile // 4
        assert weights.min() > 0
        total[first * scale : last * scale] += weights
        end = last
    assert end == cells
    assert torch.allclose(total, torch.ones_like(total), atol=1e-6)


def test_one_tile_fades_out_linearly_as_the_next_fades_in():
    (_, _, left), (first, _, right) = windows(cells=28, tile=16, scale=2)
    assert first == 12
    ramp = (torch.arange(8) + 0.5) / 8  # four cells of two pixels
    assert torch.allclose(left, torch.cat([torch.ones(24), ramp.flip(0)]))
    assert torch.allclose(right, torch.cat([ramp, torch.ones(24)]))


@pytest.mark.parametrize("cells", [(9, 30), (17, 8), (5, 5)], ids=str)
def test_what_looks_at_one_cell_at_a_time_is_unchanged_by_tiling(cells):
    pixels = random(2, 3, 4 * cells[0], 4 * cells[1])
    shrink, enlarge = nn.Conv2d(3, 5, 4, stride=4), nn.ConvTranspose2d(5, 2, 4, stride=4)
    with torch.no_grad():
        latent = shrink(pixels)
        assert torch.allclose(tiled(shrink, pixels, 8, cell_in=4, cell_out=1), latent, atol=1e-6)
        assert torch.allclose(tiled(enlarge, latent, 8, cell_in=1, cell_out=4), enlarge(latent), atol=1e-6)


def test_a_picture_that_fits_into_a_tile_is_not_cut():
    vae = randomise(VAE(SMALL))
    z, image = random(2, 4, 6, 8), random(2, 3, 24, 32)
    singly = torch.cat([vae.decode(picture) for picture in z.split(1)])
    assert torch.equal(vae.decode(z, tile=8), singly)
    assert torch.equal(vae.encode(image, tile=8), torch.cat([vae.encode(picture) for picture in image.split(1)]))
    assert torch.allclose(singly, vae.decode(z), atol=1e-5)
    assert not torch.allclose(vae.decode(z, tile=7), singly, atol=1e-3)
    noise = random(2, 4, 6, 8)
    assert torch.allclose(vae.encode(image, noise, tile=8), vae.encode(image, noise), atol=1e-5)


def test_the_network_never_sees_more_than_one_tile():
    vae = randomise(VAE(SMALL))
    seen = {vae.encoder: [], vae.decoder: []}
    for half, shapes in seen.items():
        half.register_forward_pre_hook(lambda _, inputs, shapes=shapes: shapes.append(inputs[0].shape))
    z = vae.encode(random(2, 3, 52, 120), tile=8)
    assert z.shape == (2, 4, 13, 30)
    assert vae.decode(z, tile=8).shape == (2, 3, 52, 120)
    for half, shapes in seen.items():
        largest = 8 if half is vae.decoder else 8 * 4
        assert all(count == 1 and max(height, width) <= largest for count, _, height, width in shapes)
        assert len(shapes) == 2 * (1 + 2 * 5)  # for each picture the small one, then the tiles


def test_norms_are_fixed_within_and_free_again_after():
    decoder = randomise(VAE(SMALL)).decoder
    small, large = random(1, 4, 6, 8), 3 * random(1, 4, 12, 16, seed=2) + 1
    free = decoder(large)
    with fixed_norms(decoder, small):
        assert torch.allclose(decoder(small), decoder(small.repeat(2, 1, 1, 1))[1:], atol=1e-5)
        fixed = decoder(small)
        assert not torch.allclose(decoder(large), free, atol=0.1)
    assert torch.allclose(fixed, decoder(small), atol=1e-5)
    assert torch.equal(decoder(large), free)
    with pytest.raises(RuntimeError), fixed_norms(decoder, small):
        decoder(random(1, 3, 6, 8))  # a channel is missing
    assert torch.equal(decoder(large), free)


@pytest.fixture(scope="module")
def bundled():
    folder = resolve(None)
    vae = read_module(VAE(read_config(folder).vae), folder / "vae.safetensors")
    scenes = [Scene.sample(torch.Generator().manual_seed(seed)) for seed in range(2)]
    z = vae.encode(render(scenes, 256).image)
    return vae, z, vae.decode(z), vae.decode(z, tile=TILE)


def test_tiled_is_near_the_whole_on_renders(bundled):
    """Measured: 36.6 dB and 0.07; were each tile normed by itself, 28.0 dB and 0.15."""
    vae, _, whole, pieced = bundled
    assert psnr(pieced, whole).min() > 36
    latent = vae.encode(whole)
    assert (vae.encode(whole, tile=TILE) - latent).std() < 0.08 * latent.std()


def test_no_seam_shows(bundled):
    """What is off is off by as much beside the edges of tiles as elsewhere, and jumps there no more than elsewhere."""
    *_, whole, pieced = bundled
    error = pieced - whole
    beside, jumping = torch.zeros(256, dtype=torch.bool), torch.zeros(255, dtype=torch.bool)
    for edge in {8 * cell for window in windows(32, TILE, 1) for cell in window[:2]} - {0, 256}:
        beside[edge - 4 : edge + 4] = True
        jumping[edge - 1] = True
    for turned in (error, error.mT):
        size = turned.abs().mean(dim=(0, 1, 2))
        jump = turned.diff(dim=-1).abs().mean(dim=(0, 1, 2))
        assert size[beside].mean() < 1.5 * size[~beside].mean()  # measured: 1.2 at most; tiles that don't fade: 2
        assert jump[jumping].mean() < 3 * jump[~jumping].mean()  # measured: 1.7 at most; tiles that don't fade: 14


@pytest.mark.parametrize("tile", [3, 0, -8, 16.0, True, "16"])
def test_a_tile_that_cannot_be_is_refused(tile):
    with pytest.raises(ValueError, match="tile is"):
        VAE(SMALL).decode(random(1, 4, 8, 8), tile=tile)
