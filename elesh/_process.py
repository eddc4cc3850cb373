"""Process facts that several packages need: names, folders, parent processes."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from pathlib import Path

import platformdirs

from .settings import SettingsError

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends (Linux only).

    Elsewhere nothing happens: children then end when they read the end of their input.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Whether there is such a process on this machine, of any user."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def own_name() -> str:
    """Host, process id, and the namespace that it counts in, where the system tells."""
    return f"{socket.gethostname()}:{os.getpid()}:{_namespace()}"


def is_gone(name: str) -> bool:
    """Whether an :func:`own_name` is that of a process of this machine that has ended."""
    host, _, rest = name.partition(":")
    pid, _, namespace = rest.partition(":")
    here = host == socket.gethostname() and namespace == _namespace() != ""
    return here and pid.isdecimal() and not is_alive(int(pid))


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        return ""


def state_folder() -> Path:
    """What outlives a process lies here: ``ELESH_STATE_DIR``, or the user's state folder.

    Raises:
        SettingsError: if the user has no home folder, and none is named.
    """
    if chosen := os.environ.get("ELESH_STATE_DIR"):
        return Path(chosen)
    folder = Path(platformdirs.user_state_dir("elesh"))
    if not folder.is_absolute():  # "~" stays as it is where no home is known
        raise SettingsError("no home folder (HOME): set ELESH_STATE_DIR to a folder")
    return folder
