"""A worker's folder for fetched data, and the resources that it may lack: disk space, memory, file
handles, processes.

Promises: a living worker holds a lock in its folder. The next worker that starts there removes the
folders of workers that were killed, and none that is locked. A shortage says nothing about the
message at hand: that goes to another worker, or comes again when there is room, and is never
counted as poison.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from elesh.settings import SettingsError

_PREFIX = "elesh-worker-"
_LOCK = "lock"
_UNLOCKED_SECONDS = 86_400.0
"""A folder without a lock is being made, or was left by an older version; after so long it is the
latter."""


@contextlib.contextmanager
def spool() -> Iterator[Path]:
    """A folder of one's own for the length of the block.

    Raises:
        SettingsError: if there is no place for one.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        lock = (folder / _LOCK).open("wb")
    except OSError as error:
        raise SettingsError(
            f"no folder for temporary files: {error}; set TMPDIR to one with room"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _remove_left(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_left(own: Path) -> None:
    """Remove folders whose worker is gone."""
    for folder in own.parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            about = folder.lstat()
            if folder != own and about.st_uid == os.getuid() and _is_left(folder, about.st_mtime):
                shutil.rmtree(folder, ignore_errors=True)


def _is_left(folder: Path, modified: float) -> bool:
    try:
        with open(folder / _LOCK, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return folder.is_dir() and time.time() - modified > _UNLOCKED_SECONDS
    return True


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
