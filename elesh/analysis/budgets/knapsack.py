"""Solves a budget across groups as a knapsack over their removal curves.

What a network takes of a resource is a function of how many units each group keeps. A tensor's size
along a dimension is a constant plus, for each group cut there, units times width; its weight is
multiplied once a position. So parameters, multiply-accumulates and memory follow exactly from the
architecture, for any sizes, without building another one; latency is read from a measured table,
between its points linearly.

Promises: never more units of a group than its capacity; steps keep the group's multiple; a step
that saves nothing is never taken (a cut that does not speed anything up is not made); the result is
the same for the same input.

Greedy by cost per saving with look-ahead. That is optimal where curves are convex and savings add
up. Savings are measured again as groups shrink: of two groups that meet in one tensor, the second
saves less.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from elesh.analysis.candidates import Doubles
from leyline import Budget, InvalidField, LatencyTable, LayerLatency, PrunedArchitecture

Sizes = Mapping[str, int]
"""Units kept by group; groups that are not named keep all."""

_BYTES = {
    "float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2,
    "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """One tensor's share: ``factor`` times the product of its dimensions, or a measured grid."""

    shape: tuple[int, ...]
    cuts: tuple[tuple[str, int, int], ...]
    """(group, dimension, width)."""
    factor: float
    grid: LayerLatency | None = None

    def value(self, lost: Mapping[str, int]) -> float:
        """With so many units of each group lost."""
        shape = list(self.shape)
        for group, dim, width in self.cuts:
            shape[dim] -= width * lost.get(group, 0)
        if self.grid is not None:
            return _looked_up(self.grid, shape)
        return self.factor * float(math.prod(shape))

    def slope(self, group: str) -> _Slope | None:
        """What each unit of ``group`` is worth; None where that depends on how many are lost."""
        own = [(dim, width) for name, dim, width in self.cuts if name == group]
        if self.grid is not None or len(own) != 1:
            return None
        ((dim, width),) = own
        others = dict[int, list[tuple[str, int]]]()
        for name, other, of in self.cuts:
            if other != dim:
                others.setdefault(other, []).append((name, of))
        fixed = math.prod(size for d, size in enumerate(self.shape) if d != dim and d not in others)
        rest = tuple((self.shape[d], tuple(cuts)) for d, cuts in others.items())
        return _Slope(self.factor * width * fixed, rest)


@dataclass(frozen=True)
class _Slope:
    """``factor`` times the product of sizes, each less what other groups lose there."""

    factor: float
    sizes: tuple[tuple[int, tuple[tuple[str, int], ...]], ...]

    def value(self, lost: Mapping[str, int]) -> float:
        """With so many units of each group lost."""
        found = self.factor
        for size, cuts in self.sizes:
            for group, width in cuts:
                size -= width * lost.get(group, 0)
            found *= size
        return found


@dataclass(frozen=True)
class ResourceModel:
    """A resource of one architecture."""

    parts: tuple[_Part, ...]
    fixed: float = 0.0
    """What no cut changes."""

    @cached_property
    def _by_group(self) -> Mapping[str, tuple[_Part, ...]]:
        found: dict[str, list[_Part]] = {}
        for part in self.parts:
            for group in dict.fromkeys(name for name, _, _ in part.cuts):
                found.setdefault(group, []).append(part)
        return {name: tuple(parts) for name, parts in found.items()}

    @cached_property
    def _slopes(self) -> Mapping[str, tuple[_Slope, ...]]:
        """The groups whose units save the same each, with what one saves."""
        found: dict[str, tuple[_Slope, ...]] = {}
        for name, parts in self._by_group.items():
            slopes = [part.slope(name) for part in parts]
            if all(slopes):
                found[name] = tuple(slope for slope in slopes if slope is not None)
        return found

    @cached_property
    def _neighbours(self) -> Mapping[str, frozenset[str]]:
        return {
            group: frozenset({group, *(name for part in parts for name, _, _ in part.cuts)})
            for group, parts in self._by_group.items()
        }

    def total(self, lost: Mapping[str, int]) -> float:
        """Of the network with so many units of each group lost."""
        return self.fixed + sum(part.value(lost) for part in self.parts)

    def savings(
        self, lost: Mapping[str, int], group: str, counts: Iterable[int]
    ) -> Iterator[tuple[int, float]]:
        """Each of ``counts``, with what losing so many more units of ``group`` saves."""
        if group in self._slopes:
            each = sum(slope.value(lost) for slope in self._slopes[group])
            yield from ((count, count * each) for count in counts)
            return
        parts = self._by_group.get(group, ())
        now, more, gone = [part.value(lost) for part in parts], dict(lost), lost.get(group, 0)
        for count in counts:
            more[group] = gone + count
            yield count, sum(v - part.value(more) for v, part in zip(now, parts, strict=True))

    def neighbours(self, group: str) -> frozenset[str]:
        """The groups whose savings change when ``group`` loses units; itself among them."""
        return self._neighbours.get(group, frozenset({group}))


def resource_model(architecture: PrunedArchitecture, budget: Budget) -> ResourceModel:
    """The model of the budget's resource.

    Raises:
        InvalidField: if the latency table knows none of the architecture's layers, or names one
            that is not there.
    """
    if budget.latency is not None:
        return _latency(architecture, budget.latency)
    positions: dict[str, int] = defaultdict(int)
    for layer in architecture.layers if budget.resource == "macs" else ():
        positions[layer.weight] += layer.positions  # Several may share a weight.
    cuts = _cuts(architecture)
    parts = []
    for tensor in architecture.tensors:
        if budget.resource == "macs":
            factor = float(positions[tensor.path])
        elif budget.resource == "memory":
            factor = float(_BYTES.get(tensor.dtype, 4))
        else:
            factor = float(tensor.kind == "parameter")
        if factor:
            parts.append(_Part(tensor.shape, cuts.get(tensor.path, ()), factor))
    for product in architecture.products if budget.resource == "macs" else ():
        widths = tuple((cut.group, cut.dim, cut.width) for cut in product.cuts)
        parts.append(_Part(product.shape, widths, 1.0))
    return ResourceModel(tuple(parts))


def _cuts(architecture: PrunedArchitecture) -> dict[str, tuple[tuple[str, int, int], ...]]:
    """The (group, dimension, width) of every tensor's cuts."""
    found: dict[str, dict[tuple[str, int], int]] = {}
    for group in architecture.groups:
        for part in group.slices:
            widths = found.setdefault(part.tensor, {})
            place = (group.name, part.dim)
            widths[place] = widths.get(place, 0) + part.width
    return {
        path: tuple((group, dim, width) for (group, dim), width in widths.items())
        for path, widths in found.items()
    }


def _latency(architecture: PrunedArchitecture, table: LatencyTable) -> ResourceModel:
    weights = {layer.name: layer.weight for layer in architecture.layers}
    cuts, parts = _cuts(architecture), []
    for measured in table.layers:
        # Normalisations multiply no weight, but they have one, as long as their channels.
        path = weights.get(measured.layer) or f"{measured.layer}.weight"
        tensor = architecture.tensor.get(path)
        if tensor is None:
            raise InvalidField(
                "budget.latency.layers", "layers of the architecture with a weight", measured.layer
            )
        parts.append(_Part(tensor.shape, cuts.get(tensor.path, ()), 0.0, measured))
    if not parts:
        raise InvalidField("budget.latency.layers", "at least one layer", 0)
    inside = sum(part.value({}) for part in parts)
    # What the layers do not explain (calls, activations, additions) is taken as fixed.
    return ResourceModel(tuple(parts), max(0.0, table.total_seconds - inside))


def _looked_up(grid: LayerLatency, shape: list[int]) -> float:
    """Bilinear between the measured points, constant beyond them."""
    seconds: Doubles = np.asarray(grid.seconds, np.float64).reshape(len(grid.outputs), -1)
    if grid.inputs:
        along = [np.interp(shape[1], grid.inputs, row) for row in seconds]
    else:
        along = [row[0] for row in seconds]
    return float(np.interp(shape[0], grid.outputs, along))


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
    price: float = 0.0,
) -> Fit:
    """The cheapest cut that brings the resource down to ``target``, or as near as the groups allow.

    Args:
        curves: of the groups that may lose units, by name.
        target: of the resource, in its own unit.
        units: the most units in all (the schedule's quota); None: no limit.
        already: what groups lose for another budget in any case.
        price: what every unit costs beside its own cost (:func:`price_of_units`).
    """
    lost: dict[str, int] = dict(already or {})
    before, left = model.total({}), model.total(lost)
    steps = {name: _best_step(model, name, curve, lost, price) for name, curve in curves.items()}
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
            steps[other] = _best_step(model, other, curves[other], lost, price)
    idle = tuple(
        name
        for name, curve in sorted(curves.items())
        if curve.costs and steps[name][1] == 0 and lost.get(name, 0) < len(curve.costs)
    )
    return Fit(lost, before, model.total(lost), idle)


_TRIES = 12
"""Prices tried, each four times the last, and then between two of them."""


def price_of_units(
    model: ResourceModel,
    curves: Mapping[str, Curve],
    target: float,
    units: int,
    already: Mapping[str, int] | None = None,
) -> float:
    """The lowest price of a unit for which ``units`` of them bring the resource down to ``target``.

    The multiplier of Lagrange of the limit on units, in the unit of their costs, to a few percent:
    0 where they are enough anyway, no other less than a 64th of the mean cost, and the highest
    price tried where no price makes them enough.
    """

    def enough(price: float) -> bool:
        fit = fit_budget(model, curves, target, units=units, already=already, price=price)
        return fit.after <= target * (1 + 1e-9)

    costs = [abs(cost) for curve in curves.values() for cost in curve.costs]
    low, high = 0.0, sum(costs) / len(costs) / 64 if any(costs) else 1.0
    if enough(low):
        return low
    for _ in range(_TRIES):
        if enough(high):
            break
        low, high = high, 4 * high
    else:
        return high
    for _ in range(_TRIES if low else 0):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
        if high < 1.02 * low:
            break
    return high


def needed(
    targets: Sequence[tuple[ResourceModel, float]],
    curves: Mapping[str, Curve],
    lost: Mapping[str, int],
) -> dict[str, int]:
    """What all targets together need of these losses: a long step goes beyond its target, and what
    goes for one resource saves another, too. The most expensive units are kept first.

    Args:
        targets: of each resource, in its own unit; one that is missed is missed by no more then.
    """
    found = dict(lost)
    ceilings = [(model, max(target, model.total(found))) for model, target in targets]
    while True:
        spare = []
        for name, gone in found.items():
            if not gone or name not in curves:
                continue
            curve = curves[name]
            first = curve.size % curve.multiple or curve.multiple
            step = min(gone, first if gone == first else curve.multiple)
            fewer = {**found, name: gone - step}
            if all(model.total(fewer) <= ceiling for model, ceiling in ceilings):
                spare.append((curve.costs[gone - 1], name, step))
        if not spare:
            return {name: gone for name, gone in found.items() if gone}
        _, name, step = max(spare)
        found[name] -= step


_Step = tuple[float, int, float]
"""Cost per saving, units, saving; no units where nothing saves."""


def _best_step(
    model: ResourceModel, name: str, curve: Curve, lost: Mapping[str, int], price: float
) -> _Step:
    gone, best = lost.get(name, 0), (float("inf"), 0, 0.0)
    for count, saved in model.savings(lost, name, curve.counts(gone)):
        if saved <= 0:
            continue
        # Joint costs may be negative: a removal that makes up for earlier ones is free.
        cost = max(0.0, sum(curve.costs[gone : gone + count])) + count * price
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
