"""The audit log: decisions and actions with their authors, each entry chained to the one before.

An entry's digest is SHA-256 over its JSON text, and the next entry names it. So a writer that
removes, changes or reorders entries breaks the chain at that place.
"""

from __future__ import annotations

import hashlib
from typing import ClassVar, Literal

from pydantic import Field

from leyline.base import Count, Epoch, Label, Message, Moment, Name, Sha256, Text

from .decisions import Fallback, GateResult
from .events import Figures

GENESIS = "0" * 64
"""What the first entry names as the digest before it."""


class AuditEvent(Message):
    """What happened, who did it, and the evidence by reference."""

    kind: Literal["decision", "outcome", "breaker", "dead_letter", "operator"]
    action: Name
    """What was done: ``approved``, ``rejected``, ``applied``, ``open``, ``trip``, ``redrive``..."""
    actor: Name
    """Who did it: a subsystem, a worker, a run's trainer, or an operator."""
    at: Moment
    subject: Label
    """The key of a decision, ``<run>:<level>`` of a breaker, or ``<stream>/<entry>``."""
    run_id: Label = ""
    epoch: Epoch | None = None
    reason: Text = ""
    """Why: the rejection reason, the failure behind a transition, what an operator said."""
    source: Label = ""
    """Where the message itself stands: ``<stream>/<entry>``."""
    digest: Sha256 | None = None
    """SHA-256 of the message's bytes there; none where there is no message."""
    figures: Figures = Field(default_factory=dict)
    """The message in figures; NaN means unknown."""
    gates: tuple[GateResult, ...] = ()
    """The verdict of every safety gate, passed or not."""
    fallbacks: tuple[Fallback, ...] = ()
    """Fallbacks of the failure table that were taken."""


class AuditEntry(Message):
    """One link of the chain. Its place and its predecessor are part of what is digested."""

    contract_of: ClassVar[str] = "Elesh to auditors"

    number: Count
    """Its place, from 1, without gaps."""
    previous: Sha256
    """Digest of the entry before it; zeros for the first."""
    event: AuditEvent

    @property
    def text(self) -> str:
        """Its canonical JSON: what is digested, and what a line of the file begins with."""
        return self.model_dump_json()

    @property
    def digest(self) -> str:
        """SHA-256 over ``text``, in hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()
