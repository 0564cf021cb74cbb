"""A faster version of what rendering spends its time on, by torch.compile: off until asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

_compiling = False


def compile() -> None:
    """Compile the distance field when it is next called, for the whole process.

    Rendering becomes four times faster on a CPU, after some 15 seconds of compiling (1.1 and 0.26 s a picture of
    512 x 512, on one core of an AMD EPYC). Pictures differ from uncompiled ones by rounding.
    """
    global _compiling
    _compiling = True


def hot(function: Callable) -> Callable:
    """Mark a function of tensors as worth compiling."""

    @functools.wraps(function)
    def call(*args):
        return (_compiled(function) if _compiling else function)(*args)

    return call


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)
