"""The session: a training run's line to the bus, kept off the training thread.

Promises: ``publish`` and ``decisions`` never block and never raise because the bus is away; what
could not be sent is counted in ``missed`` and logged; a checkpoint that was published twice is one
event. Everything that waits happens in one background thread with its own event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from opentelemetry.trace import Span, SpanKind

from elesh.bus import Bus, BusUnavailable, Delivery, server_url
from elesh.observe import carrier_of, get_logger, messaging, setup_tracing, span, span_from
from elesh.settings import Settings
from leyline import (
    CheckpointBundle,
    CheckpointReady,
    ContractError,
    Message,
    PruningOutcome,
    RecompilationRequest,
    RequestKey,
    StructuralAnalysisRequest,
    StructuralPruningDecision,
    TelemetryEvent,
    read_envelope,
    stable_hash,
    unwrap,
)
from leyline.streams import (
    CHECKPOINTS,
    DECISIONS,
    OUTCOMES,
    RECOMPILE,
    REQUESTS,
    TELEMETRY,
    Stream,
)

from .apply import Evaluation, apply_decision
from .redistribute import Moments
from .surgeon import Surgeon

__all__ = ["Session"]

_SOURCE = "kasmina"
_OUTBOX = 8
_log = get_logger(__name__)


@dataclass(frozen=True)
class _Outgoing:
    stream: Stream
    message: Message | CheckpointBundle
    carrier: dict[str, str]
    run_id: str
    epoch: int
    event_id: str
    request_id: str = ""


class Session:
    """Publishes a run's checkpoints and receives its decisions.

    Use it as a context manager around the training loop::

        with Session(run_id="my-run") as session:
            for epoch in range(1, 121):
                train_one_epoch()
                for decision in session.decisions():
                    session.apply(decision, surgeon, evaluate)
                if epoch % 5 == 0:
                    session.publish(recorder.measure(batches, epoch=epoch, run_id="my-run"))

    Args:
        run_id: names the run; decisions of other runs are not seen.
        url: Redis URL; empty: ``ELESH_REDIS_URL``, else the embedded server.
        settings: for the bus and the rollback triggers.
    """

    def __init__(self, run_id: str, url: str = "", settings: Settings | None = None) -> None:
        self.run_id = run_id
        self.settings = settings or Settings()
        self.missed = 0
        """Messages that could not be queued or sent."""
        self.failed: set[str] = set()
        """Keys whose analysis ended in the dead letters."""
        self._url = url or self.settings.bus.url
        self._outbox: queue.Queue[_Outgoing] = queue.Queue(_OUTBOX)
        self._inbox: queue.SimpleQueue[StructuralPruningDecision] = queue.SimpleQueue()
        self._carriers: dict[str, dict[str, str]] = {}
        self._arrived = threading.Event()
        self._connected = threading.Event()
        self._closing = threading.Event()
        self._wake: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._main, name="elesh-session", daemon=True)

    def __enter__(self) -> Self:
        setup_tracing("elesh-trainer", self.run_id, self.settings.observe)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self, timeout: float = 5.0) -> None:
        """Send what is queued, for at most ``timeout`` seconds, and end the thread."""
        self._closing.set()
        self._wake()
        self._thread.join(timeout)
        if self._thread.is_alive():
            _log.warning("session closed with messages unsent", queued=self._outbox.qsize())

    def wait_connected(self, timeout: float) -> bool:
        """Wait until the bus answered once. Training does not need this; tools do."""
        return self._connected.wait(timeout)

    @contextmanager
    def checkpoint(self, epoch: int) -> Iterator[None]:
        """The root span of a checkpoint: measure and publish inside, and the trace begins here."""
        with span("checkpoint", attributes={"elesh.run": self.run_id, "elesh.epoch": epoch}):
            yield

    def publish(self, bundle: CheckpointBundle) -> bool:
        """Queue a checkpoint for publishing; False (and counted as missed) if the queue is full."""
        metadata = bundle.metadata
        event_id = "ev-" + stable_hash(metadata.run_id, metadata.checkpoint_id)
        with _creating(CHECKPOINTS):
            return self._queue(CHECKPOINTS, bundle, metadata.epoch, event_id)

    def request(self, bundle: CheckpointBundle, request_id: str) -> bool:
        """Ask for an analysis by name, as a coordinator does (StructuralAnalysisRequest).

        The decision's key holds ``request_id`` where that of a checkpoint holds its own id; the
        bundle's levels, parameters and requirements are asked for.
        """
        event_id = "rq-" + stable_hash(bundle.metadata.run_id, request_id)
        with _creating(REQUESTS):
            return self._queue(REQUESTS, bundle, bundle.metadata.epoch, event_id, request_id)

    def decisions(self) -> list[StructuralPruningDecision]:
        """The decisions that have come since the last call; never waits."""
        self._arrived.clear()
        found = []
        while True:
            try:
                found.append(self._inbox.get_nowait())
            except queue.Empty:
                return found

    def wait(self, timeout: float) -> bool:
        """Wait until something has come, for tools and tests; training has no need to."""
        return self._arrived.wait(timeout)

    def apply(
        self,
        decision: StructuralPruningDecision,
        surgeon: Surgeon,
        evaluate: Callable[[], Evaluation],
        *,
        redistribute: Callable[[], Moments] | None = None,
    ) -> PruningOutcome:
        """Mask, evaluate, cut or take back (see :func:`apply_decision`); publish the outcome."""
        before = surgeon.architecture.model_hash
        carrier = self._carriers.pop(decision.idempotency_key, {})
        with span_from(
            carrier, "apply decision", attributes={"elesh.key": decision.idempotency_key}
        ) as current:
            outcome = apply_decision(
                decision,
                surgeon,
                evaluate,
                triggers=self.settings.structured_pruning.rollback_triggers,
                redistribute=redistribute,
            )
            current.set_attribute("elesh.outcome", outcome.result)
            with _creating(OUTCOMES):
                self.report(outcome)
            if outcome.result == "applied":
                self._queue(
                    RECOMPILE,
                    RecompilationRequest(
                        run_id=self.run_id,
                        epoch=decision.epoch,
                        idempotency_key=decision.idempotency_key,
                        model_hash_before=before,
                        model_hash_after=surgeon.architecture.model_hash,
                    ),
                    decision.epoch,
                )
        return outcome

    def report(self, outcome: PruningOutcome) -> bool:
        """Publish what became of a decision."""
        event_id = "oc-" + stable_hash(outcome.idempotency_key, outcome.run_id, outcome.result)
        return self._queue(OUTCOMES, outcome, outcome.epoch, event_id)

    def _queue(
        self,
        stream: Stream,
        message: Message | CheckpointBundle,
        epoch: int,
        event_id: str = "",
        request_id: str = "",
    ) -> bool:
        item = _Outgoing(stream, message, carrier_of(), self.run_id, epoch, event_id, request_id)
        try:
            self._outbox.put_nowait(item)
        except queue.Full:
            self.missed += 1
            _log.warning("not published, queue full", stream=stream.name, epoch=epoch)
            return False
        self._wake()
        return True

    # From here on: the background thread.

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
        settings = self.settings
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
        self._connected.set()
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

    async def _send(self, bus: Bus, item: _Outgoing, closing: asyncio.Event) -> None:
        name = item.stream.name
        with span_from(
            item.carrier, f"send {name}", kind=SpanKind.CLIENT, attributes=messaging("send", name)
        ):
            while not await self._try_to_send(bus, item):
                if not await bus.when_available(stop=closing):
                    self.missed += 1
                    return

    async def _try_to_send(self, bus: Bus, item: _Outgoing) -> bool:
        """False if the bus is away and it has to be tried again."""
        try:
            message = item.message
            if isinstance(message, CheckpointBundle):
                message = await _with_blobs(bus, message, item.request_id)
            await bus.publish(
                item.stream,
                message,
                source=_SOURCE,
                carrier=item.carrier,
                run_id=item.run_id,
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
                self._take(delivery)

    def _take(self, delivery: Delivery) -> None:
        try:
            envelope = read_envelope(delivery.envelope)
            if envelope.training_run_id != self.run_id:
                return
            message = unwrap(envelope)
        except ContractError as error:
            _log.warning(
                "unreadable message passed over",
                stream=delivery.stream.name,
                entry=delivery.entry_id,
                reason=str(error),
            )
            return
        if isinstance(message, StructuralPruningDecision):
            self._carriers[message.idempotency_key] = delivery.carrier
            self._inbox.put(message)
            self._arrived.set()
        elif isinstance(message, TelemetryEvent) and message.step == "dead_letter":
            self.failed.add(message.idempotency_key)
            self._arrived.set()


def _creating(stream: Stream) -> AbstractContextManager[Span]:
    """The span under which a message is queued: the context that everybody after it continues."""
    return span(
        f"create {stream.name}",
        kind=SpanKind.PRODUCER,
        attributes=messaging("create", stream.name),
    )


async def _with_blobs(
    bus: Bus, bundle: CheckpointBundle, request_id: str
) -> CheckpointReady | StructuralAnalysisRequest:
    """Put the blobs and return the event or request that points at them."""
    statistics = await bus.blobs.put(bundle.statistics_blob())
    gates, layers, heads = [
        None if blob is None else await bus.blobs.put(blob)
        for blob in (bundle.gates_blob(), bundle.layers_blob(), bundle.heads_blob())
    ]
    metadata = bundle.metadata
    if not request_id:
        return CheckpointReady(
            metadata=metadata,
            architecture=bundle.architecture,
            statistics=statistics,
            gates=gates,
            layers=layers,
            heads=heads,
            levels=bundle.levels,
            parameters=bundle.parameters,
        )
    return StructuralAnalysisRequest(
        request_id=request_id,
        idempotency_key=str(RequestKey(metadata.epoch, metadata.model_hash, request_id)),
        current_architecture=bundle.architecture,
        parameters=bundle.parameters,
        requirements=bundle.requirements,
        metadata=metadata,
        statistics=statistics,
        gates=gates,
        layers=layers,
        heads=heads,
        levels=bundle.levels,
    )
