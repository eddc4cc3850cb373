"""The session: a training run's line to the bus, kept off the training thread.

Promises: ``publish`` and ``decisions`` never block and never raise because the bus is away; what
could not be sent is counted in ``missed`` and logged; a checkpoint that was published twice is one
event. Everything that waits happens in :mod:`.bus_thread`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Self

from opentelemetry.trace import Span, SpanKind

from elesh.observe import carrier_of, messaging, setup_tracing, span, span_from
from elesh.settings import Settings
from leyline import (
    CheckpointBundle,
    Message,
    PruningOutcome,
    RecompilationRequest,
    StructuralPruningDecision,
    TelemetryEvent,
    stable_hash,
)
from leyline.streams import CHECKPOINTS, OUTCOMES, RECOMPILE, REQUESTS, Stream

from .apply import Evaluation, apply_decision
from .bus_thread import BusThread, Outgoing
from .observers import Observers, SessionObserver
from .redistribute import Moments
from .surgeon import Surgeon

__all__ = ["Session"]


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
        observers: told of checkpoints and outcomes on the training thread (TensorBoardSummaries).
    """

    def __init__(
        self,
        run_id: str,
        url: str = "",
        settings: Settings | None = None,
        observers: Sequence[SessionObserver] = (),
    ) -> None:
        self.run_id = run_id
        self.settings = settings or Settings()
        self.failed: set[str] = set()
        """Keys whose analysis ended in the dead letters."""
        self._inbox: queue.SimpleQueue[StructuralPruningDecision] = queue.SimpleQueue()
        self._carriers: dict[str, Mapping[str, str]] = {}
        self._arrived = threading.Event()
        self._observers = Observers(observers)
        self._bus = BusThread(run_id, url or self.settings.bus.url, self.settings, self._take)

    @property
    def missed(self) -> int:
        """Messages that could not be queued or sent."""
        return self._bus.missed

    def __enter__(self) -> Self:
        setup_tracing("elesh-trainer", self.run_id, self.settings.observe)
        self._bus.start()
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
        self._bus.close(timeout)
        self._observers.close()

    def wait_connected(self, timeout: float) -> bool:
        """Wait until the bus answered once. Training does not need this; tools do."""
        return self._bus.connected.wait(timeout)

    @contextmanager
    def checkpoint(self, epoch: int) -> Iterator[None]:
        """The root span of a checkpoint: measure and publish inside, and the trace begins here."""
        with span("checkpoint", attributes={"elesh.run": self.run_id, "elesh.epoch": epoch}):
            yield

    def publish(self, bundle: CheckpointBundle) -> bool:
        """Queue a checkpoint for publishing; False (and counted as missed) if the queue is full."""
        metadata = bundle.metadata
        event_id = "ev-" + stable_hash(metadata.run_id, metadata.checkpoint_id)
        self._observers.on_checkpoint(bundle)
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
        self._observers.on_outcome(decision, outcome)
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
        return self._bus.send(Outgoing(stream, message, carrier_of(), epoch, event_id, request_id))

    def _take(self, message: Message, carrier: Mapping[str, str]) -> None:
        """Take in a message of this run; called on the bus's thread."""
        if isinstance(message, StructuralPruningDecision):
            self._carriers[message.idempotency_key] = carrier
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
