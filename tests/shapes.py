"""Holds every shape that the package's signatures promise to what the tests really pass and get back.

`conftest.py` puts `check` round every function of minisd. Only shapes are checked: what a wrong plain type gives is
tested by the tests of bad input.
"""

from types import NoneType
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def is_shape(hint: Any) -> bool:
    """Whether a hint is of tensors alone: a tensor, a tensor or None, a tuple or an iterator of tensors."""
    if isinstance(hint, type):
        return issubclass(hint, AbstractArray | NoneType)
    return bool(get_args(hint)) and all(is_shape(part) for part in get_args(hint))


def check(function):
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if is_shape(hint)}
    return beartype(function)
