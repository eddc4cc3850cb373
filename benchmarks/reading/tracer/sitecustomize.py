"""Notes which functions of Elesh every process calls while a switch is on.

On the ``PYTHONPATH`` of a process whose environment names a folder in ``ELESH_TRACED``. Its
file ``switch`` holds one byte, mapped into memory: "1" while calls count. Every process writes the
functions it called to a file of its own, a line each, when the switch goes off and when it ends.
"""

from __future__ import annotations

import atexit
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
    written = False

    def write() -> None:
        nonlocal written
        if _seen and not written:
            written = True
            ours = [c for c in list(_seen) if _is_ours(c) and not c.co_name.startswith("<")]
            lines = (f"{c.co_filename}\t{c.co_firstlineno}\t{c.co_qualname}\n" for c in ours)
            (folder / f"{os.getpid()}.calls").write_text("".join(lines))

    def on_call(frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or written:
            return
        if switch[0] == ord("1"):
            _seen.add(frame.f_code)
        elif switch[0] == ord("2"):
            write()

    threading.setprofile(on_call)
    sys.setprofile(on_call)
    atexit.register(write)


if os.environ.get("ELESH_TRACED"):
    _start(Path(os.environ["ELESH_TRACED"]))
