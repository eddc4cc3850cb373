"""Finds where a network's own code keeps sizes of groups that it does not run without.

Promises: nothing is changed. What is found is a guess: that masking is cutting with these sizes
set is for the proof to say.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from torch import nn

from elesh.trainer.network.kinds.written_sizes import POWERS, Lines, names_in, numbers_in
from elesh.trainer.network.sizes import holder_of_group, outwards
from leyline import Level, PruningGroup, WrittenSize

from .trial import TrialCuts

__all__ = ["unequivocal", "written_sizes"]

Kept = Literal["number", "root", "inverse_root"]

_KEPT: Mapping[type, tuple[Kept, ...]] = {int: ("number",), float: ("root", "inverse_root")}
"""What attributes of a type may keep of a size."""


def written_sizes(
    cuts: TrialCuts, model: nn.Module, group: PruningGroup, lines: Lines
) -> list[tuple[WrittenSize, ...]]:
    """Attributes that a cut leaves as they are, and numbers in the code around a group, of which
    each is so many times as many as it has units, or all that its layers make or read: around what
    makes the units; and, if they are more, around what reads them, too; and wherever the channels
    may pass.

    Args:
        lines: what is run of the code: only there a proof sees what it does.
    """
    layers = {part.tensor.rpartition(".")[0] for part in group.slices}
    layers.update(site.module for site in group.sites)
    near, wide = set(_around(group.layers)), set(_around(layers))
    holder = holder_of_group(group)
    passed = {path for path, _ in model.named_modules() if f"{path}.".startswith(f"{holder}.")}
    found = _found(cuts, model, group, sorted(wide | passed if holder else wide), lines)
    ways = [tuple(size for size in found if size.module in among) for among in (near, wide)]
    return [one for one in dict.fromkeys((*ways, tuple(found))) if one]


def unequivocal(
    model: nn.Module,
    groups: Mapping[str, PruningGroup],
    sizes: Mapping[str, tuple[WrittenSize, ...]],
) -> dict[str, tuple[WrittenSize, ...]]:
    """By group, the sizes without those that several groups would have for themselves; heads have
    them before widths (all heads together are often as wide as the stream)."""
    claimed, by_heads = Counter[Any](), Counter[Any]()
    for name, own in sizes.items():
        for size in own:
            many = size.width * groups[name].size
            claimed[_place(size)] += many
            by_heads[_place(size)] += many if groups[name].level is Level.HEAD else 0

    def is_own(name: str, size: WrittenSize) -> bool:
        claims = by_heads if groups[name].level is Level.HEAD else claimed
        return claims[_place(size)] <= _value(model, size)

    return {name: tuple(size for size in own if is_own(name, size)) for name, own in sizes.items()}


def _place(size: WrittenSize) -> tuple[str, str, int | None]:
    return size.module, size.name, size.number


def _value(model: nn.Module, size: WrittenSize) -> int:
    held = vars(model.get_submodule(size.module))
    return _counted(held[size.name], size.kept_as) if size.number is None else size.number


def _counted(value: float, how: Kept) -> int:
    """What number an attribute keeps in this way; 0 if none. Short fractions are none: they are
    probabilities, and no proof sees what training does with these."""
    power = POWERS[how]
    short = power < 0 and math.isclose(value * 1e4, round(value * 1e4), rel_tol=1e-9)
    number = value ** (1 / power) if value > 0 and not short else 0.0
    return round(number) if math.isclose(number, round(number), rel_tol=1e-6) else 0


def _found(
    cuts: TrialCuts, model: nn.Module, group: PruningGroup, paths: Iterable[str], lines: Lines
) -> list[WrittenSize]:
    """In the modules of these paths."""
    widths, found = _widths(cuts, group), list[WrittenSize]()
    named = dict(model.named_modules())
    modules = {path: named[path] for path in paths if path in named}  # No bare parameters.
    own = {path: one for path, one in modules.items() if not _is_pytorchs(one)}
    asked = set[str]().union(*(names_in(one, lines) for one in own.values()))
    kept = [
        (path, name, value, how)
        for path, module in own.items()
        for name, value in vars(module).items()
        if name in asked and type(value) in _KEPT
        for how in _KEPT[type(value)]
        if _counted(value, how) in widths
    ]
    with cuts.cut({group.name: range(group.size // 2)}):
        kept = [one for one in kept if vars(own[one[0]])[one[1]] == one[2]]
    for path, name, value, how in kept:
        width = widths[_counted(value, how)]
        found.append(WrittenSize(module=path, name=name, kept_as=how, width=width))
    for path, module in own.items():
        for name, number in numbers_in(module, lines):
            if number in widths:
                width = widths[number]
                found.append(WrittenSize(module=path, name=name, number=number, width=width))
    return found


def _widths(cuts: TrialCuts, group: PruningGroup) -> Mapping[int, int]:
    """Numbers that may count the units of a group, and how often each counts one."""
    parts = [part for part in group.slices if part.dim < 2]
    widths = {part.width for part in parts}
    times = {1, *widths, *(one // two for one in widths for two in widths if one % two == 0)}
    found = {group.size * n: n for n in sorted(times)}
    for part in parts:  # Several groups may share an axis.
        found.setdefault(cuts.whole[part.tensor].shape[part.dim], part.width)
    return found


def _around(layers: Iterable[str]) -> Iterator[str]:
    """The modules that hold layers, and these, the network first."""
    yield from dict.fromkeys(["", *(path for one in layers for path in outwards(one))])


def _is_pytorchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")
