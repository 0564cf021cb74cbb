"""What is wrong with a file of weights, said in one way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class CheckpointError(ValueError):
    """A file of weights that can't be used: the message names the file, what is wrong, and what to do."""


def shortened(items: Sequence[str]) -> str:
    """The first ten, and how many more there are."""
    return "; ".join([*items[:10], *([f"and {len(items) - 10} more"] if len(items) > 10 else [])])


def refuse(source: str | Path, reader: str, problems: Sequence[str]) -> None:
    """A CheckpointError that lists ten problems and counts the rest, where there are any."""
    if problems:
        raise CheckpointError(f"{source} does not fit {reader}: {shortened(problems)}")
