"""What `fit` does with a gradient is clipping, AdamW and a moving average, as they stand in the papers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minisd.train import TrainConfig, fit

X = np.array([[3.0, -1.0], [0.5, 2.0], [-1.0, 1.5], [2.0, 2.0]])
Y = np.array([2.0, -1.0, 0.5, 3.0])
START = np.array([1.0, -2.0, 0.5])  # two weights and a bias


class Points:
    """Four points, all of them in every batch."""

    def __len__(self):
        return 4

    def batch(self, indices, generator):
        return {"x": torch.from_numpy(X)[indices], "y": torch.from_numpy(Y)[indices]}


def half_square_error(module, batch):
    return F.mse_loss(module(batch["x"])[:, 0], batch["y"]) / 2, {}


def by_hand(steps, lr, betas, weight_decay, max_grad_norm, ema):
    """Losses, norms of the gradient, the last weights and their average.

    (Clipping: Pascanu et al. 2013, algorithm 1. AdamW: Loshchilov & Hutter 2019, algorithm 2. The average forgets
    faster in the first steps: it keeps (n + 1) / (n + 10) of itself in step n, if that is less than `ema`.)
    """
    w, x, (beta1, beta2) = START.copy(), np.c_[X, np.ones(4)], betas
    average, m, v = w.copy(), np.zeros(3), np.zeros(3)
    losses, norms = [], []
    for n, rate in zip(range(steps), lr, strict=True):
        wrong = x @ w - Y
        gradient = wrong @ x / 4
        losses.append((wrong**2).mean() / 2)
        norms.append(np.sqrt((gradient**2).sum()))
        gradient = gradient * min(1, max_grad_norm / norms[-1])
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        w = (1 - rate * weight_decay) * w
        w = w - rate * (m / (1 - beta1 ** (n + 1))) / (np.sqrt(v / (1 - beta2 ** (n + 1))) + 1e-8)
        keep = min(ema, (n + 1) / (n + 10))
        average = keep * average + (1 - keep) * w
    return losses, norms, w, average


SETTINGS = {  # some of our own, and those that stand in `TrainConfig`
    "own": {"betas": (0.7, 0.9), "weight_decay": 0.2, "max_grad_norm": 4.0, "ema": 0.15},
    "default": {},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_three_steps_clip_the_gradient_move_by_adamw_and_average_the_weights(kind):
    module = nn.Linear(2, 1).double()
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(START[None, :2]))
        module.bias.fill_(START[2])

    def weights():
        return np.append(module.weight.detach().numpy()[0], module.bias.item())

    config = TrainConfig(steps=3, batch_size=4, lr=0.3, warmup=2, cooldown=0.5, **SETTINGS[kind])
    records = []
    for record in fit(module, half_square_error, Points(), config):
        records.append(record)
        last = weights()
    rates = [0.15, 0.3, 0.2]  # half way up; up; a third of the run is left, two thirds of its cooldown
    settings = {"betas": (0.9, 0.99), "weight_decay": 0.01, "max_grad_norm": 1.0, "ema": 0.999} | SETTINGS[kind]
    losses, norms, expected, average = by_hand(3, rates, **settings)
    assert norms[0] > settings["max_grad_norm"]
    assert kind == "default" or norms[2] < settings["max_grad_norm"]  # some are clipped, some are not
    assert [record.lr for record in records] == pytest.approx(rates)
    assert [record.loss for record in records] == pytest.approx(losses, rel=2e-7)  # kept in float32
    assert [record.grad_norm for record in records] == pytest.approx(norms, rel=2e-7)
    assert last == pytest.approx(expected, rel=1e-7)  # PyTorch adds 1e-6 to the norm that it clips by
    assert weights() == pytest.approx(average, rel=1e-7)
    assert [record.step for record in records] == [1, 2, 3]
