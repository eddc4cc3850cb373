"""While a program runs, the process can open nothing.

The kernel's limits of this process are lowered around the run: no new file, pipe or socket
(``RLIMIT_NOFILE``), no byte written to a file (``RLIMIT_FSIZE``), no new process or thread
(``RLIMIT_NPROC``; not for root). So there is no network and no disk, without privileges or
namespaces. Memory and processor time are the worker's to limit. What this does not do: it is no
sandbox against machine code, which could raise the limits again. Programs bring none; they are
data, and these limits are the second wall.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator

__all__ = ["confined"]

_NOTHING = (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC)


@contextlib.contextmanager
def confined() -> Iterator[None]:
    """Nothing can be opened, written or started inside; what is open stays usable for reading.

    The hard limits stay, so that the process gets its own limits back at the end.
    """
    before = [(limit, resource.getrlimit(limit)) for limit in _NOTHING]
    try:
        for limit, (_, hard) in before:
            resource.setrlimit(limit, (0, hard))
        yield
    finally:
        for limit, pair in before:
            resource.setrlimit(limit, pair)
