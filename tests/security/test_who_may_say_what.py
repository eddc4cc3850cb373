"""Who may say what: role, message, stream, and what was done to it; nothing but named cells acts.

A cell is one entry, given to what a trainer, a worker or the console reads entries with. The table
is generated: every message of the catalogue's samples, on every stream that the role reads, genuine
and in every way that somebody without the right, or with a right to something else, can make it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from contracts import examples
from elesh.bus import Delivery, Guard
from elesh.bus.admission import admit, hear
from elesh.console.reading import _FOLDED, Reader
from elesh.security import Key, Keyring, new_key
from elesh.settings import Settings
from elesh.trainer import Session
from elesh.worker.supervisor import STREAMS as WORKERS_STREAMS
from leyline import (
    AnalysisItem,
    ContractError,
    DeadLetter,
    JoinItem,
    Level,
    Message,
    encode,
    wrap,
)
from leyline.streams import (
    CHECKPOINTS,
    DEAD,
    DECISIONS,
    OUTCOMES,
    REDELIVERIES,
    REQUESTS,
    STREAMS,
    TELEMETRY,
    WORK,
    Stream,
)

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
RUN = examples.MESSAGES["StructuralPruningDecision"].run_id  # type: ignore[attr-defined]
KEY = examples.MESSAGES["StructuralPruningDecision"].idempotency_key  # type: ignore[attr-defined]
NAMES = (
    "CheckpointReady", "StructuralAnalysisRequest", "AnalysisRequest", "StructuralPruningDecision",
    "PruningMasks", "PruningOutcome", "BreakerTransition", "DeadLetter", "OperatorAction",
)  # fmt: skip
MESSAGES: dict[str, Message] = {name: examples.MESSAGES[name] for name in NAMES} | {
    "TelemetryEvent": examples.MESSAGES["TelemetryEvent"].model_copy(
        update={"step": "dead_letter", "run_id": RUN, "idempotency_key": KEY}
    ),
    "AnalysisItem": AnalysisItem(plan=KEY, level=Level.CHANNEL),
    "JoinItem": JoinItem(plan=KEY),
}
OWN: dict[str, Stream] = {
    name: next(s for s in STREAMS if type(m) in s.messages and s is not REDELIVERIES)
    for name, m in MESSAGES.items()
}
"""The stream that each message belongs on."""

KEYS = {
    name: Key.model_validate({**new_key("hmac-sha256", name), "may": may})
    for name, may in {
        "all": ["*"],
        **{f"only-{stream.name}": [stream.name] for stream in STREAMS},
    }.items()
}
STRANGER = Keyring({"all": Key.model_validate(new_key("hmac-sha256", "all"))}, "all")


def guard(sign_with: str = "all", partition: str = "main") -> Guard:
    return Guard(Keyring(KEYS, sign_with), partition=partition)


BELIEVES = guard()


def enveloped(message: Message, **more: Any) -> bytes:
    if isinstance(message, DeadLetter):  # its run stands in the envelope alone
        more = {"run_id": RUN, **more}
    return encode(wrap(message, source="test", **{"now": NOW, **more}))


def entry(stream: Stream, framed: bytes, **fields: str) -> Delivery:
    named = {name.encode(): value.encode() for name, value in fields.items()}
    return Delivery(stream, "1767268800000-0", {b"envelope": framed, **named}, 1)


def flipped(framed: bytes) -> bytes:
    return framed[:-1] + bytes([framed[-1] ^ 1])


def other_than(stream: Stream) -> str:
    return next(f"only-{each.name}" for each in STREAMS if each is not stream)


Make = Callable[[str, Stream], Delivery]


def plain(name: str, stream: Stream, by: Guard = BELIEVES, **more: Any) -> Delivery:
    return entry(stream, by.frame(stream, enveloped(MESSAGES[name], **more)))


def spoiled_key(name: str, stream: Stream) -> Delivery:
    message = MESSAGES[name]
    if "model_hash" in type(message).model_fields and hasattr(message, "key"):
        message = message.model_copy(update={"model_hash": "0" * 16})
        return entry(stream, BELIEVES.frame(stream, enveloped(message)))
    return plain(name, stream, run_id="another")


TREATMENTS: dict[str, Make] = {
    "genuine": plain,
    "unsigned": lambda name, stream: entry(stream, enveloped(MESSAGES[name])),
    "by a stranger": lambda name, stream: plain(name, stream, Guard(STRANGER)),
    "by a key with another right": lambda name, stream: plain(
        name, stream, guard(other_than(stream))
    ),
    "changed": lambda name, stream: entry(
        stream, flipped(BELIEVES.frame(stream, enveloped(MESSAGES[name])))
    ),
    "cut short": lambda name, stream: entry(stream, plain(name, stream).framed[:20]),
    "moved from another stream": lambda name, stream: entry(
        stream,
        BELIEVES.frame(next(s for s in STREAMS if s is not stream), enveloped(MESSAGES[name])),
    ),
    "moved from another partition": lambda name, stream: plain(
        name, stream, guard(partition="another")
    ),
    "in an envelope of another run": lambda name, stream: plain(name, stream, run_id="another"),
    "in an envelope of another epoch": lambda name, stream: plain(name, stream, epoch=999_999),
    "of another architecture than its key": spoiled_key,
    "expired": lambda name, stream: plain(name, stream, now=NOW - timedelta(hours=3)),
    "dated ahead": lambda name, stream: plain(name, stream, now=NOW + timedelta(hours=3)),
    "forwarded with its origin": lambda name, stream: entry(
        stream,
        BELIEVES.frame(OWN[name], enveloped(MESSAGES[name])),
        origin=f"{OWN[name].name}/1-1",
    ),
    "forwarded with another origin": lambda name, stream: entry(
        stream,
        BELIEVES.frame(OWN[name], enveloped(MESSAGES[name])),
        origin=f"{next(s for s in (CHECKPOINTS, OUTCOMES) if s is not OWN[name]).name}/1-1",
    ),
    "sent again by nobody": lambda name, stream: entry(
        stream, plain(name, stream, now=NOW - timedelta(hours=3)).framed, redriven="1767268800000"
    ),
}


def trainer_acts(delivery: Delivery) -> bool:
    session = Session(RUN, "redis://127.0.0.1:1/0", Settings())
    bus = SimpleNamespace(guard=BELIEVES)
    session._bus._hear(bus, delivery, NOW)  # type: ignore[arg-type]
    acted = bool(session.decisions() or session.failed)
    session._bus._hear(bus, delivery, NOW)  # type: ignore[arg-type]
    assert not session.decisions(), "what came twice is heard once"
    return acted


def worker_acts(delivery: Delivery) -> bool:
    try:
        admit(hear(delivery, BELIEVES), window=60, now=NOW, redriven=delivery.redriven)
    except ContractError:
        return False
    return True


def console_acts(delivery: Delivery) -> bool:
    reader = Reader(SimpleNamespace(guard=BELIEVES), Settings())  # type: ignore[arg-type]
    return reader._read(delivery) is not None


ROLES: dict[str, tuple[Callable[[Delivery], bool], tuple[Stream, ...]]] = {
    "trainer": (trainer_acts, (DECISIONS, DEAD, TELEMETRY)),
    "worker": (worker_acts, WORKERS_STREAMS),
    "console": (console_acts, (*_FOLDED, REDELIVERIES)),
}
AGELESS = {"PruningOutcome", "AnalysisItem", "JoinItem"}
"""What a worker serves however late it comes."""


def names_run(name: str) -> bool:
    message = MESSAGES[name]
    holder = getattr(message, "metadata", None) or message
    return bool(getattr(holder, "run_id", ""))


def names_epoch(name: str) -> bool:
    message = MESSAGES[name]
    own, metadata = getattr(message, "epoch", None), getattr(message, "metadata", None)
    return own is not None or getattr(metadata, "epoch", None) is not None


def belongs(role: str, name: str, stream: Stream) -> bool:
    """Whether the role acts on the genuine message there."""
    if OWN[name] is not stream:
        return False
    if role == "trainer":
        return name in {"StructuralPruningDecision", "DeadLetter"}
    return True


def allowed(role: str, treatment: str, name: str, stream: Stream) -> bool:
    """The whole of what may act."""
    match treatment:
        case "genuine":
            return belongs(role, name, stream)
        case "expired" | "dated ahead":
            late = role == "console" or name in AGELESS or name == "DeadLetter"
            return belongs(role, name, stream) and late
        case "in an envelope of another run" | "of another architecture than its key":
            if treatment.startswith("of") and name == "StructuralPruningDecision":
                return False
            # Where the body names none, the envelope's is the run, and it is not this trainer's.
            return belongs(role, name, stream) and not names_run(name) and role != "trainer"
        case "in an envelope of another epoch":
            return belongs(role, name, stream) and not names_epoch(name)
        case "forwarded with its origin":
            # In its own stream the field says nothing; elsewhere only what goes round may have one.
            if stream is REDELIVERIES:
                return role != "trainer" and OWN[name] in (CHECKPOINTS, REQUESTS, OUTCOMES, WORK)
            return belongs(role, name, stream)
        case "forwarded with another origin":
            return stream is not REDELIVERIES and belongs(role, name, stream)
    return False


def cells() -> Iterator[tuple[str, str, str, Stream]]:
    for role, (_, streams) in ROLES.items():
        yield from itertools.product([role], TREATMENTS, MESSAGES, streams)


def test_the_table_is_large() -> None:
    assert sum(1 for _ in cells()) >= 2000


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.sampled
def test_nothing_but_the_allowed_cells_acts(role: str, treatment: str) -> None:
    acts, streams = ROLES[role]
    make = TREATMENTS[treatment]
    found, wanted = set(), set()
    for name, stream in itertools.product(MESSAGES, streams):
        if acts(make(name, stream)):
            found.add((name, stream.name))
        if allowed(role, treatment, name, stream):
            wanted.add((name, stream.name))
    assert found == wanted
