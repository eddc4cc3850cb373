"""What a decision asks of those who can run the network, and what they answer. Types only.

A joint decision calls a :class:`Verifier` where it has one. The one that exists is in
``elesh.program`` and needs torch; nothing here does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from leyline import Fallback, GateResult, Level, LossFactor, Phase, Reconstructed, Verification

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
    rounds: int = 1
    """In how many rounds it was chosen on the masked network; 1: once, from the statistics."""
    loss_factor: LossFactor | None = None
    """What this run's predictions are multiplied by, where it was calibrated."""


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
    reconstruction: Reconstructed | None = None
    """Whether the kept weights are to be refitted, where the checkpoint asked for that."""
    fallbacks: tuple[Fallback, ...] = ()
    """What was measured otherwise than asked for, and why."""


class Verifier(Protocol):
    """Measures proposals on the network of one checkpoint. The same proposal, the same answer."""

    def __call__(self, proposal: Proposal) -> Measured:
        """Never raises for the network's sake: what cannot be measured is ``skipped``."""
        ...


@dataclass(frozen=True)
class LogitGaps:
    """How far a masked network is from other answers, on N calibration rows.

    A row is a sample, or one position of it where a sample has many answers; the same rows at every
    mask. The answer is that of the whole network, so no labels are needed.
    """

    values: npt.NDArray[np.float32]
    """[N]: log of the odds against the whole network's answer."""
    gradients: Mapping[str, npt.NDArray[np.float32]]
    """By group [N, size]: derivatives of the gaps with respect to its units' gates."""


@runtime_checkable
class Remeasuring(Protocol):
    """A verifier that can measure gate gradients again on a masked network."""

    def remeasure(
        self, masked: Sequence[Entry], halved: Sequence[Entry] = ()
    ) -> LogitGaps | Fallback:
        """With ``masked`` gone and the gates of ``halved`` at one half; or why that cannot be
        measured, which then holds for every mask."""
        ...


@runtime_checkable
class Probing(Protocol):
    """A verifier that can say what masking some units does to the loss, without any gate."""

    def loss_increase(self, entries: Sequence[Entry]) -> float | Fallback:
        """In nats a held-out sample; or why it cannot be measured, which holds for every mask."""
        ...
