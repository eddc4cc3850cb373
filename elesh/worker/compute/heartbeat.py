"""The compute child's heartbeat, whether it computes, waits, or is wedged (decision 0051), and its
memory.

A thread of the child writes the time twice a second into a small file that the supervisor maps,
whatever the job does. A heartbeat that is missing has three possible causes, which ``/proc`` tells
apart: the child is stopped (its state is ``T``), it holds the interpreter lock in a long native
call (its CPU time grows: it is busy, not wedged), or it does nothing at all.

Its memory is limited from both sides. The child limits its own data segments (``RLIMIT_DATA``:
private anonymous memory, which numpy and torch allocate; ``RLIMIT_AS`` would count the address
space that thread stacks, mapped libraries and mapped weights merely reserve), so that an allocation
too many is a ``MemoryError`` in it. The supervisor watches its resident size, which also counts
what is shared or mapped, and kills it.

Promises: neither side waits for the other; without ``/proc`` only heartbeats count.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Finding", "HeartbeatReader", "heartbeat_into", "limit_data", "resident"]

_TIME = struct.Struct("<d")
_HEARTBEAT_SECONDS = 0.5
_SILENT_SECONDS = 4.0
"""Without a heartbeat for so long, and without CPU time used meanwhile, a child is wedged."""
_TICKS = os.sysconf("SC_CLK_TCK")


def heartbeat_into(path: Path) -> None:
    """Start the thread of this process that beats until the process ends."""
    memory = mmap.mmap(os.open(path, os.O_RDWR), _TIME.size)

    def heartbeat() -> None:
        while True:
            _TIME.pack_into(memory, 0, time.monotonic())
            time.sleep(_HEARTBEAT_SECONDS)

    # Little of the child's memory allowance goes into this stack.
    before = threading.stack_size(256 << 10)
    threading.Thread(target=heartbeat, name="elesh-heartbeat", daemon=True).start()
    threading.stack_size(before)


@dataclass(frozen=True)
class Finding:
    """How the child is, and why if it is not well."""

    child: Literal["idle", "busy", "wedged", "dead"]
    why: str = ""


class HeartbeatReader:
    """Reads the heartbeat in the supervisor.

    Args:
        path: the file of the heartbeat; it is made here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(_TIME.size))
        descriptor = os.open(path, os.O_RDONLY)
        self._memory = mmap.mmap(descriptor, _TIME.size, access=mmap.ACCESS_READ)
        os.close(descriptor)
        self._pid, self._moved, self._used = 0, 0.0, 0.0

    def look(self, pid: int | None, *, busy: bool) -> Finding:
        """How the child ``pid`` is now; call it every second or so."""
        if pid is None:
            return Finding("dead", "the compute child ended; a fresh one is being started")
        now = time.monotonic()
        state, used = _of_process(pid)
        if pid != self._pid or used > self._used:
            # A fresh child has its time, too: it must load its numerics before it beats.
            self._pid, self._moved = pid, now
        self._used = used
        (heartbeat,) = _TIME.unpack_from(self._memory)
        silent = now - heartbeat
        if silent < _SILENT_SECONDS or (state != "T" and now - self._moved < _SILENT_SECONDS):
            return Finding("busy" if busy else "idle")
        if state == "T":
            return Finding("wedged", f"the compute child (pid {pid}) is stopped by a signal")
        return Finding(
            "wedged",
            f"the compute child (pid {pid}) has neither beaten nor used any CPU time for "
            f"{now - self._moved:.0f} s",
        )


def _of_process(pid: int) -> tuple[str, float]:
    """State letter and CPU seconds of a process; nothing known where there is no ``/proc``."""
    try:
        # The name may hold spaces and brackets: what counts comes after the last bracket.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0.0
    return fields[0].upper(), (int(fields[11]) + int(fields[12])) / _TICKS


def limit_data(size: int) -> None:
    """Have the kernel refuse this process more than ``size`` bytes of data segments.

    Where the platform has no such limit, or a lower hard one, nothing changes.
    """
    with contextlib.suppress(ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (size, hard))


def resident(pid: int) -> int | None:
    """Resident size of a process in bytes; None where it cannot be read (no /proc, no process)."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return None
    return int(pages) * resource.getpagesize()
