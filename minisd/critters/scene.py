"""What to draw, in words: a `Scene` is one choice from each list of attributes, and a seed for everything unsaid."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace

import torch

SPECIES = ("cat", "dog")
FURS = ("orange", "black", "white", "gray", "brown", "cream")
PATTERNS = ("solid", "striped", "spotted", "tuxedo")
EYES = ("blue", "green", "yellow", "brown")
ACCESSORIES = ("none", "red collar", "blue collar", "party hat", "bow tie", "scarf")
BACKGROUNDS = ("grass", "beach", "night", "snow", "studio")
STUDIOS = ("pink", "mint", "lavender", "yellow", "peach", "blue")
STYLES = ("3d render", "cartoon", "pencil sketch", "watercolor", "pixel art")
POSES = ("portrait", "sitting", "lying", "standing")
LOOKS = ("front", "left", "right")

WORDS = {
    "species": SPECIES,
    "fur": FURS,
    "pattern": PATTERNS,
    "eyes": EYES,
    "accessory": ACCESSORIES,
    "background": BACKGROUNDS,
    "studio": STUDIOS,
    "style": STYLES,
    "pose": POSES,
    "look": LOOKS,
}

# How often a word is drawn, where not evenly: (relative) weights in the order of the vocabulary.
WEIGHTS = {
    "accessory": (2, 1, 1, 1, 1, 1),
    "style": (30, 20, 14, 20, 16),
    "pose": (2, 2, 1, 1),
    "look": (2, 1, 1),
}
PATTERN_WEIGHTS = {"cat": (2, 2, 0, 1), "dog": (2, 0, 2, 1)}  # cats have no spots here, dogs no stripes


@dataclass(frozen=True)
class Scene:
    """One critter in one place: attribute words, and a seed for all that the words leave open.

    The seed fixes proportions, ears, the turn of the head, the light, the clouds and the grain of the paper; two scenes
    that differ only in their seeds have the same caption. `studio` is the colour of the paper behind the critter
    and shows only where the background is "studio". `look` is left or right as the viewer sees it.

    Raises ValueError for a word outside its vocabulary (`WORDS`) and for combinations that cannot be drawn.
    """

    species: str = "cat"
    fur: str = "orange"
    pattern: str = "solid"
    eyes: str = "green"
    accessory: str = "none"
    background: str = "grass"
    studio: str = "mint"
    style: str = "3d render"
    pose: str = "sitting"
    look: str = "front"
    seed: int = 0

    def __post_init__(self):
        for name, words in WORDS.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of: {', '.join(words)}")
        if not PATTERN_WEIGHTS[self.species][PATTERNS.index(self.pattern)]:
            raise ValueError(
                f"pattern={self.pattern!r} is not for a {self.species}: cats are striped, dogs are spotted"
            )
        if self.fur == "white" and self.pattern == "tuxedo":
            raise ValueError("pattern='tuxedo' is a white chest and would not show on white fur; choose another fur")
        if not (isinstance(self.seed, int) and 0 <= self.seed < 2**63):
            raise ValueError(f"seed={self.seed!r} must be an integer from 0 to 2**63 - 1")

    @property
    def held_out(self) -> bool:
        """Whether this combination of species, fur, eyes, background and style is kept out of training (one in twenty).

        The rule reads the SHA-1 of the five words as a number and asks whether 20 divides it, so it is the same in
        every process and on every machine. Every word is seen in training, but not in every company: to draw a held-out
        combination takes composition, not memory.
        """
        combination = f"{self.species} {self.fur} {self.eyes} {self.background} {self.style}"
        return int(hashlib.sha1(combination.encode()).hexdigest(), 16) % 20 == 0

    @classmethod
    def sample(cls, generator: torch.Generator, split: str = "train") -> Scene:
        """Draw a random scene: `split` is "train", "held-out" (combinations never trained on), or "all"."""
        if split not in ("train", "held-out", "all"):
            raise ValueError(f"split={split!r} is unknown; choose one of: train, held-out, all")
        while True:
            species = _draw(SPECIES, None, generator)
            words = {
                n: _draw(w, WEIGHTS.get(n), generator) for n, w in WORDS.items() if n not in ("species", "pattern")
            }
            pattern = _draw(PATTERNS, PATTERN_WEIGHTS[species], generator)
            if words["fur"] == "white" and pattern == "tuxedo":
                pattern = "solid"
            seed = int(torch.randint(2**63 - 1, (), generator=generator))
            scene = cls(species=species, pattern=pattern, seed=seed, **words)
            if split == "all" or scene.held_out == (split == "held-out"):
                return scene

    def mirrored(self) -> Scene:
        """What the mirror image of this scene's picture shows: a critter that looks the other way."""
        return replace(self, look={"left": "right", "right": "left"}.get(self.look, self.look))

    def words(self) -> dict[str, str]:
        """The attribute words without the seed."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "seed"}


def _draw(words: tuple[str, ...], weights: tuple[int, ...] | None, generator: torch.Generator) -> str:
    probabilities = torch.tensor(weights or [1] * len(words), dtype=torch.float64)
    return words[int(torch.multinomial(probabilities, 1, generator=generator))]
