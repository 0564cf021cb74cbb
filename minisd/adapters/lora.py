"""LoRA: a network learns something new by low-rank changes of its weights, which stay as they were (Hu et al. 2022).

A change is the product of two thin matrices, `W + up @ down`: few numbers, so that many can be kept beside one model.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..weights.native import DOWN, UP


class LowRank(nn.Module):
    """`W + up @ down` (Hu et al. 2022, equation 3): `up` starts at zero, so that nothing is changed yet.

    A convolution's weight counts as a matrix with a row an output channel.
    """

    def __init__(self, weight: Float[Tensor, "o ..."], rank: int):
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.up = nn.Parameter(weight.new_zeros(rows, rank))
        self.down = nn.Parameter((torch.randn(rank, columns) / math.sqrt(rank)).to(weight))

    def forward(self, weight: Float[Tensor, "o ..."]) -> Float[Tensor, "o ..."]:
        return weight + (self.up @ self.down).view_as(weight)


def attach(module: nn.Module, rank: int) -> None:
    """Freeze a network, and let its linear layers and convolutions learn changes of this rank."""
    module.requires_grad_(False)
    for layer in list(module.modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d):
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))


def changes(module: nn.Module) -> dict[str, Tensor]:
    """What was attached to a network, by its layers' names: ready to be kept in a file."""
    found: dict[str, Tensor] = {}
    for name, layer in module.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            low_rank = layer.parametrizations.weight[0]
            found |= {name + UP: low_rank.up.detach(), name + DOWN: low_rank.down.detach()}
    return found
