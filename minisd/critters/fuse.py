"""Faster versions of the hot functions, by torch.compile: off until asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

_compiling = False


def compile() -> None:
    """Compile the hot functions when they are next called, for the whole process.

    Rendering becomes three times faster, after some minutes of compiling. Keep to one size and one number of scenes:
    other shapes may be compiled anew. Pictures differ from uncompiled ones by rounding.
    """
    global _compiling
    _compiling = True
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)


def hot(function: Callable) -> Callable:
    """Mark a function of tensors as worth compiling."""

    @functools.wraps(function)
    def call(*args):
        if _compiling and not torch.compiler.is_compiling():
            return _compiled(function)(*args)
        return function(*args)

    return call


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)
