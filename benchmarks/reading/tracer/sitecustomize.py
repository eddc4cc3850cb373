"""Notes which functions of Elesh every process calls while a switch is on.

On the ``PYTHONPATH`` of a process whose environment names a folder in ``ELESH_TRACED``. Its
file ``switch`` holds one byte, mapped into memory: "1" while calls count. Every process notes each
function that it calls in a mapped file of its own, at once: a compute child may be killed in the
end, and may write no file while a network runs in it, but memory that is mapped.
"""

from __future__ import annotations

import mmap
import os
import resource
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

_SIZE = 1 << 20
"""Bytes of a process's notes: a thousand functions take a tenth of it."""
_seen: set[CodeType] = set()


def _is_ours(code: CodeType) -> bool:
    parts = Path(code.co_filename).parts
    return ("elesh" in parts or "leyline" in parts) and "site-packages" not in parts


def _start(folder: Path) -> None:
    with (folder / "switch").open("rb") as file:
        switch = mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ)
    with (folder / f"{os.getpid()}.calls").open("w+b") as file:
        file.truncate(_SIZE)
        notes = mmap.mmap(file.fileno(), _SIZE)
    confined = False

    def on_call(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal confined
        if event != "call" or switch[0] != ord("1") or frame.f_code in _seen:
            return
        code = frame.f_code
        _seen.add(code)
        if _is_ours(code) and not code.co_name.startswith("<"):
            # A network runs, or has run, in this process.
            confined = confined or resource.getrlimit(resource.RLIMIT_FSIZE)[0] == 0
            when = "network" if confined else "before"
            notes.write(f"{code.co_filename}\t{when}\t{code.co_qualname}\n".encode())

    threading.setprofile(on_call)
    sys.setprofile(on_call)


if os.environ.get("ELESH_TRACED"):
    _start(Path(os.environ["ELESH_TRACED"]))
