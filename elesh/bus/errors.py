"""The one error of the bus: it cannot be used now. Wrong data is a ``ContractError``."""

from __future__ import annotations

from elesh.observe.logs import printable
from elesh.settings.masking import masked

__all__ = ["BadAddress", "BusRefuses", "BusUnavailable", "Overloaded", "RunClaimed", "masked"]


class BusUnavailable(Exception):
    """The bus cannot be reached or cannot serve now; trying again later may help.

    Nothing is known about a command whose answer did not arrive: it may have been carried out.
    """

    def __init__(self, url: str, reason: object, *, hint: str = "is the server running?") -> None:
        text = " ".join(str(reason).split()) or type(reason).__name__
        super().__init__(printable(f"bus at {masked(url)} is unavailable: {text}; {hint}"))


class BusRefuses(BusUnavailable):
    """The server answers but refuses: it is full, read-only, loading, the user lacks a right.

    The command was not carried out.

    Attributes:
        code: the first word of the server's error, for example ``OOM``.
    """

    def __init__(self, url: str, code: str, reason: object, *, hint: str) -> None:
        self.code = code
        super().__init__(url, reason, hint=hint)


class BadAddress(BusUnavailable):
    """A URL that names no bus: waiting does not help."""


class Overloaded(BusUnavailable):
    """A message was shed: so much is waiting that its priority has no room."""

    def __init__(self, url: str, stream: str, priority: str, limit: int) -> None:
        super().__init__(
            url,
            f"{stream} has {limit} or more entries waiting, from which priority {priority} is shed",
            hint="add workers: those there are do not keep up",
        )


class RunClaimed(BusUnavailable):
    """A message was refused: another trainer has the run."""

    def __init__(self, url: str, run_id: str, who: str) -> None:
        hint = "end that one, or choose another run id"
        super().__init__(url, f"run {run_id} is claimed by {who}", hint=hint)
