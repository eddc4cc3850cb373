"""The parts of a decision that are tried one after another if all of it costs too much at once.

Promises: every part is the cheapest of the decision, as far as is known, and the next one is
smaller; none is smaller than an eighth. How the groups compare is measured where the first part is
too much as well: statistics tell units of one group apart better than they compare groups.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from elesh.observe import span
from elesh.trainer.recovery.evaluation import COST_POWER
from elesh.trainer.recovery.witnesses import OwnSamples, moved
from elesh.trainer.surgery.reconstruction.after_cut import Refit
from elesh.trainer.surgery.surgeon import Surgeon
from leyline import PrunedArchitecture, StructuralPruningDecision

from .carry_over import share_of_costs, shortened

_MOST, _LEAST = 0.9, 1 / 8
"""A decision is shortened to no more at first, and to no less."""
_TINY = 1e-6
"""Of accuracy: what seems to cost nothing."""
_MOST_PARTS = 16
"""That are measured alone: as many passes of a few samples."""

Alone = Callable[[Mapping[str, Collection[int]]], float | None]
"""What some units cost alone, by group; above 0. None where that cannot be told."""


def measured_alone(
    surgeon: Surgeon, own: OwnSamples | None, refit: Refit, accuracy: float
) -> Alone:
    """What units cost alone, refitted by the covariance: the drop of accuracy by how answers to
    Elesh's own samples move, and one standard error.

    Args:
        accuracy: of the network as it is.
    """

    def alone(units: Mapping[str, Collection[int]]) -> float | None:
        if own is None:
            return None
        with span("mask alone"):
            before = own.answers()
            try:
                surgeon.mask(units, reconstruct=refit.covariance, skip=refit.skip)
                now = own.answers()
            finally:
                surgeon.unmask()
        seen = moved(before, now, accuracy)
        return None if seen is None else max(seen.drop + seen.error, _TINY)

    return alone


class Shortening:
    """The parts of one decision.

    Args:
        now: the network; the decision is in its numbering.
        alone: measures what units cost.
    """

    def __init__(
        self, whole: StructuralPruningDecision, now: PrunedArchitecture, alone: Alone
    ) -> None:
        self.whole, self._now, self._alone = whole, now, alone
        self.share = 1.0
        """Of the units, that the last part has, or was to have."""
        self._last, self._tried = whole, 0
        self._costs: Mapping[str, float] = {}
        """Of each group's units, where they were measured."""

    def next(self, within: float | None) -> StructuralPruningDecision | None:
        """The next part; None where there is no smaller one.

        Args:
            within: the share of the last part that would cost no more than the limit, as far as is
                known.
        """
        if self.share <= _LEAST:
            return None
        self._tried, likely = self._tried + 1, within or 0.5
        if self._tried == 2:
            self._costs = self._measured()
        # What was expected wrongly once is halved.
        most = _MOST if self._tried == 1 else 0.5
        if not self._costs:
            part = self._of_units(self.share * min(likely, most))
        else:
            most = 1.0 if self._tried == 2 else 0.5
            part = self._by_costs(min(likely**COST_POWER, most))
        if part is not None and part.units == self._last.units:
            return self.next(within)
        self._last = part or self._last
        return part

    def _of_units(self, share: float) -> StructuralPruningDecision | None:
        self.share = max(share, _LEAST)
        return shortened(self.whole, self._now, self.share)

    def _by_costs(self, share: float) -> StructuralPruningDecision | None:
        """That has this share of what the last one costs."""
        cost = share * share_of_costs(self._last, self.whole, self._now, self._costs)
        part = shortened(self.whole, self._now, cost, _LEAST, self._costs)
        self.share = size_of(part) / size_of(self.whole) if part else 0.0
        return part

    def _measured(self) -> dict[str, float]:
        """What each group's units cost alone; empty if unknown."""
        several = len(self.whole.units) > 1 and not self.whole.layers
        return parts_alone(self.whole.units, self._alone) if several else {}


def parts_alone(units: Mapping[str, Collection[int]], alone: Alone) -> dict[str, float]:
    """What each group's units cost alone; the smallest of many are measured together. Empty where
    it cannot be told."""
    names = sorted(units, key=lambda name: len(units[name]), reverse=True)
    parts = [[name] for name in names[: _MOST_PARTS - 1]]
    if rest := names[_MOST_PARTS - 1 :]:
        parts.append(rest)
    found = dict[str, float]()
    for part in parts:
        cost = alone({name: units[name] for name in part})
        if cost is None:
            return {}
        count = sum(len(units[name]) for name in part)
        found |= {name: cost * len(units[name]) / count for name in part}
    return found


def size_of(decision: StructuralPruningDecision) -> int:
    """Units and layers that go."""
    return sum(map(len, decision.units.values())) + len(decision.layers)
