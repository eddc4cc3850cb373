"""The thread that talks to the bus for a session, with an event loop of its own.

Promises: handing something over never blocks and never raises because the bus is away; what could
not be sent is counted in ``missed`` and logged; an entry that the server has is sent once. The
thread ends with :meth:`BusThread.close`, whatever the bus does.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from opentelemetry.trace import SpanKind

from elesh.bus import Bus, BusUnavailable, Delivery, server_url
from elesh.observe import get_logger, messaging, span_from
from elesh.settings import Settings
from leyline import CheckpointBundle, ContractError, Message, read_envelope, unwrap
from leyline.streams import DECISIONS, TELEMETRY, Stream

from .publishing import with_blobs

__all__ = ["BusThread", "Outgoing"]

_SOURCE = "kasmina"
_OUTBOX = 8
_log = get_logger(__name__)

Take = Callable[[Message, Mapping[str, str]], None]
"""Takes in a message of the run with its trace context; called on the bus's thread."""


@dataclass(frozen=True)
class Outgoing:
    """Something to publish; a bundle's blobs are put first."""

    stream: Stream
    message: Message | CheckpointBundle
    carrier: Mapping[str, str]
    epoch: int
    event_id: str = ""
    request_id: str = ""


class BusThread:
    """Sends what a run publishes and hears what is said to it.

    Args:
        run_id: messages of other runs are passed over.
        url: Redis URL; empty: ``ELESH_REDIS_URL``, else the embedded server.
        take: called for every decision and telemetry event of the run.
    """

    def __init__(self, run_id: str, url: str, settings: Settings, take: Take) -> None:
        self.missed = 0
        self.connected = threading.Event()
        self._run_id, self._url, self._settings, self._take = run_id, url, settings, take
        self._outbox: queue.Queue[Outgoing] = queue.Queue(_OUTBOX)
        self._closing = threading.Event()
        self._wake: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._main, name="elesh-session", daemon=True)

    def start(self) -> None:
        """Begin to talk."""
        self._thread.start()

    def send(self, item: Outgoing) -> bool:
        """Queue something; False, and counted as missed, if the queue is full."""
        try:
            self._outbox.put_nowait(item)
        except queue.Full:
            self.missed += 1
            _log.warning("not published, queue full", stream=item.stream.name, epoch=item.epoch)
            return False
        self._wake()
        return True

    def close(self, timeout: float) -> None:
        """Send what is queued, for at most ``timeout`` seconds, and end the thread."""
        self._closing.set()
        self._wake()
        self._thread.join(timeout)
        if self._thread.is_alive():
            _log.warning("session closed with messages unsent", queued=self._outbox.qsize())

    # From here on: on the thread.

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception:
            self.missed += self._outbox.qsize()
            _log.exception("session ended; training goes on without Elesh")

    async def _serve(self) -> None:
        loop, woken, closing = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

        def rouse() -> None:
            woken.set()
            if self._closing.is_set():
                closing.set()

        def wake() -> None:
            # The loop may have ended already: then there is nobody to wake.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(rouse)

        self._wake = wake
        rouse()
        async with server_url(self._url) as url:
            while not (closing.is_set() and self._outbox.empty()):
                if not await self._connect_and_talk(url, woken, closing):
                    break
        self.missed += self._outbox.qsize()

    async def _connect_and_talk(
        self, url: str, woken: asyncio.Event, closing: asyncio.Event
    ) -> bool:
        """One connection's life; False if the session closes before the bus is there."""
        settings = self._settings
        bus = await Bus.connect_when_available(url, settings.bus, settings.breaker, stop=closing)
        if bus is None:
            return False
        try:
            await self._talk(bus, woken, closing)
        except BusUnavailable as error:
            _log.warning("bus away, will connect again", reason=str(error))
        finally:
            await bus.close()
        return True

    async def _talk(self, bus: Bus, woken: asyncio.Event, closing: asyncio.Event) -> None:
        starts = [
            (stream, (await bus.follow(stream, last_id="$", block_seconds=0))[0])
            for stream in (DECISIONS, TELEMETRY)
        ]
        listeners = [
            asyncio.create_task(self._listen(bus, stream, start, closing))
            for stream, start in starts
        ]
        self.connected.set()
        try:
            await self._send_all(bus, woken, closing)
        finally:
            for task in listeners:
                task.cancel()
            await asyncio.gather(*listeners, return_exceptions=True)

    async def _send_all(self, bus: Bus, woken: asyncio.Event, closing: asyncio.Event) -> None:
        """Send until closing and the outbox is empty."""
        while not (closing.is_set() and self._outbox.empty()):
            woken.clear()
            while not self._outbox.empty():
                await self._send(bus, self._outbox.get_nowait(), closing)
            if not closing.is_set():
                await woken.wait()

    async def _send(self, bus: Bus, item: Outgoing, closing: asyncio.Event) -> None:
        name = item.stream.name
        with span_from(
            item.carrier, f"send {name}", kind=SpanKind.CLIENT, attributes=messaging("send", name)
        ):
            while not await self._try_to_send(bus, item):
                if not await bus.when_available(stop=closing):
                    self.missed += 1
                    return

    async def _try_to_send(self, bus: Bus, item: Outgoing) -> bool:
        """False if the bus is away and it has to be tried again."""
        try:
            message = item.message
            if isinstance(message, CheckpointBundle):
                message = await with_blobs(bus, message, item.request_id)
            await bus.publish(
                item.stream,
                message,
                source=_SOURCE,
                carrier=item.carrier,
                run_id=self._run_id,
                epoch=item.epoch,
                event_id=item.event_id,
            )
        except BusUnavailable as error:
            _log.warning("bus away, will publish later", reason=str(error))
            return False
        except ContractError as error:
            self.missed += 1
            _log.error("not publishable", stream=item.stream.name, reason=str(error))
        return True

    async def _listen(self, bus: Bus, stream: Stream, last: str, closing: asyncio.Event) -> None:
        while True:
            try:
                last, deliveries = await bus.follow(stream, last_id=last, block_seconds=1.0)
            except BusUnavailable:
                if not await bus.when_available(stop=closing):
                    return
                continue
            for delivery in deliveries:
                self._hear(bus, delivery)

    def _hear(self, bus: Bus, delivery: Delivery) -> None:
        try:
            delivery.check(bus.guard)
            envelope = read_envelope(delivery.envelope)
            if envelope.training_run_id == self._run_id:
                self._take(unwrap(envelope), delivery.carrier)
        except ContractError as error:
            _log.warning(
                "unreadable message passed over",
                stream=delivery.stream.name,
                entry=delivery.entry_id,
                reason=str(error),
            )
