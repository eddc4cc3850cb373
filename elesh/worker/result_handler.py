"""How an entry ends: committed once for its key, recorded as an outcome, or dead-lettered.

Promises: whatever is committed, counted or dead-lettered is so in one step that checks the
    ownership of its entry; breakers hear of decisions and of trainers' outcomes once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from opentelemetry.trace import SpanKind

from elesh.bus import Bus, Commit, CommitOutcome, Delivery
from elesh.bus.admission import Work, read
from elesh.observe import carrier_of, get_logger, mark_failed, messaging, span
from elesh.safety import fingerprint_of, grounds, levels_of, rolled_back_cut, vote_of, votes
from elesh.settings import Settings
from elesh.worker.telemetry.reports import Reports
from leyline import (
    BadSignature,
    Conflict,
    ContractError,
    DeadLetter,
    IdempotencyKey,
    IdentityMismatch,
    NotAuthorized,
    Poison,
    PruningOutcome,
    StructuralPruningDecision,
    UnknownDecision,
    Unsigned,
    read_envelope,
)
from leyline.errors import brief
from leyline.streams import WORKERS

from .fallback_chain import CORRUPTION, is_corruption, stand_in

_log = get_logger(__name__)


class ResultHandler:
    """Ends the entries that one worker holds."""

    def __init__(
        self,
        bus: Bus,
        settings: Settings,
        worker_id: str,
        reports: Reports,
        stop: asyncio.Event | None = None,
    ) -> None:
        self._bus, self._stop = bus, stop
        self._settings = settings
        self._limit = settings.bus.max_deliveries
        self._worker_id = worker_id
        self._reports = reports

    def refuse_poison(self, delivery: Delivery) -> None:
        """Refuse an entry that stopped every worker that took it.

        Raises:
            Poison: if it was delivered more often than ``max_deliveries``; handovers do not count.
        """
        if delivery.deliveries > self._limit:
            raise Poison(
                "deliveries",
                f"at most {self._limit} before it is committed",
                f"{delivery.deliveries} (ended {delivery.history})",
                hint="it stopped every worker that took it",
            )

    async def is_decided(self, delivery: Delivery, work: Work, served: Sequence[str] = ()) -> bool:
        """Whether the key has its decision already; then the entry is acknowledged.

        Raises:
            Conflict: if it was decided for other content.
        """
        record = await self._bus.record(work.key)
        if record is None:
            return False
        if record.fingerprint != work.fingerprint:
            raise conflict(work.key, work.fingerprint)
        await self._bus.acknowledge(WORKERS, self._worker_id, delivery, served)
        self._reports.step("duplicate", work)
        return True

    async def commit(
        self,
        delivery: Delivery,
        work: Work,
        decision: StructuralPruningDecision,
        served: Sequence[str] = (),
    ) -> None:
        """Store, publish and acknowledge, and feed the breakers; ``served`` are keys that go with
        the entry.

        Raises:
            Conflict: if the key was decided for other content meanwhile.
        """
        committed = await self._commit(delivery, work, decision, served)
        if committed is not CommitOutcome.COMMITTED:
            return
        # An approved level counts only once the trainer reports on it.
        breakers, key = self._bus.breakers, str(decision.key)
        for level, vote in votes(decision).items():
            change = None
            if vote == "failure":
                reason = grounds(decision, level)
                change = await breakers.failure(work.run_id, level, reason, token=key)
            elif vote == "success":
                change = await breakers.success(work.run_id, level)
            if change:
                await self._reports.transition(change)
        if decision.would_be:
            await self._bus.runs.measured_calibration_probe(work.run_id, key, decision.would_be)

    async def fail(
        self,
        delivery: Delivery,
        work: Work,
        error: ContractError,
        served: Sequence[str] = (),
    ) -> None:
        """A checkpoint without a decision becomes a dead letter; if its data is corrupt, the run's
        previous decision is sent as telemetry."""
        mark_failed(error.code, str(error))
        if not isinstance(error, Conflict | Unsigned | BadSignature | NotAuthorized):
            self._reports.status.gave_up(work.key.level)
            await self._note_failure(work, delivery, str(error))
        if is_corruption(error) and (previous := await self._previous(work)):
            decision = stand_in(previous, work.document, str(work.key), error)
            reason = decision.fallbacks[-1].reason
            self._reports.fallback(work, str(work.key), CORRUPTION, reason)
            dead_letter = self._reports.dead_letter(delivery, error, work)
            await self._commit(delivery, work, decision, served, dead_letter)
            self._reports.dead_lettered(dead_letter, work)
            return
        await self.dead_letter(delivery, error, work, served)

    async def dead_letter(
        self,
        delivery: Delivery,
        error: ContractError,
        work: Work | None = None,
        served: Sequence[str] = (),
    ) -> None:
        """Move an entry to the dead letters."""
        mark_failed(error.code, str(error))
        dead_letter = self._reports.dead_letter(delivery, error, work)
        carrier = carrier_of(delivery.carrier)
        if await self._bus.dead_letter(
            WORKERS, self._worker_id, delivery, dead_letter, carrier, served
        ):
            _log.warning(
                "dead letter",
                stream=dead_letter.stream,
                entry=dead_letter.entry_id,
                code=error.code,
                reason=str(error),
            )
            self._reports.dead_lettered(dead_letter, work)

    async def record_outcome(
        self, delivery: Delivery, outcome: PruningOutcome, event_id: str
    ) -> None:
        """Tell the breakers what a trainer made of a decision, and remember a cut that it took
        back; once for each event, however often it comes.

        Raises:
            UnknownDecision: if that decision was never published.
            IdentityMismatch: if it was made for another run.
        """
        key = IdempotencyKey.parse(outcome.idempotency_key)
        record = await self._bus.record(key)
        decision = read(record.envelope).message if record else None
        if record is None or not isinstance(decision, StructuralPruningDecision):
            raise UnknownDecision(
                "idempotency_key", "the key of a published decision", outcome.idempotency_key
            )
        if decision.run_id != outcome.run_id:
            raise IdentityMismatch("run_id", brief(decision.run_id), brief(outcome.run_id))
        if event_id in record.outcomes:
            await self._bus.acknowledge(WORKERS, self._worker_id, delivery)
            return
        token = f"{event_id}:{key}"
        self._reports.status.heard(outcome, decision)
        breakers, vote = self._bus.breakers, vote_of(outcome)
        for level in decision.taken:
            change = None
            if vote == "failure":
                reason = f"rolled back by the trainer: {outcome.detail}"
                change = await breakers.failure(outcome.run_id, level, reason, token=token)
            elif vote == "success":
                change = await breakers.success(outcome.run_id, level)
            if change:
                await self._reports.transition(change)
        if vote == "failure":
            cut = rolled_back_cut(decision, outcome)
            await self._bus.runs.took_back(outcome.run_id, {fingerprint_of(cut): cut})
        await self._bus.record_outcome(key, event_id)
        await self._bus.acknowledge(WORKERS, self._worker_id, delivery)

    async def _commit(
        self,
        delivery: Delivery,
        work: Work,
        decision: StructuralPruningDecision,
        served: Sequence[str],
        dead_letter: DeadLetter | None = None,
    ) -> CommitOutcome:
        """Commit a decision; with a dead letter it is a fallback decision, which is not
        remembered."""
        name, entry_id = delivery.origin
        levels = ",".join(level.value for level in levels_of(decision))
        attributes = messaging(
            "settle", name, entry_id=entry_id, group=WORKERS, server=self._bus.server
        ) | {"elesh.key": str(decision.key), "elesh.levels": levels}
        with span(f"settle {name}", kind=SpanKind.CLIENT, attributes=attributes):
            # The trainer's own context, not ours: it outlives this worker (decision 0050).
            result = Commit(
                decision.key,
                work.fingerprint,
                decision,
                carrier_of(delivery.carrier),
                work.run_id,
                work.key.epoch,
                remember=dead_letter is None,
            )
            await self._bus.persistently(
                lambda: self._bus.remember_settings(
                    self._settings.analysis_hash, self._settings.analysis_json
                ),
                stop=self._stop,
            )
            committed = await self._bus.persistently(
                lambda: self._bus.commit(
                    WORKERS, self._worker_id, delivery, result, served, dead_letter
                ),
                stop=self._stop,
            )
        self._reports.commit_outcome(work, decision, committed)
        if committed is CommitOutcome.CONFLICT:
            raise conflict(work.key, work.fingerprint)
        return committed

    async def _previous(self, work: Work) -> StructuralPruningDecision | None:
        """The run's latest good decision of this level, of an earlier epoch."""
        record = await self._bus.latest(work.run_id, work.key.level, before=work.key.epoch)
        decision = read(record.envelope).message if record else None
        if not isinstance(decision, StructuralPruningDecision) or decision.run_id != work.run_id:
            return None
        return decision

    async def _note_failure(self, work: Work, delivery: Delivery, reason: str) -> None:
        event_id = read_envelope(delivery.envelope).event_id
        token = f"{event_id}:{delivery.redriven or ''}:{work.key}"
        for level in work.document.levels:
            change = await self._bus.breakers.failure(work.run_id, level, reason, token=token)
            if change:
                await self._reports.transition(change)


def conflict(key: IdempotencyKey, fingerprint: str) -> Conflict:
    """The key belongs to other content than that of this fingerprint."""
    return Conflict(
        "idempotency_key",
        f"the content that {key} was decided for",
        f"content {fingerprint[:16]}",
        hint="give other content another key",
    )
