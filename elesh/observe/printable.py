"""Text for people: control characters of strangers shown and not carried out, times in one form.

Promises: the result has no escape sequence, no control character and no character that changes the
direction of writing; each stands there as its number, for instance ``\\u001b``. JSON stays JSON.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime

__all__ = ["LINES", "iso", "moment", "printable"]

# C0, DEL, C1, marks and overrides of direction, line and paragraph separators, lone surrogates.
_OTHERS = "\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
_ONE_LINE = re.compile(f"[\x00-\x1f{_OTHERS}]")
LINES = re.compile(f"[\x00-\x08\x0b-\x1f{_OTHERS}]")
"""What is not printable in a text of several lines."""


def moment(at: datetime) -> str:
    """A time for people, to the second, in UTC: the one form everywhere."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def iso(at: datetime) -> str:
    """A time for machines: ISO 8601 in UTC, to the millisecond."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def printable(text: str, *, lines: bool = False) -> str:
    """The text with control characters as ``\\uXXXX``; with ``lines`` tabs and line ends stay."""
    return (LINES if lines else _ONE_LINE).sub(lambda found: f"\\u{ord(found[0]):04x}", text)
