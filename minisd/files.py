"""Files written whole or not at all."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WRITERS = itertools.count()  # of temporary files, in this process


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; on leaving, its contents reach the disk and take the place of `path` in one move.

    A crash at any moment leaves the old file or the new one, never half of either. Each writer has a name of its own:
    of several the last to finish has its file there. What killed processes left half written is removed.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if _abandoned(left):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{next(WRITERS)}.part")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _abandoned(temporary: Path) -> bool:
    """Whether the process that wrote a temporary file is gone from this machine: its number is in the name.

    On Windows, where `os.kill` would end the process instead of asking for it, a day's age tells.
    """
    process = temporary.name.split(".")[-3]
    if os.name == "nt":
        return time.time() - temporary.stat().st_mtime > 86_400
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, ValueError, OverflowError):  # another user's process; another program's file
        return False
    return False


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
