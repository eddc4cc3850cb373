"""The thread that talks to the bus for a session, with an event loop of its own.

Promises: it sends what is in the mailbox and puts there what comes for the run; the training thread
never waits for it. It waits for a bus that is away or refuses, however long, and goes on when it is
back; only :meth:`BusThread.close` ends the thread. Only the trainer that holds the run's claim
sends and receives; the claim is renewed here, and the server checks it with every message.
Everything published ends in the mailbox: with its decision, its dead letter, or without an answer.
A name server that does not answer keeps no process from ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, Literal

from opentelemetry.trace import SpanKind

from elesh._process import is_gone, own_name
from elesh.bus import (
    Bus,
    BusRefuses,
    BusUnavailable,
    Delivery,
    Overloaded,
    RunClaimed,
    cancelled,
    repeatedly,
    require_address,
    server_url,
    until_available,
)
from elesh.bus.admission import fingerprint, hear, key_of, read, require_in_time
from elesh.bus.state.runs import RunAttempt
from elesh.observe import SparseLines, get_logger, mark_failed, messaging, span
from elesh.settings import Settings
from leyline import (
    CheckpointBundle,
    CheckpointReady,
    ContractError,
    DeadLetter,
    IdempotencyKey,
    InvalidField,
    Message,
    RequestKey,
    StructuralAnalysisRequest,
    StructuralPruningDecision,
    stable_hash,
)
from leyline.envelope import TTL, Priority
from leyline.network.bundle import NETWORK_FILES
from leyline.streams import CHECKPOINTS, DEAD, DECISIONS, REQUESTS, WORK, Stream

from .mailbox import MOST_TIMES, Ended, Incoming, Mailbox, Outgoing, Published, Unanswered

_SOURCE = "kasmina"
_LISTEN_SECONDS = 2.0
"""A read waits so long: there may be thousands of trainers."""
_LOOK_SECONDS = 5.0
_AGAIN_SECONDS = 1.0
_ASKED = (CHECKPOINTS.name, REQUESTS.name, WORK.name)
_log = get_logger(__name__)
_lines = SparseLines(_log)


class BusThread:
    """Sends what a run publishes and hears what is said to it.

    Args:
        run_id: messages of other runs are passed over.
        url: Redis URL; empty: ``ELESH_REDIS_URL``, else the embedded server.
        mailbox: what is to be sent, and where messages to the run are put.
        token: claims the run; one that an earlier process of the run had takes its claim over.
        sent: called, on the thread, with the id of every event that is on the bus; must not raise.
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
        if chosen := url or os.environ.get("ELESH_REDIS_URL", ""):
            require_address(chosen)
        self._run_id, self._url, self._settings = run_id, url, settings
        self._mailbox, self._token, self._sent = mailbox, token, sent
        self._who = own_name()
        self._attempt: RunAttempt | None = None
        self._unanswered = Unanswered()
        self._settings_hash, self._settings_differ = settings.analysis_hash, False
        self._closing = threading.Event()
        self.wake: Callable[[], None] = lambda: None
        """To be called when something was put into the mailbox."""
        self._thread = threading.Thread(target=self._main, name="elesh-session", daemon=True)

    def start(self) -> None:
        """Start the thread, once.

        Raises:
            InvalidField: if it has begun before.
        """
        if self._thread.ident is not None:
            hint = "create a new session, as a new process would"
            raise InvalidField("session", "one that was never entered", "a used one", hint=hint)
        self._thread.start()

    def close(self, timeout: float) -> None:
        """Send what is queued, for at most ``timeout`` seconds, and end the thread."""
        self._mailbox.close()
        self._closing.set()
        if self._thread.ident is None:  # never started
            self._mailbox.miss_all("the session was never entered")
            return
        self.wake()
        self._thread.join(timeout)
        if self._thread.is_alive():
            _log.warning("session closed before its thread ended", seconds=timeout)
            self._mailbox.miss_all("the session was closed")

    # From here on: on the thread.

    def _main(self) -> None:
        while not self._closing.is_set():
            try:
                with asyncio.Runner(loop_factory=new_loop) as runner:
                    runner.run(self._serve())
            except Exception:
                _log.exception("session failed, beginning again; training goes on")
                self._closing.wait(_AGAIN_SECONDS)
        self._mailbox.miss_all("the session was closed")

    async def _serve(self) -> None:
        loop, woken, closing = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

        def rouse() -> None:
            woken.set()
            if self._closing.is_set():
                closing.set()

        def wake() -> None:
            # The loop may have ended already: then there is nothing to wake.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(rouse)

        self.wake = wake
        rouse()
        async with contextlib.AsyncExitStack() as stack:
            place = server_url(self._url)
            url = await until_available(lambda: stack.enter_async_context(place), stop=closing)
            if url is not None:
                bus = Bus.open(url, self._settings.bus, self._settings.breaker)
                stack.push_async_callback(bus.close)
                await self._talk(bus, woken, closing)

    async def _talk(self, bus: Bus, woken: asyncio.Event, closing: asyncio.Event) -> None:
        """Claim the run, then listen and send until closing and nothing is queued."""
        starts = await until_available(lambda: self._begin(bus), stop=closing, log=bus.outage)
        if starts is None:
            return
        seconds = self._settings.trainer.claim_seconds / 4

        async def renew() -> float:
            await self._claim(bus)  # one that was refused is asked for again
            return seconds

        beside = [self._listen(bus, stream, start) for stream, start in starts]
        beside += [
            repeatedly("renewing the run's claim", renew, bus.outage, after=seconds),
            repeatedly("looking for answers", lambda: self._look(bus), bus.outage),
        ]
        tasks = [asyncio.create_task(each) for each in beside]
        self._mailbox.connected.set()
        try:
            while not (closing.is_set() and not self._mailbox.unsent):
                woken.clear()
                while (item := self._mailbox.take()) is not None:
                    await self._send(bus, item, closing)
                if not closing.is_set():
                    await woken.wait()
            with contextlib.suppress(BusUnavailable):
                await bus.runs.give_up(self._run_id, self._token)
        finally:
            await cancelled(*tasks)

    async def _begin(self, bus: Bus) -> list[tuple[Stream, str]]:
        """Claim the run; the streams to listen to, and from where."""
        await self._claim(bus)
        return [
            (stream, (await bus.follow(stream, last_id="$", block_seconds=0))[0])
            for stream in (DECISIONS, DEAD)
        ]

    async def _claim(self, bus: Bus) -> bool:
        """Claim the run, or renew the claim; whether it is ours."""
        seconds = self._settings.trainer.claim_seconds
        holder = await bus.runs.claim(self._run_id, self._token, self._who, seconds)
        if holder is not None and is_gone(holder.who):
            # A process of this machine that was killed: its lease need not be waited for.
            await bus.runs.end_claim(self._run_id, holder.who)
            holder = await bus.runs.claim(self._run_id, self._token, self._who, seconds)
        if holder is None:
            if self._mailbox.refused:
                _log.info("run claimed", run=self._run_id)
            self._mailbox.refused = ""
            if self._attempt is None:
                await self._begin_attempt(bus)
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

    async def _begin_attempt(self, bus: Bus) -> None:
        """Find out whether the run's id was used before, and say so at once."""
        self._attempt = await bus.runs.attempt(self._run_id, self._token, self._who)
        if not self._attempt.before:
            return
        self._mailbox.reused = (
            f"run {self._run_id} was trained before, by {self._attempt.before}, and not resumed "
            "from its restore points: its checkpoints are analysed anew, its history goes on; "
            "choose another run id for another run"
        )
        _log.warning("run id used before", run=self._run_id, reason=self._mailbox.reused)

    # Sending

    async def _send(self, bus: Bus, item: Outgoing, closing: asyncio.Event) -> None:
        """Send one message, or say why it is missed."""
        name, claimed = item.stream.name, False
        attributes = messaging("send", name, server=bus.server)

        async def send() -> None:
            nonlocal claimed
            claimed = False
            if not (claimed := await self._claim(bus)):
                raise RunClaimed(self._url, self._run_id, "another trainer")
            await self._publish(bus, item)

        async def drops(error: BusUnavailable) -> bool:
            """Whether a server that takes small messages does not take this one."""
            if not claimed:
                return False
            if isinstance(error, BusRefuses):
                return error.code in ("OOM", "ERR")
            return await bus.drops(error)

        with span(
            f"send {name}", kind=SpanKind.CLIENT, carrier=item.carrier, attributes=attributes
        ):
            try:
                own = (RunClaimed, Overloaded)  # it refuses just this one
                await bus.persistently(send, stop=closing, final=own, drops=drops)
                self._sent(item.event_id)
            except RunClaimed:
                with contextlib.suppress(BusUnavailable):
                    await self._claim(bus)  # says who has it
                self._miss(item, "run_claimed", self._mailbox.refused or "another trainer had it")
            except (ContractError, BusUnavailable) as error:
                kind = getattr(error, "code", "") or type(error).__qualname__
                self._miss(item, kind, str(error))
            except Exception as error:
                _log.exception("a message cannot be published", stream=name)
                kind = type(error).__qualname__
                self._miss(item, kind, f"{kind}: {error}")

    def _miss(self, item: Outgoing, kind: str, reason: str) -> None:
        mark_failed(kind, reason)
        self._mailbox.miss(item, reason)

    async def _publish(self, bus: Bus, item: Outgoing) -> None:
        message, event_id = item.message, item.event_id
        if isinstance(message, CheckpointBundle):
            attempt = self._attempt.number if self._attempt else 0
            metadata = message.metadata
            if attempt:
                # What was decided for another process's checkpoint is not the answer to this one.
                event_id += f"-{attempt}"
                own = "ck-" + stable_hash(metadata.checkpoint_id, str(attempt))
                metadata = metadata.model_copy(update={"checkpoint_id": own})
                message = replace(message, metadata=metadata)
            message = await with_blobs(bus, message, item.request_id)
            self._unanswered.require_same(str(key_of(message)), fingerprint(message))
        entry = await self._append(bus, item.stream, message, item.epoch, event_id, item.carrier)
        if not isinstance(message, CheckpointReady | StructuralAnalysisRequest):
            return
        key, carrier = key_of(message), item.carrier
        lives = TTL[Priority.NORMAL].total_seconds() + self._settings.window_seconds
        published = Published(str(key), message, item.epoch, event_id, entry, lives, carrier)
        self._unanswered.add(published)
        if await self._hear_record(bus, key, carrier):
            _log.info("decision made before", key=str(key))

    async def _append(
        self,
        bus: Bus,
        stream: Stream,
        message: Message,
        epoch: int,
        event_id: str,
        carrier: Mapping[str, str],
    ) -> str:
        return await bus.publish(
            stream,
            message,
            source=_SOURCE,
            carrier=carrier,
            run_id=self._run_id,
            epoch=epoch,
            event_id=event_id,
            token=self._token,
        )

    # Hearing

    async def _hear_record(self, bus: Bus, key: IdempotencyKey, carrier: Mapping[str, str]) -> bool:
        """Take in a decision that was made before: a run that was killed publishes checkpoints
        again, which are answered once, and an answer may get lost. Whether there is one."""
        try:
            record = await bus.record(key)
            if record is None:
                return False
            heard = read(record.envelope, DECISIONS)
        except ContractError as error:
            _lines.warning("record passed over", key=str(key), reason=str(error))
            return False
        if heard.run_id == self._run_id:
            self._take(heard.message, carrier)
        return True

    async def _listen(self, bus: Bus, stream: Stream, last: str) -> None:
        async def step() -> float:
            nonlocal last
            try:
                now = await bus.clock.now()
                last, found = await bus.follow(stream, last_id=last, block_seconds=_LISTEN_SECONDS)
            except BusUnavailable:
                self._unanswered.hurry()
                raise
            for delivery in found:
                self._hear(bus, delivery, now)
            return 0.0

        await repeatedly(f"listening to {stream.name}", step, bus.outage)

    def _hear(self, bus: Bus, delivery: Delivery, now: datetime) -> None:
        """Take in a message that is for this run, in time, and signed by a key that may send it."""
        try:
            heard = hear(delivery, bus.guard)
            if heard.run_id != self._run_id or self._mailbox.refused:
                return
            if not isinstance(heard.message, DeadLetter):  # an end is always news
                require_in_time(heard, now)
            self._take(heard.message, delivery.carrier)
        except ContractError as error:
            _lines.warning(
                "message passed over",
                stream=delivery.stream.name,
                entry=delivery.entry_id,
                reason=str(error),
            )

    def _take(self, message: Message, carrier: Mapping[str, str]) -> None:
        """Give a decision, or the end of what was published, to the training thread."""
        if isinstance(message, DeadLetter):
            key = message.idempotency_key
            if message.stream in _ASKED:
                self._unanswered.ended(key)
            else:
                key = f"{message.stream}: {key}"
            self._mailbox.deliver(Ended(key, f"{message.error_code}: {message.reason}"))
        elif isinstance(message, StructuralPruningDecision) and self._unanswered.decided(
            message.idempotency_key  # not one that was heard before, by the other way
        ):
            theirs = message.settings_hash
            if not self._settings_differ and theirs not in ("", self._settings_hash):
                self._settings_differ = True
                _log.warning(
                    "worker and trainer have different settings: the worker's are in force",
                    key=message.idempotency_key,
                    hint="give both the same settings file (ELESH_SETTINGS) and version of Elesh",
                )
            self._mailbox.deliver(Incoming(message, carrier))

    async def _look(self, bus: Bus) -> float:
        """Look on the bus for what became of messages without an answer."""
        for published in self._unanswered.due():
            if await self._hear_record(bus, IdempotencyKey.parse(published.key), published.carrier):
                continue
            if self._unanswered.is_over(published):
                self._unanswered.ended(published.key)
                reason = f"no answer within {published.lives:.0f} s"
                attributes = {"elesh.key": published.key}
                with span(
                    "no answer",
                    kind=SpanKind.CONSUMER,
                    carrier=published.carrier,
                    attributes=attributes,
                ):
                    mark_failed("no_answer", reason)
                self._mailbox.deliver(Ended(published.key, reason))
            elif not await bus.stands(_stream_of(published), published.entry):
                await self._publish_again(bus, published)
            elif self._unanswered.nobody_answers(published):
                hint = "a worker must run on the same bus, start it with: elesh worker"
                _lines.warning("no answer yet", key=published.key, hint=hint)
        return _LOOK_SECONDS

    async def _publish_again(self, bus: Bus, published: Published) -> None:
        """Publish a message again whose entry is gone without a decision: the stream was deleted,
        or the server lost its last writes."""
        if published.again >= MOST_TIMES:
            return
        published.again += 1
        event_id = f"{published.event_id}.{published.again}"
        _lines.warning("a message vanished from the bus, published again", key=published.key)
        with contextlib.suppress(Overloaded, RunClaimed):
            stream, epoch = _stream_of(published), published.epoch
            message, carrier = published.message, published.carrier
            published.entry = await self._append(bus, stream, message, epoch, event_id, carrier)
            self._unanswered.add(published)


def _stream_of(published: Published) -> Stream:
    return CHECKPOINTS if isinstance(published.message, CheckpointReady) else REQUESTS


async def with_blobs(
    bus: Bus, bundle: CheckpointBundle, request_id: str
) -> CheckpointReady | StructuralAnalysisRequest:
    """Put the blobs and return the event or request that points at them."""
    architecture, metadata = bundle.architecture.model_hash, bundle.metadata
    blobs = bundle.blobs()
    if bundle.network is not None:
        blobs |= {name: getattr(bundle.network, name) for name in NETWORK_FILES}
    refs: dict[str, Any] = {}
    for name, data in blobs.items():
        codec: Literal["msgpack", "safetensors"]
        codec = "msgpack" if name == "program" else "safetensors"
        refs[name] = await bus.blobs.put(data, codec, architecture=architecture)
    if not request_id:
        return CheckpointReady(
            metadata=metadata,
            architecture=bundle.architecture,
            levels=bundle.levels,
            parameters=bundle.parameters,
            **refs,
        )
    return StructuralAnalysisRequest(
        request_id=request_id,
        idempotency_key=str(RequestKey(metadata.epoch, metadata.model_hash, request_id)),
        current_architecture=bundle.architecture,
        parameters=bundle.parameters,
        requirements=bundle.requirements,
        metadata=metadata,
        levels=bundle.levels,
        **refs,
    )


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
