"""Every loss is the number that its formula gives, worked out here by hand or in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peers import randomise
from tiny import CONFIG, tiny
from torch import nn

from minisd import samplers
from minisd.adapters.controlnet import Controlled, ControlNet
from minisd.classifier import NoisyClassifier
from minisd.config import UNetConfig
from minisd.critters import WORDS
from minisd.critters.oracle import oracle_loss
from minisd.schedule import plan, scaled_linear
from minisd.train.losses import (
    UNSEEN,
    Predictor,
    classifier_loss,
    clip_loss,
    control_loss,
    decoder_loss,
    depth_loss,
    diffusion_loss,
    distillation_loss,
    misreadings,
    noise_loss,
    reconstruction_loss,
    unexplained,
    vae_loss,
)
from minisd.unet import WayDown
from minisd.vae import VAE, Gaussian


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def single(x):
    return torch.from_numpy(np.asarray(x, np.float32))


# Pictures


def four_pixels():
    """A picture of 2 x 2, another that is not quite like it, how much each pixel weighs; and the two parts of its loss.

    The errors are 1, -2, 0.5 and 0, of which the third weighs threefold: by pixel |e| + e^2 / 2 is 1.5, 4, 0.625 and 0,
    weighted 7.375 together. Weighted errors differ by 0.5 and 2 from row to row, by 3 and 1.5 along them.
    """
    image = torch.tensor([[0.5, -0.25], [-0.5, 0.75]]).expand(2, 3, 2, 2)
    error = torch.tensor([[1.0, -2.0], [0.5, 0.0]]) * torch.tensor([1.0, -1.0, 1.0])[:, None, None]
    weight = torch.tensor([[1.0, 1.0], [3.0, 1.0]]).expand(2, 1, 2, 2)
    parts = {"pixel": 7.375 / 4, "edge": (0.5 + 2) / 2 + (3 + 1.5) / 2}
    return image + error, {"image": image, "weight": weight}, parts


def test_a_reconstruction_pays_for_its_errors_and_their_edges_pixel_by_pixel():
    output, batch, expected = four_pixels()
    loss, parts = reconstruction_loss(output, batch)
    assert parts == expected and loss == sum(expected.values())
    assert reconstruction_loss(batch["image"], batch)[0] == 0


def test_a_decoder_is_judged_by_what_it_makes_of_the_latent_it_is_given():
    output, batch, expected = four_pixels()
    vae = SimpleNamespace(reconstruct=lambda z: 1 - z)
    loss, parts = decoder_loss(vae, batch | {"z": 1 - output})
    assert parts == expected and loss == sum(expected.values())


def unexplained_by_hand(z, colour):
    """Both sides made white, in float64: the squares of the singular values between them are what is explained."""
    white = []
    for x in (z, colour):
        x = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)
        x = x - x.mean(1, keepdims=True)
        white.append(np.linalg.solve(np.linalg.cholesky(x @ x.T / x.shape[1] + 1e-4 * np.eye(len(x))), x))
    return len(white[1]) - (np.linalg.svd(white[1] @ white[0].T / white[0].shape[1], compute_uv=False) ** 2).sum()


def vae_loss_by_hand(mean, logvar, noise, image, weight):
    """The four terms for an autoencoder that shows a latent's first three channels, each cell as 2 x 2 pixels."""
    z = mean + np.exp(logvar / 2) * noise
    error = z[:, :3].repeat(2, 2).repeat(2, 3) - image
    pixel = (weight * (np.abs(error) + error**2 / 2)).mean()
    edge = np.abs(np.diff(weight * error, axis=2)).mean() + np.abs(np.diff(weight * error, axis=3)).mean()
    kl = (mean**2 + np.exp(logvar) - 1 - logvar).mean() / 2
    colour = unexplained_by_hand(z, image.reshape(len(image), 3, 4, 2, 4, 2).mean((3, 5)))
    return pixel + edge + 1e-4 * kl + 0.3 * colour, {"pixel": pixel, "edge": edge, "kl": kl, "colour": colour}


def test_an_autoencoder_pays_for_errors_for_divergence_and_for_colours_its_latents_do_not_tell():
    mean, logvar = 30 * draw(5, 4, 4, 4, seed=1), 3 * draw(5, 4, 4, 4, seed=2)  # far from the unit normal
    noise, image = 0.1 * draw(5, 4, 4, 4, seed=3), draw(5, 3, 8, 8, seed=4)
    weight = 1 + np.abs(draw(5, 1, 8, 8, seed=5))
    expected, terms = vae_loss_by_hand(mean, logvar, noise, image, weight)
    assert 1e-4 * terms["kl"] > 0.03 and 0.3 * terms["colour"] > 0.3  # each term is a good part of what is compared

    moments = [single(x).requires_grad_() for x in (mean, logvar)]
    vae = SimpleNamespace(
        config=SimpleNamespace(factor=2),
        posterior=lambda _: Gaussian(*moments),
        reconstruct=lambda z: z[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3),
    )
    loss, parts = vae_loss(vae, {"image": single(image), "weight": single(weight), "noise": single(noise)})
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(terms, rel=1e-6)

    loss.backward()  # and every term is felt: along any direction the slope is that of the formula
    for seed in range(6, 9):
        a, b = draw(2, 5, 4, 4, 4, seed=seed)
        high, low = (vae_loss_by_hand(mean + h * a, logvar + h * b, noise, image, weight)[0] for h in (1e-5, -1e-5))
        slope = (single(a) * moments[0].grad + single(b) * moments[1].grad).sum()
        assert slope.item() == pytest.approx((high - low) / 2e-5, rel=2e-6)


def test_log_variances_stay_between_minus_30_and_20_so_that_the_divergence_is_finite():
    vae = randomise(VAE(CONFIG.vae))
    image = torch.zeros(1, 3, 16, 16)
    assert vae.posterior(image).logvar.abs().max() < 5
    with torch.no_grad():
        vae.quant.bias[4:6] -= 500
        vae.quant.bias[6:] += 500
    posterior = vae.posterior(image)
    assert (posterior.logvar[:, :2] == -30).all() and (posterior.logvar[:, 2:] == 20).all()
    assert posterior.kl().isfinite().all() and posterior.sample(torch.ones(1, 4, 2, 2)).isfinite().all()


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


# Words


def test_each_picture_looks_for_its_caption_among_all_and_each_true_caption_for_its_picture():
    table = 2 * draw(3, 9)  # how much a picture and a text are alike
    table[2, 4] = 6
    pictures = np.array([2, 0, 1])
    texts = np.array([[4, 7, 0], [3, 1, 8], [6, 2, 5]])  # by picture: first the true one
    clip = SimpleNamespace(similarity=lambda image, ids: single(table)[image[:, 0, 0, 0].long()][:, ids[:, 0]])
    image = single(pictures)[:, None, None, None].expand(3, 3, 2, 2)
    loss, parts = clip_loss(clip, {"image": image, "ids": torch.from_numpy(texts)[:, :, None]})

    lost = []
    for picture, true in zip(pictures, texts[:, 0], strict=True):
        lost.append(-np.log(np.exp(table[picture, true]) / np.exp(table[picture]).sum()))
        lost.append(-np.log(np.exp(table[picture, true]) / np.exp(table[:, true]).sum()))
    assert loss.item() == pytest.approx(np.mean(lost), rel=1e-6)
    found = [table[picture].argmax() == true for picture, true in zip(pictures, texts[:, 0], strict=True)]
    assert 0 < sum(found) < 3 and parts["accuracy"].item() == pytest.approx(np.mean(found))


# What is on a picture


def readings():
    """Logits of every attribute for five pictures, the words they should give, and the cross-entropies in float64."""
    logits = {name: 2 * draw(5, len(words), seed=i) for i, (name, words) in enumerate(WORDS.items())}
    indices = {name: np.arange(5) % len(words) for name, words in WORDS.items()}
    indices["studio"] = np.full(5, UNSEEN)  # no picture shows one
    indices["fur"] = np.array([2, UNSEEN, 0, UNSEEN, UNSEEN])
    lost = {}
    for name, index in indices.items():
        probabilities = np.exp(logits[name]) / np.exp(logits[name]).sum(1, keepdims=True)
        each = [-np.log(probabilities[i, word]) for i, word in enumerate(index) if word != UNSEEN]
        lost[name] = np.mean(each) if each else 0
    return {n: single(x) for n, x in logits.items()}, {n: torch.from_numpy(x) for n, x in indices.items()}, lost


def test_an_attribute_is_misread_only_where_it_shows():
    logits, indices, lost = readings()
    parts = misreadings(logits, indices)
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(lost, rel=1e-6)


def test_the_classifier_pays_for_every_attribute_as_it_reads_the_noisy_latent():
    logits, indices, lost = readings()
    x_t, t = torch.ones(5, 4, 2, 2), torch.arange(5.0)
    asked = []
    loss, parts = classifier_loss(lambda *told: asked.append(told) or logits, indices | {"x_t": x_t, "t": t})
    assert len(asked) == 1 and asked[0][0] is x_t and asked[0][1] is t
    assert loss.item() == pytest.approx(sum(lost.values()), rel=1e-6)
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(lost, rel=1e-6)


def test_the_oracle_also_pays_five_times_the_distance_from_each_eye():
    logits, indices, lost = readings()
    eyes = single(draw(5, 2, 2))
    off = torch.tensor([[0.03, 0.04], [-0.12, 0.05]])  # 0.05 and 0.13 away: 0.09 on average
    image, look_at = torch.zeros(5, 3, 128, 128), torch.ones(5, 2, 2)
    batch, asked = indices | {"image": image, "look_at": look_at, "eyes_at": eyes}, []
    loss, parts = oracle_loss(lambda *told: asked.append(told) or (logits, eyes + off), batch)
    assert len(asked) == 1 and asked[0][0] is image and asked[0][1] is look_at
    assert {n: part.item() for n, part in parts.items()} == pytest.approx(lost | {"eyes_at": 0.45}, rel=1e-6)
    assert loss.item() == pytest.approx(sum(lost.values()) + 0.45, rel=1e-6)


FORM = UNetConfig(widths=(8, 16, 24), blocks=1, attention=(False, True, True), heads=2, context_dim=None, groups=4)


def test_a_classifier_goes_down_as_a_unet_does_and_looks_for_each_attribute_somewhere_on_the_map():
    counts = {"species": 2, "fur": 6, "look": 3}
    classifier, way = randomise(NoisyClassifier(FORM, counts)), WayDown(FORM)
    own = classifier.state_dict()
    way.load_state_dict({name: own.get(name, tensor) for name, tensor in way.state_dict().items()})
    with torch.no_grad():
        classifier.looks.weight.mul_(20)  # so that each looks at few places
        x_t, t = single(draw(2, 4, 16, 8)), torch.tensor([20.0, 900.0])
        logits, (_, (*_, lowest), _) = classifier(x_t, t), way.descend(x_t, t)
        norm = classifier.norm_out(lowest).double()
        map_ = (norm * norm.sigmoid()).flatten(2).numpy()  # b c n

    assert map_.shape == (2, 24, 8)  # two halvings of 16 x 8
    for i, (name, count) in enumerate(counts.items()):
        look, head = classifier.looks, classifier.heads[name]
        interest = np.exp(np.einsum("c,bcn->bn", look.weight[i].double().numpy(), map_) + look.bias[i].item())
        place = interest / interest.sum(1, keepdims=True)
        assert place.max(1).min() > 0.3
        expected = np.einsum("wc,bcn,bn->bw", head.weight.double().numpy(), map_, place) + head.bias.double().numpy()
        assert logits[name].shape == (2, count)
        assert np.abs(logits[name].numpy() - expected).max() < 5e-6 * np.abs(expected).max()


def test_a_depth_estimator_pays_for_the_distance_of_its_disparities_scale_and_shift_and_all():
    near = torch.tensor([[[[1.0, 0.5], [2.0, 0.25]]]])
    batch = {"image": near.expand(1, 3, 2, 2), "disparity": near}  # a picture that is as light as it is near
    off = torch.tensor([3.0, -0.5])
    assert depth_loss(lambda image: image[:, :1] + off, batch) == ((3 + 0.5) / 2, {})
    assert depth_loss(lambda image: image[:, :1] + 3, batch) == (3, {})
    assert depth_loss(lambda image: 2 * image[:, :1], batch) == (3.75 / 4, {})


# Noise


def noisy(count=3, **more):
    """A batch for a noise predictor that reads words."""
    return {
        "x_t": single(draw(count, 4, 8, 8, seed=1)),
        "t": torch.tensor([3.0, 500.0, 998.0])[:count],
        "ids": tiny().tokenizer(["a cat", "", "a black dog in the snow"][:count]),
        "target": single(draw(count, 4, 8, 8, seed=2)),
        "weight": single(1 + 7 * np.random.default_rng(3).random((count, 1, 8, 8))),
        **more,
    }


def weighted_by_hand(predicted, batch):
    predicted, target, weight = (x.double().numpy() for x in (predicted, batch["target"], batch["weight"]))
    return (weight * (predicted - target) ** 2).mean()


@torch.no_grad()
def test_a_noise_predictor_pays_the_squared_distance_from_its_target_weighted_by_cell():
    sd, batch = tiny(), noisy()
    said = [sd.unet(batch["x_t"][i : i + 1], batch["t"][i : i + 1], sd.text(batch["ids"][i : i + 1])) for i in range(3)]
    loss, parts = diffusion_loss(Predictor(sd.text, sd.unet), batch)
    assert loss.item() == pytest.approx(weighted_by_hand(torch.cat(said), batch), rel=1e-6) and parts == {}


@torch.no_grad()
def test_a_controlnet_pays_what_the_predictor_does_whom_it_shows_each_picture():
    sd, control = tiny(), randomise(ControlNet(CONFIG.unet, (4, 6, 8, 8)), seed=2)
    for weight in control.parameters():
        weight.mul_(3 if weight.ndim > 1 else 1)  # so that it minds whatever it is told
    picture = single(np.random.default_rng(4).random((3, 1, 64, 64)) < 0.1)
    batch = noisy(picture=picture)
    said = []
    for i in range(3):
        one = slice(i, i + 1)
        shown = Controlled(sd.unet, control, torch.cat([picture[one]] * 3, dim=1))
        said.append(shown(batch["x_t"][one], batch["t"][one], sd.text(batch["ids"][one])))
    loss, _ = control_loss(Predictor(sd.text, sd.unet), control, batch)
    expected = weighted_by_hand(torch.cat(said), batch)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    unheard, _ = diffusion_loss(Predictor(sd.text, sd.unet), batch)
    unseen, _ = control_loss(Predictor(sd.text, sd.unet), control, batch | {"picture": picture.flip(0)})
    assert abs(unheard - expected) > 1e-3 * expected and abs(unseen - expected) > 1e-3 * expected  # measured: 2e-3


def test_a_predictor_of_pixels_pays_the_squared_distance_from_the_noise():
    x_t, eps, t = single(draw(3, 3, 4, 4, seed=1)), single(draw(3, 3, 4, 4, seed=2)), torch.tensor([0.0, 0.5, 2.0])
    loss, parts = noise_loss(lambda x_t, t: t[:, None, None, None] * x_t, {"x_t": x_t, "eps": eps, "t": t})
    wrong = t.double().numpy()[:, None, None, None] * x_t.double().numpy() - eps.double().numpy()
    assert loss.item() == pytest.approx((wrong**2).mean(), rel=1e-6) and parts == {}


# Distillation


class Teller:
    """A network whose v is so many times the latent, plus its time in thousands, plus the words it is told."""

    def __init__(self, gain):
        self.gain, self.conv_in = gain, nn.Conv2d(4, 4, 1, dtype=torch.float64)

    def __call__(self, x_t, t, context, label=None):
        return self.gain * x_t + (t / 1000 + context.mean((1, 2)))[:, None, None, None]


def distilled(teacher, student, sigmas, guidance=3.0):
    """The loss of a student whose words "1" say 0.4 and no words -0.2; the latent, and both predictions of v."""
    batch = {
        "x_t": torch.from_numpy(draw(2, 4, 3, 3)),
        "ids": torch.ones(2, 5, dtype=torch.int64),
        "empty": torch.zeros(2, 5, dtype=torch.int64),
        "sigmas": sigmas.expand(2, -1),
    }
    says, schedule = torch.tensor([-0.2, 0.4], dtype=torch.float64), scaled_linear()
    pupil = SimpleNamespace(text=lambda ids: says[ids][:, :, None], unet=student)
    loss, parts = distillation_loss(teacher, schedule, guidance, pupil, batch)
    assert parts == {}

    def v(network, x, sigma, words):
        return network.gain * x / (1 + sigma**2).sqrt() + schedule.t(sigma) / 1000 + words

    def guided(x, sigma):
        return v(teacher, x, sigma, -0.2 + guidance * (0.4 + 0.2))

    return loss, batch["x_t"] * (1 + sigmas[0] ** 2).sqrt(), guided, lambda x, sigma: v(student, x, sigma, 0.4)


@pytest.mark.parametrize("step", range(4))
def test_where_the_teacher_takes_one_step_the_student_learns_its_guided_v(step):
    sigmas = plan(scaled_linear(), 4, "trailing").sigmas[step : step + 2]
    loss, x, guided, plain = distilled(Teller(0.3), Teller(-0.5), sigmas)
    expected = (guided(x, sigmas[0]) - plain(x, sigmas[0])).square().mean()  # the mean square of what v lacks
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("step", range(4))
def test_where_it_takes_three_the_student_learns_the_straight_way_to_their_end(step):
    """Whoever goes straight from `x` at the first noise level to `end` at the last comes to its x0 at level 0."""
    sigmas = plan(scaled_linear(), 12, "trailing").sigmas[3 * step : 3 * step + 4]
    loss, x, guided, plain = distilled(Teller(0.3), Teller(-0.5), sigmas)

    def x0(v, x, sigma):
        return (x / (1 + sigma**2).sqrt() - sigma * v(x, sigma)) / (1 + sigma**2).sqrt()

    *_, (end, _) = samplers.dpmpp_2m(lambda x, sigma: x0(guided, x, sigma), x, sigmas, None)
    target = x + (0 - sigmas[0]) * (end - x) / (sigmas[-1] - sigmas[0])
    expected = (1 + sigmas[0] ** -2) * (x0(plain, x, sigmas[0]) - target).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-7)  # times are told in float32


class Knowing:
    """A network that knows the clean latents: it says their v, and how far it is off."""

    def __init__(self, x0, off=0.0):
        self.alpha_bar, self.x0, self.off = scaled_linear().alpha_bar, x0, off
        self.conv_in = nn.Conv2d(4, 4, 1, dtype=torch.float64)

    def __call__(self, x_t, t, context, label=None):
        alpha_bar = self.alpha_bar[t.round().long()].view(-1, 1, 1, 1)
        x0 = self.x0.repeat(len(x_t) // len(self.x0), 1, 1, 1)
        return (alpha_bar.sqrt() * x_t - x0) / (1 - alpha_bar).sqrt() + self.off


@pytest.mark.parametrize("step", range(4))
def test_a_student_who_knows_the_latent_has_nothing_to_learn_of_a_teacher_who_does(step):
    sigmas = plan(scaled_linear(), 12, "trailing").sigmas[3 * step : 3 * step + 4]
    x0 = torch.from_numpy(draw(2, 4, 3, 3, seed=5))
    batch = {"x_t": torch.from_numpy(draw(2, 4, 3, 3)), "sigmas": sigmas.expand(2, -1)}
    batch |= dict.fromkeys(("ids", "empty"), torch.zeros(2, 5, dtype=torch.int64))
    for off in (0.0, 0.1):
        student = SimpleNamespace(text=lambda ids: torch.zeros(len(ids), 1, 1), unet=Knowing(x0, off))
        loss, _ = distillation_loss(Knowing(x0), scaled_linear(), 4.0, student, batch)
        assert loss.item() == pytest.approx(off**2, rel=1e-12, abs=1e-24)
