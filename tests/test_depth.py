"""The depth estimator against transformers' and the published code's, and the channel that the U-Net is given."""

import functools
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from peers import depth_names, depth_peer

from minisd.config import DepthConfig
from minisd.depth import DPT, depth_channel, network_size
from minisd.weights.naming import unused

PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "depth.json").read_text(encoding="utf-8"))
TINY = DepthConfig(
    size=64, stem=16, widths=(32, 64, 96), blocks=(2, 1, 2), groups=4, width=32, heads=4, taps=(1, 2), fusion=16
)


@functools.cache
def numbers(name, shape):
    """A tensor that depends on its name alone, as the goldens were made."""
    v = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        v /= math.sqrt(math.prod(shape[1:]))
    else:
        v = 1 + 0.1 * v if name.endswith("weight") else 0.1 * v
    return torch.from_numpy(v).float()


def by_formula(depth):
    """Weights after the names in the published checkpoint, where an attention's q, k and v are thirds of one tensor."""
    tensors, names = {}, depth_names(depth)
    for name, tensor in depth.state_dict().items():
        published, _ = names[name]
        if "qkv" in published:
            whole = numbers(published, (3 * len(tensor), *tensor.shape[1:]))
            tensors[name] = whole.chunk(3)["qkv".index(name.split(".")[-2])]
        else:
            tensors[name] = numbers(published, tuple(tensor.shape))
    depth.load_state_dict(tensors, assign=True)
    return depth.eval().requires_grad_(False)


def pictures(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("side", [64, 96, 32])
def test_depth_equals_transformers(side):
    """On the grid that the positions were made for, and on others, where they are stretched."""
    depth = by_formula(DPT(TINY))
    depth.head[4].bias.data = torch.tensor([9.0])  # so that the last ReLU hides nothing
    peer = depth_peer(depth)
    peer.dpt.embeddings.image_size = (side, side)  # it would refuse another size, though its table stretches too
    image = pictures(2, 3, side, side)
    ours, theirs = depth(image), peer(image).predicted_depth[:, None]
    assert theirs.min() > 0
    assert (ours - theirs).abs().max() < 5e-5 * theirs.std()  # measured: 1e-5; 1e-6 of the largest


def test_dpt_hybrid_equals_the_published_code():
    with torch.device("meta"):
        depth = DPT(DepthConfig())
    depth = by_formula(depth)
    numbers.cache_clear()
    image = torch.from_numpy(np.random.RandomState(21).standard_normal((1, 3, 96, 64)) * 0.5).float()
    every_37th = depth(image).flatten()[::37]
    assert (every_37th - torch.tensor(PUBLISHED["dpt_hybrid_every_37th"])).abs().max() < 5e-4


def test_every_tensor_has_its_place_in_the_published_checkpoint():
    with torch.device("meta"):
        depth = DPT(DepthConfig())
    shapes = {}
    for name, (published, _) in depth_names(depth).items():
        shape = list(depth.state_dict()[name].shape)
        shapes.setdefault(published, [0 if "qkv" in published else shape[0], *shape[1:]])
        shapes[published][0] += shape[0] if "qkv" in published else 0
    dead = {name: shape for name, shape in PUBLISHED["tensors"].items() if unused("depth", name, 0)}
    assert shapes | dead == PUBLISHED["tensors"]
    assert not shapes.keys() & dead.keys()
    alive = sum(p.numel() for p in depth.parameters())
    assert alive == 121_196_289
    assert alive + sum(math.prod(shape) for shape in dead.values()) == 123_146_985


def test_every_weight_is_used():
    depth = DPT(TINY)
    depth(pictures(2, 3, 64, 64)).sum().backward()
    assert [name for name, p in depth.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize(("picture", "network"), PUBLISHED["network_sizes"], ids=str)
def test_network_sizes_are_the_published(picture, network):
    width, height = picture
    assert network_size(height, width, 384) == (network[1], network[0])


def test_the_narrowest_picture_keeps_some_width():
    assert network_size(3000, 10, 384) == (384, 32)


def cubic(old, new):
    """The matrix that resizes a line as OpenCV's INTER_CUBIC does: Keys' cubic with a = -0.75, the edge repeated."""
    matrix, a = torch.zeros(new, old), -0.75
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d = abs(centre - j)
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(j, 0), old - 1)] += near if d <= 1 else far
    return matrix


def test_estimate_looks_at_the_picture_resized_as_midas_does():
    depth = by_formula(DPT(TINY))
    image = pictures(1, 3, 80, 120)
    seen = depth.estimate(image)
    assert seen.shape == (1, 1, 64, 96)
    assert torch.allclose(seen, depth(cubic(80, 64) @ image @ cubic(120, 96).T), atol=3e-5)  # measured: 5e-6


def test_the_channel_spans_minus_one_to_one_in_every_picture():
    disparity = torch.stack([pictures(1, 24, 40) + 1, 500 * pictures(1, 24, 40, seed=2) + 900])
    channel = depth_channel(disparity, (3, 5))
    assert channel.shape == (2, 1, 3, 5)
    assert torch.equal(channel.amin(dim=(1, 2, 3)), torch.tensor([-1.0, -1.0]))
    assert torch.allclose(channel.amax(dim=(1, 2, 3)), torch.tensor([1.0, 1.0]))
    own = depth_channel(disparity, (24, 40))[0, 0]
    assert torch.equal(own.flatten().argsort(), disparity[0, 0].flatten().argsort())  # larger stays nearer
    assert torch.allclose(depth_channel(7 * disparity + 3, (3, 5)), channel, atol=2e-6)  # scale and shift are unknown


def test_a_flat_picture_is_as_far_as_can_be():
    assert torch.equal(depth_channel(torch.full((1, 1, 8, 8), 4.2), (2, 2)), torch.full((1, 1, 2, 2), -1.0))
