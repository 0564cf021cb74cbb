"""Files mapped into memory: a number is read from the disk when it is first used.

Several tensors may be views of one stretch of a file. Writing to such a tensor leaves the file as it is.
"""

from __future__ import annotations

import mmap
import weakref
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

MAPS: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()  # by where they begin in memory


def map_file(path: Path) -> UInt8[Tensor, "bytes"]:
    """The bytes of a file, not read yet."""
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    numbers = torch.frombuffer(content, dtype=torch.uint8)  # keeps the map
    MAPS[numbers.data_ptr()] = content
    return numbers


def view(content: UInt8[Tensor, "bytes"], begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Bytes from `begin` to `end` as numbers; copied only where they don't lie at a multiple of a number's size."""
    piece = content[begin:end]
    if piece.storage_offset() % dtype.itemsize:
        copied = piece.clone()
        forget(piece)
        piece = copied
    return piece.view(dtype)


def forget(tensor: Tensor) -> None:
    """Give back the memory that a mapped tensor was read into; its numbers are read again where they are used again.

    Only for what nobody has written to. Nothing happens to a tensor that is not mapped, nor on systems without madvise.
    """
    storage = tensor.untyped_storage()
    content = MAPS.get(storage.data_ptr())
    if content is None or not hasattr(content, "madvise") or not tensor.numel():
        return
    begin = tensor.data_ptr() - storage.data_ptr()
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    end, begin = begin + (last + 1) * tensor.itemsize, begin - begin % mmap.PAGESIZE
    content.madvise(mmap.MADV_DONTNEED, begin, end - begin)
