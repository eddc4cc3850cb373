"""Private files that survive a kill, and the lock of a folder.

Promises: a file that is replaced is the old one or the new one after a kill or a power cut, never a
half; files are readable by their owner only (0600, folders 0700); a folder belongs to one process
at a time, and forked children of that process (a data loader's workers) do not hold it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
import weakref
from pathlib import Path
from typing import IO

from elesh.observe import get_logger
from leyline import InvalidField

_FILE, _FOLDER = 0o600, 0o700
_POLL_SECONDS = 0.05
_BUSY = (errno.EAGAIN, errno.EACCES)
_log = get_logger(__name__)


class FolderInUse(InvalidField):
    """Another process uses the folder of restore points."""


def private_folder(path: Path) -> Path:
    """Make a folder, if it is not there, that only its owner can read."""
    path.mkdir(mode=_FOLDER, parents=True, exist_ok=True)
    return path


def open_private(path: Path, flags: int, *, shared: bool = False) -> int:
    """Open or make a file that only its owner can read (``shared``: that others can, as far as the
    umask lets them); the descriptor."""
    descriptor = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, 0o666 if shared else _FILE)
    if not shared and os.fstat(descriptor).st_mode & 0o077:  # of an earlier version, or copied here
        with contextlib.suppress(OSError):
            os.fchmod(descriptor, _FILE)
    return descriptor


def is_at(path: Path, file: IO[bytes]) -> bool:
    """Whether an open file is the one that a path names: it may have been deleted since."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def write_private(path: Path, data: bytes, *, shared: bool = False) -> None:
    """Write a file and wait until it is on disk."""
    with os.fdopen(open_private(path, os.O_WRONLY | os.O_TRUNC, shared=shared), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_durably(path: Path, data: bytes, *, shared: bool = False) -> None:
    """Replace a file as a whole; ``shared``: not only for its owner."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        write_private(draft, data, shared=shared)
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)  # on a full disk, the half would only be in the way
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class FolderLock:
    """A folder that is this process's alone, until :meth:`release` or the process's end.

    Args:
        folder: must exist; the lock is the file ``lock`` in it, which names its holder.
        wait_seconds: how long to wait for another process to end.
        gives_way: until :meth:`keep`, another lock of this process takes the folder over: a cell of
            a notebook is run again, and what it made before was never used.

    Raises:
        FolderInUse: if another process still has it after that, or this one has it.
        InvalidField: if the file system has no locks.
    """

    def __init__(self, folder: Path, wait_seconds: float = 0.0, *, gives_way: bool = False) -> None:
        self._path = folder / "lock"
        self._gives_way, self._taken_over = gives_way, False
        self._file = os.fdopen(open_private(self._path, os.O_RDWR), "r+b", buffering=0)
        try:
            self._acquire(folder, wait_seconds)
        except BaseException:
            self._file.close()
            raise
        _held.add(self)
        with contextlib.suppress(OSError):  # the name is for people; a full disk may lack it
            self._file.truncate(0)
            self._file.write(_myself().encode())

    @property
    def stands(self) -> bool:
        """Whether the folder still has the file that is locked."""
        return is_at(self._path, self._file)

    def keep(self) -> None:
        """Give way no more.

        Raises:
            FolderInUse: if another lock of this process has taken the folder over.
        """
        if self._taken_over:
            hint = "use that session, or create this one again"
            found = f"taken over by a later session of this process: {self._path.parent}"
            raise FolderInUse("restore_dir", "a folder of this session", found, hint=hint)
        self._gives_way = False

    def _acquire(self, folder: Path, wait_seconds: float) -> None:
        deadline, said = time.monotonic() + wait_seconds, False
        for lock in list(_held):
            if lock._gives_way and is_at(self._path, lock._file):
                lock.release()
                lock._taken_over = True
        while not self._try():
            holder = os.pread(self._file.fileno(), 100, 0).decode(errors="replace") or "unknown"
            own = holder == _myself()  # waiting for oneself is in vain
            if own or time.monotonic() >= deadline:
                hint = "end that process and the children it left, or choose another run id"
                if own:
                    hint = "close the session of this process that has it, or choose another run id"
                expected = "a folder that no other process uses"
                waited = "" if own else f", still after {wait_seconds:g} s"
                found = f"in use by process {holder}{waited}: {folder}"
                raise FolderInUse("restore_dir", expected, found, hint=hint)
            if not said:
                what = "restore points are in use, waiting for their process to end"
                _log.warning(what, folder=folder, holder=holder, seconds=wait_seconds)
                said = True
            time.sleep(_POLL_SECONDS)

    def _try(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _BUSY:
                return False
            hint = "choose a folder on a file system that has locks (flock)"
            expected = "a folder that can be locked"
            raise InvalidField("restore_dir", expected, str(error), hint=hint) from None
        return True

    def release(self) -> None:
        """Let another process have the folder, whatever children still hold the file."""
        if self in _held:
            _held.discard(self)
            with contextlib.suppress(OSError):
                self._file.truncate(0)
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()


def _myself() -> str:
    return f"{os.getpid()} on {socket.gethostname()}"


def _let_go_in_child() -> None:
    """After a fork: close the child's copies. The lock stays the parent's."""
    for lock in list(_held):
        lock._file.close()
    _held.clear()


_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()
os.register_at_fork(after_in_child=_let_go_in_child)
