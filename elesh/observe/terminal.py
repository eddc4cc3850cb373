"""A terminal for untrusted text: control characters are shown, never executed.

Promises: whatever is printed, no escape sequence and no control character of a message, a log line
or an error reaches the terminal. Text that is given to :func:`escape` can neither begin a new line
nor be read as markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich import markup
from rich.console import Console
from rich.segment import Segment

from .logs import LINES, printable


def escape(text: object) -> str:
    """Untrusted text for one line of a :class:`Terminal`'s markup."""
    return markup.escape(printable(str(text)))


class Terminal(Console):
    """A console that shows the control characters of whatever is printed on it."""

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """As of ``Console``; its own control codes (cursor, bars) stay what they are."""
        return _shown(super().render(renderable, options))


def _shown(segments: Iterable[Segment]) -> Iterator[Segment]:
    for segment in segments:
        if segment.control is None and LINES.search(segment.text):
            segment = Segment(printable(segment.text, lines=True), segment.style)
        yield segment
