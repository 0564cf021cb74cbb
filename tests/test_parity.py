"""Whole pictures against diffusers' own pipelines: every family, from the same small random weights and the same seed.

Ours runs by its public ways to draw, theirs by the pipeline class that the written folder names. How the two are made
and compared is in `bench/parity.py`, which does the same at full size by hand.
"""

import functools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bench import parity, speed
from PIL import Image

import minisd
from minisd import unet
from minisd.clip import quick_gelu

SIZE = 64, 48  # width and height that can't be mistaken for each other
# In standard deviations of the numbers compared:
STATES = 5e-5  # measured: up to 1.1e-5 (v2-v), the others up to 6e-6
NETWORKS = 1.2e-5  # measured: up to 2.5e-6 (v1's U-Net, whose 1x1 convolutions are Linear here), often 0
DEPTHS = 5e-5  # measured: 9.5e-6; the outputs lie close together


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Ours, theirs, and what theirs draws, of a family."""

    @functools.cache
    def made(family):
        folder = tmp_path_factory.mktemp("parity") / family
        parity.write_random(parity.tiny(parity.FAMILIES[family]), folder)
        pipe = parity.load_theirs(folder)
        return minisd.load(folder, dtype=torch.float32), pipe, parity.draw_theirs(pipe, SIZE)

    return made


def state_errors(ours, theirs):
    assert len(ours.states) == len(theirs.states) == parity.STEPS
    return list(map(parity.difference, ours.states, theirs.states))


@pytest.mark.parametrize("family", parity.FAMILIES)
def test_a_whole_picture_is_that_of_diffusers(pair, family):
    sd, _, theirs = pair(family)
    ours = parity.draw_ours(sd, SIZE)
    errors = state_errors(ours, theirs)
    assert max(errors) < STATES
    assert ours.picture.size == SIZE
    assert parity.pixel_difference(ours.picture, theirs.picture) <= 1  # a rounding; measured: 0, and 1 for v2-v
    assert np.isin(np.asarray(theirs.picture), (0, 255)).mean() < 0.5  # not equal for being clipped


@pytest.mark.parametrize("family", parity.FAMILIES)
def test_every_network_is_that_of_diffusers(pair, family):
    sd, pipe, _ = pair(family)
    with torch.no_grad():
        errors = {name: parity.difference(o(), t()) for name, (o, t) in parity.calls(sd, pipe, SIZE).items()}
    assert len(errors) == 4 + (family == "v2-depth")
    assert errors.pop("depth estimator", 0) < DEPTHS
    assert max(errors.values()) < NETWORKS


def set_gelu(monkeypatch, sd, gelu):
    for block in sd.text.blocks:
        monkeypatch.setattr(block, "activation", gelu)


def skip_last_layer(monkeypatch, sd):
    right = sd.text.forward
    monkeypatch.setattr(sd.text, "forward", lambda ids, skip_last: right(ids, skip_last=1))


def swap_sin_and_cos(monkeypatch, sd):
    right = unet.timestep_embedding
    monkeypatch.setattr(unet, "timestep_embedding", lambda t, dim: right(t, dim).roll(dim // 2, dims=-1))


FAULTS = {
    "v1 with the exact GELU": ("v1", lambda m, sd: set_gelu(m, sd, F.gelu)),
    "v2 with the quick GELU": ("v2", lambda m, sd: set_gelu(m, sd, quick_gelu)),
    "v1 without the last text layer": ("v1", skip_last_layer),
    "v2 without the last text layer": ("v2", skip_last_layer),
    "v1 padded by zero": ("v1", lambda m, sd: m.setattr(sd.tokenizer, "pad", 0)),
    "v2 padded by the end mark": ("v2", lambda m, sd: m.setattr(sd.tokenizer, "pad", sd.tokenizer.end)),
    "sines before cosines": ("v1", swap_sin_and_cos),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_shows(pair, monkeypatch, fault):
    family, plant = FAULTS[fault]
    sd, _, theirs = pair(family)
    plant(monkeypatch, sd)
    ours = parity.draw_ours(sd, SIZE)
    errors = state_errors(ours, theirs)
    assert min(errors) > 100 * STATES  # measured: 0.036 and more for a GELU, above 1.4 for the others
    assert parity.pixel_difference(ours.picture, theirs.picture) > 1


def test_the_script_of_parity_prints_a_row_for_each_comparison(capsys):
    parity.main(["--tiny", "--families", "v2", "v2-depth"])
    header, _, *rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert {len(row) for row in (header, *rows)} == {3}
    assert [what for family, what, _ in rows if family == "| v2"] == [
        "U-Net", "VAE encoder", "VAE decoder", "text encoder", "latents, step by step", "picture",
    ]  # fmt: skip
    assert [what for family, what, _ in rows if family == "| v2-depth"] == [  # its other networks are v2's
        "U-Net", "depth estimator", "latents, step by step", "picture",
    ]  # fmt: skip


def test_the_script_of_speed_leaves_its_figures(capsys, tmp_path):
    speed.main(["--tiny", "--repeats", "1", "--steps", "2", "--output", str(tmp_path)])
    figures = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert list(figures["races"]) == [
        "load",
        "load, all weights read",
        "U-Net, with guidance",
        "VAE decoder",
        "picture, 2 steps",
    ]
    assert all(min(race["ours"], race["theirs"], race["ratio"]) > 0 for race in figures["races"].values())
    assert figures["bundled"] == {"largest": 0, "mean": 0}  # the CPU against itself
    assert Image.open(tmp_path / "speed.png").size == (512, 512)
    assert "| picture, 2 steps | " in capsys.readouterr().out
