"""Schedules against the published formulas, and every spacing against the reference runs in fixtures/schedules.json."""

import json
from pathlib import Path

import pytest
import torch

from minisd import schedule as sch

GOLDEN = json.loads((Path(__file__).parent / "fixtures" / "schedules.json").read_text())
STEPS = json.loads((Path(__file__).parent / "fixtures" / "sampler_steps.json").read_text())
SD = sch.scaled_linear()


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, rtol=1e-5, atol=1e-6):
    """The references keep alpha_bar in float32: 1 - alpha_bar has lost 1e-5 of its value at t = 0, hence the 1e-6."""
    torch.testing.assert_close(actual, f64(expected), rtol=rtol, atol=atol)


def test_stable_diffusion_schedule():
    index = GOLDEN["base"]["index"]
    close(SD.alpha_bar[index], GOLDEN["base"]["alphas_cumprod_f64"], rtol=1e-14, atol=0)
    close(SD.sigmas[index], GOLDEN["base"]["sigma_f64"], rtol=1e-13, atol=0)


def test_zero_terminal_snr():
    golden = GOLDEN["zero_terminal_snr"]
    zero = SD.with_zero_terminal_snr()
    close(zero.alpha_bar[golden["index"]], golden["alphas_cumprod_f64"], rtol=1e-10, atol=1.1e-12)
    assert zero.sigmas[-1] == pytest.approx(1e6)


def test_linear_and_cosine():
    assert sch.linear().betas[[0, -1]].tolist() == [1e-4, 0.02]
    assert sch.linear().alpha_bar[-1].item() == pytest.approx(4.0358e-5, rel=1e-5)  # in plain Python: math.prod
    T, s = 1000, 0.008
    t = torch.arange(1, T, dtype=torch.float64)  # the last beta is clipped
    f = (((t / T + s) / (1 + s)) * torch.pi / 2).cos() ** 2
    f0 = torch.tensor(s / (1 + s) * torch.pi / 2, dtype=torch.float64).cos() ** 2
    torch.testing.assert_close(sch.cosine(T).alpha_bar[:-1], f / f0, rtol=1e-10, atol=0)
    assert sch.cosine(T).betas[-1] == 0.999


def test_sigma_and_t_are_inverse_and_stay_inside():
    t = torch.linspace(0, 999, 3001, dtype=torch.float64)
    torch.testing.assert_close(SD.t(SD.sigma(t)), t, rtol=0, atol=1e-9)
    torch.testing.assert_close(SD.sigma(torch.arange(1000)), SD.sigmas, rtol=1e-13, atol=0)
    assert SD.sigma(500.5) == pytest.approx((SD.sigmas[500] * SD.sigmas[501]).sqrt().item())
    assert SD.t(0.0) == 0 and SD.t(1e-9) == 0 and SD.t(1e9) == 999
    assert SD.sigma(-5) == pytest.approx(SD.sigmas[0].item()) and SD.sigma(2000) == pytest.approx(SD.sigmas[-1].item())


@pytest.mark.parametrize("case", STEPS["add_noise"]["cases"], ids=lambda case: f"t={case['t']}")
def test_add_noise(case):
    x0, eps = f64(STEPS["add_noise"]["x0"]), f64(STEPS["add_noise"]["noise"])
    close(SD.add_noise(x0[None], torch.tensor([case["t"]]), eps[None])[0], case["x_t"])


def test_add_noise_takes_each_sample_at_its_own_time():
    x0, eps = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    x_t = SD.add_noise(x0, torch.tensor([0, 999]), eps)
    assert x_t.dtype == torch.float32
    torch.testing.assert_close(x_t[:, 0, 0, 0], SD.alpha_bar[[0, -1]].sqrt().float())


DDIM, EULER, DPM = "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"
LCM = "LCMScheduler", "original_inference_steps=50,set_alpha_to_one=True"
CASES = [
    (DDIM, "sd_default(leading,offset1)", "leading", {"to_zero": False}),
    (DDIM, "trailing", "trailing", {"to_zero": False}),
    (DDIM, "linspace", "linspace", {"rounded": True}),
    (EULER, "linspace", "linspace", {}),
    (EULER, "leading_offset1", "leading", {}),
    (EULER, "trailing", "trailing", {}),
    (EULER, "karras", "karras", {}),
    (DPM, "linspace", "linspace", {"rounded": True, "drop_penultimate": True}),
    (DPM, "leading_offset1", "leading", {"rounded": True, "drop_penultimate": True}),
    (DPM, "karras", "karras", {"rounded": True}),
    (DPM, "final_sigma_min", "linspace", {"rounded": True, "drop_penultimate": True, "to_zero": False}),
    (*LCM, "lcm", {}),
]


@pytest.mark.parametrize("scheduler, variant, spacing, options", CASES, ids=lambda value: str(value))
def test_plan_against_diffusers(scheduler, variant, spacing, options):
    for n, golden in GOLDEN["schedules"][scheduler][variant].items():
        plan = sch.plan(SD, int(n), spacing, **options)
        close(plan.timesteps, golden["timesteps"], atol=2e-3 if spacing == "karras" else 1e-4)  # t of a float32 sigma
        if "sigmas" in golden:
            # between timesteps diffusers interpolates sigma, k-diffusion and we log sigma
            close(plan.sigmas, golden["sigmas"], atol=2e-5 if (scheduler, variant) == (EULER, "linspace") else 1e-6)


@pytest.mark.parametrize("spacing", ["linspace", "karras"])
def test_middles_of_dpmpp_sde_against_diffusers(spacing):
    """DPM++ SDE stops halfway in log sigma: diffusers plans these levels and their timesteps, we ask `SD.t`."""
    for n, golden in GOLDEN["schedules"]["DPMSolverSDEScheduler"][spacing].items():
        plan = sch.plan(SD, int(n), spacing)
        middles = (plan.sigmas[:-2] * plan.sigmas[1:-1]).sqrt()
        close(plan.sigmas[1:], golden["sigmas"][1::2], atol=2e-5 if spacing == "linspace" else 1e-6)
        close(plan.timesteps, golden["timesteps"][::2], atol=2e-3)
        close(SD.t(middles), golden["timesteps"][1::2], atol=3e-3)


@pytest.mark.parametrize("n", [10, 20, 50])
def test_plan_of_zero_terminal_snr_against_diffusers(n):
    golden = GOLDEN["schedules"]["DDIMScheduler"]["trailing_zsnr"][str(n)]
    plan = sch.plan(SD.with_zero_terminal_snr(), n, "trailing")
    close(plan.timesteps, golden["timesteps"])
    close(1 / (1 + plan.sigmas[:-1] ** 2), golden["alphas_cumprod"])


@pytest.mark.parametrize("n", [10, 20, 50])
def test_plan_against_latent_diffusion(n):
    golden = GOLDEN["ldm_ddim"][str(n)]
    plan = sch.plan(SD, n, "leading", to_zero=False)
    alpha_bar = (1 / (1 + plan.sigmas**2)).flip(0)
    close(alpha_bar[1:], golden["alphas"])
    close(alpha_bar[:-1], golden["alphas_prev"])


@pytest.mark.parametrize("n", [10, 20, 50])
def test_plan_against_k_diffusion(n):
    golden = GOLDEN["k_diffusion"][str(n)]
    plain, karras = sch.plan(SD, n, "linspace"), sch.plan(SD, n, "karras")
    close(plain.sigmas, golden["get_sigmas"])
    close(plain.timesteps, golden["t_of_sigmas"], atol=1e-4)
    close(karras.sigmas, golden["karras_rho7"])
    close(karras.timesteps, golden["karras_rho7_t"], atol=2e-3)
    close(sch.plan(SD, n, "exponential").sigmas, golden["exponential"])
    close(sch.plan(SD, n, "exponential").sigmas, golden["polyexponential_rho1"])


def test_initial_and_final_scale():
    assert sch.plan(SD, 10, "linspace").init_scale == pytest.approx(14.6146412)
    assert sch.plan(SD, 10, "leading").init_scale == pytest.approx(8.450066566, rel=1e-6)  # diffusers' Euler, leading
    assert sch.plan(SD, 10, "leading").final_scale == 1
    assert sch.plan(SD, 10, "leading", to_zero=False).final_scale == pytest.approx(SD.alpha_bar[0].sqrt().item())


def zero_terminal_snr(T):
    return sch.scaled_linear(T).with_zero_terminal_snr()


@pytest.mark.parametrize("make", [sch.linear, sch.scaled_linear, sch.cosine, zero_terminal_snr])
@pytest.mark.parametrize("spacing", [*sch.TIMESTEPS, *sch.SIGMAS])
@pytest.mark.parametrize("drop", [False, True])
def test_every_plan_falls_from_the_schedule_to_zero(make, spacing, drop):
    schedule = make(100)
    most = (50 if spacing == "lcm" else 100) - drop
    for n in {1, 2, 3, 7, 30, 49, most}:
        plan = sch.plan(schedule, n, spacing, drop_penultimate=drop)
        assert len(plan.sigmas) == n + 1 and len(plan.timesteps) == n
        assert (plan.sigmas.diff() < 0).all() and plan.sigmas[-1] == 0
        assert plan.sigmas[0] <= schedule.sigmas[-1] * (1 + 1e-12)
        torch.testing.assert_close(schedule.sigma(plan.timesteps), plan.sigmas[:-1], rtol=1e-10, atol=0)


@pytest.mark.parametrize("steps", [0, -1, True, 2.5, 1001, None, "20", float("nan")])
def test_steps_refused(steps):
    with pytest.raises(ValueError, match=r"steps .* a whole number from 1 to 1000"):
        sch.plan(SD, steps)


def test_lcm_and_unknown_spacing_refused():
    with pytest.raises(ValueError, match="from 1 to 50"):
        sch.plan(SD, 51, "lcm")
    with pytest.raises(ValueError, match=r"spacing is 'carras'; it must be one of linspace, .*, karras"):
        sch.plan(SD, 10, "carras")
