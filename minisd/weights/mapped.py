"""Files mapped into memory: a number is read from the disk when it is first used.

Several tensors may be views of one stretch of a file. Writing to such a tensor leaves the file as it is.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor


def map_file(path: Path) -> UInt8[Tensor, "bytes"]:
    """The bytes of a file, not read yet."""
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def view(content: UInt8[Tensor, "bytes"], begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Bytes from `begin` to `end` as numbers; copied only where they don't lie at a multiple of a number's size."""
    piece = content[begin:end]
    return (piece.clone() if piece.storage_offset() % dtype.itemsize else piece).view(dtype)
