"""What a worker itself lacks: room on its disk, memory, file handles, processes. Pure.

It says nothing about the message at hand: that goes to another worker, or comes again when there is
room, and is never counted as poison.
"""

from __future__ import annotations

import errno
import os

__all__ = ["SHORTAGE_CODE", "Shortage", "shortage_of"]

SHORTAGE_CODE = "shortage"
"""``Failed.code`` of a job that the compute child had no room for."""
_LACKS = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
        errno.EAGAIN, errno.EIO, errno.EFBIG,
    }
)  # fmt: skip


class Shortage(Exception):
    """This worker lacks what it needs to serve anything."""


def shortage_of(error: BaseException) -> str:
    """What the worker lacks, as one line; empty if ``error`` is of another kind."""
    if isinstance(error, Shortage):
        return str(error)
    if isinstance(error, MemoryError):
        return f"out of memory: {error}".rstrip(": ")
    if isinstance(error, OSError) and error.errno in _LACKS:
        where = f": {error.filename}" if error.filename else ""
        return f"{os.strerror(error.errno or 0).lower()}{where}"
    return ""
