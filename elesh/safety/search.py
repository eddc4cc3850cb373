"""The largest safe part of a ranked cut, found by measuring few of its parts. Pure.

Promises: what is returned was measured as safe (or is empty); which parts are asked for depends on
the answers alone; they are at most about two logarithms of the length for each level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from leyline import Level

from .verification import Entry

__all__ = ["largest_safe"]

_LEVELS = (Level.CHANNEL, Level.HEAD, Level.LAYER)

IsSafe = Callable[[tuple[Entry, ...]], bool]


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
