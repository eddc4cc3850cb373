"""Small things about processes and their places that more than one part of the house needs."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

import platformdirs

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends (Linux only).

    Elsewhere nothing happens: children then end when they read the end of their input.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def state_folder() -> Path:
    """What outlives a process lies here: ``ELESH_STATE_DIR``, or the user's state folder."""
    chosen = os.environ.get("ELESH_STATE_DIR")
    return Path(chosen) if chosen else Path(platformdirs.user_state_dir("elesh"))
