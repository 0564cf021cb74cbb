"""The recipes of the bundled model, run in miniature from the renders to a picture."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import CONFIG, tiny

import minisd
from minisd.adapters import controlnet
from minisd.config import CRITTERS_DEPTH, CRITTERS_HINT
from minisd.critters import depths
from minisd.critters.oracle import targets
from minisd.depth import depth_channel
from minisd.files import read_tensors
from minisd.image import edges
from minisd.schedule import plan
from minisd.train import recipes
from minisd.train.data import (
    NEAR_MISSES,
    Captioned,
    Decodings,
    Depths,
    Distances,
    Edges,
    Holes,
    Labelled,
    Latents,
    Renders,
    Stages,
    holes,
    posteriors,
)
from minisd.train.losses import distillation_loss, unexplained
from minisd.train.workshop import Workshop

SHORT = {"steps": 2, "batch_size": 4, "bf16": False}


def test_recipes_make_a_model_that_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "CAPTIONS", 200)
    monkeypatch.setattr("minisd.train.data.CHUNK", 24)
    text = dataclasses.replace(CONFIG.text, vocabulary=560, projection=128)
    shop = Workshop(tmp_path, torch.device("cpu"), renders=24, preset=dataclasses.replace(CONFIG, text=text))
    for name, (recipe, run) in recipes.RECIPES.items():
        before = read_tensors(shop.model / "vae.safetensors") if name == "decoder" else None
        records = list(recipe(shop, dataclasses.replace(run, **SHORT)))
        assert [r.step for r in records] == [1, 2], name
        assert all(torch.isfinite(torch.tensor(r.loss)) for r in records)
        rows = [row.split(",") for row in (tmp_path / f"tiny-{name}.csv").read_text().splitlines()]
        assert [(int(step), float(loss)) for step, loss, *_ in rows] == [(r.step, round(r.loss, 5)) for r in records]
        if before:
            same = {k for k, tensor in read_tensors(shop.model / "vae.safetensors").items() if tensor.equal(before[k])}
            moved = {k.split(".")[0] for k in before.keys() - same}
            assert "decoder" in moved and moved <= {"decoder", "post_quant"}  # the latents mean what they meant

    sd = minisd.load(tmp_path / "tiny")
    picture = sd("a cat", seed=1, steps=2, progress=False)
    assert picture.size == (64, 64)
    settings = {"seed": 1, "steps": 2, "guidance": 3, "progress": False}
    for name in ("inpaint", "depth", "distilled"):
        variant = minisd.load(tmp_path / f"tiny-{name}")
        assert all(a.equal(b) for a, b in zip(variant.vae.parameters(), sd.vae.parameters(), strict=True))
        if name == "depth":
            drawn = variant.depth2img("a cat", picture, strength=1, **settings)
        else:
            drawn = variant("a cat", **settings)
        assert drawn.info["model"] == f"tiny-{name}"
        # Two steps of training at a rising rate move it a little from where it starts, which is the model itself.
        assert 0 < np.abs(np.asarray(drawn, np.float32) - np.asarray(picture, np.float32)).mean() < 20, name
    control = controlnet.read(shop.model / "control.lora.safetensors", sd.unet, CRITTERS_HINT)
    assert any(zero.weight.abs().max() > 0 for zero in control.zeros)
    pixels = shop.data().pictures(torch.arange(24))
    assert abs(sd.encode(pixels).std() - 1) < 0.1  # the scaling factor was measured on these very pictures

    again = list(recipes.vae(shop, dataclasses.replace(recipes.VAE_RUN, **SHORT)))
    assert again == []  # the run is over: resuming has nothing left to do


@pytest.fixture(scope="module")
def renders(tmp_path_factory):
    return Renders(tmp_path_factory.mktemp("renders"), 8, 64)


def test_latents_mix_signal_and_noise_as_their_time_says(renders):
    assert len(renders) == 8
    assert renders.eyes.any(axis=(1, 2, 3)).mean() > 0.5  # most critters show an eye
    sd = tiny()
    data = Latents(renders, sd.vae, sd.tokenizer, sd.schedule)
    indices = torch.arange(8).repeat(50)
    batch = data.batch(indices, torch.Generator().manual_seed(0))
    alpha_bar = sd.schedule.alpha_bar.float()[batch["t"].long()].view(-1, 1, 1, 1)
    x0 = alpha_bar.sqrt() * batch["x_t"] - (1 - alpha_bar).sqrt() * batch["target"]
    eps = alpha_bar.sqrt() * batch["target"] + (1 - alpha_bar).sqrt() * batch["x_t"]
    assert abs(eps.std() - 1) < 0.02
    expected = sd.config.vae.scaling * data.mean[indices].float()  # plain and mirrored have all but the same mean
    assert torch.allclose(x0.mean(), expected.mean(), atol=0.02 + 0.02 * expected.std())
    times = batch["t"].sort().values  # in each of 400 equal spans of the thousand one, as whole numbers
    assert ((times - torch.arange(400) * 2.5).abs() <= 2.5).all() and times.unique().numel() == 400
    dropped = (batch["ids"] == sd.tokenizer("")).all(1).float().mean()
    assert dropped == pytest.approx(0.1, abs=0.05)  # 3.3 standard errors of 400 draws


def test_latents_are_encoded_once_for_an_encoder(renders, monkeypatch):
    sd, calls = tiny(), []
    encode = sd.vae.posterior
    monkeypatch.setattr(sd.vae, "posterior", lambda image: calls.append(1) or encode(image))
    with torch.no_grad():
        sd.vae.encoder.conv_in.weight.mul_(1.5)  # an encoder that no other test has
    first, again = posteriors(renders, sd.vae), posteriors(renders, sd.vae)
    assert len(calls) == 2 and all(a.equal(b) for a, b in zip(first, again, strict=True))  # plain and mirrored
    with torch.no_grad():
        sd.vae.decoder.conv_in.weight.add_(1)
    posteriors(renders, sd.vae)
    assert len(calls) == 2  # the decoder has no say in it
    with torch.no_grad():
        sd.vae.encoder.conv_in.weight.mul_(1.5)
    assert not posteriors(renders, sd.vae)[0].equal(first[0]) and len(calls) == 4


def test_what_is_known_of_a_few_renders_does_not_stand_in_for_more(renders):
    few, more = renders.disparities(64), Renders(renders.folder, 10, 64).disparities(64)
    assert len(few) == 8 and len(more) == 10 and more[:8].equal(few)


def test_mirrored_samples_come_with_the_mirrored_caption(renders, monkeypatch):
    sd = tiny()
    monkeypatch.setattr(renders, "scenes", [dataclasses.replace(scene, look="left") for scene in renders.scenes])
    monkeypatch.setattr("minisd.train.data.near_misses", lambda scene, *_: [scene.look] * (1 + NEAR_MISSES))
    monkeypatch.setattr("minisd.train.data.caption", lambda scene, _: scene.look)
    indices = torch.arange(8).repeat(4)
    batch = Captioned(renders, sd.tokenizer, 64).batch(indices, torch.Generator().manual_seed(0))
    plain = (batch["image"] == renders.pictures(indices)).flatten(1).all(1)
    mirrored = (batch["image"].flip(3) == renders.pictures(indices)).flatten(1).all(1)
    assert (plain ^ mirrored).all() and 6 < plain.sum() < 26
    texts = [sd.tokenizer.decode(row[0]) for row in batch["ids"]]
    assert all(("left" in text) == same and ("right" in text) != same for text, same in zip(texts, plain, strict=True))

    data = Latents(renders, sd.vae, sd.tokenizer, sd.schedule)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        flipped = sd.vae.posterior(renders.pictures(torch.arange(8)).flip(3)).mean
    assert torch.allclose(data.mean[:, 1], flipped.half(), atol=1e-6)
    data.deviation.zero_()
    batch = data.batch(indices, torch.Generator().manual_seed(0))
    alpha_bar = sd.schedule.alpha_bar.float()[batch["t"].long()].view(-1, 1, 1, 1)
    x0 = (alpha_bar.sqrt() * batch["x_t"] - (1 - alpha_bar).sqrt() * batch["target"]) / sd.config.vae.scaling
    nearest = (x0[:, None] - data.mean[indices]).square().flatten(2).sum(2).argmin(1)
    for side, row in zip(nearest.tolist(), batch["ids"], strict=True):
        assert sd.tokenizer.decode(row[1:-1]).replace("<|endoftext|>", "").strip() in ("", ("left", "right")[side])


def test_decoders_see_squares_of_noisy_latents(renders, monkeypatch):
    monkeypatch.setattr(Decodings, "SIDE", 3)
    data, off, corners = Decodings(renders, tiny().vae), [], set()
    data.deviation.zero_()
    for draw in range(40):
        batch = data.batch(torch.tensor([5]), torch.Generator().manual_seed(draw))
        assert batch["image"].shape == (1, 3, 24, 24) and batch["weight"].shape == (1, 1, 24, 24)
        places = [(mirrored, y, x) for mirrored in (0, 1) for y in range(6) for x in range(6)]
        for mirrored, y, x in places:
            picture = renders.pictures(torch.tensor([5]), torch.tensor([bool(mirrored)]))
            if picture[:, :, 8 * y : 8 * y + 24, 8 * x : 8 * x + 24].equal(batch["image"]):
                off.append(batch["z"][0] - data.mean[5, mirrored, :, y : y + 3, x : x + 3])
                corners.add((y, x))
    assert len(off) == 40 and len(corners) > 15
    # A level evenly from 0 to its highest has a third of the highest's variance.
    assert torch.stack(off).square().mean().sqrt() == pytest.approx(data.level / 3**0.5, rel=0.15)


def seen(kind, renders, sd, count=200):
    """A batch of many visits to the renders, and the clean latents in it."""
    data = kind(renders, sd.vae, sd.tokenizer, sd.schedule)
    indices = torch.arange(8).repeat(count // 8)
    batch = data.batch(indices, torch.Generator().manual_seed(0))
    alpha_bar = sd.schedule.alpha_bar.float()[batch["t"].long()].view(-1, 1, 1, 1)
    x0 = alpha_bar.sqrt() * batch["x_t"][:, :4] - (1 - alpha_bar).sqrt() * batch["target"]
    return indices, batch, x0


def test_holes_are_of_many_sizes_and_a_quarter_of_them_is_everything():
    white = holes(400, 64, torch.Generator().manual_seed(0))
    assert set(white.unique().tolist()) == {0, 1}
    share = white.mean((1, 2, 3))
    assert 0.19 < (share == 1).float().mean() < 0.31 and (share > 0).all()  # within 2.8 deviations of 400 draws
    assert 0.1 < share[share < 1].mean() < 0.4


def test_what_is_shown_beside_a_hole_is_the_rest_of_the_same_picture(renders):
    sd = tiny()
    indices, batch, _ = seen(Holes, renders, sd)
    data = Holes(renders, sd.vae, sd.tokenizer, sd.schedule)
    shown = batch["x_t"][:, sd.config.vae.latent_channels :]
    assert shown.equal(data.shown[indices, batch["mirrored"].long()].float())

    generator, images = torch.Generator().manual_seed(0), renders.pictures(torch.arange(8))
    for mirrored, image in enumerate((images, images.flip(3))):
        white = holes(8, 64, generator)
        with torch.no_grad():
            rest = sd.vae.encode(image.where(white == 0, 0))
        assert data.shown[:, mirrored, :1].equal(white[:, :, ::8, ::8].half())
        assert torch.allclose(data.shown[:, mirrored, 1:].float(), rest, atol=2e-3, rtol=1e-3)


def test_edges_are_those_of_the_picture_as_it_is_seen(renders):
    indices, batch, _ = seen(Edges, renders, tiny())
    image = renders.pictures(indices)
    image = torch.where(batch["mirrored"][:, None, None, None], image.flip(3), image)
    assert batch["picture"].equal(edges(image)) and batch["picture"].mean() > 0.005


def test_depths_belong_to_their_pictures(renders):
    indices, batch, _ = seen(Depths, renders, tiny())
    near = 1 / depths(renders.scenes, CRITTERS_DEPTH.size)
    near = torch.where(batch["mirrored"][:, None, None, None], near[indices].flip(3), near[indices])
    expected = depth_channel(near, (8, 8))
    assert batch["x_t"].shape[1] == 5 and (batch["x_t"][:, 4:] - expected).abs().max() < 0.02  # kept in half precision

    image = Distances(renders, 64).batch(indices, torch.Generator().manual_seed(0))
    mirrored = (image["image"] != renders.pictures(indices)).flatten(1).any(1)
    sides = 8 / depths(renders.scenes, renders.size)[indices]
    sides = torch.where(mirrored[:, None, None, None], sides.flip(3), sides)
    assert 80 < mirrored.sum() < 120 and (image["disparity"] - sides).abs().max() < 0.002


def test_unexplained_colours_are_those_no_linear_map_tells():
    draw = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0, 0.3, 0.1])[:, None, None]  # the third colour is rare
    colour = spread * torch.randn(8, 3, 16, 16, generator=draw)
    mixed = torch.einsum("zc,bchw->bzhw", torch.randn(4, 3, generator=draw), colour) + 5
    noise = torch.randn(8, 4, 16, 16, generator=draw)
    assert unexplained(mixed, colour) < 0.02
    assert unexplained(noise, colour) > 2.98
    assert unexplained(torch.cat([colour[:, :2], noise[:, :2]], 1), colour) == pytest.approx(1, abs=0.02)
    half = colour + colour.square().mean((0, 2, 3), keepdim=True).sqrt() * noise[:, :3]  # as much noise as colour
    assert unexplained(half, colour) == pytest.approx(1.5, abs=0.1)


class Knowing:
    """A network that knows the clean latents: it says their v, and how far it is off."""

    def __init__(self, sd, x0, off=0.0):
        self.alpha_bar, self.conv_in, self.x0, self.off = sd.schedule.alpha_bar.float(), sd.unet.conv_in, x0, off

    def __call__(self, x_t, t, context, label=None):
        alpha_bar = self.alpha_bar[t.round().long()].view(-1, 1, 1, 1)
        x0 = self.x0.repeat(len(x_t) // len(self.x0), 1, 1, 1)
        return (alpha_bar.sqrt() * x_t - x0) / (1 - alpha_bar).sqrt() + self.off


def test_stages_join_the_levels_of_four_steps(renders):
    sd = tiny()
    data = Stages(renders, sd.vae, sd.tokenizer, sd.schedule)
    levels = plan(sd.schedule, 4, "trailing").sigmas.float()
    visited = set()
    for step in range(30):
        batch = data.batch(torch.arange(8), torch.Generator().manual_seed(step))
        sigmas = batch["sigmas"][0]
        assert (batch["sigmas"] == sigmas).all() and (sigmas.diff() < 0).all()
        stage = levels.tolist().index(sigmas[0])
        assert sigmas[-1] == levels[stage + 1] and sd.schedule.sigma(batch["t"][0]).float() == sigmas[0]
        visited.add(stage)

        alpha_bar = sd.schedule.alpha_bar.float()[batch["t"].long()].view(-1, 1, 1, 1)
        x0 = alpha_bar.sqrt() * batch["x_t"] - (1 - alpha_bar).sqrt() * batch["target"]

        text, knowing = (lambda ids: torch.zeros(len(ids), 1, 16)), Knowing(sd, x0)
        student = SimpleNamespace(text=text, unet=knowing)
        assert distillation_loss(knowing, sd.schedule, 4.0, student, batch)[0] < 1e-5  # all ways lead to x0
        student.unet = Knowing(sd, x0, off=0.1)
        assert distillation_loss(knowing, sd.schedule, 4.0, student, batch)[0] == pytest.approx(0.01, rel=0.05)
    assert visited == {0, 1, 2, 3}


def test_labels_are_those_of_the_scene_as_it_is_seen(renders):
    indices, batch, _ = seen(Labelled, renders, tiny())
    scenes = [
        renders.scenes[i].mirrored() if m else renders.scenes[i]
        for i, m in zip(indices.tolist(), batch["mirrored"].tolist(), strict=True)
    ]
    for name, index in targets(scenes).items():
        if name != "eyes_at":
            assert batch[name].equal(index), name


def test_a_name_stands_for_its_recipes():
    assert recipes.chosen("unet") == [("unet", recipes.unet, recipes.UNET_RUN)]
    assert [name for name, *_ in recipes.chosen("all")] == ["vae", "unet", "clip", "decoder"]
    with pytest.raises(ValueError, match="unknown; choose"):
        recipes.chosen("everything")
