"""The errors of the contracts: each names the field, what was expected and what was found.

Every refusal that crosses the bus becomes a dead letter whose reason is ``str(error)`` and
whose class is ``error.code``; both are stable enough to search for and to alert on.
"""

from __future__ import annotations

import reprlib
from typing import ClassVar

_MAX_FOUND = 120
_MAX_PART = 1000
_REPR = reprlib.Repr()  # bounded in depth and length: what it shows may be hostile
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = _MAX_FOUND
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = 10


def brief(value: object) -> str:
    """A value as people can read it in one line: its ``repr``, at most 120 characters."""
    return _line(_REPR.repr(value), _MAX_FOUND)


def _line(text: str, limit: int) -> str:
    """One printable line: what a message holds must not break logs, terminals or dead letters."""
    text = text[: limit + 1]
    text = text if text.isprintable() else "".join(map(_visible, text))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _visible(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]


class ContractError(Exception):
    """Something that crossed the bus is not what the contract says.

    Not a ``ValueError``: pydantic would wrap those, and the class of the error would be lost.

    Attributes:
        code: short stable name of the class of error, for dead letters and metrics.
        field: the path of the offending field, for example ``metadata.epoch``.
        expected: what the contract asks for there.
        found: what was there, abbreviated.
    """

    code: ClassVar[str] = "contract"

    def __init__(self, field: str, expected: str, found: object, *, hint: str = "") -> None:
        self.field = _line(field, _MAX_PART)
        self.expected = _line(expected, _MAX_PART)
        self.found = _line(found, _MAX_FOUND) if isinstance(found, str) else brief(found)
        self.hint = _line(hint, _MAX_PART)
        super().__init__(
            f"{self.field}: expected {self.expected}, found {self.found}"
            + (f"; {self.hint}" if hint else "")
        )

    def inside(self, place: str) -> ContractError:
        """The same error with ``place`` (a file, a message) before its field."""
        return type(self)(f"{place}: {self.field}", self.expected, self.found, hint=self.hint)


class Malformed(ContractError):
    """Bytes that are not well-formed msgpack or safetensors."""

    code = "malformed"


class TooLarge(ContractError):
    """A message, blob, string, list or nesting over its stated limit."""

    code = "too_large"


class UnsupportedVersion(ContractError):
    """A schema version that this build does not know: refused by name, never half-read."""

    code = "unsupported_version"


class UnknownType(ContractError):
    """A message type that is not in the catalogue."""

    code = "unknown_type"


class InvalidField(ContractError):
    """A field that is missing, unexpected, of the wrong type, or out of its range."""

    code = "invalid_field"


class NotFinite(ContractError):
    """NaN or infinity where the field's policy asks for finite numbers."""

    code = "not_finite"


class ShapeMismatch(ContractError):
    """An array whose shape or dtype does not fit the architecture."""

    code = "shape_mismatch"


class DigestMismatch(ContractError):
    """A blob whose content is not what its reference promised."""

    code = "digest_mismatch"


class MissingBlob(ContractError):
    """A blob that its reference points at and the store does not hold (expired or never put)."""

    code = "missing_blob"


class IdentityMismatch(ContractError):
    """Two parts of one message that disagree on which network or checkpoint they speak of."""

    code = "identity_mismatch"


class Conflict(ContractError):
    """A key that was decided already comes again with other content: never overwritten."""

    code = "conflict"


class Poison(ContractError):
    """A message that was delivered too often without being committed."""

    code = "poison"


class Expired(ContractError):
    """A message that came after its deadline or time to live: an answer no longer matters."""

    code = "expired"


class AnalysisFailed(ContractError):
    """The analysis of sound input gave no decision, whatever fallback was tried."""

    code = "analysis_failed"


class UnknownDecision(ContractError):
    """An outcome or a tool names a decision that was never published."""

    code = "unknown_decision"


class Unsigned(ContractError):
    """A message without a signature where one is required; nothing of it was parsed."""

    code = "unsigned"


class BadSignature(ContractError):
    """A signature that is malformed, of an unknown or expired key, or not of these bytes."""

    code = "bad_signature"


class NotAuthorized(ContractError):
    """A genuine signature by a key that may not speak on this stream."""

    code = "not_authorized"


class Unreadable(ContractError):
    """A sealed blob that none of the keys opens, or that was sealed for another architecture."""

    code = "unreadable"
