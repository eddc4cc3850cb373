"""Commands that many tasks send in the same turn of the loop share one round trip.

Promises: each command is sent at most once, is answered for itself, and fails for itself: what
stands next to it in the pipeline changes nothing but when it is sent. Where the connection fails,
all that were on the way hear of it. A task that is cancelled waits no longer; what it asked for may
still happen, as with a command of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from redis.asyncio import Redis

__all__ = ["ALONE", "Gathering"]

ALONE = object()
"""The answer to a command that had no company: it is better sent without a pipeline."""

_MOST = 128
"""Commands of one round trip: the first is not to wait long for the last."""
Asked = tuple[tuple[Any, ...], Mapping[str, Any], asyncio.Future[Any]]


class Gathering:
    """What the tasks of one loop ask of one client.

    Args:
        seconds: to wait at most for the answers of a round trip.
    """

    def __init__(self, client: Redis, seconds: float) -> None:
        self._client, self._seconds = client, seconds
        self._asked: list[Asked] = []
        self._sending: set[asyncio.Task[None]] = set()

    async def send(self, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        """The answer to a command, which goes with whatever else is asked in this turn; ``ALONE``,
        and nothing was sent, if nothing else is."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        if not self._asked:
            loop.call_soon(self._flush)
        self._asked.append((args, options, answer))
        return await answer

    def _flush(self) -> None:
        asked, self._asked = self._asked, []
        if len(asked) == 1:
            _answer(asked[0][2], ALONE)
            return
        for start in range(0, len(asked), _MOST):
            sending = asyncio.create_task(self._exchange(asked[start : start + _MOST]))
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)

    async def _exchange(self, asked: list[Asked]) -> None:
        pipeline = self._client.pipeline(transaction=False)
        for args, options, _ in asked:
            pipeline.execute_command(*args, **options)
        try:
            async with asyncio.timeout(self._seconds):
                answers = await pipeline.execute(raise_on_error=False)
        except Exception as error:
            answers = [error] * len(asked)
        for (_, _, future), answer in zip(asked, answers, strict=True):
            _answer(future, answer)


def _answer(future: asyncio.Future[Any], answer: Any) -> None:
    if future.done():  # its task was cancelled
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)
