"""Tensors by name: written whole or not at all, read from any kind of file with one clear error."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..files import replacing
from .errors import CheckpointError, refuse, shortened
from .mapped import map_file, view
from .pickle import read_pickle


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite. Smallest and largest tell: a NaN is taken for both, where there is one."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.half()  # PyTorch's float8 has no aminmax; every value of it is one of half precision
    return all(extreme.isfinite() for extreme in tensor.aminmax())


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float16,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as safetensors, floating point ones in `dtype`; `metadata` are texts to keep beside them."""
    stored = {name: (t.to(dtype) if t.is_floating_point() else t).contiguous().cpu() for name, t in tensors.items()}
    for name, tensor in stored.items():
        if not is_finite(tensor):
            raise ValueError(f"{path}: {name} holds NaN or infinity in {dtype}; nothing is written")
    with replacing(path) as temporary:
        safetensors.torch.save_file(stored, temporary, metadata={"format": "pt", **(metadata or {})})


def read_tensors(path: str | Path, finite: bool = True) -> dict[str, Tensor]:
    """Every tensor of a file, by name: safetensors, a .ckpt, .pt or .bin of PyTorch, or an index of several such files.

    What it is, is told by its first bytes, not by its name. Nothing in a pickle is executed. Raises CheckpointError
    where the file is not whole, not of weights, or, unless `finite` is False, where a number is NaN or infinite.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    with path.open("rb") as file:
        first = file.read(64)
    if first.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights themselves; download the file again")
    if first.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not weights; download the file again")
    if ".index." in path.name and path.suffix == ".json":
        return _read_shards(path, finite)
    if first.startswith(b"PK\x03\x04"):
        tensors = _state_dict(read_pickle(path))
    elif first.startswith(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9"):  # torch.save's magic number before PyTorch 1.6
        raise CheckpointError(
            f"{path} is in PyTorch's format of before version 1.6, which is not read here; load it with "
            "torch.load(..., weights_only=True) and write it again with torch.save"
        )
    elif first[8:9] == b"{":
        tensors = _read_safetensors(path)
    else:
        raise CheckpointError(f"{path} is neither a whole safetensors file nor a .ckpt of PyTorch; download it again")
    for name, tensor in tensors.items():
        if finite and not is_finite(tensor):
            raise CheckpointError(f"{path}: {name} holds NaN or infinity")
    return tensors


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: str, assign: bool = False) -> None:
    """Copy tensors into a module: every name and every shape must match, or CheckpointError lists what doesn't.

    With `assign` the tensors themselves take the place of the module's, which may then be on `meta`.
    """
    own = module.state_dict()
    problems = [f"missing {name}" for name in own if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in own]
    problems += [
        f"{name} is {list(tensors[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    refuse(source, type(module).__name__, problems)
    module.load_state_dict(dict(tensors), assign=assign)


# safetensors: eight bytes say how long a header in JSON is, which says where in the rest each tensor lies

LONGEST_HEADER = 100_000_000
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    header, start = _read_header(path)
    size = path.stat().st_size - start
    tensors, end = {}, 0
    content = map_file(path)
    for name, (dtype, shape, begin, stop) in sorted(header.items(), key=lambda entry: entry[1][2:]):
        if begin != end:
            raise CheckpointError(
                f"{path}: {name} begins at byte {begin}, where the tensor before it ends at {end}: "
                f"{'there is a hole' if begin > end else 'they overlap'}; download the file again"
            )
        if stop > size:
            raise CheckpointError(
                f"{path} is not a whole safetensors file: {name} ends at byte {stop} of {size}; download it again"
            )
        tensors[name] = view(content, start + begin, start + stop, dtype).view(shape)
        end = stop
    if end != size:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {size - end} bytes follow the last tensor; download it again"
        )
    return {name: tensors[name] for name in header}


def read_metadata(path: Path) -> dict[str, str]:
    """The texts kept beside the tensors of a safetensors file; none for a file of another kind."""
    with path.open("rb") as file:
        if file.read(9)[8:] != b"{":
            return {}
    return _read_json(path)[0].get("__metadata__", {})


def _read_header(path: Path) -> tuple[dict[str, tuple[torch.dtype, list[int], int, int]], int]:
    """What a safetensors file says of each tensor (dtype, shape, begin, end), and where its numbers start."""
    entries, start = _read_json(path)
    header = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(text, str) for text in entry.values()):
                raise CheckpointError(f"{path}: its metadata are not texts; download the file again")
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
            whole = whole and isinstance(dtype, str)
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise CheckpointError(f"{path}: the header's entry for {name} is broken; download the file again")
        if dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"{path}: {name} is {dtype!r}; read are {', '.join(SAFETENSORS_DTYPES)}")
        needed = math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize
        if end - begin != needed:
            raise CheckpointError(
                f"{path}: {name}, {dtype} {shape}, takes {needed} bytes, not the {end - begin} that its header gives"
            )
        header[name] = SAFETENSORS_DTYPES[dtype], shape, begin, end
    return header, start


def _read_json(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file as it stands, and where it ends."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) < len(pairs):
            twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
            raise CheckpointError(f"{path}: its header names {twice} twice; download the file again")
        return names

    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(LONGEST_HEADER, size - 8):
            raise CheckpointError(
                f"{path} is not a whole safetensors file: a header of {length} bytes does not fit into the file's "
                f"{size}; download it again"
            )
        text = file.read(length)
    try:
        return json.loads(text.decode(), object_pairs_hook=unique), 8 + length
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: its header is no JSON ({error}); download it again"
        ) from error


def _read_shards(path: Path, finite: bool) -> dict[str, Tensor]:
    """A model cut into files: the index says which of them holds which tensor."""
    try:
        places = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        shards = sorted(set(places.values()))
        plain = all(Path(shard).name == shard and ".index." not in shard for shard in shards)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not an index of weights: {error!r}") from error
    if not plain:
        raise CheckpointError(f"{path}: its parts must be files of weights beside it, not {', '.join(shards)[:200]}")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        found = read_tensors(path.parent / shard, finite)
        promised = {name for name, place in places.items() if place == shard}
        if differing := sorted(promised ^ set(found)):
            raise CheckpointError(f"{path}: {path.parent / shard} and the index disagree on {shortened(differing)}")
        tensors |= found
    return tensors


def _state_dict(loaded: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint: of its `state_dict`, where it has one; of a table in it as `table.name`."""
    for _ in range(2):  # some merging tools nest it once more
        if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
            loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        return {}
    tables = {name: table for name, table in loaded.items() if isinstance(table, dict)}
    inner = {f"{name}.{key}": value for name, table in tables.items() for key, value in table.items()}
    return {str(name): value for name, value in (loaded | inner).items() if isinstance(value, Tensor)}
