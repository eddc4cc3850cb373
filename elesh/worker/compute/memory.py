"""How much memory the compute child may use, held from both sides.

The child limits its own data segments (``RLIMIT_DATA``: private anonymous memory, which numpy and
torch allocate; ``RLIMIT_AS`` would count the address space that thread stacks, mapped libraries and
mapped weights merely reserve), so that an allocation too many is a ``MemoryError`` in it. The
supervisor watches its resident size, which also counts what is shared or mapped, and kills it.
"""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

__all__ = ["limit_data", "resident"]


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
