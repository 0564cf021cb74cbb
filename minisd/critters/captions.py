"""English for scenes: varied captions to train on, and the plain full prompt to evaluate with.

Captions never say what the picture cannot show: a pencil sketch has no colour words, a solid coat no pattern word.
"""

from __future__ import annotations

import re

import torch

from .scene import Scene

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


def prompt(scene: Scene) -> str:
    """The plain caption that names every attribute the picture shows.

    For example "a watercolor portrait of an orange cat with blue eyes on a beach".
    """
    return _sentence(scene, choose=lambda options: options[0], keep=lambda: True, adjective=None, style_first=True)


def caption(scene: Scene, generator: torch.Generator, drop: float = 0.15) -> str:
    """One of many true captions of a scene: synonyms, order and omissions are drawn from the generator.

    Every attribute but the species is left out with probability `drop`; the style leads ("a cartoon of ...") or
    follows ("..., cartoon").
    """

    def chance(probability: float) -> bool:
        return float(torch.rand((), generator=generator)) < probability

    def choose(options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    adjective = choose(ADJECTIVES) if chance(0.3) else None
    return _sentence(scene, choose, lambda: not chance(drop), adjective, style_first=chance(0.5))


def _sentence(scene: Scene, choose, keep, adjective: str | None, style_first: bool) -> str:
    """Put the words together; `choose` picks a synonym, `keep` decides whether the next attribute is named."""
    colour = scene.style != "pencil sketch"
    fur = choose(FUR_WORDS[scene.fur]) if colour and keep() else ""
    pattern = choose(PATTERN_WORDS[scene.species, scene.pattern]) if scene.pattern != "solid" and keep() else ""
    critter = _article(" ".join(filter(None, (adjective, fur, pattern, choose(NOUNS[scene.species])))))
    features = [f"{scene.eyes} eyes"] if colour and keep() else []
    if scene.accessory != "none" and keep():
        features.append(_article(scene.accessory if colour else re.sub("red |blue ", "", scene.accessory)))
    if features:
        critter += " with " + " and ".join(features if choose((True, True, False)) else features[::-1])
    portrait = choose(PORTRAITS) if scene.pose == "portrait" and keep() else ""
    if scene.pose != "portrait" and keep():
        critter += " " + choose(POSE_WORDS[scene.pose])
    if scene.look != "front" and keep():
        critter += f" looking {scene.look}"
    if keep():
        critter += " " + _place(scene, colour, choose)
    style = choose(STYLE_WORDS[scene.style]) if keep() else ""
    if style and style_first:
        return f"{style} {portrait} of {critter}".replace("  ", " ")
    return (f"a {portrait} of {critter}" if portrait else critter) + (f", {style.removeprefix('a ')}" if style else "")


def _place(scene: Scene, colour: bool, choose) -> str:
    if scene.background != "studio":
        return choose(PLACES[scene.background])
    return f"on a {scene.studio} background" if colour else "on a plain background"


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words
