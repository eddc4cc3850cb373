"""The common base of all messages and the types of their fields.

Promises, for every message that is read from bytes (msgpack or JSON):

- **Strict types.** A string is not a number, ``3.0`` and ``true`` are not integers, bytes are not
  text. Only an integer where a float is asked for is taken, since it loses nothing. Python code
  that builds a message is met by pydantic's usual conversions, so numpy scalars are welcome there.
- **Times** are ISO 8601 text with an offset from UTC and are kept in UTC; one without an offset
  is refused, never guessed. Durations are finite numbers of seconds.
- **NaN** is refused, but for fields of type ``MaybeNaN``: figures that may be unknown (for example
  an accuracy that the trainer did not measure).
"""

from __future__ import annotations

import operator
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AllowInfNan,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    PlainSerializer,
    StringConstraints,
)
from pydantic_core import CoreSchema, core_schema

from .errors import Malformed

V = TypeVar("V")


is_none = partial(operator.is_, None)
"""For fields that are left out of the bytes while they are None."""


def sorted_items(items: dict[str, V]) -> dict[str, V]:
    """For maps of equal messages, which are equal bytes."""
    return dict(sorted(items.items()))


def unique_keys(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A map that is read; a key that stands in it twice is refused.

    Raises:
        Malformed: if one does.
    """
    items = dict(pairs)
    if len(items) != len(pairs):
        raise Malformed("keys", "every key once", [key for key, _ in pairs])
    return items


SCHEMA_VERSION = 1
"""The newest schema version that this build reads and the one it writes."""

Finite = Annotated[float, AllowInfNan(False)]
NonNegative = Annotated[float, AllowInfNan(False), Field(ge=0)]
Fraction = Annotated[float, AllowInfNan(False), Field(ge=0, le=1)]
MaybeNaN = Annotated[float, AllowInfNan(True)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Epoch = Annotated[int, Field(ge=0, lt=10**10)]
"""Epochs count from 1; 0 is before training."""
Name = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Label = Annotated[str, StringConstraints(max_length=512)]
"""A name that may be empty."""
Text = Annotated[str, StringConstraints(max_length=8192)]
ModelHash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}$")]


def _moment(value: object) -> object:
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
        if not isinstance(moment, datetime):
            raise ValueError("a time in ISO 8601 with its offset from UTC")
        if moment.utcoffset() is None:
            raise ValueError("a time with its offset from UTC, for example 2025-01-14T12:00:00Z")
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("a time that exists in UTC") from None


def _duration(value: object) -> object:
    if isinstance(value, timedelta):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 10**9:
        return timedelta(seconds=value)
    raise ValueError("a duration as a finite number of seconds")


Moment = Annotated[datetime, BeforeValidator(_moment)]
Duration = Annotated[
    timedelta,
    BeforeValidator(_duration),
    PlainSerializer(timedelta.total_seconds, return_type=float, when_used="json"),
]


class WireEnum(StrEnum):
    """An enumeration that is its text on the wire, and read back from just that text."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        known = {each.value: each for each in cls}

        def member(value: object) -> object:
            if not isinstance(value, str):
                return value
            if value not in known:
                raise ValueError("one of " + ", ".join(cls))
            return known[value]

        return core_schema.no_info_before_validator_function(member, handler(source))


class Message(BaseModel):
    """A frozen part of a contract. Unknown fields are refused: a message is never half-read."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        ser_json_inf_nan="constants",
        ser_json_bytes="base64",
        val_json_bytes="base64",
        use_attribute_docstrings=True,
    )

    contract_of: ClassVar[str] = ""
    """Who sends it to whom, as the design document says; shown in the generated reference."""
