"""Hides secrets in texts that people see: ``***`` is shown instead.

Promises: a password in a URL, in its authority or its query, is never shown, whatever characters it
has; nor is one in a malformed URL, which lacks a scheme, a host, or the right name of its option.
The rest of the text stays.
"""

from __future__ import annotations

import re
from typing import Any

_IN_AUTHORITY = re.compile(r"(?:(?<=://)|^)([^/@:]*):(?!//).*@", re.DOTALL)
# A password where host and port should be.
_IN_PLACE_OF_HOST = re.compile(
    r"(?<=://)((?:[^/@:\[,]*:\d*,)*[^/@:\[,]*):(?!\*\*\*@|\d*(?:[/?#,]|$)).*", re.DOTALL
)
_IN_QUERY = re.compile(r"(?i)([?&]\w*(?:pass|pwd|secret|token)\w*=)[^&\s]*")
_IN_LINE = re.compile(r"(?<=://)([^/@:\s]*):[^\s\"']*@")
# What is left after that: a password with blanks or quotes. A port is no password.
_ODD_IN_LINE = re.compile(r"(?<=://)([^/@:\s]*):(?!\*\*\*@|\d+(?:[/?#\s;,'\"]|$))[^@\n]*@")
_SECRET = re.compile(r"(?i)token|secret|passw|private")
"""Names of keys whose values are not shown."""


def masked(url: str) -> str:
    """A URL as it may be shown."""
    url = _IN_PLACE_OF_HOST.sub(r"\1:***", _IN_AUTHORITY.sub(r"\1:***@", url))
    return _IN_QUERY.sub(r"\1***", url)


def masked_line(text: str) -> str:
    """A text in which there may be URLs, as it may be shown."""
    return _IN_QUERY.sub(r"\1***", _ODD_IN_LINE.sub(r"\1:***@", _IN_LINE.sub(r"\1:***@", text)))


def masked_values(value: Any, name: str = "") -> Any:
    """Settings as they may be shown: URLs without passwords, and no value of a secret's name."""
    if isinstance(value, dict):
        return {key: masked_values(each, str(key)) for key, each in value.items()}
    if value and _SECRET.search(name) and isinstance(value, str | list | tuple):
        return "***"
    if isinstance(value, list | tuple):
        return [masked_values(each) for each in value]
    return masked(value) if isinstance(value, str) else value


def masked_repr(value: Any, name: str = "") -> str:
    """A value of a settings file as a complaint shows it; it may hold itself."""
    return "'***'" if _SECRET.search(name) else masked_line(repr(value))
