"""Admission: from the bytes of a stream entry to work items whose input is known to be sound.

Pure but for the clock that it is given. Everything that is wrong with a message is a
``ContractError`` here, before any blob is fetched or any child is asked.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from leyline import (
    AnalysisItem,
    AnalysisRequest,
    BlobRef,
    CheckpointDocument,
    CheckpointReady,
    EventEnvelope,
    Expired,
    IdempotencyKey,
    IdentityMismatch,
    InvalidField,
    JoinItem,
    Level,
    Message,
    PruningOutcome,
    StructuralAnalysisRequest,
    UnknownType,
    decided_level,
    read_envelope,
    unwrap,
)
from leyline.network.bundle import NETWORK_FILES
from leyline.streams import Stream

__all__ = ["Admitted", "SUPPORTED", "Work", "admit", "fingerprint"]

SUPPORTED = (Level.CHANNEL, Level.HEAD, Level.LAYER)
"""The levels that this build analyses."""


@dataclass(frozen=True)
class Work:
    """A checkpoint to analyse: the key of its decision, its document and where its blobs are."""

    keys: tuple[IdempotencyKey, ...]
    """The one key: of the level that is asked for, or ``joint`` for several."""
    fingerprint: str
    document: CheckpointDocument
    statistics: BlobRef
    gates: BlobRef | None
    layers: BlobRef | None
    heads: BlobRef | None
    network: tuple[BlobRef, ...]
    """Program, weights and held-out data, where all three are there."""
    run_id: str
    window: float
    """Seconds that the analysis may take."""
    received: datetime

    @property
    def epoch(self) -> int:
        """The epoch of the checkpoint."""
        return self.document.metadata.epoch

    @property
    def key(self) -> IdempotencyKey:
        """The key of the decision."""
        return self.keys[0]

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels that are asked for, each once."""
        return tuple(dict.fromkeys(self.document.levels))

    @property
    def blobs(self) -> dict[str, BlobRef]:
        """The blobs by the file name that a bundle's folder has for them."""
        blobs = {
            "statistics": self.statistics,
            "gates": self.gates,
            "layers": self.layers,
            "heads": self.heads,
        }
        files = {f"{name}.safetensors": blob for name, blob in blobs.items() if blob is not None}
        return files | dict(zip(NETWORK_FILES.values(), self.network, strict=False))


Admitted = Work | AnalysisRequest | PruningOutcome | AnalysisItem | JoinItem


def admit(
    data: bytes,
    *,
    window: float,
    now: datetime,
    redriven: datetime | None = None,
    stream: Stream | None = None,
) -> Admitted:
    """What the envelope ``data`` asks for or reports.

    Args:
        window: seconds that an analysis may take.
        redriven: when an operator sent it again; its time to live counts from then.
        stream: where it was published, if that is to be one for messages of its type: who may
            speak on one stream may not speak for another.

    Raises:
        ContractError: naming the field that is wrong, what was expected and what was found.
    """
    envelope = read_envelope(data)
    message = unwrap(envelope)
    if stream is not None and type(message) not in stream.messages:
        expected = ", ".join(kind.__name__ for kind in stream.messages)
        raise UnknownType(f"message on {stream.name}", expected, type(message).__name__)
    if isinstance(message, PruningOutcome | AnalysisItem | JoinItem):
        return message
    if isinstance(message, CheckpointReady):
        _require_in_time(envelope, now, redriven)
        return _checkpoint(message, window, now)
    if isinstance(message, StructuralAnalysisRequest):
        _require_in_time(envelope, now, redriven)
        return _request(message, window, now)
    if isinstance(message, AnalysisRequest):
        _require_in_time(envelope, now, redriven)
        return message
    raise UnknownType(
        "envelope.payload_type",
        "CheckpointReady, StructuralAnalysisRequest, AnalysisRequest or PruningOutcome",
        type(message).__name__,
        hint="this worker does not serve it",
    )


def _require_in_time(envelope: EventEnvelope, now: datetime, redriven: datetime | None) -> None:
    """Refuse what nobody waits for any more; an operator who sends it again does."""
    ends = (redriven or envelope.created_at) + envelope.ttl
    if envelope.processing_deadline is not None and redriven is None:
        ends = min(ends, envelope.processing_deadline)
    if now > ends:
        raise Expired(
            "envelope.ttl",
            f"to be served until {ends.isoformat(timespec='seconds')}",
            f"{now.isoformat(timespec='seconds')}",
            hint="it waited too long; redrive it if its decision still matters",
        )


def _checkpoint(message: CheckpointReady, window: float, now: datetime) -> Work:
    metadata = message.metadata
    document = CheckpointDocument(
        metadata=metadata,
        architecture=message.architecture,
        levels=message.levels,
        parameters=message.parameters,
    )
    key = IdempotencyKey(metadata.epoch, metadata.model_hash, metadata.checkpoint_id, Level.CHANNEL)
    return _work(message, document, key, window, now)


def _request(message: StructuralAnalysisRequest, window: float, now: datetime) -> Work:
    document = CheckpointDocument(
        metadata=message.metadata,
        architecture=message.current_architecture,
        levels=message.levels,
        parameters=message.parameters,
        requirements=message.requirements,
    )
    key = IdempotencyKey.parse(f"{message.idempotency_key}:{Level.CHANNEL}")
    return _work(message, document, key, min(window, message.timeout.total_seconds()), now)


def _work(
    message: CheckpointReady | StructuralAnalysisRequest,
    document: CheckpointDocument,
    key: IdempotencyKey,
    window: float,
    now: datetime,
) -> Work:
    metadata, architecture = document.metadata, document.architecture
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
    work = Work(
        keys=(key.at(decided_level(document.levels)),),
        fingerprint=fingerprint(message),
        document=document,
        statistics=message.statistics,
        gates=message.gates,
        layers=message.layers,
        heads=message.heads,
        network=_network(message),
        run_id=metadata.run_id,
        window=window,
        received=now,
    )
    for name, ref in work.blobs.items():
        if ref.sealed not in (None, metadata.model_hash):
            raise IdentityMismatch(f"{name}.sealed", metadata.model_hash, ref.sealed)
    return work


def _network(message: CheckpointReady | StructuralAnalysisRequest) -> tuple[BlobRef, ...]:
    """The three blobs of the network, or none of them."""
    refs = {name: getattr(message, name) for name in NETWORK_FILES}
    given = tuple(ref for ref in refs.values() if ref is not None)
    if given and len(given) < len(refs):
        missing = ", ".join(name for name, ref in refs.items() if ref is None)
        raise InvalidField("program", "program, weights and held_out together", f"no {missing}")
    return given


_VOLATILE = frozenset({"uri", "expires", "created_at", "timeout"})


def fingerprint(message: Message) -> str:
    """SHA-256 over what a message asks for, whoever published it and wherever its blobs lie.

    Blobs count by digest, not by address; times do not count. Two publishers of one checkpoint
    agree on it; a key that comes again with other content does not.
    """
    stripped = _stripped(message.model_dump(mode="json"))
    return hashlib.sha256(repr(stripped).encode()).hexdigest()


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return [(key, _stripped(item)) for key, item in value.items() if key not in _VOLATILE]
    if isinstance(value, list):
        return [_stripped(item) for item in value]
    return value
