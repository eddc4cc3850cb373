"""A budget of a resource, solved across groups as a knapsack over their removal curves.

Promises: never more units of a group than its capacity; steps keep the group's multiple; a step
that saves nothing is never taken (a cut that does not speed anything up is not made); the result is
the same for the same input.

Greedy by cost per saving with look-ahead. That is optimal where curves are convex and savings add
up. Savings are measured again as groups shrink: of two groups that meet in one tensor, the second
saves less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .resources import ResourceModel

__all__ = ["Curve", "Fit", "fit_budget"]

_JUMPS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Steps looked at, in multiples: latency falls in stairs, one unit alone often saves nothing."""


@dataclass(frozen=True)
class Curve:
    """What removing the cheapest units of a group costs, one after another."""

    costs: Sequence[float]
    """Of each unit in the order of removal; as many as the group may lose."""
    size: int
    """Units that are there."""
    multiple: int = 1
    """The number that stays is a multiple of this, once any is lost."""

    def counts(self, gone: int) -> Iterator[int]:
        """How many more may go at once, rising."""
        first = (self.size - gone) % self.multiple or self.multiple
        for jump in _JUMPS:
            count = first + (jump - 1) * self.multiple
            if gone + count > len(self.costs):
                return
            yield count


@dataclass(frozen=True)
class Fit:
    """How many units each group loses, and how far that gets."""

    lost: Mapping[str, int]
    before: float
    after: float
    """The resource before and after, in its own unit."""
    idle: tuple[str, ...]
    """Groups that could lose units but whose loss saves nothing."""


def fit_budget(
    model: ResourceModel,
    curves: Mapping[str, Curve],
    target: float,
    *,
    units: int | None = None,
    already: Mapping[str, int] | None = None,
    exact: bool = False,
) -> Fit:
    """The cheapest cut that brings the resource down to ``target``, or as near as the groups allow.

    Args:
        curves: of the groups that may lose units, by name.
        target: of the resource, in its own unit.
        units: the most units in all (the schedule's quota); None: no limit.
        already: what groups lose for another budget in any case.
        exact: keep what a long step took beyond the target: no group then loses a unit, or a
            multiple, that the target does not need.
    """
    lost: dict[str, int] = dict(already or {})
    before, left = model.total({}), model.total(lost)
    steps = {name: _best_step(model, name, curve, lost) for name, curve in curves.items()}
    while left > target:
        spent = sum(lost.values())
        capacity = None if units is None else units - spent
        name = _cheapest(steps, capacity)
        if name is None:
            break
        _, count, saved = steps[name]
        lost[name] = lost.get(name, 0) + count
        left -= saved
        for other in model.neighbours(name) & curves.keys():
            steps[other] = _best_step(model, other, curves[other], lost)
    if exact:
        _keep_unneeded(model, curves, target, lost, already or {})
    idle = tuple(
        name
        for name, curve in sorted(curves.items())
        if curve.costs and steps[name][1] == 0 and lost.get(name, 0) < len(curve.costs)
    )
    return Fit(lost, before, model.total(lost), idle)


def _keep_unneeded(
    model: ResourceModel,
    curves: Mapping[str, Curve],
    target: float,
    lost: dict[str, int],
    already: Mapping[str, int],
) -> None:
    """Keep units that the target is met without, the most expensive first."""
    while model.total(lost) <= target:
        spare = []
        for name, gone in lost.items():
            if name not in curves or gone <= already.get(name, 0):
                continue
            curve = curves[name]
            first = curve.size % curve.multiple or curve.multiple
            step = min(gone - already.get(name, 0), first if gone == first else curve.multiple)
            if model.total({**lost, name: gone - step}) <= target:
                spare.append((curve.costs[gone - 1], name, step))
        if not spare:
            return
        _, name, step = max(spare)
        lost[name] -= step
        if not lost[name]:
            del lost[name]


_Step = tuple[float, int, float]
"""Cost per saving, units, saving; no units where nothing saves."""


def _best_step(model: ResourceModel, name: str, curve: Curve, lost: Mapping[str, int]) -> _Step:
    gone, best = lost.get(name, 0), (float("inf"), 0, 0.0)
    for count, saved in model.savings(lost, name, curve.counts(gone)):
        if saved <= 0:
            continue
        # Joint costs may be negative: a removal that makes up for earlier ones is free.
        cost = max(0.0, sum(curve.costs[gone : gone + count]))
        if cost / saved < best[0]:
            best = (cost / saved, count, saved)
    return best


def _cheapest(steps: Mapping[str, _Step], capacity: int | None) -> str | None:
    possible = [
        (ratio, name)
        for name, (ratio, count, _) in steps.items()
        if count and (capacity is None or count <= capacity)
    ]
    return min(possible)[1] if possible else None
