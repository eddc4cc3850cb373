"""Progress while a network is pruned: one line that is rewritten on a terminal, else one line a
round. Standard output is left to the caller."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.status import Status


class Progress:
    """Says on standard error how far pruning is.

    Args:
        wanted: if not, it is silent.
    """

    def __init__(self, wanted: bool) -> None:
        self._console = Console(stderr=True, quiet=not wanted)
        self._status: Status | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.quiet:
            self._status = self._console.status("pruning")
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._status is not None:
            self._status.stop()

    def doing(self, what: str) -> None:
        """What is being done now; shown on terminals only."""
        if self._status is not None:
            self._status.update(what)

    def done(self, what: str) -> None:
        """What was done: a line that stays."""
        self._console.print(what, highlight=False, markup=False)
