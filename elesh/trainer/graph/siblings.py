"""Modules of which the example inputs reach only some (experts of a mixture), and values that do
not leave the module that makes them.

Promises: channels count as enclosed only where a module hands out nothing but what layers inside of
it made by mixing them, and only its siblings are then known not to read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elesh.trainer.network.sizes import holder_of_group
from leyline import PruningGroup

from .residual_branches import Trace

__all__ = ["beside", "enclosed_in"]


_NONE: set[str] = set()


def beside(layer: str, holder: str) -> bool:
    """Whether a layer is inside of a sibling of this module."""
    around, _, own = holder.rpartition(".")
    return bool(own) and layer.startswith(f"{around}.") and not f"{layer}.".startswith(f"{holder}.")


def enclosed_in(passage: Trace, groups: Sequence[PruningGroup]) -> Mapping[str, str]:
    """By group, the innermost module around all of it, where its channels do not leave that."""
    outputs: dict[Any, set[str]] = {}
    for one in passage.passes:
        if one.output is not None:
            outputs.setdefault(one.output, set()).add(one.name)
    found: dict[str, str] = {}
    for group in groups:
        holder = holder_of_group(group)
        readers = {site.module for site in group.sites}
        if holder and group.prunable and _encloses(holder, passage, outputs, group, readers):
            found[group.name] = holder
    return found


def _encloses(
    holder: str,
    passage: Trace,
    outputs: Mapping[Any, set[str]],
    group: PruningGroup,
    readers: set[str],
) -> bool:
    """Whether nothing that this module returned was made of the group's channels but by what reads
    them."""
    calls = [one for one in passage.passes if one.name == holder]
    if not calls or any(one.made is None or one.extra_outputs for one in calls):
        return False
    stack, seen = [one.made[0] for one in calls if one.made is not None], set[Any]()
    while stack:
        function = stack.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        names = outputs.get(function, _NONE)
        if not names.isdisjoint(group.layers):
            return False
        if names.isdisjoint(readers):
            stack += [before for before, _ in function.next_functions]
    return True
