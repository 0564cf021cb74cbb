"""What may be asked for: a check returns a value in its plain form, or says what came, what is allowed, what to do."""

from __future__ import annotations

import operator
import sys
import warnings
from collections.abc import Sequence
from numbers import Real
from typing import Any

MAX_SEED = 2**63 - 1
OURS = ("minisd", "torch", "jaxtyping", "contextlib")  # packages between a reader's line and a warning


def warn(message: str) -> None:
    """A warning that points at the line of the caller's own that led to it, outside this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in OURS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def integer(name: str, value: Any, low: int, high: int) -> int:
    """A whole number from `low` to `high`; True and 2.0 are not whole numbers here."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        raise ValueError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")
    return number


def number(name: str, value: Any, low: float, high: float) -> float:
    """A finite number from `low` to `high`."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; it must be a number from {low:g} to {high:g}")
    return float(value)


def prompts(value: object, what: str = "prompt") -> list[str]:
    """One prompt or several, as a list of at least one."""
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, Sequence) or isinstance(several, bytes) or not several:
        raise ValueError(f"the {what} is {value!r}; it must be text, or a list of at least one text")
    for i, text in enumerate(several):
        if not isinstance(text, str):
            raise ValueError(f"{what} number {i} is {text!r} ({type(text).__name__}); it must be text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{what} number {i} holds half a character, {text[error.start]!r}, at position {error.start}; remove it"
            ) from None
    return list(several)


def matching(value: object, what: str, texts: list[str]) -> list[str]:
    """As many texts as there are prompts: one text is used for all of them."""
    several = prompts(value, what)
    if len(several) not in (1, len(texts)):
        raise ValueError(f"{len(several)} {what}s for {len(texts)} prompts; give one for all, or one for each")
    return several * len(texts) if len(several) == 1 else several


def seeds(value: object, count: int) -> list[int]:
    """A seed a picture: a single seed counts on from itself."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != count:
            raise ValueError(f"{len(value)} seeds for {count} pictures; give one seed, or one for each picture")
        return [integer("seed", seed, 0, MAX_SEED) for seed in value]
    first = integer("seed", value, 0, MAX_SEED - count + 1)
    return [first + i for i in range(count)]


def size(value: object, multiple: int) -> tuple[int, int]:
    """Width and height from one side or two, both multiples of `multiple`."""
    sides = value if isinstance(value, tuple | list) else (value, value)
    if len(sides) != 2:
        raise ValueError(f"size is {value!r}; it must be one side, or a width and a height")
    width, height = (integer("size", side, 1, 2**16) for side in sides)
    if width % multiple or height % multiple:
        near = [max(multiple, round(side / multiple) * multiple) for side in (width, height)]
        raise ValueError(
            f"size is {width} x {height}; sides must be multiples of {multiple}, such as {near[0]} x {near[1]}"
        )
    return width, height
