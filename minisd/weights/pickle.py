"""A .ckpt, .pt or .bin of PyTorch: a zip file of raw numbers and of one pickle, which says where they go.

A pickle is a program that puts tensors round raw numbers. Python's own machine for such programs runs whatever
function they name. This one only makes tensors, tables and lists.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from .errors import CheckpointError
from .mapped import map_file, view


@dataclass(eq=False)
class Inert:
    """A function or class that a pickle names, or what it would have made of its arguments: told, never run."""

    name: str
    arguments: Any = None  # None: the function itself
    state: Any = None


def rebuild_tensor(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Tensor:
    """A view of a storage; it may not have more elements than the storage, nor reach beyond it."""
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else offset - 1
    if min(offset, *size, *stride, 0) < 0 or count > len(storage) or last >= len(storage):
        raise ValueError(f"a tensor of {size} reaches beyond its storage of {len(storage)}")
    return storage[offset:].as_strided(size, stride)


def empty_table() -> dict:
    return {}


MAKERS = {
    "collections.OrderedDict": empty_table,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8".split()
)


def unpickle(program: bytes, storage: Callable[[Inert, str, int], Tensor]) -> Any:
    """Run a pickle: a program for a machine with a stack, marks in it, and a memo of what was made before.

    `storage(kind, key, count)` gives the numbers that a tensor is a view of. A function outside `MAKERS` gives an
    `Inert` in place of its result; keys that are neither text nor number are left out of tables, as hashing a deep
    tuple can take for ever.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop(count: int) -> list[Any]:
        if count > len(stack) - (marks[-1] if marks else 0):
            raise ValueError("the stack is empty")
        taken = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return taken

    def pop_to_mark() -> list[Any]:
        mark = marks.pop()
        taken = stack[mark:]
        del stack[mark:]
        return taken

    def call(function: Any, arguments: Any) -> Any:
        if not isinstance(function, Inert) or function.arguments is not None or not isinstance(arguments, tuple):
            raise ValueError("it calls what is no function")
        maker = MAKERS.get(function.name)
        return maker(*arguments) if maker else Inert(function.name, arguments)

    def fill(table: Any, items: list[Any]) -> None:
        if isinstance(table, dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            table |= {key: value for key, value in pairs if isinstance(key, str | int)}

    for opcode, argument, _ in pickletools.genops(program):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case name if name in LITERALS:
                stack.append(argument)
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(int(opcode.name[-1]))))
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "LIST" | "FROZENSET":
                stack.append(pop_to_mark())
            case "DICT":
                items = pop_to_mark()
                stack.append({})
                fill(stack[-1], items)
            case "SETITEM":
                items = pop(2)
                fill(stack[-1], items)
            case "SETITEMS":
                items = pop_to_mark()
                fill(stack[-1], items)
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = pop(1) if opcode.name == "APPEND" else pop_to_mark()
                if isinstance(stack[-1], list):
                    stack[-1].extend(items)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(Inert(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                stack.append(Inert(".".join(pop(2))))
            case "REDUCE" | "NEWOBJ":
                stack.append(call(*pop(2)))
            case "NEWOBJ_EX":
                function, arguments, _ = pop(3)
                stack.append(call(function, arguments))
            case "BUILD":
                (state,) = pop(1)
                if isinstance(stack[-1], Inert):
                    stack[-1].state = state
            case "BINPERSID":
                ((_, kind, key, _, count),) = pop(1)
                stack.append(storage(kind, key, count))
            case "STOP":
                (result,) = pop(1)
                return result
            case other:
                raise ValueError(f"it holds {other}, which no file of weights needs")
    raise ValueError("it has no end")


STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


def read_pickle(path: Path) -> Any:
    """What a .ckpt, .pt or .bin holds, its tensors mapped; Python objects of any other kind are `Inert`.

    Raises CheckpointError where it is not PyTorch's zip file, or its pickle is not one of weights.
    """
    try:
        content = map_file(path)
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
            if len(members) < len(archive.infolist()):
                raise ValueError("two members have the same name")
        programs = [name for name in members if name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise ValueError("it has no data.pkl")
        root = programs[0].removesuffix("data.pkl")

        def member(name: str) -> tuple[int, int]:
            """Where a member's bytes begin and end."""
            info, at = members[root + name], members[root + name].header_offset
            if not 0 <= at <= len(content) - 30:
                raise ValueError(f"{root + name} is not where the list of members says")
            signature, _, flags, *_, letters, extra = struct.unpack("<4sHHHHHIIIHH", _bytes(content, at, at + 30))
            begin = at + 30 + letters + extra
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or flags & 1:
                raise ValueError(f"{root + name} is compressed or encrypted")
            if signature != b"PK\x03\x04" or begin + info.file_size > len(content):
                raise ValueError(f"{root + name} is not where the list of members says")
            return begin, begin + info.file_size

        def storage(kind: Inert, key: str, count: int) -> Tensor:
            """A run of numbers, by the name and the number of them that the program gives."""
            dtype = STORAGES[kind.name]
            begin, end = member(f"data/{key}")
            if end - begin != count * dtype.itemsize:
                raise ValueError(f"{root}data/{key} is {end - begin} bytes, not {count} times {dtype.itemsize}")
            return view(content, begin, end, dtype)

        if root + "byteorder" in members and _bytes(content, *member("byteorder")) != b"little":
            raise ValueError("its numbers are big-endian")
        return unpickle(_bytes(content, *member("data.pkl")), storage)
    except Exception as error:  # a broken program can fail in any way; none of them is ours
        raise CheckpointError(f"{path} is not a whole .ckpt of weights ({error!r}); download it again") from error


def _bytes(content: UInt8[Tensor, "bytes"], begin: int, end: int) -> bytes:
    return content[begin:end].numpy().tobytes()
