"""The oracle: a small network that reads a scene's attributes back from a picture, to measure what a model has drawn.

A convolutional trunk makes a map of 16 x 16 features. Every attribute has a query that looks somewhere on the map
(attention pooling), and so have the two eyes: the mean place of their attention is where they are, and a second small
network looks at them there from near, because the colour of an eye is a matter of a few pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..layers import ResidualBlock
from ..train.losses import UNSEEN, misreadings
from .anatomy import anatomy
from .camera import eyes
from .scene import WORDS, Scene

SIZE = 128  # pixels; other pictures are resized to this
CROP, REACH = 20, 0.17  # an eye is cut out in so many pixels, so far (in half widths of the picture) to each side
MIRRORED_LOOK = torch.tensor([WORDS["look"].index(look) for look in ("front", "right", "left")])


class Oracle(nn.Module):
    """Pictures to logits of every attribute in `WORDS`, 1.2 M parameters."""

    def __init__(self, width: int = 24, features: int = 128, groups: int = 6):
        super().__init__()
        self.stem = nn.Conv2d(12, width, 3, padding=1)
        self.early = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), ResidualBlock(2 * width, 2 * width, groups),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1), ResidualBlock(4 * width, 4 * width, groups),
        )  # fmt: skip
        self.late = nn.Sequential(
            nn.Conv2d(4 * width, features, 3, stride=2, padding=1), ResidualBlock(features, features, features // 8),
            ResidualBlock(features, features, features // 8),
        )  # fmt: skip
        self.near = nn.Conv2d(4 * width, features, 1)
        self.far = nn.Conv2d(features, features, 1)
        self.norm = nn.GroupNorm(features // 8, features)
        self.queries = nn.Parameter(torch.randn(len(WORDS) + 2, features) * features**-0.5)  # attributes, then two eyes
        self.places = nn.Parameter(torch.zeros(len(WORDS) + 2, SIZE // 8, SIZE // 8))  # where each is looked for
        self.heads = nn.ModuleDict({name: nn.Linear(2 * features, len(words)) for name, words in WORDS.items()})
        self.eye = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.GroupNorm(6, 48), nn.SiLU(),
            nn.Conv2d(48, 64, 3, stride=2, padding=1), nn.GroupNorm(8, 64), nn.SiLU(), nn.Flatten(),
            nn.Linear(64 * (CROP // 4) ** 2, 64), nn.SiLU(),
        )  # fmt: skip
        self.eye_colour = nn.Linear(64, len(WORDS["eyes"]))

    def forward(
        self, images: Float[Tensor, "b 3 h w"], look_at: Float[Tensor, "b 2 2"] | None = None
    ) -> tuple[dict[str, Tensor], Float[Tensor, "b 2 2"]]:
        """Logits [b, words] by attribute, and where the eyes are (u, v in -1..1, as `camera.eyes`).

        `look_at` says where to look for the colour of the eyes; by default where they were found.
        """
        images = as_seen(images)
        early = self.early(self.stem(F.pixel_unshuffle(images, 2)))  # b 4w 16 16
        late = self.late(early)  # b f 8 8
        map_ = F.silu(self.norm(self.near(early) + F.interpolate(self.far(late), scale_factor=2)))
        attention = torch.einsum("qc,bchw->bqhw", self.queries, map_) + self.places
        attention = attention.flatten(2).softmax(-1)
        seen = torch.einsum("bqn,bcn->bqc", attention[:, : len(WORDS)], map_.flatten(2))
        whole = late.mean((2, 3))
        logits = {name: head(torch.cat((seen[:, i], whole), 1)) for i, (name, head) in enumerate(self.heads.items())}
        found = attention[:, len(WORDS) :] @ _grid(SIZE // 8, images).flatten(0, 1)
        logits["eyes"] = logits["eyes"] + self._eye_colour(images, found.detach() if look_at is None else look_at)
        return logits, found

    def _eye_colour(self, images: Tensor, places: Float[Tensor, "b 2 2"]) -> Float[Tensor, "b words"]:
        down = places.new_tensor([1.0, -1.0])  # v points up, rows of a picture down
        window = _grid(CROP, images) * REACH + places[:, :, None, None]
        crops = F.grid_sample(images, (window * down).flatten(1, 2), align_corners=False)  # b 3 2*crop crop
        crops = crops.unflatten(2, (2, CROP)).transpose(1, 2).flatten(0, 1)
        return self.eye_colour(self.eye(crops).unflatten(0, (-1, 2)).amax(1))

    @torch.no_grad()
    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b f"]:
        """What the deepest map holds on average: to compare sets of pictures by, as Inception's features are."""
        return self.late(self.early(self.stem(F.pixel_unshuffle(as_seen(images), 2)))).mean((2, 3))

    @torch.no_grad()
    def probabilities(self, images: Float[Tensor, "b 3 h w"]) -> dict[str, Float[Tensor, "b words"]]:
        """How sure the oracle is of every word: for each attribute probabilities in the order of `WORDS`."""
        return {name: logits.softmax(-1) for name, logits in self(images)[0].items()}

    def read(self, images: Float[Tensor, "b 3 h w"]) -> list[dict[str, str]]:
        """The likeliest word of every attribute, for each picture.

        In a pencil sketch the fur, the eyes and the colour of a collar are guesses: it does not show them. Neither does
        a picture show the colour of the studio (`studio`) unless its background is "studio".
        """
        best = {name: p.argmax(-1).tolist() for name, p in self.probabilities(images).items()}
        return [{name: WORDS[name][best[name][i]] for name in WORDS} for i in range(len(images))]


def as_seen(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 128 128"]:
    """Pictures at the size at which the oracle looks at them."""
    if images.shape[-2:] == (SIZE, SIZE):
        return images
    return F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)


def _grid(size: int, like: Tensor) -> Float[Tensor, "size size 2"]:
    """u, v of the centres of a grid over the picture, from the top left."""
    centres = (torch.arange(size, device=like.device, dtype=like.dtype) + 0.5) / size * 2 - 1
    v, u = torch.meshgrid(-centres, centres, indexing="ij")
    return torch.stack((u, v), -1)


def shown(scene: Scene, name: str) -> bool:
    """Whether a picture of the scene can show the attribute: a pencil sketch has no colours."""
    if name == "studio":
        return scene.background == "studio" and scene.style != "pencil sketch"
    if scene.style != "pencil sketch":
        return True
    return name not in ("fur", "eyes") and not (name == "accessory" and "collar" in scene.accessory)


def targets(scenes: list[Scene]) -> dict[str, Tensor]:
    """What the oracle should say: an index [b] by attribute (UNSEEN where the picture does not show it).

    `eyes_at` [b, 2, 2] is where the eyes are.
    """
    indices = {
        name: torch.tensor([words.index(getattr(s, name)) if shown(s, name) else UNSEEN for s in scenes])
        for name, words in WORDS.items()
    }
    return indices | {"eyes_at": eyes(anatomy(scenes))[0]}


class Examples:
    """What the oracle learns from: pictures [n, 3, 128, 128] of 0..255 and their scenes, degraded at random."""

    def __init__(self, images: Tensor, scenes: list[Scene]):
        self.images, self.targets = images, targets(scenes)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Some examples, half of them mirrored; `look_at` is near the eyes, as near as the oracle will find them."""
        image = self.images[indices].float() / 127.5 - 1
        some = {name: values[indices] for name, values in self.targets.items()}
        mirrored = torch.rand(len(indices), generator=generator) < 0.5
        image = torch.where(mirrored[:, None, None, None], image.flip(3), image)
        some["look"] = torch.where(mirrored, MIRRORED_LOOK[some["look"]], some["look"])
        swapped = some["eyes_at"].flip(1) * torch.tensor([-1.0, 1.0])
        some["eyes_at"] = torch.where(mirrored[:, None, None], swapped, some["eyes_at"])
        near = some["eyes_at"] + 0.025 * torch.randn(some["eyes_at"].shape, generator=generator)
        return some | {"image": degraded(image, generator), "look_at": near}


def degraded(images: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
    """Pictures as an autoencoder or a sampler might return them: half are blurred, all changed in colour and noise."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), 1, 1, 1, generator=generator)

    size = images.shape[-1]
    small = F.interpolate(images, int(size / float(uniform(1.2, 3.0)[0])), mode="bilinear", antialias=True)
    blurred = F.interpolate(small, size, mode="bicubic")
    images = torch.where(uniform(0, 1) < 0.5, blurred, images)
    noise = torch.randn(images.shape, generator=generator)
    return (images * uniform(0.9, 1.1) + uniform(-0.08, 0.08) + noise * uniform(0, 0.12)).clamp(-1, 1)


def oracle_loss(oracle: Oracle, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of every attribute that shows, and the distance of the eyes from where they were found."""
    logits, found = oracle(batch["image"], batch["look_at"])
    parts = misreadings(logits, batch)
    parts["eyes_at"] = 5 * (found - batch["eyes_at"]).norm(dim=-1).mean()
    return torch.stack([*parts.values()]).sum(), {name: part.detach() for name, part in parts.items()}


def accuracy(oracle: Oracle, images: Float[Tensor, "b 3 h w"], scenes: list[Scene]) -> dict[str, dict[str, float]]:
    """Share of right readings by attribute and style ("all": of any), over the pictures that show the attribute."""
    read = [words for some in images.split(64) for words in oracle.read(some)]
    table: dict[str, dict[str, float]] = {}
    for name in WORDS:
        table[name] = {}
        for style in ("all", *WORDS["style"]):
            right = [
                words[name] == getattr(scene, name)
                for words, scene in zip(read, scenes, strict=True)
                if style in ("all", scene.style) and shown(scene, name)
            ]
            if right:
                table[name][style] = sum(right) / len(right)
    return table
