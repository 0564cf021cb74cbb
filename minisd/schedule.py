"""Noise schedules: how much noise each timestep holds, and which timesteps a run visits.

The forward process adds a little noise T times, `x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps`. After t steps
(Ho et al. 2020, eq. 4)

    x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps,     alpha_bar_t = prod_{s <= t} (1 - beta_s).

Networks see this variance preserving `x_t`. Samplers see `x = x_t / sqrt(alpha_bar_t) = x0 + sigma_t eps`, whose
noise level is `sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t)`; 1 / sigma^2 is the signal-to-noise ratio. Timesteps
count from 0, as Stable Diffusion's do. Everything is float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .checks import integer
from .config import ScheduleConfig


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A forward process, given by the variance `betas` of the noise that each of its T steps adds."""

    betas: Float[Tensor, "T"]

    @cached_property
    def alpha_bar(self) -> Float[Tensor, "T"]:
        """The share of the variance that is still signal after each step."""
        return (1 - self.betas).cumprod(0)

    @cached_property
    def sigmas(self) -> Float[Tensor, "T"]:
        """The noise level after each step, in units of the data; it grows with t."""
        return ((1 - self.alpha_bar) / self.alpha_bar).sqrt()

    def sigma(self, t: Float[Tensor, "*n"] | Int[Tensor, "*n"] | float) -> Float[Tensor, "*n"]:
        """The noise level at a timestep; between two timesteps log sigma is linear, beyond the ends it is constant."""
        t = torch.as_tensor(t, dtype=torch.float64).clamp(0, len(self.betas) - 1)
        low = t.long().clamp(max=len(self.betas) - 2)
        return torch.lerp(self.sigmas.log()[low], self.sigmas.log()[low + 1], t - low).exp()

    def t(self, sigma: Float[Tensor, "*n"] | float) -> Float[Tensor, "*n"]:
        """The timestep (fractional) at which the noise level is `sigma`: the inverse of `sigma(t)`."""
        log_sigma = torch.as_tensor(sigma, dtype=torch.float64).log()
        log_sigmas = self.sigmas.log()
        low = (torch.searchsorted(log_sigmas, log_sigma) - 1).clamp(0, len(log_sigmas) - 2)
        return low + ((log_sigma - log_sigmas[low]) / (log_sigmas[low + 1] - log_sigmas[low])).clamp(0, 1)

    def add_noise(
        self, x0: Float[Tensor, "b *shape"], t: Int[Tensor, "b"], eps: Float[Tensor, "b *shape"]
    ) -> Float[Tensor, "b *shape"]:
        """Jump from clean to noisy: `sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps`, each sample at its own t."""
        shape = (-1, *[1] * (x0.ndim - 1))
        signal = self.alpha_bar.sqrt().to(x0)[t].view(shape)
        noise = (1 - self.alpha_bar).sqrt().to(x0)[t].view(shape)
        return signal * x0 + noise * eps

    def with_zero_terminal_snr(self) -> NoiseSchedule:
        """Stretch sqrt(alpha_bar) so that the last step is pure noise and the first stays (Lin et al. 2024, alg. 1).

        The last alpha_bar becomes 1e-12, not 0, which keeps sigma finite (1e6).
        """
        root = self.alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square().clamp(min=1e-12)
        return NoiseSchedule(1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]]))


def linear(T: int = 1000, start: float = 1e-4, end: float = 0.02) -> NoiseSchedule:
    """Betas on a straight line, as in DDPM (Ho et al. 2020, section 4)."""
    return NoiseSchedule(torch.linspace(start, end, T, dtype=torch.float64))


def scaled_linear(T: int = 1000, start: float = 0.00085, end: float = 0.012) -> NoiseSchedule:
    """Square roots of betas on a straight line: Stable Diffusion's schedule (its published configurations)."""
    return NoiseSchedule(torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64).square())


def cosine(T: int = 1000) -> NoiseSchedule:
    """alpha_bar follows a squared cosine, gentle at both ends (Nichol & Dhariwal 2021, eq. 17; betas at most 0.999)."""
    t = torch.linspace(0, 1, T + 1, dtype=torch.float64)
    alpha_bar = ((t + 0.008) / 1.008 * math.pi / 2).cos().square()
    return NoiseSchedule((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999))


SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "linear": linear,
    "cosine": cosine,
    "scaled_linear": scaled_linear,
}  # by the names in a config


def from_config(config: ScheduleConfig) -> NoiseSchedule:
    """The schedule that a model was trained with."""
    schedule = SCHEDULES[config.name](config.steps, *config.ends or ())
    return schedule.with_zero_terminal_snr() if config.zero_terminal_snr else schedule


@dataclass(frozen=True, eq=False)
class Plan:
    """The noise levels that a run of n steps visits.

    A run starts from `init_scale` times unit normal noise and ends at `sigmas[-1]`; where that is not 0, the result
    is the last state times `final_scale`.
    """

    sigmas: Float[Tensor, "n_plus_1"]  # falling; the last one is where the run ends
    timesteps: Float[Tensor, "n"]  # what the network is told at each of the first n sigmas; may be fractional
    init_scale: float

    @property
    def final_scale(self) -> float:
        """`sqrt(alpha_bar)` at the end: 1 for a run that ends at 0."""
        return float(1 / (1 + self.sigmas[-1] ** 2).sqrt())


def plan(
    schedule: NoiseSchedule,
    steps: int,
    spacing: str = "linspace",
    *,
    to_zero: bool = True,
    rounded: bool = False,
    drop_penultimate: bool = False,
) -> Plan:
    """Choose `steps` noise levels out of a schedule, from the noisiest down.

    Spacing in t: "linspace" takes both ends (Euler and its kin); "trailing" the last of each of `steps` equal
    intervals; "leading" the first, plus 1 (DDIM and PLMS in Stable Diffusion; all three in Lin et al. 2024, table 2);
    "lcm" every so many of 50 trailing ones. Spacing in sigma: "karras" (Karras et al. 2022, eq. 5, rho = 7)
    and "exponential".

    The options say what other tools do differently. `to_zero=False` ends at alpha_bar_0, as Stable Diffusion's DDIM
    and PLMS do. `rounded` makes the timesteps whole, as diffusers does except in Euler, Heun and LMS.
    `drop_penultimate` plans one step more and leaves out the last level before the end: diffusers' DPM++, A1111's
    "discard penultimate sigma".

    Raises a ValueError for steps that are no whole number from 1 to T (to 50 for "lcm"), and for an unknown spacing.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing is {spacing!r}; it must be one of {', '.join(SPACINGS)}")
    T = len(schedule.betas)
    most = (LCM_STEPS if spacing == "lcm" else T) - drop_penultimate
    steps = integer(f"steps ({spacing})", steps, 1, most)
    points = steps + drop_penultimate

    if spacing in TIMESTEPS:
        t = TIMESTEPS[spacing](T, points)
        sigmas = schedule.sigma(t.round() if rounded else t)
    else:
        ramp = torch.linspace(0, 1, points, dtype=torch.float64)
        sigmas = SIGMAS[spacing](schedule.sigmas[-1], schedule.sigmas[0], ramp)
        t = schedule.t(sigmas)

    end = torch.zeros(1, dtype=torch.float64) if to_zero else schedule.sigmas[:1]
    first = float(sigmas[0])
    # "leading" and "lcm" belong to samplers on x_t, which start at unit variance; the others leave out the signal.
    init_scale = math.hypot(1, first) if spacing in ("leading", "lcm") else first
    return Plan(torch.cat([sigmas[:steps], end]), (t.round() if rounded else t)[:steps], init_scale)


def _leading(T: int, n: int) -> Float[Tensor, "n"]:
    stride = T // n
    offset = min(1, T - 1 - (n - 1) * stride)  # Stable Diffusion's steps_offset; at n = T there is no room for it
    return torch.arange(n - 1, -1, -1, dtype=torch.float64) * stride + offset


def _trailing(T: int, n: int) -> Float[Tensor, "n"]:
    return (torch.arange(n, 0, -1, dtype=torch.float64) * T / n).round() - 1


def _lcm(T: int, n: int) -> Float[Tensor, "n"]:
    return _trailing(T, LCM_STEPS)[torch.arange(n) * LCM_STEPS // n]


def _karras(highest: Tensor, lowest: Tensor, ramp: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    return torch.lerp(highest ** (1 / 7), lowest ** (1 / 7), ramp) ** 7


LCM_STEPS = 50  # the steps that latent consistency models were distilled with (Luo et al. 2023)
TIMESTEPS = {
    "linspace": lambda T, n: torch.linspace(T - 1, 0, n, dtype=torch.float64),
    "trailing": _trailing,
    "leading": _leading,
    "lcm": _lcm,
}
SIGMAS = {
    "karras": _karras,
    "exponential": lambda highest, lowest, ramp: highest * (lowest / highest) ** ramp,
}
SPACINGS = (*TIMESTEPS, *SIGMAS)
