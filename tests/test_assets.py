"""What is bundled: every file named with its SHA-256 beside it, small enough, and able to draw."""

import re
import runpy

import numpy as np
import pytest
import torch

import minisd
from minisd.__main__ import app
from minisd.config import CRITTERS_PIXELS
from minisd.critters import Scene, render
from minisd.critters.anatomy import anatomy as bodies
from minisd.critters.camera import eyes as eyes_on_screen
from minisd.denoiser import Denoiser
from minisd.evaluate import anatomy, load_oracle, load_segmenter
from minisd.files import sha256
from minisd.image import from_pil
from minisd.samplers import ancestral
from minisd.schedule import linear, plan
from minisd.unet import UNet
from minisd.weights import assets, read_module

WEIGHTS = sorted((assets() / "models").rglob("*.safetensors"))


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda p: p.name)
def test_every_file_of_weights_is_the_one_its_card_describes(path):
    assert sha256(path) in (assets() / "models" / "README.md").read_text(encoding="utf-8")


def test_the_tables_of_the_card_are_what_was_measured():
    made = runpy.run_path(str(assets() / "models" / "card.py"))["written"]
    card = (assets() / "models" / "README.md").read_text(encoding="utf-8")
    assert made(card) == card


def test_all_weights_stay_below_40_mib():
    assert 0 < sum(path.stat().st_size for path in WEIGHTS) < 40 * 2**20


def test_the_vocabulary_is_the_published_one():
    card = (assets() / "vocab" / "README.md").read_text(encoding="utf-8")
    assert sha256(assets() / "vocab" / "bpe_simple_vocab_16e6.txt.gz") in card


def test_the_bundled_model_draws_what_the_prompt_says_in_colour():
    """Two furs far apart, the same seeds: the darker word must draw the darker animal in every pair."""
    sd = minisd.load()
    seeds = {"n": 3, "seed": 0, "steps": 10, "progress": False}
    white, black = (
        np.stack([np.asarray(p) for p in sd(f"a 3d render portrait of a {fur} cat on the grass", **seeds)])
        for fur in ("white", "black")
    )
    middle = slice(192, 320)
    assert (white[:, middle, middle].mean((1, 2, 3)) > black[:, middle, middle].mean((1, 2, 3)) + 30).all()


def test_the_noise_of_the_bundled_model_goes_further_than_stable_diffusions():
    """So far that all cells of a latent together hardly show its brightness: their noise averages to about as much."""
    ours, theirs = minisd.load().schedule, minisd.schedule.scaled_linear()
    assert torch.allclose(ours.alpha_bar, minisd.schedule.scaled_linear(end=0.02).alpha_bar)
    cells = 64 * 64
    assert cells**0.5 / ours.sigmas[-1] == pytest.approx(1, rel=0.05) and cells**0.5 / theirs.sigmas[-1] > 4


def test_the_distilled_model_draws_in_four_steps_what_the_prompt_says():
    sd, oracle = minisd.load("critters-512-distilled"), load_oracle()
    drawn = sd([f"a cartoon of a {fur} cat in the snow" for fur in ("orange", "black")], n=3, seed=0, progress=False)
    info = drawn[0].info
    assert (info["steps"], info["sampler"], info["schedule"], info["guidance"]) == (4, "euler", "trailing", 1.0)
    assert [reading["fur"] for reading in oracle.read(from_pil(drawn))] == ["orange"] * 3 + ["black"] * 3


def test_the_segmenter_counts_the_parts_of_fresh_renders_and_sees_what_is_one_too_many():
    """Renders it has not seen: as they are, with an eye on the forehead, and with one that floats in the grass."""
    segmenter, usual = load_segmenter()
    kinds = (("cat", "gray", "sitting"), ("dog", "brown", "portrait"))
    scenes = [Scene(*kind[:2], pose=kind[2], seed=seed) for seed in range(8) for kind in kinds]
    images = render(scenes, 256).image
    found = anatomy(segmenter, usual, scenes, images)
    assert found["eyes"].right == found["heads"].right == 16 and found["whole"].right >= 15

    def moved(image: torch.Tensor, eye: tuple[float, float], to: tuple[float, float], radius: float) -> None:
        """Copy an eye to another place: coordinates in -1..1, v pointing up."""
        reach = int(radius * 128)
        rows, columns = ([int((1 + sign * at[i]) * 128) for at in (to, eye)] for i, sign in ((1, -1), (0, 1)))
        here, there = (
            image[:, y - reach : y + reach, x - reach : x + reach] for y, x in zip(rows, columns, strict=True)
        )
        from_middle = torch.arange(-reach, reach) + 0.5
        disc = from_middle.square()[:, None] + from_middle.square() < reach**2
        here[:, disc] = there[:, disc]

    for place in ("forehead", "grass"):
        more = images.clone()
        for image, eyes, radius in zip(more, *eyes_on_screen(bodies(scenes)), strict=True):
            forehead = (eyes.mean(0) + torch.tensor([0, 0.25])).tolist()
            moved(image, eyes[0].tolist(), forehead if place == "forehead" else (-0.75, -0.75), radius.item())
        assert anatomy(segmenter, usual, scenes, more)["eyes"].right <= 2, place


def test_eval_says_how_many_words_and_parts_are_right(capsys):
    app(["eval", "-n", "2", "--steps", "4"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "words that were read back:" and "parts that are there as often as in renders:" in lines
    assert any(re.match(r"  species +\d of +2 ", line) for line in lines)
    assert any(re.match(r"  whole +\d of +2 ", line) for line in lines)


def test_the_pixel_model_draws_from_noise_if_its_clean_pictures_are_kept_in_range():
    unet = read_module(UNet(CRITTERS_PIXELS), assets() / "models" / "pixels.safetensors")
    denoise, run = Denoiser(unet, linear(), "eps"), plan(linear(), 30, "linspace")
    generator = torch.Generator().manual_seed(0)
    x = run.init_scale * torch.randn(8, 3, 32, 32, generator=generator)

    def clipped(x, sigma):
        return denoise(x, sigma).clamp(-1, 1)

    def noise(*_):
        return torch.randn(x.shape, generator=generator)

    with torch.no_grad():
        *_, (_, drawn) = ancestral(clipped, x, run.sigmas.float(), noise)
    assert (drawn.std((1, 2, 3)) > 0.1).all() and (drawn.mean((1, 2, 3)).abs() < 0.9).all()  # none is blank
    assert drawn.mean((2, 3)).std(0).min() > 0.1  # they differ in colour
