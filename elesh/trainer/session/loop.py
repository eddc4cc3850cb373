"""The loop of the bus's thread: looking a name up that hangs keeps no process from ending."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from typing import Any

__all__ = ["new_loop"]


class _Loop(asyncio.SelectorEventLoop):
    """Looks names up on daemon threads: those of the default executor are waited for when the loop
    and the process end, however long the system's resolver takes."""

    async def getaddrinfo(
        self,
        host: Any,
        port: Any,
        *,
        family: int = 0,
        type: int = 0,
        proto: int = 0,
        flags: int = 0,
    ) -> Any:
        """As the function of the same name in :mod:`socket`."""
        answer: asyncio.Future[Any] = self.create_future()

        def resolve(found: Any, error: Exception | None) -> None:
            if answer.done():  # the wait was cancelled
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(found)

        def look_up() -> None:
            found: Any = None
            failure: Exception | None = None
            try:
                found = socket.getaddrinfo(host, port, family, type, proto, flags)
            except Exception as error:
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self.call_soon_threadsafe(resolve, found, failure)

        threading.Thread(target=look_up, name="elesh-resolver", daemon=True).start()
        return await answer


def new_loop() -> asyncio.AbstractEventLoop:
    """A loop for :class:`asyncio.Runner`."""
    return _Loop()
