"""Tensors by name: written whole or not at all, read from any kind of file with one clear error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..files import replacing
from .errors import CheckpointError, refuse, shortened
from .mapped import map_file, view
from .pickle import read_pickle

MOST = 100_000  # tensors in a file; a Stable Diffusion with its running average has 1,900
STRANGE = {  # what a file is that begins like this
    b"version https://git-lfs": "a Git LFS pointer, not the weights themselves; download the file again",
    b"<!doctype": "a web page, not weights; download the file again",
    b"<html": "a web page, not weights; download the file again",
    b"<?xml": "a web page, not weights; download the file again",
    b"gguf": "in the GGUF format, quantised for other programs, which is not read here; get the model's .safetensors",
    b"\x80\x02\x8a\nl\xfc\x9cf\xf9": "in PyTorch's format of before version 1.6, which is not read here; load it with "
    "torch.load(..., weights_only=True) and write it again with torch.save",
}


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite.

    A sum with such a number is never finite; one without may overflow, then smallest and largest tell (a NaN is taken
    for both). The sum is the faster of the two, four times in float32.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.half()  # PyTorch's float8 has no sum; every value of it is one of half precision
    return bool(tensor.sum().isfinite()) or all(extreme.isfinite() for extreme in tensor.aminmax())


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
        temporary.touch()  # the library alone would keep the file from everybody but its owner, whatever the umask
        mode = temporary.stat().st_mode
        safetensors.torch.save_file(stored, temporary, metadata={"format": "pt", **(metadata or {})})
        temporary.chmod(mode)


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
    for beginning, what in STRANGE.items():
        if first.lstrip().lower().startswith(beginning):
            raise CheckpointError(f"{path} is {what}")
    if ".index." in path.name and path.suffix == ".json":
        return _read_shards(path, finite)
    if first.startswith(b"PK\x03\x04"):
        tensors = _state_dict(path, read_pickle(path))
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
        f"{name} is {difference}"
        for name in own
        if name in tensors and (difference := differs(tensors[name], own[name]))
    ]
    refuse(source, type(module).__name__, problems)
    module.load_state_dict(dict(tensors), assign=assign)


def differs(tensor: Tensor, own: Tensor) -> str | None:
    """How a tensor of a file can't take the place of a module's; None where it can."""
    if tensor.shape != own.shape:
        return f"{list(tensor.shape)}, expected {list(own.shape)}"
    if own.is_floating_point() and not tensor.is_floating_point():
        return f"{str(tensor.dtype).removeprefix('torch.')}, expected floating point numbers"
    return None


# safetensors: eight bytes say how long a header in JSON is, which says where in the rest each tensor lies

LONGEST_HEADER = 100_000_008  # that the library reads, with the eight bytes before it
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
    if len(header) > MOST:
        raise CheckpointError(f"{path} holds {len(header)} tensors; at most {MOST} are read")
    content, tensors = map_file(path), {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"{path}: {name} is {dtype}; read are {', '.join(SAFETENSORS_DTYPES)}")
        try:
            tensors[name] = view(content, start + begin, start + end, SAFETENSORS_DTYPES[dtype]).view(shape)
        except (RuntimeError, TypeError) as error:  # no numbers at all, in a shape beyond what PyTorch can count
            raise CheckpointError(f"{path}: {name} has the shape {shape}, which no tensor can have") from error
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The texts kept beside the tensors of a safetensors file; none for a file of another kind."""
    with path.open("rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"
    return _read_header(path)[0].get("__metadata__") or {} if is_safetensors else {}


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of each tensor, and where its numbers start.

    The library finds every fault but two: a name that stands twice (it takes the last), and a shape that PyTorch can't
    count in. Its tensors are not used, as those of its newer versions don't share one map of the file.
    """
    try:
        with safetensors.safe_open(path, "pt"):
            fault = None
    except Exception as error:  # its own class, and those of the system
        fault = error
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        text = file.read(start - 8) if start <= min(LONGEST_HEADER, path.stat().st_size) else b""
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
        end = start + max(
            (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0
        )
    except Exception as error:  # what the library has refused can be anything
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({fault or error}); download it again"
        ) from error
    size = path.stat().st_size
    if fault and end < size:
        raise CheckpointError(
            f"{path} goes on for {size - end} bytes after its last tensor, which safetensors does not allow: the "
            "program that wrote it, or another one since, has put them there; write it anew, or use another file"
        )
    if fault:
        missing = f"its last tensor ends at byte {end} of {size}" if end > size else fault
        raise CheckpointError(f"{path} is not a whole safetensors file ({missing}); download it again")
    return header, start


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table of JSON in which no name stands twice."""
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"it names {name} twice")
        table[name] = value
    return table


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


def _state_dict(path: Path, loaded: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint: of its `state_dict`, where it has one; of a table in it as `table.name`, of a table
    in a list in it as `list.number.name`.
    """
    for _ in range(2):  # some merging tools nest it once more
        if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
            loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        return {}
    tables, count = [("", loaded)], len(loaded)
    for name, value in loaded.items():
        named = enumerate(value) if isinstance(value, list | tuple) else [(None, value)]
        for i, table in named:
            if isinstance(table, dict):
                tables.append((f"{name}." if i is None else f"{name}.{i}.", table))
                count += 1 + len(table)
                if count > MOST:  # a table may stand in many places
                    raise CheckpointError(f"{path} holds more than {MOST} tensors and tables; no model has as many")
    return {f"{prefix}{name}": t for prefix, table in tables for name, t in table.items() if isinstance(t, Tensor)}
