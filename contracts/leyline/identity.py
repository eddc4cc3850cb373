"""Identities: idempotency keys, parameter identities, levels of analysis.

Everything here prints to one canonical string, parses back from just that string, and is the
same in every process and on every machine.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field, WithJsonSchema

from .base import Message, Name, WireEnum
from .errors import InvalidField, brief


class Level(WireEnum):
    """What a decision may remove."""

    CHANNEL = "channel"
    HEAD = "head"
    LAYER = "layer"
    PARAMETER = "parameter"
    """Single parameters: the legacy masks of section 4.4."""
    JOINT = "joint"
    """Channels, heads and layers of one checkpoint, decided together."""


def decided_level(levels: Sequence[Level]) -> Level:
    """The level in the key of the one decision on ``levels``: their own, or ``joint``."""
    return levels[0] if len(set(levels)) == 1 else Level.JOINT


_EPOCH = r"0|[1-9][0-9]{0,9}"
_HASH = r"[0-9a-f]{16}"
_ID = r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}"
_LEVELS = "|".join(Level)
_DECISION_KEY = re.compile(
    rf"(?P<epoch>{_EPOCH}):(?P<hash>{_HASH}):(?P<id>{_ID}):(?P<level>{_LEVELS})"
)
_REQUEST_KEY = re.compile(rf"(?P<epoch>{_EPOCH}):(?P<hash>{_HASH}):(?P<id>{_ID})")


@dataclass(frozen=True, slots=True, order=True)
class IdempotencyKey:
    """``<epoch>:<model_hash>:<decision_id>:<level>``: one decision for each key, ever.

    Raises:
        InvalidField: on construction or parsing, if a part is not in its canonical form
            (epochs without leading zeros, 16 lower-case hex digits, an identifier of at most
            64 letters, digits, ``_``, ``.`` and ``-``, and one of the levels).
    """

    epoch: int
    model_hash: str
    decision_id: str
    level: Level

    def __post_init__(self) -> None:
        if type(self.epoch) is not int or not _DECISION_KEY.fullmatch(str(self)):
            raise _bad_key(str(self), "<epoch>:<model_hash>:<decision_id>:<level>")
        object.__setattr__(self, "level", Level(self.level))

    def __str__(self) -> str:
        return f"{self.epoch}:{self.model_hash}:{self.decision_id}:{self.level}"

    @classmethod
    def parse(cls, text: str) -> IdempotencyKey:
        """The key that prints as ``text``; anything else raises :class:`InvalidField`."""
        match = _DECISION_KEY.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise _bad_key(text, "<epoch>:<model_hash>:<decision_id>:<level>")
        return cls(int(match["epoch"]), match["hash"], match["id"], Level(match["level"]))

    def at(self, level: Level) -> IdempotencyKey:
        """The key of the same checkpoint and decision at another level."""
        return IdempotencyKey(self.epoch, self.model_hash, self.decision_id, level)


@dataclass(frozen=True, slots=True, order=True)
class RequestKey:
    """``<epoch>:<model_hash>:<request_id>``: what a coordinator puts on a request (section 4.1)."""

    epoch: int
    model_hash: str
    request_id: str

    def __post_init__(self) -> None:
        if type(self.epoch) is not int or not _REQUEST_KEY.fullmatch(str(self)):
            raise _bad_key(str(self), "<epoch>:<model_hash>:<request_id>")

    def __str__(self) -> str:
        return f"{self.epoch}:{self.model_hash}:{self.request_id}"

    @classmethod
    def parse(cls, text: str) -> RequestKey:
        """The key that prints as ``text``; anything else raises :class:`InvalidField`."""
        match = _REQUEST_KEY.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise _bad_key(text, "<epoch>:<model_hash>:<request_id>")
        return cls(int(match["epoch"]), match["hash"], match["id"])

    def at(self, level: Level) -> IdempotencyKey:
        """The key of the decision that answers this request at ``level``."""
        return IdempotencyKey(self.epoch, self.model_hash, self.request_id, level)


def _bad_key(found: object, form: str) -> InvalidField:
    return InvalidField(
        "idempotency_key",
        f"{form} (16 hex digits of model hash, level one of {', '.join(Level)})",
        brief(found),
    )


def _schema(form: str, pattern: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "format": form, "pattern": f"^{pattern}$"})


DecisionKey = Annotated[
    str,
    AfterValidator(lambda text: str(IdempotencyKey.parse(text))),
    _schema("idempotency-key", f"({_EPOCH}):{_HASH}:{_ID}:({_LEVELS})"),
]
"""The text of an :class:`IdempotencyKey`."""
RequestKeyText = Annotated[
    str,
    AfterValidator(lambda text: str(RequestKey.parse(text))),
    _schema("request-key", f"({_EPOCH}):{_HASH}:{_ID}"),
]
"""The text of a :class:`RequestKey`."""


class ParameterIdentifier(Message):
    """Unique and stable identity of one tensor: its path, shape and dtype."""

    path: Name
    """Name in the ``state_dict``."""
    shape: tuple[Annotated[int, Field(ge=0, lt=2**40)], ...] = Field(max_length=8)
    dtype: Name
    """For example ``float32``."""

    @property
    def identifier(self) -> str:
        """First 16 hex digits of SHA-256 over ``path:shape:dtype``, shape as ``64x3x3x3``."""
        return stable_hash(self.path, "x".join(map(str, self.shape)), self.dtype)


def stable_hash(*parts: str | int) -> str:
    """First 16 hex digits of SHA-256 over the parts joined by ``:``. The same in every process."""
    return hashlib.sha256(":".join(map(str, parts)).encode()).hexdigest()[:16]


def checkpoint_id(run_id: str, epoch: int, model_hash: str, parts: Sequence[str] = ()) -> str:
    """The identity of a checkpoint: the same however often and by whomever it is published."""
    return "ck-" + stable_hash(run_id, epoch, model_hash, *parts)
