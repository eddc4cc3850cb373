"""The event formatter: a stream entry as one plain line.

Promises: every entry of a stream gives a line; the line of one that cannot be read says why; lines
are in the order of their times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from elesh.bus import Bus, Delivery, Guard, moment
from elesh.bus.admission import hear
from leyline import (
    BadSignature,
    BreakerTransition,
    CheckpointReady,
    ContractError,
    DeadLetter,
    EventEnvelope,
    Message,
    NotAuthorized,
    OperatorAction,
    PruningOutcome,
    RecompilationRequest,
    StructuralAnalysisRequest,
    StructuralPruningDecision,
    StructuralValidationResult,
    TelemetryEvent,
    Unsigned,
)
from leyline.streams import Stream

from .explain import reasons, removed

_ANYBODY = Guard()


@dataclass(frozen=True)
class FormattedEvent:
    """One stream entry for people."""

    at: datetime
    stream: str
    entry_id: str
    kind: str
    """Type of the message; empty if it cannot be read."""
    run_id: str = ""
    epoch: int | None = None
    key: str = ""
    what: str = ""
    """What happened, in a few words."""
    tone: str = ""
    """``good``, ``bad``, ``warn`` or empty: how to colour it."""
    source: str = ""
    trace: str = ""
    """The W3C trace id, where one came along."""

    @property
    def order(self) -> tuple[int, int]:
        """The entry's place in time."""
        milliseconds, number = self.entry_id.split("-")
        return int(milliseconds), int(number)


async def formatted_events(
    bus: Bus, streams: Sequence[Stream], *, follow: bool, run_id: str = ""
) -> AsyncIterator[FormattedEvent]:
    """The events of streams in the order of their times; with ``follow`` going on for ever, where
    an event that arrives late comes after those that were there."""
    last = dict.fromkeys(streams, "0")
    more = False
    while True:
        waiting: dict[Stream, deque[FormattedEvent]] = {stream: deque() for stream in streams}
        block = 1.0 / len(streams) if follow and not more else 0.0
        more = False
        while waiting:
            for stream in [stream for stream, events in waiting.items() if not events]:
                last[stream], deliveries = await bus.follow(
                    stream, last_id=last[stream], block_seconds=block
                )
                waiting[stream].extend(format_event(each, bus.guard) for each in deliveries)
                if not deliveries:
                    del waiting[stream]  # read to its end, for this round
            if waiting:
                event = min(waiting.values(), key=lambda events: events[0].order).popleft()
                more = True
                if not run_id or event.run_id == run_id:
                    yield event
        if not more and not follow:
            return


def format_event(delivery: Delivery, guard: Guard = _ANYBODY) -> FormattedEvent:
    """What a stream entry says; or that its writer had no right to say it."""
    stream, entry_id = delivery.stream, delivery.entry_id
    at = moment(int(entry_id.split("-")[0]))
    trace = delivery.carrier.get("traceparent", "")[3:35]
    try:
        heard = hear(delivery, guard)
    except ContractError as error:
        forged = isinstance(error, Unsigned | BadSignature | NotAuthorized)
        what = f"{'not to be believed' if forged else 'unreadable'}: {error}"
        return FormattedEvent(at, stream.name, entry_id, "", what=what, tone="bad")
    message, envelope = heard.message, heard.envelope
    what, tone = _WORDS.get(type(message), _other)(message)
    return FormattedEvent(
        at=at,
        stream=stream.name,
        entry_id=entry_id,
        kind=type(message).__name__,
        run_id=_run(message, envelope),
        epoch=_epoch(message, envelope),
        key=_key(message),
        what=what,
        tone=tone,
        source=envelope.source_subsystem,
        trace=trace,
    )


def _run(message: Message, envelope: EventEnvelope) -> str:
    metadata = getattr(message, "metadata", None)
    return (
        getattr(message, "run_id", "")
        or getattr(metadata, "run_id", "")
        or envelope.training_run_id
    )


def _epoch(message: Message, envelope: EventEnvelope) -> int | None:
    for holder in (message, getattr(message, "metadata", None), envelope):
        epoch = getattr(holder, "epoch", None)
        if isinstance(epoch, int):
            return epoch
    named = _key(message).partition(":")[0]  # a dead letter's may be anything
    return int(named) if named.isascii() and named.isdecimal() and len(named) < 16 else None


def _key(message: Message) -> str:
    found = getattr(message, "idempotency_key", "") or getattr(message, "plan", "")
    return str(found)


def _checkpoint(message: Any) -> tuple[str, str]:
    metadata = message.metadata
    parts = [f"checkpoint {metadata.checkpoint_id}", "+".join(message.levels)]
    if metadata.accuracy is not None:
        parts.append(f"accuracy {metadata.accuracy:.2%}")
    return ", ".join(parts), ""


def _request(message: Any) -> tuple[str, str]:
    return f"analysis {message.request_id} asked for, {'+'.join(message.levels)}", ""


def _decision(message: Any) -> tuple[str, str]:
    if not message.approved_for_application:
        return f"rejected: {reasons(message)}", "warn"
    statistics = message.statistics
    saved = 1 - statistics.parameters_after / max(1, statistics.parameters_before)
    return f"approved: {removed(message)}, {saved:.1%} of the parameters", "good"


def _outcome(message: Any) -> tuple[str, str]:
    tone = {"applied": "good", "rolled_back": "bad"}.get(message.result, "warn")
    parts = [message.result.replace("_", " ")]
    if message.accuracy_before is not None and message.accuracy_masked is not None:
        parts.append(f"accuracy {message.accuracy_before:.2%} -> {message.accuracy_masked:.2%}")
    if message.detail:
        parts.append(message.detail)
    return ", ".join(parts), tone


def _telemetry(message: Any) -> tuple[str, str]:
    figures = " ".join(f"{name}={value:g}" for name, value in message.figures.items())
    if message.metrics is not None:
        figures = f"{message.metrics.duration_seconds:.2f} s {figures}".strip()
    parts = [message.step.replace("_", " "), f"by {message.worker_id}", figures, message.detail]
    bad = {"failed", "dead_letter", "conflict"}
    tone = "bad" if message.step in bad else "warn" if message.step in {"fallback", "lost"} else ""
    return ", ".join(part for part in parts if part), tone


def _transition(message: Any) -> tuple[str, str]:
    tone = {"open": "bad", "half_open": "warn", "closed": "good"}[message.after]
    what = f"breaker of level {message.level}: {message.before} -> {message.after}"
    return f"{what} ({message.reason})" if message.reason else what, tone


def _validation(message: Any) -> tuple[str, str]:
    failed = [gate.name for gate in message.gates if not gate.passed]
    listed = f"failed: {', '.join(failed)}" if failed else f"{len(message.gates)} gates passed"
    return f"{message.outcome.replace('_', ' ')}, {listed}", ""


def _recompile(message: Any) -> tuple[str, str]:
    return f"recompile: {message.model_hash_before} -> {message.model_hash_after}", ""


def _dead_letter(message: Any) -> tuple[str, str]:
    place = f"{message.stream}/{message.entry_id}"
    return (
        f"{message.error_code} after {message.deliveries} deliveries of {place}: {message.reason}",
        "bad",
    )


def _action(message: Any) -> tuple[str, str]:
    parts = [f"{message.operator}: {message.action.replace('_', ' ')} {message.subject}"]
    parts += [part for part in (message.outcome, message.reason) if part]
    return ", ".join(parts), "warn"


def _other(message: Message) -> tuple[str, str]:
    return type(message).__name__, ""


_WORDS: dict[type[Message], Callable[[Any], tuple[str, str]]] = {
    CheckpointReady: _checkpoint,
    StructuralAnalysisRequest: _request,
    StructuralPruningDecision: _decision,
    PruningOutcome: _outcome,
    TelemetryEvent: _telemetry,
    BreakerTransition: _transition,
    StructuralValidationResult: _validation,
    RecompilationRequest: _recompile,
    DeadLetter: _dead_letter,
    OperatorAction: _action,
}
