"""The segmenter: a small network that says which part of the critter each pixel shows, so that parts can be counted.

The oracle reads words; of a cat with three eyes it rightly says that they are blue. Whether a drawn animal is whole is
another question: how many eyes, ears, heads and tails has it, into how many pieces do its legs fall, does any part of
it float? Some of that is a matter of pose (a critter that looks aside may show one eye), so what is counted is compared
with what renders of the same species, pose and look show.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..layers import Downsample, ResidualBlock, Upsample
from .material import PARTS
from .oracle import as_seen, degraded
from .scene import Scene

# What is counted: connected pieces of these parts together, if they have so many of 128 x 128 pixels at least.
HEAD = ("head", "ears", "eyes", "nose", "tongue", "hat")
COUNTED = {
    "eyes": (("eyes",), 10),
    "ears": (("ears",), 16),
    "heads": (HEAD, 40),
    "legs": (("legs",), 30),
    "tails": (("tail",), 16),
    "animals": (PARTS[1:], 30),  # more than one: something floats
}


class Segmenter(nn.Module):
    """Pictures to logits of every part in `PARTS`, at 128 x 128 pixels: a U-Net that is told neither time nor words.

    It works on squares of 2 x 2 pixels: 1.2 M parameters.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96, 96), groups: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(12, widths[0], 3, padding=1)
        above, below = widths[:-1], widths[1:]
        self.down = nn.ModuleList(ResidualBlock(a, b, groups) for a, b in zip((widths[0], *above), widths, strict=True))
        self.shrink = nn.ModuleList(Downsample(width) for width in above)
        self.up = nn.ModuleList(
            ResidualBlock(a + b, a, groups) for a, b in reversed(list(zip(above, below, strict=True)))
        )
        self.enlarge = nn.ModuleList(Upsample(width) for width in reversed(below))
        self.norm = nn.GroupNorm(groups, widths[0])
        self.out = nn.Conv2d(widths[0], 4 * len(PARTS), 3, padding=1)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b parts 128 128"]:
        h, kept = self.stem(F.pixel_unshuffle(as_seen(images), 2)), []
        for block, shrink in zip(self.down, [*self.shrink, None], strict=True):
            h = block(h)
            if shrink is not None:
                kept.append(h)
                h = shrink(h)
        for block, enlarge in zip(self.up, self.enlarge, strict=True):
            h = block(torch.cat([enlarge(h), kept.pop()], dim=1))
        return F.pixel_shuffle(self.out(F.silu(self.norm(h))), 2)

    @torch.no_grad()
    def parts(self, images: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b 128 128"]:
        """The likeliest part at every pixel, as indices into `PARTS`."""
        return torch.cat([self(some).argmax(1) for some in images.split(32)])


def count(parts: Int[Tensor, "b h w"]) -> Int[Tensor, "b 6"]:
    """How many of each of `COUNTED` every picture shows."""
    return torch.cat([_count(some) for some in parts.split(32)])  # a small batch stays in the cache


def _count(parts: Int[Tensor, "b h w"]) -> Int[Tensor, "b 6"]:
    columns = []
    for names, smallest in COUNTED.values():
        mask = torch.isin(parts, torch.tensor([PARTS.index(name) for name in names], device=parts.device))
        columns.append(torch.tensor([int((sizes >= smallest).sum()) for sizes in pieces(mask)]))
    return torch.stack(columns, dim=1)


def pieces(mask: Bool[Tensor, "b h w"]) -> list[Int[Tensor, "k"]]:
    """The sizes of the connected pieces of each mask; pixels that touch at a corner are connected.

    Every pixel starts with a number of its own, and takes again and again the greatest of its neighbours' and then the
    one that the pixel of that number has by now, until nothing changes: all of a piece have the same then.
    """
    size = mask[0].numel()
    own = torch.arange(1, size + 1, device=mask.device).view(mask.shape[1:])
    number = torch.where(mask, own, 0)
    while True:
        greatest = F.max_pool2d(number.float(), 3, stride=1, padding=1).long() * mask
        nowadays = F.pad(greatest.flatten(1), (1, 0)).gather(1, greatest.flatten(1)).view_as(mask.long())
        if nowadays.equal(number):
            break
        number = nowadays
    return [one[one > 0].unique(return_counts=True)[1] for one in number.flatten(1)]


class Segments:
    """What the segmenter learns from: pictures [n, 3, 128, 128] of 0..255 and parts [n, 128, 128], half mirrored.

    The pictures are degraded at random, as the oracle's are, and have patches of each other in them.
    """

    def __init__(self, images: Tensor, parts: Tensor):
        self.images, self.parts = images, parts

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        image, parts = self.images[indices].float() / 127.5 - 1, self.parts[indices].long()
        mirrored = torch.rand(len(indices), generator=generator) < 0.5
        image = torch.where(mirrored[:, None, None, None], image.flip(3), image)
        parts = torch.where(mirrored[:, None, None], parts.flip(2), parts)
        image, parts = patched(image, parts, generator)
        return {"image": degraded(image, generator), "parts": parts}


def patched(
    image: Float[Tensor, "b 3 h w"], parts: Int[Tensor, "b h w"], generator: torch.Generator
) -> tuple[Float[Tensor, "b 3 h w"], Int[Tensor, "b h w"]]:
    """Half of the pictures with a rectangle of their neighbour in the batch somewhere in them, and its parts.

    In renders an eye is always in a face. In drawn pictures it may not be, and is an eye all the same: whoever has seen
    renders alone takes a tail in the sky for sky (after Yun et al. 2019, "CutMix").
    """
    image, parts, size = image.clone(), parts.clone(), image.shape[-1]
    images, labels = image.roll(1, 0), parts.roll(1, 0)
    for i in range(len(image)):
        if torch.rand((), generator=generator) < 0.5:
            height, width = torch.randint(size // 8, size // 2 + 1, (2,), generator=generator).tolist()
            top, row = torch.randint(size + 1 - height, (2,), generator=generator).tolist()
            left, column = torch.randint(size + 1 - width, (2,), generator=generator).tolist()
            here = slice(row, row + height), slice(column, column + width)
            there = slice(top, top + height), slice(left, left + width)
            image[i, :, *here], parts[i, *here] = images[i, :, *there], labels[i, *there]
    return image, parts


def segmentation_loss(segmenter: Segmenter, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the part at every pixel. Batch: `image` [b 3 128 128], `parts` [b 128 128]."""
    logits = segmenter(batch["image"]).float()
    right = (logits.argmax(1) == batch["parts"]).float().mean()
    return F.cross_entropy(logits, batch["parts"]), {"right": right}


def group(scene: Scene) -> str:
    """What decides how many parts show: whose renders a picture of the scene is compared with."""
    return f"{scene.species}, {scene.pose}, {scene.look}"


def as_usual(
    usual: dict[str, list[tuple[int, int]]], scenes: Sequence[Scene], counts: Int[Tensor, "n 6"]
) -> Bool[Tensor, "n 6"]:
    """Whether each count lies between what is usual for its scene's group."""
    ends = torch.tensor([usual[group(scene)] for scene in scenes])  # n 6 2
    return (counts >= ends[..., 0]) & (counts <= ends[..., 1])


def usual(scenes: Sequence[Scene], counts: Int[Tensor, "n 6"], share: float = 0.01) -> dict[str, list[tuple[int, int]]]:
    """For each group of scenes, what all but a `share` at either end of its renders show: lowest and highest counts."""
    groups: dict[str, list[int]] = {}
    for i, scene in enumerate(scenes):
        groups.setdefault(group(scene), []).append(i)
    ends = torch.tensor([share, 1 - share], dtype=torch.float64)
    table = {}
    for name, members in sorted(groups.items()):
        low, high = counts[members].double().quantile(ends, dim=0, interpolation="nearest").long().tolist()
        table[name] = list(zip(low, high, strict=True))
    return table
