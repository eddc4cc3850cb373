"""Two decisions, or two sets of settings, side by side: what differs, and what that means."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from leyline import StructuralPruningDecision

__all__ = ["Change", "changes", "moved", "rounded"]

_SHOWN = 160
"""Characters of a value that are shown of a difference."""
_ROUNDING = 1e-5
"""What float32 sums of another order may differ by: of a figure, or of 1 where it is smaller, since
figures near zero are differences of larger ones."""


class Change(NamedTuple):
    """One value that differs: the path to it, what it was, what it is."""

    path: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.path}: {_brief(self.before)} -> {_brief(self.after)}"


def changes(before: Any, after: Any, path: str = "") -> Iterator[Change]:
    """Every difference of two JSON-like values. Lists of things with names (gates, targets) are
    compared name by name; others of other length are one difference."""
    named_before, named_after = _by_name(before), _by_name(after)
    if named_before is not None and named_after is not None:
        old, new = list(named_before), list(named_after)
        if old != new and set(old) == set(new):
            yield Change(f"{path} (order)", old, new)
        for name in named_before | named_after:
            inside = f"{path}[{name}]"
            yield from changes(named_before.get(name), named_after.get(name), inside)
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            inside = f"{path}.{name}" if path else str(name)
            yield from changes(before.get(name), after.get(name), inside)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from changes(old, new, f"{path}[{index}]")
    elif before != after:
        yield Change(path, before, after)


def rounded(change: Change) -> bool:
    """Whether only rounding differs: two figures that another kind of processor, which adds up in
    another order, may both have measured."""
    before, after = change.before, change.after
    if not (isinstance(before, float) and isinstance(after, float)):
        return False
    return math.isclose(before, after, rel_tol=_ROUNDING, abs_tol=_ROUNDING)


def _by_name(value: Any) -> dict[str, Any] | None:
    """The members of a list by their names, in its order; None if not all have one of their own."""
    if not isinstance(value, list):
        return None
    named = {
        str(item.get("name", item.get("layer_name"))): item
        for item in value
        if isinstance(item, dict) and ("name" in item or "layer_name" in item)
    }
    return named if len(named) == len(value) else None


def _brief(value: Any) -> str:
    """A value on one line of which the start is enough to see what it is."""
    text = "none" if value is None else str(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]} ..."


def moved(before: StructuralPruningDecision, after: StructuralPruningDecision) -> list[str]:
    """What two decisions on one checkpoint do differently, in words: verdict, units, gates."""
    lines = []
    if (old := _verdict(before)) != (new := _verdict(after)):
        lines.append(f"was {old}, is {new}")
    lines += _units(before.units, after.units)
    lines += _layers(before, after)
    gates = {gate.name: gate.passed for gate in before.safety.gates}
    for gate in after.safety.gates:
        if gates.get(gate.name, gate.passed) != gate.passed:
            lines.append(f"gate {gate.name}: now {'passed' if gate.passed else 'failed'}")
    return lines


def _verdict(decision: StructuralPruningDecision) -> str:
    if decision.approved_for_application:
        return "approved"
    return f"rejected ({decision.rejection_reason})"


def _units(before: Mapping[str, Sequence[int]], after: Mapping[str, Sequence[int]]) -> list[str]:
    lines = []
    for name in sorted(before.keys() | after.keys()):
        old, new = set(before.get(name, ())), set(after.get(name, ()))
        gone = [
            f"{what} {', '.join(map(str, sorted(units)))}"
            for what, units in (("also", new - old), ("no longer", old - new))
            if units
        ]
        if gone:
            lines.append(f"{name}: removes {'; '.join(gone)}")
    return lines


def _layers(before: StructuralPruningDecision, after: StructuralPruningDecision) -> list[str]:
    old, new = ({target.layer_name for target in d.layers} for d in (before, after))
    return [f"layer {name} goes" for name in sorted(new - old)] + [
        f"layer {name} stays" for name in sorted(old - new)
    ]
