"""Two decisions, or two sets of settings, side by side: what differs, and what that means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from leyline import StructuralPruningDecision

__all__ = ["Change", "changes", "moved"]


class Change(NamedTuple):
    """One value that differs: the path to it, what it was, what it is."""

    path: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.path}: {self.before} -> {self.after}"


def changes(before: Any, after: Any, path: str = "") -> Iterator[Change]:
    """Every difference of two JSON-like values; lists of other length are one difference."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            inside = f"{path}.{name}" if path else str(name)
            yield from changes(before.get(name), after.get(name), inside)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from changes(old, new, f"{path}[{index}]")
    elif before != after:
        yield Change(path, before, after)


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
        told = [
            f"{what} {', '.join(map(str, sorted(units)))}"
            for what, units in (("also", new - old), ("no longer", old - new))
            if units
        ]
        if told:
            lines.append(f"{name}: removes {'; '.join(told)}")
    return lines


def _layers(before: StructuralPruningDecision, after: StructuralPruningDecision) -> list[str]:
    old, new = ({target.layer_name for target in d.layers} for d in (before, after))
    return [f"layer {name} goes" for name in sorted(new - old)] + [
        f"layer {name} stays" for name in sorted(old - new)
    ]
