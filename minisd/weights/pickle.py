"""A .ckpt, .pt or .bin of PyTorch: a zip file of raw numbers and of one pickle, which says where they go.

A pickle is a program that puts tensors round raw numbers. Python's own machine for such programs runs whatever
function they name. This one only makes tensors, tables and lists. `torch.load(weights_only=True)` does not run
functions either, but refuses the checkpoints of training programs for the classes named in them, and lets a small
file take any memory or time: by a tensor of many numbers on few, numbers of a million digits, or keys that take for
ever to hash.
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
from torch import Tensor

from .errors import CheckpointError
from .mapped import map_file, view

LONGEST_NAME = 1000  # letters of a function's name and of a key; longer keys are left out
MOST_DIMENSIONS = 64
WIDEST_NUMBER = 256  # bits; the states of random generators in checkpoints have 128


@dataclass(eq=False)
class Inert:
    """A function or class that a pickle names, or what it would have made of its arguments: told, never run."""

    name: str
    arguments: Any = None  # None: the function itself
    state: Any = None

    def __post_init__(self):
        if len(self.name) > LONGEST_NAME:
            raise ValueError(f"it names a function by {len(self.name)} letters")


def rebuild_tensor(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Tensor:
    """A view of a storage; it may not have more elements than the storage, nor reach beyond it."""
    if len(size) > MOST_DIMENSIONS:
        raise ValueError(f"a tensor has {len(size)} dimensions")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else offset - 1
    if min(offset, *size, *stride, 0) < 0 or count > len(storage) or last >= len(storage):
        raise ValueError(f"a tensor of {size} reaches beyond its storage of {len(storage)}")
    return storage[offset:].as_strided(size, stride)


def empty_table() -> dict:
    return {}


MAKERS: dict[str, Callable] = {
    "collections.OrderedDict": empty_table,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8".split()
)


def call(function: Any, arguments: Any, *_: Any) -> Any:
    """What a function makes of its arguments; an `Inert` for every function that is not one of `MAKERS`."""
    if not isinstance(function, Inert) or function.arguments is not None or not isinstance(arguments, tuple):
        raise ValueError("it calls what is no function")
    maker = MAKERS.get(function.name)
    return maker(*arguments) if maker else Inert(function.name, arguments)


class Machine:
    """Runs a pickle: a program for a machine with a stack, marks in it, and a memo of what was made before.

    `storage(kind, key, count)` gives the numbers that a tensor is a view of. Keys that are neither short text nor
    number are left out of tables, as hashing a deep tuple can take for ever.
    """

    def __init__(self, storage: Callable[[Inert, str, int], Tensor]):
        self.storage = storage
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """What the program leaves on the stack where it stops."""
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                (result,) = self.pop(1)
                return result
            made = self.make(opcode.name, argument)
            if made is not self:
                self.stack.append(made)
        raise ValueError("it has no end")

    def pop(self, count: int | None = None) -> list[Any]:
        """Take what lies on top of the stack: so many things, or all down to the last mark."""
        low = self.marks[-1] if self.marks else 0
        start = self.marks.pop() if count is None else len(self.stack) - count
        if start < low:
            raise ValueError("the stack is empty")
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def make(self, name: str, argument: Any) -> Any:
        """What an instruction puts on the stack; the machine itself where that is nothing."""
        if name in LITERALS:
            if isinstance(argument, int) and argument.bit_length() > WIDEST_NUMBER:
                raise ValueError(f"it holds a number of {argument.bit_length()} bits")
            return argument
        if name in CONSTANTS:
            return CONSTANTS[name]
        match name:
            case "EMPTY_DICT":
                return {}
            case "EMPTY_LIST" | "EMPTY_SET":
                return []
            case "EMPTY_TUPLE":
                return ()
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                return tuple(self.pop(int(name[-1])))
            case "TUPLE":
                return tuple(self.pop())
            case "LIST" | "FROZENSET":
                return self.pop()
            case "DICT":
                return self.filled({}, self.pop())
            case "GET" | "BINGET" | "LONG_BINGET":
                return self.memo[argument]
            case "GLOBAL":
                return Inert(argument.replace(" ", "."))
            case "STACK_GLOBAL":
                module, function = self.pop(2)
                if not isinstance(module, str) or not isinstance(function, str):
                    raise ValueError("it names a function by what is no text")
                return Inert(f"{module[: LONGEST_NAME + 1]}.{function[: LONGEST_NAME + 1]}")
            case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX":
                return call(*self.pop(3 if name == "NEWOBJ_EX" else 2))
            case "BINPERSID":
                ((_, kind, key, _, count),) = self.pop(1)
                return self.storage(kind, key, count)
        self.change(name, argument)
        return self

    def change(self, name: str, argument: Any) -> None:
        """What an instruction does to what is there already."""
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(len(self.stack))
            case "SETITEM" | "SETITEMS":
                items = self.pop(2 if name == "SETITEM" else None)
                self.filled(self.stack[-1], items)
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = self.pop(1 if name == "APPEND" else None)
                if isinstance(self.stack[-1], list):
                    self.stack[-1].extend(items)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BUILD":
                (state,) = self.pop(1)
                if isinstance(self.stack[-1], Inert):
                    self.stack[-1].state = state
            case _:
                raise ValueError(f"it holds {name}, which no file of weights needs")

    @staticmethod
    def filled(table: Any, items: list[Any]) -> Any:
        """A table with keys and values put into it; what is no table stays as it is."""
        if isinstance(table, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                if isinstance(key, int) or (isinstance(key, str) and len(key) <= LONGEST_NAME):
                    table[key] = value
        return table


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


class Archive:
    """The zip file: its members lie in it as they are, and are mapped."""

    def __init__(self, path: Path):
        self.content = map_file(path)
        with zipfile.ZipFile(path) as archive:
            self.members = {member.filename: member for member in archive.infolist()}
            if len(self.members) < len(archive.infolist()):
                raise ValueError("two members have the same name")
        programs = [name for name in self.members if name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise ValueError("it has no data.pkl")
        self.root = programs[0].removesuffix("data.pkl")
        if sum(member.file_size for member in self.members.values()) > len(self.content):
            raise ValueError("its members overlap")
        self.storages: dict[tuple[str, str], Tensor] = {}  # a storage that is not aligned is copied: once

    def place(self, name: str) -> tuple[int, int]:
        """Where a member's bytes begin and end."""
        info, at = self.members[self.root + name], self.members[self.root + name].header_offset
        if not 0 <= at <= len(self.content) - 30:
            raise ValueError(f"{self.root + name} is not where the list of members says")
        signature, _, flags, *_, letters, extra = struct.unpack("<4sHHHHHIIIHH", self.bytes(at, at + 30))
        begin = at + 30 + letters + extra
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or flags & 1:
            raise ValueError(f"{self.root + name} is compressed or encrypted")
        if signature != b"PK\x03\x04" or begin + info.file_size > len(self.content):
            raise ValueError(f"{self.root + name} is not where the list of members says")
        return begin, begin + info.file_size

    def bytes(self, begin: int, end: int) -> bytes:
        return self.content[begin:end].numpy().tobytes()

    def storage(self, kind: Inert, key: str, count: int) -> Tensor:
        """A run of numbers, by the name and the number of them that the program gives."""
        if not isinstance(key, str) or not isinstance(count, int):
            raise ValueError("it names a storage by what is no text")
        if (kind.name, key) not in self.storages:
            self.storages[kind.name, key] = view(self.content, *self.place(f"data/{key}"), STORAGES[kind.name])
        numbers = self.storages[kind.name, key]
        if len(numbers) != count:
            raise ValueError(f"{self.root}data/{key} has {len(numbers)} numbers, not {count}")
        return numbers


def read_pickle(path: Path) -> Any:
    """What a .ckpt, .pt or .bin holds, its tensors mapped; Python objects of any other kind are `Inert`.

    Raises CheckpointError where it is not PyTorch's zip file, or its pickle is not one of weights.
    """
    try:
        archive = Archive(path)
        if archive.root + "byteorder" in archive.members and archive.bytes(*archive.place("byteorder")) != b"little":
            raise ValueError("its numbers are big-endian")
        return Machine(archive.storage).run(archive.bytes(*archive.place("data.pkl")))
    except Exception as error:  # a broken program can fail in any way; none of them is ours
        told = repr(error)[:300]
        raise CheckpointError(f"{path} is not a whole .ckpt of weights ({told}); download it again") from error
