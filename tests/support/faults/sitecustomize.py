"""Faults inside the real compute child, by environment variables; only tests put it on its path.

``ELESH_FAULT`` says what happens when a level is analysed, ``ELESH_FAULT_WHEN`` when: ``always``,
``full`` (not on a later fallback), ``level:<level>``, ``shard:<group>``, or
``once:<file>`` (the file marks that it has happened).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from pathlib import Path
from typing import Any

_PAGE = 4096


def _hold(argument: str) -> None:
    """Keep the interpreter lock: ``PyDLL`` does not give it up around a call."""
    ctypes.PyDLL(None).usleep(int(float(argument) * 1e6))


def _memory(argument: str) -> None:
    """Ask for more private memory than the limit."""
    bytearray(int(argument))


def _shared(argument: str) -> None:
    """Fill shared memory, which the limit of data segments does not count."""
    size = int(argument)
    area = mmap.mmap(-1, size)
    for at in range(0, size, _PAGE):
        area[at] = 1
    ctypes.CDLL(None).pause()


def _raise(argument: str) -> None:
    raise RuntimeError(argument)


def _kill_worker(_: str) -> None:
    """As the kernel does where memory is short: the supervisor ends, and the child with it."""
    os.kill(os.getppid(), signal.SIGKILL)
    signal.pause()


_FAULTS = {
    "hold": _hold,
    "crash": lambda _: os.abort(),
    "exit": lambda _: os._exit(3),
    "memory": _memory,
    "shared": _shared,
    "raise": _raise,
    "worker": _kill_worker,
}


def _due(when: str, level: str, keywords: dict[str, Any]) -> bool:
    kind, _, argument = when.partition(":")
    if kind == "once":
        if Path(argument).exists():
            return False
        Path(argument).touch()
    if kind == "full":
        return not keywords.get("fallbacks")
    if kind == "shard":
        return argument in (keywords.get("shard") or ())
    return kind != "level" or argument == level


def _inject(name: str, argument: str, when: str) -> None:
    import elesh.analysis

    draft_level = elesh.analysis.draft_level

    def faulty(bundle: Any, settings: Any, level: Any, **keywords: Any) -> Any:
        if _due(when, str(level), keywords):
            _FAULTS[name](argument)
        return draft_level(bundle, settings, level, **keywords)

    elesh.analysis.draft_level = faulty


def _break_structure() -> None:
    """Have every cut fall apart, as the gate of the architecture's integrity sees it."""
    import elesh.analysis.pruning_set.draft
    from leyline import GateResult

    def broken(*_: Any) -> tuple[GateResult, None]:
        return GateResult(name="structure", passed=False, detail="it falls apart"), None

    elesh.analysis.pruning_set.draft.safety.structure = broken


def _little_inline(most: int) -> None:
    """Have masks of more bytes than this travel beside their message."""
    import elesh.worker.compute.parameter_masks

    elesh.worker.compute.parameter_masks._INLINE = most


if "elesh.worker.compute.child" in sys.orig_argv and os.environ.get("ELESH_FAULT"):
    _name, _, _argument = os.environ["ELESH_FAULT"].partition(":")
    if _name == "structure":
        _break_structure()
    elif _name == "inline":
        _little_inline(int(_argument))
    else:
        _inject(_name, _argument, os.environ.get("ELESH_FAULT_WHEN", "always"))
