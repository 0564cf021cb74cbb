"""The recipes of the bundled model, run in miniature from the renders to a picture."""

import dataclasses

import pytest
import torch
from tiny import CONFIG, tiny

import minisd
from minisd.train import recipes
from minisd.train.data import Latents, Renders
from minisd.weights import write_config

SHORT = {"steps": 2, "batch_size": 4, "bf16": False}


def test_three_recipes_make_a_model_that_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "CAPTIONS", 200)
    (tmp_path / "model").mkdir()
    start = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, vocabulary=560, projection=128))
    write_config(tmp_path / "model", start)
    shop = recipes.Workshop(tmp_path, torch.device("cpu"), renders=24)
    for name, (recipe, run) in recipes.RECIPES.items():
        records = list(recipe(shop, dataclasses.replace(run, **SHORT)))
        assert [r.step for r in records] == [1, 2], name
        assert all(torch.isfinite(torch.tensor(r.loss)) for r in records)

    sd = minisd.load(tmp_path / "model")
    picture = sd("a cat", seed=1, steps=2, progress=False)
    assert picture.size == (64, 64)
    pixels = shop.data().pictures(torch.arange(24))
    assert abs(sd.encode(pixels).std() - 1) < 0.1  # the scaling factor was measured on these very pictures

    again = list(recipes.vae(shop, dataclasses.replace(recipes.VAE_RUN, **SHORT)))
    assert again == []  # the run is over: resuming has nothing left to do


def test_latents_mix_signal_and_noise_as_their_time_says(tmp_path):
    renders = Renders(tmp_path, 8, 64)
    assert len(renders) == 8
    assert renders.eyes.any(axis=(1, 2, 3)).mean() > 0.5  # most critters show an eye
    sd = tiny()
    data = Latents(renders, sd.vae, sd.text, sd.tokenizer, sd.schedule)
    indices = torch.arange(8).repeat(50)
    batch = data.batch(indices, torch.Generator().manual_seed(0))
    alpha_bar = sd.schedule.alpha_bar.float()[batch["t"].long()].view(-1, 1, 1, 1)
    x0 = alpha_bar.sqrt() * batch["x_t"] - (1 - alpha_bar).sqrt() * batch["target"]
    eps = alpha_bar.sqrt() * batch["target"] + (1 - alpha_bar).sqrt() * batch["x_t"]
    assert abs(eps.std() - 1) < 0.02
    expected = sd.config.vae.scaling * data.mean[indices]
    assert torch.allclose(x0.mean(), expected.mean(), atol=0.02 + 0.02 * expected.std())
    empty = sd.encode_text("")[0]
    dropped = (batch["context"] == empty).flatten(1).all(1).float().mean()
    assert dropped == pytest.approx(0.1, abs=0.05)  # 3.3 standard errors of 400 draws
