"""Messages to bytes and back: msgpack, versioned, with limits, the same bytes for the same value.

``encode`` and ``decode`` handle one message; ``wrap`` and ``unwrap`` put it into an EventEnvelope.
Nothing is ever half-read: a newer schema version, an unknown type or field, a string, list, map or
nesting over its limit is refused with an error that names it.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import msgpack
from pydantic import ValidationError

from leyline.network.bundle import first_error

from .base import SCHEMA_VERSION, Message, unique_keys
from .envelope import TTL, EventEnvelope, Priority
from .errors import ContractError, Malformed, TooLarge, UnknownType, UnsupportedVersion
from .streams import MESSAGES

MAX_MESSAGE_BYTES = 8 << 20
MAX_STRING = 1 << 20
MAX_ITEMS = 1 << 20
MAX_DEPTH = 16

M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """The canonical msgpack bytes of a message: maps in the order of the model's fields."""
    data: bytes = msgpack.packb(message.model_dump(), use_bin_type=True, default=_wire)
    if len(data) > MAX_MESSAGE_BYTES:
        raise TooLarge(
            "message",
            f"at most {MAX_MESSAGE_BYTES} bytes",
            len(data),
            hint="send large arrays as blobs",
        )
    return data


def decode(kind: type[M], data: bytes, *, field: str = "message") -> M:
    """The message that ``data`` encodes.

    Raises:
        TooLarge, Malformed: if the bytes break a limit or are not msgpack.
        InvalidField and other ContractErrors: if a field is missing, unknown or wrong.
    """
    value = _unpack(data, field)
    if not isinstance(value, dict):
        raise Malformed(field, f"a map with the fields of {kind.__name__}", value)
    try:
        return kind.model_validate(value, strict=True)
    except ValidationError as error:
        raise first_error(error, kind.__name__) from None


def wrap(
    message: Message,
    *,
    source: str,
    priority: Priority = Priority.NORMAL,
    event_id: str = "",
    run_id: str = "",
    epoch: int | None = None,
    correlation_id: str = "",
    sequence: int = 0,
    deadline: datetime | None = None,
    now: datetime | None = None,
    ttl: timedelta | None = None,
) -> EventEnvelope:
    """An envelope around ``message``; its time to live follows from the priority."""
    return EventEnvelope(
        schema_version=SCHEMA_VERSION,
        event_id=event_id or secrets.token_hex(16),
        event_type=type(message).__name__,
        source_subsystem=source,
        created_at=now or datetime.now(UTC),
        processing_deadline=deadline,
        ttl=ttl or TTL[priority],
        payload=encode(message),
        payload_type=type(message).__name__,
        priority=priority,
        correlation_id=correlation_id,
        training_run_id=run_id,
        epoch=epoch,
        sequence=sequence,
    )


def read_envelope(data: bytes) -> EventEnvelope:
    """The envelope of ``data``; the version is checked before any other field is looked at.

    Raises:
        UnsupportedVersion: if it was written by a newer (or no known) schema.
        TooLarge, Malformed, InvalidField: as :func:`decode` does.
    """
    value = _unpack(data, "envelope")
    if not isinstance(value, dict) or "schema_version" not in value:
        raise Malformed("envelope", "a map with a schema_version", value)
    version = value["schema_version"]
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        newer = type(version) is int and version > SCHEMA_VERSION
        raise UnsupportedVersion(
            "envelope.schema_version",
            f"1 to {SCHEMA_VERSION}",
            version,
            hint="a newer sender: upgrade this side first" if newer else "",
        )
    try:
        return EventEnvelope.model_validate(value, strict=True)
    except ValidationError as error:
        raise first_error(error, "envelope") from None


def unwrap(envelope: EventEnvelope) -> Message:
    """The message inside.

    Raises:
        UnknownType: if ``payload_type`` is not in the catalogue, or differs from ``event_type``.
    """
    kind = MESSAGES.get(envelope.payload_type)
    if kind is None:
        raise UnknownType(
            "envelope.payload_type", f"one of {', '.join(sorted(MESSAGES))}", envelope.payload_type
        )
    if envelope.event_type != envelope.payload_type:
        raise UnknownType("envelope.event_type", envelope.payload_type, envelope.event_type)
    return decode(kind, envelope.payload, field=envelope.payload_type)


def _wire(value: object) -> str | float:
    """What msgpack has no type for: times as ISO 8601 in UTC, durations as seconds."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    raise TypeError(f"{type(value).__name__} does not go into a message; send arrays as blobs")


def _unpack(data: bytes, field: str) -> Any:
    if len(data) > MAX_MESSAGE_BYTES:
        raise TooLarge(field, f"at most {MAX_MESSAGE_BYTES} bytes", f"{len(data)} bytes")
    items = min(MAX_ITEMS, len(data))  # an item takes a byte: no room is made for more
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            list_hook=tuple,  # not use_list=False: lists of a declared length cost nothing yet
            object_pairs_hook=unique_keys,
            ext_hook=_no_extension,
            max_str_len=MAX_STRING,
            max_bin_len=MAX_MESSAGE_BYTES,
            max_array_len=items,
            max_map_len=items,
            max_ext_len=0,
        )
    except msgpack.exceptions.StackError:
        raise TooLarge(field, f"at most {MAX_DEPTH} levels of nesting", "deeper") from None
    except ContractError as error:
        raise error.inside(field) from None
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
        problem = str(error) or type(error).__name__
        raise Malformed(field, "msgpack within limits", problem) from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | tuple)
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | tuple)
        ]
        if not level:
            return value
    raise TooLarge(field, f"at most {MAX_DEPTH} levels of nesting", "deeper")


def _no_extension(code: int, _: bytes) -> Any:
    raise Malformed("value", "no msgpack extension types", code)
