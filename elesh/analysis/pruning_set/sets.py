"""The predicted rise of the loss when several units go together.

Promises: pure functions of arrays; a set of one is its single removal, an empty one costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from elesh.analysis.candidates import Doubles
from elesh.analysis.importance.scores import single_removal
from leyline import GateStatistics

__all__ = ["set_removal"]

_RIVALS = 2.5
"""By how many standard deviations a wide scatter lifts the best of the wrong answers: the mean of
the largest of as many normal draws as there are wrong ones, 1.5 of nine, 2.5 of a hundred."""


def set_removal(
    gates: Mapping[str, GateStatistics], units: Mapping[str, Sequence[int]]
) -> tuple[float, float | None]:
    """The predicted rise of the loss in nats a sample when all these units are removed together.

    Where margins are known, the units' moves are added up sample by sample and what their sum does
    to the margins is bent as networks bend it (:func:`_loss_increases`, decision 0084). What
    is known
    of single removals beyond that is added: of units that were masked all of it, of others the
    mean, which is the whole of it where one unit goes. Without margins: the sum of the single
    removals, far too low for sets.

    Returns:
        the rise, and its standard error over the samples where margins are known.
    """
    chosen = [(gates[name], np.asarray(lost, dtype=np.int64)) for name, lost in units.items()]
    alone = [single_removal(gate)[lost] for gate, lost in chosen]
    margins = chosen[0][0].margins if chosen else None
    if margins is None or any(gate.moves is None for gate, _ in chosen):
        return float(sum(loss_increases.sum() for loss_increases in alone)), None
    m = np.asarray(margins, dtype=np.float64)
    shift, unsure = np.zeros((2, len(m), 1))
    masked, beyond = 0.0, [np.zeros(0)]
    for (gate, lost), single in zip(chosen, alone, strict=True):
        moves = np.asarray(gate.moves, dtype=np.float64)[:, lost]
        shift += moves.sum(axis=1, keepdims=True)
        if gate.removal_error is not None:
            masked += float(
                (single - _loss_increases(m, moves, np.zeros_like(moves)).mean(axis=0)).sum()
            )
        else:
            unsure += moves.sum(axis=1, keepdims=True)
            beyond.append(single - _loss_increases(m, moves, moves).mean(axis=0))
    gaps = np.concatenate(beyond)
    loss_increases = (
        _loss_increases(m, shift, unsure) + masked + (float(gaps.mean()) if len(gaps) else 0.0)
    )
    return float(loss_increases.mean()), float(loss_increases.std()) / math.sqrt(len(m))


def _loss_increases(margins: Doubles, shifts: Doubles, unsure: Doubles) -> Doubles:
    """[N, S]: the rise of each sample's loss for each of S shifts of its margin.

    - A margin is moved less the further all of them are: what derivatives promise is lost twice
      where it runs through two units that go. If the derivative shrinks with the outputs, as
      ``exp(-t)`` along a way of length x, ``(1 - exp(-x)) / x`` of the shift is left. x is the mean
      size of the shifts by that of the margins.
    - The margin is that of the strongest wrong answer. What only scales the outputs down keeps the
      answers in their order; the rest of the shift scatters all wrong answers, and the best of
      them is then another, and higher: by half the variance where that is small (the mean of an
      exponential of normal draws), by :data:`_RIVALS` standard deviations where it is large.

    Args:
        margins: [N].
        shifts: [N, S], of the margins, downwards.
        unsure: [N, S], the part of the shifts that also scatters the other answers.
    """
    size = max(float(margins @ margins) / len(margins), 1.0)  # Under a nat, nothing bends yet.
    way = np.sqrt(np.einsum("ns,ns->s", shifts, shifts) / len(margins) / size)
    left = np.divide(-np.expm1(-way), way, out=np.ones_like(way), where=way > 0)
    scatter = unsure - np.outer(margins, margins @ unsure / len(margins) / size)
    spread = left * np.sqrt(np.einsum("ns,ns->s", scatter, scatter) / len(margins))
    lift = _RIVALS * (np.hypot(_RIVALS, spread) - _RIVALS)
    before = margins[:, None]
    loss_increases: Doubles = np.logaddexp(0, before - left * shifts + lift) - np.logaddexp(
        0, before
    )
    return loss_increases
