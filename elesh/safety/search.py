"""Finds the largest safe part of a cut with few measurements.

Promises: what is kept was measured as safe; the order within a group stays; how groups compare is
measured where the whole of a cut is too much, since statistics tell units of one group apart better
than they compare groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from leyline import Level

from .measured_gates import Entry

_MOST_PARTS = 16
"""That are measured alone: as many measurements more."""
_LEVELS = (Level.CHANNEL, Level.HEAD, Level.LAYER)

IsSafe = Callable[[tuple[Entry, ...]], bool]


def parts_alone(order: Sequence[Entry]) -> list[tuple[Entry, ...]]:
    """The parts of ``order`` that are measured alone: each group's, as far as these are
    :data:`_MOST_PARTS` at most; the smallest of more are one part together."""
    groups: dict[tuple[Level, str], list[Entry]] = {}
    for entry in order:
        groups.setdefault(entry[:2], []).append(entry)
    parts = sorted(groups.values(), key=len, reverse=True)
    if len(parts) > _MOST_PARTS:
        small = {entry[:2] for part in parts[_MOST_PARTS - 1 :] for entry in part}
        parts[_MOST_PARTS - 1 :] = [[entry for entry in order if entry[:2] in small]]
    return [tuple(part) for part in parts]


def by_measured_costs(
    order: Sequence[Entry],
    costs: Sequence[float],
    parts: Sequence[tuple[Sequence[Entry], float]],
) -> tuple[Entry, ...]:
    """``order`` by what each unit costs when the costs of a part add up to what was measured of it.

    Args:
        costs: of ``order``, on any scale that is one within a part. A unit is placed by the highest
            so far, as none may overtake its predecessors.
        parts: each with what it was measured to cost alone, above 0.
    """
    cost_of = dict(zip(order, costs, strict=True))
    measured: dict[Entry, float] = {}
    for part, whole in parts:
        heights = list(itertools.accumulate((max(cost_of[entry], 0.0) for entry in part), max))
        total = sum(heights)
        for entry, height in zip(part, heights, strict=True):
            measured[entry] = whole * (height / total if total > 0 else 1 / len(part))
    return tuple(sorted(order, key=measured.__getitem__))


def largest_safe(order: Sequence[Entry], is_safe: IsSafe) -> tuple[Entry, ...]:
    """The part of ``order`` that can go, in its order.

    All of it if that is safe; else the longest safe prefix that bisection finds, and then, level by
    level from channels to layers, as many of the units behind it as can go on top: a layer that is
    too much does not keep the channels behind it.
    """
    if not order or is_safe(tuple(order)):
        return tuple(order)
    kept = _longest((), order, is_safe)
    rest = order[len(kept) :]
    if len({level for level, _, _ in order}) > 1:
        for level in _LEVELS:
            kept = _extended(kept, [entry for entry in rest if entry[0] is level], is_safe)
    chosen = set(kept)
    return tuple(entry for entry in order if entry in chosen)


def _extended(kept: tuple[Entry, ...], more: Sequence[Entry], is_safe: IsSafe) -> tuple[Entry, ...]:
    if not more or is_safe((*kept, *more)):
        return (*kept, *more)
    return _longest(kept, more, is_safe)


def _longest(kept: tuple[Entry, ...], more: Sequence[Entry], is_safe: IsSafe) -> tuple[Entry, ...]:
    """``kept`` and the longest safe prefix of ``more``, all of which is known to be too much."""
    safe, unsafe = 0, len(more)
    while unsafe - safe > 1:
        middle = (safe + unsafe) // 2
        if is_safe((*kept, *more[:middle])):
            safe = middle
        else:
            unsafe = middle
    return (*kept, *more[:safe])
