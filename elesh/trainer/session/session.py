"""The session: a training run's line to the bus, kept off the training thread.

Promises: ``publish`` and ``decisions`` never block and never raise because the bus is away; what
could not be sent is counted in ``missed`` and logged; a checkpoint that was published twice is one
event. Everything that waits happens in :mod:`.bus_thread`; what happens to the network, in
:mod:`.guard`.
"""

from __future__ import annotations

import queue
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from opentelemetry.trace import Span, SpanKind

from elesh.observe import carrier_of, get_logger, messaging, setup_tracing, span, span_from
from elesh.settings import Settings
from elesh.trainer.surgery.reconstruction import Moments
from elesh.trainer.surgery.surgeon import Surgeon
from leyline import (
    CheckpointBundle,
    Message,
    PrunedArchitecture,
    PruningOutcome,
    StructuralPruningDecision,
    TelemetryEvent,
    stable_hash,
)
from leyline.streams import CHECKPOINTS, OUTCOMES, RECOMPILE, REQUESTS, VALIDATION, Stream

from .apply import Evaluation, outcome_of, trigger_of
from .bus_thread import BusThread, Caller, Outgoing
from .guard import Guard
from .observers import Observers, SessionObserver
from .reporting import event_id_of, recompilation, validation_of
from .restore_points import FolderInUse
from .snapshot import Stateful, Tracked

__all__ = ["Session"]

_log = get_logger(__name__)


class Session:
    """Publishes a run's checkpoints and receives its decisions.

    Use it as a context manager around the training loop::

        with Session(run_id="my-run", restore_dir="restore") as session:
            done = session.resume(surgeon, scheduler=scheduler)  # 0 for a new run
            for epoch in range(done + 1, 121):
                train_one_epoch()
                session.watch(epoch, evaluate)
                for decision in session.decisions():
                    session.apply(decision, surgeon, evaluate)
                if epoch % 5 == 0:
                    recorder.architecture = surgeon.architecture
                    session.publish(recorder.measure(batches, epoch=epoch, run_id="my-run"))

    Args:
        run_id: names the run; decisions of other runs are not seen, and one trainer at a time has
            the run.
        url: Redis URL; empty: ``ELESH_REDIS_URL``, else the embedded server.
        settings: for the bus, the rollback triggers and the trainer's section.
        restore_dir: where restore points are kept, in a folder named like the run; empty: in
            memory, so that cuts can be taken back but a process that was killed starts anew.
        observers: told of checkpoints and outcomes on the training thread (TensorBoardSummaries).
    """

    def __init__(
        self,
        run_id: str,
        url: str = "",
        settings: Settings | None = None,
        *,
        restore_dir: str | Path = "",
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
        self._heard: set[str] = set()
        self._decided: dict[str, StructuralPruningDecision] = {}
        self._guard, folder_refused = self._guarded(restore_dir)
        caller = Caller(take=self._take, sent=self._guard.reported)
        token = self._guard.token or secrets.token_hex(8)
        url = url or self.settings.bus.url
        self._bus = BusThread(run_id, url, self.settings, caller, token)
        self._bus.refused, self._talks = folder_refused, not folder_refused

    def _guarded(self, restore_dir: str | Path) -> tuple[Guard, str]:
        if not restore_dir:
            return Guard(self.settings), ""
        try:
            return Guard(self.settings, Path(restore_dir) / self.run_id), ""
        except FolderInUse as error:
            _log.error("run refused; training goes on without Elesh", reason=str(error))
            return Guard(self.settings), str(error)

    @property
    def missed(self) -> int:
        """Messages that could not be queued or sent."""
        return self._bus.missed

    @property
    def refused(self) -> str:
        """Why this trainer may not speak for the run: another one does, or has its restore points.
        Training goes on without Elesh then. Empty where it may."""
        return self._bus.refused

    @property
    def watched(self) -> tuple[str, ...]:
        """Keys of the decisions whose cuts are monitored, oldest first."""
        return tuple(cut.key for cut in self._guard.watched)

    def __enter__(self) -> Self:
        setup_tracing("elesh-trainer", self.run_id, self.settings.observe)
        if self._talks:
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
        if self._talks:
            self._bus.close(timeout)
        self._guard.close()
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

    def resume(
        self,
        surgeon: Surgeon,
        *,
        scheduler: Stateful | None = None,
        scaler: Stateful | None = None,
        **parts: Any,
    ) -> int:
        """Name what restore points hold, and go back to where the run's last process stood.

        Call it once, with network and optimizer as they are built for a new run. Held are the
        surgeon's network and optimizers, the global random generators, and whatever is named here:
        anything with ``state_dict`` and ``load_state_dict``, torch generators, and averages of the
        weights (``ema=average``: a module, a holder of one, tensors by path), which are from then
        on cut, masked and brought back with the network.

        Returns:
            The epoch of the restore point, after which training goes on; 0 for a new run.

        Raises:
            InvalidField: if a part's state holds more than tensors and plain values, or the restore
                points are of another network or of other parts.
        """
        named = {"scheduler": scheduler, "scaler": scaler, **parts}
        held = {name: part for name, part in named.items() if part is not None}
        epoch = self._guard.resume(Tracked(surgeon, held))
        for outcome in self._guard.unreported:
            self.report(outcome)
        return epoch

    def save(self, epoch: int) -> bool:
        """Write a restore point of now, so that a killed run goes on from here and not only from
        its last cut; False, and a line in the log, if that fails."""
        return self._guard.save(epoch)

    def apply(
        self,
        decision: StructuralPruningDecision,
        surgeon: Surgeon,
        evaluate: Callable[[], Evaluation],
        *,
        redistribute: Callable[[], Moments] | None = None,
    ) -> PruningOutcome:
        """Restore point, mask, evaluate, cut or take back (see :func:`apply_decision`); publish
        the outcome. A cut that was made is monitored for ``trainer.watch_epochs`` calls of
        :meth:`watch`."""
        before = surgeon.architecture
        if why := self.refused or self._strange(decision):
            _log.warning("decision refused", key=decision.idempotency_key, reason=why)
            return outcome_of(decision, before, before, "refused", why)
        carrier = self._carriers.get(decision.idempotency_key, {})
        attributes = {"elesh.key": decision.idempotency_key}
        with span_from(carrier, "apply decision", attributes=attributes) as current:
            outcome = self._guard.apply(decision, surgeon, evaluate, redistribute=redistribute)
            current.set_attribute("elesh.outcome", outcome.result)
            with _creating(OUTCOMES):
                self.report(outcome)
            limit = trigger_of(decision, self.settings.structured_pruning.rollback_triggers)
            self._validated(outcome, limit)
            self._changed(outcome, before, surgeon.architecture)
        if outcome.watched:
            self._decided[outcome.idempotency_key] = decision
        else:
            self._carriers.pop(outcome.idempotency_key, None)
        self._observers.on_outcome(decision, outcome)
        return outcome

    def _strange(self, decision: StructuralPruningDecision) -> str:
        """Why a decision is none of this run's, or not any more; empty for one that may be applied.

        Nothing is said of it on the bus: what became of it there, or elsewhere, stays true.
        """
        key = decision.key
        if decision.run_id != self.run_id:
            return f"it was made for run {decision.run_id}, this is {self.run_id}"
        if (key.epoch, key.model_hash) != (decision.epoch, decision.model_hash):
            return f"its key {key} is of another epoch or architecture than its body"
        if self._guard.tried(decision.idempotency_key):
            return "it was applied before; a decision is applied once in the life of a run"
        return ""

    def watch(self, epoch: int, evaluate: Callable[[], Evaluation]) -> list[PruningOutcome]:
        """Report an epoch's accuracy: monitored cuts stand it, or are rolled back.

        Call it once an epoch, after training and before :meth:`apply`. ``evaluate`` is called only
        while a cut is monitored. After a rollback everything that restore points hold is bit for
        bit what it was at the restore point; the training loop goes on with its next epoch.

        Returns:
            The final outcomes of the cuts that were decided on; mostly none.
        """
        surgeon, limits = self._guard.surgeon, {cut.key: cut.limit for cut in self._guard.watched}
        if surgeon is None:
            return []
        before = surgeon.architecture
        outcomes = self._guard.watch(epoch, evaluate)
        for outcome in outcomes:
            key = outcome.idempotency_key
            # The end of the same story: it goes on in the trace of its checkpoint.
            with (
                span_from(self._carriers.pop(key, {}), "watched", attributes={"elesh.key": key}),
                _creating(OUTCOMES),
            ):
                self.report(outcome)
            self._validated(outcome, limits[outcome.idempotency_key])
            if decision := self._decided.pop(outcome.idempotency_key, None):
                self._observers.on_outcome(decision, outcome)
        if outcomes:
            self._changed(outcomes[0], before, surgeon.architecture)
        return outcomes

    def report(self, outcome: PruningOutcome) -> bool:
        """Publish what became of a decision."""
        return self._queue(OUTCOMES, outcome, outcome.epoch, event_id_of(outcome))

    def _validated(self, outcome: PruningOutcome, limit: float) -> None:
        """Tell Urabrask what was measured."""
        if (validation := validation_of(outcome, limit)) is not None:
            self._queue(VALIDATION, validation, outcome.epoch)

    def _changed(
        self, outcome: PruningOutcome, before: PrunedArchitecture, after: PrunedArchitecture
    ) -> None:
        """Tell Tezzeret if the architecture is another now."""
        if before.model_hash != after.model_hash:
            self._queue(RECOMPILE, recompilation(outcome, before, after), outcome.epoch)

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
            if message.idempotency_key in self._heard:
                _log.warning("decision came again, passed over", key=message.idempotency_key)
                return
            self._heard.add(message.idempotency_key)
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
