"""Notes which functions of Elesh every process calls while a switch is on.

On the ``PYTHONPATH`` of a process whose environment names a folder in ``ELESH_TRACED``. Its
file ``switch`` holds one byte, mapped into memory: "1" while calls count. Every process writes each
function that it calls to a file of its own, at once: a compute child may be killed in the end.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

_seen: set[CodeType] = set()


def _is_ours(code: CodeType) -> bool:
    parts = Path(code.co_filename).parts
    return ("elesh" in parts or "leyline" in parts) and "site-packages" not in parts


def _start(folder: Path) -> None:
    with (folder / "switch").open("rb") as file:
        switch = mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ)
    calls = (folder / f"{os.getpid()}.calls").open("a", buffering=1)

    def on_call(frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or switch[0] != ord("1") or frame.f_code in _seen:
            return
        code = frame.f_code
        _seen.add(code)
        if _is_ours(code) and not code.co_name.startswith("<"):
            calls.write(f"{code.co_filename}\t{code.co_firstlineno}\t{code.co_qualname}\n")

    threading.setprofile(on_call)
    sys.setprofile(on_call)


if os.environ.get("ELESH_TRACED"):
    _start(Path(os.environ["ELESH_TRACED"]))
