"""``elesh`` processes forked from one that has imported it: 0.05 CPU seconds instead of two.

Everything else is as in a process of one's own: pid, signals, environment, standard error. A
worker's compute child is forked from its supervisor, unless it has a fault (``sitecustomize.py``).
The demo and the compose file's commands start theirs in the ordinary way.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import traceback
from asyncio.subprocess import Process
from collections.abc import Mapping, Sequence
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TextIO

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["elesh.cli", "elesh.worker.supervisor", "elesh.observe", "elesh.worker.compute.child"]
)
CONSTANTS = "TEST_CONSTANTS"
"""The environment variable with constants of modules that are others in the process, as JSON."""


class Forked:
    """One ``elesh`` process; what tests use of ``subprocess.Popen``."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        reader, writer = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(
            target=_elesh, args=(list(arguments), dict(os.environ | environment), writer),
            daemon=True,
        )  # fmt: skip
        self._process.start()
        writer.close()
        self.stderr: TextIO = os.fdopen(os.dup(reader.fileno()), "r", errors="replace")
        reader.close()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("elesh", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _elesh(arguments: list[str], environment: dict[str, str], stderr: Connection) -> None:
    from elesh.cli import main

    os.environ.clear()
    os.environ.update(environment)
    os.dup2(stderr.fileno(), 2)
    stderr.close()
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = ["elesh", *arguments]
    for place, value in json.loads(os.environ.pop(CONSTANTS, "{}")).items():
        module, _, name = place.rpartition(".")
        setattr(import_module(module), name, value)
    if "ELESH_FAULT" not in os.environ:
        asyncio.create_subprocess_exec = _forked_child  # type: ignore[assignment]
    main()


_START = asyncio.create_subprocess_exec


async def _forked_child(*command: str, **options: Any) -> Process:
    """A compute child, which never comes to its ``exec``; other commands are run."""
    from elesh.worker.compute.process import CHILD

    if CHILD in command:
        options["preexec_fn"] = lambda: _be_child(command[command.index(CHILD) :])
    return await _START(*command, **options)


def _be_child(argv: Sequence[str]) -> None:
    """Does not return: nothing of the supervisor's is closed, ended or written by this process."""
    from elesh.worker.compute import child

    code = 1
    try:
        os.closerange(3, 1 << 12)  # the last of them is what Popen waits for
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        logging.getLogger("elesh").handlers.clear()
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, mode, closefd=False)  # noqa: SIM115
            for number, mode in enumerate(("r", "w", "w"))
        )
        sys.argv = list(argv)
        child.main()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
