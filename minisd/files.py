"""Files of weights: written whole or not at all, and read with one clear error."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A file of weights that can't be used: the message names the file, what is wrong, and what to do."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; on leaving, its contents reach the disk and take the place of `path` in one move.

    A crash at any moment leaves the old file or the new one, never half of either.
    """
    temporary = path.with_name(f".{path.name}.part")  # the same name each time: what a crash left is overwritten
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float16) -> None:
    """Write tensors as safetensors, floating point ones in `dtype`."""
    stored = {name: (t.to(dtype) if t.is_floating_point() else t).contiguous().cpu() for name, t in tensors.items()}
    for name, tensor in stored.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity in {dtype}; nothing is written")
    with replacing(path) as temporary:
        safetensors.torch.save_file(stored, temporary, metadata={"format": "pt"})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises CheckpointError where it isn't one, or holds a number that isn't finite."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    with path.open("rb") as file:
        first = file.read(64)
    if first.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights themselves; download the file again")
    if first.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise CheckpointError(f"{path} is a web page, not weights; download the file again")
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); download it again") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():  # float8 knows no isfinite
            raise CheckpointError(f"{path}: {name} holds NaN or infinity")
    return tensors


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into a module: every name and every shape must match, or CheckpointError lists what doesn't."""
    own = module.state_dict()
    problems = [f"missing {name}" for name in own if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in own]
    problems += [
        f"{name} is {list(tensors[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise CheckpointError(f"{source} does not fit {type(module).__name__}: {shown}")
    module.load_state_dict(dict(tensors))
