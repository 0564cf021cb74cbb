"""The check of shapes itself: that it is on, and fails where a signature doesn't hold."""

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from shapes import is_shape
from torch import Tensor

from minisd import samplers


def test_a_shape_that_a_signature_does_not_allow_is_caught():
    with pytest.raises(TypeCheckError, match="euler"):
        next(samplers.euler(lambda x, sigma: x, torch.zeros(1, 2), torch.zeros(3, 3), None))


def test_only_hints_of_tensors_are_shapes():
    shape = Float[Tensor, "b 3 h w"]
    assert is_shape(shape) and is_shape(shape | None) and is_shape(tuple[shape, shape])
    assert not any(map(is_shape, (int, str, int | None, shape | float, list, tuple)))
