"""What a decision asks of those who can run the network, and what they answer. Types only.

A joint decision calls a :class:`Verifier` where it has one. The one that exists is in
``elesh.verification`` and needs torch; nothing here does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from leyline import Fallback, GateResult, Level, Phase, Verification

__all__ = ["Entry", "Measured", "Proposal", "Verifier"]

Entry = tuple[Level, str, int]
"""One unit: its level, the group's (or layer's) name, its number in it (0 for a layer)."""


@dataclass(frozen=True)
class Proposal:
    """A cut that passed every gate of its statistics, in the order in which it would be made."""

    order: tuple[Entry, ...]
    """Cheapest first, in current numbering; a prefix of it is a smaller cut."""
    phase: Phase
    """Which limits hold."""
    predicted_loss_rise: float | None = None
    """Of the whole cut, in nats a sample, where the statistics tell."""


@dataclass(frozen=True)
class Measured:
    """The part of a proposal that was measured as safe, or why nothing could be measured."""

    kept: tuple[Entry, ...]
    """In the proposal's order; what is left of it. The whole of it where ``skipped``."""
    gates: tuple[GateResult, ...] = ()
    """The gates of what was measured, for the cut that is kept; all passed unless it is empty."""
    verification: Verification | None = None
    """The figures behind the gates; None where nothing was measured."""
    skipped: Fallback | None = None
    """Why nothing was measured: the decision is then a predicted one, under stricter gates."""


class Verifier(Protocol):
    """Measures proposals on the network of one checkpoint. The same proposal, the same answer."""

    def __call__(self, proposal: Proposal) -> Measured:
        """Never raises for the network's sake: what cannot be measured is ``skipped``."""
        ...
