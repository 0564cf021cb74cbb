"""A pickle of weights, read without running anything it names.

A pickle is a program that puts tensors round raw numbers. Python's own machine for such programs runs whatever
function they name. This one only makes tensors, tables and lists.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


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
