"""English for scenes: varied captions to train on, and the plain full prompt to evaluate with.

Captions never say what the picture cannot show: a pencil sketch has no colour words, a solid coat no pattern word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from .scene import WORDS, Scene

NOUNS = {"cat": ("cat", "cat", "cat", "kitten", "kitty", "feline"), "dog": ("dog", "dog", "dog", "puppy", "pup")}
FUR_WORDS = {
    "orange": ("orange", "orange", "ginger", "marmalade"),
    "black": ("black",),
    "white": ("white",),
    "gray": ("gray", "gray", "grey"),
    "brown": ("brown",),
    "cream": ("cream", "cream", "cream-colored"),
}
PATTERN_WORDS = {
    ("cat", "striped"): ("striped", "tabby"),
    ("cat", "tuxedo"): ("tuxedo", "white-chested"),
    ("dog", "spotted"): ("spotted", "patchy"),
    ("dog", "tuxedo"): ("white-chested", "tuxedo"),
}
PLAIN = ("", "plain")  # a solid coat, in captions that may say so; the first is what prompts say
PLACES = {
    "grass": ("on the grass", "on grass", "in a meadow"),
    "beach": ("on a beach", "on the beach", "by the sea"),
    "night": ("at night", "under the moon"),
    "snow": ("in the snow", "in snow"),
}
POSE_WORDS = {"sitting": ("sitting",), "lying": ("lying down", "lying"), "standing": ("standing",)}
PORTRAITS = ("portrait", "close-up")
STYLE_WORDS = {
    "3d render": ("a 3d render", "a 3d clay render"),
    "cartoon": ("a cartoon", "a flat cartoon", "a cartoon drawing"),
    "pencil sketch": ("a pencil sketch", "a pencil drawing"),
    "watercolor": ("a watercolor", "a watercolor", "a watercolor painting", "a watercolour"),
    "pixel art": ("pixel art", "pixel art", "a pixel art picture"),
}
ADJECTIVES = ("cute", "happy", "little", "sweet", "lovely")


# What is left to chance in a caption, slot by slot: whether the attribute is named, and by which of its words.
SLOTS = ("adjective", "fur", "pattern", "species", "eyes", "accessory", "order", "pose", "look", "background", "style")
UNSAID = {"pattern": "solid", "accessory": "none", "look": "front"}  # words that no caption has

Choose = Callable[[str, Sequence], Any]  # of a slot's options, one
Keep = Callable[[str], bool]  # whether a slot is named


def prompt(scene: Scene) -> str:
    """The plain caption that names every attribute the picture shows.

    For example "a watercolor portrait of an orange cat with blue eyes on a beach".
    """
    return _sentence(scene, choose=lambda _, options: options[0], keep=lambda _: True, adjective=None, style_first=True)


def caption(scene: Scene, generator: torch.Generator, drop: float = 0.15, plain: bool = False) -> str:
    """One of many true captions of a scene: synonyms, order and omissions are drawn from the generator.

    Every attribute but the species is left out with probability `drop`; the style leads ("a cartoon of ...") or
    follows ("..., cartoon"). With `plain` half of the captions of a solid coat say so, else none does.
    """
    return _lucky(scene, _luck(generator), drop, plain)


def near_misses(scene: Scene, generator: torch.Generator, count: int) -> list[str]:
    """A true caption, then `count` false ones: the same sentence with one attribute of the scene exchanged.

    Telling them apart takes every word of the sentence, not its most striking ones (Yuksekgonul et al. 2023, "When and
    why vision-language models behave like bags-of-words", section 5).
    """
    luck = _luck(generator)
    captions = [_lucky(scene, luck)]
    while len(captions) <= count:
        captions += {_lucky(_exchanged(scene, generator), luck)} - {captions[0]}  # the same where it was left out
    return captions


def _exchanged(scene: Scene, generator: torch.Generator) -> Scene:
    """The scene with one attribute exchanged for another that a caption can name."""
    while True:
        name = _pick(list(WORDS), generator)
        words = {w for w in WORDS[name] if w != UNSAID.get(name) and w != getattr(scene, name)}
        change = {name: _pick(sorted(words), generator)}
        if name == "species" and scene.pattern in ("striped", "spotted"):  # a coat that only the other animal has
            change["pattern"] = "spotted" if scene.pattern == "striped" else "striped"
        with suppress(ValueError):  # a coat that can't be
            return replace(scene, **change)


def _pick(options: Sequence, generator: torch.Generator) -> Any:
    return options[int(torch.randint(len(options), (), generator=generator))]


def _luck(generator: torch.Generator) -> dict[str, tuple[float, float]]:
    """Two numbers from 0 to 1 a slot: they decide whether it is named, and how."""
    return dict(zip(SLOTS, torch.rand(len(SLOTS), 2, generator=generator).tolist(), strict=True))


def _lucky(scene: Scene, luck: dict[str, tuple[float, float]], drop: float = 0.15, plain: bool = False) -> str:
    def keep(slot: str) -> bool:
        return luck[slot][0] >= drop

    def choose(slot: str, options: Sequence) -> Any:
        return options[int(luck[slot][1] * len(options))]

    adjective = choose("adjective", ADJECTIVES) if luck["adjective"][0] < 0.3 else None
    return _sentence(scene, choose, keep, adjective, style_first=luck["order"][0] < 0.5, plain=plain)


def _sentence(
    scene: Scene, choose: Choose, keep: Keep, adjective: str | None, style_first: bool, plain: bool = False
) -> str:
    """Put the words together; `choose` picks a synonym, `keep` decides whether an attribute is named."""
    colour = scene.style != "pencil sketch"
    fur = choose("fur", FUR_WORDS[scene.fur]) if colour and keep("fur") else ""
    patterns = PLAIN[: 1 + plain] if scene.pattern == "solid" else PATTERN_WORDS[scene.species, scene.pattern]
    pattern = choose("pattern", patterns) if keep("pattern") else ""
    coat = (pattern, fur) if scene.pattern == "solid" else (fur, pattern)  # a plain brown dog, a brown spotted dog
    critter = _article(" ".join(filter(None, (adjective, *coat, choose("species", NOUNS[scene.species])))))
    features = [f"{scene.eyes} eyes"] if colour and keep("eyes") else []
    if scene.accessory != "none" and keep("accessory"):
        features.append(_article(scene.accessory if colour else re.sub("red |blue ", "", scene.accessory)))
    if features:
        critter += " with " + " and ".join(features if choose("order", (True, True, False)) else features[::-1])
    portrait = choose("pose", PORTRAITS) if scene.pose == "portrait" and keep("pose") else ""
    if scene.pose != "portrait" and keep("pose"):
        critter += " " + choose("pose", POSE_WORDS[scene.pose])
    if scene.look != "front" and keep("look"):
        critter += f" looking {scene.look}"
    if keep("background"):
        critter += " " + _place(scene, colour, choose)
    style = choose("style", STYLE_WORDS[scene.style]) if keep("style") else ""
    if style and style_first:
        return f"{style} {portrait} of {critter}".replace("  ", " ")
    return (f"a {portrait} of {critter}" if portrait else critter) + (f", {style.removeprefix('a ')}" if style else "")


def _place(scene: Scene, colour: bool, choose: Choose) -> str:
    if scene.background != "studio":
        return choose("background", PLACES[scene.background])
    return f"on a {scene.studio} background" if colour else "on a plain background"


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words
