"""What each network sees in training: that every tensor of a batch belongs to the picture it stands beside."""

import dataclasses
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny

from minisd.config import CRITTERS_DEPTH
from minisd.critters import PARTS, WORDS, Scene, captions, depths, prompt
from minisd.critters.anatomy import anatomy
from minisd.critters.camera import eyes as eyes_on_screen
from minisd.critters.data import (
    NEAR_MISSES,
    Captioned,
    Decodings,
    Depths,
    Distances,
    Edges,
    Holes,
    Labelled,
    Latents,
    Pictures,
    Renders,
    Shrunk,
    SmallPictures,
    Stages,
    holes,
    posteriors,
    redrawn,
)
from minisd.critters.oracle import Examples, degraded, targets
from minisd.depth import depth_channel
from minisd.image import edges
from minisd.schedule import plan
from minisd.train.losses import UNSEEN

ALL = torch.arange(8)
VISITS = ALL.repeat(25)  # of eight renders


@pytest.fixture(scope="module")
def renders(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minisd.critters.data.CHUNK", 10)  # so many are rendered for a file, not eighty
        yield Renders(tmp_path_factory.mktemp("renders"), 8, 64)


@pytest.fixture(scope="module")
def eyes(renders):
    """Where the pictures' eyes are, [8 1 64 64]."""
    shown = (renders.parts(ALL) == PARTS.index("eyes")).float()
    assert shown.any(dim=(1, 2, 3)).float().mean() > 0.5 and not shown.equal(shown.flip(3))
    return shown


def some(seed=0):
    return torch.Generator().manual_seed(seed)


def turned(maps, mirrored):
    """Maps [b c h w], mirrored where they shall be."""
    return torch.where(mirrored[:, None, None, None], maps.flip(3), maps)


def sides(image, pictures):
    """Which of some images are the mirrored pictures; the others are the pictures themselves."""
    plain, mirrored = ((image - side).abs().amax((1, 2, 3)) < 1e-6 for side in (pictures, pictures.flip(3)))
    assert (plain ^ mirrored).all()
    assert 0.3 < mirrored.float().mean() < 0.7  # of 200 coins: 5.6 deviations
    return mirrored


def normal(x, tolerance=0.02):
    """Whether numbers have mean 0 and deviation 1: of 50,000, those are within 0.02 by more than four deviations."""
    assert x.numel() >= 50_000
    return abs(x.mean()) < tolerance and abs(x.std() - 1) < tolerance


# Renders


def test_a_shrunk_picture_holds_the_mean_of_each_square(renders):
    squares = renders.pictures(ALL).double().numpy().reshape(8, 3, 16, 4, 16, 4).mean((3, 5))
    assert np.abs(renders.pictures(ALL, size=16).numpy() - squares).max() < 1e-6
    assert np.abs(renders.shrunk(16).double().numpy() / 127.5 - 1 - squares).max() < 1.01 / 255  # half a byte


def test_what_is_known_of_a_few_renders_does_not_stand_in_for_more(renders):
    few, more = renders.disparities(32), Renders(renders.folder, 10, 64).disparities(32)
    assert len(few) == 8 and len(more) == 10 and more[:8].equal(few)


# What the autoencoder and its decoder see


def test_pictures_come_either_way_round_and_errors_in_their_eyes_count_eightfold(renders, eyes):
    batch = Pictures(renders, (4, 8, 8)).batch(VISITS, some())
    mirrored = sides(batch["image"], renders.pictures(VISITS))
    assert batch["weight"].equal(1 + 7 * turned(eyes[VISITS], mirrored))
    assert batch["noise"].shape == (200, 4, 8, 8) and normal(batch["noise"])


def test_decoders_see_squares_of_noisy_latents_and_of_drawn_ones(renders, eyes, monkeypatch):
    monkeypatch.setattr(Decodings, "SIDE", 3)
    drawn = posteriors(renders, tiny().vae)[0] + 100
    data, off, corners, weighed, of_drawn = Decodings(renders, tiny().vae, drawn), [], set(), 0, 0
    data.deviation = torch.zeros_like(data.deviation)
    index = torch.tensor([int(eyes.sum((1, 2, 3)).argmax())])  # of the largest eyes
    for draw in range(80):
        batch = data.batch(index, some(draw))
        assert batch["image"].shape == (1, 3, 24, 24)
        for y, x in ((y, x) for y in range(6) for x in range(6)):
            rows, columns = slice(8 * y, 8 * y + 24), slice(8 * x, 8 * x + 24)
            if renders.pictures(index)[:, :, rows, columns].equal(batch["image"]):
                error = batch["z"][0] - data.mean[index[0], :, y : y + 3, x : x + 3]
                if error.min() > 50:
                    of_drawn += 1
                    assert batch["z"][0].equal(drawn[index[0], :, y : y + 3, x : x + 3].float())
                else:
                    off.append(error)
                corners.add((y, x))
                weight = 1 + 7 * eyes[index].float()[:, :, rows, columns]
                assert batch["weight"].equal(weight)
                weighed += bool(weight.max() > 1)
    assert len(off) + of_drawn == 80 and 25 <= of_drawn <= 55 and len(corners) > 15 and weighed > 5
    # A level evenly from 0 to its highest has a third of the highest's variance.
    assert torch.stack(off).square().mean().sqrt() == pytest.approx(data.level / 3**0.5, rel=0.15)
    assert data.level == 0.2 / 0.5  # 0.2 deviations of latents that are to be halved
    levels = torch.stack(off).square().mean((1, 2, 3)).sqrt() / data.level
    assert levels.min() < 0.2 and levels.max() > 0.8  # one for each sample


def test_decoders_see_a_latent_drawn_from_the_posterior_of_their_picture(renders):
    visits = ALL.repeat(50)  # twice as many: half of them see a drawn latent
    data = Decodings(renders, tiny().vae, torch.full_like(posteriors(renders, tiny().vae)[0], 100))
    (mean, deviation), data.level = (data.mean, data.deviation), 0
    data.deviation = torch.zeros_like(deviation)
    batch = data.batch(visits, some())
    assert batch["image"].equal(renders.pictures(visits))
    own = (batch["z"] != 100).flatten(1).all(1)
    assert 150 < own.sum() < 250 and batch["z"][own].equal(mean[visits][own].float())
    data.mean, data.deviation = torch.zeros_like(mean), deviation
    assert normal((data.batch(visits, some())["z"] / deviation[visits].float())[own], tolerance=0.03)


class Blank(torch.nn.Module):
    """A noise predictor that takes every picture for a blank one, and notes what it is asked."""

    def __init__(self, unet, schedule):
        super().__init__()
        self.conv_in, self.alpha_bar, self.asked = unet.conv_in, schedule.alpha_bar.float(), []

    def forward(self, x_t, t, context, label=None):
        self.asked.append((t[0].item(), x_t.chunk(2)[0], context))
        alpha_bar = self.alpha_bar[t.round().long()].view(-1, 1, 1, 1)
        return (alpha_bar / (1 - alpha_bar)).sqrt() * x_t


def test_latents_are_drawn_anew_from_some_noise_under_their_own_prompts(renders, monkeypatch):
    sd = tiny()
    blank = Blank(sd.unet, sd.schedule)
    drawn = redrawn(renders, sd.vae, sd.tokenizer, sd.text, blank, sd.schedule, guidance=2.0)
    mean, _ = posteriors(renders, sd.vae)
    assert drawn.shape == mean.shape and drawn.abs().max() < 0.01  # it is the predictor's picture that counts

    t, x_t, context = blank.asked[0]
    assert all(later[0] < t for later in blank.asked[1:])
    sigma = sd.schedule.sigma(t).item()
    assert 0.3 <= sigma <= 1.5
    x0 = 0.5 * mean.float()  # 0.5 is the scaling
    noise = (x_t * (1 + sigma**2) ** 0.5 - x0) / sigma
    assert abs(noise.std() - 1) < 0.05 and abs(F.cosine_similarity(noise.flatten(), x0.flatten(), dim=0)) < 0.1
    uncond, cond = context.chunk(2)
    with torch.no_grad():
        assert torch.allclose(cond, sd.text(sd.tokenizer([prompt(s) for s in renders.scenes])), atol=1e-5)
        assert torch.allclose(uncond, sd.text(sd.tokenizer([""] * 8)), atol=1e-5)


def test_latents_are_encoded_once_for_an_encoder(renders, monkeypatch):
    sd, calls = tiny(), []
    encode = sd.vae.posterior
    monkeypatch.setattr(sd.vae, "posterior", lambda image: calls.append(1) or encode(image))
    with torch.no_grad():
        sd.vae.encoder.conv_in.weight.mul_(1.5)  # an encoder that no other test has
    first, again = posteriors(renders, sd.vae), posteriors(renders, sd.vae)
    assert len(calls) == 1 and all(a.equal(b) for a, b in zip(first, again, strict=True))
    with torch.no_grad():
        sd.vae.decoder.conv_in.weight.add_(1)
    posteriors(renders, sd.vae)
    assert len(calls) == 1  # the decoder has no say in it
    with torch.no_grad():
        sd.vae.encoder.conv_in.weight.mul_(1.5)
    assert not posteriors(renders, sd.vae)[0].equal(first[0]) and len(calls) == 2


def test_posteriors_are_those_of_each_picture(renders):
    sd = tiny()
    mean, deviation = posteriors(renders, sd.vae)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        posterior = sd.vae.posterior(renders.pictures(ALL))
    assert torch.allclose(mean.float(), posterior.mean, atol=1e-6, rtol=1e-3)  # half precision
    assert torch.allclose(deviation.float().square().log(), posterior.logvar, atol=2e-3)


# What the noise predictor and its variants see


def unmixed(batch, schedule):
    """The clean latents and the noise in a batch, from x_t and v by a quarter turn back."""
    alpha_bar = schedule.alpha_bar.float()[batch["t"].long()].view(-1, 1, 1, 1)
    signal, noise, x_t, v = alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), batch["x_t"][:, :4], batch["target"]
    return signal * x_t - noise * v, noise * x_t + signal * v


def seen(kind, renders, **zero):
    """What `kind` makes of the renders, and 200 visits to them; means or deviations are 0 where that is asked for."""
    sd = tiny()
    data = kind(renders, sd.vae, sd.tokenizer, sd.schedule)
    for name in zero:
        setattr(data, name, torch.zeros_like(getattr(data, name)))
    return data, data.batch(VISITS, some())


def test_v_and_the_noisy_latent_are_one_clean_latent_and_one_noise_at_the_time_that_is_told(renders):
    data, batch = seen(Latents, renders, deviation=0)
    x0, eps = unmixed(batch, data.schedule)
    expected = 0.5 * data.mean[VISITS].float()  # tiny's scaling
    assert (x0 - expected).abs().max() < 5e-6 * expected.abs().max()
    assert normal(eps)

    data, batch = seen(Latents, renders, mean=0)
    x0, eps = unmixed(batch, data.schedule)
    drawn = x0 / (0.5 * data.deviation[VISITS].float())
    assert normal(drawn) and normal(eps)
    assert abs((drawn * eps).mean()) < 0.02  # two draws, not one


def test_times_are_spread_evenly_over_a_batch(renders):
    data, _ = seen(Latents, renders)
    batch = data.batch(ALL.repeat(50), some())
    times = batch["t"].sort().values  # in each of 400 equal spans of the thousand one, as whole numbers
    assert ((times - torch.arange(400) * 2.5).abs() <= 2.5).all() and times.unique().numel() == 400
    assert times.equal(times.floor()) and 0 <= times[0] and times[-1] <= 999
    assert data.batch(ALL, some(1))["t"].tolist() != data.batch(ALL, some(2))["t"].tolist()


def test_a_tenth_of_the_captions_is_dropped_and_the_others_are_of_the_scene(renders, monkeypatch):
    monkeypatch.setattr("minisd.critters.data.caption", lambda scene, *_, **__: f"{scene.look} {scene.seed}")
    data, batch = seen(Latents, renders)
    batch = data.batch(ALL.repeat(50), some())
    texts = [f"{renders.scenes[i].look} {renders.scenes[i].seed}" for i in ALL.repeat(50).tolist()]
    dropped = (batch["ids"] == data.tokenizer("")).all(1)
    assert batch["ids"][~dropped].equal(data.tokenizer(texts)[~dropped])
    assert dropped.float().mean() == pytest.approx(0.1, abs=0.05)  # 3.3 standard errors of 400 draws


def test_half_of_the_captions_leave_nothing_out_and_plain_coats_may_be_named(renders, monkeypatch):
    asked = []
    monkeypatch.setattr("minisd.critters.data.caption", lambda *told, **how: asked.append((told[2], how)) or "a cat")
    data, _ = seen(Latents, renders)
    asked.clear()
    data.batch(ALL.repeat(50), some())
    assert all(how == {"plain": True} for _, how in asked)
    left_out = np.array([drop for drop, _ in asked])
    assert set(left_out.round(6)) == {0, 0.15} and 0.4 < (left_out == 0).mean() < 0.6  # four deviations of 400 coins


def test_cells_count_by_their_share_of_eyes(renders, eyes):
    _, batch = seen(Latents, renders)
    share = eyes.numpy().reshape(8, 1, 8, 8, 8, 8).mean((3, 5))
    expected = 1 + 7 * torch.from_numpy(share)[VISITS]
    assert torch.allclose(batch["weight"], expected, atol=1e-6) and 1.1 < expected.max() < 8


def chance_of_a_hole(size, points=200_000):
    """How likely a pixel is in a hole, from draws of one's own.

    Ellipses as often as rectangles, centred anywhere, 0.1 to 0.7 of half the picture to each side; one to three.
    """
    draw = np.random.default_rng(0)
    pixel, centre = draw.choice(np.linspace(-1, 1, size), (points, 1, 2)), draw.uniform(-1, 1, (points, 3, 2))
    away = np.abs(pixel - centre) / draw.uniform(0.1, 0.7, (points, 3, 2))
    inside = np.where(draw.random((points, 3)) < 0.5, (away**2).sum(2) < 1, away.max(2) < 1)
    return (inside & (np.arange(3) < draw.integers(1, 4, (points, 1)))).any(1).mean()


def test_holes_are_of_many_sizes_and_a_quarter_of_them_is_everything():
    white = holes(3000, 32, some())
    assert set(white.unique().tolist()) == {0, 1}
    share = white.mean((1, 2, 3))
    assert (share == 1).float().mean() == pytest.approx(0.25, abs=0.025) and (share > 0).all()  # three deviations
    partly = share[share < 1]
    assert partly.mean() == pytest.approx(chance_of_a_hole(32), abs=3 * partly.std().item() / len(partly) ** 0.5)
    assert partly.min() < 0.02 and partly.max() > 0.55
    assert (holes(200, 64, some(), whole=1) == 1).all() and (holes(200, 64, some(), whole=0).mean((1, 2, 3)) < 1).all()


def test_what_is_shown_beside_a_hole_is_the_rest_of_the_same_picture(renders):
    data, batch = seen(Holes, renders)
    assert batch["x_t"].shape == (200, 4 + 1 + 4, 8, 8)
    white = holes(8, 64, some())
    with torch.no_grad():
        rest = tiny().vae.encode(renders.pictures(ALL).where(white == 0, 0))
    cells, beside = batch["x_t"][:, 4:5], batch["x_t"][:, 5:]
    assert cells.equal(white[:, :, ::8, ::8][VISITS])
    assert torch.allclose(beside, rest[VISITS], atol=2e-3, rtol=1e-3)  # kept in half precision
    assert (data.shown[:, 1:].std(0) > 0).all()


def test_an_upscaler_is_shown_the_picture_in_a_pixel_a_cell_with_a_little_noise(renders):
    sd = tiny()
    data = Shrunk(renders, sd.vae, sd.tokenizer, sd.schedule)
    batch = data.batch(VISITS, some())
    assert batch["x_t"].shape == (200, 7, 8, 8)
    off = batch["x_t"][:, 4:] - renders.pictures(VISITS, size=8)
    most = sd.schedule.sigma(Shrunk.NOISE).item()
    levels = off.flatten(1).std(1)
    assert levels.min() < 0.25 * most and 0.7 * most < levels.max() < 1.3 * most
    assert abs(off.mean()) < 0.05 * most
    plain = Latents(renders, sd.vae, sd.tokenizer, sd.schedule).batch(VISITS, some())
    assert all(plain[name].equal(batch[name]) for name in ("t", "ids", "target")) and plain["x_t"].equal(
        batch["x_t"][:, :4]
    )


def test_edges_are_those_of_the_picture(renders):
    _, batch = seen(Edges, renders)
    assert batch["picture"].equal(edges(renders.pictures(VISITS))) and batch["picture"].mean() > 0.005


def test_depths_belong_to_their_pictures(renders):
    _, batch = seen(Depths, renders)
    near = 1 / depths(renders.scenes, CRITTERS_DEPTH.size)
    expected = depth_channel(near[VISITS], (8, 8))
    assert batch["x_t"].shape[1] == 5 and (batch["x_t"][:, 4:] - expected).abs().max() < 0.02  # kept in half precision


def test_labels_are_those_of_the_scene(renders):
    _, batch = seen(Labelled, renders)
    index = targets([renders.scenes[i] for i in VISITS.tolist()])
    assert all(batch[name].equal(index[name]) for name in WORDS)
    assert any((index[name] == UNSEEN).any() for name in WORDS) and len(index["look"].unique()) > 1


def test_stages_join_the_levels_of_four_steps_by_three_of_the_teachers(renders):
    data, _ = seen(Stages, renders)
    at = np.array([999, 916, 832, 749, 666, 582, 499, 416, 332, 249, 166, 82])  # the last of twelfths of a thousand
    levels = torch.cat([data.schedule.sigmas[torch.from_numpy(at)], torch.zeros(1, dtype=torch.float64)]).float()
    assert plan(data.schedule, 4, "trailing").timesteps.tolist() == at[::3].tolist()  # how the student is used
    visited = set()
    for step in range(30):
        batch = data.batch(ALL, some(step))
        (t,) = batch["t"].unique().tolist()
        stage = at.tolist().index(int(t))
        assert stage % 3 == 0 and torch.allclose(batch["sigmas"], levels[stage : stage + 4].expand(8, 4))
        assert batch["empty"].equal(data.tokenizer([""] * 8))
        visited.add(stage)
    assert visited == {0, 3, 6, 9}


def test_small_pictures_are_noised_on_the_schedule_of_ddpm(renders):
    data = SmallPictures(renders)
    batch = data.batch(VISITS, some())
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # Ho et al. 2020, section 4
    at = torch.from_numpy(alpha_bar[batch["t"].long().numpy()]).float().view(-1, 1, 1, 1)
    shrunk = torch.from_numpy(renders.pictures(ALL).numpy().reshape(8, 3, 32, 2, 32, 2).mean((3, 5)))[VISITS]
    signal = batch["x_t"] - (1 - at).sqrt() * batch["eps"]
    off = torch.stack([(signal - at.sqrt() * x0).abs().amax((1, 2, 3)) for x0 in (shrunk, shrunk.flip(3))])
    assert (off.amin(0) < 1.01 * at.flatten().sqrt() / 255 + 1e-6).all()  # they are kept in bytes
    early = batch["t"] < 500  # there signal enough is left to tell both sides apart
    assert 0.3 < off.argmin(0)[early].float().mean() < 0.7
    assert batch["t"].equal(batch["t"].floor()) and normal(batch["eps"])
    times = torch.cat([data.batch(VISITS, some(seed))["t"] for seed in range(20)])
    assert (times.min(), times.max()) == (0, 999) and times.mean() == pytest.approx(499.5, abs=14)  # three deviations


# What CLIP, the depth estimator and the oracle see


def test_captions_and_near_misses_come_with_the_picture_they_tell_of_the_true_one_first(renders, monkeypatch):
    sd = tiny()
    monkeypatch.setattr(renders, "scenes", [dataclasses.replace(s, look="left") for s in renders.scenes])
    monkeypatch.setattr(
        "minisd.critters.data.near_misses",
        lambda scene, _, count: [f"{scene.look} {scene.seed}", *("no" * n for n in range(count))],
    )
    batch = Captioned(renders, sd.tokenizer, 32).batch(VISITS, some())
    mirrored = sides(batch["image"], renders.pictures(VISITS, size=32))
    assert batch["ids"].shape[:2] == (200, 4) and NEAR_MISSES == 3
    for i, side, ids in zip(VISITS.tolist(), mirrored.long().tolist(), batch["ids"], strict=True):
        texts = [f"{('left', 'right')[side]} {renders.scenes[i].seed}", "", "no", "nono"]
        assert ids.equal(sd.tokenizer(texts)[:, : ids.shape[1]])
    ends = (batch["ids"] == sd.tokenizer.end).long().argmax(-1)
    assert (batch["ids"] == sd.tokenizer.end).any(-1).all() and ends.max() == batch["ids"].shape[2] - 1  # none is cut


def test_the_first_of_near_misses_is_true():
    random, said = some(), 0
    patterns = {"eyes": r"(\w+) eyes", "look": r"looking (\w+)", "studio": r"a (\w+) background"}
    for _ in range(200):
        scene = Scene.sample(random)
        true = captions.near_misses(scene, random, 3)[0]
        assert set(re.findall(r"\w+", true)) & set(captions.NOUNS[scene.species])
        for attribute, pattern in patterns.items():
            for word in re.findall(pattern, true):
                assert word in (getattr(scene, attribute), "plain")
                said += 1
    assert said > 150


def test_disparities_are_eight_heads_over_the_depth_of_the_picture_as_it_is_seen(renders):
    batch = Distances(renders, 32).batch(VISITS, some())
    mirrored = sides(batch["image"], renders.pictures(VISITS, size=32))
    expected = turned(8 / depths(renders.scenes, 32)[VISITS], mirrored)
    assert torch.allclose(batch["disparity"], expected, rtol=1e-3)  # kept in half precision


def test_examples_say_where_the_eyes_are_the_left_one_first_and_where_their_picture_looks(renders, eyes, monkeypatch):
    monkeypatch.setattr("minisd.critters.oracle.degraded", lambda images, _: images)
    scenes, pictures = renders.scenes, renders.pictures(ALL)
    data = Examples(((pictures + 1) * 127.5).round().byte(), scenes)
    batch = data.batch(VISITS, some())
    mirrored = sides(batch["image"], pictures[VISITS])
    places = eyes_on_screen(anatomy(scenes))[0][VISITS]
    right_and_left = torch.stack([places[:, 1], places[:, 0]], 1) * torch.tensor([-1, 1])
    assert batch["eyes_at"].equal(torch.where(mirrored[:, None, None], right_and_left, places))
    assert (batch["eyes_at"][:, 0, 0] < batch["eyes_at"][:, 1, 0]).all()
    near = (batch["look_at"] - batch["eyes_at"]) / 0.025
    assert abs(near.std() - 1) < 0.13 and abs(near.mean()) < 0.15  # five deviations of 800 draws

    pairs = zip(VISITS.tolist(), mirrored.tolist(), strict=True)
    index = targets([scenes[i].mirrored() if mirrored else scenes[i] for i, mirrored in pairs])
    assert all(batch[name].equal(index[name]) for name in WORDS)


def test_degraded_pictures_keep_to_their_range_and_change_as_much_as_is_said():
    """Pictures that are dark on the left and light on the right: their contrast, offset and noise can be read off."""
    half = torch.tensor([-0.5, 0.5])[:, None].expand(2, 16).flatten()
    image = half.expand(600, 3, 32, 32)
    result = degraded(image, some())
    left, right = result[..., :10], result[..., -10:]  # far from the middle, blurred or not
    low, high = left.mean((1, 2, 3)), right.mean((1, 2, 3))
    contrast, offset = high - low, (high + low) / 2
    noise = torch.sqrt((left.var((1, 2, 3)) + right.var((1, 2, 3))) / 2)
    for found, least, most in ((contrast, 0.9, 1.1), (offset, -0.08, 0.08), (noise, 0, 0.12)):
        assert found.mean() == pytest.approx((least + most) / 2, abs=(most - least) / 12**0.5 / 600**0.5 * 5)
        slack = 0.1 * (most - least)  # that of a thousand noisy pixels
        assert least - slack < found.min() < least + slack and most - slack < found.max() < most + slack

    lines = torch.tensor([-1.0, 1.0]).repeat(16).expand(600, 3, 32, 32)  # too fine to outlive a blur
    result = degraded(lines, some())
    assert result.min() == -1 and result.max() == 1
    kept = (result * lines).mean((1, 2, 3)) > 0.7
    assert 0.4 < kept.float().mean() < 0.6  # five deviations of 600 coins
