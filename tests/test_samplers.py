"""Samplers against reference runs, closed forms, and the exact denoiser of the toy clouds, in float64."""

import dataclasses
import json
import math
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch

from minisd import samplers, toy
from minisd import schedule as sch

GOLDEN = json.loads((Path(__file__).parent / "fixtures" / "sampler_steps.json").read_text())
SD = sch.scaled_linear()


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


X_INIT, NOISES = f64(GOLDEN["x_init_unit_normal"])[None], f64(GOLDEN["noise_sequence"])


# ---------------------------------------------------------------------------------------------------- reference runs


def mixture(x, sigma):
    """E[x0 | x] of the Gaussian mixture that stood in for a network in the reference runs."""
    net = GOLDEN["network"]
    means, variance = f64(net["means"]), f64(net["stds"]) ** 2 + sigma**2
    squared = (x[:, None] - means).square().sum(-1)
    weights = (f64(net["weights"]).log() - squared / (2 * variance) - means.shape[1] / 2 * variance.log()).softmax(-1)
    shrink = f64(net["stds"]) ** 2 / variance
    return (weights[..., None] * (means + shrink[:, None] * (x[:, None] - means))).sum(1)


def denoiser(plan, prediction):
    """A denoiser as a pipeline builds it: the network sees x_t and t, and answers with eps or v."""

    def denoise(x, sigma):
        alpha_bar = 1 / (1 + sigma**2)
        t = torch.cat([plan.timesteps[plan.sigmas[:-1] == sigma], SD.t(sigma)[None]])[0]  # the plan's, if it has one
        sigma_net = SD.sigma(t)  # the network keeps to its own schedule, whatever sigma the sampler is at
        x_t, alpha_bar_net = alpha_bar.sqrt() * x, 1 / (1 + sigma_net**2)
        x0 = mixture(x_t / alpha_bar_net.sqrt(), sigma_net)
        eps = (x_t - alpha_bar_net.sqrt() * x0) / (1 - alpha_bar_net).sqrt()
        if prediction == "epsilon":
            return (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        v = alpha_bar_net.sqrt() * eps - (1 - alpha_bar_net).sqrt() * x0
        return alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v

    return denoise


def run(sampler, denoise, x, sigmas, **knobs):
    """The states after each step, and how many noises were drawn."""
    draws = iter(NOISES)
    states = [x for x, _ in sampler(denoise, x, sigmas, lambda *_: next(draws)[None], **knobs)]
    return torch.cat(states), len(NOISES) - len(list(draws))


DDIM, DPM, WHOLE = {"to_zero": False}, {"rounded": True, "drop_penultimate": True}, {"rounded": True}
DIFFUSERS = [
    ("ddim_eta0_leading", samplers.ddim, "leading", DDIM, {}),
    ("ddim_eta0_leading", samplers.euler, "leading", DDIM, {}),
    ("ddim_eta1_leading", samplers.ddim, "leading", DDIM, {"eta": 1.0}),
    ("ddim_eta0_trailing", samplers.ddim, "trailing", DDIM, {}),
    ("ddim_eta0_set_alpha_to_one", samplers.ddim, "leading", {}, {}),
    ("ddpm_fixed_small_leading_offset1", samplers.ddpm, "leading", {}, {}),
    ("ddpm_v", samplers.ddpm, "leading", {}, {}),
    ("pndm_skip_prk", samplers.plms, "leading", DDIM, {}),
    ("euler_linspace", samplers.euler, "linspace", {}, {}),
    ("euler_leading", samplers.euler, "leading", {}, {}),
    ("euler_trailing", samplers.euler, "trailing", {}, {}),
    ("euler_karras", samplers.euler, "karras", {}, {}),
    ("euler_v", samplers.euler, "linspace", {}, {}),
    ("euler_a_linspace", samplers.euler_a, "linspace", {}, {}),
    ("heun_linspace", samplers.heun, "linspace", {}, {}),
    ("heun_karras", samplers.heun, "karras", {}, {}),
    ("lms_linspace", samplers.lms, "linspace", {}, {}),
    ("lms_karras", samplers.lms, "karras", {}, {}),
    ("dpmpp_2m_linspace", samplers.dpmpp_2m, "linspace", DPM, {}),
    ("dpmpp_2m_linspace_20", samplers.dpmpp_2m, "linspace", DPM, {}),
    ("dpmpp_2m_karras", samplers.dpmpp_2m, "karras", WHOLE, {}),
    ("dpmpp_2m_karras_20", samplers.dpmpp_2m, "karras", WHOLE, {}),
    ("dpmpp_2m_karras_v", samplers.dpmpp_2m, "karras", WHOLE, {}),
    ("unipc_bh2_linspace", samplers.unipc, "linspace", DPM, {}),
    ("unipc_karras", samplers.unipc, "karras", WHOLE, {}),
    ("unipc_v", samplers.unipc, "linspace", DPM, {}),
    ("dpmpp_2m_sde_karras", samplers.dpmpp_2m_sde, "karras", WHOLE, {}),
    ("dpmpp_sde_linspace", samplers.dpmpp_sde, "linspace", {}, {}),
    ("dpmpp_sde_karras", samplers.dpmpp_sde, "karras", {}, {}),
    ("lcm_4", samplers.lcm, "lcm", {}, {}),
    ("lcm_8", samplers.lcm, "lcm", {}, {}),
    ("ddim_zsnr_trailing_v", samplers.ddim, "trailing", DDIM, {}),
]


@pytest.mark.parametrize(
    "name, sampler, spacing, options, knobs", DIFFUSERS, ids=[f"{c[0]}-{c[1].__name__}" for c in DIFFUSERS]
)
def test_reference_runs_of_diffusers(name, sampler, spacing, options, knobs):
    golden = GOLDEN["diffusers"][name]
    plan = sch.plan(SD.with_zero_terminal_snr() if "zsnr" in name else SD, golden["n"], spacing, **options)
    if "sigmas" in golden:  # float32 levels, 1e-5 off, from which this run gets 4e-5 off: it is compared on them
        plan = dataclasses.replace(plan, sigmas=f64(golden["sigmas"]))
    in_x = golden["class"].startswith(
        ("Euler", "Heun", "LMS", "DPMSolverSDE")
    )  # the other schedulers' state is x_t, of unit variance at first
    x = X_INIT * (plan.init_scale if in_x else (1 + plan.sigmas[0] ** 2).sqrt())
    states, _ = run(sampler, denoiser(plan, golden["prediction_type"]), x, plan.sigmas, **knobs)
    to_x_t = (1 + plan.sigmas[1:, None] ** 2).rsqrt()
    expected = f64(golden["x_after_step"])
    if sampler in (samplers.heun, samplers.dpmpp_sde):  # two calls a step, one in the last
        expected = expected[[*range(1, len(expected), 2), -1]]
    if sampler is samplers.plms:  # two calls in the first step
        expected = expected[1:]
    torch.testing.assert_close(states * to_x_t, expected * to_x_t if in_x else expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", GOLDEN["kdiffusion"])
def test_reference_runs_of_k_diffusion(name):
    golden = GOLDEN["kdiffusion"][name]
    sigmas = f64(golden["sigmas"])
    sampler = getattr(samplers, name.removesuffix("_20").removesuffix("_v").removesuffix("_karras"))
    states, drawn = run(sampler, mixture, X_INIT * sigmas[0], sigmas)
    torch.testing.assert_close(states, f64(golden["x_after_step"]), rtol=0, atol=1e-7)
    assert drawn == golden["noises_used"]


@pytest.mark.parametrize(
    "name, sampler, knobs",
    [
        ("ddim_10_eta0", samplers.ddim, {}),
        ("ddim_10_eta1", samplers.ddim, {"eta": 1.0}),
        ("plms_10", samplers.plms, {}),
    ],
)
def test_reference_runs_of_latent_diffusion(name, sampler, knobs):
    plan = sch.plan(SD, 10, "leading", to_zero=False)
    states, _ = run(sampler, mixture, X_INIT * plan.init_scale, plan.sigmas, **knobs)
    states = states * (1 + plan.sigmas[1:, None] ** 2).rsqrt()
    torch.testing.assert_close(states, f64(GOLDEN["ldm"][name]["x_after_step"]), rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ancestral_is_ddim_in_other_variables(eta):
    """Song et al. 2021, eq. 12 and 16, in x_t and alpha_bar."""
    plan = sch.plan(SD, 12, "trailing", to_zero=False)
    states, _ = run(samplers.ancestral, mixture, X_INIT * 10, plan.sigmas, eta=eta)
    alpha_bar = 1 / (1 + plan.sigmas**2)
    x_t, draws, expected = X_INIT * 10 * alpha_bar[0].sqrt(), iter(NOISES), []
    for a, b, sigma in zip(alpha_bar, alpha_bar[1:], plan.sigmas, strict=False):
        x0 = mixture(x_t / a.sqrt(), sigma)
        eps = (x_t - a.sqrt() * x0) / (1 - a).sqrt()
        s = eta * ((1 - b) / (1 - a)).sqrt() * (1 - a / b).sqrt()
        x_t = b.sqrt() * x0 + (1 - b - s**2).sqrt() * eps + (s * next(draws) if eta else 0)
        expected.append(x_t / b.sqrt())
    torch.testing.assert_close(states, torch.cat(expected), rtol=0, atol=1e-12)


def test_ddpm_draws_from_the_posterior():
    """One step from t to t - 1 has the mean and variance of Ho et al. 2020, eq. 7."""
    t, x0 = 600, torch.linspace(-1, 1, 16, dtype=torch.float64)[None]
    beta, a, b = SD.betas[t], SD.alpha_bar[t], SD.alpha_bar[t - 1]
    x_t = X_INIT
    mean = b.sqrt() * beta / (1 - a) * x0 + (1 - beta).sqrt() * (1 - b) / (1 - a) * x_t
    deviation = ((1 - b) / (1 - a) * beta).sqrt()
    x = x_t / a.sqrt()
    [(state, predicted)] = samplers.ddpm(lambda *_: x0, x, SD.sigmas[[t, t - 1]], lambda *_: NOISES[:1])
    torch.testing.assert_close(state * b.sqrt(), mean + deviation * NOISES[:1], rtol=0, atol=1e-13)
    assert predicted is x0


def test_adams_bashforth_is_exact_for_cubic_slopes():
    """With dx/dsigma = 4 sigma^3 the multistep samplers make no error once they know four slopes."""

    def denoise(x, sigma):
        return x - sigma * 4 * sigma**3

    uneven, even = sch.plan(SD, 12, "karras").sigmas, torch.linspace(3, 0.1, 12, dtype=torch.float64)
    for sampler, sigmas in ((samplers.lms, uneven), (samplers.plms, even)):
        states, _ = run(sampler, denoise, f64([[0.0]]), sigmas)
        torch.testing.assert_close(states[3:].diff(dim=0)[:, 0], (sigmas**4)[4:].diff(), rtol=1e-9, atol=1e-10)


def test_lms_of_order_one_is_euler():
    sigmas = sch.plan(SD, 10, "karras").sigmas
    a, _ = run(samplers.lms, mixture, X_INIT * sigmas[0], sigmas, order=1)
    b, _ = run(samplers.euler, mixture, X_INIT * sigmas[0], sigmas)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_dpmpp_2m_sde_without_noise_is_dpmpp_2m():
    sigmas = sch.plan(SD, 10, "karras").sigmas
    a, drawn = run(samplers.dpmpp_2m_sde, mixture, X_INIT * sigmas[0], sigmas, eta=0.0)
    b, _ = run(samplers.dpmpp_2m, mixture, X_INIT * sigmas[0], sigmas)
    assert torch.equal(a, b) and drawn == 0


def test_dpmpp_sde_without_noise_is_dpmpp_2s():
    """Lu et al. 2022b, alg. 1 with r = 1/2, in lambda = -log sigma."""
    sigmas = sch.plan(SD, 10, "karras").sigmas[:-1]
    states, drawn = run(samplers.dpmpp_sde, mixture, X_INIT * sigmas[0], sigmas, eta=0.0)
    x, expected = X_INIT * sigmas[0], []
    for lambda_s, lambda_t in pairwise(-sigmas.log()):
        h = lambda_t - lambda_s
        u = (-h / 2).exp() * x - torch.expm1(-h / 2) * mixture(x, (-lambda_s).exp())
        x = (-h).exp() * x - torch.expm1(-h) * mixture(u, (-(lambda_s + h / 2)).exp())
        expected.append(x)
    torch.testing.assert_close(states, torch.cat(expected), rtol=0, atol=1e-12)
    assert drawn == 0


# ---------------------------------------------------------------------------------------------------- Brownian noise

INTERVALS = [(9, 2), (9, 5), (4, 1), (12, 9), (7, 0), (5, 4), (2, 1), (12, 0.5)]  # further, finer, back, overlapping


def brownian(*shape):
    generator = torch.Generator().manual_seed(0)
    return samplers.BrownianNoise(lambda: torch.randn(shape, generator=generator, dtype=torch.float64))


def pictures(*seeds):
    """Draws of a batch: each picture's out of its own generator."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(4, 3, 3, generator=generator) for generator in generators])


def test_brownian_noise_in_a_row_is_what_is_drawn():
    draw, noise = pictures(5, 6), samplers.BrownianNoise(pictures(5, 6))
    sigmas = sch.plan(SD.with_zero_terminal_snr(), 10, "trailing").sigmas
    drawn = [noise(*interval) for interval in pairwise(sigmas)]
    assert all(torch.equal(z, draw()) for z in drawn)
    assert all(torch.equal(noise(*interval), z) for interval, z in zip(pairwise(sigmas), drawn, strict=True))


@pytest.mark.parametrize("sampler", [samplers.ancestral, samplers.dpmpp_2m_sde, samplers.lcm])
def test_brownian_noise_changes_nothing_for_samplers_whose_intervals_do_not_overlap(sampler):
    sigmas, (draw, same) = sch.plan(SD, 10, "karras").sigmas.float(), (pictures(5, 6), pictures(5, 6))
    plain, path = (
        [x for x, _ in sampler(lambda x, sigma: x / (1 + sigma**2), sigmas[0] * draws(), sigmas, noise)][-1]
        for draws, noise in ((draw, lambda *_: draw()), (same, samplers.BrownianNoise(same)))
    )
    assert torch.equal(plain, path)


def test_brownian_noise_has_the_law_of_its_overlaps():
    n, noise = 100_000, brownian(100_000)
    z = torch.stack([noise(*interval) for interval in INTERVALS])
    expected = [
        [max(0, min(a, c) - max(b, d)) / math.sqrt((a - b) * (c - d)) for c, d in INTERVALS] for a, b in INTERVALS
    ]
    torch.testing.assert_close(z @ z.T / n, f64(expected), rtol=0, atol=4 * math.sqrt(2 / n))
    assert (z.mean(dim=1).abs() < 4 / math.sqrt(n)).all()


def test_brownian_changes_add_up():
    noise = brownian(1000)
    levels = [12, 9, 7, 5, 4, 2, 1, 0.5, 0]
    before = [noise(*interval) for interval in INTERVALS]
    path = [torch.zeros(1000, dtype=torch.float64), *(math.sqrt(a - b) * noise(a, b) for a, b in pairwise(levels))]
    at = dict(zip(levels, torch.stack(path).cumsum(0), strict=True))
    for (a, b), first in zip(INTERVALS, before, strict=True):
        torch.testing.assert_close(math.sqrt(a - b) * first, at[b] - at[a], rtol=0, atol=1e-13)
        torch.testing.assert_close(noise(a, b), first, rtol=0, atol=1e-13)


def test_brownian_noise_of_a_seed_is_the_same_in_every_batch():
    seeds = (5, 6, 7)
    batch, singles = samplers.BrownianNoise(pictures(*seeds)), [samplers.BrownianNoise(pictures(s)) for s in seeds]
    for interval in INTERVALS:
        assert torch.equal(batch(*interval), torch.cat([single(*interval) for single in singles]))


def test_strong_convergence():
    """Along one Brownian path, twice the steps bring every sample twice as close to where the SDE leads it."""
    cloud, noise = toy.cloud(n=60, width=0.6), brownian(128, 2)
    start = 5 * torch.randn(128, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def end(sampler, n):
        *_, (x, _) = sampler(cloud.denoise, start, torch.logspace(math.log10(5), -1, n + 1, dtype=torch.float64), noise)
        return x

    truth = end(samplers.dpmpp_sde, 320)
    for sampler in (samplers.ancestral, samplers.dpmpp_2m_sde, samplers.dpmpp_sde):
        few, many = ((end(sampler, n) - truth).square().mean().sqrt() for n in (20, 80))
        assert math.log2(few / many) / 2 == pytest.approx(1, abs=0.2), sampler


# ---------------------------------------------------------------------------------------------------- order and truth


@pytest.mark.parametrize(
    "sampler, order", [(samplers.euler, 1), (samplers.heun, 2), (samplers.dpmpp_2m, 2), (samplers.unipc, 3)]
)
def test_order_of_convergence(sampler, order):
    """Twice the steps, 2^order times smaller an error: on the exact denoiser of cats and dogs."""
    cloud = toy.cloud(n=60, width=0.25)
    start = 5 * torch.randn(32, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def end(sampler, n):
        ramp = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        sigmas = (5 ** (1 / 7) + ramp * (0.1 ** (1 / 7) - 5 ** (1 / 7))) ** 7
        return run(sampler, cloud.denoise, start, sigmas)[0][-32:]

    truth = end(samplers.unipc, 2000)
    errors = [(end(sampler, n) - truth).square().mean().sqrt() for n in (80, 160, 320)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders == pytest.approx([order, order], abs=0.15), orders


@pytest.mark.parametrize(
    "sampler", [samplers.euler, samplers.heun, samplers.lms, samplers.plms, samplers.dpmpp_2m, samplers.unipc]
)
def test_flow_of_a_single_gaussian(sampler):
    """The ODE carries x from sigma to sigma' by the factor sqrt((s^2 + sigma'^2) / (s^2 + sigma^2)) about the mean."""
    cloud = toy.Cloud(f64([[0.5, -1.0]]), torch.tensor([0]), ("one",), width=0.7)
    x = f64([[3.0, 2.0], [-4.0, 0.0]])
    sigmas = sch.plan(SD, 400, "karras").sigmas[50:-1]
    exact = cloud.points + (x - cloud.points) * ((0.49 + sigmas[-1] ** 2) / (0.49 + sigmas[0] ** 2)).sqrt()
    states, _ = run(sampler, cloud.denoise, x, sigmas)
    tolerance = 2e-2 if sampler is samplers.euler else 2e-4
    torch.testing.assert_close(states[-2:], exact, rtol=0, atol=tolerance)


def gaussian_samples(sampler, noise, n, **knobs):
    cloud = toy.Cloud(f64([[0.5]]), torch.tensor([0]), ("one",), width=0.7)
    sigmas, generator = sch.plan(SD, n, "karras").sigmas, torch.Generator().manual_seed(1)
    start = cloud.sample(20000, generator)[0] + sigmas[0] * torch.randn(20000, 1, generator=generator)
    *_, (x, _) = sampler(cloud.denoise, start, sigmas, noise, **knobs)
    return x


SDE = [samplers.ancestral, samplers.dpmpp_2m_sde, samplers.dpmpp_sde]


@pytest.mark.parametrize("sampler, eta", [(samplers.ancestral, 0.0), *product(SDE, (0.5, 1.0))])
def test_noise_keeps_the_distribution(sampler, eta):
    """Whatever the share of fresh noise, samples of a Gaussian come out with its mean and deviation."""
    x = gaussian_samples(sampler, brownian(20000, 1), 200 if sampler is samplers.ancestral else 100, eta=eta)
    assert x.mean().item() == pytest.approx(0.5, abs=0.02)  # 4 standard errors
    assert x.std().item() == pytest.approx(0.7, abs=0.02)  # 2, and what 200 ancestral steps leave off, 0.0124


def test_dpmpp_sde_needs_one_path():
    """Fresh noise for each of its overlapping intervals makes samples too narrow: 0.87 of the deviation, not 0.98."""
    generator = torch.Generator().manual_seed(0)
    one_path = gaussian_samples(samplers.dpmpp_sde, brownian(20000, 1), 20)
    fresh = gaussian_samples(samplers.dpmpp_sde, lambda *_: torch.randn(20000, 1, generator=generator).double(), 20)
    assert one_path.std().item() / 0.7 == pytest.approx(0.98, abs=0.02)
    assert fresh.std().item() / 0.7 == pytest.approx(0.87, abs=0.02)


# ---------------------------------------------------------------------------------------------------- the interface

ALL = [
    samplers.euler,
    samplers.ddim,
    samplers.ancestral,
    samplers.heun,
    samplers.lms,
    samplers.plms,
    samplers.dpmpp_2m,
    samplers.unipc,
    samplers.dpmpp_2m_sde,
    samplers.dpmpp_sde,
    samplers.lcm,
]


@pytest.mark.parametrize("sampler", ALL, ids=lambda sampler: sampler.__name__)
@pytest.mark.parametrize("n", [1, 2, 10])
def test_state_follows_x_and_ends_on_the_prediction(sampler, n):
    cloud = toy.cloud(n=50)
    plan = sch.plan(SD, n, "karras")
    x = plan.init_scale * torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
    steps = list(sampler(cloud.denoise, x, plan.sigmas, lambda *_: torch.zeros(8, 2)))
    assert len(steps) == n
    assert all(state.dtype == x0.dtype == torch.float32 and state.isfinite().all() for state, x0 in steps)
    if sampler not in (samplers.lms, samplers.plms):  # these two do not end on x0 but extrapolate past it
        torch.testing.assert_close(*steps[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "sampler, calls",
    [
        (samplers.euler, 10),
        (samplers.heun, 19),
        (samplers.plms, 11),
        (samplers.dpmpp_2m, 10),
        (samplers.unipc, 10),
        (samplers.dpmpp_2m_sde, 10),
        (samplers.dpmpp_sde, 19),
    ],
)
def test_number_of_calls(sampler, calls):
    seen = []
    sigmas = sch.plan(SD, 10, "karras").sigmas
    run(sampler, lambda x, sigma: seen.append(sigma) or mixture(x, sigma), X_INIT * sigmas[0], sigmas)
    assert len(seen) == calls
    assert sampler is samplers.dpmpp_sde or all((sigmas == sigma).any() for sigma in seen)


@pytest.mark.parametrize(
    "sampler, tolerance",
    [
        (samplers.euler, 5e-6),
        (samplers.dpmpp_2m, 5e-6),
        (samplers.unipc, 5e-6),
        (samplers.dpmpp_2m_sde, 5e-6),
        (samplers.dpmpp_sde, 5e-4),  # sigma_down of an ancestral step is a small difference of squares
    ],
)
def test_zero_terminal_snr_loses_nothing_in_float32(sampler, tolerance):
    """From sigma = 1e6, x + (sigma_next - sigma) * eps would leave x0 no digits; x0 + sigma_next * eps keeps them."""
    cloud = toy.cloud(n=50, width=0.1)
    plan = sch.plan(SD.with_zero_terminal_snr(), 20, "trailing")
    x = plan.init_scale * torch.randn(16, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    double, single = (
        [s for s, _ in sampler(cloud.denoise, x.to(d), plan.sigmas.to(d), brownian(16, 2))][-1]
        for d in (torch.float64, torch.float32)
    )
    torch.testing.assert_close(single.double(), double, rtol=0, atol=tolerance)


def test_a_path_above_a_level_can_be_forgotten():
    whole, short = brownian(5), brownian(5)
    for noise in (whole, short):
        noise(9, 4)
    short.forget(4)
    assert short.levels == [-4] and short.changes == []
    assert torch.equal(whole(4, 1), short(4, 1)) and torch.equal(whole(4, 2), short(4, 2))
    short.forget(1)
    assert short.levels == [-1]


@pytest.mark.parametrize("sampler", [samplers.euler, samplers.heun, samplers.plms, samplers.lms, samplers.dpmpp_2m])
def test_pure_noise_becomes_the_data(sampler):
    """From zero terminal SNR, for data of mean 0.3 and variance 0.9, whose denoiser is known."""
    plan = sch.plan(SD.with_zero_terminal_snr(), 8, "trailing")
    start = plan.init_scale * torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    *_, (x, _) = sampler(lambda x, s: 0.3 + 0.9 / (0.9 + s**2) * (x - 0.3), start, plan.sigmas, None)
    assert x.mean().item() == pytest.approx(0.3, abs=0.05) and 0.7 < x.std() < 1
