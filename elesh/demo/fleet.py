"""Processes beside demo and examples: workers (started, awaited, logged to files, drained), and a
web console (``elesh demo --console``)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from elesh.bus import embedded_server
from elesh.observe.terminal import escape
from elesh.settings import Settings

_START_SECONDS = 60.0
_STOP_SECONDS = 20.0


class FleetError(Exception):
    """A worker did not start; says which and where its log is."""


class WorkerProcess:
    """One ``elesh worker``, its log in a file; drains when this process ends, however it does."""

    def __init__(self, url: str, settings: Path | None, log: Path, number: int) -> None:
        command = [sys.executable, "-m", "elesh.cli", "worker", "--end-with-input"]
        if settings is not None:
            command += ["--settings", str(settings)]
        # The URL may hold a password: the environment is not shown in process lists.
        environment = os.environ | {"ELESH_REDIS_URL": url}
        self.log, self.number = log, number
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdin=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,
        )
        self._ready, self._serving = threading.Event(), False
        threading.Thread(target=self._copy_log, daemon=True).start()

    def wait_ready(self) -> bool:
        """Wait until the worker serves, or says that it waits for the bus; whether it serves.

        Raises:
            FleetError: if it ends or says nothing for a minute.
        """
        if not self._ready.wait(_START_SECONDS) or self.process.poll() is not None:
            raise FleetError(f"worker {self.number} did not start; its log: {self.log}")
        return self._serving

    def _copy_log(self) -> None:
        assert self.process.stderr is not None
        with self.log.open("w") as log:
            for line in self.process.stderr:
                log.write(line)
                log.flush()
                self._serving |= " serving " in line
                if self._serving or "unavailable" in line:
                    self._ready.set()
        self._ready.set()  # it ended: wait_ready looks at the exit code

    def stop(self) -> None:
        """SIGTERM, a moment to drain, then SIGKILL."""
        self.process.terminate()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def fleet(url: str, count: int, settings: Path | None, folder: Path) -> Iterator[int]:
    """``count`` workers, drained when the block ends; yields how many serve already.

    Fewer than all serve only where the bus is away: they wait for it.
    """
    workers = [
        WorkerProcess(url, settings, folder / f"worker-{number}.log", number)
        for number in range(1, count + 1)
    ]
    try:
        yield sum(worker.wait_ready() for worker in workers)
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.stop()


@contextmanager
def local_fleet(
    block: Mapping[str, Any] | None = None, workers: int = 1
) -> Iterator[tuple[str, Settings]]:
    """A server and workers for one script, gone with the block: for examples and first trials.

    Args:
        block: settings as under the key ``elesh`` of a settings file.

    Yields:
        The server's URL and the settings, for a Session.
    """
    with tempfile.TemporaryDirectory(prefix="elesh-fleet-") as name:
        folder = Path(name)
        file = folder / "settings.yaml"
        file.write_text(yaml.safe_dump({"elesh": dict(block or {})}))
        settings = Settings.load(file)
        with embedded_server(folder / "server") as url, fleet(url, workers, file, folder):
            yield url, settings


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
