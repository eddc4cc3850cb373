"""Error bars of single units, and which of the chosen ones lie inside the noise.

A unit goes only if what it costs alone, two standard errors included, is less than what a unit
taken at random would cost alone. Where all units of a network look alike, or the samples are too
few to tell them apart, nothing is chosen by its looks. This is the rule of the whole cut (the
``noise`` gate) for each of its units. What units make up for in each other does not count here:
on the samples that chose them, part of it is chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from elesh.analysis.candidates import Candidates, Doubles, Floats, Ints

from .removal_order import SHRINKAGE
from .select import Selection

__all__ = ["Bars", "error_bars", "marginal_cost_errors", "without_noise"]

_BLOCK = 1024
"""Units whose samples are looked at together."""


@dataclass(frozen=True)
class Bars:
    """What units cost one after the other, in squared output units (scaled as the columns)."""

    costs: Doubles
    """[K]: by how much each raises the mean square of the movement."""
    errors: Doubles
    """[K]: standard errors, from the scatter of the samples, or half the difference between the
    two halves of the samples, whichever is larger."""


def error_bars(
    columns: Floats, units: Sequence[int], *, alone: bool = False, shrinkage: float = SHRINKAGE
) -> Bars:
    """The costs of ``units`` in this order, or of each alone, with their error bars.

    Args:
        columns: [C, N], the even samples first (see :class:`Projections`).
        units: places in the row of candidates.
        shrinkage: how much of the cross terms counts, as in :class:`JointOrder`.
    """
    samples = columns.shape[1]
    middle, moved = (samples + 1) // 2, np.zeros(samples)
    costs, errors = np.empty(len(units)), np.empty(len(units))
    for start in range(0, len(units), _BLOCK):
        part = slice(start, min(start + _BLOCK, len(units)))
        taken = columns[list(units[part])].astype(np.float64)
        before = moved + np.cumsum(taken, axis=0) - taken
        values = taken * taken if alone else taken * (taken + 2 * shrinkage * before)
        moved = before[-1] + taken[-1]
        costs[part] = values.mean(axis=1)
        scatter = values.std(axis=1) / math.sqrt(samples)
        difference = values[:, :middle].mean(axis=1) - values[:, middle:].mean(axis=1)
        errors[part] = np.maximum(scatter, np.abs(difference) / 2)
    return Bars(costs, errors)


def marginal_cost_errors(selection: Selection, columns: Floats) -> dict[int, float]:
    """The standard errors of what the units cost when they were taken."""
    units = selection.removal_order.units.tolist()
    return dict(zip(units, error_bars(columns, units).errors.tolist(), strict=True))


def without_noise(selection: Selection, columns: Floats) -> Selection:
    """The selection without the units inside the noise.

    Groups that would no longer end at their multiple keep the units they lost last, too. No other
    unit goes instead: whatever would follow costs more still.
    """
    units = selection.removal_order.units
    bars = error_bars(columns, units.tolist(), alone=True)
    candidates = selection.order.candidates
    limit = _typical(columns, candidates)
    noisy = (bars.costs + 2 * bars.errors >= limit) & (limit > 0)
    if not noisy.any():
        return selection
    quiet = units[~noisy]
    back = _beyond_multiples(candidates, quiet)
    gone = set(units[noisy].tolist()) | back
    selection.order.put_back(sorted(gone))
    pairs = tuple(pair for pair in selection.pairs if pair.removed not in gone)
    return replace(
        selection,
        removal_order=selection.removal_order.without(gone),
        pairs=pairs,
        kept=frozenset(pair.kept for pair in pairs),
        kept_for_multiple=selection.kept_for_multiple | back,
        noise=frozenset(units[noisy].tolist()),
    )


def _typical(columns: Floats, candidates: Candidates) -> float:
    """What a unit taken at random from the groups that may lose any would cost alone."""
    capacities = np.array(candidates.capacities)[candidates.group_of] > 0
    squares = np.einsum("ij,ij->i", columns, columns, dtype=np.float64)[capacities]
    return float(squares.mean()) / columns.shape[1] if len(squares) else 0.0


def _beyond_multiples(candidates: Candidates, units: Ints) -> set[int]:
    """The units, last ones first, that keep their groups from ending at their multiples."""
    if max(candidates.multiples, default=1) == 1:
        return set()
    back: set[int] = set()
    groups = candidates.group_of[units]
    for group in np.unique(groups).tolist():
        taken = units[groups == group].tolist()
        excess = -(candidates.sizes[group] - len(taken)) % candidates.multiples[group]
        back |= set(taken[len(taken) - excess :] if excess <= len(taken) else taken)
    return back
