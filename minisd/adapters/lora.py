"""LoRA: a network learns something new by low-rank changes of its weights, which stay as they were (Hu et al. 2022).

A change is the product of two thin matrices, `W + up @ down`: few numbers, so that many can be kept beside one model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..files import CheckpointError

UP, DOWN = ".lora_up", ".lora_down"  # how the two are named in a file, behind their layer's name


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
    found = {}
    for name, layer in module.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            low_rank = layer.parametrizations.weight[0]
            found |= {name + UP: low_rank.up.detach(), name + DOWN: low_rank.down.detach()}
    return found


def merged(tensors: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's weights with changes put into them, in float32; a tensor that is no change takes its name's place.

    Raises CheckpointError for changes of a layer that the network does not have, or not in this shape.
    """
    result = dict(tensors)
    for name, tensor in changes.items():
        layer = name.removesuffix(UP)
        if layer != name:
            up, down, weight = tensor.float(), changes.get(layer + DOWN), tensors.get(layer + ".weight")
            if down is None or weight is None or (len(up), down.shape[1]) != weight.flatten(1).shape:
                raise CheckpointError(f"{name} changes no layer of this model: it belongs to another one")
            result[layer + ".weight"] = weight.float() + (up @ down.float()).view_as(weight)
        elif not name.endswith(DOWN):
            result[name] = tensor
    return result
