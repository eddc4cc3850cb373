"""The supervisor's hold on its compute child: start it, ask it, kill it, start it again.

Promises: ``run`` answers or raises :class:`ChildDied` or :class:`ChildTimeout` within its time; the
child is a process of its own, so that a long hold of the interpreter lock in it never delays a
lease; after a death the next ``run`` finds a fresh child.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from asyncio.subprocess import PIPE, Process

from .protocol import PREFIX, Job, Reply, pack_frame, unpack_body

__all__ = ["ChildDied", "ChildTimeout", "ComputeChild"]


class ChildDied(Exception):
    """The compute child ended in the middle of a job (crash, kill, out of memory)."""


class ChildTimeout(Exception):
    """The job took longer than its window; the child was killed."""


class ComputeChild:
    """One child process, one job at a time."""

    def __init__(self) -> None:
        self._process: Process | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id while it lives."""
        alive = self._process is not None and self._process.returncode is None
        return self._process.pid if alive and self._process else None

    async def start(self) -> None:
        """Start the child unless it is alive, and wait until it has loaded its numerics.

        Raises:
            ChildDied: if it ends before it is ready.
        """
        if self.pid is None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "elesh.worker.child",
                stdin=PIPE,
                stdout=PIPE,
                start_new_session=True,  # signals of the terminal are the supervisor's
            )
            try:
                await self._read()
            except (asyncio.IncompleteReadError, ConnectionError):
                raise await self._death() from None

    async def run(self, job: Job, *, timeout: float) -> Reply:
        """The child's reply to ``job``, waited for at most ``timeout`` seconds.

        Raises:
            ChildTimeout: the child took longer and was killed.
            ChildDied: the child ended before it answered.
        """
        try:
            async with asyncio.timeout(timeout):
                await self.start()
                return await self._exchange(job)
        except TimeoutError:
            await self.kill()
            raise ChildTimeout(f"analysis took longer than {timeout:g} s") from None
        except (asyncio.IncompleteReadError, ConnectionError):
            raise await self._death() from None
        except asyncio.CancelledError:
            await self.kill()
            raise

    async def kill(self) -> None:
        """End the child now; a job in it is lost, which its lease repairs."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def _exchange(self, job: Job) -> Reply:
        assert self._process is not None
        writer = self._process.stdin
        assert writer is not None
        writer.write(pack_frame(job))
        await writer.drain()
        return await self._read()

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


def _exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
