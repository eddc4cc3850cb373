"""The supervisor's handle of its compute child: start, ask, watch, kill, restart.

Promises: ``run`` answers or raises a :class:`ChildFailure` within its time; the child is a process
of its own, so that a long hold of the interpreter lock in it never delays a lease; its memory is
capped; a child that dies is replaced at once (:meth:`ComputeChild.keep`), or by the next ``run``.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

from elesh.observe import get_logger

from .protocol import (
    MEMORY_CODE,
    PREFIX,
    PRELOAD,
    ChildDied,
    ChildFailure,
    ChildOverMemory,
    ChildTimeout,
    Finding,
    HeartbeatReader,
    Job,
    Reply,
    pack_frame,
    resident,
    unpack_body,
)

_WATCH_SECONDS = 0.1
_AGAIN_SECONDS, _LONGEST_PAUSE = 1.0, 60.0
_START_SECONDS = 60.0
"""For a fresh child to load its numerics, beside the time of the job."""
_MOST_TEXT = 1 << 16
_log = get_logger(__name__)

CHILD = "elesh.worker.compute.child"
"""The module that is the child; tests put another one there."""


class ComputeChild:
    """One child process, one job at a time.

    Args:
        memory_limit: bytes that the child may use.
        folder: for the file of its heartbeat.
        preload: have it load torch, where that is installed, before its first job.
    """

    def __init__(self, memory_limit: int, folder: Path, *, preload: bool = False) -> None:
        self._limit = memory_limit
        self._arguments = [PRELOAD] if preload else []
        self._heartbeat = HeartbeatReader(folder / "heartbeat")
        self._process: Process | None = None
        self._hearing: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()
        self.busy = False
        """Whether a job is in the child."""

    @property
    def pid(self) -> int | None:
        """The child's process id while it lives."""
        alive = self._process is not None and self._process.returncode is None
        return self._process.pid if alive and self._process else None

    def probe(self) -> Finding:
        """The health of the child, from outside; see :class:`.protocol.HeartbeatReader`."""
        return self._heartbeat.probe(self.pid, busy=self.busy)

    async def start(self) -> None:
        """Start the child unless it is alive, and wait until it has loaded its numerics.

        Raises:
            ChildDied: if it ends before it is ready.
            ChildTimeout: if it is not ready in a minute.
        """
        async with self._lock:
            await self._start()

    async def keep(self) -> None:
        """Have a fresh child whenever one has died, until cancelled; :meth:`start` it first.

        Waits for the end of the process, so that a living one costs nothing. One that dies in a job
        is replaced once the job has heard of it; one that cannot start is tried ever more rarely.
        """
        pause = _AGAIN_SECONDS
        while True:
            assert self._process is not None
            await self._process.wait()
            try:
                await self.start()
                pause = _AGAIN_SECONDS
            except (ChildFailure, OSError) as error:
                _log.warning("compute child does not start", reason=str(error))
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    async def _start(self) -> None:
        if self.pid is None:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", CHILD),
                *(str(self._limit), str(self._heartbeat.path), *self._arguments),
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                start_new_session=True,  # signals of the terminal are the supervisor's
            )
            self._hearing = asyncio.create_task(_pass_on(self._process))
            try:
                async with asyncio.timeout(_START_SECONDS):
                    await self._read()
            except TimeoutError:
                await self.kill()
                raise ChildTimeout(f"compute child not ready in {_START_SECONDS:g} s") from None
            except (asyncio.IncompleteReadError, ConnectionError):
                raise await self._death() from None

    async def run(self, job: Job, *, timeout: float) -> Reply:
        """The child's reply to ``job``, waited for at most ``timeout`` seconds.

        Raises:
            ChildTimeout: the child took longer and was killed.
            ChildOverMemory: it used more memory than it may, and was killed.
            ChildDied: the child ended before it answered.
        """
        async with self._lock:
            try:
                await self._start()
                self.busy = True
                async with asyncio.timeout(timeout):
                    assert self._process is not None
                    assert self._process.stdin is not None
                    self._process.stdin.write(pack_frame(job))
                    await self._process.stdin.drain()
                    reply = await self._monitored_answer()
            except TimeoutError:
                await self.kill()
                raise ChildTimeout(f"analysis took longer than {timeout:.3g} s") from None
            except (asyncio.IncompleteReadError, ConnectionError):
                raise await self._death() from None
            except (asyncio.CancelledError, ChildOverMemory):
                await self.kill()
                raise
            finally:
                self.busy = False
            if reply.failed is not None and reply.failed.code == MEMORY_CODE:
                await self.kill()  # what it managed to allocate stays allocated
                raise ChildOverMemory(f"analysis ran out of its {self._limit} bytes of memory")
            return reply

    async def kill(self) -> None:
        """End the child now; a job in it is lost, which its lease repairs."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def _monitored_answer(self) -> Reply:
        """The answer, while the child's resident size is looked at."""
        answer = asyncio.create_task(self._read())
        try:
            while not (await asyncio.wait({answer}, timeout=_WATCH_SECONDS))[0]:
                size = resident(self.pid) if self.pid is not None else None
                if size is not None and size > self._limit:
                    raise ChildOverMemory(f"analysis used {size} bytes of at most {self._limit}")
            return answer.result()
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)

    async def _read(self) -> Reply:
        assert self._process is not None
        reader = self._process.stdout
        assert reader is not None
        (length,) = PREFIX.unpack(await reader.readexactly(PREFIX.size))
        reply: Reply = unpack_body(Reply, await reader.readexactly(length))
        return reply

    async def _death(self) -> ChildDied:
        assert self._process is not None
        return ChildDied(f"compute child ended with {_exit(await self._process.wait())}")


async def _pass_on(process: Process) -> None:
    """Log what a child writes on standard error, so that it never waits for a reader."""
    assert process.stderr is not None
    while text := await process.stderr.read(_MOST_TEXT):
        for line in text.decode(errors="backslashreplace").splitlines():
            if line.strip():
                _log.warning("compute child", pid=process.pid, says=line.rstrip())


def _exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
