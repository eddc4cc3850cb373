"""Admission: turns a stream entry into a valid message, with the same rules for every reader.

Trainers, workers, the console, the audit log and replay all judge by :func:`hear`: the signature
and the signer's right to speak on that stream, the kind of the message against the stream, and that
envelope, key and body name the same run, epoch and architecture. Before a message is acted on, its
time to live is checked, too, by the server's clock.

Promises: pure but for the clock that it is given. Everything that is wrong with a message is a
``ContractError`` here, before any blob is fetched, any child is asked or any network touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from elesh.bus.streams.records import Delivery, read_dead_letter
from leyline import (
    AnalysisItem,
    AnalysisRequest,
    BlobRef,
    CheckpointDocument,
    CheckpointReady,
    ContractError,
    DeadLetter,
    EventEnvelope,
    Expired,
    IdempotencyKey,
    IdentityMismatch,
    InvalidField,
    JoinItem,
    Level,
    Message,
    PerformanceRequirements,
    PruningOutcome,
    StructuralAnalysisRequest,
    StructuralPruningDecision,
    UnknownType,
    decided_level,
    read_envelope,
    unwrap,
)
from leyline.errors import brief
from leyline.network.bundle import BLOB_FILES, NETWORK_FILES
from leyline.streams import Stream

from .guard import Guard

SUPPORTED = (Level.CHANNEL, Level.HEAD, Level.LAYER)
"""The levels that this build analyses."""
_CLOCK_TOLERANCE = timedelta(minutes=5)
"""A message may be dated so much later than now: two servers of a failover differ a little."""


@dataclass(frozen=True)
class Work:
    """A checkpoint to analyse: the key of its decision, its document and where its blobs are."""

    key: IdempotencyKey
    """The decision's key: at the requested level, or ``joint`` for several."""
    fingerprint: str
    document: CheckpointDocument
    blobs: Mapping[str, BlobRef]
    """By the file name that a bundle's folder has for them; of the network all three or none."""
    run_id: str
    window: float
    """Seconds that the analysis may take."""
    received: datetime


Admitted = Work | AnalysisRequest | PruningOutcome | AnalysisItem | JoinItem


@dataclass(frozen=True)
class Heard:
    """A message, who signed it and what it travelled in."""

    message: Message
    envelope: EventEnvelope
    run_id: str
    """The run of the message, by its body if that names one."""
    signer: str = ""
    """Id of the key that signed it; empty where signatures are not required."""


def hear(delivery: Delivery, guard: Guard) -> Heard:
    """The message of a stream entry, after its signature and its place were checked.

    Raises:
        Unsigned, BadSignature, NotAuthorized: if no signer that ``guard`` knows may write it.
        UnknownType: if messages of its kind do not stand in this stream.
        IdentityMismatch: if envelope, key and body do not speak of the same.
        ContractError: if it cannot be read.
    """
    checked = delivery.check(guard)
    heard = read(checked.content, delivery.published_on, beside=delivery)
    return replace(heard, signer=checked.signer)


def read(data: bytes, stream: Stream | None = None, *, beside: Delivery | None = None) -> Heard:
    """As :func:`hear`, of an envelope that was stored; its signature was checked before.

    Args:
        stream: where it was published, if that is known.
        beside: the entry whose fields may hold what was too large for the envelope.
    """
    envelope = read_envelope(data)
    if stream is not None and envelope.payload_type not in {k.__name__ for k in stream.messages}:
        expected = ", ".join(kind.__name__ for kind in stream.messages)
        raise UnknownType(f"message on {stream.name}", expected, brief(envelope.payload_type))
    message = unwrap(envelope)
    if isinstance(message, DeadLetter) and beside is not None:
        message = read_dead_letter(beside)
    # Envelope, key and body name the same run, epoch and architecture.
    holders = (message, getattr(message, "metadata", None))
    epochs = (getattr(holder, "epoch", None) for holder in holders)
    epoch = next((epoch for epoch in epochs if isinstance(epoch, int)), None)
    runs = (getattr(holder, "run_id", "") for holder in holders)
    run = next((run for run in runs if run), "")
    if run and envelope.training_run_id not in ("", run):
        raise IdentityMismatch("envelope.training_run_id", brief(run), envelope.training_run_id)
    if epoch is not None and envelope.epoch not in (None, epoch):
        raise IdentityMismatch("envelope.epoch", f"{epoch}", f"{envelope.epoch}")
    if isinstance(message, StructuralPruningDecision):
        key = message.key
        if (key.epoch, key.model_hash) != (message.epoch, message.model_hash):
            expected = f"a key of epoch {message.epoch} and architecture {message.model_hash}"
            raise IdentityMismatch("idempotency_key", expected, str(key))
    return Heard(message, envelope, run or envelope.training_run_id)


def require_in_time(heard: Heard, now: datetime, redriven: datetime | None = None) -> None:
    """Refuse a message whose time is over, unless an operator sent it again, and one that is dated
    in the future, which would never expire.

    Args:
        now: by the server's clock.
        redriven: when an operator sent it again; its time to live counts from then.

    Raises:
        Expired: if its time to live or its deadline is over.
        InvalidField: if it is dated later than the server's clock allows.
    """
    envelope = heard.envelope
    begins = redriven or envelope.created_at
    if begins > now + _CLOCK_TOLERANCE:
        raise InvalidField(
            "envelope.created_at",
            f"at most {_CLOCK_TOLERANCE.total_seconds() / 60:.0f} minutes after "
            f"{now:%F %T}Z, the server's time",
            f"{begins:%F %T}Z",
            hint="the server's clock went back, or another host's was used; "
            "redrive it if its decision still matters",
        )
    ends = begins + envelope.ttl
    if envelope.processing_deadline is not None and redriven is None:
        ends = min(ends, envelope.processing_deadline)
    if now > ends:
        raise Expired(
            "envelope.ttl",
            f"to be served until {ends.isoformat(timespec='seconds')}",
            f"{now.isoformat(timespec='seconds')}",
            hint="it waited too long; redrive it if its decision still matters",
        )


def admit(
    heard: Heard, *, window: float, now: datetime, redriven: datetime | None = None
) -> Admitted:
    """The message as something that a worker serves.

    An outcome, and a part of what was admitted before, is served however late it comes.

    Args:
        window: seconds that an analysis may take.
        now: by the server's clock.
        redriven: as :func:`require_in_time`.

    Raises:
        ContractError: naming the field that is wrong, what was expected and what was found.
    """
    message = heard.message
    if isinstance(message, PruningOutcome | AnalysisItem | JoinItem):
        return message
    if isinstance(message, CheckpointReady):
        require_in_time(heard, now, redriven)
        return _work(message, window, now)
    if isinstance(message, StructuralAnalysisRequest):
        require_in_time(heard, now, redriven)
        return _work(message, min(window, message.timeout.total_seconds()), now)
    if isinstance(message, AnalysisRequest):
        require_in_time(heard, now, redriven)
        return message
    raise UnknownType(
        "envelope.payload_type",
        "CheckpointReady, StructuralAnalysisRequest, AnalysisRequest or PruningOutcome",
        type(message).__name__,
        hint="this worker does not serve it",
    )


def key_of(message: CheckpointReady | StructuralAnalysisRequest) -> IdempotencyKey:
    """The key of the decision that a checkpoint or a request leads to.

    Raises:
        ContractError: if a request's key is malformed.
    """
    level = decided_level(message.levels)
    if isinstance(message, CheckpointReady):
        about = message.metadata
        return IdempotencyKey(about.epoch, about.model_hash, about.checkpoint_id, level)
    return IdempotencyKey.parse(f"{message.idempotency_key}:{level}")


def named_key(data: bytes) -> str:
    """The key of the decision that the envelope ``data`` is about; empty where it names none."""
    try:
        message = unwrap(read_envelope(data))
        match message:
            case CheckpointReady() | StructuralAnalysisRequest():
                return str(key_of(message))
            case AnalysisItem() | JoinItem():
                return message.plan
            case PruningOutcome():
                return message.idempotency_key
    except ContractError:
        pass
    return ""


def _work(
    message: CheckpointReady | StructuralAnalysisRequest, window: float, now: datetime
) -> Work:
    metadata, requirements = message.metadata, PerformanceRequirements()
    if isinstance(message, CheckpointReady):
        architecture = message.architecture
    else:
        architecture, requirements = message.current_architecture, message.requirements
    document = CheckpointDocument(
        metadata=metadata,
        architecture=architecture,
        levels=tuple(dict.fromkeys(message.levels)),
        parameters=message.parameters,
        requirements=requirements,
    )
    if metadata.model_hash != architecture.model_hash:
        raise IdentityMismatch("metadata.model_hash", architecture.model_hash, metadata.model_hash)
    if not document.levels:
        raise InvalidField("levels", f"at least one of {', '.join(SUPPORTED)}", document.levels)
    for level in document.levels:
        if level not in SUPPORTED:
            raise InvalidField(
                "levels",
                f"any of {', '.join(SUPPORTED)}",
                level.value,
                hint="this build does not analyse that level",
            )
    missing = [name for name in NETWORK_FILES if getattr(message, name) is None]
    if 0 < len(missing) < len(NETWORK_FILES):
        found = f"no {', '.join(missing)}"
        raise InvalidField("program", "program, weights and held_out together", found)
    files = {file: getattr(message, name) for name, file in BLOB_FILES.items()}
    blobs = {file: ref for file, ref in files.items() if ref is not None}
    for file, ref in blobs.items():
        if ref.sealed not in (None, metadata.model_hash):
            raise IdentityMismatch(f"{file}.sealed", metadata.model_hash, ref.sealed)
    return Work(
        key=key_of(message),
        fingerprint=fingerprint(message),
        document=document,
        blobs=blobs,
        run_id=metadata.run_id,
        window=window,
        received=now,
    )


_VOLATILE = frozenset({"uri", "expires", "created_at", "timeout", "preflight"})


def fingerprint(message: Message) -> str:
    """SHA-256 over what a message asks for, whatever its publisher and its blobs' addresses.

    Blobs count by digest, not by address; times do not count, nor does what a preflight found and
    how long it took: a run that is killed and begins anew has another. Two publishers of one
    checkpoint agree on it; a key that comes again with other content does not.
    """
    stripped = _stripped(message.model_dump(mode="json"))
    return hashlib.sha256(repr(stripped).encode()).hexdigest()


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return [(key, _stripped(item)) for key, item in value.items() if key not in _VOLATILE]
    if isinstance(value, list):
        return [_stripped(item) for item in value]
    return value
