"""Checks a caller's arguments before anything begins; a wrong one is named."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import distributed, nn

from leyline import InvalidField, Level

_STRUCTURES = (Level.CHANNEL, Level.HEAD, Level.LAYER)
"""Levels of which a network becomes smaller."""


def require_network(model: Any) -> None:
    """That a network was given, and not its class or its weights.

    Raises:
        InvalidField: if it was not.
    """
    if isinstance(model, type) or not isinstance(model, nn.Module):
        raise InvalidField("model", "a network (torch.nn.Module)", model)


def require_one_process(processes: int = 1) -> None:
    """That no other process trains the network, too: each would be cut differently.

    Args:
        processes: that train together, as the framework says.

    Raises:
        InvalidField: if ``torch.distributed`` or the framework has several.
    """
    if distributed.is_available() and distributed.is_initialized():
        processes = max(processes, distributed.get_world_size())
    if processes > 1:
        hint = (
            "decide on rank 0 and make the same cut on every rank, with Recorder, Surgeon and "
            "elesh.trainer.session.all_ranks.AllRanks (docs/training.md), or train in one process"
        )
        raise InvalidField("processes", "one training process", processes, hint=hint)


def levels_of(levels: Iterable[str], known: Sequence[Level] = _STRUCTURES) -> tuple[Level, ...]:
    """The levels of these names, each once.

    Raises:
        InvalidField: if one is not known, or there is none.
    """
    names = [levels] if isinstance(levels, str) else list(dict.fromkeys(levels))
    values = tuple(level.value for level in known)
    for name in names:
        if name not in values:
            raise InvalidField("levels", f"some of {values}", name)
    if not names:
        raise InvalidField("levels", f"at least one of {values}", levels)
    return tuple(Level(name) for name in names)


def require_share(name: str, share: Any, expected: str, *, least: float = 0.0) -> None:
    """That a number is from ``least`` to 1: 5 is not five percent.

    Raises:
        InvalidField: if it is not.
    """
    number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if not number or not least <= share <= 1:
        raise InvalidField(name, expected, share)


def whole_number(name: str, number: Any, *, least: int) -> int:
    """A plain whole number; NumPy and tensors have them, too.

    Raises:
        InvalidField: if it is none, or too small.
    """
    try:
        found = operator.index(number)
    except TypeError:
        found = least - 1
    if found < least:
        raise InvalidField(name, f"a whole number, at least {least}", number)
    return found
