"""Where networks run: which devices there are, what memory they have, and what to do when it runs out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def check_device(device: str | torch.device) -> torch.device:
    """A device that is there, or a ValueError that lists those that are."""
    there = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r} is unknown; choose one of: {', '.join(there)}") from error
    if found.type not in there or (found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"there is no device {str(device)!r} on this machine; choose one of: {', '.join(there)}")
    return found


FULL = re.compile("out of memory|(not enough|can't allocate) memory")  # as Metal and the CPU say it
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}


def check_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """What networks can compute in, by its name or itself; else a ValueError that lists what there is."""
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    return found


def fast_dtype(device: torch.device) -> torch.dtype:
    """The numbers a device computes large networks with fastest: two bytes each, where it has instructions for them."""
    if device.type == "cuda":
        return torch.float16
    told = getattr(torch.cpu, "get_capabilities", dict)  # an older PyTorch can't say
    capabilities: dict[str, bool] = told() if device.type == "cpu" else {}
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be used on a device, where the system tells: what is free, and what can be freed for it."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # all: "available" leaves out the file cache
    except (AttributeError, ValueError, OSError):
        return None


@contextmanager
def naming_the_knob() -> Iterator[None]:
    """What to do about a device that runs out of memory all the same: CUDA says so by type, the others by text."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not FULL.search(str(error)):
            raise
        raise MemoryError(f"{error}; choose a smaller size or fewer pictures") from error
