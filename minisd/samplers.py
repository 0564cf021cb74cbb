"""Samplers: from a denoiser and a list of noise levels to a sample, one short generator each.

All share one interface, `sampler(denoise, x, sigmas, noise)`, in the variables `x = x0 + sigma * eps`:

- `denoise(x, sigma)` returns the predicted clean sample `x0`; `sigma` is a 0-dim tensor, one of `sigmas` (`dpmpp_sde`
  asks between two of them as well);
- `x` starts at the noise level `sigmas[0]`; the state keeps its shape, dtype and device;
- `sigmas` falls strictly, n + 1 entries for n steps; the last may be 0;
- `noise(sigma, sigma_next)` returns unit normal noise shaped like `x`, as a `BrownianNoise` does; deterministic
  samplers never call it.

Each yields `(x, x0)` after every step: the state at `sigma_next`, and the prediction that led there. Noise levels and
timesteps belong to `schedule.plan`, prompts and guidance to `denoise`. In the code, `eps = (x - x0) / sigma` is the
noise that the denoiser sees in `x`; it is also the slope dx/dsigma of the probability flow ODE (Karras et al. 2022,
eq. 1, in which sigma(t) = t), and `-eps / sigma` is the score.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import pairwise
from math import prod, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

State = Float[Tensor, "b *shape"]
Sigma = Float[Tensor, ""]
Denoise = Callable[[State, Sigma], State]
Noise = Callable[[Sigma, Sigma], State]
Steps = Iterator[tuple[State, State]]


def euler(denoise: Denoise, x: State, sigmas: Float[Tensor, "n_plus_1"], noise: Noise) -> Steps:
    """Keep the predicted clean sample, put back less of the predicted noise (Karras et al. 2022, alg. 1, first half).

    The same as `x + (sigma_next - sigma) * eps`, an Euler step of the ODE; order 1. It is also DDIM with eta = 0
    (Song et al. 2021, eq. 12) seen through `x = x_t / sqrt(alpha_bar)`.
    """
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        eps = (x - x0) / sigma
        x = x0 + sigma_next * eps
        yield x, x0


def ancestral(denoise: Denoise, x: State, sigmas: Float[Tensor, "n_plus_1"], noise: Noise, eta: float = 1.0) -> Steps:
    """Step down below `sigma_next`, then climb back to it with fresh noise (Song et al. 2021, eq. 12 and 16).

    `eta` scales the fresh part: 0 is `euler`; 1 draws from the posterior q(x_next | x, x0) of the forward process, as
    DDPM (Ho et al. 2020, eq. 7) and k-diffusion's "Euler ancestral" do. A step to 0 adds no noise.
    """
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        eps = (x - x0) / sigma
        sigma_up = eta * sigma_next * (1 - (sigma_next / sigma) ** 2).sqrt()
        sigma_down = (sigma_next**2 - sigma_up**2).sqrt()
        x = x0 + sigma_down * eps
        if sigma_up > 0:
            x = x + sigma_up * noise(sigma, sigma_next)
        yield x, x0


def ddim(denoise: Denoise, x: State, sigmas: Float[Tensor, "n_plus_1"], noise: Noise, eta: float = 0.0) -> Steps:
    """`ancestral` under its other name, with DDIM's default of no fresh noise (Song et al. 2021)."""
    return ancestral(denoise, x, sigmas, noise, eta)


ddpm = euler_a = ancestral


def heun(denoise: Denoise, x: State, sigmas: Float[Tensor, "n_plus_1"], noise: Noise) -> Steps:
    """Take an Euler step to look ahead, then go by the mean of both slopes (Karras et al. 2022, alg. 1); order 2.

    A step to 0 is plain Euler, for there the second slope is 0 / 0: n steps cost 2n - 1 calls. So is one out of pure
    noise (zero terminal SNR): the mean of both slopes moves x by half of `sigma / sigma_next` times x0's change.
    """
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        eps = (x - x0) / sigma
        if sigma_next > 0 and sigma < 1e4:
            ahead = x + (sigma_next - sigma) * eps
            eps = (eps + (ahead - denoise(ahead, sigma_next)) / sigma_next) / 2
        x = x + (sigma_next - sigma) * eps
        yield x, x0


def lms(denoise: Denoise, x: State, sigmas: Float[Tensor, "n_plus_1"], noise: Noise, order: int = 4) -> Steps:
    """Fit a polynomial in sigma through the last `order` slopes and integrate it (Adams-Bashforth with uneven steps).

    The weight of a slope is the integral of its Lagrange polynomial from sigma to sigma_next (Hairer, Norsett &
    Wanner 1993, section III.5). Two Gauss points integrate a cubic exactly, so `order` may be 1 to 4.
    """
    history: list[tuple[Sigma, State]] = []
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        history = [(sigma, (x - x0) / sigma), *history[: order - 1]]
        step = sigma_next - sigma
        for at in (sigma + step * (0.5 - 12**-0.5), sigma + step * (0.5 + 12**-0.5)):
            for s, eps in history:
                lagrange = prod((at - other) / (s - other) for other, _ in history if other is not s)
                x = x + step / 2 * lagrange * eps
        yield x, x0


# Weights of the newest slope, the one before, ... for 1 to 4 slopes known.
ADAMS_BASHFORTH = [(1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]


def plms(denoise: Denoise, x: State, sigmas: Float[Tensor, "n_plus_1"], noise: Noise) -> Steps:
    """Take one `heun` step, then Adams-Bashforth steps as if sigmas were even (PNDM: Liu et al. 2022); n + 1 calls."""
    slopes: list[State] = []
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        slopes = [(x - x0) / sigma, *slopes[:3]]
        eps = sum(weight * slope for weight, slope in zip(ADAMS_BASHFORTH[len(slopes) - 1], slopes, strict=True))
        if len(slopes) == 1 and sigma_next > 0 and sigma < 1e4:
            ahead = x + (sigma_next - sigma) * eps
            eps = (eps + (ahead - denoise(ahead, sigma_next)) / sigma_next) / 2
        x = x + (sigma_next - sigma) * eps
        yield x, x0


def dpmpp_2m(denoise: Denoise, x: State, sigmas: Float[Tensor, "n_plus_1"], noise: Noise) -> Steps:
    """Extrapolate x0 along its last change, then step exactly for a constant x0 (Lu et al. 2022b, alg. 2); order 2.

    `h` is the step in lambda = -log sigma. The first step, and one to 0 (where h is infinite), use x0 as it is.
    """
    x0_old = h_old = None
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        h = (sigma / sigma_next).log()
        mean = x0
        if x0_old is not None and sigma_next > 0:
            mean = x0 + h / (2 * h_old) * (x0 - x0_old)
        x = mean + sigma_next / sigma * (x - mean)
        x0_old, h_old = x0, h
        yield x, x0


def unipc(denoise: Denoise, x: State, sigmas: Float[Tensor, "n_plus_1"], noise: Noise) -> Steps:
    """Step as `dpmpp_2m`; once x0 at the step's end is known, mend the step (Zhao et al. 2023, UniPC-2); order 3.

    In lambda = -log sigma, a step of length h is exact if `mean` is that of x0 over 0 < u < h, weighted by e^u. The
    predictor takes x0 halfway along the line through the last two x0, the corrector follows the parabola through three:
    `u` is the mean of u, and h - 2 u that of u (u - h). x0 is not predicted anew at the mended x, so n steps cost n
    calls. This is the paper's B(h) = e^h - 1 ("bh2"); with B(h) = h ("bh1") a step to 0 is infinity times 0.
    """
    x0_old = mean = ratio = h = h_old = None
    slope: State | None = None
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        if x0_old is not None:  # mean, ratio and h are still those of the step that led here
            slope_old = slope
            slope = (x0 - x0_old) / h
            mended = x0_old + h / 2 * slope
            if slope_old is not None:
                u = h / (1 - ratio) - 1
                mended = x0_old + u * slope + (h - 2 * u) * (slope - slope_old) / (h_old + h)
            x = x + (1 - ratio) * (mended - mean)
        h_old, h, ratio = h, (sigma / sigma_next).log(), sigma_next / sigma
        mean = x0
        if slope is not None and sigma_next > 0:
            mean = x0 + h / 2 * slope
        x = mean + ratio * (x - mean)
        x0_old = x0
        yield x, x0


def dpmpp_2m_sde(
    denoise: Denoise, x: State, sigmas: Float[Tensor, "n_plus_1"], noise: Noise, eta: float = 1.0
) -> Steps:
    """Step as `dpmpp_2m`, along the SDE: go down further, then add fresh noise (Lu et al. 2022b, SDE-DPM-Solver++(2M)).

    `eta` scales the SDE's noise: 0 is `dpmpp_2m`; 1 adds as much as `ancestral` does, and between them it adds more.
    Other tools call this way to use the last x0 "midpoint".
    """
    x0_old = h_old = None
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        h = (sigma / sigma_next).log()
        mean = x0
        if x0_old is not None and sigma_next > 0:
            mean = x0 + h / (2 * h_old) * (x0 - x0_old)
        ratio = sigma_next / sigma
        x = mean + ratio ** (1 + eta) * (x - mean)
        sigma_up = sigma_next * (1 - ratio ** (2 * eta)).sqrt()
        if sigma_up > 0:
            x = x + sigma_up * noise(sigma, sigma_next)
        x0_old, h_old = x0, h
        yield x, x0


def dpmpp_sde(denoise: Denoise, x: State, sigmas: Float[Tensor, "n_plus_1"], noise: Noise, eta: float = 1.0) -> Steps:
    """Take an `ancestral` step halfway in log sigma, then the whole step with the x0 seen there; 2n - 1 calls.

    DPM-Solver++(2S) (Lu et al. 2022b, alg. 1, r = 1/2) made stochastic, as k-diffusion does ("DPM++ SDE"). Both steps
    set out from the same x: `noise` must be one path's, for fresh noise in each makes the samples too narrow.
    """
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        if sigma_next > 0:
            middle = (sigma * sigma_next).sqrt()
            x0 = denoise(_ancestral_step(x, x0, sigma, middle, noise, eta), middle)
        x = _ancestral_step(x, x0, sigma, sigma_next, noise, eta)
        yield x, x0


def _ancestral_step(x: State, x0: State, sigma: Sigma, sigma_next: Sigma, noise: Noise, eta: float) -> State:
    """Where `ancestral` goes from x when the prediction is x0."""
    [(x, _)] = ancestral(lambda *_: x0, x, torch.stack([sigma, sigma_next]), noise, eta)
    return x


def lcm(denoise: Denoise, x: State, sigmas: Float[Tensor, "n_plus_1"], noise: Noise) -> Steps:
    """Jump to the predicted clean sample, then noise it anew to the next level (Song et al. 2023, alg. 1).

    For latent consistency models (Luo et al. 2023), whose denoiser is trained to land in one jump. Their boundary
    weights c_skip and c_out are left out: at the timesteps of the "lcm" plan c_skip is below 1e-5.
    """
    for sigma, sigma_next in pairwise(sigmas):
        x = x0 = denoise(x, sigma)
        if sigma_next > 0:
            x = x0 + sigma_next * noise(sigma, sigma_next)
        yield x, x0


class BrownianNoise:
    """`noise(sigma, sigma_next)` from one Brownian path, made as it is asked for out of what `draw()` returns.

    `draw` gives fresh unit normal noise of one shape; where each picture of a batch draws from a generator of its own,
    each has a path of its own. The path runs in sigma. A call returns its change from one level down to another, scaled
    to unit variance: changes over [a, b] and [b, c], scaled back, add up to that over [a, c]. `dpmpp_sde` needs this,
    for its intervals overlap; to other samplers, whose every interval starts where the last one ended, it is plain
    fresh noise, bit for bit. The whole path is kept, one draw a level, until `forget`.
    """

    def __init__(self, draw: Callable[[], State]):
        self.draw = draw
        self.levels: list[float] = []  # every level known so far, as -sigma, rising
        self.changes: list[State] = []  # of the path from each level to the next, scaled to unit variance

    def __call__(self, sigma: Tensor | float, sigma_next: Tensor | float) -> State:
        assert sigma > sigma_next, (sigma, sigma_next)
        first, last = self._index(sigma), self._index(sigma_next)
        length = self.levels[last] - self.levels[first]
        parts = zip(self.changes[first:last], pairwise(self.levels[first : last + 1]), strict=True)
        return sum((sqrt((b - a) / length) * change for change, (a, b) in parts), start=torch.zeros(()))

    def forget(self, sigma: Tensor | float) -> None:
        """Drop the path above a level: whoever has stepped down to it does not ask for that again."""
        passed = bisect_left(self.levels, -float(sigma))
        del self.levels[:passed], self.changes[:passed]

    def _index(self, sigma: Tensor | float) -> int:
        """Where a level stands in the path; an unknown one is drawn first."""
        level = -float(sigma)
        i = bisect_left(self.levels, level)
        if level in self.levels[i : i + 1]:
            return i
        if 0 < i < len(self.levels):  # the Brownian bridge: the known change and a fresh one, turned by an angle
            share = (level - self.levels[i - 1]) / (self.levels[i] - self.levels[i - 1])
            cos, sin, known, fresh = sqrt(share), sqrt(1 - share), self.changes[i - 1], self.draw()
            self.changes[i - 1 : i] = [cos * known + sin * fresh, sin * known - cos * fresh]
        elif self.levels:
            self.changes.insert(i, self.draw())
        self.levels.insert(i, level)
        return i
