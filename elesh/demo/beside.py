"""``elesh demo --console``: a web console beside the demo, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from elesh.observe.terminal import escape

__all__ = ["console_beside"]

_STOP_SECONDS = 5.0


@contextmanager
def console_beside(
    url: str, settings: Path | None, screen: Console, *, wanted: bool
) -> Iterator[None]:
    """Serve the console during the block and, on a terminal, until Ctrl-C after it.

    A console that cannot start says why, and the demo goes on without it.
    """
    if not wanted:
        yield
        return
    command = [sys.executable, "-m", "elesh.cli", "console"]
    if settings is not None:
        command += ["--settings", str(settings)]
    # The URL may hold a password: the environment is not shown in process lists.
    process = subprocess.Popen(
        command,
        env=os.environ | {"ELESH_REDIS_URL": url},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    threading.Thread(target=_repeat, args=(process, screen), daemon=True).start()
    try:
        yield
        if screen.is_terminal and process.poll() is None:
            screen.print("the console stays until Ctrl-C", highlight=False)
            with contextlib.suppress(KeyboardInterrupt):
                process.wait()
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def _repeat(process: subprocess.Popen[str], screen: Console) -> None:
    """Say where it serves, or what went wrong."""
    assert process.stdout is not None
    for line in process.stdout:
        screen.print(escape(line.rstrip()), highlight=False, soft_wrap=True)
