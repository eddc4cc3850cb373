"""The thread that talks to the bus for a session, with an event loop of its own.

Promises: what is in the mailbox is sent, and what is said to the run is put there; the training
thread never waits for it. Only the one trainer that has the run's claim speaks and hears; the claim
is renewed here, and the server looks at it with everything sent. The thread ends with
:meth:`BusThread.close`, whatever the bus does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Mapping
from datetime import datetime

from opentelemetry.trace import SpanKind

from elesh.bus import Bus, BusUnavailable, Delivery, Overloaded, RunClaimed, server_url
from elesh.bus.admission import hear, read, require_in_time
from elesh.bus.state.runs import Attempt
from elesh.observe import get_logger, messaging, span_from
from elesh.settings import Settings
from leyline import (
    CheckpointBundle,
    ContractError,
    IdempotencyKey,
    Message,
    StructuralPruningDecision,
    TelemetryEvent,
)
from leyline.streams import DECISIONS, TELEMETRY, Stream

from .mailbox import Incoming, Mailbox, Outgoing
from .publishing import in_attempt, keys_of, with_blobs

__all__ = ["BusThread"]

_SOURCE = "kasmina"
_log = get_logger(__name__)


class BusThread:
    """Sends what a run publishes and hears what is said to it.

    Args:
        run_id: messages of other runs are passed over.
        url: Redis URL; empty: ``ELESH_REDIS_URL``, else the embedded server.
        mailbox: what is to be sent, and where messages to the run are put.
        token: claims the run; one that an earlier process of the run had takes its claim over.
        sent: told, on the thread, the id of every event that is on the bus; must not raise.
    """

    def __init__(
        self,
        run_id: str,
        url: str,
        settings: Settings,
        mailbox: Mailbox,
        *,
        token: str,
        sent: Callable[[str], None],
    ) -> None:
        self._run_id, self._url, self._settings = run_id, url, settings
        self._mailbox, self._token, self._sent = mailbox, token, sent
        self._attempt: Attempt | None = None
        self._closing = threading.Event()
        self._wake: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._main, name="elesh-session", daemon=True)

    def start(self) -> None:
        """Begin to talk."""
        self._thread.start()

    def wake(self) -> None:
        """Something was put into the mailbox."""
        self._wake()

    def close(self, timeout: float) -> None:
        """Send what is queued, for at most ``timeout`` seconds, and end the thread."""
        self._closing.set()
        if self._thread.ident is None:  # never started
            self._mailbox.miss_all("the session was never entered")
            return
        self._wake()
        self._thread.join(timeout)
        if self._thread.is_alive():
            _log.warning("session closed with messages unsent", queued=self._mailbox.unsent)

    # From here on: on the thread.

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception:
            self._mailbox.miss_all("the session's thread has ended")
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
            while not (closing.is_set() and not self._mailbox.unsent):
                if not await self._connect_and_talk(url, woken, closing):
                    break
        self._mailbox.miss_all("closing while the bus is away")

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
        await self._claim(bus)
        starts = [
            (stream, (await bus.follow(stream, last_id="$", block_seconds=0))[0])
            for stream in (DECISIONS, TELEMETRY)
        ]
        tasks = [
            asyncio.create_task(self._listen(bus, stream, start, closing))
            for stream, start in starts
        ]
        tasks.append(asyncio.create_task(self._keep_claim(bus, closing)))
        self._mailbox.connected.set()
        try:
            await self._send_all(bus, woken, closing)
            await bus.runs.give_up(self._run_id, self._token)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _claim(self, bus: Bus) -> bool:
        """Claim the run, or renew the claim; whether it is ours."""
        who = f"{socket.gethostname()}:{os.getpid()}"
        seconds = self._settings.trainer.claim_seconds
        holder = await bus.runs.claim(self._run_id, self._token, who, seconds)
        if holder is None:
            if self._mailbox.refused:
                _log.info("run claimed", run=self._run_id)
            self._mailbox.refused = ""
            if self._attempt is None:
                await self._begin_attempt(bus, who)
            return True
        if not self._mailbox.refused:
            _log.error(
                "run refused: another trainer has it; training goes on without Elesh",
                run=self._run_id,
                holder=holder.who,
                seconds=holder.seconds,
            )
        self._mailbox.refused = (
            f"run {self._run_id} is claimed by {holder.who} for {holder.seconds:.0f} s more, and "
            "longer if it renews; end it or choose another run id"
        )
        return False

    async def _begin_attempt(self, bus: Bus, who: str) -> None:
        """Find out whether the run's id was used before, and say so at once."""
        self._attempt = await bus.runs.attempt(self._run_id, self._token, who)
        if not self._attempt.before:
            return
        self._mailbox.reused = (
            f"run {self._run_id} was trained before, by {self._attempt.before}, and not resumed "
            "from its restore points: its checkpoints are analysed anew, its history goes on; "
            "choose another run id for another run"
        )
        _log.warning("run id used before", run=self._run_id, reason=self._mailbox.reused)

    async def _keep_claim(self, bus: Bus, closing: asyncio.Event) -> None:
        """Renew the claim, four times a lease; one that was refused is asked for again."""
        while True:
            await asyncio.sleep(self._settings.trainer.claim_seconds / 4)
            try:
                await self._claim(bus)
            except BusUnavailable:
                if not await bus.when_available(stop=closing):
                    return

    async def _send_all(self, bus: Bus, woken: asyncio.Event, closing: asyncio.Event) -> None:
        """Send until closing and nothing is queued."""
        while not (closing.is_set() and not self._mailbox.unsent):
            woken.clear()
            while (item := self._mailbox.take()) is not None:
                await self._send(bus, item, closing)
            if not closing.is_set():
                await woken.wait()

    async def _send(self, bus: Bus, item: Outgoing, closing: asyncio.Event) -> None:
        name = item.stream.name
        with span_from(
            item.carrier, f"send {name}", kind=SpanKind.CLIENT, attributes=messaging("send", name)
        ):
            while not await self._try_to_send(bus, item):
                if not await bus.when_available(stop=closing):
                    self._mailbox.miss(item, "closing while the bus is away")
                    return

    async def _try_to_send(self, bus: Bus, item: Outgoing) -> bool:
        """False if the bus is away and it has to be tried again."""
        try:
            if await self._claim(bus):
                await self._publish(bus, item)
                self._sent(item.event_id)
            else:
                self._mailbox.miss(item, self._mailbox.refused)
        except RunClaimed:
            await self._claim(bus)  # says who has it
            self._mailbox.miss(item, self._mailbox.refused or "another trainer had the run")
        except Overloaded as error:
            self._mailbox.miss(item, str(error))
        except BusUnavailable as error:
            _log.warning("bus away, will publish later", reason=str(error))
            return False
        except ContractError as error:
            self._mailbox.miss(item, str(error))
        return True

    async def _publish(self, bus: Bus, item: Outgoing) -> None:
        message, event_id, keys = item.message, item.event_id, []
        if isinstance(message, CheckpointBundle):
            attempt = self._attempt.number if self._attempt else 0
            bundle = in_attempt(message, attempt)
            event_id += f"-{attempt}" if attempt else ""
            keys = keys_of(bundle, item.request_id)
            message = await with_blobs(bus, bundle, item.request_id)
        await bus.publish(
            item.stream,
            message,
            source=_SOURCE,
            carrier=item.carrier,
            run_id=self._run_id,
            epoch=item.epoch,
            event_id=event_id,
            token=self._token,
        )
        for key in keys:
            await self._hear_record(bus, key, item.carrier)

    async def _hear_record(self, bus: Bus, key: IdempotencyKey, carrier: Mapping[str, str]) -> None:
        """Take in a decision that was made before: a run that was killed publishes checkpoints
        again, which are answered once."""
        try:
            record = await bus.record(key)
            heard = read(record.envelope, DECISIONS) if record else None
        except ContractError as error:
            _log.warning("decision made before passed over", key=str(key), reason=str(error))
            return
        if heard is not None and heard.run_id == self._run_id:
            _log.info("decision made before", key=str(key))
            self._mailbox.deliver(Incoming(heard.message, carrier))

    async def _listen(self, bus: Bus, stream: Stream, last: str, closing: asyncio.Event) -> None:
        while True:
            try:
                now = await bus.clock.now()
                last, deliveries = await bus.follow(stream, last_id=last, block_seconds=1.0)
            except BusUnavailable:
                if not await bus.when_available(stop=closing):
                    return
                continue
            for delivery in deliveries:
                self._hear(bus, delivery, now)

    def _hear(self, bus: Bus, delivery: Delivery, now: datetime) -> None:
        """Take in what may be said here, is said in time, and is said to this run."""
        try:
            heard = hear(delivery, bus.guard)
            if heard.run_id != self._run_id or self._mailbox.refused:
                return
            require_in_time(heard, now)
            if isinstance(heard.message, StructuralPruningDecision) or _is_end(heard.message):
                self._mailbox.deliver(Incoming(heard.message, delivery.carrier))
        except ContractError as error:
            _log.warning(
                "message passed over",
                stream=delivery.stream.name,
                entry=delivery.entry_id,
                reason=str(error),
            )


def _is_end(message: Message) -> bool:
    """Whether it says that an analysis has ended without a decision."""
    return isinstance(message, TelemetryEvent) and message.step == "dead_letter"
